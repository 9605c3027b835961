"""The one sampler: bilinear interpolation (Eq. 3, 4) under each border rule, its gradient, and its transpose.

    x(p) = sum_q G(q, p) x(q),   G(q, p) = g(q_y, p_y) g(q_x, p_x),   g(a, b) = max(0, 1 - |a - b|)

G is not 0 only at the four corners of p's cell. A border rule acts on each axis alone: it says where a coordinate
really samples, whether the sample counts, and whether moving the coordinate changes it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Axis(NamedTuple):
    """One coordinate under a border rule; all arrays of the coordinate's shape."""

    position: np.ndarray  # where it samples, after clamping
    counts: np.ndarray  # the value is not 0 by the rule
    moves: np.ndarray  # its right-hand derivative is that of the cell floor(position)


def zeros(v: np.ndarray, size: int) -> Axis:
    """Corners outside the image count as 0: Eq. 3 with sums over the image's pixels (torchvision, mmcv, ONNX)."""
    return Axis(v, (v > -1) & (v < size), (v >= -1) & (v < size))


def msra(v: np.ndarray, size: int) -> Axis:
    """0 outside the image, clamped within the last pixel (MXNet's DeformableConvolution of 2017)."""
    return Axis(np.minimum(v, size - 1), (v >= 0) & (v < size), (v >= 0) & (v < size - 1))


def edge(v: np.ndarray, size: int) -> Axis:
    """Clamped to the image (ConvOffset2D)."""
    return Axis(np.clip(v, 0, size - 1), ~np.isnan(v), (v >= 0) & (v < size - 1))


def align(v: np.ndarray, size: int) -> Axis:
    """0 more than a pixel outside, else clamped to the image (RoIAlign)."""
    return Axis(np.clip(v, 0, size - 1), (v >= -1) & (v <= size), (v >= 0) & (v < size - 1))


def psroi(v: np.ndarray, size: int) -> Axis:
    """Not counted more than half a pixel outside, else clamped; still at whole pixels (deformable R-FCN)."""
    return Axis(np.clip(v, 0, size - 1), (v >= -0.5) & (v <= size - 0.5), (v > 0) & (v < size - 1) & (v != np.floor(v)))


BORDERS = {"zeros": zeros, "msra": msra, "edge": edge, "align": align, "psroi": psroi}


class Corners(NamedTuple):
    """The four pixels q around each position p: arrays (4, *p.shape)."""

    y: np.ndarray  # row, 0 where the corner is outside
    x: np.ndarray  # column
    inside: np.ndarray  # the corner is a pixel of the image
    weight: np.ndarray  # G(q, p); NaN where a coordinate of p is NaN
    weight_y: np.ndarray  # dG/dp_y
    weight_x: np.ndarray  # dG/dp_x
    still: tuple[np.ndarray, np.ndarray, np.ndarray]  # where the rule says that the value, d/dp_y, d/dp_x is 0


def corners(y: np.ndarray, x: np.ndarray, height: int, width: int, border: str) -> Corners:
    """The corners of positions (y, x) in an image of height x width pixels, in float64."""
    rule = BORDERS[border]
    y, x = y.astype(np.float64), x.astype(np.float64)  # float32 does not hold every size from 2^24 on
    rows, columns = rule(y, height), rule(x, width)
    nan = np.isnan(y) | np.isnan(x)
    value = rows.counts & columns.counts & ~nan
    # a sample has a slope in y where y itself has one and x is near the image; at x = -1 under "zeros" its weight is 0
    moves_y = rows.moves & (columns.counts | columns.moves) & ~nan
    moves_x = columns.moves & (rows.counts | rows.moves) & ~nan
    near = value | moves_y | moves_x
    py = np.where(near, rows.position, 0).astype(np.float64)
    px = np.where(near, columns.position, 0).astype(np.float64)
    y0, x0 = np.floor(py), np.floor(px)
    ly, lx = py - y0, px - x0  # g(y0, p_y) = 1 - ly, g(y0 + 1, p_y) = ly
    parts = []
    for iy, gy, dy in ((y0, 1 - ly, -1.0), (y0 + 1, ly, 1.0)):
        for ix, gx, dx in ((x0, 1 - lx, -1.0), (x0 + 1, lx, 1.0)):
            inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width) & near
            weight = np.where(nan, np.nan, np.where(value, gy * gx, 0.0))
            weight_y = np.where(nan, np.nan, np.where(moves_y, dy * gx, 0.0))
            weight_x = np.where(nan, np.nan, np.where(moves_x, gy * dx, 0.0))
            parts.append((np.where(inside, iy, 0), np.where(inside, ix, 0), inside, weight, weight_y, weight_x))
    iy, ix, inside, weight, weight_y, weight_x = (np.stack(part) for part in zip(*parts, strict=True))
    still = (~value & ~nan, ~moves_y & ~nan, ~moves_x & ~nan)
    return Corners(iy.astype(np.int64), ix.astype(np.int64), inside, weight, weight_y, weight_x, still)


def read(plane: np.ndarray, at: Corners) -> np.ndarray:
    """The corner pixels x(q) of planes (C, H, W): (C, 4, *p.shape), 0 where a corner is outside."""
    return np.where(at.inside, plane[:, at.y, at.x], 0.0)


def sample(plane: np.ndarray, at: Corners) -> np.ndarray:
    """x(p) of planes (C, H, W): (C, *p.shape)."""
    return _blend(at.weight, read(plane, at), at.still[0])


def gradient(plane: np.ndarray, at: Corners) -> tuple[np.ndarray, np.ndarray]:
    """(dx(p)/dp_y, dx(p)/dp_x) of planes (C, H, W), each (C, *p.shape)."""
    pixels = read(plane, at)
    return _blend(at.weight_y, pixels, at.still[1]), _blend(at.weight_x, pixels, at.still[2])


def _blend(weight: np.ndarray, pixels: np.ndarray, still: np.ndarray) -> np.ndarray:
    """Sum over the corners. Exactly 0 where the rule says so: 0 times an infinite pixel would be NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(still, 0.0, (weight * pixels).sum(axis=1))


def scatter(plane_gradient: np.ndarray, at: Corners, values: np.ndarray) -> None:
    """The transpose of `sample`: add G(q, p) * values (C, *p.shape) to plane_gradient (C, H, W); NaN p adds nothing."""
    for corner in range(4):
        use = at.inside[corner] & ~np.isnan(at.weight[corner])
        y, x = at.y[corner][use], at.x[corner][use]
        for channel, value in enumerate(values):
            np.add.at(plane_gradient[channel], (y, x), at.weight[corner][use] * value[use])
