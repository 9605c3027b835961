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
from dcn_kernels.cpu.bins import exact, lines, start_and_size
from dcn_kernels.cpu.convert import kind, store_run
from dcn_kernels.cpu.jit import inner, kernel
from dcn_kernels.cpu.lanes import transpose16
from dcn_kernels.cpu.roi_lanes import LANES, grid_dots, grid_mean, grid_spread
from dcn_kernels.cpu.slabs import Array, load_pixels
from dcn_kernels.cpu.threads import claim, get_num_threads, run
from dcn_kernels.shapes import accumulator

BLOCK_BYTES = 512 << 10  # of the map's values that a thread works on at a time: half a second-level cache of 1 MiB
RANGES = 8  # of channels in a class, where gradients are summed over channels


class Shape(NamedTuple):
    """Sizes and parameters of one call."""

    C: int
    H: int
    W: int
    PH: int
    PW: int
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


class Wanted(NamedTuple):
    """What the backward computes, as 0 or 1."""

    input: int
    coordinates: int  # offset or mask


# ---------------------------------------------------------------- pieces of all workers
#
# Workers index flat arrays: a slice counts a reference, and threads that count those of one array wait for each other.


@inner
def to_lanes(line, line_at, length, to, at):  # type: ignore[no-untyped-def]
    """to[at + p*16 + l] = line[line_at + l*64 + p] for up to 64 pixels."""
    itemsize = line.itemsize
    whole = length // LANES * LANES
    for p in range(0, whole, LANES):
        transpose16(
            line[0],
            line.ctypes.data + (line_at + p) * itemsize,
            64,
            to.ctypes.data + (at + p * LANES) * itemsize,
            LANES,
        )
    for p in range(whole, length):
        for l in range(LANES):
            to[at + p * LANES + l] = line[line_at + l * 64 + p]


@inner
def from_lanes(values, at, length, line, line_at):  # type: ignore[no-untyped-def]
    """The inverse of to_lanes."""
    itemsize = line.itemsize
    whole = length // LANES * LANES
    for p in range(0, whole, LANES):
        transpose16(
            line[0],
            values.ctypes.data + (at + p * LANES) * itemsize,
            LANES,
            line.ctypes.data + (line_at + p) * itemsize,
            64,
        )
    for p in range(whole, length):
        for l in range(LANES):
            line[line_at + l * 64 + p] = values[at + p * LANES + l]


@inner
def load_lanes(array, base, channels, row_length, length, to, at, line, line_at):  # type: ignore[no-untyped-def]
    """to[at:] = `length` elements of each of `channels` planes, the first at address `base`, as slabs of 16 lanes."""
    zero = line.dtype.type(0)
    for j in range(0, channels, LANES):
        for start in range(0, length, 64):
            few = min(64, length - start)
            for l in range(LANES):
                if j + l < channels:
                    load_pixels(line, line_at + l * 64, base + (j + l) * array.s1, array, row_length, start, few)
                else:
                    for p in range(few):
                        line[line_at + l * 64 + p] = zero
            to_lanes(line, line_at, few, to, at + j * length + start * LANES)


@inner
def store_lanes(values, at, channels, length, to, base, line, line_at):  # type: ignore[no-untyped-def]
    """The inverse of load_lanes, into C-contiguous planes."""
    for j in range(0, channels, LANES):
        for start in range(0, length, 64):
            few = min(64, length - start)
            from_lanes(values, at + j * length + start * LANES, few, line, line_at)
            for l in range(min(LANES, channels - j)):
                store_run(line, line_at + l * 64, few, base + (j + l) * to.s1 + start * to.s3, to.kind)


@inner
def load_block(s, input, n, c0, count, to, at, line, line_at):  # type: ignore[no-untyped-def]
    """Stage the maps of output channels c0 .. c0 + count of image n at to[at:]."""
    maps, pixels = s.groups_h * s.groups_w, s.H * s.W
    base = input.address + n * input.s0 + c0 * maps * input.s1
    if s.lanes == 1:
        for plane in range(count * maps):
            load_pixels(to, at + plane * pixels, base + plane * input.s1, input, s.W, 0, pixels)
    else:
        load_lanes(input, base, count, s.W, pixels, to, at, line, line_at)


@inner
def store_block(s, values, at, n, c0, count, to, line, line_at):  # type: ignore[no-untyped-def]
    """The inverse of load_block, into a C-contiguous array."""
    maps, pixels = s.groups_h * s.groups_w, s.H * s.W
    base = to.address + n * to.s0 + c0 * maps * to.s1
    if s.lanes == 1:
        for plane in range(count * maps):
            store_run(values, at + plane * pixels, pixels, base + plane * to.s1, to.kind)
    else:
        store_lanes(values, at, count, pixels, to, base, line, line_at)


