"""Named layer shapes of published networks, and how far their offsets reach.

A layer is a dict: `op`, the sizes that the operator's row names (`layer_sizes`), `spread` (standard deviation of an
offset in pixels), and `source`. Lengths may be an int, or one for each axis. Which sizes there are, and which shapes
follow from them, the rows say: nothing here knows an operator but `LAYERS`, the layers of published networks.

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
from types import SimpleNamespace
from typing import Any

import numpy as np

from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.row import Op, Sizes
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
    levels = (np.arange(400) + 0.5) / 400  # a radius and an angle at the quantiles of equal steps
    radius = np.sqrt(-2 * np.log1p(-levels))[:, None]
    angle = 2 * np.pi * levels
    low, high = 0.0, effective_dilation
    for _ in range(50):
        s = (low + high) / 2
        reach = np.sqrt(2) * s * radius
        mean = np.hypot(dilation + reach * np.cos(angle), reach * np.sin(angle)).mean()
        low, high = (s, high) if mean < effective_dilation else (low, s)
    return round((low + high) / 2, 2)


def layer(op: str, **sizes: Any) -> Layer:
    """A layer with the usual sizes filled in, and a length that is the same along all axes as one for each."""
    row = OPS[op]
    reach = spread(TABLE_2["res5b"]) if row.layer_spread is None else row.layer_spread
    usual = {name: value for name, value in row.layer_sizes.items() if value is not None}
    filled = {"op": op, "spread": reach, "source": "", "params": row.layer_params, **usual, **sizes}
    for name, value in usual.items():
        if isinstance(value, tuple):
            given = filled[name]
            filled[name] = (given,) * len(value) if isinstance(given, int) else tuple(given)
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
    return ",".join(f"{name}={_by_x(sizes[name])}" for name in names)


def _short(row: Op) -> tuple[str, ...]:
    """The sizes that the short form begins with: N, C and those of the map."""
    return tuple(name for name in ("N", "C", *row.axes) if name in row.layer_sizes)


def _by_x(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def named(sizes: Layer) -> str:
    """A name that tells the sizes, in the short form of `parse`: 1x64x56x56:64:3x3, and what is not as usual."""
    row = OPS[sizes["op"]]
    first = [name for name in ("O", "kernel") if name in row.layer_sizes]
    name = ":".join([_by_x(tuple(sizes[letter] for letter in _short(row))), *(_by_x(sizes[size]) for size in first)])
    for size, usual in row.layer_sizes.items():
        if size not in (*_short(row), *first) and sizes[size] != usual:
            name += f",{size}={_by_x(sizes[size])}"
    return name


_SHORT = re.compile(r"(?P<sizes>\d+(x\d+)+)(:(?P<O>\d+)(:(?P<kernel>\d+(x\d+)*))?)?", re.ASCII)


def parse(op: str, text: str) -> Layer:
    """A layer from `N=1,C=64,H=56,W=56,O=64,kernel=3x3,padding=1`, or shorter `1x64x56x56:64:3x3,padding=1`.

    Raises
    ------
    ValueError
        Something is not NAME=NUMBER or NAME=HxW, or not a size that the operator's layers have, or given twice.
    """
    return checked(op, _parsed(op, text))


def _parsed(op: str, text: str) -> dict[str, Any]:
    row = _row(op)
    sizes: dict[str, Any] = {}
    parts = text.split(",")
    short, order = _SHORT.fullmatch(parts[0].strip()), _short(row)
    if short and short["sizes"].count("x") + 1 == len(order):
        given = [f"{name}={value}" for name, value in zip(order, short["sizes"].split("x"), strict=True)]
        parts[:1] = given + [f"{name}={short[name]}" for name in ("O", "kernel") if short[name]]
    axes = "x".join(row.axes)
    for part in parts:
        name, _, value = part.strip().partition("=")
        kind = float if _is_rate(row, name) else int
        numbers: list[Any]
        try:
            numbers = [kind(number) for number in value.split("x")]
        except ValueError:
            numbers = []
        if not numbers or len(numbers) > max(2, len(row.axes)):
            start = f"{'x'.join(order)}:O:{'x'.join(f'K{axis}' for axis in row.axes)}"
            raise ValueError(f"expected NAME=NUMBER or NAME={axes}, or first {start}, got {part.strip()!r}")
        if name in sizes:
            raise ValueError(f"{name} is given twice")
        sizes[name] = numbers[0] if len(numbers) == 1 else tuple(numbers)
    return sizes


_MAY_BE_ZERO = ("padding",)
_MOST = 2**31 - 1


def _row(op: str) -> Op:
    if op not in OPS:
        raise ValueError(f"no operator {op!r}; there are: {', '.join(OPS)}")
    return OPS[op]


def _is_rate(row: Op, name: str) -> bool:
    """A positive number, not a whole one."""
    return name == "spread" or isinstance(row.layer_sizes.get(name), float)


def taken(row: Op) -> tuple[str, ...]:
    """The names of the sizes that an operator's layers have."""
    return (*row.layer_sizes, *(("spread",) if row.has_offsets else ()))


