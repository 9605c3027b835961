"""Channels cut into slabs, and images staged slab by slab, channels-last.

A slab is 8 or 16 channels that share a convolution group and an offset group. Staged, an image is
[slab][pixel][lane] in the kernels' own type, with two pixels of zeros at its end: the channels of a pixel are one run
of memory, and one slab's image fits a cache.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dcn_kernels.cpu.convert import address_of, clear, kind, load_run, store_run, strides
from dcn_kernels.cpu.jit import inner, spliced, stay_apart
from dcn_kernels.cpu.lanes import transpose8, transpose16


class Array(NamedTuple):
    """An array of any dtype and strides, as a kernel takes it; address 0 is an absent one."""

    address: int
    kind: int
    s0: int  # strides in bytes
    s1: int
    s2: int
    s3: int


@spliced
def array_from(numbers, i):
    """The i-th of the `Array`s that stand one after another in a call's numbers."""
    at = i * 6  # the fields of an Array
    return Array(numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3], numbers[at + 4], numbers[at + 5])


def described(array: np.ndarray | None) -> tuple[int, ...]:
    """An array of up to four dimensions as the fields of an `Array`."""
    if array is None:
        return 0, 0, 0, 0, 0, 0
    return (array.__array_interface__["data"][0], kind(array), *strides(array), 0, 0, 0, 0)[:6]


def staged_pixels(height: int, width: int) -> int:
    """Pixels that a staged slab has room for: the image's, two of zeros, and what `turn` writes beyond the end."""
    return height * width + 16


class Slabs(NamedTuple):
    """How the channels are cut."""

    lanes: int
    table: np.ndarray  # (slabs, 4): first channel, channels, convolution group, offset group
    of_group: np.ndarray  # (groups + 1,): the first slab of each convolution group
    of_offset: np.ndarray  # (OG + 1,): the first slab of each offset group


def numbers_of(*groups: tuple[int, ...]) -> np.ndarray:
    """The numbers of named tuples one after another, for a kernel to take apart again."""
    return np.array(sum(groups, ()), np.int64)


@lru_cache(maxsize=256)
def cut(C: int, groups: int, OG: int) -> Slabs:
    """Cut C channels into slabs, none of which straddles a convolution group or an offset group."""
    edges = sorted({*range(0, C + 1, C // groups), *range(0, C + 1, C // OG)})
    runs = list(pairwise(edges))
    padded = {lanes: sum(-(-(end - start) // lanes) * lanes for start, end in runs) for lanes in (16, 8)}
    lanes = min(padded, key=lambda each: padded[each])
    rows = [
        (first, min(lanes, end - first), start // (C // groups), start // (C // OG))
        for start, end in runs
        for first in range(start, end, lanes)
    ]
    table = np.array(rows, np.int64)
    of_group = np.searchsorted(table[:, 2], np.arange(groups + 1)).astype(np.int64)
    of_offset = np.searchsorted(table[:, 3], np.arange(OG + 1)).astype(np.int64)
    return Slabs(lanes, table, of_group, of_offset)


@inner
def stage(s, input, n, b, slab, slabs, staged, block):
    """Copy one slab of image n to staged[b, slab] channels-last, with two pixels of zeros at its end."""
    stay_apart()
    first, count = slabs[slab, 0], slabs[slab, 1]
    like, itemsize, plane = block[0], block.itemsize, address_of(staged, b, slab)
    pixels = s.H * s.W
    for start in range(0, pixels, 64):
        length = min(64, pixels - start)
        for c in range(count):
            base = input.address + n * input.s0 + (first + c) * input.s1
            load_pixels(block, c * 64, base, input, s.W, start, length)
        for c in range(count, s.lanes):
            clear(address_of(block, c * 64, 0), 64 * itemsize)
        to = plane + start * s.lanes * itemsize
        turn(like, itemsize, s.lanes, address_of(block, 0, 0), 64, to, s.lanes, s.lanes, length)
    clear(plane + pixels * s.lanes * itemsize, 2 * s.lanes * itemsize)


@inner
def unstage(s, grad_staged, b, slab, slabs, n, grad_input, block):
    """grad_input[n, channels of the slab] = the staged gradient, back to NCHW."""
    stay_apart()
    first, count = slabs[slab, 0], slabs[slab, 1]
    like, itemsize, plane = block[0], block.itemsize, address_of(grad_staged, b, slab)
    pixels = s.H * s.W
    for start in range(0, pixels, 64):
        length = min(64, pixels - start)
        runs = plane + start * s.lanes * itemsize
        turn(like, itemsize, s.lanes, runs, s.lanes, address_of(block, 0, 0), 64, length, s.lanes)
        for c in range(count):
            to = grad_input.address + ((n * s.C + first + c) * pixels + start) * grad_input.s3
            store_run(block, c * 64, length, to, grad_input.kind)


@inner
def turn(like, itemsize, lanes, source, source_row, target, target_row, rows, columns):
    """target[j, i] = source[i, j] for rows x columns elements, both rounded up to a multiple of lanes.

    source and target are addresses; their rows are so many elements apart.
    """
    stay_apart()
    for i in range(0, rows, lanes):
        for j in range(0, columns, lanes):
            read, write = source + (i * source_row + j) * itemsize, target + (j * target_row + i) * itemsize
            if lanes == 16:
                transpose16(like, read, source_row, write, target_row)
            else:
                transpose8(like, read, source_row, write, target_row)


@inner
def load_pixels(to, at, base, array, row_length, start, count):
    """to[at:] = pixels start .. start + count, row-major, of the plane at address base."""
    stay_apart()
    if array.s2 == row_length * array.s3:
        load_run(to, at, base + start * array.s3, array.s3, count, array.kind)
        return
    done = 0
    while done < count:
        row, column = (start + done) // row_length, (start + done) % row_length
        length = min(row_length - column, count - done)
        load_run(to, at + done, base + row * array.s2 + column * array.s3, array.s3, length, array.kind)
        done += length


@spliced
def round_up(value, multiple):
    return (value + multiple - 1) // multiple * multiple
