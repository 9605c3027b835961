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

import math
from typing import Any

import torch
from torch import Tensor, nn

import dcn_kernels
from dcn_kernels.torch.ops import FUNCTIONS, function_of, rois_of
from dcn_kernels.torch.recording import record_layers

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

Pair = int | tuple[int, int]


def __getattr__(name: str) -> Any:
    """The function of a row that was registered after this module was imported."""
    op = dcn_kernels.OPS.get(name)
    if op is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in FUNCTIONS:
        FUNCTIONS[name] = function_of(op)
    return FUNCTIONS[name]


def _pair(value: Pair) -> tuple[int, int]:
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


def _slower(parameter: Tensor, beta: float) -> Tensor:
    """A parameter that learns `beta` times as fast. In the forward, as a hook would be lost in a copied model."""
    return parameter if beta == 1 else _Slower.apply(parameter, beta)


def _zero(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class DeformConv2d(nn.Module):
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
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.dilation = _pair(dilation)
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
            return _pair(padding)
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
        _zero(self.conv_offset)

    def offsets(self, input: Tensor) -> Tensor:
        """What `conv_offset` says: (N, per_tap*OG*KH*KW, OH, OW)."""
        conv = self.conv_offset
        weight, bias = _slower(conv.weight, self.beta), _slower(conv.bias, self.beta)  # type: ignore[arg-type]
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


class ConvOffset2D(nn.Conv2d):
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


# ---------------------------------------------------------------- regions


class _RoILayer(nn.Module):
    """The options of a RoI operator, kept."""

    names: tuple[str, ...] = ()

    def _keep(self, **options: Any) -> None:
        for name, value in options.items():
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.names}

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return ", ".join(f"{name}={value}" for name, value in self._options().items())


class RoIPool(_RoILayer):
    """`dcn_kernels.roi_pool`, maximum or mean. `rois`: (R, 5), or a list of (R_n, 4), one per image.

    Examples
    --------
    >>> import torch
    >>> RoIPool(2, 0.5)(torch.rand(1, 3, 8, 8), torch.tensor([[0.0, 0, 0, 15, 15]])).shape
    torch.Size([1, 3, 2, 2])
    """

    names = ("output_size", "spatial_scale", "mode")

    def __init__(self, output_size: Pair, spatial_scale: float = 1.0, *, mode: str = "max") -> None:
        super().__init__()
        self._keep(output_size=output_size, spatial_scale=spatial_scale, mode=mode)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """input (N, C, H, W) -> (R, C, PH, PW)."""
        return FUNCTIONS["roi_pool"](input, rois, **self._options())


class PSRoIPool(_RoILayer):
    """`dcn_kernels.ps_roi_pool`: each bin averages score maps of its own.

    torchvision's layer of this name has convention "torchvision", R-FCN's own is "rfcn"; their numbers differ, so
    `convention` has no default here.

    Examples
    --------
    >>> import torch
    >>> PSRoIPool(2, 0.5, convention="rfcn")(torch.rand(1, 12, 8, 8), torch.tensor([[0.0, 0, 0, 15, 15]])).shape
    torch.Size([1, 3, 2, 2])
    """

    names = ("output_size", "spatial_scale", "group_size", "convention")

    def __init__(
        self,
        output_size: Pair,
        spatial_scale: float = 1.0,
        *,
        group_size: int | None = None,
        convention: str | None = None,
    ) -> None:
        super().__init__()
        if convention is None:
            raise TypeError(
                'PSRoIPool: convention: expected "torchvision" (what torchvision.ops.PSRoIPool computes) or "rfcn", '
                "got None: their numbers differ"
            )
        self._keep(output_size=output_size, spatial_scale=spatial_scale, group_size=group_size, convention=convention)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """input (N, C, H, W) -> (R, C/(G*G), PH, PW)."""
        return FUNCTIONS["ps_roi_pool"](input, rois, **self._options())


class RoIAlign(_RoILayer):
    """`dcn_kernels.roi_align`; constructor of torchvision's."""

    names = ("output_size", "spatial_scale", "sampling_ratio", "aligned")

    def __init__(
        self, output_size: Pair, spatial_scale: float = 1.0, sampling_ratio: int = -1, aligned: bool = False
    ) -> None:
        super().__init__()
        self._keep(output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, aligned=aligned)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """input (N, C, H, W) -> (R, C, PH, PW)."""
        return FUNCTIONS["roi_align"](input, rois, **self._options())


