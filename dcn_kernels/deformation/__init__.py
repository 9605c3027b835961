"""Where a filter looks: sampling points, dilations by class of region, bins of RoIs, and their pictures."""
