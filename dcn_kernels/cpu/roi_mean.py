"""Means over the bins of regions of interest, and their gradients: the points of RoIAlign and of deformable pooling,
and the pixels of "avg".

    y[r, c, ph, pw] = m * sum_ij wy_i wx_j x[image, channel, row_i, column_j] / number

with the rows, columns and weights of bins.py. A thread owns a range of output channels of one image, so it owns what
they write in grad_input; sums over channels (offsets, mask) are kept per range and added up in order afterwards. The
ranges follow from the sizes alone: results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.bins import exact, peek, poke, size_of
from dcn_kernels.cpu.convert import address_of, clear
from dcn_kernels.cpu.jit import become_part, inner, kernel, stay_apart, to_fixed_tuple
from dcn_kernels.cpu.roi_blocks import expect, load_block, load_pooled, store_block, store_pooled
from dcn_kernels.cpu.roi_lanes import (
    SLABS,
    grid_dots,
    grid_dots_of_slabs,
    grid_mean,
    grid_means,
    grid_scatter,
    grid_scatters,
)
from dcn_kernels.cpu.roi_lists import find_bin, lists_of, modulation
from dcn_kernels.cpu.roi_plan import (
    LISTS,
    SHAPE_FIELDS,
    by_image,
    constants_of,
    extent,
    in_place,
    make_plan,
    map_step,
    piece,
    pieces,
    prepared,
    regions_from,
    score_map,
    shape_from,
    slabs_of,
)
from dcn_kernels.cpu.slabs import array_from, described, numbers_of
from dcn_kernels.cpu.threads import claim, get_num_threads, join, leave, run
from dcn_kernels.dispatch.memory import check
from dcn_kernels.dispatch.roi_rules import Rule
from dcn_kernels.dtypes import accumulator

# ---------------------------------------------------------------- forward


@kernel
def forward_worker(
    thread, threads, sync,
    numbers,  # a Shape and the Arrays input, out, rois, offset, mask
    constants,  # (2,): spatial_scale and the factor of shifts
    units,  # (units, 4)
    order,  # (R,)
    first_of,  # (N + 1,)
    staged,  # (threads, elements of a unit's maps)
    pooled,  # (threads, a unit's channels * bins)
    line,  # (threads, 64 * 16)
    index, weight, slope,  # (threads, PW + 1, lines): of Lists, as the next two
    found, number,  # (threads, PW + 1)
):  # fmt: skip
    """One thread of the forward: it owns the channels of a unit in some RoIs of one image at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    input, out, regions = array_from(arrays, 0), array_from(arrays, 1), regions_from(arrays, 2, constants)
    lists = lists_of(thread, index, weight, slope, found, number)
    own_maps, own_pooled, own_line = staged[thread], pooled[thread], line[thread]
    item = claim(sync)
    while item < pieces(s, units):
        work = piece(s, units, first_of, item)
        count = work.last - work.first
        if s.in_place:
            maps = in_place(s, input, work.n, work.first, size_of(regions.scale))
        else:
            maps = address_of(own_maps, 0, 0)
            if work.high > work.low:
                load_block(s, input, work.n, work.first, count, own_maps, own_line)
        for t in range(work.low, work.high):
            expect(out, order[t], work.first, count)
            roi_means(s, regions, order[t], work.cls, count, maps, address_of(own_pooled, 0, 0), lists)
            store_pooled(s, own_pooled, order[t], work.first, count, out, own_line)
        item = claim(sync)
    leave(thread, sync)


