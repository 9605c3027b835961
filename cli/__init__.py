"""The commands: installed as dcn_kernels.cli."""
