"""The lists of lines that a thread keeps while it works on the bins of a RoI, and what a bin is made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dcn_kernels.cpu.bins import exact, lines, peek, poke, size_of
from dcn_kernels.cpu.convert import address_of
from dcn_kernels.cpu.jit import become_part, inner, spliced


class Lists(NamedTuple):
    """Where a thread keeps lists of lines: PW of columns, one for each bin in a row of bins, then one of rows.

    All but the first are addresses, not arrays: each call with an array counts a reference to it (see bins.py).
    """

    most: int  # lines of a list
    line: int  # which lines they are
    weight: int
    slope: int
    found: int  # how many lines a list has
    number: int  # how many points or pixels the mean along this axis counts, as float64


class Lines(NamedTuple):
    """One of the lists."""

    line: int
    weight: int
    slope: int
    length: int


class Bin(NamedTuple):
    """What a bin's mean and gradients are made of."""

    rows: Lines
    columns: Lines
    share: float  # 1 / the number of its points or pixels; NaN if an offset is
    is_nan: bool
    reach_y: float  # the derivative of its place by its offset
    reach_x: float


@spliced
def lists_of(thread, index, weight, slope, found, number):
    """A thread's Lists."""
    return Lists(
        index.shape[2],
        address_of(index, thread, 0),
        address_of(weight, thread, 0),
        address_of(slope, thread, 0),
        address_of(found, thread, 0),
        address_of(number, thread, 0),
    )


@exact
def shift_and_reach(offset, factor, size):
    """How far a bin moves, (offset * factor) * size, and the derivative of that."""
    return (offset * factor) * size, factor * size


@inner
def find_lines(s, lists, which, start, size, bins, i, shift, length):
    """Fill list `which` with the lines of bin i of an axis of the map."""
    become_part()
    at, itemsize = which * lists.most, size_of(shift)
    found, number = lines(
        s.rule, s.ratio, s.sloped, start, size, bins, i, shift, length,
        lists.line + at * 8, lists.weight + at * itemsize, lists.slope + at * itemsize,
    )  # fmt: skip
    poke(lists.found + which * 8, found)
    poke(lists.number + which * 8, number)


@spliced
def lines_in(lists, which, itemsize):
    """List `which`."""
    at = which * lists.most
    return Lines(
        lists.line + at * 8,
        lists.weight + at * itemsize,
        lists.slope + at * itemsize,
        peek(which, lists.found + which * 8),
    )


@inner
def find_bin(s, regions, box, r, cls, ph, pw, lists):
    """Bin (ph, pw) of RoI r, for the channels of a class.

    Bins must come in row-major order: without offsets a RoI's columns are found at its first row of bins, and the
    rows of a row of bins at its first bin.
    """
    become_part()
    start_y, h, start_x, w = box
    factor, itemsize = regions.factor, size_of(regions.factor)
    real = type(factor)
    shift_y = shift_x = reach_y = reach_x = real(0)
    if s.shifted:
        parts = s.part_h * s.part_w
        part = (r * s.classes + cls) * 2 * parts + ph * s.part_h // s.PH * s.part_w + pw * s.part_w // s.PW
        shift_x, reach_x = shift_and_reach(peek(factor, regions.offset + part * itemsize), factor, w)
        shift_y, reach_y = shift_and_reach(peek(factor, regions.offset + (part + parts) * itemsize), factor, h)
    is_nan = np.isnan(shift_y) or np.isnan(shift_x)
    if not is_nan and (s.shifted or ph == 0):
        find_lines(s, lists, pw, start_x, w, s.PW, pw, shift_x, s.W)
    if not is_nan and (s.shifted or pw == 0):
        find_lines(s, lists, s.PW, start_y, h, s.PH, ph, shift_y, s.H)
    number = peek(1.0, lists.number + pw * 8) * peek(1.0, lists.number + s.PW * 8)
    share = real(np.nan) if is_nan else real(1 / max(number, 1.0))
    return Bin(lines_in(lists, s.PW, itemsize), lines_in(lists, pw, itemsize), share, is_nan, reach_y, reach_x)


@spliced
def modulation(s, regions, r, ph, pw):
    """The mask's value for a bin, or 1."""
    one = type(regions.scale)(1)
    return peek(one, regions.mask + ((r * s.PH + ph) * s.PW + pw) * size_of(one)) if s.masked else one
