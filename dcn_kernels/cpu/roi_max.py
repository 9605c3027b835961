"""Maxima over the bins of regions of interest, and their gradients.

A thread owns slabs of 16 channels of one image, staged channels-last: one comparison serves 16 channels. Backward it
owns the same slabs of grad_input, so nothing is written by two threads; with a given argmax it owns planes, and no map
is read.
"""

from __future__ import annotations

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.bins import peek, poke, size_of
from dcn_kernels.cpu.convert import F32, F64, address_of, clear, fetch_run
from dcn_kernels.cpu.jit import become_part, inner, kernel, stay_apart
from dcn_kernels.cpu.roi_blocks import expect, load_block, load_pooled, store_block, store_pooled, turn_out
from dcn_kernels.cpu.roi_lanes import LANES, SLABS, grid_argmax, grid_max, grid_maxima
from dcn_kernels.cpu.roi_plan import (
    SHAPE_FIELDS,
    by_image,
    constants_of,
    edge_pair,
    find_edges,
    make_plan,
    map_step,
    piece,
    pieces,
    prepared,
    regions_from,
    shape_from,
    slabs_of,
)
from dcn_kernels.cpu.slabs import array_from, described, load_pixels, numbers_of
from dcn_kernels.cpu.threads import claim, get_num_threads, join, leave, run
from dcn_kernels.dispatch.roi_rules import Rule
from dcn_kernels.dispatch.shapes import argmax_error


@kernel
def forward_worker(
    thread, threads, sync,
    numbers,  # a Shape and the Arrays input, out, argmax, rois, and absent ones for offset and mask
    constants,  # (2,): spatial_scale, and a factor that nothing here uses
    units,  # (units, 4)
    order,  # (R,)
    first_of,  # (N + 1,)
    staged,  # (threads, elements of a unit's maps)
    pooled,  # (threads, a unit's channels * bins)
    line,  # (threads, 64 * 16)
    edges,  # (threads, 2 * (PH + PW)): of a RoI's bins
    where,  # (threads, bins * 16): the places of a slab's maxima
):  # fmt: skip
    """One thread of the forward: it owns the channels of a unit in some RoIs of one image at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    input, out, argmax = array_from(arrays, 0), array_from(arrays, 1), array_from(arrays, 2)
    regions = regions_from(arrays, 3, constants)
    own_maps, own_pooled, own_line = staged[thread], pooled[thread], line[thread]
    own_edges, places = address_of(edges, thread, 0), address_of(where, thread, 0)
    bins = s.PH * s.PW
    item = claim(sync)
    while item < pieces(s, units):
        work = piece(s, units, first_of, item)
        count = work.last - work.first
        if work.high > work.low:
            load_block(s, input, work.n, work.first, count, own_maps, own_line)
        for t in range(work.low, work.high):
            r = order[t]
            find_edges(s, regions, r, own_edges)
            expect(out, r, work.first, count)
            to = argmax.address + (r * s.C + work.first) * bins * 8 if argmax.address != 0 else 0
            roi_maxima(
                s, regions.scale, count, address_of(own_maps, 0, 0), own_edges, address_of(own_pooled, 0, 0), places, to
            )
            store_pooled(s, own_pooled, r, work.first, count, out, own_line)
        item = claim(sync)
    leave(thread, sync)


@inner
def roi_maxima(s, like, count, maps, edges, pooled, places, argmax):
    """pooled[slab, bin, lane] = the maxima of `count` channels over a RoI's bins; argmax[channel, bin], unless its
    address is 0, their places. All are addresses; `like` is any number of the type of sums."""
    stay_apart()
    run_of_lanes, step, bins = LANES * size_of(like), map_step(s, size_of(like)), s.PH * s.PW
    slabs, j = slabs_of(count), 0
    while j < slabs:
        several = SLABS if j + SLABS <= slabs and argmax == 0 else 1
        for ph in range(s.PH):
            for pw in range(s.PW):
                b = ph * s.PW + pw
                bin_maxima(
                    s, like, several, maps + j * step, edge_pair(edges, ph), edge_pair(edges, s.PH + pw),
                    pooled + (j * bins + b) * run_of_lanes, places + b * LANES * 8, argmax != 0,
                )  # fmt: skip
        if argmax != 0:
            store_places(places, bins, min(LANES, count - j * LANES), argmax + j * LANES * bins * 8)
        j += several


@inner
def bin_maxima(s, like, slabs, maps, rows, columns, to, places, with_places):
    """The maxima of one or SLABS slabs over the pixels of a bin, 0 of none; for one slab with their places, or -1."""
    become_part()
    (top, bottom), (left, right) = rows, columns
    itemsize = size_of(like)
    step, to_step = map_step(s, itemsize), s.PH * s.PW * LANES * itemsize
    if bottom <= top or right <= left:
        for k in range(slabs):
            for l in range(LANES):
                poke(to + k * to_step + l * itemsize, type(like)(0))
        for l in range(LANES):
            poke(places + l * 8, np.int64(-1))
    elif with_places:
        grid_argmax(like, to, places, maps, s.W, top, bottom, left, right)
    elif slabs == 1:
        grid_max(like, to, to_step, maps, step, s.W, top, bottom, left, right)
    else:
        grid_maxima(like, to, to_step, maps, step, s.W, top, bottom, left, right)


@inner
def store_places(places, bins, count, to):
    """to[channel, bin] = places[bin, lane] for `count` channels; both are addresses."""
    if count == LANES:
        turn_out(0.0, 8, places, bins, to, bins * 8)  # of 8 bytes each, whatever they mean
        return
    for l in range(count):
        for b in range(bins):
            poke(to + (l * bins + b) * 8, peek(l, places + (b * LANES + l) * 8))


# ---------------------------------------------------------------- backward


@kernel
def backward_worker(
    thread, threads, sync,
    numbers,  # a Shape and the Arrays input, grad_output, grad_input, rois, and absent ones for offset and mask
    constants,  # (2,): spatial_scale, and a factor that nothing here uses
    units,  # (units, 4)
    order,  # (R,)
    first_of,  # (N + 1,)
    staged,  # (threads, elements of a unit's maps)
    grad_staged,  # the same, of grad_input
    pooled,  # (threads, a unit's channels * bins): grad_output
    line,  # (threads, 64 * 16)
    edges,  # (threads, 2 * (PH + PW)): of a RoI's bins
    where,  # (threads, bins * 16): the places of a bin's maxima
):  # fmt: skip
    """One thread of the backward, which finds the maxima again: it owns the channels of a unit of one image."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    input, grad_output, grad_input = array_from(arrays, 0), array_from(arrays, 1), array_from(arrays, 2)
    regions = regions_from(arrays, 3, constants)
    own_maps, own_grads, own_pooled, own_line = staged[thread], grad_staged[thread], pooled[thread], line[thread]
    own_edges, places = address_of(edges, thread, 0), address_of(where, thread, 0)
    item = claim(sync)
    while item < pieces(s, units):
        work = piece(s, units, first_of, item)
        count = work.last - work.first
        if work.high > work.low:
            load_block(s, input, work.n, work.first, count, own_maps, own_line)
            clear(address_of(own_grads, 0, 0), own_grads.size * own_grads.itemsize)
        for t in range(work.low, work.high):
            find_edges(s, regions, order[t], own_edges)
            load_pooled(s, grad_output, order[t], work.first, count, own_pooled, own_line)
            if t + 1 < work.high:
                expect(grad_output, order[t + 1], work.first, count)
            roi_gradients(
                s, regions.scale, count, address_of(own_maps, 0, 0), own_edges, address_of(own_pooled, 0, 0), places,
                address_of(own_line, 0, 0), address_of(own_grads, 0, 0),
            )  # fmt: skip
        if work.high > work.low:
            store_block(s, own_grads, work.n, work.first, count, grad_input, own_line)
        item = claim(sync)
    leave(thread, sync)


