"""All operators. A row added here is in the checks, the benchmark, the table tests and the README."""

from dcn_kernels.deform_conv import DEFORM_CONV2D
from dcn_kernels.offset_sample import OFFSET_SAMPLE2D
from dcn_kernels.op import Op

OPS: dict[str, Op] = {op.name: op for op in (DEFORM_CONV2D, OFFSET_SAMPLE2D)}
