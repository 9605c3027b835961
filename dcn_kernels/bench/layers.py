"""Named layer shapes of published networks, and how far their offsets reach.

A layer is a dict: `op`, the sizes that the operator's `layer_sample` takes, `spread` (standard deviation of an offset
in pixels), and `source`. Lengths may be an int or (h, w).

How far offsets wander decides how fast such an operator is, so the spread follows Table 2 of the paper: the mean
distance between neighbouring sampling points of trained 3x3 filters of dilation 2. If both coordinates of every
offset are normal with standard deviation s, neighbours differ by the dilation plus a normal vector of standard
deviation sqrt(2) s, and `spread` finds the s of a mean distance.
"""

from __future__ import annotations

import re
import tomllib
from functools import lru_cache
from math import lcm, prod
from pathlib import Path
from typing import Any

import numpy as np

from dcn_kernels.ops.registry import OPS

Layer = dict[str, Any]

# Table 2 of arXiv 1703.06211 (R-FCN): filter -> mean effective dilation on medium objects; dilation is 2
TABLE_2 = {"res5c": 5.8, "res5b": 3.1, "res5a": 2.9}


@lru_cache
def spread(effective_dilation: float, dilation: float = 2.0) -> float:
    """The standard deviation of offsets, in pixels, that gives a mean distance between neighbouring sampling points.

    Examples
    --------
    >>> from dcn_kernels.bench.layers import spread
    >>> round(spread(5.8), 2)  # res5c, medium objects
    3.11
    """
    levels = (np.arange(400) + 0.5) / 400  # a radius and an angle at evenly spread quantiles
    radius = np.sqrt(-2 * np.log1p(-levels))[:, None]
    angle = 2 * np.pi * levels
    low, high = 0.0, effective_dilation
    for _ in range(50):
        s = (low + high) / 2
        reach = np.sqrt(2) * s * radius
        mean = np.hypot(dilation + reach * np.cos(angle), reach * np.sin(angle)).mean()
        low, high = (s, high) if mean < effective_dilation else (low, s)
    return round((low + high) / 2, 2)


DEFAULTS: dict[str, Any] = {
    "N": 1,
    "kernel": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "offset_groups": 1,
    "R": 300,
    "classes": 1,
    "output_size": (7, 7),
    "spatial_scale": 1 / 16,
}
# What a RoI operator takes besides arrays and sizes
ROI_PARAMS: dict[str, dict[str, Any]] = {
    "roi_pool": {"mode": "max"},
    "ps_roi_pool": {"group_size": None, "convention": "rfcn"},
    "roi_align": {"sampling_ratio": -1, "aligned": False},
    "ps_roi_align": {"sampling_ratio": -1},
    "deform_roi_pool": {"gamma": 0.1, "sampling_ratio": 4, "convention": "rfcn"},
    "deform_ps_roi_pool": {"group_size": None, "part_size": None, "sample_per_part": 4, "trans_std": 0.1},
}
PAIRS = ("kernel", "stride", "padding", "dilation", "output_size")


def layer(op: str, **sizes: Any) -> Layer:
    """A layer with the defaults filled in and lengths as pairs."""
    reach = 1.0 if op in ROI_PARAMS else spread(TABLE_2["res5b"])  # RoI offsets are in tenths of the RoI
    filled = {"op": op, "spread": reach, "source": "", "params": ROI_PARAMS.get(op, {}), **DEFAULTS, **sizes}
    for name in PAIRS:
        if isinstance(filled[name], int):
            filled[name] = (filled[name], filled[name])
        else:
            filled[name] = tuple(filled[name])
    filled["given"] = tuple(dict.fromkeys(("N", *sizes)))
    return filled


def _deform_conv(N: int, C: int, H: int, W: int, O: int, dilation: int = 1, OG: int = 1, **more: Any) -> Layer:
    sizes = {"N": N, "C": C, "H": H, "W": W, "O": O, "kernel": 3, "stride": 1, "padding": dilation}
    return layer("deform_conv2d", **sizes, dilation=dilation, groups=1, offset_groups=OG, **more)


