"""Seeded inputs: small cases over every option for the checks, and inputs of a named layer's shape for the benchmark.

The cases' sampling points are kept off the kinks by construction: every fractional part lies in [0.2, 0.8], so
central differences with a step of up to 0.1 stay inside one cell, where bilinear interpolation is exactly quadratic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dcn_kernels.op import Sample

# name, (N, C, H, W), O, (KH, KW), groups, offset groups, stride, padding, dilation, border, mask, bias, reach
_DEFORM_CONV2D = (
    ("v1", (2, 3, 6, 7), 4, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1), "zeros", False, False, 2),
    ("v2", (1, 4, 7, 6), 6, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1), "zeros", True, True, 2),
    ("strided", (2, 4, 9, 8), 4, (2, 3), 2, 2, (2, 1), (1, 0), (1, 2), "zeros", True, True, 3),
    ("straddling groups", (1, 12, 5, 6), 4, (3, 1), 2, 3, (1, 2), (0, 2), (2, 1), "zeros", True, False, 2),
    ("msra", (1, 4, 6, 7), 3, (3, 3), 1, 2, (1, 1), (1, 1), (1, 1), "msra", True, True, 3),
    ("edge", (1, 4, 7, 5), 5, (3, 2), 1, 1, (1, 1), (1, 1), (1, 1), "edge", False, True, 3),
    ("far", (1, 2, 5, 5), 3, (1, 1), 1, 1, (1, 1), (0, 0), (1, 1), "zeros", True, False, 8),
)

_OFFSET_SAMPLE2D = (
    # name, (N, C, H, W), offset groups, border, reach
    ("a field per channel", (2, 3, 6, 7), 3, "edge", 2),
    ("grouped", (1, 6, 5, 8), 2, "zeros", 2),
    ("one field", (1, 20, 7, 5), 1, "msra", 3),
    ("far", (1, 4, 5, 5), 1, "edge", 9),
)


def off_kinks(rng: np.random.Generator, shape: tuple[int, ...], reach: int) -> np.ndarray:
    """Offsets within about `reach` pixels whose fractional parts lie in [0.2, 0.8]; exact in every dtype."""
    whole = rng.integers(-reach, reach, shape)
    return whole + rng.integers(4, 13, shape) / 16  # sixteenths: a float16 or bfloat16 near 0 holds them exactly


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers rounded to bfloat16 and float16, so that rounding the inputs is no part of an error."""
    return np.round(rng.standard_normal(shape) * 32) / 32


def deform_conv2d(seed: int) -> list[Sample]:
    """Every option of deform_conv2d in small float64 cases."""
    from dcn_kernels.op import Sample

    rng, cases = np.random.default_rng(seed), []
    for name, size, O, kernel, groups, OG, stride, padding, dilation, border, mask, bias, reach in _DEFORM_CONV2D:
        arrays, params = _deform_conv2d_arrays(
            rng, size, O, kernel, groups, OG, stride, padding, dilation, mask=mask, bias=bias
        )
        arrays["offset"] = off_kinks(rng, arrays["offset"], reach)
        cases.append(Sample(arrays, {**params, "border": border}, name))
    return cases


def _deform_conv2d_arrays(
    rng: np.random.Generator,
    size: tuple[int, int, int, int],
    O: int,
    kernel: tuple[int, int],
    groups: int,
    OG: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    *,
    mask: bool = True,
    bias: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays by name (the offset as its shape alone) and parameters."""
    N, C, H, W = size
    taps = kernel[0] * kernel[1]
    OH, OW = (
        (length + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
        for a, length in enumerate((H, W))
    )
    arrays: dict[str, Any] = {
        "input": _values(rng, (N, C, H, W)),
        "offset": (N, 2 * OG * taps, OH, OW),
        "weight": _values(rng, (O, C // groups, *kernel)),
    }
    if bias:
        arrays["bias"] = _values(rng, (O,))
    if mask:
        arrays["mask"] = rng.integers(8, 64, (N, OG * taps, OH, OW)) / 64
    params = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "border": "zeros",
        "precision": "float32",
        "deterministic": False,
        "workspace_bytes": None,
    }
    return arrays, params


def offset_sample2d(seed: int) -> list[Sample]:
    """Every option of offset_sample2d in small float64 cases."""
    from dcn_kernels.op import Sample

    rng, cases = np.random.default_rng(seed), []
    for name, (N, C, H, W), OG, border, reach in _OFFSET_SAMPLE2D:
        arrays = {"input": _values(rng, (N, C, H, W)), "offset": off_kinks(rng, (N, 2 * OG, H, W), reach)}
        cases.append(Sample(arrays, {"border": border, "deterministic": False}, name))
    return cases


def layer_offsets(rng: np.random.Generator, shape: tuple[int, ...], offsets: str, spread: float) -> np.ndarray:
    """Offsets (N, channels, OH, OW) for timing: "zero", "random" (independent) or "smooth" (wanders slowly)."""
    if offsets == "zero":
        return np.zeros(shape)
    if offsets == "random":
        return rng.standard_normal(shape) * spread
    if offsets != "smooth":
        raise ValueError(f"offsets: expected 'zero', 'smooth' or 'random', got {offsets!r}")
    coarse = rng.standard_normal((*shape[:2], shape[2] // 8 + 2, shape[3] // 8 + 2)) * spread
    rows, columns = (np.arange(length) / 8 for length in shape[2:])
    y0, x0 = rows.astype(int), columns.astype(int)
    ly, lx = (rows - y0)[:, None], columns - x0
    top = coarse[:, :, y0][..., x0] * (1 - lx) + coarse[:, :, y0][..., x0 + 1] * lx
    bottom = coarse[:, :, y0 + 1][..., x0] * (1 - lx) + coarse[:, :, y0 + 1][..., x0 + 1] * lx
    return top * (1 - ly) + bottom * ly


def deform_conv2d_layer(
    layer: dict[str, Any], *, offsets: str = "random", spread: float = 2.0, seed: int = 0
) -> Sample:
    """Inputs of a layer: sizes N C H W O, kernel, stride, padding, dilation, groups, offset_groups."""
    from dcn_kernels.op import Sample

    rng = np.random.default_rng(seed)
    arrays, params = _deform_conv2d_arrays(
        rng,
        (layer["N"], layer["C"], layer["H"], layer["W"]),
        layer["O"],
        layer["kernel"],
        layer["groups"],
        layer["offset_groups"],
        layer["stride"],
        layer["padding"],
        layer["dilation"],
    )
    arrays["offset"] = layer_offsets(rng, arrays["offset"], offsets, spread)
    return Sample(arrays, params, offsets)


def offset_sample2d_layer(
    layer: dict[str, Any], *, offsets: str = "random", spread: float = 2.0, seed: int = 0
) -> Sample:
    """Inputs of a layer: sizes N C H W, offset_groups."""
    from dcn_kernels.op import Sample

    rng = np.random.default_rng(seed)
    N, C, H, W = (layer[letter] for letter in "NCHW")
    offset = layer_offsets(rng, (N, 2 * layer["offset_groups"], H, W), offsets, spread)
    arrays = {"input": rng.standard_normal((N, C, H, W)), "offset": offset}
    return Sample(arrays, {"border": "edge", "deterministic": False}, offsets)
