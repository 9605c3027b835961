"""RoI pooling on the CPU: means go to roi_mean.py; maxima are worked on here.

Maximum: a thread owns slabs of 16 channels of one image, staged channels-last: one comparison serves 16 channels.
Backward: it owns the same slabs of grad_input, so nothing is written by two threads; with a given argmax it owns
planes, and no map is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.bins import peek, poke, pooled_bin
from dcn_kernels.cpu.convert import F32, F64, fetch_run
from dcn_kernels.cpu.jit import inner, kernel
from dcn_kernels.cpu.roi_blocks import expect, load_block, load_pooled, store_block, store_pooled, turn_out
from dcn_kernels.cpu.roi_lanes import LANES, SLABS, grid_argmax, grid_max, grid_maxima, rect_add, rect_sum
from dcn_kernels.cpu.roi_mean import Plan, array, buffers, extent, mean, mean_backward, plan, score_map, slabs_of
from dcn_kernels.cpu.slabs import load_pixels
from dcn_kernels.cpu.threads import barrier, claim, join, leave, run
from dcn_kernels.dispatch import roi_rules
from dcn_kernels.dispatch.shapes import argmax_error


@inner
def find_edges(s, rois, r, scale, edges, at):
    """A RoI's bins on the map into edges[at:]: the first and last rows of each ph, then the columns of each pw."""
    start_y, h, start_x, w = extent(s, rois, r, scale)
    for ph in range(s.PH):
        edges[at + 2 * ph], edges[at + 2 * ph + 1], _ = pooled_bin(s.rule, start_y, h, s.PH, ph, s.H)
    at += 2 * s.PH
    for pw in range(s.PW):
        edges[at + 2 * pw], edges[at + 2 * pw + 1], _ = pooled_bin(s.rule, start_x, w, s.PW, pw, s.W)


# ---------------------------------------------------------------- maxima


@kernel
def max_worker(
    thread, threads, sync, s, constants, units, order, first_of, rois, input, out, argmax, with_argmax,
    staged, pooled, line, edges, where,
):  # fmt: skip
    if not join(thread, sync):
        return
    images, bins, pixels = first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    zero, itemsize = constants.dtype.type(0), constants.itemsize
    block, to = staged.shape[0] // threads * thread, pooled.shape[0] // threads * thread
    edge, line_at = edges.shape[0] // threads * thread, line.shape[0] // threads * thread
    run, where0 = LANES * itemsize, where.ctypes.data + where.shape[0] // threads * thread * 8
    map0, pooled0, argmax0 = (
        staged.ctypes.data + block * itemsize,
        pooled.ctypes.data + to * itemsize,
        argmax.ctypes.data,
    )
    item = claim(sync)
    while item < images * units.shape[0] * s.chunks:
        unit = item // (images * s.chunks)
        n, chunk = item % (images * s.chunks) // s.chunks, item % s.chunks
        c0, count = units[unit, 0], units[unit, 1]
        here = first_of[n + 1] - first_of[n]
        low, high = first_of[n] + here * chunk // s.chunks, first_of[n] + here * (chunk + 1) // s.chunks
        if high > low:
            load_block(s, input, n, c0, count, staged, block, line, line_at)
        for t in range(low, high):
            r = order[t]
            find_edges(s, rois, r, constants[0], edges, edge)
            expect(out, r, c0, count)
            slabs, j = slabs_of(count), 0
            while j < slabs:
                several = SLABS if j + SLABS <= slabs and not with_argmax else 1
                for ph in range(s.PH):
                    top, bottom = edges[edge + 2 * ph], edges[edge + 2 * ph + 1]
                    for pw in range(s.PW):
                        columns = edge + 2 * (s.PH + pw)
                        left, right = edges[columns], edges[columns + 1]
                        b = ph * s.PW + pw
                        held, x = pooled0 + (j * bins + b) * run, map0 + j * pixels * run
                        if bottom <= top or right <= left:
                            for k in range(several):
                                for l in range(LANES):
                                    poke(held + k * bins * run + l * itemsize, zero)
                            for l in range(LANES):
                                poke(where0 + (b * LANES + l) * 8, np.int64(-1))
                        elif with_argmax:
                            grid_argmax(zero, held, where0 + b * LANES * 8, x, s.W, top, bottom, left, right)
                        elif several == 1:
                            grid_max(zero, held, bins * run, x, pixels * run, s.W, top, bottom, left, right)
                        else:
                            grid_maxima(zero, held, bins * run, x, pixels * run, s.W, top, bottom, left, right)
                if with_argmax:
                    at = argmax0 + (r * s.C + c0 + j * LANES) * bins * 8
                    if j * LANES + LANES <= count:
                        turn_out(0.0, 8, where0, bins, at, bins * 8)  # of 8 bytes each, whatever they mean
                    else:
                        for l in range(count - j * LANES):
                            for b in range(bins):
                                poke(at + (l * bins + b) * 8, peek(r, where0 + (b * LANES + l) * 8))
                j += several
            store_pooled(s, pooled, to, r, c0, count, out, line, line_at)
        item = claim(sync)
    leave(thread, sync)