_PAPER, _MMDET = "ResNet-101 conv5, arXiv 1703.06211", "mmdetection, DCN ResNet-50 at 800x1344"

LAYERS: dict[str, Layer] = {
    "A": _deform_conv(1, 512, 38, 63, 512, 2, spread=spread(TABLE_2["res5c"]), source=f"{_PAPER}, res5c"),
    "B": _deform_conv(2, 256, 50, 84, 256, source=f"{_MMDET}, c4, two images"),
    "C": _deform_conv(1, 128, 100, 168, 128, source=f"{_MMDET}, c3"),
    "D": _deform_conv(1, 64, 180, 320, 64, OG=8, source="EDVR / BasicVSR++ alignment"),
    "E": _deform_conv(4, 64, 56, 56, 64, OG=4, source="small maps, four images"),
    "resnet101-res5a": _deform_conv(1, 512, 38, 63, 512, 2, spread=spread(TABLE_2["res5a"]), source=_PAPER),
    "resnet101-res5b": _deform_conv(1, 512, 38, 63, 512, 2, spread=spread(TABLE_2["res5b"]), source=_PAPER),
    "mmdet-c4": _deform_conv(1, 256, 50, 84, 256, source=_MMDET),
    "mmdet-c5": _deform_conv(1, 512, 25, 42, 512, source=_MMDET),
    "centernet-dla34": _deform_conv(1, 64, 128, 128, 64, source="CenterNet DLA-34 up-sampling"),
    "edvr-16": _deform_conv(1, 64, 180, 320, 64, OG=16, source="EDVR / BasicVSR++ alignment"),
    "resample": layer(
        "offset_sample2d", C=64, H=128, W=128, offset_groups=64, source="ConvOffset2D, a field for every channel"
    ),
    "rfcn-psroi": layer("ps_roi_pool", C=21 * 49, H=38, W=63, source="R-FCN, 300 RoIs"),
    "rfcn-deform-psroi": layer("deform_ps_roi_pool", C=21 * 49, H=38, W=63, source="R-FCN, 300 RoIs"),
    "frcnn-roi": layer("roi_pool", C=1024, H=38, W=63, source="Faster R-CNN, 300 RoIs"),
    "frcnn-align": layer("roi_align", C=1024, H=38, W=63, source="Faster R-CNN, 300 RoIs"),
    "frcnn-ps-align": layer("ps_roi_align", C=21 * 49, H=38, W=63, source="R-FCN, 300 RoIs"),
    "frcnn-deform-roi": layer("deform_roi_pool", C=256, H=38, W=63, source="Faster R-CNN, 300 RoIs"),
}

DEFAULT_SET = ("A", "B", "C", "D", "E", "resample", "rfcn-psroi", "rfcn-deform-psroi", "frcnn-roi", "frcnn-align",
               "frcnn-ps-align", "frcnn-deform-roi")  # fmt: skip


def shown(sizes: Layer) -> str:
    """A layer's sizes as `--shape` takes them: N=1,C=64,...,kernel=3x3."""
    names = [name for name in sizes["given"] if name not in ("spread", "source")]
    return ",".join(
        f"{name}={'x'.join(map(str, sizes[name])) if isinstance(sizes[name], tuple) else sizes[name]}" for name in names
    )


def named(sizes: Layer) -> str:
    """A name that tells the sizes, in the short form of `parse`: 1x64x56x56:64:3x3, and what is not as usual."""
    name = "x".join(str(sizes[letter]) for letter in "NCHW")
    if "O" in taken(sizes["op"]):
        name += f":{sizes['O']}:{'x'.join(map(str, sizes['kernel']))}"
    for size, usual in DEFAULTS.items():
        value = sizes[size]
        if size not in ("N", "kernel") and size in taken(sizes["op"]) and value != usual:
            name += f",{size}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"
    return name


