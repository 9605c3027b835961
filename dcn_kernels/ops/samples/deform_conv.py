"""Inputs of deform_conv2d."""

from __future__ import annotations

from math import lcm
from typing import Any

import numpy as np

from dcn_kernels.dispatch.row import Sample
from dcn_kernels.ops.samples.draw import Choices, drawn_positions, layer_offsets, off_kinks, slopes_on_lines, values

# name, (N, C, H, W), O, (KH, KW), groups, offset groups, stride, padding, dilation, border, mask, bias, reach
_CASES = (
    ("v1", (2, 3, 6, 7), 4, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1), "zeros", False, False, 2),
    ("v2", (1, 4, 7, 6), 6, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1), "zeros", True, True, 2),
    ("strided", (2, 4, 9, 8), 4, (2, 3), 2, 2, (2, 1), (1, 0), (1, 2), "zeros", True, True, 3),
    ("straddling groups", (1, 12, 5, 6), 4, (3, 1), 2, 3, (1, 2), (0, 2), (2, 1), "zeros", True, False, 2),
    ("msra", (1, 4, 6, 7), 3, (3, 3), 1, 2, (1, 1), (1, 1), (1, 1), "msra", True, True, 3),
    ("edge", (1, 4, 7, 5), 5, (3, 2), 1, 1, (1, 1), (1, 1), (1, 1), "edge", False, True, 3),
    ("depthwise", (1, 4, 5, 6), 8, (3, 2), 4, 2, (1, 1), (1, 1), (1, 1), "zeros", True, True, 2),
    ("far", (1, 2, 5, 5), 3, (1, 1), 1, 1, (1, 1), (0, 0), (1, 1), "zeros", True, False, 8),
)


def deform_conv2d(seed: int) -> list[Sample]:
    """Every option of deform_conv2d in small float64 cases."""
    rng, cases = np.random.default_rng(seed), []
    for name, size, O, kernel, groups, OG, stride, padding, dilation, border, mask, bias, reach in _CASES:
        shapes, params = _call(size, O, kernel, groups, OG, stride, padding, dilation)
        arrays = _arrays(rng, shapes, mask=mask, bias=bias)
        arrays["offset"] = off_kinks(rng, shapes["offset"], reach)
        cases.append(Sample(arrays, {**params, "border": border}, name))
    return cases


