"""Means over the bins of regions of interest, and their gradients: the workers of every RoI operator but the maximum.

    y[r, c, ph, pw] = m * sum_ij wy_i wx_j x[image, channel, row_i, column_j] / number

with the rows, columns and weights of bins.py. A thread owns a range of output channels of one image, so it owns what
they write in grad_input; sums over channels (offsets, mask) are kept per range and added up in order afterwards. The
ranges follow from the sizes alone: results do not depend on the number of threads.

Channels are worked on in blocks that fit a second-level cache. With lanes = 16 a block is staged as slabs of 16
channels, channels-last, and each bin's lines serve 16 channels at once. With lanes = 1 it is planes, read in place
where that can be: for position-sensitive maps, where bins of one RoI read different channels, and for little work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.bins import exact, lines, peek, poke, start_and_size
from dcn_kernels.cpu.convert import kind, strides
from dcn_kernels.cpu.jit import inner, kernel, spliced
from dcn_kernels.cpu.roi_blocks import expect, load_block, load_pooled, store_block, store_pooled
from dcn_kernels.cpu.roi_lanes import (
    LANES,
    SLABS,
    grid_dots,
    grid_dots_of_all,
    grid_mean,
    grid_means,
    grid_spread,
    grid_spreads,
)
from dcn_kernels.cpu.slabs import Array
from dcn_kernels.cpu.threads import claim, get_num_threads, join, leave, run
from dcn_kernels.dispatch.memory import check
from dcn_kernels.dispatch.roi_rules import Rule
from dcn_kernels.dtypes import accumulator

DIRECT_BYTES = 2 << 20  # of maps read in place, of which a RoI reads a part: a bin's lines then serve several channels
BLOCK_BYTES = 512 << 10  # of the map's values that a thread works on at a time: half a second-level cache of 1 MiB
RANGES = 8  # of channels in a class, where gradients are summed over channels


class Shape(NamedTuple):
    """Sizes and parameters of one call."""

    C: int
    H: int
    W: int
    PH: int
    PW: int
    classes: int
    groups_h: int  # of score maps; 1 where an operator is not position sensitive
    groups_w: int
    rule: int
    ratio: int
    part_h: int
    part_w: int
    shifted: int  # there are offsets
    masked: int
    lanes: int
    block: int  # output channels of a block, a multiple of lanes
    direct: int  # planes are read, and gradients added, in place
    chunks: int  # of RoIs, forward
    sloped: int  # derivatives are wanted, also of points that do not count


class Wanted(NamedTuple):
    """What the backward computes, as 0 or 1."""

    input: int
    coordinates: int  # offset or mask


# ---------------------------------------------------------------- pieces of both workers


@spliced
def slabs_of(channels):
    """How many slabs hold so many channels."""
    return (channels + LANES - 1) // LANES


@inner
def score_map(s, ph, pw):
    """Which of a class's score maps bin (ph, pw) reads."""
    gh = min(ph * s.groups_h // s.PH, s.groups_h - 1)
    return gh * s.groups_w + min(pw * s.groups_w // s.PW, s.groups_w - 1)


@exact
def shift_and_reach(offset, factor, size):
    """How far a bin moves, (offset * factor) * size, and the derivative of that."""
    return (offset * factor) * size, factor * size


@spliced
def extent(s, rois, r, scale):
    """Where a RoI starts and its size, along y and along x."""
    start_y, h = start_and_size(s.rule, rois[r, 2], rois[r, 4], scale)
    start_x, w = start_and_size(s.rule, rois[r, 1], rois[r, 3], scale)
    return start_y, h, start_x, w


@inner
def bin_lines(s, box, factor, offset, r, cls, ph, pw, itemsize, cap, index, weight, slope, found, number):
    """The lines of bin (ph, pw): its columns in list pw, its rows in list PW; all arrays are addresses.

    Returns (1 / number, is it NaN, d x / d offset, d y / d offset). Bins must come in row-major order: without
    offsets a RoI's columns are found at its first row of bins, and a row's rows at its first bin.
    """
    start_y, h, start_x, w = box
    real = type(factor)
    shift_y = shift_x = reach_y = reach_x = real(0)
    if s.shifted:
        cells = s.part_h * s.part_w
        cell = (r * s.classes + cls) * 2 * cells + ph * s.part_h // s.PH * s.part_w + pw * s.part_w // s.PW
        shift_x, reach_x = shift_and_reach(peek(factor, offset + cell * itemsize), factor, w)
        shift_y, reach_y = shift_and_reach(peek(factor, offset + (cell + cells) * itemsize), factor, h)
        if np.isnan(shift_y) or np.isnan(shift_x):
            return real(np.nan), True, reach_x, reach_y
    if s.shifted or ph == 0:
        at = pw * cap
        n, several = lines(
            s.rule, s.ratio, s.sloped, start_x, w, s.PW, pw, shift_x, s.W,
            itemsize, index + at * 8, weight + at * itemsize, slope + at * itemsize,
        )  # fmt: skip
        poke(found + pw * 8, n)
        poke(number + pw * 8, several)
    if s.shifted or pw == 0:
        at = s.PW * cap
        n, several = lines(
            s.rule, s.ratio, s.sloped, start_y, h, s.PH, ph, shift_y, s.H,
            itemsize, index + at * 8, weight + at * itemsize, slope + at * itemsize,
        )  # fmt: skip
        poke(found + s.PW * 8, n)
        poke(number + s.PW * 8, several)
    points = peek(1.0, number + pw * 8) * peek(1.0, number + s.PW * 8)
    return real(1 / max(points, 1.0)), False, reach_x, reach_y


# ---------------------------------------------------------------- forward


@kernel
def forward_worker(
    thread, threads, sync, s, constants, units, order, first_of, rois, offset, mask, input, planes, out,
    staged, pooled, line, index, weight, slope, found, number,
):  # fmt: skip
    if not join(thread, sync):
        return
    maps, images, bins, pixels = s.groups_h * s.groups_w, first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    itemsize, scale, factor = weight.itemsize, constants[0], constants[1]
    source = planes if s.direct else staged
    cap, list0 = index.shape[0] // found.shape[0], thread * (s.PW + 1)
    indices, weights = index.ctypes.data + list0 * cap * 8, weight.ctypes.data + list0 * cap * itemsize
    slopes, founds = slope.ctypes.data + list0 * cap * itemsize, found.ctypes.data + list0 * 8
    numbers, offsets, map0 = number.ctypes.data + list0 * 8, offset.ctypes.data, source.ctypes.data
    y, row_weights = indices + s.PW * cap * 8, weights + s.PW * cap * itemsize
    at = source.shape[0] // threads * thread
    to, line_at = pooled.shape[0] // threads * thread, line.shape[0] // threads * thread
    held = pooled.ctypes.data + to * itemsize
    item = claim(sync)
    while item < images * units.shape[0] * s.chunks:
        unit = item // (images * s.chunks)
        n, chunk = item % (images * s.chunks) // s.chunks, item % s.chunks
        last, cls = units[unit, 0] + units[unit, 1], units[unit, 2]
        here = first_of[n + 1] - first_of[n]
        low, high = first_of[n] + here * chunk // s.chunks, first_of[n] + here * (chunk + 1) // s.chunks
        for c0 in range(units[unit, 0], last if high > low else 0, s.block):
            count = min(s.block, last - c0)
            if s.direct:
                at = (n * s.C + c0 * maps) * pixels
            else:
                load_block(s, input, n, c0, count, source, at, line, line_at)
            for t in range(low, high):
                r = order[t]
                box = extent(s, rois, r, scale)
                expect(out, r, c0, count)
                for ph in range(s.PH):
                    for pw in range(s.PW):
                        share, is_nan, _, _ = bin_lines(
                            s, box, factor, offsets, r, cls, ph, pw, itemsize,
                            cap, indices, weights, slopes, founds, numbers,
                        )  # fmt: skip
                        if s.masked:
                            share *= mask[r, ph, pw]
                        ny, nx = peek(cls, founds + s.PW * 8), peek(cls, founds + pw * 8)
                        x, column_weights = indices + pw * cap * 8, weights + pw * cap * itemsize
                        b = held + (ph * s.PW + pw) * s.lanes * itemsize
                        if is_nan:
                            for j in range((count + s.lanes - 1) // s.lanes):
                                for l in range(s.lanes):
                                    poke(b + (j * bins * s.lanes + l) * itemsize, share)
                        elif s.lanes == 1:
                            plane = map0 + (at + score_map(s, ph, pw) * pixels) * itemsize
                            for c in range(count):
                                value = plane_mean(
                                    share, itemsize, plane, s.W, y, row_weights, ny, x, column_weights, nx
                                )
                                poke(b + c * bins * itemsize, value * share)
                                plane += maps * pixels * itemsize
                        else:
                            slab = map0 + at * itemsize
                            b_step, step, j = bins * LANES * itemsize, pixels * LANES * itemsize, 0
                            while j + SLABS <= slabs_of(count):
                                grid_means(
                                    b + j * b_step, b_step, slab + j * step, step,
                                    s.W, y, row_weights, ny, x, column_weights, nx, share,
                                )  # fmt: skip
                                j += SLABS
                            while j < slabs_of(count):
                                grid_mean(
                                    b + j * b_step, b_step, slab + j * step, step,
                                    s.W, y, row_weights, ny, x, column_weights, nx, share,
                                )  # fmt: skip
                                j += 1
                store_pooled(s, pooled, to, r, c0, count, out, line, line_at)
        item = claim(sync)
    leave(thread, sync)


@exact  # a sum that may be reordered becomes vectors with gathers: slow for the few pixels of a bin
def plane_mean(like, itemsize, plane, width, rows, wy, ny, columns, wx, nx):
    """sum_ij wy_i wx_j plane[row_i, column_j]; lists and plane are addresses."""
    total = type(like)(0)
    for i in range(ny):
        row, part = plane + peek(ny, rows + i * 8) * width * itemsize, type(like)(0)
        for j in range(nx):
            part += peek(like, wx + j * itemsize) * peek(like, row + peek(nx, columns + j * 8) * itemsize)
        total += peek(like, wy + i * itemsize) * part
    return total


# ---------------------------------------------------------------- backward


@kernel
def backward_worker(
    thread, threads, sync, s, wanted, constants, units, order, first_of, rois, offset, mask, input, planes, grad,
    grad_planes, grad_input, part_offset, part_mask, staged, grad_staged, pooled, line, dots, index, weight, slope,
    found, number,
):  # fmt: skip
    if not join(thread, sync):
        return
    maps, images, bins, pixels = s.groups_h * s.groups_w, first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    itemsize, scale, factor = weight.itemsize, constants[0], constants[1]
    zero, one = constants.dtype.type(0), constants.dtype.type(1)
    source, target = (planes if s.direct else staged), (grad_planes if s.direct else grad_staged)
    cap, list0 = index.shape[0] // found.shape[0], thread * (s.PW + 1)
    indices, weights = index.ctypes.data + list0 * cap * 8, weight.ctypes.data + list0 * cap * itemsize
    slopes, founds = slope.ctypes.data + list0 * cap * itemsize, found.ctypes.data + list0 * 8
    numbers, offsets, dot = (
        number.ctypes.data + list0 * 8,
        offset.ctypes.data,
        dots.ctypes.data + thread * 16 * itemsize,
    )
    y, wy, sy = indices + s.PW * cap * 8, weights + s.PW * cap * itemsize, slopes + s.PW * cap * itemsize
    source_at, target_at = source.shape[0] // threads * thread, target.shape[0] // threads * thread
    size = target.shape[0] // threads
    to, line_at = pooled.shape[0] // threads * thread, line.shape[0] // threads * thread
    held = pooled.ctypes.data + to * itemsize
    item = claim(sync)
    while item < images * units.shape[0]:
        unit, n = item // images, item % images
        last, cls, part = units[unit, 0] + units[unit, 1], units[unit, 2], units[unit, 3]
        for c0 in range(units[unit, 0], last if first_of[n + 1] > first_of[n] else 0, s.block):
            count = min(s.block, last - c0)
            if s.direct:
                source_at = target_at = (n * s.C + c0 * maps) * pixels
            else:
                if wanted.coordinates:
                    load_block(s, input, n, c0, count, source, source_at, line, line_at)
                if wanted.input:
                    for i in range(target_at, target_at + size):
                        target[i] = zero
            map0, grad0 = source.ctypes.data + source_at * itemsize, target.ctypes.data + target_at * itemsize
            for t in range(first_of[n], first_of[n + 1]):
                r = order[t]
                box = extent(s, rois, r, scale)
                load_pooled(s, grad, r, c0, count, pooled, to, line, line_at)
                if t + 1 < first_of[n + 1]:
                    expect(grad, order[t + 1], c0, count)
                for ph in range(s.PH):
                    for pw in range(s.PW):
                        share, is_nan, reach_x, reach_y = bin_lines(
                            s, box, factor, offsets, r, cls, ph, pw, itemsize,
                            cap, indices, weights, slopes, founds, numbers,
                        )  # fmt: skip
                        m = mask[r, ph, pw] if s.masked else one
                        ny, nx = peek(cls, founds + s.PW * 8), peek(cls, founds + pw * 8)
                        x, at = indices + pw * cap * 8, pw * cap * itemsize
                        b = held + (ph * s.PW + pw) * s.lanes * itemsize
                        for i in range(4):
                            poke(dot + i * itemsize, share if is_nan else zero)
                        if is_nan:
                            pass
                        elif s.lanes == 1:
                            plane = score_map(s, ph, pw) * pixels * itemsize
                            for c in range(count):
                                g = peek(share, b + c * bins * itemsize)
                                if wanted.coordinates:
                                    plane_dots(
                                        g, itemsize, map0 + plane, s.W, y, wy, sy, ny,
                                        x, weights + at, slopes + at, nx, dot,
                                    )  # fmt: skip
                                if wanted.input:
                                    plane_spread(
                                        g * (share * m), itemsize, grad0 + plane, s.W, y, wy, ny, x, weights + at, nx
                                    )
                                plane += maps * pixels * itemsize
                        else:
                            b_step, step, j, each = bins * LANES * itemsize, pixels * LANES * itemsize, 0, share * m
                            while j + SLABS <= slabs_of(count):
                                if wanted.coordinates:
                                    grid_dots_of_all(
                                        zero, dot, b + j * b_step, b_step, map0 + j * step, step, s.W,
                                        y, wy, sy, ny, x, weights + at, slopes + at, nx,
                                    )  # fmt: skip
                                if wanted.input:
                                    grid_spreads(
                                        b + j * b_step, b_step, grad0 + j * step, step, s.W,
                                        y, wy, ny, x, weights + at, nx, each,
                                    )  # fmt: skip
                                j += SLABS
                            while j < slabs_of(count):
                                if wanted.coordinates:
                                    grid_dots(
                                        zero, dot, b + j * b_step, b_step, map0 + j * step, step, s.W,
                                        y, wy, sy, ny, x, weights + at, slopes + at, nx,
                                    )  # fmt: skip
                                if wanted.input:
                                    grid_spread(
                                        b + j * b_step, b_step, grad0 + j * step, step, s.W,
                                        y, wy, ny, x, weights + at, nx, each,
                                    )  # fmt: skip
                                j += 1
                        if wanted.coordinates:
                            if s.masked:
                                part_mask[part, r, ph, pw] += peek(zero, dot) * share
                            if s.shifted:
                                cell_h, cell_w, each = ph * s.part_h // s.PH, pw * s.part_w // s.PW, share * m
                                slope_y, slope_x = peek(zero, dot + itemsize), peek(zero, dot + 2 * itemsize)
                                part_offset[part, r, 2 * cls, cell_h, cell_w] += slope_x * each * reach_x
                                part_offset[part, r, 2 * cls + 1, cell_h, cell_w] += slope_y * each * reach_y
            if wanted.input and not s.direct:
                store_block(s, target, target_at, n, c0, count, grad_input, line, line_at)
        item = claim(sync)
    leave(thread, sync)


@exact
def plane_dots(g, itemsize, plane, width, rows, wy, sy, ny, columns, wx, sx, nx, dot):
    """dot += g times the value and its derivatives by y and x."""
    value = slope_y = slope_x = type(g)(0)
    for i in range(ny):
        row = plane + peek(ny, rows + i * 8) * width * itemsize
        along = across = type(g)(0)
        for j in range(nx):
            pixel = peek(g, row + peek(nx, columns + j * 8) * itemsize)
            along += peek(g, wx + j * itemsize) * pixel
            across += peek(g, sx + j * itemsize) * pixel
        value += peek(g, wy + i * itemsize) * along
        slope_y += peek(g, sy + i * itemsize) * along
        slope_x += peek(g, wy + i * itemsize) * across
    poke(dot, peek(g, dot) + g * value)
    poke(dot + itemsize, peek(g, dot + itemsize) + g * slope_y)
    poke(dot + 2 * itemsize, peek(g, dot + 2 * itemsize) + g * slope_x)


@exact
def plane_spread(g, itemsize, plane, width, rows, wy, ny, columns, wx, nx):
    """plane[row_i, column_j] += wy_i wx_j g."""
    for i in range(ny):
        row = plane + peek(ny, rows + i * 8) * width * itemsize
        weighed = peek(g, wy + i * itemsize) * g
        for j in range(nx):
            place = row + peek(nx, columns + j * 8) * itemsize
            poke(place, peek(g, place) + peek(g, wx + j * itemsize) * weighed)


# ---------------------------------------------------------------- from Python


class Plan(NamedTuple):
    """What forward and backward share."""

    shape: Shape
    constants: np.ndarray
    units: np.ndarray  # (units, 4): first output channel, channels, class, range in the class
    order: np.ndarray  # the RoIs by image
    first_of: np.ndarray  # (N + 1,): where each image's RoIs begin in `order`
    rois: np.ndarray
    offset: np.ndarray
    mask: np.ndarray
    planes: np.ndarray
    threads: int


def array(values: np.ndarray) -> Array:
    """An array of four dimensions, as a kernel takes it."""
    return Array(values.ctypes.data, kind(values), *strides(values))


def by_image(rois: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """(the RoIs' numbers, ordered by image; where each image's begin)."""
    image = rois[:, 0].astype(np.int64)
    return np.argsort(image, kind="stable"), np.searchsorted(np.sort(image), np.arange(images + 1)).astype(np.int64)


def cut(channels: int, classes: int, block: int, ranges: int | None) -> np.ndarray:
    """Cut the output channels into units of whole blocks, at most `ranges` in a class; none straddles two classes."""
    each = channels // classes
    length = block if ranges is None else -(-each // (ranges * block)) * block
    return np.array(
        [
            (cls * each + first, min(length, each - first), cls, first // length)
            for cls in range(classes)
            for first in range(0, each, length)
        ],
        np.int64,
    )


class _Writable:
    """The memory of an array without its read-only flag."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # keeps the memory alive
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _one_type(array: np.ndarray) -> np.ndarray:
    """An input as a kernel takes it: a read-only array is a type of its own to Numba, which some kernels refuse."""
    return array if array.flags.writeable else np.asarray(_Writable(array))


def plan(
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    rule: Rule,
    output_size: tuple[int, int],
    spatial_scale: float,
    part_size: tuple[int, int] = (1, 1),
    backward: bool = False,
    coordinates: bool = False,
    lanes: int | None = None,
) -> Plan:
    """How one call is worked on."""
    N, C, H, W = input.shape
    real = accumulator(input.dtype)
    maps, classes = rule.maps[0] * rule.maps[1], 1 if offset is None else offset.shape[1] // 2
    channels, bins = C // maps, output_size[0] * output_size[1]
    each, plane = channels // classes, H * W * real.itemsize
    # staging a map must be worth it: a bin touches about eight pixels
    worth = maps == 1 and each >= LANES // 2 and len(rois) * bins * 8 >= N * H * W
    lanes = lanes or (LANES if worth else 1)
    whole = -(-each // lanes) * lanes
    direct = lanes == 1 and input.dtype == real and input.flags.c_contiguous
    fitting = (DIRECT_BYTES if direct else BLOCK_BYTES) // (maps * lanes * plane)
    block = min(max(fitting, 1) * lanes, SLABS * LANES if lanes > 1 else 64, whole)
    units, threads = cut(channels, classes, block, RANGES if coordinates else None), get_num_threads()
    chunks = 1 if backward else max(1, min(-(-4 * threads // (N * len(units))), len(rois) // 256))
    shape = Shape(
        C, H, W, *output_size, classes, *rule.maps, rule.number, rule.samples, *part_size,
        int(offset is not None), int(mask is not None), lanes, block, int(direct), chunks, int(backward),
    )  # fmt: skip
    nothing = np.empty((1, 1, 1, 1), real)
    shifts = sum(array.size for array in (offset, mask) if array is not None)
    check(24 * (len(rois) + N) + (rois.size + shifts) * real.itemsize, "RoIs in order")
    return Plan(
        shape,
        np.array([spatial_scale, rule.factor], real),
        units,
        *by_image(rois, N),
        _one_type(np.ascontiguousarray(rois, real)),
        nothing if offset is None else _one_type(np.ascontiguousarray(offset, real)),
        nothing[0] if mask is None else _one_type(np.ascontiguousarray(mask, real)),
        _one_type(input.reshape(-1)) if direct else np.empty(0, real),
        threads,
    )


def buffers(p: Plan, staged: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The threads' temporary memory as flat arrays of equal parts, with those of the maps that are `staged`."""
    s, real = p.shape, p.constants.dtype
    maps = s.groups_h * s.groups_w
    lists, cap = p.threads * (s.PW + 1), max(s.H, s.W) + 2
    per_block = s.block * maps * s.H * s.W
    lengths: dict[str, tuple[int, Any]] = {
        "staged": (per_block if "staged" in staged and not s.direct else 0, real),
        "grad_staged": (per_block if "grad_staged" in staged and not s.direct else 0, real),
        "pooled": (s.block * s.PH * s.PW, real),
        "line": (64 * LANES, real),
        "dots": (LANES, real),  # a thread's on a cache line of their own
    }
    return workspace.allocate(
        {name: ((p.threads * length,), dtype) for name, (length, dtype) in lengths.items()}
        | {name: ((lists * cap,), dtype) for name, dtype in (("index", np.int64), ("weight", real), ("slope", real))}
        | {"found": ((lists,), np.int64), "number": ((lists,), np.float64)}
    )


def mean(
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    out: np.ndarray | None = None,
    **options: Any,  # those of `plan`
) -> np.ndarray:
    """Returns (R, C/maps, PH, PW)."""
    maps = options["rule"].maps
    if out is None:
        out = np.empty((len(rois), input.shape[1] // (maps[0] * maps[1]), *options["output_size"]), input.dtype)
    if out.size == 0:
        return out
    p = plan(input, rois, offset, mask, **options)
    b = buffers(p, ("staged",))
    run(
        forward_worker, p.threads, p.shape, p.constants, p.units, p.order, p.first_of, p.rois, p.offset, p.mask,
        array(input), p.planes, array(out), b["staged"], b["pooled"], b["line"], b["index"], b["weight"], b["slope"],
        b["found"], b["number"],
    )  # fmt: skip
    return out


def mean_backward(
    grad_output: np.ndarray,
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    wrt: tuple[str, ...],
    **options: Any,
) -> dict[str, np.ndarray]:
    """Gradients by name among "input", "offset", "mask", those of `wrt`, each in its argument's dtype."""
    given = {"offset": offset, "mask": mask}
    coordinates = [name for name in wrt if name != "input"]
    grad_input = np.zeros(input.shape if "input" in wrt else (0, 0, 0, 0), input.dtype)
    if grad_output.size == 0:
        zeros = {name: np.zeros(array.shape, array.dtype) for name, array in given.items() if array is not None}
        return {name: {"input": grad_input, **zeros}[name] for name in wrt}
    p = plan(input, rois, offset, mask, **options, backward=True, coordinates=bool(coordinates))
    wanted = Wanted(int("input" in wrt), int(bool(coordinates)))
    b = buffers(p, (*(["staged"] if coordinates else []), *(["grad_staged"] if wanted.input else [])))
    real, ranges = p.constants.dtype, int(p.units[:, 3].max()) + 1
    if coordinates:
        check(ranges * (p.offset.nbytes + p.mask.nbytes), "partial gradients")
    parts = {
        name: np.zeros((ranges if coordinates else 0, *shape), real)
        for name, shape in (("offset", p.offset.shape), ("mask", p.mask.shape))
    }
    direct = p.shape.direct and wanted.input
    grad_planes = grad_input.reshape(-1) if direct else np.empty(0, real)
    run(
        backward_worker, p.threads, p.shape, wanted, p.constants, p.units, p.order, p.first_of, p.rois, p.offset,
        p.mask, array(input), p.planes, array(grad_output), grad_planes, array(grad_input), parts["offset"],
        parts["mask"], b["staged"], b["grad_staged"], b["pooled"], b["line"], b["dots"], b["index"], b["weight"],
        b["slope"], b["found"], b["number"],
    )  # fmt: skip
    grads = {"input": grad_input}
    for name in coordinates:
        grads[name] = parts[name].sum(axis=0).astype(given[name].dtype)  # type: ignore[union-attr]
    return {name: grads[name] for name in wrt}
