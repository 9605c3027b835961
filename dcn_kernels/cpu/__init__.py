"""Numba kernels for CPUs: one nogil-compiled worker per operator and direction, run by a few threads at once.

jit.py        `kernel`: compile, and cache on disk under a hash of the code that a kernel is made of
threads.py    run a worker on several threads; barrier and claim between them
workspace.py  the one place where temporary memory is sized, made and counted
convert.py    runs of elements of any dtype and stride in and out
lanes.py      runs of channels as LLVM vectors: blend, dots, scatter, transpose
slabs.py      channels cut into slabs, and images staged slab by slab
sampling.py   the border rules and the corner tables
columns.py    samples of deformable convolution, and the way back of their gradients
gemm.py       the matrix product's inner loops
deform_conv.py, deform_conv_backward.py, offset_sample.py
              the operators that sample at pixels

bins.py       which lines of pixels a RoI's bin touches, one axis at a time
roi_plan.py   the plan of a call, and the pieces that its work is cut into
roi_lists.py  the lines of a RoI's bins, as a thread keeps them
roi_lanes.py  sums and maxima over a bin for 16 channels at once
roi_blocks.py maps and pooled values in and out
roi_mean.py, roi_max.py, roi_sum.py
              means over points and pixels, maxima, sums over pixels of score maps
roi_pool.py, deform_roi_pool.py
              which of them works on an operator
"""
