"""The feature map resampled at each pixel plus an offset, on the CPU: y_c(p) = x_c(p + dp_g(p)).

A group of channels shares its positions, down to one channel with a field of its own, so the loops run over pixels:
the corners of a tile of pixels once, then each channel's plane is read at them. An owner takes a batch of one group's
channels of one image. Backward, the owner adds to these channels' gradients alone; the sums over channels for the
offset are kept per owner and added up in order, so results do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.columns import SHAPE_FIELDS, Shape, positions, shape_from, write_coordinate_gradients
from dcn_kernels.cpu.convert import store_run
from dcn_kernels.cpu.jit import inner, kernel, stay_apart
from dcn_kernels.cpu.sampling import SLOPE, VALUE, corner_table, limits_of
from dcn_kernels.cpu.slabs import array_from, described, load_pixels, numbers_of
from dcn_kernels.cpu.threads import barrier, claim, join, leave, run, threads_for
from dcn_kernels.dtypes import accumulator

TILE = 512  # pixels whose corners are held at once
BATCH = 8  # channels that share them
RANGES = 8  # owners, at least, of an image with few offset groups


@inner
def read_plane(plane, index, weight, count, values):
    """values[p] = sum_q w_q x(q)."""
    stay_apart()
    for p in range(count):
        upper = weight[0, 0, p] * plane[np.uint32(index[0, 0, p])] + weight[0, 1, p] * plane[np.uint32(index[0, 1, p])]
        lower = weight[0, 2, p] * plane[np.uint32(index[0, 2, p])] + weight[0, 3, p] * plane[np.uint32(index[0, 3, p])]
        values[p] = upper + lower


@inner
def add_dots(plane, index, g, count, dots):
    """dots[p, q] += g[p] x(q)."""
    stay_apart()
    for p in range(count):
        for q in range(4):
            dots[p, q] += g[p] * plane[np.uint32(index[0, q, p])]


@inner
def add_to_plane(grad_plane, index, weight, g, count):
    """grad_x(q) += w_q g[p]."""
    stay_apart()
    for p in range(count):
        for q in range(4):
            grad_plane[np.uint32(index[0, q, p])] += weight[0, q, p] * g[p]


@kernel
def forward_worker(
    thread, threads, sync,
    numbers,  # a Shape and four Arrays
    limits,
    planes,  # (threads, BATCH, H*W + 1)
    index,  # (threads, 1, 4, TILE)
    factor,  # (threads, 1, 4, TILE)
    lines,  # (threads, 4, TILE)
):  # fmt: skip
    """One thread of the forward: it owns a batch of one group's channels of one image at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    input, offset = array_from(arrays, 0), array_from(arrays, 1)
    no_mask, out = array_from(arrays, 2), array_from(arrays, 3)
    per_group, pixels = s.C // s.OG, s.H * s.W
    batches = (per_group + BATCH - 1) // BATCH
    y, x, m, values = lines[thread, 0], lines[thread, 1], lines[thread, 2], lines[thread, 3]
    item = claim(sync)
    while item < s.N * s.OG * batches:
        n, g, batch = item // (s.OG * batches), item // batches % s.OG, item % batches
        first, several = g * per_group + batch * BATCH, min(BATCH, per_group - batch * BATCH)
        for c in range(several):
            plane = planes[thread, c]
            load_pixels(plane, 0, input.address + n * input.s0 + (first + c) * input.s1, input, s.W, 0, pixels)
            plane[pixels] = 0
        for start in range(0, pixels, TILE):
            count = min(TILE, pixels - start)
            positions(s, offset, no_mask, n, g, 0, start, count, y, x, m)
            corner_table(VALUE, y, x, m, count, s.H, s.W, limits, index[thread], factor[thread], 0)
            for c in range(several):
                read_plane(planes[thread, c], index[thread], factor[thread], count, values)
                store_run(values, 0, count, out.address + ((n * s.C + first + c) * pixels + start) * out.s3, out.kind)
        item = claim(sync)
    leave(thread, sync)


