"""All operators. A row added here is in the checks, the benchmark, the table tests and the README."""

from dcn_kernels.dispatch.row import Op
from dcn_kernels.ops.deform_conv import DEFORM_CONV2D
from dcn_kernels.ops.deform_roi_pool import DEFORM_PS_ROI_POOL, DEFORM_ROI_POOL
from dcn_kernels.ops.offset_sample import OFFSET_SAMPLE2D
from dcn_kernels.ops.roi_pool import PS_ROI_ALIGN, PS_ROI_POOL, ROI_ALIGN, ROI_POOL

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        DEFORM_CONV2D,
        OFFSET_SAMPLE2D,
        ROI_POOL,
        PS_ROI_POOL,
        DEFORM_ROI_POOL,
        DEFORM_PS_ROI_POOL,
        ROI_ALIGN,
        PS_ROI_ALIGN,
    )
}