def letters(sizes: Layer) -> Sizes:
    """The sizes of a layer by the letters of the row's named shapes, without its arrays.

    Raises
    ------
    ValueError
        The sizes do not fit each other.
    """
    row = OPS[sizes["op"]]
    shape_of, params = row.layer_call(sizes)
    arrays = {name: SimpleNamespace(shape=shape) for name, shape in shape_of.items()}
    return shapes.bind(row, arrays, row.parameters(params))


def memory(sizes: Layer, itemsize: int) -> int:
    """Bytes that timing a layer takes at least: its arrays as drawn in float64, as given, and their gradients."""
    row = OPS[sizes["op"]]
    arrays = [*row.layer_call(sizes)[0].values(), shapes.evaluate(row.output, letters(sizes))]
    return sum(map(prod, arrays)) * (8 + 2 * itemsize)


def checked(op: str, sizes: dict[str, Any]) -> Layer:
    """A layer from outside: only known names, only positive whole numbers, which fit each other.

    Raises
    ------
    ValueError
        Naming the size.
    """
    row = _row(op)
    for name, value in sizes.items():
        if name == "source":
            if not isinstance(value, str):
                raise ValueError(f"source: expected text, got {value!r}")
            continue
        if name not in taken(row):
            raise ValueError(f"{op} has no size {name!r}; it has: {', '.join(taken(row))}")
        if _is_rate(row, name):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
            continue
        usual = row.layer_sizes[name]
        lengths = isinstance(value, (list, tuple)) and isinstance(usual, tuple) and len(value) == len(usual)
        numbers = value if lengths else [value]
        least = 0 if name in _MAY_BE_ZERO else 1
        if not all(type(n) is int and n >= least for n in numbers):
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if max(numbers) > _MOST:
            raise ValueError(f"{name}: expected at most {_MOST}")
    for name, usual in row.layer_sizes.items():
        if usual is None and name not in sizes:
            raise ValueError(f"{op}: the layer needs the size {name!r}")
    filled = layer(op, **sizes)
    letters(filled)
    return filled


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
        if not name.isprintable():
            raise ValueError(f"layers.{name!a}: expected a name without control characters")
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
                parsed = _parsed(op, text)
                for twice in parsed.keys() & sizes.keys():
                    raise ValueError(f"{twice} is given twice")
                sizes |= parsed
            layers[name] = checked(op, sizes)
        except ValueError as error:
            raise ValueError(f"layers.{name}: {error}") from None
    return layers


_SLAB = 16  # channels that the CPU kernels take at a time, at most


def cut(sizes: Layer) -> Layer:
    """The same options on one small image with at most 8 RoIs, for the reference.

    Of 12 pixels along each axis, or as many more as the kernel needs. Of the channels, in multiples of what divides
    them: 16, and as many more as the layer has beyond a multiple of 16, so that kernels take the same way as in it.
    """
    row, bound, small = OPS[sizes["op"]], letters(sizes), dict(sizes)
    for name in row.zero_sizes:
        if name in small:
            small[name] = min(small[name], 1 if name == "N" else 8)
    for axis, name in enumerate(row.axes):
        reach = 0
        if "kernel" in sizes:
            reach = sizes["dilation"][axis] * (sizes["kernel"][axis] - 1) + 1 - 2 * sizes["padding"][axis]
        small[name] = min(small[name], max(12, reach + 4))
    for name, usual in row.layer_sizes.items():
        if usual is None and name not in row.axes:
            unit = 1
            for divisor, size in row.divides:  # a size may be C, or C/(G*G) where (G*G) divides C
                whole, _, part = size.partition("/")
                if whole == name:
                    unit = lcm(unit, bound[divisor] * bound.get(part, 1))
            small[name] = unit * min(sizes[name] // unit, _SLAB + sizes[name] // unit % _SLAB)
    return small
