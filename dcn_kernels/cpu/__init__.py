"""Numba kernels for CPUs: one nogil-compiled worker per operator and direction, run by a few threads at once.

jit.py        `kernel`: compile, and cache on disk under a hash of this folder
threads.py    run a worker on several threads; barrier and claim between them
workspace.py  the one place where temporary memory is sized, made and counted
lanes.py      runs of channels as LLVM vectors: blend, dots, spread
convert.py    runs of elements of any dtype and stride in and out
sampling.py   the border rules and the corner tables
gemm.py       the matrix product's inner loops
"""
