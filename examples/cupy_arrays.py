"""The same functions on CuPy arrays: they run on the GPU where the arrays are, on CuPy's current stream."""

import cupy
import numpy as np

from dcn_kernels import deform_conv2d, deform_conv2d_backward

rng = np.random.default_rng(0)
arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 16, 20, 24), (2, 18, 20, 24), (8, 16, 3, 3))]
on_gpu = [cupy.asarray(array) for array in arrays]

output = deform_conv2d(*on_gpu, padding=1)
gradients = deform_conv2d_backward(cupy.ones_like(output), *on_gpu, padding=1)
print(type(output).__module__, output.device, {name: gradient.shape for name, gradient in gradients.items()})

error = np.abs(output.get() - deform_conv2d(*arrays, padding=1)).max()
print(f"largest difference from the CPU's result: {error:.2g}")
assert error < 1e-3
