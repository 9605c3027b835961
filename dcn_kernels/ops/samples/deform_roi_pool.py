"""Inputs of deform_roi_pool and deform_ps_roi_pool."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.dispatch.row import Sample
from dcn_kernels.ops.samples.draw import (
    MAP,
    Choices,
    boxes,
    drawn_channels,
    drawn_rois,
    layer_offsets,
    roi_inputs,
    roi_layer_call,
    roi_params,
    shifts,
    slopes_on_lines,
    values,
)


def deform_roi_pool(seed: int) -> list[Sample]:
    """Every convention of deform_roi_pool, with and without offsets and masks."""
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
        rule, sizes, unit, fractions = {
            "paper": ("whole", (1, 3, 5), (1, 1), [0.25, 0.75]),  # pixels are moved: the shift alone is no whole number
            "mmcv": ("align", (ratio or 1, ratio or 2), (PH, PW), [0.0, 0.5]),  # samples one pixel apart
            "rfcn": ("rfcn", (0.5, 1), (PH * points, PW * points), [0.0, 0.5]),  # half a pixel or one apart
        }[convention]
        rois, size = boxes(rng, 4, sizes, 0.25, rule, unit)
        arrays = {"input": values(rng, (MAP[0], C, *MAP[1:])), "rois": rois}
        if offset:
            arrays["offset"] = shifts(rng, (4, 2, PH, PW), gamma * size, fractions)
        if mask:
            arrays["mask"] = rng.integers(8, 64, (4, PH, PW)) / 64
        params = roi_params((PH, PW), gamma=gamma, sampling_ratio=ratio, convention=convention)
        steps = {"offset": 0.125 / float(gamma * size.max())}  # an eighth of a pixel
        cases.append(Sample(arrays, params, f"{convention} sampling_ratio={ratio} C={C}", steps=steps))
    return cases


def deform_ps_roi_pool(seed: int) -> list[Sample]:
    """deform_ps_roi_pool with classes, parts and groups of every kind."""
    rng, cases = np.random.default_rng(seed), []
    for C, P, group_size, part_size, per_part, classes in (
        (8, 2, None, None, 2, 1),
        (16, 2, None, None, 2, 2),
        (12, 4, 2, 2, 1, 3),
        (4, 2, 1, 1, 4, 2),
        (8, 2, None, None, 2, 0),
    ):
        rois, size = boxes(rng, 4, (P * per_part / 2, P * per_part), 0.25, "rfcn")  # samples half or one pixel apart
        arrays = {"input": values(rng, (MAP[0], C, *MAP[1:])), "rois": rois}
        if classes:
            part = part_size or P
            arrays["trans"] = shifts(rng, (4, 2 * classes, part, part), 0.1 * size, [0.0, 0.5])
        params = roi_params((P, P), group_size=group_size, part_size=part_size, sample_per_part=per_part, trans_std=0.1)
        label = f"group_size={group_size} part_size={part_size} classes={classes}"
        cases.append(Sample(arrays, params, label, steps={"trans": 0.125 / float(0.1 * size.max())}))
    return cases


def deform_roi_pool_kinks(seed: int) -> list[Sample]:
    """Offset 0 and samples on pixel lines: right-hand slopes of the border rule, 0 beyond it."""
    rng, cases = np.random.default_rng(seed), []
    image = values(rng, (1, 1, 5, 6))
    # one pixel a bin: "paper" samples at the pixel, "mmcv" in the middle of a bin that starts half a pixel before it
    for convention, border, beyond in (("paper", "zeros", 0), ("mmcv", "edge", 1)):
        corners = [(0, 0), (2, 3), (4, 3), (-1, 1)]  # x, y of each RoI's first sample
        rois = np.array([[0, x, y, x + 1 + beyond, y + 1 + beyond] for x, y in corners], float)
        y, x = (rois[:, axis].astype(int)[:, None, None] + np.indices((2, 2))[2 - axis] for axis in (2, 1))
        slope_y, slope_x = slopes_on_lines(image[0, 0], border, y, x)
        expected = 0.125 * 2 * np.stack([slope_x, slope_y], axis=1)  # gamma times a RoI's two pixels, x first
        arrays = {"input": image, "rois": rois, "offset": np.zeros(expected.shape)}
        params = roi_params((2, 2), 1.0, gamma=0.125, sampling_ratio=1, convention=convention)
        cases.append(Sample(arrays, params, f"kink: {convention}, offset 0", expected={"offset": expected}))
    return cases


def deform_ps_roi_pool_kinks(seed: int) -> list[Sample]:
    """One sample a RoI, on a pixel line or clipped to the map along one axis: 0 along that axis."""
    rng = np.random.default_rng(seed)
    image = values(rng, (1, 1, 6, 7))
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
    params = roi_params((1, 1), 1.0, group_size=None, part_size=None, sample_per_part=1, trans_std=0.125)
    arrays = {"input": image, "rois": rois, "trans": trans}
    return [Sample(arrays, params, "kink: on a line, clipped", expected={"trans": expected})]


def deform_roi_layer_call(layer: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of the arrays of a layer, an offset for each bin among them, and its parameters."""
    shapes, params = roi_layer_call(layer)
    return {**shapes, "offset": (layer["R"], 2, *layer["output_size"])}, params


