"""Deformable convolution on NumPy arrays: a filter that finds a moved edge by gradient descent on its offsets alone."""

import numpy as np

from dcn_kernels import deform_conv2d, deform_conv2d_backward

image = np.zeros((1, 1, 8, 16), np.float32)
image[..., 8:] = np.linspace(0, 1, 8, dtype=np.float32)  # a ramp on the right half
target = np.roll(image, -2, axis=3)  # the same, two pixels to the left
weight = np.ones((1, 1, 1, 1), np.float32)
offset = np.full((1, 2, 8, 16), 0.1, np.float32)  # dy, dx of the one tap, in pixels

losses = []
for _ in range(200):
    output = deform_conv2d(image, offset, weight)
    error = (output - target)[..., 5:12]  # away from the borders
    losses.append(float((error**2).mean()))
    grad_output = np.zeros_like(output)
    grad_output[..., 5:12] = error
    offset -= 2 * deform_conv2d_backward(grad_output, image, offset, weight, wrt="offset")["offset"]

print(f"loss {losses[0]:.4f} -> {losses[-1]:.6f}; mean dx on the ramp {offset[0, 1, :, 8:11].mean():.2f} pixels")
assert losses[-1] < losses[0] / 10
