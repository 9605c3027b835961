"""The layers of regions: the options of a RoI operator, kept, and those with their offsets inside."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from dcn_kernels.torch.layers import NotScripted, Pair, pair_of, slower, zero
from dcn_kernels.torch.ops import FUNCTIONS, no_guess, rois_of


class RoILayer(NotScripted, nn.Module):
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


class RoIPool(RoILayer):
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


class PSRoIPool(RoILayer):
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
            raise no_guess("PSRoIPool")
        self._keep(output_size=output_size, spatial_scale=spatial_scale, group_size=group_size, convention=convention)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """input (N, C, H, W) -> (R, C/(G*G), PH, PW)."""
        return FUNCTIONS["ps_roi_pool"](input, rois, **self._options())


class RoIAlign(RoILayer):
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


class PSRoIAlign(RoILayer):
    """`dcn_kernels.ps_roi_align`; constructor of torchvision's."""

    names = ("output_size", "spatial_scale", "sampling_ratio")

    def __init__(self, output_size: Pair, spatial_scale: float = 1.0, sampling_ratio: int = -1) -> None:
        super().__init__()
        self._keep(output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """input (N, C, H, W) -> (R, C/(PH*PW), PH, PW)."""
        return FUNCTIONS["ps_roi_align"](input, rois, **self._options())


class DeformRoIPool(RoILayer):
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
        bins = math.prod(pair_of(output_size))
        self.fc_offset = nn.Linear(channels * bins, 2 * bins)
        zero(self.fc_offset)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:  # type: ignore[override]
        """input (N, C, H, W) -> (R, C, PH, PW)."""
        rois = rois_of(rois)
        pooled = super().forward(input, rois).flatten(1)
        fc = self.fc_offset
        offset = nn.functional.linear(pooled, slower(fc.weight, self.beta), slower(fc.bias, self.beta))
        return super().forward(input, rois, offset.view(-1, 2, *pair_of(self.output_size)))  # type: ignore[arg-type]


class DeformPSRoIPool(RoILayer):
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
        zero(self.conv_offset)

    def forward(self, scores: Tensor, features: Tensor, rois: Tensor | list[Tensor]) -> Tensor:  # type: ignore[override]
        """scores (N, C, H, W), features (N, channels, H, W) -> (R, C/(G*G), PH, PW)."""
        rois = rois_of(rois)
        conv = self.conv_offset
        fields = nn.functional.conv2d(features, slower(conv.weight, self.beta), slower(conv.bias, self.beta))  # type: ignore[arg-type]
        trans = FUNCTIONS["ps_roi_pool"](fields, rois, self.parts, self.spatial_scale, convention="rfcn")  # type: ignore[arg-type]
        return super().forward(scores, rois, trans)