@inner
def roi_gradients(s, like, count, maps, edges, pooled, places, unused, grads):
    """Add pooled[slab, bin, lane], a RoI's gradients, where the maxima of `maps` are; the maxima go to `unused`."""
    stay_apart()
    itemsize, bins = size_of(like), s.PH * s.PW
    run_of_lanes, step = LANES * itemsize, map_step(s, itemsize)
    for j in range(slabs_of(count)):
        x, target = maps + j * step, grads + j * step
        for ph in range(s.PH):
            top, bottom = edge_pair(edges, ph)
            for pw in range(s.PW):
                left, right = edge_pair(edges, s.PH + pw)
                if bottom > top and right > left:
                    grid_argmax(like, unused, places, x, s.W, top, bottom, left, right)
                    g = pooled + (j * bins + ph * s.PW + pw) * run_of_lanes
                    for l in range(LANES):
                        to = target + peek(l, places + l * 8) * run_of_lanes + l * itemsize
                        poke(to, peek(like, to) + peek(like, g + l * itemsize))


@kernel
def argmax_backward_worker(
    thread, threads, sync,
    numbers,  # a Shape and the Arrays argmax, grad_output, grad_input
    units,  # (units, 4)
    order,  # (R,)
    first_of,  # (N + 1,)
    wrong,  # (threads,): an index that is no pixel's goes here, if there is one
    grad_staged,  # (threads, elements of a unit's maps)
    pooled,  # (threads, a unit's channels * bins)
):  # fmt: skip
    """One thread of the backward with a given argmax: it owns the channels of a unit of one image at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    argmax, grad_output, grad_input = array_from(arrays, 0), array_from(arrays, 1), array_from(arrays, 2)
    own_grads, own_pooled, bins = grad_staged[thread], pooled[thread], s.PH * s.PW
    itemsize = size_of(own_pooled[0])
    plain = grad_output.kind == (F32 if itemsize == 4 else F64)
    plain = plain and grad_output.s3 == itemsize and grad_output.s2 == s.PW * itemsize
    item = claim(sync)
    while item < pieces(s, units):
        work = piece(s, units, first_of, item)
        count = work.last - work.first
        if work.high > work.low:
            clear(address_of(own_grads, 0, 0), own_grads.size * own_grads.itemsize)
        for t in range(work.low, work.high):
            if t + 1 < work.high:
                expect(grad_output, order[t + 1], work.first, count)
                fetch_run(argmax.address + (order[t + 1] * s.C + work.first) * bins * 8, count * bins * 8)
            for c in range(work.first, work.last):
                g = grad_output.address + order[t] * grad_output.s0 + c * grad_output.s1
                if not plain:
                    load_pixels(own_pooled, 0, g, grad_output, s.PW, 0, bins)
                    g = address_of(own_pooled, 0, 0)
                places = argmax.address + (order[t] * s.C + c) * bins * 8
                plane = address_of(own_grads, (c - work.first) * s.H * s.W, 0)
                bad = add_at(own_pooled[0], g, places, bins, plane, s.H * s.W)
                if bad != -1:
                    wrong[thread] = bad
        if work.high > work.low:
            store_block(s, own_grads, work.n, work.first, count, grad_input, own_pooled)
        item = claim(sync)
    leave(thread, sync)


@inner
def add_at(like, values, places, count, plane, pixels):
    """plane[places[i]] += values[i], all addresses; returns a place that is no pixel's and not -1, or -1."""
    bad, itemsize = np.int64(-1), size_of(like)
    for i in range(count):
        at = peek(count, places + i * 8)
        if 0 <= at < pixels:
            to = plane + at * itemsize
            poke(to, peek(like, to) + peek(like, values + i * itemsize))
        elif at != -1:
            bad = at
    return bad