@inner
def roi_means(s, regions, r, cls, count, maps, pooled, lists):
    """pooled[slab, bin, lane] = the means of `count` channels, whose maps begin at `maps`, over the bins of RoI r."""
    stay_apart()
    itemsize = size_of(regions.scale)
    plane, one_bin = s.H * s.W * itemsize, s.lanes * itemsize
    step = s.PH * s.PW * one_bin  # of pooled, from slab to slab
    box = extent(s, regions, r)
    for ph in range(s.PH):
        for pw in range(s.PW):
            b = find_bin(s, regions, box, r, cls, ph, pw, lists)
            share, to = b.share * modulation(s, regions, r, ph, pw), pooled + (ph * s.PW + pw) * one_bin
            if b.is_nan:
                for j in range(0, count, s.lanes):
                    for l in range(s.lanes):
                        poke(to + j // s.lanes * step + l * itemsize, share)
            else:
                bin_means(s, share, b, count, maps + score_map(s, ph, pw) * plane, to, step)


@inner
def bin_means(s, share, b, count, maps, to, to_step):
    """One bin's means: `share` times the weighed sums, of each channel or slab at `maps`, `to_step` bytes apart."""
    become_part()
    rows, columns, step = b.rows, b.columns, map_step(s, size_of(b.share))
    if s.lanes == 1:
        for c in range(count):
            value = plane_mean(share, maps + c * step, s.W, rows, columns)
            poke(to + c * to_step, value * share)
        return
    j, slabs = 0, slabs_of(count)
    while j + SLABS <= slabs:
        grid_means(
            to + j * to_step, to_step, maps + j * step, step, s.W,
            rows.line, rows.weight, rows.length, columns.line, columns.weight, columns.length, share,
        )  # fmt: skip
        j += SLABS
    while j < slabs:
        grid_mean(
            to + j * to_step, to_step, maps + j * step, step, s.W,
            rows.line, rows.weight, rows.length, columns.line, columns.weight, columns.length, share,
        )  # fmt: skip
        j += 1


@exact  # a sum that may be reordered becomes vectors with gathers: slow for the few pixels of a bin
def plane_mean(like, plane, width, rows, columns):
    """sum_ij wy_i wx_j plane[row_i, column_j]; plane is an address."""
    total, itemsize = type(like)(0), size_of(like)
    for i in range(rows.length):
        row, part = plane + peek(i, rows.line + i * 8) * width * itemsize, type(like)(0)
        for j in range(columns.length):
            pixel = peek(like, row + peek(j, columns.line + j * 8) * itemsize)
            part += peek(like, columns.weight + j * itemsize) * pixel
        total += peek(like, rows.weight + i * itemsize) * part
    return total


# ---------------------------------------------------------------- backward


class Wanted(NamedTuple):
    """What the backward computes, as 0 or 1."""

    input: int
    coordinates: int  # offset or mask


WANTED_FIELDS = len(Wanted._fields)


class Sums(NamedTuple):
    """Addresses of a range's sums over its channels; 0 where there are none."""

    offset: int  # (R, 2*classes, part_h, part_w)
    mask: int  # (R, PH, PW)


@kernel
def backward_worker(
    thread, threads, sync,
    numbers,  # a Shape, a Wanted and the Arrays input, grad_output, grad_input, rois, offset, mask, sums of both
    constants,  # (2,): spatial_scale and the factor of shifts
    units,  # (units, 4)
    order,  # (R,)
    first_of,  # (N + 1,)
    staged,  # (threads, elements of a block's maps)
    grad_staged,  # the same, of grad_input
    pooled,  # (threads, a block's channels * bins): grad_output
    line,  # (threads, 64 * 16)
    dots,  # (threads, 16): of a bin with its value and its derivatives by y and by x
    index, weight, slope,  # (threads, PW + 1, lines): of Lists, as the next two
    found, number,  # (threads, PW + 1)
):  # fmt: skip
    """One thread of the backward: it owns the channels of a unit of one image at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS + WANTED_FIELDS :]
    wanted = Wanted(*to_fixed_tuple(numbers[SHAPE_FIELDS : SHAPE_FIELDS + WANTED_FIELDS], WANTED_FIELDS))
    input, grad_output, grad_input = array_from(arrays, 0), array_from(arrays, 1), array_from(arrays, 2)
    regions, itemsize = regions_from(arrays, 3, constants), size_of(constants[0])
    offset_sums, mask_sums = array_from(arrays, 6), array_from(arrays, 7)
    lists, dot = lists_of(thread, index, weight, slope, found, number), address_of(dots, thread, 0)
    own_maps, own_grads, own_pooled, own_line = staged[thread], grad_staged[thread], pooled[thread], line[thread]
    item = claim(sync)
    while item < pieces(s, units):
        work = piece(s, units, first_of, item)
        sums = Sums(offset_sums.address + work.part * offset_sums.s0, mask_sums.address + work.part * mask_sums.s0)
        for c0 in range(work.first, work.last if work.high > work.low else work.first, s.block):
            count = min(s.block, work.last - c0)
            if s.in_place:
                maps = in_place(s, input, work.n, c0, itemsize)
                grads = in_place(s, grad_input, work.n, c0, itemsize)
            else:
                maps, grads = address_of(own_maps, 0, 0), address_of(own_grads, 0, 0)
                if wanted.coordinates:
                    load_block(s, input, work.n, c0, count, own_maps, own_line)
                clear(grads, own_grads.size * itemsize)
            for t in range(work.low, work.high):
                load_pooled(s, grad_output, order[t], c0, count, own_pooled, own_line)
                if t + 1 < work.high:
                    expect(grad_output, order[t + 1], c0, count)
                roi_gradients(
                    s, wanted, regions, sums, order[t], work.cls, count, maps, grads, address_of(own_pooled, 0, 0),
                    lists, dot,
                )  # fmt: skip
            if wanted.input and not s.in_place:
                store_block(s, own_grads, work.n, c0, count, grad_input, own_line)
        item = claim(sync)
    leave(thread, sync)


@inner
def roi_gradients(s, wanted, regions, sums, r, cls, count, maps, grads, pooled, lists, dot):
    """What `count` channels of RoI r add to the gradients of their maps, at `grads`, and to `sums`."""
    stay_apart()
    itemsize = size_of(regions.scale)
    plane, one_bin = s.H * s.W * itemsize, s.lanes * itemsize
    step = s.PH * s.PW * one_bin  # of pooled, from slab to slab
    box = extent(s, regions, r)
    for ph in range(s.PH):
        for pw in range(s.PW):
            b = find_bin(s, regions, box, r, cls, ph, pw, lists)
            m, g = modulation(s, regions, r, ph, pw), pooled + (ph * s.PW + pw) * one_bin
            at = score_map(s, ph, pw) * plane
            if wanted.coordinates:
                bin_dots(s, b, count, maps + at, g, step, dot)
                add_coordinate_gradients(s, sums, b, m, r, cls, ph, pw, dot)
            if wanted.input and not b.is_nan:
                scatter_bin(s, b.share * m, b, count, grads + at, g, step)


@inner
def bin_dots(s, b, count, maps, g, g_step, dot):
    """dot = the sums over channels of their gradients g times (value, derivative by y, derivative by x) of a bin."""
    become_part()
    rows, columns, step = b.rows, b.columns, map_step(s, size_of(b.share))
    zero = type(b.share)(0)
    for i in range(4):
        poke(dot + i * size_of(zero), b.share if b.is_nan else zero)
    if b.is_nan:
        return
    if s.lanes == 1:
        for c in range(count):
            plane_dots(peek(zero, g + c * g_step), maps + c * step, s.W, rows, columns, dot)
        return
    j, slabs = 0, slabs_of(count)
    while j + SLABS <= slabs:
        grid_dots_of_slabs(
            zero, dot, g + j * g_step, g_step, maps + j * step, step, s.W,
            rows.line, rows.weight, rows.slope, rows.length,
            columns.line, columns.weight, columns.slope, columns.length,
        )  # fmt: skip
        j += SLABS
    while j < slabs:
        grid_dots(
            zero, dot, g + j * g_step, g_step, maps + j * step, step, s.W,
            rows.line, rows.weight, rows.slope, rows.length,
            columns.line, columns.weight, columns.slope, columns.length,
        )  # fmt: skip
        j += 1


@inner
def scatter_bin(s, share, b, count, grads, g, g_step):
    """Add a bin's part to the gradients of each channel's or slab's map: the transpose of bin_means."""
    become_part()
    rows, columns, step = b.rows, b.columns, map_step(s, size_of(b.share))
    if s.lanes == 1:
        for c in range(count):
            scatter_plane(peek(share, g + c * g_step) * share, grads + c * step, s.W, rows, columns)
        return
    j, slabs = 0, slabs_of(count)
    while j + SLABS <= slabs:
        grid_scatters(
            g + j * g_step, g_step, grads + j * step, step, s.W,
            rows.line, rows.weight, rows.length, columns.line, columns.weight, columns.length, share,
        )  # fmt: skip
        j += SLABS
    while j < slabs:
        grid_scatter(
            g + j * g_step, g_step, grads + j * step, step, s.W,
            rows.line, rows.weight, rows.length, columns.line, columns.weight, columns.length, share,
        )  # fmt: skip
        j += 1


@inner
def add_coordinate_gradients(s, sums, b, m, r, cls, ph, pw, dot):
    """Add what a bin's dots give for its mask and its offset."""
    become_part()
    itemsize = size_of(m)
    if s.masked:
        at = sums.mask + ((r * s.PH + ph) * s.PW + pw) * itemsize
        poke(at, peek(m, at) + peek(m, dot) * b.share)
    if s.shifted:
        parts, share = s.part_h * s.part_w, b.share * m
        part = (r * s.classes + cls) * 2 * parts + ph * s.part_h // s.PH * s.part_w + pw * s.part_w // s.PW
        along_x, along_y = sums.offset + part * itemsize, sums.offset + (part + parts) * itemsize
        poke(along_x, peek(m, along_x) + peek(m, dot + 2 * itemsize) * share * b.reach_x)
        poke(along_y, peek(m, along_y) + peek(m, dot + itemsize) * share * b.reach_y)


@exact
def plane_dots(g, plane, width, rows, columns, dot):
    """dot += g times the value and its derivatives by y and x."""
    itemsize, value = size_of(g), type(g)(0)
    slope_y = slope_x = value
    for i in range(rows.length):
        row = plane + peek(i, rows.line + i * 8) * width * itemsize
        along = across = type(g)(0)
        for j in range(columns.length):
            pixel = peek(g, row + peek(j, columns.line + j * 8) * itemsize)
            along += peek(g, columns.weight + j * itemsize) * pixel
            across += peek(g, columns.slope + j * itemsize) * pixel
        value += peek(g, rows.weight + i * itemsize) * along
        slope_y += peek(g, rows.slope + i * itemsize) * along
        slope_x += peek(g, rows.weight + i * itemsize) * across
    poke(dot, peek(g, dot) + g * value)
    poke(dot + itemsize, peek(g, dot + itemsize) + g * slope_y)
    poke(dot + 2 * itemsize, peek(g, dot + 2 * itemsize) + g * slope_x)


@exact
def scatter_plane(g, plane, width, rows, columns):
    """plane[row_i, column_j] += wy_i wx_j g."""
    itemsize = size_of(g)
    for i in range(rows.length):
        row = plane + peek(i, rows.line + i * 8) * width * itemsize
        weighed = peek(g, rows.weight + i * itemsize) * g
        for j in range(columns.length):
            place = row + peek(j, columns.line + j * 8) * itemsize
            poke(place, peek(g, place) + peek(g, columns.weight + j * itemsize) * weighed)


# ---------------------------------------------------------------- from Python


def mean(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    offset: np.ndarray | None = None,  # (R, 2*classes, part_h, part_w)
    mask: np.ndarray | None = None,  # (R, PH, PW)
    *,
    rule: Rule,
    output_size: tuple[int, int],
    spatial_scale: float,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C/maps, PH, PW)."""
    if out is None:
        out = np.empty((len(rois), input.shape[1] // (rule.maps[0] * rule.maps[1]), *output_size), input.dtype)
    if out.size == 0:
        return out
    plan = make_plan(
        input.shape, len(rois), None if offset is None else offset.shape, input.dtype, rule, output_size,
        get_num_threads(), buffers=("staged", "pooled", "line", *LISTS),
        contiguous=input.flags.c_contiguous and input.flags.aligned, masked=mask is not None,
    )  # fmt: skip
    regions = prepared(rois, offset, mask, dtype=input.dtype)
    call = numbers_of(plan.shape, *map(described, (input, out, *regions)))
    buffers = workspace.allocate(plan.buffers)
    run(
        forward_worker, plan.threads, call, constants_of(spatial_scale, rule, input.dtype), plan.units,
        *by_image(rois, len(input)), *buffers.values(),
    )  # fmt: skip
    return out


def mean_backward(
    grad_output: np.ndarray,  # (R, C/maps, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    rule: Rule,
    output_size: tuple[int, int],
    spatial_scale: float,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Gradients by name among "input", "offset", "mask", those of `wrt`, each in its argument's dtype."""
    given = {"input": input, "offset": offset, "mask": mask}
    grads = {name: np.zeros(array.shape, array.dtype) for name in wrt if (array := given[name]) is not None}
    if grad_output.size == 0:
        return grads
    wanted = Wanted(int("input" in wrt), int("offset" in wrt or "mask" in wrt))
    plan = make_plan(
        input.shape, len(rois), None if offset is None else offset.shape, input.dtype, rule, output_size,
        get_num_threads(), buffers=("staged", "grad_staged", "pooled", "line", "dots", *LISTS),
        unused=(*(() if wanted.coordinates else ("staged",)), *(() if wanted.input else ("grad_staged",))),
        contiguous=input.flags.c_contiguous and input.flags.aligned, masked=mask is not None, backward=True,
        coordinates=bool(wanted.coordinates),
    )  # fmt: skip
    regions, ranges = prepared(rois, offset, mask, dtype=input.dtype), int(plan.units[:, 3].max()) + 1
    shifts = sum(array.size for array in (offset, mask) if array is not None)
    if wanted.coordinates:
        check(ranges * shifts * accumulator(input.dtype).itemsize, "partial gradients")
    sums = {
        name: np.zeros((ranges, array.size), accumulator(input.dtype))
        for name in ("offset", "mask")
        if wanted.coordinates and (array := given[name]) is not None
    }
    arrays = (input, grad_output, grads.get("input"), *regions, sums.get("offset"), sums.get("mask"))
    call = numbers_of(plan.shape, wanted, *map(described, arrays))
    buffers = workspace.allocate(plan.buffers)
    run(
        backward_worker, plan.threads, call, constants_of(spatial_scale, rule, input.dtype), plan.units,
        *by_image(rois, len(input)), *buffers.values(),
    )  # fmt: skip
    for name in sums.keys() & grads.keys():
        grads[name][...] = sums[name].sum(axis=0).reshape(grads[name].shape)
    return grads
