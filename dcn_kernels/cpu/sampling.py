"""The one sampler of the CPU kernels: the border rules, and the corners and weights of many positions at once.

The same rules as in reference/sampling.py. Here a rule is the numbers that a coordinate is compared with, so that one
loop without branches serves all rules and LLVM makes vectors of it. A corner that is outside the image, or of a
sample that does not count, is the pixel `empty` = H*W: the staged image has a pixel of zeros there, which is read and
written as any other. Pixel `empty` + 1 is one of zeros too: a table for BOTH has it as the first corner of a sample
whose derivative counts and whose value does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import types

from dcn_kernels.cpu.jit import inner, intrinsic, spliced, stay_apart

# What corner_table is asked for.
VALUE = 0  # corners of samples whose value counts
SLOPE = 1  # also of those whose derivative alone does: at -1 under "zeros"
BOTH = 2  # as SLOPE; where the value does not count, the first corner is the pixel empty + 1

Limits = tuple[float, float, float, float, float, float]


# A rule on an axis of `size` pixels: the coordinate samples at clip(v, low, high); the sample counts if
# first <= v <= last; its right-hand derivative is that of the cell if start <= v <= stop. A NaN fails every comparison.


def _below(size: int, real: Any) -> Any:
    """The largest number under `size`, which from 2^24 on may be no float32."""
    nearest = real(size)
    return nearest if int(nearest) < size else np.nextafter(nearest, real(-np.inf))


def _at_least(size: int, real: Any) -> Any:
    """The smallest number from `size` on: what is clamped to it is clamped to the last pixel, as indices are."""
    nearest = real(size)
    return nearest if int(nearest) >= size else np.nextafter(nearest, real(np.inf))


def zeros(size: int, real: Any) -> Limits:
    """Corners outside the image count as 0 (Eq. 3): counts if -1 < v < size, moves if -1 <= v < size."""
    below = _below(size, real)
    return -np.inf, np.inf, np.nextafter(real(-1), real(0)), below, -1, below


def msra(size: int, real: Any) -> Limits:
    """0 outside the image, clamped within the last pixel: counts if 0 <= v < size, moves if 0 <= v < size - 1."""
    return -np.inf, _at_least(size - 1, real), 0, _below(size, real), 0, _below(size - 1, real)


def edge(size: int, real: Any) -> Limits:
    """Clamped to the image: always counts, moves if 0 <= v < size - 1."""
    return 0, _at_least(size - 1, real), -np.inf, np.inf, 0, _below(size - 1, real)


BORDERS: dict[str, Callable[[int, Any], Limits]] = {"zeros": zeros, "msra": msra, "edge": edge}


@lru_cache(maxsize=256)
def limits_of(border: str, height: int, width: int, real: Any) -> np.ndarray:
    """The rule's numbers for both axes: (2, 6)."""
    rule = BORDERS[border]
    scalar = np.dtype(real).type
    return np.array([rule(height, scalar), rule(width, scalar)], real)


@spliced
def _cell(y, x, zero, low_y, high_y, first_y, last_y, start_y, stop_y, low_x, high_x, first_x, last_x, start_x, stop_x):
    """The cell of position (y, x): row, column, fractions, and whether it is near, counts, moves with y, with x."""
    counts_y, counts_x = (first_y <= y) & (y <= last_y), (first_x <= x) & (x <= last_x)
    moves_y, moves_x = (start_y <= y) & (y <= stop_y), (start_x <= x) & (x <= stop_x)
    near = (counts_y | moves_y) & (counts_x | moves_x)
    py = min(max(y, low_y), high_y) if near else zero
    px = min(max(x, low_x), high_x) if near else zero
    y0, x0 = np.floor(py), np.floor(px)
    return y0, x0, py - y0, px - x0, near, counts_y & counts_x, moves_y & near, moves_x & near


@intrinsic
def _pixel(typingctx, row, width, column):
    """row * width + column in 32 bits, where Numba would widen to 64: twice as many to a vector."""

    def codegen(context, builder, signature, args):
        return builder.add(builder.mul(args[0], args[1]), args[2])

    return types.int32(types.int32, types.int32, types.int32), codegen


