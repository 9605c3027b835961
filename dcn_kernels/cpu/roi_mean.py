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
from dcn_kernels.cpu.deform_conv import Array, load_pixels, turn, turn_back
from dcn_kernels.cpu.jit import inner, kernel
from dcn_kernels.cpu.roi_lanes import LANES, grid_dots, grid_mean, grid_spread
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


# ---------------------------------------------------------------- pieces of both workers


@inner
def load_block(s, input, n, c0, count, to, line):  # type: ignore[no-untyped-def]
    """Stage the maps of output channels c0 .. c0 + count of image n."""
    maps, pixels = s.groups_h * s.groups_w, s.H * s.W
    base = input.address + n * input.s0
    if s.lanes == 1:
        for plane in range(count * maps):
            load_pixels(to[plane], 0, base + (c0 * maps + plane) * input.s1, input, s.W, 0, pixels)
        return
    zero = line.dtype.type(0)
    for j in range((count + LANES - 1) // LANES):
        runs = to[j].reshape(pixels, LANES)
        for start in range(0, pixels, 64):
            length = min(64, pixels - start)
            for l in range(LANES):
                c = j * LANES + l
                if c < count:
                    load_pixels(line, l * 64, base + (c0 + c) * input.s1, input, s.W, start, length)
                else:
                    for p in range(length):
                        line[l * 64 + p] = zero
            turn(LANES, line, LANES, length, runs[start:])


@inner
def store_block(s, values, n, c0, count, to, line):  # type: ignore[no-untyped-def]
    """The inverse of load_block, into a C-contiguous array."""
    maps, pixels = s.groups_h * s.groups_w, s.H * s.W
    base = to.address + n * to.s0
    if s.lanes == 1:
        for plane in range(count * maps):
            store_run(values[plane], 0, pixels, base + (c0 * maps + plane) * to.s1, to.kind)
        return
    for j in range((count + LANES - 1) // LANES):
        runs = values[j].reshape(pixels, LANES)
        for start in range(0, pixels, 64):
            length = min(64, pixels - start)
            turn_back(LANES, runs[start:], LANES, length, line)
            for l in range(min(LANES, count - j * LANES)):
                store_run(line, l * 64, length, base + (c0 + j * LANES + l) * to.s1 + start * to.s3, to.kind)


@inner
def load_pooled(s, grad, r, c0, count, pooled, line):  # type: ignore[no-untyped-def]
    """pooled[slab, bin, lane] = the gradients of one RoI's output channels c0 .. c0 + count."""
    bins = s.PH * s.PW
    base = grad.address + r * grad.s0
    if s.lanes == 1:
        for c in range(count):
            load_pixels(pooled[c].reshape(pooled.shape[1]), 0, base + (c0 + c) * grad.s1, grad, s.PW, 0, bins)
        return
    zero = line.dtype.type(0)
    for j in range((count + LANES - 1) // LANES):
        for start in range(0, bins, 64):
            length = min(64, bins - start)
            for l in range(LANES):
                c = j * LANES + l
                if c < count:
                    load_pixels(line, l * 64, base + (c0 + c) * grad.s1, grad, s.PW, start, length)
                else:
                    for b in range(length):
                        line[l * 64 + b] = zero
            turn(LANES, line, LANES, length, pooled[j, start:])


@inner
def store_pooled(s, pooled, r, c0, count, out, line):  # type: ignore[no-untyped-def]
    """out[r, c0 .. c0 + count] = pooled[slab, bin, lane]."""
    bins = s.PH * s.PW
    base = out.address + r * out.s0
    if s.lanes == 1:
        for c in range(count):
            store_run(pooled[c].reshape(pooled.shape[1]), 0, bins, base + (c0 + c) * out.s1, out.kind)
        return
    for j in range((count + LANES - 1) // LANES):
        for start in range(0, bins, 64):
            length = min(64, bins - start)
            turn_back(LANES, pooled[j, start:], LANES, length, line)
            for l in range(min(LANES, count - j * LANES)):
                store_run(line, l * 64, length, base + (c0 + j * LANES + l) * out.s1 + start * out.s3, out.kind)


@exact
def shift_and_reach(offset, factor, size):  # type: ignore[no-untyped-def]
    """How far a bin moves, (offset * factor) * size, and the derivative of that."""
    return (offset * factor) * size, factor * size


@inner
def bin_lines(s, roi, scale, factor, offset, r, cls, ph, pw, index, weight, slope, found, number):  # type: ignore[no-untyped-def]
    """The lines of bin (ph, pw): its columns in row pw of the lists, its rows in row PW.

    Returns (1 / number, is it NaN, d x / d offset, d y / d offset). Bins must come in row-major order: without
    offsets a RoI's columns are found at its first row of bins, and a row's rows at its first bin.
    """
    real = weight.dtype.type
    start_y, h = start_and_size(s.rule, roi[2], roi[4], scale)
    start_x, w = start_and_size(s.rule, roi[1], roi[3], scale)
    shift_y = shift_x = reach_y = reach_x = real(0)
    if s.shifted:
        part_h, part_w = ph * s.part_h // s.PH, pw * s.part_w // s.PW
        shift_x, reach_x = shift_and_reach(offset[r, 2 * cls, part_h, part_w], factor, w)
        shift_y, reach_y = shift_and_reach(offset[r, 2 * cls + 1, part_h, part_w], factor, h)
        if np.isnan(shift_y) or np.isnan(shift_x):
            found[s.PW] = found[pw] = 0
            return real(1), True, reach_x, reach_y
    if s.shifted or ph == 0:
        found[pw], number[pw] = lines(
            s.rule, s.ratio, start_x, w, s.PW, pw, shift_x, s.W, index[pw], weight[pw], slope[pw]
        )
    if s.shifted or pw == 0:
        found[s.PW], number[s.PW] = lines(
            s.rule, s.ratio, start_y, h, s.PH, ph, shift_y, s.H, index[s.PW], weight[s.PW], slope[s.PW]
        )
    return real(1 / max(number[pw] * number[s.PW], 1.0)), False, reach_x, reach_y


# ---------------------------------------------------------------- forward


@kernel
def forward_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, constants, units, order, first_of, rois, offset, mask, input, planes, out,
    staged, pooled, line, index, weight, slope, found, number,
):  # fmt: skip
    maps, images = s.groups_h * s.groups_w, first_of.shape[0] - 1
    columns, rows = index[thread], index[thread, s.PW].ctypes.data
    weights_y = weight[thread, s.PW].ctypes.data
    scale, factor = constants[0], constants[1]
    buffer, block, at = pooled[thread], staged[thread], 0
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
                at = (n * s.C) + c0 * maps
            else:
                load_block(s, input, n, c0, count, block, line[thread])
            for t in range(low, high):
                r = order[t]
                for ph in range(s.PH):
                    for pw in range(s.PW):
                        share, is_nan, _, _ = bin_lines(
                            s, rois[r], scale, factor, offset, r, cls, ph, pw,
                            columns, weight[thread], slope[thread], found[thread], number[thread],
                        )  # fmt: skip
                        ny, nx = found[thread, s.PW], found[thread, pw]
                        if is_nan:
                            share *= np.nan
                        if s.masked:
                            share *= mask[r, ph, pw]
                        b = ph * s.PW + pw
                        if is_nan:
                            for j in range((count + s.lanes - 1) // s.lanes):
                                for l in range(s.lanes):
                                    buffer[j, b, l] = share
                        elif s.lanes == 1:
                            g = min(ph * s.groups_h // s.PH, s.groups_h - 1) * s.groups_w
                            g += min(pw * s.groups_w // s.PW, s.groups_w - 1)
                            for c in range(count):
                                plane = planes[at + c * maps + g] if s.direct else block[c * maps + g]
                                value = plane_mean(plane, s.W, index[thread], weight[thread], s.PW, ny, pw, nx)
                                buffer[c, b, 0] = value * share
                        else:
                            for j in range((count + LANES - 1) // LANES):
                                grid_mean(
                                    buffer[j, b].ctypes.data, block[j].ctypes.data, s.W, rows, weights_y, ny,
                                    columns[pw].ctypes.data, weight[thread, pw].ctypes.data, nx, share,
                                )  # fmt: skip
                store_pooled(s, buffer, r, c0, count, out, line[thread])
        item = claim(sync)


@inner
def plane_mean(plane, width, index, weight, y, ny, x, nx):  # type: ignore[no-untyped-def]
    """sum_ij wy_i wx_j plane[row_i, column_j]; y and x are rows of the lists."""
    total = weight.dtype.type(0)
    for i in range(ny):
        row, part = index[y, i] * width, weight.dtype.type(0)
        for j in range(nx):
            part += weight[x, j] * plane[row + index[x, j]]
        total += weight[y, i] * part
    return total


# ---------------------------------------------------------------- backward


@kernel
def backward_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, wanted, constants, units, order, first_of, rois, offset, mask, input, planes, grad,
    grad_planes, grad_input, part_offset, part_mask, staged, grad_staged, pooled, line, dots, index, weight, slope,
    found, number,
):  # fmt: skip
    maps, images = s.groups_h * s.groups_w, first_of.shape[0] - 1
    columns, rows = index[thread], index[thread, s.PW].ctypes.data
    weights_y, slopes_y = weight[thread, s.PW].ctypes.data, slope[thread, s.PW].ctypes.data
    scale, factor, zero = constants[0], constants[1], constants.dtype.type(0)
    buffer, block, grad_block, dot, at = pooled[thread], staged[thread], grad_staged[thread], dots[thread], 0
    item = claim(sync)
    while item < images * units.shape[0]:
        unit, n = item // images, item % images
        last, cls, part = units[unit, 0] + units[unit, 1], units[unit, 2], units[unit, 3]
        for c0 in range(units[unit, 0], last if first_of[n + 1] > first_of[n] else 0, s.block):
            count = min(s.block, last - c0)
            if s.direct:
                at = (n * s.C) + c0 * maps
            else:
                if wanted.coordinates:
                    load_block(s, input, n, c0, count, block, line[thread])
                if wanted.input:
                    grad_block[:] = zero
            for t in range(first_of[n], first_of[n + 1]):
                r = order[t]
                load_pooled(s, grad, r, c0, count, buffer, line[thread])
                for ph in range(s.PH):
                    for pw in range(s.PW):
                        share, is_nan, reach_x, reach_y = bin_lines(
                            s, rois[r], scale, factor, offset, r, cls, ph, pw,
                            columns, weight[thread], slope[thread], found[thread], number[thread],
                        )  # fmt: skip
                        ny, nx = found[thread, s.PW], found[thread, pw]
                        m = mask[r, ph, pw] if s.masked else constants.dtype.type(1)
                        b = ph * s.PW + pw
                        dot[:] = zero
                        if is_nan:
                            dot[:] = zero / zero
                        elif s.lanes == 1:
                            g = min(ph * s.groups_h // s.PH, s.groups_h - 1) * s.groups_w
                            g += min(pw * s.groups_w // s.PW, s.groups_w - 1)
                            for c in range(count):
                                if wanted.coordinates:
                                    plane = planes[at + c * maps + g] if s.direct else block[c * maps + g]
                                    plane_dots(
                                        plane, s.W, index[thread], weight[thread], slope[thread],
                                        s.PW, ny, pw, nx, buffer[c, b, 0], dot,
                                    )  # fmt: skip
                                if wanted.input:
                                    plane = grad_planes[at + c * maps + g] if s.direct else grad_block[c * maps + g]
                                    plane_spread(
                                        plane, s.W, index[thread], weight[thread], s.PW, ny, pw, nx,
                                        buffer[c, b, 0] * (share * m),
                                    )  # fmt: skip
                        else:
                            wx, sx = weight[thread, pw].ctypes.data, slope[thread, pw].ctypes.data
                            for j in range((count + LANES - 1) // LANES):
                                if wanted.coordinates:
                                    grid_dots(
                                        zero, dot.ctypes.data, buffer[j, b].ctypes.data, block[j].ctypes.data, s.W,
                                        rows, weights_y, slopes_y, ny, columns[pw].ctypes.data, wx, sx, nx,
                                    )  # fmt: skip
                                if wanted.input:
                                    grid_spread(
                                        buffer[j, b].ctypes.data, grad_block[j].ctypes.data, s.W, rows, weights_y, ny,
                                        columns[pw].ctypes.data, wx, nx, share * m,
                                    )  # fmt: skip
                        if wanted.coordinates:
                            if s.masked:
                                part_mask[part, r, ph, pw] += dot[0] * share
                            if s.shifted:
                                cell_h, cell_w = ph * s.part_h // s.PH, pw * s.part_w // s.PW
                                part_offset[part, r, 2 * cls, cell_h, cell_w] += dot[2] * (share * m) * reach_x
                                part_offset[part, r, 2 * cls + 1, cell_h, cell_w] += dot[1] * (share * m) * reach_y
            if wanted.input and not s.direct:
                store_block(s, grad_block, n, c0, count, grad_input, line[thread])
        item = claim(sync)


@inner
def plane_dots(plane, width, index, weight, slope, y, ny, x, nx, g, dot):  # type: ignore[no-untyped-def]
    """dot += g times the value and its derivatives by y and x."""
    value = slope_y = slope_x = weight.dtype.type(0)
    for i in range(ny):
        row = index[y, i] * width
        along = across = weight.dtype.type(0)
        for j in range(nx):
            pixel = plane[row + index[x, j]]
            along += weight[x, j] * pixel
            across += slope[x, j] * pixel
        value += weight[y, i] * along
        slope_y += slope[y, i] * along
        slope_x += weight[y, i] * across
    dot[0] += g * value
    dot[1] += g * slope_y
    dot[2] += g * slope_x


@inner
def plane_spread(plane, width, index, weight, y, ny, x, nx, g):  # type: ignore[no-untyped-def]
    """plane[row_i, column_j] += wy_i wx_j g."""
    for i in range(ny):
        row, weighed = index[y, i] * width, weight[y, i] * g
        for j in range(nx):
            plane[row + index[x, j]] += weight[x, j] * weighed


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
        input.reshape(N * C, H * W) if direct else nothing[0, 0],
        threads,
    )


def buffers(p: Plan, staged: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Each thread's temporary memory, with those of the maps that are `staged`."""
    s, real = p.shape, p.constants.dtype
    slabs, pixels = s.block // s.lanes, s.H * s.W * s.lanes
    maps = s.groups_h * s.groups_w
    per_block = (p.threads, slabs * maps, pixels)
    lists = (p.threads, s.PW + 1, max(s.H, s.W) + 2)
    sizes: workspace.Plan = {
        name: (per_block if name in staged and not s.direct else (p.threads, 1, 1), real)
        for name in ("staged", "grad_staged")
    }
    return workspace.allocate(
        {
            **sizes,
            "pooled": ((p.threads, slabs, s.PH * s.PW, s.lanes), real),
            "line": ((p.threads, 64 * LANES), real),
            "dots": ((p.threads, 4), real),
            "index": (lists, np.int64),
            "weight": (lists, real),
            "slope": (lists, real),
            "found": ((p.threads, s.PW + 1), np.int64),
            "number": ((p.threads, s.PW + 1), np.float64),
        }
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
    grad_planes = grad_input.reshape(-1, p.shape.H * p.shape.W) if direct else np.empty((0, 0), real)
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
