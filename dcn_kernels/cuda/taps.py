"""The tile of a deformable convolution as the kernels take it: conv_t of tile.cuh, and the types of a build."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda.compile import CTYPES, Flags

BORDERS = ("zeros", "msra", "edge", "align")  # in the order of border_t
LARGEST = 2**31 - 2**10  # of a size that kernels hold in an int and step over by a block at a time

CONV = np.dtype(
    [(name, np.int32) for name in (
        *("C", "H", "W", "OH", "OW", "KH", "KW", "OG", "groups"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
        *("border", "images", "first_pixel", "pixels", "lanes"),
    )]
    + [(f"{array}_{axis}", np.int64) for array in ("input", "offset", "mask", "grad") for axis in "ncyx"],
    align=True,
)  # fmt: skip


def conv(
    op: str,
    input: Any,
    offset: Any,
    kernel: tuple[int, int],
    *,
    groups: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
) -> np.ndarray:
    """A conv_t of what does not change from tile to tile: all but images, pixels, lanes and strides."""
    (_, C, H, W), (OH, OW) = input.shape, offset.shape[2:]
    taps = kernel[0] * kernel[1]
    OG = offset.shape[1] // (2 * taps)
    sizes = {
        "H + 2*padding": H + 2 * padding[0],
        "W + 2*padding": W + 2 * padding[1],
        "OH*OW": OH * OW,
        "C*KH*KW": C * taps,
        "2*OG*KH*KW": offset.shape[1],
    }
    for name, size in sizes.items():
        if size > LARGEST:
            raise ValueError(f"{op}: expected {name} <= {LARGEST} on a GPU, got {size}")
    s = np.zeros(1, CONV)
    s["C"], s["H"], s["W"], s["OH"], s["OW"], s["OG"], s["groups"] = C, H, W, OH, OW, OG, groups
    for name, (height, width) in {"stride": stride, "padding": padding, "dilation": dilation}.items():
        s[f"{name}_h"], s[f"{name}_w"] = height, width
    s["KH"], s["KW"] = kernel
    s["border"] = BORDERS.index(border)
    return s


def team(items: int, most: int) -> int:
    """The threads that share `items` pieces of work: the next power of two, at most `most`."""
    return min(most, 1 << max(0, items - 1).bit_length())


def set_strides(s: np.ndarray, name: str, array: Any) -> None:
    """Note the strides of an array (n, c, y, x) in a conv_t, in elements."""
    for axis, stride in zip("ncyx", array.strides, strict=True):
        s[f"{name}_{axis}"] = stride // array.dtype.itemsize


def channels_at_once(dtype: np.dtype, *widths: int) -> int:
    """VEC: the channels of one load, of 16 or 8 bytes where that divides all widths, else one."""
    for channels in (16 // dtype.itemsize, 8 // dtype.itemsize):
        if channels > 1 and all(width % channels == 0 for width in widths):
            return channels
    return 1


def accumulator_name(dtype: str) -> str:
    """The dtype of sums."""
    return "float64" if dtype == "float64" else "float32"


def types(dtype: np.dtype, offset: np.dtype, mask: np.dtype | None) -> Flags:
    """The C types of a build; without a mask its type is the offset's, so that there is no build more."""
    return {
        "scalar_t": CTYPES[dtype.name],
        "offset_t": CTYPES[offset.name],
        "mask_t": CTYPES[(mask or offset).name],
    }


def all_types(with_mask: bool = True) -> Iterator[tuple[str, Flags]]:
    """(dtype, C types) of all mixes: offset and mask are of the input's dtype or, with halves, float32."""
    for dtype in CTYPES:
        coordinates = (dtype, "float32") if dtype in ("float16", "bfloat16") else (dtype,)
        for offset in coordinates:
            for mask in coordinates if with_mask else (offset,):
                yield dtype, {"scalar_t": CTYPES[dtype], "offset_t": CTYPES[offset], "mask_t": CTYPES[mask]}


def widths(dtype: str) -> tuple[int, ...]:
    """Every VEC of a dtype."""
    return {"float64": (1, 2), "float32": (1, 2, 4), "float16": (1, 4, 8), "bfloat16": (1, 4, 8)}[dtype]