@inner
def load_pooled(s, grad, r, c0, count, pooled, at, line, line_at):  # type: ignore[no-untyped-def]
    """pooled[at:] = the gradients of one RoI's output channels c0 .. c0 + count, as [slab, bin, lane]."""
    bins = s.PH * s.PW
    base = grad.address + r * grad.s0 + c0 * grad.s1
    if s.lanes == 1:
        for c in range(count):
            load_pixels(pooled, at + c * bins, base + c * grad.s1, grad, s.PW, 0, bins)
    else:
        load_lanes(grad, base, count, s.PW, bins, pooled, at, line, line_at)


@inner
def store_pooled(s, pooled, at, r, c0, count, out, line, line_at):  # type: ignore[no-untyped-def]
    """out[r, c0 .. c0 + count] = pooled[slab, bin, lane]."""
    bins = s.PH * s.PW
    base = out.address + r * out.s0 + c0 * out.s1
    if s.lanes == 1:
        store_run(pooled, at, count * bins, base, out.kind)
    else:
        store_lanes(pooled, at, count, bins, out, base, line, line_at)


@inner
def score_map(s, ph, pw):  # type: ignore[no-untyped-def]
    """Which of a class's score maps bin (ph, pw) reads."""
    gh = min(ph * s.groups_h // s.PH, s.groups_h - 1)
    return gh * s.groups_w + min(pw * s.groups_w // s.PW, s.groups_w - 1)


@exact
def shift_and_reach(offset, factor, size):  # type: ignore[no-untyped-def]
    """How far a bin moves, (offset * factor) * size, and the derivative of that."""
    return (offset * factor) * size, factor * size


@inner
def extent(s, rois, r, scale):  # type: ignore[no-untyped-def]
    """Where a RoI starts and its size, along y and along x."""
    start_y, h = start_and_size(s.rule, rois[r, 2], rois[r, 4], scale)
    start_x, w = start_and_size(s.rule, rois[r, 1], rois[r, 3], scale)
    return start_y, h, start_x, w


@inner
def bin_lines(s, box, factor, offset, r, cls, ph, pw, slot, cap, index, weight, slope, found, number):  # type: ignore[no-untyped-def]
    """The lines of bin (ph, pw): its columns in list slot + pw, its rows in list slot + PW.

    Returns (1 / number, is it NaN, d x / d offset, d y / d offset). Bins must come in row-major order: without
    offsets a RoI's columns are found at its first row of bins, and a row's rows at its first bin.
    """
    start_y, h, start_x, w = box
    shift_y = shift_x = reach_y = reach_x = weight.dtype.type(0)
    columns, rows = slot + pw, slot + s.PW
    if s.shifted:
        part_h, part_w = ph * s.part_h // s.PH, pw * s.part_w // s.PW
        shift_x, reach_x = shift_and_reach(offset[r, 2 * cls, part_h, part_w], factor, w)
        shift_y, reach_y = shift_and_reach(offset[r, 2 * cls + 1, part_h, part_w], factor, h)
        if np.isnan(shift_y) or np.isnan(shift_x):
            return weight.dtype.type(np.nan), True, reach_x, reach_y
    if s.shifted or ph == 0:
        found[columns], number[columns] = lines(
            s.rule, s.ratio, start_x, w, s.PW, pw, shift_x, s.W, columns * cap, index, weight, slope
        )
    if s.shifted or pw == 0:
        found[rows], number[rows] = lines(
            s.rule, s.ratio, start_y, h, s.PH, ph, shift_y, s.H, rows * cap, index, weight, slope
        )
    share = weight.dtype.type(1 / max(number[columns] * number[rows], 1.0))
    return share, False, reach_x, reach_y


# ---------------------------------------------------------------- forward


@kernel
def forward_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, constants, units, order, first_of, rois, offset, mask, input, planes, out,
    staged, pooled, line, index, weight, slope, found, number,
):  # fmt: skip
    maps, images, bins, pixels = s.groups_h * s.groups_w, first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    itemsize, scale, factor = weight.itemsize, constants[0], constants[1]
    source = planes if s.direct else staged
    cap, slot = index.shape[0] // found.shape[0], thread * (s.PW + 1)
    indices, weights = index.ctypes.data, weight.ctypes.data
    rows, row_weights = indices + (slot + s.PW) * cap * 8, weights + (slot + s.PW) * cap * itemsize
    at = source.shape[0] // threads * thread
    to, line_at = pooled.shape[0] // threads * thread, line.shape[0] // threads * thread
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
                for ph in range(s.PH):
                    for pw in range(s.PW):
                        share, is_nan, _, _ = bin_lines(
                            s, box, factor, offset, r, cls, ph, pw, slot, cap, index, weight, slope, found, number
                        )
                        if s.masked:
                            share *= mask[r, ph, pw]
                        ny, nx, b = found[slot + s.PW], found[slot + pw], to + (ph * s.PW + pw) * s.lanes
                        if is_nan:
                            for j in range((count + s.lanes - 1) // s.lanes):
                                for l in range(s.lanes):
                                    pooled[b + j * bins * s.lanes + l] = share
                        elif s.lanes == 1:
                            g = score_map(s, ph, pw)
                            for c in range(count):
                                plane = at + (c * maps + g) * pixels
                                pooled[b + c * bins] = share * plane_mean(
                                    source, plane, s.W, index, weight, (slot + s.PW) * cap, ny, (slot + pw) * cap, nx
                                )
                        else:
                            columns, column_weights = (
                                indices + (slot + pw) * cap * 8,
                                weights + (slot + pw) * cap * itemsize,
                            )
                            for j in range((count + LANES - 1) // LANES):
                                grid_mean(
                                    pooled.ctypes.data + (b + j * bins * LANES) * itemsize,
                                    source.ctypes.data + (at + j * pixels * LANES) * itemsize,
                                    s.W, rows, row_weights, ny, columns, column_weights, nx, share,
                                )  # fmt: skip
                store_pooled(s, pooled, to, r, c0, count, out, line, line_at)
        item = claim(sync)


@inner
def plane_mean(planes, at, width, index, weight, y, ny, x, nx):  # type: ignore[no-untyped-def]
    """sum_ij wy_i wx_j plane[row_i, column_j] of the plane at `at`; the lists of rows and columns begin at y and x."""
    total = weight.dtype.type(0)
    for i in range(ny):
        row, part = at + index[y + i] * width, weight.dtype.type(0)
        for j in range(nx):
            part += weight[x + j] * planes[row + index[x + j]]
        total += weight[y + i] * part
    return total


# ---------------------------------------------------------------- backward


@kernel
def backward_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, wanted, constants, units, order, first_of, rois, offset, mask, input, planes, grad,
    grad_planes, grad_input, part_offset, part_mask, staged, grad_staged, pooled, line, dots, index, weight, slope,
    found, number,
):  # fmt: skip
    maps, images, bins, pixels = s.groups_h * s.groups_w, first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    itemsize, scale, factor = weight.itemsize, constants[0], constants[1]
    zero, one = constants.dtype.type(0), constants.dtype.type(1)
    source, target = (planes if s.direct else staged), (grad_planes if s.direct else grad_staged)
    cap, slot, dot = index.shape[0] // found.shape[0], thread * (s.PW + 1), thread * 16
    indices, weights, slopes = index.ctypes.data, weight.ctypes.data, slope.ctypes.data
    y = (slot + s.PW) * cap
    source_at, target_at = source.shape[0] // threads * thread, target.shape[0] // threads * thread
    size = target.shape[0] // threads
    held, line_at = pooled.shape[0] // threads * thread, line.shape[0] // threads * thread
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
            for t in range(first_of[n], first_of[n + 1]):
                r = order[t]
                box = extent(s, rois, r, scale)
                load_pooled(s, grad, r, c0, count, pooled, held, line, line_at)
                for ph in range(s.PH):
                    for pw in range(s.PW):
                        share, is_nan, reach_x, reach_y = bin_lines(
                            s, box, factor, offset, r, cls, ph, pw, slot, cap, index, weight, slope, found, number
                        )
                        m = mask[r, ph, pw] if s.masked else one
                        ny, nx, x = found[slot + s.PW], found[slot + pw], (slot + pw) * cap
                        b = held + (ph * s.PW + pw) * s.lanes
                        dots[dot] = dots[dot + 1] = dots[dot + 2] = dots[dot + 3] = share if is_nan else zero
                        if is_nan:
                            pass
                        elif s.lanes == 1:
                            g = score_map(s, ph, pw)
                            for c in range(count):
                                plane, value = (c * maps + g) * pixels, pooled[b + c * bins]
                                if wanted.coordinates:
                                    plane_dots(
                                        source, source_at + plane, s.W, index, weight, slope, y, ny, x, nx, value,
                                        dots, dot,
                                    )  # fmt: skip
                                if wanted.input:
                                    plane_spread(
                                        target, target_at + plane, s.W, index, weight, y, ny, x, nx, value * (share * m)
                                    )
                        else:
                            for j in range((count + LANES - 1) // LANES):
                                run = pooled.ctypes.data + (b + j * bins * LANES) * itemsize
                                if wanted.coordinates:
                                    grid_dots(
                                        zero, dots.ctypes.data + dot * itemsize, run,
                                        source.ctypes.data + (source_at + j * pixels * LANES) * itemsize, s.W,
                                        indices + y * 8, weights + y * itemsize, slopes + y * itemsize, ny,
                                        indices + x * 8, weights + x * itemsize, slopes + x * itemsize, nx,
                                    )  # fmt: skip
                                if wanted.input:
                                    grid_spread(
                                        run, target.ctypes.data + (target_at + j * pixels * LANES) * itemsize, s.W,
                                        indices + y * 8, weights + y * itemsize, ny,
                                        indices + x * 8, weights + x * itemsize, nx, share * m,
                                    )  # fmt: skip
                        if wanted.coordinates:
                            if s.masked:
                                part_mask[part, r, ph, pw] += dots[dot] * share
                            if s.shifted:
                                cell_h, cell_w = ph * s.part_h // s.PH, pw * s.part_w // s.PW
                                part_offset[part, r, 2 * cls, cell_h, cell_w] += dots[dot + 2] * (share * m) * reach_x
                                part_offset[part, r, 2 * cls + 1, cell_h, cell_w] += (
                                    dots[dot + 1] * (share * m) * reach_y
                                )
            if wanted.input and not s.direct:
                store_block(s, target, target_at, n, c0, count, grad_input, line, line_at)
        item = claim(sync)


@inner
def plane_dots(planes, at, width, index, weight, slope, y, ny, x, nx, g, dots, dot):  # type: ignore[no-untyped-def]
    """dots += g times the value and its derivatives by y and x."""
    value = slope_y = slope_x = weight.dtype.type(0)
    for i in range(ny):
        row = at + index[y + i] * width
        along = across = weight.dtype.type(0)
        for j in range(nx):
            pixel = planes[row + index[x + j]]
            along += weight[x + j] * pixel
            across += slope[x + j] * pixel
        value += weight[y + i] * along
        slope_y += slope[y + i] * along
        slope_x += weight[y + i] * across
    dots[dot] += g * value
    dots[dot + 1] += g * slope_y
    dots[dot + 2] += g * slope_x


@inner
def plane_spread(planes, at, width, index, weight, y, ny, x, nx, g):  # type: ignore[no-untyped-def]
    """plane[row_i, column_j] += wy_i wx_j g."""
    for i in range(ny):
        row, weighed = at + index[y + i] * width, weight[y + i] * g
        for j in range(nx):
            planes[row + index[x + j]] += weight[x + j] * weighed


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
    return Array(values.ctypes.data, kind(values), *values.strides)


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


def plan(
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    rule: int,
    ratio: int,
    output_size: tuple[int, int],
    spatial_scale: float,
    groups: tuple[int, int] = (1, 1),
    part_size: tuple[int, int] = (1, 1),
    factor: float = 0.0,
    backward: bool = False,
    coordinates: bool = False,
    lanes: int | None = None,
) -> Plan:
    """How one call is worked on."""
    N, C, H, W = input.shape
    real = accumulator(input.dtype)
    maps, classes = groups[0] * groups[1], 1 if offset is None else offset.shape[1] // 2
    channels, bins = C // maps, output_size[0] * output_size[1]
    each, plane = channels // classes, H * W * real.itemsize
    # staging a map must be worth it: a bin touches about eight pixels
    worth = maps == 1 and each >= LANES // 2 and len(rois) * bins * 8 >= N * H * W
    lanes = lanes or (LANES if worth else 1)
    whole = -(-each // lanes) * lanes
    block = min(max(BLOCK_BYTES // (maps * lanes * plane), 1) * lanes, 4 * LANES if lanes > 1 else 64, whole)
    direct = lanes == 1 and input.dtype == real and input.flags.c_contiguous
    units, threads = cut(channels, classes, block, RANGES if coordinates else None), get_num_threads()
    chunks = 1 if backward else max(1, min(-(-4 * threads // (N * len(units))), len(rois) // 256))
    shape = Shape(
        C, H, W, *output_size, *groups, rule, ratio, *part_size, int(offset is not None), int(mask is not None),
        lanes, block, int(direct), chunks,
    )  # fmt: skip
    nothing = np.empty((1, 1, 1, 1), real)
    return Plan(
        shape,
        np.array([spatial_scale, factor], real),
        units,
        *by_image(rois, N),
        np.ascontiguousarray(rois, real),
        nothing if offset is None else np.ascontiguousarray(offset, real),
        nothing[0] if mask is None else np.ascontiguousarray(mask, real),
        input.reshape(-1) if direct else np.empty(0, real),
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
    """Returns (R, C/(groups), PH, PW)."""
    groups = options.get("groups", (1, 1))
    if out is None:
        out = np.empty((len(rois), input.shape[1] // (groups[0] * groups[1]), *options["output_size"]), input.dtype)
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