@kernel
def max_backward_worker(
    thread, threads, sync, s, constants, units, order, first_of, rois, input, grad, grad_input,
    staged, grad_staged, pooled, line, edges, where,
):  # fmt: skip
    if not join(thread, sync):
        return
    images, bins, pixels = first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    zero, itemsize = constants.dtype.type(0), constants.itemsize
    block, size = staged.shape[0] // threads * thread, staged.shape[0] // threads
    held, edge = pooled.shape[0] // threads * thread, edges.shape[0] // threads * thread
    line_at, where0 = line.shape[0] // threads * thread, where.ctypes.data + where.shape[0] // threads * thread * 8
    run, pooled0 = LANES * itemsize, pooled.ctypes.data + held * itemsize
    map0, grad0 = staged.ctypes.data + block * itemsize, grad_staged.ctypes.data + block * itemsize
    unused = line.ctypes.data + line_at * itemsize  # where the maximum itself goes
    item = claim(sync)
    while item < images * units.shape[0]:
        unit, n = item // images, item % images
        c0, count = units[unit, 0], units[unit, 1]
        if first_of[n + 1] > first_of[n]:
            load_block(s, input, n, c0, count, staged, block, line, line_at)
            for i in range(block, block + size):
                grad_staged[i] = zero
        for t in range(first_of[n], first_of[n + 1]):
            r = order[t]
            find_edges(s, rois, r, constants[0], edges, edge)
            load_pooled(s, grad, r, c0, count, pooled, held, line, line_at)
            if t + 1 < first_of[n + 1]:
                expect(grad, order[t + 1], c0, count)
            for j in range(slabs_of(count)):
                x, target = map0 + j * pixels * run, grad0 + j * pixels * run
                for ph in range(s.PH):
                    top, bottom = edges[edge + 2 * ph], edges[edge + 2 * ph + 1]
                    for pw in range(s.PW):
                        columns = edge + 2 * (s.PH + pw)
                        left, right = edges[columns], edges[columns + 1]
                        if bottom > top and right > left:
                            grid_argmax(zero, unused, where0, x, s.W, top, bottom, left, right)
                            g = pooled0 + (j * bins + ph * s.PW + pw) * run
                            for l in range(LANES):
                                place = target + peek(r, where0 + l * 8) * run + l * itemsize
                                poke(place, peek(zero, place) + peek(zero, g + l * itemsize))
        if first_of[n + 1] > first_of[n]:
            store_block(s, grad_staged, block, n, c0, count, grad_input, line, line_at)
        item = claim(sync)
    leave(thread, sync)


