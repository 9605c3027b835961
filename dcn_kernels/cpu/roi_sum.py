"""Sums over the pixels of bins of score maps, divided by how many they are: ps_roi_pool.

A bin is a rectangle of whole pixels of one map: one channel is taken at a time, eight pixels of a row at once. The
bins' edges are found once for all channels.
"""

from __future__ import annotations

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.bins import peek, poke, size_of
from dcn_kernels.cpu.convert import address_of, clear
from dcn_kernels.cpu.jit import inner, kernel, stay_apart
from dcn_kernels.cpu.roi_blocks import expect, load_block, load_pooled, store_block, store_pooled
from dcn_kernels.cpu.roi_lanes import rect_add, rect_sum
from dcn_kernels.cpu.roi_plan import (
    SHAPE_FIELDS,
    by_image,
    constants_of,
    edge_pair,
    find_edges,
    in_place,
    make_plan,
    map_step,
    piece,
    pieces,
    prepared,
    regions_from,
    score_map,
    shape_from,
)
from dcn_kernels.cpu.slabs import array_from, described, numbers_of
from dcn_kernels.cpu.threads import barrier, claim, get_num_threads, join, leave, run
from dcn_kernels.dispatch.roi_rules import Rule


@inner
def find_all_edges(sync, s, regions, edges):
    """Every RoI's edges, found by all threads together."""
    stay_apart()
    r = claim(sync)
    while r < s.R:
        find_edges(s, regions, r, address_of(edges, r, 0))
        r = claim(sync)
    barrier(sync)


@kernel
def forward_worker(
    thread, threads, sync,
    numbers,  # a Shape and the Arrays input, out, rois, and absent ones for offset and mask
    constants,  # (2,): spatial_scale, and a factor that nothing here uses
    units,  # (units, 4)
    order,  # (R,)
    first_of,  # (N + 1,)
    staged,  # (threads, elements of a unit's maps)
    pooled,  # (threads, a unit's channels * bins)
    line,  # (threads, 64 * 16)
    edges,  # (R, 2 * (PH + PW))
):  # fmt: skip
    """One thread of the forward: it owns the channels of a unit in some RoIs of one image at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    input, out, regions = array_from(arrays, 0), array_from(arrays, 1), regions_from(arrays, 2, constants)
    own_maps, own_pooled, own_line = staged[thread], pooled[thread], line[thread]
    find_all_edges(sync, s, regions, edges)
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
            roi_edges = address_of(edges, order[t], 0)
            roi_sums(s, regions.scale, count, maps, roi_edges, address_of(own_pooled, 0, 0))
            store_pooled(s, own_pooled, order[t], work.first, count, out, own_line)
        item = claim(sync)
    leave(thread, sync)


@inner
def roi_sums(s, like, count, maps, edges, pooled):
    """pooled[channel, bin] = the means of `count` channels over a RoI's bins; `like` is of the type of sums."""
    stay_apart()
    zero, one, itemsize = type(like)(0), type(like)(1), size_of(like)
    bins, plane, step = s.PH * s.PW, s.H * s.W, map_step(s, itemsize)
    for ph in range(s.PH):
        top, bottom = edge_pair(edges, ph)
        for pw in range(s.PW):
            left, right = edge_pair(edges, s.PH + pw)
            number = (bottom - top) * (right - left)
            share = one / type(like)(max(number, 1))
            first = maps + (score_map(s, ph, pw) * plane + top * s.W + left) * itemsize
            to = pooled + (ph * s.PW + pw) * itemsize
            if number:
                rectangles(share, count, first, step, s.W, bottom - top, right - left, to, bins * itemsize)
            else:
                for c in range(count):
                    poke(to + c * bins * itemsize, zero)


@inner
def rectangles(share, count, first, step, width, rows, columns, to, to_step):
    """to[channel] = share times the sum of a rectangle of each channel; all but shapes and share are addresses and
    steps in bytes. Apart from the loops over bins it has the registers to itself."""
    stay_apart()
    for c in range(count):
        poke(to + c * to_step, rect_sum(share, first + c * step, width, rows, columns) * share)