@kernel
def backward_worker(
    thread, threads, sync,
    numbers,  # a Shape and six Arrays
    limits,
    planes,  # (threads, BATCH, H*W + 1)
    grad_planes,  # (threads, BATCH, H*W + 1)
    part,  # (OG * ranges, H*W, 4): dots of one image; (threads, ...) where a group has one owner
    index,  # (threads, 1, 4, TILE)
    factor,  # (threads, 1, 4, TILE)
    lines,  # (threads, 6, TILE)
):  # fmt: skip
    """One thread of the backward: it owns a range of one group's channels at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    grad_output, input, offset = array_from(arrays, 0), array_from(arrays, 1), array_from(arrays, 2)
    no_mask, grad_input, grad_offset = array_from(arrays, 3), array_from(arrays, 4), array_from(arrays, 5)
    per_group, pixels = s.C // s.OG, s.H * s.W
    y, x, m, values = lines[thread, 0], lines[thread, 1], lines[thread, 2], lines[thread, 3]
    zero = y.dtype.type(0)
    tiles = (pixels + TILE - 1) // TILE
    for n in range(s.N):
        item = claim(sync)
        while item < s.OG * s.ranges:
            g, r = item // s.ranges, item % s.ranges
            row = thread if s.ranges == 1 else item
            if grad_offset.address != 0:
                part[row] = zero
            end = g * per_group + per_group * (r + 1) // s.ranges
            for first in range(g * per_group + per_group * r // s.ranges, end, BATCH):
                several = min(BATCH, end - first)
                for c in range(several):
                    plane = planes[thread, c]
                    load_pixels(plane, 0, input.address + n * input.s0 + (first + c) * input.s1, input, s.W, 0, pixels)
                    plane[pixels] = zero
                    if grad_input.address != 0:
                        grad_planes[thread, c] = zero
                for start in range(0, pixels, TILE):
                    count = min(TILE, pixels - start)
                    positions(s, offset, no_mask, n, g, 0, start, count, y, x, m)
                    corner_table(SLOPE, y, x, m, count, s.H, s.W, limits, index[thread], factor[thread], 0)
                    for c in range(several):
                        base = grad_output.address + n * grad_output.s0 + (first + c) * grad_output.s1
                        load_pixels(values, 0, base, grad_output, s.W, start, count)
                        if grad_offset.address != 0:
                            add_dots(planes[thread, c], index[thread], values, count, part[row, start:])
                        if grad_input.address != 0:
                            add_to_plane(grad_planes[thread, c], index[thread], factor[thread], values, count)
                if grad_input.address != 0:
                    for c in range(several):
                        to = grad_input.address + (n * s.C + first + c) * pixels * grad_input.s3
                        store_run(grad_planes[thread, c], 0, pixels, to, grad_input.kind)
            if s.ranges == 1 and grad_offset.address != 0:  # the group is complete
                for start in range(0, pixels, TILE):
                    write_coordinate_gradients(
                        s, limits, offset, no_mask, n, g, 0, start, min(TILE, pixels - start), part, row, start,
                        grad_offset, no_mask, lines[thread],
                    )  # fmt: skip
            item = claim(sync)
        barrier(sync)
        item = claim(sync)
        while item < s.OG * tiles and s.ranges > 1 and grad_offset.address != 0:
            g, start = item // tiles, item % tiles * TILE
            write_coordinate_gradients(
                s, limits, offset, no_mask, n, g, 0, start, min(TILE, pixels - start), part, g * s.ranges, start,
                grad_offset, no_mask, lines[thread],
            )  # fmt: skip
            item = claim(sync)
        barrier(sync)
    leave(thread, sync)


def offset_sample2d(
    input: np.ndarray,  # (N, C, H, W)
    offset: np.ndarray,  # (N, 2*OG, H, W)
    *,
    border: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (N, C, H, W)."""
    if out is None:
        out = np.empty(input.shape, input.dtype)
    if out.size == 0:
        return out
    shape, real = _shape(input, offset), accumulator(input.dtype)
    threads = min(threads_for(32.0 * out.size), shape.N * shape.C)
    wanted: workspace.Buffers = {
        "planes": ((threads, BATCH, shape.H * shape.W + 1), real),
        "index": ((threads, 1, 4, TILE), np.int32),
        "factor": ((threads, 1, 4, TILE), real),
        "lines": ((threads, 4, TILE), real),
    }
    buffers = workspace.allocate(wanted)
    rule = limits_of(border, shape.H, shape.W, real)
    arrays = (described(input), described(offset), described(None), described(out))
    run(forward_worker, threads, numbers_of(shape, *arrays), rule, *buffers.values())
    return out


def offset_sample2d_backward(
    grad_output: np.ndarray,  # (N, C, H, W)
    input: np.ndarray,
    offset: np.ndarray,
    *,
    border: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    given = {"input": input, "offset": offset}
    grads = {name: np.empty(given[name].shape, given[name].dtype) for name in wrt}
    if input.size == 0:
        return grads
    shape, real = _shape(input, offset), accumulator(input.dtype)
    ranges = max(1, min(RANGES // shape.OG, shape.C // shape.OG))
    threads = min(threads_for(64.0 * input.size), shape.OG * ranges)
    owners = threads if ranges == 1 else shape.OG * ranges  # of dots at one time
    plane = (threads, BATCH, shape.H * shape.W + 1)
    wanted: workspace.Buffers = {
        "planes": (plane, real),
        "grad_planes": (plane if "input" in wrt else (0, BATCH, 0), real),
        "part": ((owners if "offset" in wrt else 0, shape.H * shape.W, 4), real),
        "index": ((threads, 1, 4, TILE), np.int32),
        "factor": ((threads, 1, 4, TILE), real),
        "lines": ((threads, 6, TILE), real),
    }
    buffers = workspace.allocate(wanted)
    rule = limits_of(border, shape.H, shape.W, real)
    arrays = [described(each) for each in (grad_output, input, offset, None)]
    outputs = [described(grads.get(name)) for name in ("input", "offset")]
    shape = shape._replace(ranges=ranges)
    run(backward_worker, threads, numbers_of(shape, *arrays, *outputs), rule, *buffers.values())
    return grads


def _shape(input: np.ndarray, offset: np.ndarray) -> Shape:
    """A convolution of one tap that stays in place, which is what `positions` needs to know."""
    N, C, H, W = input.shape
    if H * W >= 2**31 - 1:
        raise ValueError(f"offset_sample2d: input: expected H*W below 2**31 - 1 on the CPU backend, got {H}*{W}")
    return Shape(
        N=N, C=C, H=H, W=W, O=C, KH=1, KW=1, OH=H, OW=W, OG=offset.shape[1] // 2, groups=1,
        stride_h=1, stride_w=1, padding_h=0, padding_w=0, dilation_h=1, dilation_w=1,
        lanes=1, images=1, tile=TILE, width=1, panel=1, ranges=1,
    )  # fmt: skip