@kernel
def argmax_backward_worker(
    thread, threads, sync, s, units, order, first_of, argmax, grad, grad_input, grad_staged, pooled, wrong
):
    """With a given argmax; wrong[thread] becomes an index that is no pixel's, if there is one."""
    if not join(thread, sync):
        return
    images, bins, pixels = first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    block, size = grad_staged.shape[0] // threads * thread, grad_staged.shape[0] // threads
    held, itemsize, argmax0 = pooled.shape[0] // threads * thread, pooled.itemsize, argmax.ctypes.data
    pooled0, grad0 = pooled.ctypes.data + held * itemsize, grad_staged.ctypes.data + block * itemsize
    plain = grad.kind == (F32 if itemsize == 4 else F64) and grad.s3 == itemsize and grad.s2 == s.PW * itemsize
    item = claim(sync)
    while item < images * units.shape[0]:
        unit, n = item // images, item % images
        c0, count = units[unit, 0], units[unit, 1]
        if first_of[n + 1] > first_of[n]:
            for i in range(block, block + size):
                grad_staged[i] = grad_staged.dtype.type(0)
            for t in range(first_of[n], first_of[n + 1]):
                r = order[t]
                if t + 1 < first_of[n + 1]:
                    expect(grad, order[t + 1], c0, count)
                    fetch_run(argmax0 + (order[t + 1] * s.C + c0) * bins * 8, count * bins * 8)
                for c in range(count):
                    g = grad.address + r * grad.s0 + (c0 + c) * grad.s1
                    if not plain:
                        load_pixels(pooled, held, g, grad, s.PW, 0, bins)
                        g = pooled0
                    plane, places = grad0 + c * pixels * itemsize, argmax0 + (r * s.C + c0 + c) * bins * 8
                    bad = add_at(pooled[0], itemsize, g, places, bins, plane, pixels)
                    if bad != -1:
                        wrong[thread] = bad
            store_block(s, grad_staged, block, n, c0, count, grad_input, pooled, held)
        item = claim(sync)
    leave(thread, sync)


@inner
def add_at(like, itemsize, values, places, count, plane, pixels):
    """plane[places[i]] += values[i], all addresses; returns a place that is no pixel's and not -1, or -1."""
    bad = np.int64(-1)
    for i in range(count):
        at = peek(count, places + i * 8)
        if 0 <= at < pixels:
            place = plane + at * itemsize
            poke(place, peek(like, place) + peek(like, values + i * itemsize))
        elif at != -1:
            bad = at
    return bad


# ---------------------------------------------------------------- means over pixels of score maps


@kernel
def rect_worker(
    thread, threads, sync, s, constants, units, order, first_of, rois, input, planes, out, staged, pooled, line, edges
):  # fmt: skip
    """ps_roi_pool: one channel at a time, eight pixels of a row at once. The bins' edges are found once for all."""
    if not join(thread, sync):
        return
    all_edges(sync, s, constants, rois, edges)
    maps, images, bins, pixels = s.groups_h * s.groups_w, first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    zero, one, itemsize = constants.dtype.type(0), constants.dtype.type(1), constants.itemsize
    source = planes if s.direct else staged
    at = source.shape[0] // threads * thread
    to, line_at = pooled.shape[0] // threads * thread, line.shape[0] // threads * thread
    per_roi, map0, pooled0 = edges.shape[0] // rois.shape[0], source.ctypes.data, pooled.ctypes.data + to * itemsize
    item = claim(sync)
    while item < images * units.shape[0] * s.chunks:
        unit = item // (images * s.chunks)
        n, chunk = item % (images * s.chunks) // s.chunks, item % s.chunks
        c0, count = units[unit, 0], units[unit, 1]
        here = first_of[n + 1] - first_of[n]
        low, high = first_of[n] + here * chunk // s.chunks, first_of[n] + here * (chunk + 1) // s.chunks
        if s.direct:
            at = (n * s.C + c0 * maps) * pixels
        elif high > low:
            load_block(s, input, n, c0, count, source, at, line, line_at)
        for t in range(low, high):
            r = order[t]
            edge = r * per_roi
            for ph in range(s.PH):
                top, bottom = edges[edge + 2 * ph], edges[edge + 2 * ph + 1]
                for pw in range(s.PW):
                    columns = edge + 2 * (s.PH + pw)
                    left, right = edges[columns], edges[columns + 1]
                    plane = at + score_map(s, ph, pw) * pixels + top * s.W + left
                    number = (bottom - top) * (right - left)
                    share = one / constants.dtype.type(max(number, 1))
                    first, step = map0 + plane * itemsize, maps * pixels * itemsize
                    place = pooled0 + (ph * s.PW + pw) * itemsize
                    for c in range(count):
                        total = rect_sum(zero, first + c * step, s.W, bottom - top, right - left) if number else zero
                        poke(place + c * bins * itemsize, total * share)
            store_pooled(s, pooled, to, r, c0, count, out, line, line_at)
        item = claim(sync)
    leave(thread, sync)


