"""Seeded inputs: small cases over every option for the checks, and inputs of a named layer's shape for the benchmark.

The cases' sampling points are kept off the kinks by construction: every fractional part lies in [0.2, 0.8], so
central differences with a step of up to 0.1 stay inside one cell, where bilinear interpolation is exactly quadratic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dcn_kernels.dispatch.row import Sample

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
    from dcn_kernels.dispatch.row import Sample

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
    if C % groups or O % groups:
        raise ValueError(f"groups = {groups} does not divide C = {C} and O = {O}")
    if min(OH, OW) < 1:
        raise ValueError(f"the kernel with its dilation is larger than the padded input: OH, OW = {OH}, {OW}")
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
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    for name, (N, C, H, W), OG, border, reach in _OFFSET_SAMPLE2D:
        arrays = {"input": _values(rng, (N, C, H, W)), "offset": off_kinks(rng, (N, 2 * OG, H, W), reach)}
        cases.append(Sample(arrays, {"border": border, "deterministic": False}, name))
    return cases


def slopes_on_lines(image: np.ndarray, border: str, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(d/dy, d/dx) of an image (H, W) at whole positions y, x: what the border rules document, one pixel at a time."""
    H, W = image.shape

    def pixel(row: int, column: int) -> float:
        if border == "edge":
            column, row = min(max(column, 0), W - 1), min(max(row, 0), H - 1)
        return image[row, column] if 0 <= row < H and 0 <= column < W else 0.0

    slopes = np.zeros((2, *y.shape))
    first = (
        -1 if border == "zeros" else 0
    )  # the first line with a slope; at H-1 "zeros" falls to 0, the others are flat
    last = 0 if border == "zeros" else 1
    for at in np.ndindex(y.shape):
        row, column = int(y[at]), int(x[at])
        if first <= row < H - last:
            slopes[0][at] = pixel(row + 1, column) - pixel(row, column)
        if first <= column < W - last:
            slopes[1][at] = pixel(row, column + 1) - pixel(row, column)
    return slopes[0], slopes[1]


def deform_conv2d_kinks(seed: int) -> list[Sample]:
    """One channel through weights of 1, every tap on a pixel line: offset 0 with padding 1, and whole offsets."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    H, W = 4, 5
    for border in ("zeros", "msra", "edge"):
        for reach in (0, 3):
            arrays, params = _deform_conv2d_arrays(
                rng, (1, 1, H, W), 1, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1), mask=False, bias=False
            )
            arrays["weight"] = np.ones((1, 1, 3, 3))
            arrays["offset"] = rng.integers(-reach, reach + 1, arrays["offset"]).astype(float)
            tap, oy, ox = np.mgrid[:9, :H, :W]
            y = oy - 1 + tap // 3 + arrays["offset"][0, 0::2]
            x = ox - 1 + tap % 3 + arrays["offset"][0, 1::2]
            expected = np.zeros_like(arrays["offset"])
            expected[0, 0::2], expected[0, 1::2] = slopes_on_lines(arrays["input"][0, 0], border, y, x)
            label = f"kink: {border}, " + ("whole offsets" if reach else "offset 0")
            cases.append(Sample(arrays, {**params, "border": border}, label, expected={"offset": expected}))
    return cases


def offset_sample2d_kinks(seed: int) -> list[Sample]:
    """One channel, every position on a pixel line."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    for border in ("zeros", "msra", "edge"):
        arrays = {"input": _values(rng, (1, 1, 4, 5)), "offset": rng.integers(-3, 4, (1, 2, 4, 5)).astype(float)}
        row, column = np.mgrid[:4, :5]
        y, x = row + arrays["offset"][0, 0], column + arrays["offset"][0, 1]
        expected = np.stack(slopes_on_lines(arrays["input"][0, 0], border, y, x))[None]
        params = {"border": border, "deterministic": False}
        cases.append(Sample(arrays, params, f"kink: {border}, whole offsets", expected={"offset": expected}))
    return cases


def deform_conv2d_part(sample: Sample, count: int, seed: int) -> tuple[Sample, dict[str, Any]]:
    """`count` output positions of one image as a call of their own, for the reference, and where its results belong.

    The way from the first position to each of them is added to its offset, so the call is a row of `count` positions.
    Its result is ``output[index["output"]]``; where grad_output is 0 elsewhere, the whole's gradient of an argument is
    this call's at ``index[argument]`` and 0 elsewhere, and equal to it where `index` does not name the argument.
    """
    from dcn_kernels.dispatch.row import Sample

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


