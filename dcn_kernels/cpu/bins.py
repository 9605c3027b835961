"""Bins of regions of interest, one axis at a time: which lines of pixels a bin touches, and with what weights.

Every mean over a bin is separable: sum over rows and columns of weight_y * weight_x * x, where a line's weight is the
sum of the hat functions g of the bin's points on that axis (or 1 for each pixel of a pooled bin), and its slope the
derivative of that. Along an axis the points of a bin ascend, so the lines come sorted, each once.

Coordinates are computed as reference/roi_pool.py writes them, each product and sum rounded to the type of the RoIs:
these functions are compiled without any freedom to contract or reorder.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from dcn_kernels.cpu.jit import intrinsic, stay_apart

# fastmath=False is written out: without it Numba compiles the function with the flags of its caller.
exact = numba.njit(error_model="numpy", fastmath=False)

# Compiled code counts the references to an array atomically whenever a function takes one. That costs more than
# computing a bin's few numbers, and threads that take the same array wait for each other. So lists and maps are passed
# as addresses, which `peek` reads and `poke` writes.


@intrinsic
def peek(typingctx, like, address):
    """The number of the type of `like` at `address`."""

    def codegen(context, builder, signature, args):
        kind = context.get_value_type(like)
        size = 4 if like == types.float32 else 8
        return builder.load(builder.inttoptr(args[1], kind.as_pointer()), align=size)

    return like(like, types.intp), codegen


@intrinsic
def poke(typingctx, address, value):
    """Store a number at `address`."""

    def codegen(context, builder, signature, args):
        size = 4 if value == types.float32 else 8
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=size)
        return context.get_dummy_value()

    return types.void(types.intp, value), codegen


@intrinsic
def size_of(typingctx, like):
    """Bytes of a number of the type of `like`: a constant, so that addresses become simple ones."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.intp, like.bitwidth // 8)

    return types.intp(like), codegen


# In the order of dispatch.roi_rules.RULES.
MAX, AVG, PS_RFCN, PS_TORCHVISION, PAPER, ALIGNED, LEGACY, RFCN = range(8)

_FAR = 2.0**100  # as in the reference
_WHOLE = 2.0**40  # up to here bins of whole pixels are exact in int64; beyond, none of their means is visible


@exact
def half_away(v):
    """Round half away from zero."""
    whole = np.trunc(v)
    if abs(v - whole) >= 0.5:
        return whole + np.copysign(type(v)(1), v)
    return whole


@exact
def scaled(v, scale):
    """v * scale, cut to where arithmetic with it cannot overflow."""
    far = type(v)(_FAR)
    return min(max(v * scale, -far), far)


@exact
def start_and_size(rule, low, high, scale):
    """Where a RoI starts on the map, and how long it is."""
    stay_apart()
    real = type(low)
    one, half = real(1), real(0.5)
    if rule in (MAX, AVG, PAPER):
        start = half_away(scaled(low, scale))
        return start, max(half_away(scaled(high, scale)) - start + one, one)
    if rule == PS_TORCHVISION:
        start = half_away(scaled(low, scale))
        return start, max(half_away(scaled(high, scale)) - start, one)
    if rule == PS_RFCN:
        start, end = scaled(half_away(low), scale), scaled(half_away(high) + one, scale)
        return start, max(end - start, real(0.1))
    if rule == RFCN:
        start, end = scaled(half_away(low), scale) - half, scaled(half_away(high) + one, scale) - half
        return start, max(end - start, real(0.1))
    if rule == ALIGNED:
        start, end = scaled(low, scale) - half, scaled(high, scale) - half
        return start, end - start
    start = scaled(low, scale)
    return start, max(scaled(high, scale) - start, one)


