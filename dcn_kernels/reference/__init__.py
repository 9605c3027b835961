"""NumPy float64, beside the equations. Never optimised: what the other backends are checked against."""
