"""Behind `dcn-check`: is a gradient right, do the backends agree, do the checks notice a fault."""
