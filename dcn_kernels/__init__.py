"""The operators of Deformable Convolutional Networks as framework-independent kernels on plain arrays.

Every function takes arrays of any DLPack framework, computes on the device where they are, and returns the
caller's own kind of array. See `OPS` for the list of operators.
"""

from dcn_kernels.deformation.dilation_classes import effective_dilation_by_class
from dcn_kernels.deformation.roi_bins import deform_ps_roi_bins, deform_roi_bins
from dcn_kernels.deformation.sampling_points import (
    effective_dilation,
    offset_statistics,
    sampling_points,
    stacked_sampling_points,
)
from dcn_kernels.ops.deform_conv import convert_offsets, deform_conv2d, deform_conv2d_backward
from dcn_kernels.ops.deform_roi_pool import (
    deform_ps_roi_pool,
    deform_ps_roi_pool_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
)
from dcn_kernels.ops.offset_sample import offset_sample2d, offset_sample2d_backward
from dcn_kernels.ops.registry import OPS
from dcn_kernels.ops.roi_pool import (
    ps_roi_align,
    ps_roi_align_backward,
    ps_roi_pool,
    ps_roi_pool_backward,
    roi_align,
    roi_align_backward,
    roi_pool,
    roi_pool_backward,
)

__version__ = "0.1.0"

__all__ = [
    "OPS",
    "__version__",
    "convert_offsets",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_ps_roi_bins",
    "deform_ps_roi_pool",
    "deform_ps_roi_pool_backward",
    "deform_roi_bins",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "effective_dilation",
    "effective_dilation_by_class",
    "offset_sample2d",
    "offset_sample2d_backward",
    "offset_statistics",
    "ps_roi_align",
    "ps_roi_align_backward",
    "ps_roi_pool",
    "ps_roi_pool_backward",
    "roi_align",
    "roi_align_backward",
    "roi_pool",
    "roi_pool_backward",
    "sampling_points",
    "stacked_sampling_points",
]
