"""The one sampler of the CPU kernels: the border rules, and the corners and weights of many positions at once.

The same rules as in reference/sampling.py, branch-free so that LLVM vectorises a loop over positions. A corner that is
outside the image, or of a sample that does not count, is the pixel `empty` = H*W: the staged image has a pixel of
zeros there, which is read and written as any other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.cpu.jit import inner

ZEROS, MSRA, EDGE = 0, 1, 2
BORDERS = {"zeros": ZEROS, "msra": MSRA, "edge": EDGE}

# A rule: coordinate v on an axis of `size` pixels -> (where it samples, whether the sample counts, whether its
# right-hand derivative is that of the cell). All False for a NaN. `one` and `size` have v's type: a plain 1 would
# turn float32 arithmetic into float64.


@inner
def zeros(v, size, one):  # type: ignore[no-untyped-def]
    """Corners outside the image count as 0 (Eq. 3)."""
    return v, (v > -one) & (v < size), (v >= -one) & (v < size)


@inner
def msra(v, size, one):  # type: ignore[no-untyped-def]
    """0 outside the image, clamped within the last pixel."""
    last = size - one
    return min(v, last), (v >= one - one) & (v < size), (v >= one - one) & (v < last)


@inner
def edge(v, size, one):  # type: ignore[no-untyped-def]
    """Clamped to the image."""
    last = size - one
    return min(max(v, one - one), last), v == v, (v >= one - one) & (v < last)


def _cell(rule: Any) -> Any:
    @inner
    def cell(y, x, height, width, one):  # type: ignore[no-untyped-def]
        """The cell of position (y, x): (row, column, fractions, near, counts, moves_y, moves_x, NaN)."""
        zero = one - one
        py, counts_y, moves_y = rule(y, height, one)
        px, counts_x, moves_x = rule(x, width, one)
        near = (counts_y | moves_y) & (counts_x | moves_x)
        py = py if near else zero
        px = px if near else zero
        y0, x0 = np.floor(py), np.floor(px)
        return y0, x0, py - y0, px - x0, near, counts_y & counts_x, moves_y & near, moves_x & near, (y != y) | (x != x)

    return cell


def _table(rule: Any) -> Any:
    cell = _cell(rule)

    @inner
    def table(y, x, m, count, height, width, index, weight, start, step):  # type: ignore[no-untyped-def]
        one = y.dtype.type(1)
        zero = one - one
        real_height, real_width = y.dtype.type(height), y.dtype.type(width)
        empty = np.int32(height * width)
        for p in range(count):
            y0, x0, ly, lx, near, counts, _, _, nan = cell(y[p], x[p], real_height, real_width, one)
            row, column = np.int32(y0), np.int32(x0)
            top, bottom = near & (row >= 0), near & (row + 1 < height)
            left, right = column >= 0, column + 1 < width
            corner = row * width + column
            index[start + p] = corner if top & left else empty
            index[start + step + p] = corner + 1 if top & right else empty
            index[start + 2 * step + p] = corner + width if bottom & left else empty
            index[start + 3 * step + p] = corner + width + 1 if bottom & right else empty
            factor = m[p] if counts else zero
            factor = y[p] + x[p] if nan else factor  # a NaN, also where the mask is 0
            weight[start + p] = (one - ly) * (one - lx) * factor
            weight[start + step + p] = (one - ly) * lx * factor
            weight[start + 2 * step + p] = ly * (one - lx) * factor
            weight[start + 3 * step + p] = ly * lx * factor

    return table


def _slopes(rule: Any) -> Any:
    cell = _cell(rule)

    @inner
    def slopes(y, x, m, count, height, width, dots, grad_y, grad_x, grad_m):  # type: ignore[no-untyped-def]
        one = y.dtype.type(1)
        zero = one - one
        real_height, real_width = y.dtype.type(height), y.dtype.type(width)
        for p in range(count):
            _, _, ly, lx, _, counts, moves_y, moves_x, nan = cell(y[p], x[p], real_height, real_width, one)
            d00, d01, d10, d11 = dots[4 * p], dots[4 * p + 1], dots[4 * p + 2], dots[4 * p + 3]
            upper = (one - lx) * d00 + lx * d01
            lower = (one - lx) * d10 + lx * d11
            wrong = y[p] + x[p]  # NaN where a coordinate is
            value = (one - ly) * upper + ly * lower
            slope_y = m[p] * (lower - upper)
            slope_x = m[p] * ((one - ly) * (d01 - d00) + ly * (d11 - d10))
            grad_y[p] = wrong if nan else (slope_y if moves_y else zero)
            grad_x[p] = wrong if nan else (slope_x if moves_x else zero)
            grad_m[p] = wrong if nan else (value if counts else zero)

    return slopes


_table_zeros, _table_msra, _table_edge = _table(zeros), _table(msra), _table(edge)
_slopes_zeros, _slopes_msra, _slopes_edge = _slopes(zeros), _slopes(msra), _slopes(edge)


@inner
def corner_table(border, y, x, m, count, height, width, index, weight, start, step):  # type: ignore[no-untyped-def]
    """The corners of `count` positions y, x and their weights m G(q, p).

    Corner q (00, 01, 10, 11) of position p goes to element start + q*step + p of index and weight. NaN positions
    get the pixel `empty` and NaN weights.
    """
    if border == ZEROS:
        _table_zeros(y, x, m, count, height, width, index, weight, start, step)
    elif border == MSRA:
        _table_msra(y, x, m, count, height, width, index, weight, start, step)
    else:
        _table_edge(y, x, m, count, height, width, index, weight, start, step)


@inner
def coordinate_gradients(border, y, x, m, count, height, width, dots, grad_y, grad_x, grad_m):  # type: ignore[no-untyped-def]
    """Gradients of positions and masks from dots[4*p + q] = sum_c g_c x_c(q) over the corners q of position p."""
    if border == ZEROS:
        _slopes_zeros(y, x, m, count, height, width, dots, grad_y, grad_x, grad_m)
    elif border == MSRA:
        _slopes_msra(y, x, m, count, height, width, dots, grad_y, grad_x, grad_m)
    else:
        _slopes_edge(y, x, m, count, height, width, dots, grad_y, grad_x, grad_m)
