"""`replace_layers`: the layers of torchvision, detectron2, mmcv and the stand-alone DCNv2 in a model, for those here.

None of these libraries is imported. A layer is known by the name of its class, what its forward takes, and the
attributes and submodules that it has.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcn_kernels.torch.layers import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, pair_of
from dcn_kernels.torch.ops import FUNCTIONS, HALVES, rois_of
from dcn_kernels.torch.roi_layers import DeformRoIPool, PSRoIAlign, PSRoIPool, RoIAlign, RoILayer, RoIPool

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- layers that only other libraries have


class NormDeformConv2d(DeformConv2d):
    """detectron2's DeformConv and ModulatedDeformConv: `norm` and `activation` follow where they are not None."""

    norm: Any
    activation: Any

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """As in `DeformConv2d`."""
        output = super().forward(input, offset, mask)
        for step in (self.norm, self.activation):
            if step is not None:
                output = step(output)
        return output


class OffsetMaskDeformConv2d(DeformConv2d):
    """DCN of the stand-alone DCNv2: `ModulatedDeformConv2dPack` whose convolution is called `conv_offset_mask`."""

    conv_offset_mask: nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """input (N, C, H, W) -> (N, O, OH, OW)."""
        first, second, mask = self.conv_offset_mask(input).chunk(3, dim=1)
        return super().forward(input, torch.cat((first, second), dim=1), mask.sigmoid())


class FcDeformRoIPool(DeformRoIPool):
    """mmcv's DeformRoIPoolPack, and with `mask_fc` its ModulatedDeformRoIPoolPack: offsets by `offset_fc`."""

    output_size: Any
    offset_fc: nn.Module
    mask_fc: nn.Module

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:  # type: ignore[override]
        """input (N, C, H, W) -> (R, C, PH, PW)."""
        bins, regions = pair_of(self.output_size), super().forward(input, rois).flatten(1)
        mask = self.mask_fc(regions).view(-1, *bins) if hasattr(self, "mask_fc") else None
        return super().forward(input, rois, self.offset_fc(regions).view(-1, 2, *bins), mask)


class MultiScaleRoIAlign(RoILayer):
    """torchvision's: `roi_align` of each region on the level of a feature pyramid that fits the region's size."""

    names = ("featmap_names", "output_size", "sampling_ratio")
    featmap_names: list[str]
    output_size: tuple[int, int]
    sampling_ratio: int
    scales: Any
    canonical_scale: int
    canonical_level: int

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """x: feature maps (N, C, H_i, W_i) by name, boxes (R_n, 4), image_shapes (h, w) -> (R, C, PH, PW)."""
        features = _chosen(x, self.featmap_names)
        scales = self.scales
        if scales is None:
            scales = _scales_of(features, image_shapes)
            if isinstance(scales, list):  # kept from the first call on, as torchvision does; not while it is traced
                self.scales = scales
        canonical = (self.canonical_scale, self.canonical_level)
        return _aligned_on_levels(features, boxes, scales, self.output_size, self.sampling_ratio, canonical)