def deform_ps_roi_layer_call(layer: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of the arrays of a layer, a part for each bin, and its parameters."""
    shapes, params = roi_layer_call(layer)
    return {**shapes, "trans": (layer["R"], 2 * layer["classes"], *layer["output_size"])}, params


def _drawn_shifts(choose: Choices, shape: tuple[int, ...]) -> np.ndarray:
    """Normalised: in eighths, so that many positions lie on pixel lines, or anywhere."""
    shift = 2 * choose.rng.standard_normal(shape)
    return np.round(shift * 8) / 8 if choose.of("shifts", ("eighths", "any")) == "eighths" else shift


def deform_roi_pool_drawn(choose: Choices) -> Sample:
    """Any convention, with or without offsets and masks."""
    (N, H, W), rois, params = drawn_rois(choose)
    shape = len(rois), *params["output_size"]
    arrays = {"input": values(choose.rng, (N, drawn_channels(choose), H, W)), "rois": rois}
    if choose.of("offset", (False, True)):
        arrays["offset"] = _drawn_shifts(choose, (shape[0], 2, *shape[1:]))
    if choose.of("mask", (False, True)):
        arrays["mask"] = choose.rng.integers(8, 64, shape) / 64
    convention, ratio = choose.of("convention", ("paper", "rfcn", "mmcv")), choose.of("sampling_ratio", (1, 2, 3, 0))
    gamma = choose.of("gamma", (0.1, 0.25, -1.0))
    return Sample(arrays, {**params, "gamma": gamma, "sampling_ratio": ratio, "convention": convention})


def deform_ps_roi_pool_drawn(choose: Choices) -> Sample:
    """Any groups, parts and classes."""
    (N, H, W), rois, params = drawn_rois(choose)
    (PH, PW), square = params["output_size"], params["output_size"][0] == params["output_size"][1]
    group = choose.of("group_size", (None, 1, 2, 3) if square else (1, 2, 3))
    part, classes = choose.of("part_size", (None, 1, 2, 3, 4)), choose.size("classes", 1, 2)
    C = drawn_channels(choose, (group or PH) ** 2, classes)
    arrays = {"input": values(choose.rng, (N, C, H, W)), "rois": rois}
    if choose.of("trans", (False, True)):
        arrays["trans"] = _drawn_shifts(choose, (len(rois), 2 * classes, part or PH, part or PW))
    samples = choose.size("sample_per_part", 1, 4)
    more = {"group_size": group, "part_size": part, "sample_per_part": samples}
    return Sample(arrays, {**params, **more, "trans_std": choose.of("trans_std", (0.1, 0.25, -1.0))})


def deform_roi_layer(layer: dict[str, Any], *, offsets: str = "random", spread: float = 1.0, seed: int = 0) -> Sample:
    """Inputs of a layer of deform_roi_pool."""
    shapes, params = deform_roi_layer_call(layer)
    rng, arrays = roi_inputs(layer, seed)
    return Sample({**arrays, "offset": layer_offsets(rng, shapes["offset"], offsets, spread)}, params, offsets)


def deform_ps_roi_layer(
    layer: dict[str, Any], *, offsets: str = "random", spread: float = 1.0, seed: int = 0
) -> Sample:
    """Inputs of a layer of deform_ps_roi_pool."""
    shapes, params = deform_ps_roi_layer_call(layer)
    rng, arrays = roi_inputs(layer, seed)
    return Sample({**arrays, "trans": layer_offsets(rng, shapes["trans"], offsets, spread)}, params, offsets)