@exact
def whole_bin(start, size, bins, i):
    """Eq. 5: [start + floor(i w/k), start + ceil((i+1) w/k)), as float64."""
    if size <= _WHOLE and abs(start) <= _WHOLE:
        first = np.int64(start) + i * np.int64(size) // bins
        last = np.int64(start) - (-(i + 1) * np.int64(size) // bins)
        return np.float64(first), np.float64(last)
    wide = np.float64(size) / bins
    return np.float64(start) + np.floor(i * wide), np.float64(start) + np.ceil((i + 1) * wide)


@exact
def pooled_bin(rule, start, size, bins, i, length):
    """(first, last, number): the map's pixels of a pooled bin, and how many its mean counts."""
    stay_apart()
    real = type(start)
    limit = np.float64(length)
    if rule == AVG:
        first, last = whole_bin(start, size, bins, i)
        number = last - first
    else:
        step, j = size / real(bins), real(i)
        if rule == PS_RFCN:
            first = np.float64(np.floor(j * step + start))
            last = np.float64(np.ceil((j + real(1)) * step + start))
        else:
            first = np.float64(np.floor(j * step) + start)
            last = np.float64(np.ceil((j + real(1)) * step) + start)
        if rule == PS_TORCHVISION:
            limit -= 1
        number = -1.0
    top = np.int64(min(max(first, 0.0), limit))
    bottom = max(np.int64(min(max(last, 0.0), limit)), top)
    return top, bottom, number if number >= 0 else np.float64(bottom - top)


@exact
def touching(first, spacing, number, length, eps):
    """(low, high): the k of low <= k < high are those of 0 <= k < number whose point may touch the map."""
    if spacing == 0:
        return 0.0, number
    one, other = (-1 - first) / spacing, (length - first) / spacing
    margin = min(2 + 8 * eps * abs(first) / abs(spacing), 100.0)
    low = min(max(np.floor(min(one, other) - margin), 0.0), number)
    high = min(max(np.ceil(max(one, other) + margin) + 1, 0.0), number)
    return low, high


@exact
def add_line(n, line, weight, slope, index, weights, slopes):
    """Add to a line's weight and slope; it is one of the last two or a new one. Returns the number of lines."""
    itemsize = size_of(weight)
    for back in (1, 2):
        i = n - back
        if i >= 0 and peek(n, index + i * 8) == line:
            poke(weights + i * itemsize, peek(weight, weights + i * itemsize) + weight)
            poke(slopes + i * itemsize, peek(slope, slopes + i * itemsize) + slope)
            return n
    poke(index + n * 8, line)
    poke(weights + n * itemsize, weight)
    poke(slopes + n * itemsize, slope)
    return n + 1


@exact
def add_point(n, v, length, clamped, weight, slope, index, weights, slopes):
    """Add the two lines of a point's cell. `weight` is 1 where the point counts, `slope` 1 where its derivative does;
    else they are 0.

    The line is clamped, not the coordinate: from 2^24 on float32 cannot tell length - 1 from lines off the map.
    """
    cell = np.floor(v)
    line, l = np.int64(cell), v - cell
    if clamped and line < 0:
        line, l = np.int64(0), v - v
    if clamped and line >= length - 1:
        line, l = np.int64(length - 1), v - v
    if line >= 0 and line < length:
        n = add_line(n, line, (type(v)(1) - l) * weight, -slope, index, weights, slopes)
    if line + 1 < length:
        n = add_line(n, line + 1, l * weight, slope, index, weights, slopes)
    return n


@exact
def lines(rule, ratio, sloped, start, size, bins, i, shift, length, index, weights, slopes):
    """The lines of pixels that bin i touches, into the lists at three addresses: (how many, its points or pixels).

    `shift` moves the bin's points; it is not NaN. A point that does not count but has a derivative, at -1, is left out
    unless `sloped`: it reads no pixel, so that an infinite one does not reach it.
    """
    stay_apart()
    real = type(start)
    n, zero, one, itemsize = np.int64(0), real(0), real(1), size_of(start)
    last = np.float64(length - 1)  # exact, as comparisons with it are
    if rule == AVG:
        top, bottom, number = pooled_bin(rule, start, size, bins, i, length)
        for line in range(top, bottom):
            poke(index + n * 8, line)
            poke(weights + n * itemsize, one)
            poke(slopes + n * itemsize, zero)
            n += 1
        return n, number
    eps = 1.1920928955078125e-07 if itemsize == 4 else 2.220446049250313e-16
    if rule == PAPER:  # every pixel, moved; border "zeros"
        first, end = whole_bin(start, size, bins, i)
        low, high = touching(first + np.float64(shift), 1.0, end - first, length, eps)
        for j in range(np.int64(high - low)):
            v = real(first + (low + j)) + shift
            if (v > -1 or (sloped and v == -1)) and v < length:
                n = add_point(n, v, length, False, one if v > -1 else zero, one, index, weights, slopes)
        return n, end - first
    step = size / real(bins)
    base = (real(i) * step + start) + shift
    if rule == RFCN:  # border psroi
        sub, number = step / real(ratio), 0.0
        half = real(0.5)
        for k in range(ratio):
            v = base + real(k) * sub
            if v >= -half and v <= last + 0.5:
                number += 1
                moves = one if v > 0 and v < last and v != np.floor(v) else zero
                n = add_point(n, v, length, True, one, moves, index, weights, slopes)
        return n, number
    number = np.float64(ratio) if ratio > 0 else max(np.float64(np.ceil(step)), 0.0)
    if number == 0:
        return n, number
    spacing = np.float64(step) / number
    low, high = touching(np.float64(base) + 0.5 * spacing, spacing, number, length, eps)
    for j in range(np.int64(high - low)):
        k = low + j if spacing >= 0 else high - 1 - j  # ascending
        v = base + ((real(k) + real(0.5)) * step) / real(number)
        if v >= -1 and v <= length:
            moves = one if v >= 0 and v < last else zero
            n = add_point(n, v, length, True, one, moves, index, weights, slopes)
    return n, number