# ---------------------------------------------------------------- from Python


def maximum(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    rule: Rule,
    output_size: tuple[int, int],
    spatial_scale: float,
    out: np.ndarray,  # (R, C, PH, PW)
    argmax: np.ndarray | None,  # (R, C, PH, PW)
) -> None:
    """Write `out` and `argmax`."""
    plan = make_plan(
        input.shape, len(rois), None, input.dtype, rule, output_size, get_num_threads(),
        buffers=("staged", "pooled", "line", "edges", "where"), lanes=LANES,
    )  # fmt: skip
    regions = prepared(rois, None, None, dtype=input.dtype)
    call = numbers_of(plan.shape, *map(described, (input, out, argmax, *regions)))
    buffers = workspace.allocate(plan.buffers)
    run(
        forward_worker, plan.threads, call, constants_of(spatial_scale, rule, input.dtype), plan.units,
        *by_image(rois, len(input)), *buffers.values(),
    )  # fmt: skip


def maximum_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    rule: Rule,
    output_size: tuple[int, int],
    spatial_scale: float,
    grad_input: np.ndarray,
) -> None:
    """Write `grad_input`, which holds zeros; the maxima are found again."""
    plan = make_plan(
        input.shape, len(rois), None, input.dtype, rule, output_size, get_num_threads(),
        buffers=("staged", "grad_staged", "pooled", "line", "edges", "where"), lanes=LANES, backward=True,
    )  # fmt: skip
    regions = prepared(rois, None, None, dtype=input.dtype)
    call = numbers_of(plan.shape, *map(described, (input, grad_output, grad_input, *regions)))
    buffers = workspace.allocate(plan.buffers)
    run(
        backward_worker, plan.threads, call, constants_of(spatial_scale, rule, input.dtype), plan.units,
        *by_image(rois, len(input)), *buffers.values(),
    )  # fmt: skip


def argmax_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    rois: np.ndarray,
    argmax: np.ndarray,  # (R, C, PH, PW)
    *,
    rule: Rule,
    output_size: tuple[int, int],
    grad_input: np.ndarray,
) -> None:
    """Write `grad_input`, which holds zeros, by a given argmax."""
    shape = grad_input.shape
    plan = make_plan(
        shape, len(rois), None, grad_input.dtype, rule, output_size, get_num_threads(),
        buffers=("grad_staged", "pooled"), lanes=1, backward=True,
    )  # fmt: skip
    places, wrong = np.require(argmax, np.int64, ("C", "A")), np.full(plan.threads, -1, np.int64)
    call = numbers_of(plan.shape, *map(described, (places, grad_output, grad_input)))
    buffers = workspace.allocate(plan.buffers)
    run(
        argmax_backward_worker, plan.threads, call, plan.units, *by_image(rois, len(grad_input)), wrong,
        *buffers.values(),
    )  # fmt: skip
    if (wrong != -1).any():
        raise argmax_error("roi_pool", shape[2] * shape[3], int(wrong[wrong != -1][0]))
