"""What the samples of all families are drawn with: values, offsets off the kinks, boxes, slopes on pixel lines.

The cases' sampling points are kept off the kinks by construction: every fractional part lies in [0.2, 0.8], so
central differences with a step of up to 0.1 stay inside one cell, where bilinear interpolation is exactly quadratic.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np


def off_kinks(rng: np.random.Generator, shape: tuple[int, ...], reach: int) -> np.ndarray:
    """Offsets within about `reach` pixels whose fractional parts lie in [0.2, 0.8]; exact in every dtype."""
    whole = rng.integers(-reach, reach, shape)
    return whole + rng.integers(4, 13, shape) / 16  # sixteenths: a float16 or bfloat16 near 0 holds them exactly


def values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers rounded to bfloat16 and float16, so that rounding the inputs is no part of an error."""
    return np.round(rng.standard_normal(shape) * 32) / 32


def slopes_on_lines(image: np.ndarray, border: str, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(d/dy, d/dx) of an image (H, W) at whole positions y, x: what the border rules document, one pixel at a time."""
    H, W = image.shape

    def pixel(row: int, column: int) -> float:
        if border == "edge":
            column, row = min(max(column, 0), W - 1), min(max(row, 0), H - 1)
        return image[row, column] if 0 <= row < H and 0 <= column < W else 0.0

    slopes = np.zeros((2, *y.shape))
    # the lines that have a slope: under "zeros" also -1, and H-1, from where the value falls to 0; else 0 .. H-2
    first = -1 if border == "zeros" else 0
    last = 0 if border == "zeros" else 1
    for at in np.ndindex(y.shape):
        row, column = int(y[at]), int(x[at])
        if first <= row < H - last:
            slopes[0][at] = pixel(row + 1, column) - pixel(row, column)
        if first <= column < W - last:
            slopes[1][at] = pixel(row, column + 1) - pixel(row, column)
    return slopes[0], slopes[1]


def layer_offsets(rng: np.random.Generator, shape: tuple[int, ...], offsets: str, spread: float) -> np.ndarray:
    """Offsets (N, channels, axes...) for timing: "zero", "random" (independent) or "smooth" (wanders slowly).

    In 1/64 pixels, so that positions in a large image are exact in float32 and every backend looks into the same cell.
    """
    if offsets == "zero":
        return np.zeros(shape)
    if offsets == "random":
        return np.round(rng.standard_normal(shape) * (64 * spread)) / 64
    if offsets != "smooth":
        raise ValueError(f"offsets: expected 'zero', 'smooth' or 'random', got {offsets!r}")
    field = rng.standard_normal((*shape[:2], *(length // 8 + 2 for length in shape[2:]))) * spread
    for axis in reversed(range(2, len(shape))):  # every eighth number is drawn; those between lie on a line
        at = np.arange(shape[axis]) / 8
        before = at.astype(int)
        part = (at - before).reshape(-1, *(1,) * (len(shape) - axis - 1))
        field = field.take(before, axis) * (1 - part) + field.take(before + 1, axis) * part
    return np.round(field * 64) / 64


SCALE = 0.25  # exact in every dtype

MAP = (2, 6, 7)  # N, H, W


def distinct(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Maps whose pixels differ by at least a quarter, so that a small step does not move a maximum to another pixel."""
    planes = [rng.permutation(shape[-2] * shape[-1]) for _ in range(shape[0] * shape[1])]
    return np.stack(planes).reshape(shape) / 4 - shape[-2] * shape[-1] / 8


def boxes(
    rng: np.random.Generator,
    count: int,
    sizes: tuple[float, ...],
    fraction: float,
    convention: str,
    unit: tuple[int, int] = (1, 1),
) -> tuple[np.ndarray, np.ndarray]:
    """(rois (R, 5), their sizes on the map as (R, 2) of x, y): they start `fraction` after a whole pixel."""
    size = rng.choice(sizes, (count, 2)) * np.array(unit[::-1])  # sizes in units (y, x)
    start = np.stack([rng.integers(-2, length - 2, count) for length in (MAP[2], MAP[1])], axis=1) + fraction
    image = rng.integers(0, MAP[0], count)
    if convention == "align":  # start = x1*s - 0.5
        low, high = (start + 0.5) / SCALE, (start + 0.5 + size) / SCALE
    elif convention == "rfcn":  # start = round(x1)*s - 0.5, the last pixel included; moved off the rounding's kink
        low, high = (start + 0.5) / SCALE + 0.25, (start + 0.5 + size) / SCALE - 1.25
    else:  # start = round(x1*s), the last pixel included
        low, high = np.round(start) / SCALE + 0.5, (np.round(start) + size - 1) / SCALE - 0.5
    return np.concatenate([image[:, None], low, high], axis=1), size


def shifts(rng: np.random.Generator, shape: tuple[int, ...], reach: np.ndarray, fractions: list[float]) -> np.ndarray:
    """Normalised offsets (R, 2*classes, PH, PW), x before y: `reach` (R, 2) pixels of shift per unit."""
    pixels = rng.integers(-2, 2, shape) + rng.choice(fractions, shape) + rng.integers(-4, 5, shape) / 128
    return pixels / np.tile(reach, (1, shape[1] // 2))[:, :, None, None]


def roi_params(output_size: tuple[int, int], spatial_scale: float = SCALE, **more: Any) -> dict[str, Any]:
    common = {"output_size": output_size, "spatial_scale": spatial_scale, "deterministic": False, "validate": False}
    return {**common, **more}


def roi_layer_call(layer: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of input and rois of a layer, and its parameters."""
    shapes = {"input": tuple(layer[letter] for letter in "NCHW"), "rois": (layer["R"], 5)}
    return shapes, roi_params(layer["output_size"], layer["spatial_scale"], **layer["params"])


def roi_inputs(layer: dict[str, Any], seed: int) -> tuple[np.random.Generator, dict[str, Any]]:
    """Input and rois of a layer; boxes from 1/16 of the image to all of it."""
    rng = np.random.default_rng(seed)
    N, C, H, W, R = (layer[letter] for letter in "NCHWR")
    length = np.array([W, H]) / layer["spatial_scale"]
    size = length * np.exp(rng.uniform(np.log(1 / 16), 0, (R, 2)))
    low = rng.uniform(0, 1, (R, 2)) * (length - size)
    rois = np.concatenate([rng.integers(0, N, (R, 1)), low, low + size], axis=1)
    return rng, {"input": rng.standard_normal((N, C, H, W)), "rois": rois}


# ---------------------------------------------------------------- calls drawn for `dcn-check fuzz`


class Choices:
    """The named choices that a drawn call is made of: at random, or those of `fixed`, which leaves out the simplest.

    Options are listed with the simplest first, where shrinking a failed call goes; one listed twice is drawn as often.
    `rng` draws the arrays' values.
    """

    def __init__(self, seed: tuple[int, ...], fixed: dict[str, Any] | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.made: dict[str, Any] = {}
        self.options: dict[str, Sequence[Any]] = {}
        self._fixed = fixed
        self._pick = random.Random(repr(seed))

    def of(self, name: str, options: Sequence[Any]) -> Any:
        """One of the options."""
        if self._fixed is None:
            value = self._pick.choice(options)
        else:
            value = self._fixed.get(name, options[0])
            value = tuple(value) if isinstance(value, list) else value
            if value not in options:  # of a call in which another choice was simplified
                value = max(options[0], min(value, options[-1])) if isinstance(options, range) else options[0]
        self.made[name], self.options[name] = value, options
        return value

    def size(self, name: str, least: int, most: int) -> int:
        """A whole number of least..most."""
        return self.of(name, range(least, most + 1))

    def length(self, name: str, least: int = 1) -> int:
        """Of a map's axis: small, or now and then more than a tile of pixels or a warp holds."""
        return least + self.of(name, (*range(12), *range(12), *range(12), 39))


def drawn_positions(choose: Choices, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Offsets in pixels: off the pixel lines, on them, or anywhere."""
    reach, kind = choose.of(f"{name}.reach", (1, 3, 12)), choose.of(name, ("off lines", "on lines", "any"))
    if kind == "off lines":
        return off_kinks(choose.rng, shape, reach)
    if kind == "on lines":
        return choose.rng.integers(-reach, reach + 1, shape).astype(float)
    return choose.rng.uniform(-reach, reach, shape)


def drawn_rois(choose: Choices) -> tuple[tuple[int, int, int], np.ndarray, dict[str, Any]]:
    """((N, H, W), rois, the parameters that all RoI operators share): RoIs inside, across and outside the map."""
    N, R = choose.of("N", (1, 1, 2, 3)), choose.of("R", (1, 2, 3, 4, 5, 0))
    H, W = choose.length("H"), choose.length("W")
    scale = choose.of("spatial_scale", (1.0, 0.25, 0.1))
    length = np.array([W, H]) / scale
    low = choose.rng.uniform(-0.5, 1, (R, 2)) * length
    size = choose.rng.uniform(-0.2, 1, (R, 2)) * length * choose.rng.choice([0.2, 1, 3], (R, 1))
    corners = np.concatenate([low, low + size], axis=1)
    if choose.of("rois", ("halves", "any")) == "halves":
        corners = np.round(corners * 2) / 2
    rois = np.concatenate([choose.rng.integers(0, N, (R, 1)), corners], axis=1)
    output_size = choose.size("PH", 1, 4), choose.size("PW", 1, 4)
    more = {
        "deterministic": choose.of("deterministic", (False, True)),
        "validate": choose.of("validate", (False, True)),
    }
    return (N, H, W), rois, roi_params(output_size, scale, **more)


def drawn_channels(choose: Choices, *parts: int) -> int:
    """Channels of a map, a multiple of the parts' product."""
    return int(np.prod(parts)) * min(choose.of("C", (1, 1, 2, 3, 8, 17, 37)), max(1, 96 // int(np.prod(parts))))