@torch.fx.wrap
def _chosen(x: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    return [features for name, features in x.items() if name in names]


@torch.fx.wrap
def _scales_of(features: list[Tensor], image_shapes: list[tuple[int, int]]) -> list[float]:
    """Of each feature map to the largest image height, as the nearest power of 2."""
    height = max(shape[0] for shape in image_shapes)
    return [2.0 ** round(math.log2(each.shape[2] / height)) for each in features]


@torch.fx.wrap
def _aligned_on_levels(
    features: list[Tensor],
    boxes: list[Tensor],
    scales: list[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    canonical: tuple[int, int],
) -> Tensor:
    rois, align = rois_of(boxes), FUNCTIONS["roi_align"]
    if len(features) == 1:
        return align(features[0], rois, output_size, scales[0], sampling_ratio)
    size, level = canonical
    corners = rois.float() if rois.dtype in HALVES else rois  # a half-precision area overflows at 256 x 256
    sides = (corners[:, 3:] - corners[:, 1:3]).prod(dim=1).sqrt()
    lowest, highest = (-int(math.log2(scale)) for scale in (scales[0], scales[-1]))
    # equation 1 of Feature Pyramid Networks
    levels = (level + torch.log2(sides / size) + 1e-6).floor().clamp(lowest, highest) - lowest
    output = features[0].new_zeros(len(rois), features[0].shape[1], *output_size)
    for i, (each, scale) in enumerate(zip(features, scales, strict=True)):
        chosen = torch.where(levels == i)[0]
        output[chosen] = align(each, rois[chosen], output_size, scale, sampling_ratio).to(output.dtype)
    return output


# ---------------------------------------------------------------- which layer takes whose place


@dataclass(frozen=True)
class Rule:
    """How a class of another library is known, and what takes its place."""

    layer: type[nn.Module]
    takes: tuple[tuple[str, ...], ...]  # what its forward may take after the first argument
    needs: tuple[str, ...]  # attributes
    children: tuple[str, ...] = ()  # its submodules; with ? behind the name one that may be missing
    packages: tuple[str, ...] = ()  # where the name alone does not tell whose it is
    adds: dict[str, Any] = field(default_factory=dict)  # attributes of `layer` that it does not have


CONV = ("weight", "stride", "padding", "dilation", "kernel_size", "in_channels", "out_channels")
ROI = ("output_size", "spatial_scale")
ALIGN = (*ROI, "sampling_ratio", "aligned")
OFFSETS = (("offset",), ("offset", "mask"))
ROIS = (("rois",),)
PLAIN = {"bias": None, "groups": 1, "border": "zeros"}
PACK = {**PLAIN, "beta": 1.0, "offset_groups": 1}
NORM = {**PLAIN, "norm": None, "activation": None}
MMCV = {"convention": "mmcv"}
DEFORM_ROI = (*ROI, "sampling_ratio", "gamma")

RULES: dict[str, Rule] = {
    # torchvision and mmcv
    "DeformConv2d": Rule(DeformConv2d, OFFSETS, CONV, adds=PLAIN),
    "RoIAlign": Rule(RoIAlign, ROIS, ALIGN, packages=("torchvision", "mmcv")),
    # torchvision; mmcv's RoIPool does not round regions
    "RoIPool": Rule(RoIPool, ROIS, ROI, packages=("torchvision",), adds={"mode": "max"}),
    "PSRoIPool": Rule(
        PSRoIPool, ROIS, ROI, packages=("torchvision",), adds={"group_size": None, "convention": "torchvision"}
    ),
    "PSRoIAlign": Rule(PSRoIAlign, ROIS, (*ROI, "sampling_ratio"), packages=("torchvision",)),
    "MultiScaleRoIAlign": Rule(
        MultiScaleRoIAlign,
        (("boxes", "image_shapes"),),
        ("featmap_names", "output_size", "sampling_ratio", "scales", "canonical_scale", "canonical_level"),
        packages=("torchvision",),
    ),
    # detectron2, and mmcv and mmdetection before version 1 and 2, in basicsr too
    "DeformConv": Rule(NormDeformConv2d, (("offset",),), CONV, ("norm?", "activation?"), adds=NORM),
    "ModulatedDeformConv": Rule(NormDeformConv2d, (("offset", "mask"),), CONV, ("norm?", "activation?"), adds=NORM),
    "DeformConvPack": Rule(DeformConv2dPack, ((),), CONV, ("conv_offset",), adds=PACK),
    "ModulatedDeformConvPack": Rule(ModulatedDeformConv2dPack, ((),), CONV, ("conv_offset",), adds=PACK),
    "ROIAlign": Rule(RoIAlign, ROIS, ALIGN),
    # mmcv
    "ModulatedDeformConv2d": Rule(DeformConv2d, (("offset", "mask"),), CONV, adds=PLAIN),
    "DeformConv2dPack": Rule(DeformConv2dPack, ((),), CONV, ("conv_offset",), adds=PACK),
    "ModulatedDeformConv2dPack": Rule(ModulatedDeformConv2dPack, ((),), CONV, ("conv_offset",), adds=PACK),
    "DeformRoIPool": Rule(DeformRoIPool, (("rois", "offset"),), DEFORM_ROI, adds=MMCV),
    "DeformRoIPoolPack": Rule(FcDeformRoIPool, ROIS, DEFORM_ROI, ("offset_fc",), adds=MMCV),
    "ModulatedDeformRoIPoolPack": Rule(FcDeformRoIPool, ROIS, DEFORM_ROI, ("offset_fc", "mask_fc"), adds=MMCV),
    # the stand-alone DCNv2
    "DCNv2": Rule(DeformConv2d, (("offset", "mask"),), CONV, adds=PLAIN),
    "DCN": Rule(OffsetMaskDeformConv2d, ((),), CONV, ("conv_offset_mask",), adds=PLAIN),
}

_OURS = ("dcn_kernels.torch.layers", "dcn_kernels.torch.roi_layers")


def _why_not(module: nn.Module, rule: Rule) -> str:
    """Why a layer whose class has a known name is not replaced; "" where it is."""
    package = type(module).__module__.partition(".")[0]
    if rule.packages and package not in rule.packages:
        return f"expected that of {' or '.join(rule.packages)}"
    if any(base.__name__ == type(module).__name__ for base in type(module).__mro__[1:]):
        return "it is a subclass of a layer of that name"
    if "forward" in vars(module):
        return "its forward was replaced by another"
    takes = list(inspect.signature(module.forward).parameters)[1:]
    if tuple(takes) not in rule.takes:
        return f"expected a forward of ({', '.join(('x', *rule.takes[-1]))}), got ({', '.join(('x', *takes))})"
    missing = [name for name in rule.needs if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    children = {name for name, child in module._modules.items() if child is not None}
    required = {name for name in rule.children if not name.endswith("?")}
    known = {name.removesuffix("?") for name in rule.children}
    if not required <= children <= known:
        return f"expected the submodules {sorted(known)}, got {sorted(children)}"
    known_tensors = ("weight", "bias")  # weight_g and weight_v of torch's weight_norm too
    tensors = sorted(name for name in (*module._parameters, *module._buffers) if not name.startswith(known_tensors))
    if tensors:
        return f"it has parameters or buffers of its own: {', '.join(tensors)}"
    if getattr(module, "pool_mode", "avg") != "avg":
        return "it takes the maximum of samples, which no operator here does"
    return ""


def _replacement(module: nn.Module, rule: Rule) -> nn.Module:
    """What takes the layer's place: its attributes, parameters, submodules and hooks are the same objects."""
    new = rule.layer.__new__(rule.layer)
    new.__dict__.update(module.__dict__)
    for name, value in rule.adds.items():
        if not hasattr(new, name):
            setattr(new, name, value)
    for theirs in ("deform_groups", "deformable_groups"):
        if "offset_groups" in rule.adds and hasattr(module, theirs):
            new.offset_groups = getattr(module, theirs)
    return new


def replace_layers(model: nn.Module) -> nn.Module:
    """Replace the layers of other libraries that have one here, in a whole model, in place.

    Parameters and their names, buffers and hooks stay the same objects, so an optimizer and a state_dict stay valid.
    Known by their class, without importing them:

    - torchvision's DeformConv2d, RoIPool, RoIAlign, PSRoIPool, PSRoIAlign, and MultiScaleRoIAlign, which its detectors
      pool with;
    - detectron2's DeformConv, ModulatedDeformConv (with their norm and activation) and ROIAlign;
    - mmcv's DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d, ModulatedDeformConv2dPack, RoIAlign, DeformRoIPool,
      DeformRoIPoolPack, ModulatedDeformRoIPoolPack, and the convolutions' older names without the 2d;
    - DCNv2 and DCN, with its conv_offset_mask, of the stand-alone DCNv2.

    Subclasses are left as they are, and so are functions that a model calls by itself, such as
    torchvision's `roi_align` of ground truth in the loss of Mask R-CNN.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The model, or the new layer where the model itself is one of them. What was replaced is logged by the logger
        "dcn_kernels.torch.replacements", at level INFO.

    Warns
    -----
    UserWarning
        If nothing was replaced, and for a layer that has a known name but is another layer (with the reason).

    Examples
    --------
    >>> import torch
    >>> class DCNv2(torch.nn.Conv2d):  # stands for another library's
    ...     def forward(self, input, offset, mask): ...
    >>> model = torch.nn.ModuleList([DCNv2(3, 8, 3, padding=1), torch.nn.ReLU()])
    >>> type(replace_layers(model)[0]).__name__
    'DeformConv2d'
    """
    done: dict[nn.Module, nn.Module] = {}
    stay: list[str] = []

    def replaced(module: nn.Module, path: str) -> nn.Module:
        if module in done:  # it stands under two names
            return done[module]
        kind = type(module)
        name = f"{kind.__module__}.{kind.__qualname__}"
        ours = kind.__module__ in _OURS or any(kind is each.layer for each in RULES.values())
        rule = None if ours else RULES.get(kind.__name__)
        reason = _why_not(module, rule) if rule is not None else ""
        new = module
        if reason:
            stay.append(f"{path or 'the model'} ({name}): {reason}")
        elif rule is not None:
            new = _replacement(module, rule)
            log.info("%s: %s -> %s.%s", path or "the model", name, rule.layer.__module__, rule.layer.__name__)
        done[module] = new
        for child_name, child in list(module._modules.items()):
            if child is not None:
                setattr(new, child_name, replaced(child, f"{path}.{child_name}" if path else child_name))
        return new

    result = replaced(model, "")
    for text in stay:
        warnings.warn(f"replace_layers: not replaced: {text}", stacklevel=2)
    count = sum(new is not old for old, new in done.items())
    log.info("%d layers replaced", count)
    if count == 0:
        warnings.warn(
            f"replace_layers: nothing was replaced in {type(model).__name__}: it has no layer of torchvision, "
            "detectron2, mmcv or DCNv2 that is known here",
            stacklevel=2,
        )
    return result
