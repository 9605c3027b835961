"""Inputs of offset_sample2d."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.dispatch.row import Sample
from dcn_kernels.ops.samples.draw import Choices, drawn_positions, layer_offsets, off_kinks, slopes_on_lines, values

_CASES = (
    # name, (N, C, H, W), offset groups, border, reach
    ("a field per channel", (2, 3, 6, 7), 3, "edge", 2),
    ("grouped", (1, 6, 5, 8), 2, "zeros", 2),
    ("one field", (1, 20, 7, 5), 1, "msra", 3),
    ("far", (1, 4, 5, 5), 1, "edge", 9),
)


def offset_sample2d(seed: int) -> list[Sample]:
    """Every option of offset_sample2d in small float64 cases."""
    rng, cases = np.random.default_rng(seed), []
    for name, (N, C, H, W), OG, border, reach in _CASES:
        arrays = {"input": values(rng, (N, C, H, W)), "offset": off_kinks(rng, (N, 2 * OG, H, W), reach)}
        cases.append(Sample(arrays, {"border": border, "deterministic": False}, name))
    return cases


def offset_sample2d_kinks(seed: int) -> list[Sample]:
    """One channel, every position on a pixel line."""
    rng, cases = np.random.default_rng(seed), []
    for border in ("zeros", "msra", "edge"):
        arrays = {"input": values(rng, (1, 1, 4, 5)), "offset": rng.integers(-3, 4, (1, 2, 4, 5)).astype(float)}
        row, column = np.mgrid[:4, :5]
        y, x = row + arrays["offset"][0, 0], column + arrays["offset"][0, 1]
        expected = np.stack(slopes_on_lines(arrays["input"][0, 0], border, y, x))[None]
        params = {"border": border, "deterministic": False}
        cases.append(Sample(arrays, params, f"kink: {border}, whole offsets", expected={"offset": expected}))
    return cases


def offset_sample2d_layer_call(layer: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of the arrays of a layer (sizes N C H W, offset_groups), and its parameters."""
    N, C, H, W = (layer[letter] for letter in "NCHW")
    shapes: dict[str, tuple[int, ...]] = {"input": (N, C, H, W), "offset": (N, 2 * layer["offset_groups"], H, W)}
    return shapes, {"border": "edge", "deterministic": False}


def offset_sample2d_drawn(choose: Choices) -> Sample:
    """Any map, with a field of offsets for any number of its channels."""
    N, OG = choose.of("N", (1, 1, 1, 2, 3, 0)), choose.size("OG", 1, 4)
    C, H, W = OG * choose.of("C", (1, 2, 3, 9)), choose.length("H"), choose.length("W")
    arrays = {
        "input": values(choose.rng, (N, C, H, W)),
        "offset": drawn_positions(choose, "offset", (N, 2 * OG, H, W)),
    }
    border = choose.of("border", ("zeros", "msra", "edge"))
    return Sample(arrays, {"border": border, "deterministic": choose.of("deterministic", (False, True))})


def offset_sample2d_layer(
    layer: dict[str, Any], *, offsets: str = "random", spread: float = 2.0, seed: int = 0
) -> Sample:
    """Inputs of a layer."""
    rng = np.random.default_rng(seed)
    shapes, params = offset_sample2d_layer_call(layer)
    offset = layer_offsets(rng, shapes["offset"], offsets, spread)
    return Sample({"input": rng.standard_normal(shapes["input"]), "offset": offset}, params, offsets)