@kernel
def rect_backward_worker(
    thread, threads, sync, s, constants, units, order, first_of, rois, grad, grad_input, grad_planes, grad_staged,
    pooled, line, edges,
):  # fmt: skip
    if not join(thread, sync):
        return
    all_edges(sync, s, constants, rois, edges)
    maps, images, bins, pixels = s.groups_h * s.groups_w, first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    zero, one, itemsize = constants.dtype.type(0), constants.dtype.type(1), constants.itemsize
    target = grad_planes if s.direct else grad_staged
    at, size = target.shape[0] // threads * thread, target.shape[0] // threads
    held, line_at = pooled.shape[0] // threads * thread, line.shape[0] // threads * thread
    per_roi, map0, pooled0 = edges.shape[0] // rois.shape[0], target.ctypes.data, pooled.ctypes.data + held * itemsize
    item = claim(sync)
    while item < images * units.shape[0]:
        unit, n = item // images, item % images
        c0, count = units[unit, 0], units[unit, 1]
        some = first_of[n + 1] > first_of[n]
        if s.direct:
            at = (n * s.C + c0 * maps) * pixels
        elif some:
            for i in range(at, at + size):
                target[i] = zero
        for t in range(first_of[n], first_of[n + 1]):
            r = order[t]
            edge = r * per_roi
            load_pooled(s, grad, r, c0, count, pooled, held, line, line_at)
            if t + 1 < first_of[n + 1]:
                expect(grad, order[t + 1], c0, count)
            for ph in range(s.PH):
                top, bottom = edges[edge + 2 * ph], edges[edge + 2 * ph + 1]
                for pw in range(s.PW):
                    columns = edge + 2 * (s.PH + pw)
                    left, right = edges[columns], edges[columns + 1]
                    plane = at + score_map(s, ph, pw) * pixels + top * s.W + left
                    number = (bottom - top) * (right - left)
                    share = one / constants.dtype.type(max(number, 1))
                    first, step = map0 + plane * itemsize, maps * pixels * itemsize
                    place = pooled0 + (ph * s.PW + pw) * itemsize
                    for c in range(count if number else 0):
                        value = peek(zero, place + c * bins * itemsize) * share
                        rect_add(value, first + c * step, s.W, bottom - top, right - left)
        if some and not s.direct:
            store_block(s, target, at, n, c0, count, grad_input, line, line_at)
        item = claim(sync)
    leave(thread, sync)


@inner
def all_edges(sync, s, constants, rois, edges):
    """Every RoI's edges, found by all threads together."""
    per_roi = edges.shape[0] // rois.shape[0]
    r = claim(sync)
    while r < rois.shape[0]:
        find_edges(s, rois, r, constants[0], edges, r * per_roi)
        r = claim(sync)
    barrier(sync)


# ---------------------------------------------------------------- from Python


def roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    mode: str,
    return_argmax: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Returns (R, C, PH, PW), and the argmax."""
    rule = roi_rules.roi_pool(mode)
    if mode == "avg":
        return mean(input, rois, out=out, rule=rule, output_size=output_size, spatial_scale=spatial_scale)
    shape = (len(rois), input.shape[1], *output_size)
    if out is None:
        out = np.empty(shape, input.dtype)
    argmax = np.empty((*shape[:2], shape[2] * shape[3]) if return_argmax else (0, 0, 0), np.int64)
    if out.size:
        p = plan(input, rois, None, None, rule=rule, output_size=output_size, spatial_scale=spatial_scale, lanes=LANES)
        b = buffers(p, ("staged",))
        e = _bin_buffers(p)
        run(
            max_worker, p.threads, p.shape, p.constants, p.units, p.order, p.first_of, p.rois, array(input),
            array(out), argmax, int(return_argmax), b["staged"], b["pooled"], b["line"], e["edges"], e["where"],
        )  # fmt: skip
    return (out, argmax.reshape(shape)) if return_argmax else out


def _bin_buffers(p: Plan) -> dict[str, np.ndarray]:
    """Each thread's edges of a RoI's bins, and the places of the maxima of one slab."""
    s = p.shape
    lengths = {"edges": 2 * (s.PH + s.PW), "where": s.PH * s.PW * LANES}
    return workspace.allocate({name: ((p.threads * length,), np.int64) for name, length in lengths.items()})


def roi_pool_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    argmax: np.ndarray | None = None,  # (R, C, PH, PW)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    mode: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    options: dict[str, Any] = {
        "rule": roi_rules.roi_pool(mode),
        "output_size": output_size,
        "spatial_scale": spatial_scale,
    }
    if mode == "avg":
        return mean_backward(grad_output, input, rois, wrt=wrt, **options)
    grad_input = np.zeros(input.shape, input.dtype)
    if grad_output.size == 0:
        return {"input": grad_input}
    given = argmax is not None
    p = plan(input, rois, None, None, lanes=1 if given else LANES, **options)
    p = p._replace(shape=p.shape._replace(direct=0))
    b = buffers(p, ("grad_staged",) if given else ("staged", "grad_staged"))
    if argmax is not None:
        wrong = np.full(p.threads, -1, np.int64)
        places = np.ascontiguousarray(argmax).reshape(*argmax.shape[:2], -1)
        run(
            argmax_backward_worker, p.threads, p.shape, p.units, p.order, p.first_of, places, array(grad_output),
            array(grad_input), b["grad_staged"], b["pooled"], wrong,
        )  # fmt: skip
        if (wrong != -1).any():
            raise argmax_error("roi_pool", input.shape[2] * input.shape[3], int(wrong[wrong != -1][0]))
        return {"input": grad_input}
    e = _bin_buffers(p)
    run(
        max_backward_worker, p.threads, p.shape, p.constants, p.units, p.order, p.first_of, p.rois, array(input),
        array(grad_output), array(grad_input), b["staged"], b["grad_staged"], b["pooled"], b["line"], e["edges"],
        e["where"],
    )  # fmt: skip
    return {"input": grad_input}


def ps_roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C/(G*G), PH, PW)."""
    if out is None:
        out = np.empty((len(rois), input.shape[1] // (group_size[0] * group_size[1]), *output_size), input.dtype)
    if out.size:
        rule = roi_rules.ps_roi_pool(group_size, convention)
        p = plan(input, rois, None, None, rule=rule, output_size=output_size, spatial_scale=spatial_scale, lanes=1)
        b = buffers(p, ("staged",))
        run(
            rect_worker, p.threads, p.shape, p.constants, p.units, p.order, p.first_of, p.rois, array(input), p.planes,
            array(out), b["staged"], b["pooled"], b["line"], _all_edges(p),
        )  # fmt: skip
    return out


def _all_edges(p: Plan) -> np.ndarray:
    length = len(p.rois) * 2 * (p.shape.PH + p.shape.PW)
    return workspace.allocate({"edges": ((length,), np.int64)})["edges"]


def ps_roi_pool_backward(
    grad_output: np.ndarray,  # (R, C/(G*G), PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    grad_input = np.zeros(input.shape, input.dtype)
    if grad_output.size:
        rule = roi_rules.ps_roi_pool(group_size, convention)
        sizes: dict[str, Any] = {"output_size": output_size, "spatial_scale": spatial_scale}
        p = plan(input, rois, None, None, rule=rule, **sizes, lanes=1, backward=True)
        b = buffers(p, ("grad_staged",))
        grad_planes = grad_input.reshape(-1) if p.shape.direct else np.empty(0, p.constants.dtype)
        run(
            rect_backward_worker, p.threads, p.shape, p.constants, p.units, p.order, p.first_of, p.rois,
            array(grad_output), array(grad_input), grad_planes, b["grad_staged"], b["pooled"], b["line"],
            _all_edges(p),
        )  # fmt: skip
    return {"input": grad_input}


def roi_align(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C, PH, PW)."""
    rule = roi_rules.roi_align(sampling_ratio, aligned)
    return mean(input, rois, out=out, rule=rule, output_size=output_size, spatial_scale=spatial_scale)


def roi_align_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    sizes: dict[str, Any] = {"output_size": output_size, "spatial_scale": spatial_scale}
    return mean_backward(grad_output, input, rois, wrt=wrt, rule=roi_rules.roi_align(sampling_ratio, aligned), **sizes)


def ps_roi_align(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C/(PH*PW), PH, PW)."""
    rule = roi_rules.ps_roi_align(output_size, sampling_ratio)
    return mean(input, rois, out=out, rule=rule, output_size=output_size, spatial_scale=spatial_scale)


def ps_roi_align_backward(
    grad_output: np.ndarray,  # (R, C/(PH*PW), PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    rule = roi_rules.ps_roi_align(output_size, sampling_ratio)
    sizes: dict[str, Any] = {"output_size": output_size, "spatial_scale": spatial_scale}
    return mean_backward(grad_output, input, rois, wrt=wrt, rule=rule, **sizes)