def layer_offsets(rng: np.random.Generator, shape: tuple[int, ...], offsets: str, spread: float) -> np.ndarray:
    """Offsets (N, channels, OH, OW) for timing: "zero", "random" (independent) or "smooth" (wanders slowly).

    In 1/64 pixels, so that positions in a large image are exact in float32 and every backend looks into the same cell.
    """
    if offsets == "zero":
        return np.zeros(shape)
    if offsets == "random":
        return np.round(rng.standard_normal(shape) * (64 * spread)) / 64
    if offsets != "smooth":
        raise ValueError(f"offsets: expected 'zero', 'smooth' or 'random', got {offsets!r}")
    coarse = rng.standard_normal((*shape[:2], shape[2] // 8 + 2, shape[3] // 8 + 2)) * spread
    rows, columns = (np.arange(length) / 8 for length in shape[2:])
    y0, x0 = rows.astype(int), columns.astype(int)
    ly, lx = (rows - y0)[:, None], columns - x0
    top = coarse[:, :, y0][..., x0] * (1 - lx) + coarse[:, :, y0][..., x0 + 1] * lx
    bottom = coarse[:, :, y0 + 1][..., x0] * (1 - lx) + coarse[:, :, y0 + 1][..., x0 + 1] * lx
    return np.round((top * (1 - ly) + bottom * ly) * 64) / 64


def deform_conv2d_layer(
    layer: dict[str, Any], *, offsets: str = "random", spread: float = 2.0, seed: int = 0
) -> Sample:
    """Inputs of a layer: sizes N C H W O, kernel, stride, padding, dilation, groups, offset_groups."""
    from dcn_kernels.dispatch.row import Sample

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
    from dcn_kernels.dispatch.row import Sample

    rng = np.random.default_rng(seed)
    N, C, H, W = (layer[letter] for letter in "NCHW")
    offset = layer_offsets(rng, (N, 2 * layer["offset_groups"], H, W), offsets, spread)
    arrays = {"input": rng.standard_normal((N, C, H, W)), "offset": offset}
    return Sample(arrays, {"border": "edge", "deterministic": False}, offsets)


# ---------------------------------------------------------------- RoI operators
#
# A RoI is made from where it starts on the map and how long it is, so that bins and samples fall where they should:
# the fraction of every sample's coordinate lies in [0.2, 0.4] or [0.6, 0.8], off the cell edges and off the jumps of
# every border rule (whole pixels, and half a pixel outside).

_SCALE = 0.25  # exact in every dtype
_MAP = (2, 6, 7)  # N, H, W


def _distinct(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Maps whose pixels differ by a quarter at least, so that a maximum stays where it is under a small step."""
    planes = [rng.permutation(shape[-2] * shape[-1]) for _ in range(shape[0] * shape[1])]
    return np.stack(planes).reshape(shape) / 4 - shape[-2] * shape[-1] / 8


def _boxes(
    rng: np.random.Generator,
    count: int,
    sizes: tuple[float, ...],
    fraction: float,
    convention: str,
    unit: tuple[int, int] = (1, 1),
) -> tuple[np.ndarray, np.ndarray]:
    """(rois (R, 5), their sizes on the map as (R, 2) of x, y): they start `fraction` after a whole pixel."""
    size = rng.choice(sizes, (count, 2)) * np.array(unit[::-1])  # sizes in units (y, x)
    start = np.stack([rng.integers(-2, length - 2, count) for length in (_MAP[2], _MAP[1])], axis=1) + fraction
    image = rng.integers(0, _MAP[0], count)
    if convention == "align":  # start = x1*s - 0.5
        low, high = (start + 0.5) / _SCALE, (start + 0.5 + size) / _SCALE
    elif convention == "rfcn":  # start = round(x1)*s - 0.5, the last pixel included; moved off the rounding's kink
        low, high = (start + 0.5) / _SCALE + 0.25, (start + 0.5 + size) / _SCALE - 1.25
    else:  # start = round(x1*s), the last pixel included
        low, high = np.round(start) / _SCALE + 0.5, (np.round(start) + size - 1) / _SCALE - 0.5
    return np.concatenate([image[:, None], low, high], axis=1), size


def _shifts(rng: np.random.Generator, shape: tuple[int, ...], reach: np.ndarray, fractions: list[float]) -> np.ndarray:
    """Normalised offsets (R, 2*classes, PH, PW), x before y: `reach` (R, 2) pixels of shift per unit."""
    pixels = rng.integers(-2, 2, shape) + rng.choice(fractions, shape) + rng.integers(-4, 5, shape) / 128
    return pixels / np.tile(reach, (1, shape[1] // 2))[:, :, None, None]


def roi_pool(seed: int) -> list[Sample]:
    """Both modes of roi_pool."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    for mode, C, output_size in (("max", 2, (3, 2)), ("avg", 3, (2, 3)), ("max", 3, (1, 1)), ("avg", 1, (4, 4))):
        arrays = {
            "input": _distinct(rng, (_MAP[0], C, *_MAP[1:])),
            "rois": _boxes(rng, 4, (1, 3, 5, 8), 0, "whole")[0],
        }
        label = f"{mode} {output_size[0]}x{output_size[1]}"
        cases.append(Sample(arrays, _roi_params(output_size, mode=mode), label, steps={"input": 0.1}))
    return cases


def _roi_params(output_size: tuple[int, int], spatial_scale: float = _SCALE, **more: Any) -> dict[str, Any]:
    common = {"output_size": output_size, "spatial_scale": spatial_scale, "deterministic": False, "validate": False}
    return {**common, **more}


def ps_roi_pool(seed: int) -> list[Sample]:
    """Both conventions of ps_roi_pool, with groups of every kind."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    for convention, C, output_size, group_size in (
        ("rfcn", 8, (2, 2), None),
        ("rfcn", 8, (4, 4), 2),
        ("rfcn", 9, (2, 4), 3),
        ("torchvision", 12, (2, 3), None),
    ):
        arrays = {
            "input": _values(rng, (_MAP[0], C, *_MAP[1:])),
            "rois": _boxes(rng, 4, (0.25, 2, 4.5, 7), 0.25, "rfcn")[0],
        }
        params = _roi_params(output_size, group_size=group_size, convention=convention)
        cases.append(Sample(arrays, params, f"{convention} group_size={group_size}"))
    return cases


def roi_align(seed: int) -> list[Sample]:
    """roi_align with and without half a pixel's shift, with grids that are given and that follow the RoI."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    for aligned, ratio, C, output_size in ((True, 2, 3, (2, 2)), (False, -1, 2, (3, 2)), (True, 0, 17, (1, 2))):
        rois = _boxes(rng, 4, (2, 4, 6), 0.25, "align")[0]
        arrays = {"input": _values(rng, (_MAP[0], C, *_MAP[1:])), "rois": rois}
        params = _roi_params(output_size, sampling_ratio=ratio, aligned=aligned)
        cases.append(Sample(arrays, params, f"aligned={aligned} sampling_ratio={ratio}"))
    return cases


def ps_roi_align(seed: int) -> list[Sample]:
    """ps_roi_align with a given grid and with one that follows the RoI."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    for ratio, C, output_size in ((2, 12, (3, 2)), (-1, 8, (2, 2))):
        rois = _boxes(rng, 4, (2, 4, 6), 0.25, "align")[0]
        arrays = {"input": _values(rng, (_MAP[0], C, *_MAP[1:])), "rois": rois}
        cases.append(Sample(arrays, _roi_params(output_size, sampling_ratio=ratio), f"sampling_ratio={ratio}"))
    return cases


def deform_roi_pool(seed: int) -> list[Sample]:
    """Every convention of deform_roi_pool, with and without offsets and masks."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    for convention, ratio, C, (PH, PW), gamma, offset, mask in (
        ("paper", 0, 3, (2, 3), 0.1, True, True),
        ("paper", 0, 2, (2, 2), 0.25, True, False),
        ("paper", 0, 2, (3, 3), 0.1, False, True),
        ("mmcv", 2, 3, (2, 2), 0.1, True, True),
        ("mmcv", 0, 2, (2, 1), 0.1, True, False),
        ("rfcn", 2, 3, (2, 2), 0.1, True, True),
        ("rfcn", 0, 17, (2, 1), 0.25, True, False),
    ):
        points = ratio or 4
        boxes, sizes, unit, fractions = {
            "paper": ("whole", (1, 3, 5), (1, 1), [0.25, 0.75]),  # pixels are moved: the shift alone is no whole number
            "mmcv": ("align", (ratio or 1, ratio or 2), (PH, PW), [0.0, 0.5]),  # samples one pixel apart
            "rfcn": ("rfcn", (0.5, 1), (PH * points, PW * points), [0.0, 0.5]),  # half a pixel or one apart
        }[convention]
        rois, size = _boxes(rng, 4, sizes, 0.25, boxes, unit)
        arrays = {"input": _values(rng, (_MAP[0], C, *_MAP[1:])), "rois": rois}
        if offset:
            arrays["offset"] = _shifts(rng, (4, 2, PH, PW), gamma * size, fractions)
        if mask:
            arrays["mask"] = rng.integers(8, 64, (4, PH, PW)) / 64
        params = _roi_params((PH, PW), gamma=gamma, sampling_ratio=ratio, convention=convention)
        steps = {"offset": 0.125 / float(gamma * size.max())}  # an eighth of a pixel
        cases.append(Sample(arrays, params, f"{convention} sampling_ratio={ratio} C={C}", steps=steps))
    return cases


def deform_ps_roi_pool(seed: int) -> list[Sample]:
    """deform_ps_roi_pool with classes, parts and groups of every kind."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    for C, P, group_size, part_size, per_part, classes in (
        (8, 2, None, None, 2, 1),
        (16, 2, None, None, 2, 2),
        (12, 4, 2, 2, 1, 3),
        (4, 2, 1, 1, 4, 2),
        (8, 2, None, None, 2, 0),
    ):
        rois, size = _boxes(rng, 4, (P * per_part / 2, P * per_part), 0.25, "rfcn")  # samples half or one pixel apart
        arrays = {"input": _values(rng, (_MAP[0], C, *_MAP[1:])), "rois": rois}
        if classes:
            part = part_size or P
            arrays["trans"] = _shifts(rng, (4, 2 * classes, part, part), 0.1 * size, [0.0, 0.5])
        params = _roi_params(
            (P, P), group_size=group_size, part_size=part_size, sample_per_part=per_part, trans_std=0.1
        )
        label = f"group_size={group_size} part_size={part_size} classes={classes}"
        cases.append(Sample(arrays, params, label, steps={"trans": 0.125 / float(0.1 * size.max())}))
    return cases


def roi_pool_kinks(seed: int) -> list[Sample]:
    """Maps of few values: of equal maxima the first in row-major order gets the gradient."""
    from dcn_kernels.dispatch.row import Sample

    rng = np.random.default_rng(seed)
    image = rng.integers(0, 2, (1, 1, 6, 7)).astype(float)
    rois = np.array([[0, 1, 0, 4, 5], [0, 0, 2, 6, 4], [0, 4, 3, 9, 8]], float)  # whole pixels, ends included
    expected = np.zeros_like(image)
    for _, x1, y1, x2, y2 in rois.astype(int):
        h, w = y2 - y1 + 1, x2 - x1 + 1
        for ph, pw in np.ndindex(2, 2):
            rows = range(min(y1 + ph * h // 2, 6), min(y1 - (-(ph + 1) * h // 2), 6))
            columns = range(min(x1 + pw * w // 2, 7), min(x1 - (-(pw + 1) * w // 2), 7))
            pixels = [(row, column) for row in rows for column in columns]
            if pixels:
                expected[0, 0][max(pixels, key=lambda at: image[0, 0][at])] += 1  # max gives the first
    arrays, params = {"input": image, "rois": rois}, _roi_params((2, 2), 1.0, mode="max")
    return [Sample(arrays, params, "kink: max, ties", expected={"input": expected})]


def deform_roi_pool_kinks(seed: int) -> list[Sample]:
    """Offset 0 and samples on pixel lines: right-hand slopes of the border rule, 0 beyond it."""
    from dcn_kernels.dispatch.row import Sample

    rng, cases = np.random.default_rng(seed), []
    image = _values(rng, (1, 1, 5, 6))
    # one pixel a bin: "paper" samples at the pixel, "mmcv" in the middle of a bin that starts half a pixel before it
    for convention, border, beyond in (("paper", "zeros", 0), ("mmcv", "edge", 1)):
        corners = [(0, 0), (2, 3), (4, 3), (-1, 1)]  # x, y of each RoI's first sample
        rois = np.array([[0, x, y, x + 1 + beyond, y + 1 + beyond] for x, y in corners], float)
        y, x = (rois[:, axis].astype(int)[:, None, None] + np.indices((2, 2))[2 - axis] for axis in (2, 1))
        slope_y, slope_x = slopes_on_lines(image[0, 0], border, y, x)
        expected = 0.125 * 2 * np.stack([slope_x, slope_y], axis=1)  # gamma times a RoI's two pixels, x first
        arrays = {"input": image, "rois": rois, "offset": np.zeros(expected.shape)}
        params = _roi_params((2, 2), 1.0, gamma=0.125, sampling_ratio=1, convention=convention)
        cases.append(Sample(arrays, params, f"kink: {convention}, offset 0", expected={"offset": expected}))
    return cases


def deform_ps_roi_pool_kinks(seed: int) -> list[Sample]:
    """One sample a RoI, on a pixel line or clipped to the map along one axis: 0 along that axis."""
    from dcn_kernels.dispatch.row import Sample

    rng = np.random.default_rng(seed)
    image = _values(rng, (1, 1, 6, 7))
    # x1, y1, and the shift in pixels from half a pixel before them: on a line and clipped, in y and in x
    ways = [(2, 1, 0.75, 0.5), (0, 2, 0.5, 0.75), (2, 0, 0.75, 0.25), (0, 1, 0.125, 0.75), (3, 5, 0.75, 0.75)]
    rois = np.array([[0, x1, y1, x1 + 3, y1 + 3] for x1, y1, _, _ in ways], float)  # 4x4 pixels: trans_std*4 = 0.5
    trans = np.array([[dx / 0.5, dy / 0.5] for _, _, dx, dy in ways]).reshape(-1, 2, 1, 1)
    expected = np.zeros_like(trans)
    for number, (x1, y1, dx, dy) in enumerate(ways):
        x, y = x1 - 0.5 + dx, y1 - 0.5 + dy
        column, row, across, down = int(max(x, 0)), int(max(y, 0)), max(x, 0) % 1, max(y, 0) % 1
        right, below = min(column + 1, 6), min(row + 1, 5)
        corners = image[0, 0][np.ix_([row, below], [column, right])]
        if x > 0 and across:
            expected[number, 0] = 0.5 * (np.diff(corners, axis=1).ravel() @ [1 - down, down])
        if 5 > y > 0 and down:
            expected[number, 1] = 0.5 * (np.diff(corners, axis=0).ravel() @ [1 - across, across])
    params = _roi_params((1, 1), 1.0, group_size=None, part_size=None, sample_per_part=1, trans_std=0.125)
    arrays = {"input": image, "rois": rois, "trans": trans}
    return [Sample(arrays, params, "kink: on a line, clipped", expected={"trans": expected})]


def _roi_layer(layer: dict[str, Any], seed: int) -> tuple[np.random.Generator, dict[str, Any]]:
    """Input and rois of a layer: sizes N C H W R, spatial_scale; boxes from 1/16 of the image to all of it."""
    rng = np.random.default_rng(seed)
    N, C, H, W, R = (layer[letter] for letter in "NCHWR")
    length = np.array([W, H]) / layer["spatial_scale"]
    size = length * np.exp(rng.uniform(np.log(1 / 16), 0, (R, 2)))
    low = rng.uniform(0, 1, (R, 2)) * (length - size)
    rois = np.concatenate([rng.integers(0, N, (R, 1)), low, low + size], axis=1)
    return rng, {"input": rng.standard_normal((N, C, H, W)), "rois": rois}


def roi_layer(layer: dict[str, Any], *, offsets: str = "random", spread: float = 1.0, seed: int = 0) -> Sample:
    """Inputs of a layer of an operator without offsets; its other parameters are in layer["params"]."""
    from dcn_kernels.dispatch.row import Sample

    arrays = _roi_layer(layer, seed)[1]
    return Sample(arrays, _roi_params(layer["output_size"], layer["spatial_scale"], **layer["params"]), offsets)


def deform_roi_layer(layer: dict[str, Any], *, offsets: str = "random", spread: float = 1.0, seed: int = 0) -> Sample:
    """Inputs of a layer of deform_roi_pool (offset) or deform_ps_roi_pool (trans, of layer["classes"])."""
    from dcn_kernels.dispatch.row import Sample

    rng, arrays = _roi_layer(layer, seed)
    shape = (layer["R"], 2 * layer["classes"], *layer["output_size"])
    name = "trans" if "trans_std" in layer["params"] else "offset"
    arrays[name] = layer_offsets(rng, shape, offsets, spread)
    return Sample(arrays, _roi_params(layer["output_size"], layer["spatial_scale"], **layer["params"]), offsets)