class PSRoIAlign(_RoILayer):
    """`dcn_kernels.ps_roi_align`; constructor of torchvision's."""

    names = ("output_size", "spatial_scale", "sampling_ratio")

    def __init__(self, output_size: Pair, spatial_scale: float = 1.0, sampling_ratio: int = -1) -> None:
        super().__init__()
        self._keep(output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """input (N, C, H, W) -> (R, C/(PH*PW), PH, PW)."""
        return FUNCTIONS["ps_roi_align"](input, rois, **self._options())


class DeformRoIPool(_RoILayer):
    """`dcn_kernels.deform_roi_pool` with offsets from outside.

    Examples
    --------
    >>> import torch
    >>> layer = DeformRoIPool(2, 0.5)
    >>> layer(torch.rand(1, 3, 8, 8), torch.tensor([[0.0, 0, 0, 15, 15]]), torch.zeros(1, 2, 2, 2)).shape
    torch.Size([1, 3, 2, 2])
    """

    names = ("output_size", "spatial_scale", "gamma", "sampling_ratio", "convention")

    def __init__(
        self,
        output_size: Pair,
        spatial_scale: float = 1.0,
        *,
        gamma: float = 0.1,
        sampling_ratio: int = 0,
        convention: str = "paper",
    ) -> None:
        super().__init__()
        self._keep(
            output_size=output_size,
            spatial_scale=spatial_scale,
            gamma=gamma,
            sampling_ratio=sampling_ratio,
            convention=convention,
        )

    def forward(
        self, input: Tensor, rois: Tensor | list[Tensor], offset: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """input (N, C, H, W), offset (R, 2, PH, PW), mask (R, PH, PW) -> (R, C, PH, PW)."""
        return FUNCTIONS["deform_roi_pool"](input, rois, offset, mask, **self._options())


class DeformRoIPoolPack(DeformRoIPool):
    """Pooling, a fully connected layer for the offsets, and deformable pooling (Fig. 3).

    Parameters
    ----------
    output_size, **options
        As in `DeformRoIPool`.
    channels : int
        C of the input.
    beta : float
        How fast `fc_offset` learns (section 2.3); see `DeformConv2dPack`. It starts at zero.

    Examples
    --------
    >>> import torch
    >>> DeformRoIPoolPack(2, 3)(torch.rand(1, 3, 8, 8), torch.tensor([[0.0, 0, 0, 7, 7]])).shape
    torch.Size([1, 3, 2, 2])
    """

    def __init__(
        self, output_size: Pair, channels: int, spatial_scale: float = 1.0, *, beta: float = 0.01, **options: Any
    ) -> None:
        super().__init__(output_size, spatial_scale, **options)
        self.beta = beta
        bins = math.prod(_pair(output_size))
        self.fc_offset = nn.Linear(channels * bins, 2 * bins)
        _zero(self.fc_offset)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:  # type: ignore[override]
        """input (N, C, H, W) -> (R, C, PH, PW)."""
        rois = rois_of(rois)
        pooled = super().forward(input, rois).flatten(1)
        fc = self.fc_offset
        offset = nn.functional.linear(pooled, _slower(fc.weight, self.beta), _slower(fc.bias, self.beta))
        return super().forward(input, rois, offset.view(-1, 2, *_pair(self.output_size)))  # type: ignore[arg-type]


class DeformPSRoIPool(_RoILayer):
    """`dcn_kernels.deform_ps_roi_pool` with translations from outside.

    Examples
    --------
    >>> import torch
    >>> DeformPSRoIPool(2)(torch.rand(1, 12, 8, 8), torch.tensor([[0.0, 0, 0, 7, 7]])).shape
    torch.Size([1, 3, 2, 2])
    """

    names = ("output_size", "spatial_scale", "group_size", "part_size", "sample_per_part", "trans_std")

    def __init__(
        self,
        output_size: Pair,
        spatial_scale: float = 1.0,
        *,
        group_size: int | None = None,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.1,
    ) -> None:
        super().__init__()
        self._keep(
            output_size=output_size,
            spatial_scale=spatial_scale,
            group_size=group_size,
            part_size=part_size,
            sample_per_part=sample_per_part,
            trans_std=trans_std,
        )

    def forward(self, input: Tensor, rois: Tensor | list[Tensor], trans: Tensor | None = None) -> Tensor:
        """input (N, C, H, W), trans (R, 2*classes, part, part) -> (R, C/(G*G), PH, PW)."""
        return FUNCTIONS["deform_ps_roi_pool"](input, rois, trans, **self._options())


class DeformPSRoIPoolPack(DeformPSRoIPool):
    """Deformable position-sensitive pooling whose translations are pooled position-sensitively too (Fig. 4).

    Parameters
    ----------
    output_size : int
        P.
    channels : int
        Channels of the feature map from which a 1x1 convolution makes the offset fields.
    classes : int
        Classes with translations of their own; 1 means the same for all.
    beta : float
        How fast `conv_offset` learns; see `DeformConv2dPack`. It starts at zero.

    Other parameters are those of `DeformPSRoIPool`.

    Examples
    --------
    >>> import torch
    >>> rois = torch.tensor([[0.0, 0, 0, 7, 7]])
    >>> DeformPSRoIPoolPack(2, 5)(torch.rand(1, 12, 8, 8), torch.rand(1, 5, 8, 8), rois).shape
    torch.Size([1, 3, 2, 2])
    """

    def __init__(
        self,
        output_size: int,
        channels: int,
        spatial_scale: float = 1.0,
        *,
        classes: int = 1,
        beta: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(output_size, spatial_scale, **options)
        self.beta = beta
        part_size = options.get("part_size")
        parts = output_size if part_size is None else int(part_size)
        self.parts = parts
        self.conv_offset = nn.Conv2d(channels, 2 * classes * parts * parts, 1)
        _zero(self.conv_offset)

    def forward(self, scores: Tensor, features: Tensor, rois: Tensor | list[Tensor]) -> Tensor:  # type: ignore[override]
        """scores (N, C, H, W), features (N, channels, H, W) -> (R, C/(G*G), PH, PW)."""
        rois = rois_of(rois)
        conv = self.conv_offset
        fields = nn.functional.conv2d(features, _slower(conv.weight, self.beta), _slower(conv.bias, self.beta))  # type: ignore[arg-type]
        return super().forward(scores, rois, FUNCTIONS["ps_roi_pool"](fields, rois, self.parts, self.spatial_scale))  # type: ignore[arg-type]


# ---------------------------------------------------------------- a model that has torchvision's layers

_REPLACEMENTS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "DeformConv2d": (DeformConv2d, {"border": "zeros"}),
    "RoIPool": (RoIPool, {"mode": "max"}),
    "PSRoIPool": (PSRoIPool, {"group_size": None, "convention": "torchvision"}),
    "RoIAlign": (RoIAlign, {}),
    "PSRoIAlign": (PSRoIAlign, {}),
}


def replace_layers(model: nn.Module) -> nn.Module:
    """Replace torchvision's DeformConv2d, RoIPool, PSRoIPool, RoIAlign and PSRoIAlign in a model, in place.

    Parameters and their names, buffers and hooks stay the same objects, so an optimizer and a state_dict stay valid.
    Functions that a model calls by itself, as torchvision's MultiScaleRoIAlign does, are not replaced.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The model, or the new layer where the model itself is one of them.
    """
    done: dict[nn.Module, nn.Module] = {}

    def replaced(module: nn.Module) -> nn.Module:
        if module not in done:
            kind = type(module)
            if kind.__module__.startswith("torchvision.ops.") and kind.__name__ in _REPLACEMENTS:
                layer, more = _REPLACEMENTS[kind.__name__]
                new = layer.__new__(layer)
                new.__dict__ = {**module.__dict__, **more}  # its attributes have the same names
                done[module] = new
            else:
                done[module] = module
                for name, child in list(module._modules.items()):  # one that stands under two names is met twice
                    if child is not None:
                        setattr(module, name, replaced(child))
        return done[module]

    return replaced(model)
