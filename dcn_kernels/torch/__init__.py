"""Every operator as a differentiable torch function, and the layers made of them: `import dcn_kernels.torch`.

The functions are made from the registry in `dcn_kernels.torch.ops` and take what the plain functions take, but for
`out` and `backend`.

Examples
--------
>>> import torch
>>> from dcn_kernels.torch import DeformConv2dPack, deform_conv2d
>>> layer = DeformConv2dPack(3, 8, kernel_size=3, padding=1)  # its offsets start at zero: a plain convolution
>>> layer(torch.rand(2, 3, 16, 16)).shape
torch.Size([2, 8, 16, 16])
>>> offset = torch.zeros(2, 18, 16, 16, requires_grad=True)
>>> deform_conv2d(torch.rand(2, 3, 16, 16), offset, torch.rand(8, 3, 3, 3), padding=1).sum().backward()
>>> offset.grad.shape
torch.Size([2, 18, 16, 16])
"""

from __future__ import annotations

from typing import Any

import dcn_kernels
from dcn_kernels.torch.layers import ConvOffset2D, DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from dcn_kernels.torch.ops import FUNCTIONS, function_of
from dcn_kernels.torch.recording import record_layers
from dcn_kernels.torch.replacements import replace_layers
from dcn_kernels.torch.roi_layers import (
    DeformPSRoIPool,
    DeformPSRoIPoolPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    PSRoIAlign,
    PSRoIPool,
    RoIAlign,
    RoIPool,
)

globals().update(FUNCTIONS)


__all__ = [
    *FUNCTIONS,
    "ConvOffset2D",
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformPSRoIPool",
    "DeformPSRoIPoolPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2dPack",
    "PSRoIAlign",
    "PSRoIPool",
    "RoIAlign",
    "RoIPool",
    "record_layers",
    "replace_layers",
]


def __getattr__(name: str) -> Any:
    """The function of a row that was registered after this module was imported."""
    op = dcn_kernels.OPS.get(name)
    if op is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in FUNCTIONS:
        FUNCTIONS[name] = function_of(op)
    return FUNCTIONS[name]