@inner
def corner_table(asked, y, x, m, count, height, width, limits, index, weight, row):
    """The corners of `count` positions y, x and their weights m G(q, p), as index[row, q, p] and weight[row, q, p].

    Corners q are 00, 01, 10, 11. NaN positions get the pixel `empty` and NaN weights. A sample that does not count
    reads no pixel, so that an infinite one does not reach it; `asked` says whose corners are wanted.
    """
    stay_apart()
    one = y.dtype.type(1)
    zero = one - one
    low_y, high_y, first_y, last_y, start_y, stop_y = limits[0]
    low_x, high_x, first_x, last_x, start_x, stop_x = limits[1]
    last_row, last_column, first = np.int32(height - 1), np.int32(width - 1), np.int32(0)
    still = np.int32(height * width + 1) if asked == BOTH else np.int32(height * width)
    empty, down, right = np.int32(height * width), np.int32(width), np.int32(1)
    both = np.int32(width + 1)
    for p in range(count):
        y0, x0, ly, lx, near, counts, _, _ = _cell(
            y[p], x[p], zero, low_y, high_y, first_y, last_y, start_y, stop_y,
            low_x, high_x, first_x, last_x, start_x, stop_x,
        )  # fmt: skip
        near = counts if asked == VALUE else near
        line, column = np.int32(y0), np.int32(x0)
        line = line if line < last_row else last_row
        column = column if column < last_column else last_column
        top, bottom = near & (line >= first), near & (line < last_row)
        on_left, on_right = column >= first, column < last_column
        corner = _pixel(line, down, column)
        index[row, 0, p] = corner if top & on_left else (empty if counts else still)
        index[row, 1, p] = _pixel(right, right, corner) if top & on_right else empty
        index[row, 2, p] = _pixel(right, down, corner) if bottom & on_left else empty
        index[row, 3, p] = _pixel(right, both, corner) if bottom & on_right else empty
        factor = m[p] if counts else m[p] * zero  # 0, or NaN of a NaN mask
        factor = y[p] + x[p] if (y[p] != y[p]) | (x[p] != x[p]) else factor  # a NaN, also where the mask is 0
        weight[row, 0, p] = (one - ly) * (one - lx) * factor
        weight[row, 1, p] = (one - ly) * lx * factor
        weight[row, 2, p] = ly * (one - lx) * factor
        weight[row, 3, p] = ly * lx * factor


@inner
def coordinate_gradients(y, x, m, count, limits, dots, grad_y, grad_x, grad_m):
    """Gradients of positions and masks from dots[p, q] = sum_c g_c x_c(q) over the corners q of position p.

    A g that is infinite or NaN makes all four dots so, and with them the gradients that the rule holds at 0: 0 times g.
    A pixel that is infinite or NaN makes only its own corner's dot so.
    """
    stay_apart()
    one = y.dtype.type(1)
    zero, endless = one - one, y.dtype.type(np.inf)
    low_y, high_y, first_y, last_y, start_y, stop_y = limits[0]
    low_x, high_x, first_x, last_x, start_x, stop_x = limits[1]
    for p in range(count):
        _, _, ly, lx, _, counts, moves_y, moves_x = _cell(
            y[p], x[p], zero, low_y, high_y, first_y, last_y, start_y, stop_y,
            low_x, high_x, first_x, last_x, start_x, stop_x,
        )  # fmt: skip
        d00, d01, d10, d11 = dots[p, 0], dots[p, 1], dots[p, 2], dots[p, 3]
        upper = (one - lx) * d00 + lx * d01
        lower = (one - lx) * d10 + lx * d11
        value = (one - ly) * upper + ly * lower
        slope_y = m[p] * (lower - upper)
        slope_x = m[p] * ((one - ly) * (d01 - d00) + ly * (d11 - d10))
        wrong = (y[p] != y[p]) | (x[p] != x[p])
        nan = y[p] + x[p]
        finite = (abs(d00) < endless) | (abs(d01) < endless) | (abs(d10) < endless) | (abs(d11) < endless)
        still = zero if finite else d00 * zero  # 0, or NaN of a g
        grad_y[p] = nan if wrong else (slope_y if moves_y else m[p] * zero + still)
        grad_x[p] = nan if wrong else (slope_x if moves_x else m[p] * zero + still)
        grad_m[p] = nan if wrong else (value if counts else still)