def _call(
    size: tuple[int, int, int, int],
    O: int,
    kernel: tuple[int, int],
    groups: int,
    OG: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of all arrays by name, and parameters."""
    N, C, H, W = size
    taps = kernel[0] * kernel[1]
    OH, OW = (
        (length + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
        for a, length in enumerate((H, W))
    )
    if C % groups or O % groups:
        raise ValueError(f"groups = {groups} does not divide C = {C} and O = {O}")
    if min(OH, OW) < 1:
        raise ValueError(f"the kernel with its dilation is larger than the padded input: OH, OW = {OH}, {OW}")
    shapes = {
        "input": (N, C, H, W),
        "weight": (O, C // groups, *kernel),
        "offset": (N, 2 * OG * taps, OH, OW),
        "mask": (N, OG * taps, OH, OW),
        "bias": (O,),
    }
    params = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "border": "zeros",
        "precision": "float32",
        "deterministic": False,
        "workspace_bytes": None,
    }
    return shapes, params


def _arrays(
    rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], *, mask: bool = True, bias: bool = True
) -> dict[str, np.ndarray]:
    """All arrays but the offset."""
    arrays = {"input": values(rng, shapes["input"]), "weight": values(rng, shapes["weight"])}
    if bias:
        arrays["bias"] = values(rng, shapes["bias"])
    if mask:
        arrays["mask"] = rng.integers(8, 64, shapes["mask"]) / 64
    return arrays


def deform_conv2d_kinks(seed: int) -> list[Sample]:
    """One channel through weights of 1, every tap on a pixel line: offset 0 with padding 1, and whole offsets."""
    rng, cases = np.random.default_rng(seed), []
    H, W = 4, 5
    for border in ("zeros", "msra", "edge"):
        for reach in (0, 3):
            shapes, params = _call((1, 1, H, W), 1, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1))
            arrays = _arrays(rng, shapes, mask=False, bias=False)
            arrays["weight"] = np.ones((1, 1, 3, 3))
            arrays["offset"] = rng.integers(-reach, reach + 1, shapes["offset"]).astype(float)
            tap, oy, ox = np.mgrid[:9, :H, :W]
            y = oy - 1 + tap // 3 + arrays["offset"][0, 0::2]
            x = ox - 1 + tap % 3 + arrays["offset"][0, 1::2]
            expected = np.zeros_like(arrays["offset"])
            expected[0, 0::2], expected[0, 1::2] = slopes_on_lines(arrays["input"][0, 0], border, y, x)
            label = f"kink: {border}, " + ("whole offsets" if reach else "offset 0")
            cases.append(Sample(arrays, {**params, "border": border}, label, expected={"offset": expected}))
    return cases


def deform_conv2d_drawn(choose: Choices) -> Sample:
    """Any layer: sizes, groups, kernel and borders."""
    groups, OG, N = choose.size("groups", 1, 3), choose.size("OG", 1, 3), choose.of("N", (1, 1, 1, 1, 2, 2, 0))
    C = lcm(groups, OG) * choose.of("C", (1, 1, 2, 2, 3, 7, 17))
    O = groups * choose.of("O", (1, 1, 2, 3, 6, 17))
    kernel = choose.of("kernel", ((1, 1), (1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (3, 2), (3, 3)))
    pairs = ((1, 1), (1, 1), (2, 1), (1, 2), (3, 3))
    stride, dilation = choose.of("stride", pairs), choose.of("dilation", pairs)
    padding = choose.of("padding", ((0, 0), (1, 1), (2, 0), (0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    H, W = choose.length("H", least[0]), choose.length("W", least[1])
    mask, bias = choose.of("mask", (False, True)), choose.of("bias", (False, True))
    shapes, params = _call((N, C, H, W), O, kernel, groups, OG, stride, padding, dilation)
    arrays = _arrays(choose.rng, shapes, mask=mask, bias=bias)
    arrays["offset"] = drawn_positions(choose, "offset", shapes["offset"])
    for name, options in (
        ("border", ("zeros", "msra", "edge")),
        ("precision", ("float32", "ieee")),
        ("deterministic", (False, True)),
        ("workspace_bytes", (None, 1, 40_000)),
    ):
        params[name] = choose.of(name, options)
    return Sample(arrays, params)


def deform_conv2d_part(sample: Sample, count: int, seed: int) -> tuple[Sample, dict[str, Any]]:
    """`count` output positions of one image as a call of their own, for the reference, and where its results belong.

    The way from the first position to each of them is added to its offset, so the call is a row of `count` positions.
    Its result is ``output[index["output"]]``; where grad_output is 0 elsewhere, the whole's gradient of an argument is
    this call's at ``index[argument]`` and 0 elsewhere, and equal to it where `index` does not name the argument.
    """
    rng, offset = np.random.default_rng(seed), sample.arrays["offset"]
    N, _, OH, OW = offset.shape
    n = int(rng.integers(N))
    flat = np.sort(rng.choice(OH * OW, min(count, OH * OW), replace=False))
    oy, ox = np.divmod(flat, OW)
    stride_y, stride_x = sample.params["stride"]
    moved = offset[n][:, oy, ox].astype(np.float64)
    moved[0::2] += oy * stride_y
    moved[1::2] += (ox - np.arange(len(flat))) * stride_x
    arrays = {**sample.arrays, "input": sample.arrays["input"][n : n + 1], "offset": moved[None, :, None]}
    if "mask" in arrays:
        arrays["mask"] = arrays["mask"][n][:, oy, ox][None, :, None]
    here = (slice(n, n + 1), slice(None), oy, ox)
    index = {"output": here, "offset": here, "mask": here, "input": (slice(n, n + 1),)}
    return Sample(arrays, sample.params, sample.label), index


def deform_conv2d_layer_call(layer: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of the arrays of a layer, and its parameters."""
    size = layer["N"], layer["C"], layer["H"], layer["W"]
    names = ("O", "kernel", "groups", "offset_groups", "stride", "padding", "dilation")
    return _call(size, *(layer[name] for name in names))


def deform_conv2d_layer(
    layer: dict[str, Any], *, offsets: str = "random", spread: float = 2.0, seed: int = 0
) -> Sample:
    """Inputs of a layer."""
    rng = np.random.default_rng(seed)
    shapes, params = deform_conv2d_layer_call(layer)
    arrays = _arrays(rng, shapes)
    return Sample({**arrays, "offset": layer_offsets(rng, shapes["offset"], offsets, spread)}, params, offsets)
