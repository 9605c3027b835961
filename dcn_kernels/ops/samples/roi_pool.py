"""Inputs of roi_pool, ps_roi_pool, roi_align and ps_roi_align."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.dispatch.row import Sample
from dcn_kernels.ops.samples.draw import (
    MAP,
    Choices,
    boxes,
    distinct,
    drawn_channels,
    drawn_rois,
    roi_inputs,
    roi_layer_call,
    roi_params,
    values,
)


def roi_pool(seed: int) -> list[Sample]:
    """Both modes of roi_pool."""
    rng, cases = np.random.default_rng(seed), []
    for mode, C, output_size in (("max", 2, (3, 2)), ("avg", 3, (2, 3)), ("max", 3, (1, 1)), ("avg", 1, (4, 4))):
        arrays = {
            "input": distinct(rng, (MAP[0], C, *MAP[1:])),
            "rois": boxes(rng, 4, (1, 3, 5, 8), 0, "whole")[0],
        }
        label = f"{mode} {output_size[0]}x{output_size[1]}"
        cases.append(Sample(arrays, roi_params(output_size, mode=mode), label, steps={"input": 0.1}))
    return cases


def ps_roi_pool(seed: int) -> list[Sample]:
    """Both conventions of ps_roi_pool, with groups of every kind."""
    rng, cases = np.random.default_rng(seed), []
    for convention, C, output_size, group_size in (
        ("rfcn", 8, (2, 2), None),
        ("rfcn", 8, (4, 4), 2),
        ("rfcn", 9, (2, 4), 3),
        ("torchvision", 12, (2, 3), None),
    ):
        arrays = {
            "input": values(rng, (MAP[0], C, *MAP[1:])),
            "rois": boxes(rng, 4, (0.25, 2, 4.5, 7), 0.25, "rfcn")[0],
        }
        params = roi_params(output_size, group_size=group_size, convention=convention)
        cases.append(Sample(arrays, params, f"{convention} group_size={group_size}"))
    return cases


def roi_align(seed: int) -> list[Sample]:
    """roi_align with and without half a pixel's shift, with grids that are given and that follow the RoI."""
    rng, cases = np.random.default_rng(seed), []
    for aligned, ratio, C, output_size in ((True, 2, 3, (2, 2)), (False, -1, 2, (3, 2)), (True, 0, 17, (1, 2))):
        rois = boxes(rng, 4, (2, 4, 6), 0.25, "align")[0]
        arrays = {"input": values(rng, (MAP[0], C, *MAP[1:])), "rois": rois}
        params = roi_params(output_size, sampling_ratio=ratio, aligned=aligned)
        cases.append(Sample(arrays, params, f"aligned={aligned} sampling_ratio={ratio}"))
    return cases


def ps_roi_align(seed: int) -> list[Sample]:
    """ps_roi_align with a given grid and with one that follows the RoI."""
    rng, cases = np.random.default_rng(seed), []
    for ratio, C, output_size in ((2, 12, (3, 2)), (-1, 8, (2, 2))):
        rois = boxes(rng, 4, (2, 4, 6), 0.25, "align")[0]
        arrays = {"input": values(rng, (MAP[0], C, *MAP[1:])), "rois": rois}
        cases.append(Sample(arrays, roi_params(output_size, sampling_ratio=ratio), f"sampling_ratio={ratio}"))
    return cases


def roi_pool_kinks(seed: int) -> list[Sample]:
    """Maps of few values: of equal maxima the first in row-major order gets the gradient."""
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
    arrays, params = {"input": image, "rois": rois}, roi_params((2, 2), 1.0, mode="max")
    return [Sample(arrays, params, "kink: max, ties", expected={"input": expected})]


def roi_pool_drawn(choose: Choices) -> Sample:
    """Any pooling, with ties among the pixels."""
    (N, H, W), rois, params = drawn_rois(choose)
    arrays = {"input": choose.rng.integers(-8, 9, (N, drawn_channels(choose), H, W)) / 4, "rois": rois}
    return Sample(arrays, {**params, "mode": choose.of("mode", ("max", "avg"))})


def ps_roi_pool_drawn(choose: Choices) -> Sample:
    """Any position-sensitive pooling."""
    (N, H, W), rois, params = drawn_rois(choose)
    PH, PW = params["output_size"]
    convention, groups, maps = choose.of("convention", ("rfcn", "torchvision")), None, PH * PW
    if convention == "rfcn" and (PH != PW or choose.of("groups given", (False, True))):
        groups = choose.size("group_size", 1, 3)
        maps = groups**2
    arrays = {"input": values(choose.rng, (N, drawn_channels(choose, maps), H, W)), "rois": rois}
    return Sample(arrays, {**params, "group_size": groups, "convention": convention})


def roi_align_drawn(choose: Choices) -> Sample:
    """Any RoIAlign."""
    (N, H, W), rois, params = drawn_rois(choose)
    ratio, aligned = choose.of("sampling_ratio", (1, 2, 3, 0, -1)), choose.of("aligned", (False, True))
    arrays = {"input": values(choose.rng, (N, drawn_channels(choose), H, W)), "rois": rois}
    return Sample(arrays, {**params, "sampling_ratio": ratio, "aligned": aligned})


def ps_roi_align_drawn(choose: Choices) -> Sample:
    """Any position-sensitive RoIAlign."""
    (N, H, W), rois, params = drawn_rois(choose)
    C = drawn_channels(choose, *params["output_size"])
    arrays = {"input": values(choose.rng, (N, C, H, W)), "rois": rois}
    return Sample(arrays, {**params, "sampling_ratio": choose.of("sampling_ratio", (1, 2, 3, 0, -1))})


def roi_layer(layer: dict[str, Any], *, offsets: str = "random", spread: float = 1.0, seed: int = 0) -> Sample:
    """Inputs of a layer of an operator without offsets."""
    return Sample(roi_inputs(layer, seed)[1], roi_layer_call(layer)[1], offsets)
