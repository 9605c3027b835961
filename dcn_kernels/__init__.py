"""The operators of Deformable Convolutional Networks as framework-independent kernels on plain arrays.

Every function takes arrays of any DLPack framework, computes on the device where they are, and returns the
caller's own kind of array. See `OPS` for the list of operators.
"""

from dcn_kernels.deform_conv import convert_offsets, deform_conv2d, deform_conv2d_backward
from dcn_kernels.offset_sample import offset_sample2d, offset_sample2d_backward
from dcn_kernels.registry import OPS

__version__ = "0.1.0"

__all__ = [
    "OPS",
    "__version__",
    "convert_offsets",
    "deform_conv2d",
    "deform_conv2d_backward",
    "offset_sample2d",
    "offset_sample2d_backward",
]
