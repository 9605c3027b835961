"""The layers of convolutions: `DeformConv2d`, with its offsets inside, and the resampled feature map."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dcn_kernels.torch.ops import FUNCTIONS, not_scripted

Pair = int | tuple[int, int]


def pair_of(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class _Slower(torch.autograd.Function):
    """The identity whose gradient is `beta` times that of the result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, beta: float) -> Tensor:  # type: ignore[override]
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.beta = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.beta, None


def slower(parameter: Tensor, beta: float) -> Tensor:
    """A parameter that learns `beta` times as fast. In the forward, as a hook would be lost in a copied model."""
    return parameter if beta == 1 else _Slower.apply(parameter, beta)


def zero(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class NotScripted:
    """A layer, alone or in a model, of which torch.jit.script says what to use instead."""

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks each module for this first."""
        raise RuntimeError(not_scripted(type(self).__name__))


class DeformConv2d(NotScripted, nn.Module):
    """Deformable convolution with offsets from outside: constructor, parameters and state_dict of torchvision's.

    Parameters
    ----------
    in_channels, out_channels, groups : int
    kernel_size, stride, padding, dilation : int or (h, w)
        `padding` may also be "valid", or "same" with stride 1.
    bias : bool
    border : {"zeros", "msra", "edge"}
        As in `dcn_kernels.deform_conv2d`.

    Examples
    --------
    >>> import torch
    >>> layer = DeformConv2d(3, 8, 3, padding=1)
    >>> layer(torch.rand(1, 3, 5, 5), torch.zeros(1, 18, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        border: str = "zeros",
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(
                    f"{type(self).__name__}: {name}: expected a multiple of groups = {groups}, got {channels}"
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair_of(kernel_size)
        self.stride = pair_of(stride)
        self.dilation = pair_of(dilation)
        self.padding = self._padding(padding)
        self.groups = groups
        self.border = border
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _padding(self, padding: Pair | str) -> tuple[int, int]:
        """Numbers; "same", as torch.nn.Conv2d has it, where it is the same on both sides, and "valid"."""
        if not isinstance(padding, str):
            return pair_of(padding)
        if padding == "valid":
            return (0, 0)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if padding != "same" or self.stride != (1, 1) or any(length % 2 for length in reach):
            raise ValueError(
                f'{type(self).__name__}: padding: expected an int, a pair, "valid", or "same" with stride 1 and '
                f"an even dilation*(kernel_size - 1), got {padding!r}"
            )
        return reach[0] // 2, reach[1] // 2

    def reset_parameters(self) -> None:
        """As torch.nn.Conv2d and torchvision's layer do."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in, _ = nn.init._calculate_fan_in_and_fan_out(self.weight)
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """input (N, C, H, W), offset (N, 2*OG*KH*KW, OH, OW), mask (N, OG*KH*KW, OH, OW) -> (N, O, OH, OW)."""
        return FUNCTIONS["deform_conv2d"](
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask, border=self.border
        )

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "border")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names) + f", bias={self.bias is not None}"


class DeformConv2dPack(DeformConv2d):
    """Deformable convolution with the convolution of its offsets inside (section 2.1).

    `conv_offset` has the layer's own kernel, stride, padding and dilation, and starts at zero, so that the layer starts
    as a plain convolution.

    Parameters
    ----------
    offset_groups : int
        OG.
    beta : float
        How fast `conv_offset` learns beside the other layers (section 2.3). It multiplies the gradient of its
        parameters, which is a factor of the learning rate for SGD; an optimizer that divides by the gradient's size,
        such as Adam, needs a parameter group with a learning rate of its own instead.

    Other parameters are those of `DeformConv2d`.

    Examples
    --------
    >>> import torch
    >>> DeformConv2dPack(3, 8, 3, padding=1)(torch.rand(1, 3, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    per_tap = 2  # channels of conv_offset for each tap

    def __init__(self, *args: Any, offset_groups: int = 1, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.offset_groups = offset_groups
        self.beta = beta
        channels = self.per_tap * offset_groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            self.in_channels, channels, self.kernel_size, self.stride, self.padding, self.dilation
        )
        zero(self.conv_offset)

    def offsets(self, input: Tensor) -> Tensor:
        """What `conv_offset` says: (N, per_tap*OG*KH*KW, OH, OW)."""
        conv = self.conv_offset
        if self.beta == 1:
            return conv(input)
        weight, bias = slower(conv.weight, self.beta), slower(conv.bias, self.beta)  # type: ignore[arg-type]
        return nn.functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """input (N, C, H, W) -> (N, O, OH, OW)."""
        return super().forward(input, self.offsets(input))


class ModulatedDeformConv2dPack(DeformConv2dPack):
    """`DeformConv2dPack` with a mask too (version 2): the last third of `conv_offset`, through a sigmoid.

    At the start every mask is 0.5. The state_dict is that of mmcv's layer of this name.

    Examples
    --------
    >>> import torch
    >>> ModulatedDeformConv2dPack(3, 8, 3, padding=1)(torch.rand(1, 3, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    per_tap = 3

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """input (N, C, H, W) -> (N, O, OH, OW)."""
        first, second, mask = self.offsets(input).chunk(3, dim=1)
        return DeformConv2d.forward(self, input, torch.cat((first, second), dim=1), mask.sigmoid())


class ConvOffset2D(NotScripted, nn.Conv2d):
    """The feature map resampled at offsets that a convolution computes, one offset field per channel.

    Parameters
    ----------
    channels : int
        C.
    std : float
        The weights start normally distributed with this standard deviation, as in pytorch-deform-conv.

    Examples
    --------
    >>> import torch
    >>> ConvOffset2D(3)(torch.rand(1, 3, 5, 5)).shape
    torch.Size([1, 3, 5, 5])
    """

    def __init__(self, channels: int, std: float = 0.01) -> None:
        super().__init__(channels, 2 * channels, 3, padding=1, bias=False)
        nn.init.normal_(self.weight, 0.0, std)

    def forward(self, input: Tensor) -> Tensor:
        """input (N, C, H, W) -> (N, C, H, W)."""
        return FUNCTIONS["offset_sample2d"](input, super().forward(input))