@kernel
def backward_worker(
    thread, threads, sync,
    numbers,  # a Shape and the Arrays grad_output, grad_input, rois, and absent ones for offset and mask
    constants,  # (2,): spatial_scale, and a factor that nothing here uses
    units,  # (units, 4)
    order,  # (R,)
    first_of,  # (N + 1,)
    grad_staged,  # (threads, elements of a unit's maps)
    pooled,  # (threads, a unit's channels * bins): grad_output
    line,  # (threads, 64 * 16)
    edges,  # (R, 2 * (PH + PW))
):  # fmt: skip
    """One thread of the backward: it owns the channels of a unit of one image at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    grad_output, grad_input = array_from(arrays, 0), array_from(arrays, 1)
    regions = regions_from(arrays, 2, constants)
    own_grads, own_pooled, own_line = grad_staged[thread], pooled[thread], line[thread]
    find_all_edges(sync, s, regions, edges)
    item = claim(sync)
    while item < pieces(s, units):
        work = piece(s, units, first_of, item)
        count = work.last - work.first
        if s.in_place:
            grads = in_place(s, grad_input, work.n, work.first, size_of(regions.scale))
        else:
            grads = address_of(own_grads, 0, 0)
            clear(grads, own_grads.size * size_of(regions.scale))
        for t in range(work.low, work.high):
            load_pooled(s, grad_output, order[t], work.first, count, own_pooled, own_line)
            if t + 1 < work.high:
                expect(grad_output, order[t + 1], work.first, count)
            roi_edges = address_of(edges, order[t], 0)
            roi_gradients(s, regions.scale, count, address_of(own_pooled, 0, 0), roi_edges, grads)
        if work.high > work.low and not s.in_place:
            store_block(s, own_grads, work.n, work.first, count, grad_input, own_line)
        item = claim(sync)
    leave(thread, sync)


@inner
def roi_gradients(s, like, count, pooled, edges, grads):
    """Add pooled[channel, bin], a RoI's gradients, to those of the bins' pixels: the transpose of roi_sums."""
    stay_apart()
    one, itemsize = type(like)(1), size_of(like)
    bins, plane, step = s.PH * s.PW, s.H * s.W, map_step(s, itemsize)
    for ph in range(s.PH):
        top, bottom = edge_pair(edges, ph)
        for pw in range(s.PW):
            left, right = edge_pair(edges, s.PH + pw)
            number = (bottom - top) * (right - left)
            share = one / type(like)(max(number, 1))
            first = grads + (score_map(s, ph, pw) * plane + top * s.W + left) * itemsize
            g = pooled + (ph * s.PW + pw) * itemsize
            if number:
                add_to_rectangles(share, count, first, step, s.W, bottom - top, right - left, g, bins * itemsize)


@inner
def add_to_rectangles(share, count, first, step, width, rows, columns, g, g_step):
    """Add share times g[channel] to a rectangle of each channel: the transpose of `rectangles`."""
    stay_apart()
    for c in range(count):
        rect_add(peek(share, g + c * g_step) * share, first + c * step, width, rows, columns)


# ---------------------------------------------------------------- from Python


def pixel_mean(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    rule: Rule,
    output_size: tuple[int, int],
    spatial_scale: float,
    out: np.ndarray,  # (R, C/maps, PH, PW)
) -> None:
    """Write `out`."""
    plan = make_plan(
        input.shape, len(rois), None, input.dtype, rule, output_size, get_num_threads(),
        buffers=("staged", "pooled", "line", "all_edges"), lanes=1,
        contiguous=input.flags.c_contiguous and input.flags.aligned,
    )  # fmt: skip
    regions = prepared(rois, None, None, dtype=input.dtype)
    call = numbers_of(plan.shape, *map(described, (input, out, *regions)))
    buffers = workspace.allocate(plan.buffers)
    run(
        forward_worker, plan.threads, call, constants_of(spatial_scale, rule, input.dtype), plan.units,
        *by_image(rois, len(input)), *buffers.values(),
    )  # fmt: skip


def pixel_mean_backward(
    grad_output: np.ndarray,  # (R, C/maps, PH, PW)
    rois: np.ndarray,
    *,
    rule: Rule,
    output_size: tuple[int, int],
    spatial_scale: float,
    grad_input: np.ndarray,  # (N, C, H, W)
) -> None:
    """Write `grad_input`, which holds zeros."""
    plan = make_plan(
        grad_input.shape, len(rois), None, grad_input.dtype, rule, output_size, get_num_threads(),
        buffers=("grad_staged", "pooled", "line", "all_edges"), lanes=1, contiguous=True, backward=True,
    )  # fmt: skip
    regions = prepared(rois, None, None, dtype=grad_input.dtype)
    call = numbers_of(plan.shape, *map(described, (grad_output, grad_input, *regions)))
    buffers = workspace.allocate(plan.buffers)
    run(
        backward_worker, plan.threads, call, constants_of(spatial_scale, rule, grad_input.dtype), plan.units,
        *by_image(rois, len(grad_input)), *buffers.values(),
    )  # fmt: skip
