"""Deformable convolution on a GPU, where the dispatcher looks for it. Each direction has a file of its own."""

from dcn_kernels.cuda.deform_conv_backward import deform_conv2d_backward
from dcn_kernels.cuda.deform_conv_forward import deform_conv2d

__all__ = ["deform_conv2d", "deform_conv2d_backward"]
