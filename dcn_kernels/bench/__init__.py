"""Behind `dcn-bench`: layers, inputs, clocks, peers, records and pictures."""
