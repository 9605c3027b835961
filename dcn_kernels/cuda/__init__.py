"""Raw CUDA kernels through CuPy."""