_SHORT = re.compile(r"(?P<sizes>\d+(x\d+){3})(:(?P<O>\d+)(:(?P<kernel>\d+(x\d+)?))?)?", re.ASCII)


def parse(op: str, text: str) -> Layer:
    """A layer from `N=1,C=64,H=56,W=56,O=64,kernel=3x3,padding=1`, or shorter `1x64x56x56:64:3x3,padding=1`.

    Raises
    ------
    ValueError
        Something is not NAME=NUMBER or NAME=HxW, or not a size that the operator's layers have, or given twice.
    """
    return checked(op, _parsed(text))


def _parsed(text: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    parts = text.split(",")
    short = _SHORT.fullmatch(parts[0].strip())
    if short:
        given = [f"{name}={value}" for name, value in zip("NCHW", short["sizes"].split("x"), strict=True)]
        parts[:1] = given + [f"{name}={short[name]}" for name in ("O", "kernel") if short[name]]
    for part in parts:
        name, _, value = part.strip().partition("=")
        kind = float if name in _RATES else int
        numbers: list[Any]
        try:
            numbers = [kind(number) for number in value.split("x")]
        except ValueError:
            numbers = []
        if not numbers or len(numbers) > 2:
            raise ValueError(f"expected NAME=NUMBER or NAME=HxW, or first NxCxHxW:O:KHxKW, got {part.strip()!r}")
        if name in sizes:
            raise ValueError(f"{name} is given twice")
        sizes[name] = numbers[0] if len(numbers) == 1 else tuple(numbers)
    return sizes


_SIZES = (*DEFAULTS, "C", "H", "W", "O", "spread")
_RATES = ("spread", "spatial_scale")
_LEAST = {"padding": 0}
_MOST = 2**31 - 1
_CONV = ("O", "kernel", "stride", "padding", "dilation", "groups")


def taken(op: str) -> tuple[str, ...]:
    """The names of the sizes that an operator's layers have."""
    if op not in ROI_PARAMS:
        return (*"NCHW", *(_CONV if op == "deform_conv2d" else ()), "offset_groups", "spread")
    own = {"deform_roi_pool": ("spread",), "deform_ps_roi_pool": ("spread", "classes")}.get(op, ())
    return (*"NCHW", "R", "output_size", "spatial_scale", *own)


def memory(sizes: Layer, itemsize: int) -> int:
    """Bytes that timing a layer takes at least: its arrays as drawn in float64, as given, and their gradients."""
    N, C, H, W, R = (sizes[name] for name in "NCHWR")
    elements = N * C * H * W
    if sizes["op"] in ROI_PARAMS:
        bins = prod(sizes["output_size"])
        elements += 5 * R + R * bins * (C // bins if "ps_" in sizes["op"] else C)
        elements += 2 * R * bins * sizes["classes"] if "deform" in sizes["op"] else 0
    elif sizes["op"] == "deform_conv2d":
        taps = prod(sizes["kernel"])
        lengths = zip((H, W), *(sizes[name] for name in ("kernel", "stride", "padding", "dilation")), strict=True)
        pixels = prod(
            max(0, (n + 2 * pad - dilation * (k - 1) - 1) // step + 1) for n, k, step, pad, dilation in lengths
        )
        elements += N * pixels * (3 * sizes["offset_groups"] * taps + sizes["O"])
        elements += sizes["O"] * (C // sizes["groups"]) * taps
    else:
        elements += 2 * N * sizes["offset_groups"] * H * W + N * C * H * W
    return elements * (8 + 2 * itemsize)


def checked(op: str, sizes: dict[str, Any]) -> Layer:
    """A layer from outside: only known names, only positive whole numbers.

    Raises
    ------
    ValueError
        Naming the size.
    """
    if op not in OPS:
        raise ValueError(f"no operator {op!r}; there are: {', '.join(OPS)}")
    for name, value in sizes.items():
        if name in _RATES:
            if name not in taken(op):
                raise ValueError(f"{op} has no size {name!r}; it has: {', '.join(taken(op))}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
            continue
        if name == "source":
            if not isinstance(value, str):
                raise ValueError(f"source: expected text, got {value!r}")
            continue
        if name not in _SIZES:
            raise ValueError(f"unknown size {name!r}; there are: {', '.join(_SIZES)}")
        if name not in taken(op):
            raise ValueError(f"{op} has no size {name!r}; it has: {', '.join(taken(op))}")
        numbers = value if isinstance(value, (list, tuple)) and name in PAIRS else [value]
        least = _LEAST.get(name, 1)
        if len(numbers) not in (1, 2) or not all(type(n) is int and n >= least for n in numbers):
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if max(numbers) > _MOST:
            raise ValueError(f"{name}: expected at most {_MOST}")
    for name in (*"CHW", *("O" if op == "deform_conv2d" else "")):
        if name not in sizes:
            raise ValueError(f"{op}: the layer needs the size {name!r}")
    filled = layer(op, **sizes)
    for name, divisors in _divisors(filled).items():
        for divisor, value in divisors.items():
            if filled[name] % value:
                raise ValueError(f"{divisor} = {value} does not divide {name} = {filled[name]}")
    return filled


def _divisors(sizes: Layer) -> dict[str, dict[str, int]]:
    """What divides the channels of a layer."""
    if "ps_" in sizes["op"]:
        return {"C": {"output_size": prod(sizes["output_size"])}}
    found: dict[str, dict[str, int]] = {
        "C": {name: sizes[name] for name in ("groups", "offset_groups") if name in taken(sizes["op"])}
    }
    return found | ({"O": {"groups": sizes["groups"]}} if "O" in taken(sizes["op"]) else {})


def read_toml(path: str) -> dict[str, Layer]:
    """Layers of a TOML file: a table per layer, `[layers.NAME]` with `op` and sizes, or `sizes` as `parse` takes them.

    Raises
    ------
    ValueError
        Not TOML, or a layer that `checked` refuses.
    OSError
        Not readable.
    """
    try:
        read = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a TOML file: {error}") from None
    tables = read.get("layers")
    if not isinstance(tables, dict) or not tables:
        raise ValueError("expected tables [layers.NAME] with op and sizes")
    layers = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"layers.{name}: expected a table")
        sizes = dict(table)
        op = sizes.pop("op", "deform_conv2d")
        if not isinstance(op, str):
            raise ValueError(f"layers.{name}: op: expected a name, got {op!r}")
        text = sizes.pop("sizes", None)
        try:
            if text is not None:
                if not isinstance(text, str):
                    raise ValueError(f"sizes: expected text, got {text!r}")
                parsed = _parsed(text)
                for twice in parsed.keys() & sizes.keys():
                    raise ValueError(f"{twice} is given twice")
                sizes |= parsed
            layers[name] = checked(op, sizes)
        except ValueError as error:
            raise ValueError(f"layers.{name}: {error}") from None
    return layers


def cut(sizes: Layer, *, channels: bool = True) -> Layer:
    """The same options on one small image, at most 16 channels and 8 RoIs, for the reference.

    Of 12x12 pixels, or as many more as the kernel needs. Without `channels` theirs are cut only to about a thousand,
    which what divides them still does.
    """
    small = dict(sizes)
    limits = {"N": 1, "R": 8}
    for name, divisors in _divisors(sizes).items():
        unit = lcm(sizes["classes"], *divisors.values())
        limits[name] = 16 if channels else unit * max(1, 1024 // unit)
    for axis, name in enumerate("HW"):
        reach = sizes["dilation"][axis] * (sizes["kernel"][axis] - 1) + 1 - 2 * sizes["padding"][axis]
        limits[name] = max(12, reach + 4)
    for name, limit in limits.items():
        if name in small:
            small[name] = min(small[name], limit)
    return small
