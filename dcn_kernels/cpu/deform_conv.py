"""Deformable convolution on the CPU: columns sampled a tile at a time straight into the operand of the product.

    y[o, p] = b[o] + sum_(c, k) w[o, c, k] column[p, (c, k)],   column = m x(p0 + p_k + dp_k)

The image is staged in slabs of channels (slabs.py): a sample is four runs of lanes. A step of the product is one
(slab, tap); its steps in order are its depth.

Forward: a thread owns a tile of output pixels. Backward (deform_conv_backward.py): a thread owns a range of slabs.
Results do not depend on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.columns import SHAPE_FIELDS, Shape, Wanted, load_filter, positions, sample_columns, shape_from
from dcn_kernels.cpu.convert import address_of, clear, load_run, store_run
from dcn_kernels.cpu.deform_conv_backward import backward_worker
from dcn_kernels.cpu.gemm import CACHE_BYTES, DEPTH, LDA, MR, panel, rows_by_panels, vector
from dcn_kernels.cpu.jit import inner, kernel, stay_apart
from dcn_kernels.cpu.sampling import VALUE, corner_table, limits_of
from dcn_kernels.cpu.slabs import Slabs, array_from, cut, described, numbers_of, round_up, stage, staged_pixels, turn
from dcn_kernels.cpu.threads import barrier, claim, get_num_threads, join, leave, run, threads_for
from dcn_kernels.dtypes import accumulator

FILTERS = 8  # packed together


@inner
def pack_weights(s, weight, group, j, slabs, of_group, packed, lines):
    """Output channels j .. j + panel of one group as panels [pass][step, lane][o] of the product's operand B."""
    stay_apart()
    taps, per_group = s.KH * s.KW, s.O // s.groups
    first_slab, last_slab = of_group[group], of_group[group + 1]
    padded = round_up(per_group, s.width)
    width = min(s.panel, padded - j)
    given = min(width, per_group - j)
    steps = DEPTH // s.lanes  # of one pass
    total = (last_slab - first_slab) * taps
    base = of_group[group] * taps * s.lanes * padded
    size = s.lanes * taps  # of one filter's part of a slab
    for slab in range(first_slab, last_slab):
        count, channel = slabs[slab, 1], slabs[slab, 0] - slabs[first_slab, 0]
        first = (slab - first_slab) * taps
        for i0 in range(0, width, FILTERS):
            filters = min(FILTERS, width - i0)
            clear(address_of(lines, 0, 0), filters * size * lines.itemsize)  # what is not given is 0
            for i in range(min(filters, given - i0)):
                load_filter(s, weight, group * per_group + j + i0 + i, channel, count, lines, i * size)
            start = first // steps * steps  # of its pass
            for k in range(taps):
                if first + k == start + steps:
                    start += steps
                to = base + start * s.lanes * padded + j * min(steps, total - start) * s.lanes
                to += (first + k - start) * s.lanes * width + i0
                for c in range(s.lanes):
                    for i in range(filters):
                        packed[to + c * width + i] = lines[i * size + c * taps + k]


@inner
def write_tile(s, sums, bias, out, n, o, count, start, length, block):
    """out[n, o : o + count, start : start + length] = sums^T + bias; out is C-contiguous."""
    stay_apart()
    pixels = s.OH * s.OW
    itemsize = out.s3
    for o16 in range(0, count, 16):
        several = min(16, count - o16)
        for p64 in range(0, length, 64):
            few = min(64, length - p64)
            source, target = address_of(sums, p64, o16), address_of(block, 0, 0)
            turn(block[0], sums.itemsize, 16, source, sums.shape[1], target, 64, few, 16)
            for i in range(several):
                if bias.address != 0:
                    load_run(block, 16 * 64, bias.address + (o + o16 + i) * bias.s0, 0, 1, bias.kind)
                    b, line = block[16 * 64], block[i * 64 : i * 64 + few]
                    for p in range(few):
                        line[p] += b
                to = out.address + ((n * s.O + o + o16 + i) * pixels + start + p64) * itemsize
                store_run(block, i * 64, few, to, out.kind)


@kernel
def forward_worker(
    thread, threads, sync,
    numbers,  # a Shape and six Arrays: one array of numbers costs a call far less than 60 of them
    slabs, of_group, limits,
    packed,  # (depth of all steps * padded outputs,): B of the product
    staged,  # (images, slabs, staged_pixels, lanes)
    columns,  # (threads, tile, LDA): A of the product
    sums,  # (threads, tile, padded outputs of a group): C
    index,  # (threads, OG*K, 4, tile): corner pixels
    factor,  # (threads, OG*K, 4, tile): their weights
    lines,  # (threads, 3, tile): y, x, m
    blocks,  # (threads, 16*64 + 64 or FILTERS*lanes*K)
):  # fmt: skip
    """One thread of the forward: a thread owns a tile of output pixels at a time."""
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS:]
    input, offset, mask = array_from(arrays, 0), array_from(arrays, 1), array_from(arrays, 2)
    weight, bias, out = array_from(arrays, 3), array_from(arrays, 4), array_from(arrays, 5)
    taps, pixels, per_group = s.KH * s.KW, s.OH * s.OW, s.O // s.groups
    itemsize = columns.itemsize
    column, total, block = columns[thread], sums[thread], blocks[thread]
    corners, weights = index[thread], factor[thread]
    y, x, m = lines[thread, 0], lines[thread, 1], lines[thread, 2]
    like = block[0]
    padded = round_up(per_group, s.width)
    panels = (padded + s.panel - 1) // s.panel
    tiles = (pixels + s.tile - 1) // s.tile
    steps = DEPTH // s.lanes  # of one pass
    for image in range(0, s.N, s.images):
        images = min(s.images, s.N - image)
        to_pack = s.groups * panels if image == 0 else 0
        to_stage = images * slabs.shape[0]
        item = claim(sync)
        while item < to_pack + to_stage:
            if item < to_pack:
                pack_weights(s, weight, item // panels, item % panels * s.panel, slabs, of_group, packed, block)
            else:
                b, slab = (item - to_pack) // slabs.shape[0], (item - to_pack) % slabs.shape[0]
                stage(s, input, image + b, b, slab, slabs, staged, block)
            item = claim(sync)
        barrier(sync)
        item = claim(sync)
        while item < images * tiles:
            b, start = item // tiles, item % tiles * s.tile
            count = min(s.tile, pixels - start)
            for g in range(s.OG):
                for k in range(taps):
                    positions(s, offset, mask, image + b, g, k, start, count, y, x, m)
                    corner_table(VALUE, y, x, m, count, s.H, s.W, limits, corners, weights, g * taps + k)
            # rows up to a whole block are multiplied too: zeros, as denormals would be slow
            clear(address_of(column, count, 0), (round_up(count, MR) - count) * LDA * itemsize)
            for group in range(s.groups):
                clear(address_of(total, 0, 0), round_up(count, MR) * total.shape[1] * itemsize)
                first_step, last_step = of_group[group] * taps, of_group[group + 1] * taps
                for step in range(first_step, last_step, steps):
                    depth = min(steps, last_step - step) * s.lanes
                    for i in range(min(steps, last_step - step)):
                        slab, k = (step + i) // taps, (step + i) % taps
                        source, row = address_of(staged, b, slab), slabs[slab, 3] * taps + k
                        sample_columns(s, source, corners, weights, row, count, column, i * s.lanes)
                    operand = address_of(packed, 0, 0) + step * s.lanes * padded * itemsize
                    rows_by_panels(
                        like, itemsize, address_of(column, 0, 0), count, depth, operand, padded,
                        address_of(total, 0, 0), total.shape[1],
                    )  # fmt: skip
                write_tile(s, total, bias, out, image + b, group * per_group, per_group, start, count, block)
            item = claim(sync)
        barrier(sync)
    leave(thread, sync)


TILE_BYTES = min(max(CACHE_BYTES, 256 << 10), 2 << 20) * 3 // 4  # of one thread's tile
STAGE_BYTES = 4 << 20  # of staged images, where several small ones fit


def deform_conv2d(
    input: np.ndarray,  # (N, C, H, W)
    offset: np.ndarray,  # (N, 2*OG*KH*KW, OH, OW)
    weight: np.ndarray,  # (O, C/groups, KH, KW)
    bias: np.ndarray | None,  # (O,)
    mask: np.ndarray | None,  # (N, OG*KH*KW, OH, OW)
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Eq. 2. Returns (N, O, OH, OW)."""
    if out is None:
        out = np.empty((input.shape[0], weight.shape[0], *offset.shape[2:]), input.dtype)
    if out.size == 0:
        return out
    plan = _forward(
        input.shape, offset.shape, weight.shape, input.dtype, stride, padding, dilation, get_num_threads()
    )  # fmt: skip
    buffers = workspace.allocate(plan.buffers)
    rule = limits_of(border, *input.shape[2:], accumulator(input.dtype))
    call = numbers_of(
        plan.shape, described(input), described(offset), described(mask), described(weight), described(bias),
        described(out),
    )  # fmt: skip
    run(forward_worker, plan.threads, call, plan.slabs.table, plan.slabs.of_group, rule, *buffers.values())
    return out


class Plan(NamedTuple):
    """What follows from the shapes of a call alone."""

    shape: Shape
    slabs: Slabs
    threads: int
    buffers: workspace.Layout


@lru_cache(maxsize=256)  # a layer is called again and again with the same shapes
def _forward(
    input: tuple[int, ...],
    offset: tuple[int, ...],
    weight: tuple[int, ...],
    dtype: np.dtype,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    available: int,  # threads
) -> Plan:
    real = accumulator(dtype)
    slabs, shape = _cut(input, offset, weight, stride, padding, dilation, real.itemsize)
    per_group = shape.O // shape.groups
    padded = -(-per_group // shape.width) * shape.width
    pixels, taps = shape.OH * shape.OW, shape.KH * shape.KW
    threads = threads_for(2.0 * prod(weight) * shape.N * pixels, available)
    bytes_per_pixel = (padded + LDA + 8 * shape.OG * taps) * real.itemsize
    fitting = max(1, TILE_BYTES // (bytes_per_pixel * MR)) * MR
    tiles = -(-pixels // fitting)
    share = -(-tiles * shape.N // threads) * threads / shape.N  # tiles of an image such that all threads have as many
    tile = min(fitting, -(-pixels // (max(tiles, share) * MR)) * MR)
    shape = shape._replace(tile=int(tile))
    threads = min(threads, shape.N * -(-pixels // shape.tile))
    buffers: workspace.Buffers = {
        "packed": ((len(slabs.table) * taps * shape.lanes * padded,), real),
        "staged": ((shape.images, len(slabs.table), staged_pixels(shape.H, shape.W), shape.lanes), real),
        "columns": ((threads, shape.tile, LDA), real),
        "sums": ((threads, -(-shape.tile // 16) * 16, -(-padded // 16) * 16), real),  # read in blocks of 16 by 16
        "index": ((threads, shape.OG * taps, 4, shape.tile), np.int32),
        "factor": ((threads, shape.OG * taps, 4, shape.tile), real),
        "lines": ((threads, 3, shape.tile), real),
        "blocks": ((threads, max(16 * 64 + 64, FILTERS * shape.lanes * taps)), real),
    }
    return Plan(shape, slabs, threads, workspace.layout(buffers))


def _cut(
    input: tuple[int, ...],
    offset: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    itemsize: int,
) -> tuple[Slabs, Shape]:
    """The slabs of a call and its sizes, but for the tile."""
    N, C, H, W = input
    if H * W >= 2**31 - 1:
        raise ValueError(f"deform_conv2d: input: expected H*W below 2**31 - 1 on the CPU backend, got {H}*{W}")
    O, per_group, KH, KW = weight
    groups, OG = C // per_group, offset[1] // (2 * KH * KW)
    slabs = cut(C, groups, OG)
    image_bytes = len(slabs.table) * staged_pixels(H, W) * slabs.lanes * itemsize
    shape = Shape(
        N=N, C=C, H=H, W=W, O=O, KH=KH, KW=KW, OH=offset[2], OW=offset[3], OG=OG, groups=groups,
        stride_h=stride[0], stride_w=stride[1], padding_h=padding[0], padding_w=padding[1],
        dilation_h=dilation[0], dilation_w=dilation[1],
        lanes=slabs.lanes, images=max(1, min(N, STAGE_BYTES // image_bytes)), tile=MR,
        width=vector(itemsize), panel=panel(itemsize), ranges=1,
    )  # fmt: skip
    return slabs, shape


BACKWARD_TILE = 144  # pixels: a multiple of every MR and of 16, so of 48
CHUNK_BYTES = 4 << 20  # of what all slabs share
RANGES = 8  # of slabs in an offset group, each with sums of its own


def deform_conv2d_backward(
    grad_output: np.ndarray,  # (N, O, OH, OW)
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Eq. 7 and the transposes of Eq. 2 in its other arguments. Returns argument name -> gradient."""
    given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    grads = {name: np.empty_like(given[name], order="C", subok=False) for name in wrt}
    if grad_output.size == 0:
        for grad in grads.values():
            grad.fill(0)
        return grads
    wanted = Wanted(
        int("input" in wrt), int("weight" in wrt), int("bias" in wrt), int("offset" in wrt or "mask" in wrt)
    )
    plan = _backward(
        input.shape, offset.shape, weight.shape, input.dtype, stride, padding, dilation, get_num_threads(), wanted
    )
    buffers = workspace.allocate(plan.buffers)
    if "weight" in wrt and buffers["grad_weight"].size == 0:
        buffers["grad_weight"] = grads["weight"].reshape(-1)
    rule = limits_of(border, *input.shape[2:], accumulator(input.dtype))
    outputs = [described(grads.get(name)) for name in ("input", "offset", "mask", "weight", "bias")]
    call = numbers_of(
        plan.shape, wanted, described(grad_output), described(input), described(offset), described(mask),
        described(weight), *outputs,
    )  # fmt: skip
    run(backward_worker, plan.threads, call, plan.slabs.table, plan.slabs.of_offset, rule, *buffers.values())
    return grads


@lru_cache(maxsize=256)
def _backward(
    input: tuple[int, ...],
    offset: tuple[int, ...],
    weight: tuple[int, ...],
    dtype: np.dtype,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    available: int,
    wanted: Wanted,
) -> Plan:
    real = accumulator(dtype)
    slabs, shape = _cut(input, offset, weight, stride, padding, dilation, real.itemsize)
    pixels, taps = shape.OH * shape.OW, shape.KH * shape.KW
    threads = threads_for(4.0 * prod(weight) * shape.N * pixels, available)
    tile = min(BACKWARD_TILE, -(-pixels // 48) * 48)
    plane = staged_pixels(shape.H, shape.W)
    ranges = int(min(RANGES, np.diff(slabs.of_offset).max()))
    parts = -(-shape.O // DEPTH)
    shape = shape._replace(tile=tile, ranges=ranges)
    bytes_per_pixel = (parts * LDA + shape.OG * taps * (8 + ranges * 4)) * real.itemsize
    tiles = shape.images * -(-pixels // tile)
    wide = wanted.weight and dtype != real
    chunk_bytes = CHUNK_BYTES // 2 if wide else CHUNK_BYTES  # the wide grad_weight takes its share
    slots = min(tiles, max(1, chunk_bytes // (bytes_per_pixel * tile))) * tile
    per_group = shape.O // shape.groups
    columns = -(-min(taps, DEPTH // shape.lanes) * shape.lanes // shape.width) * shape.width
    threads = min(threads, shape.OG * ranges)
    buffers: workspace.Buffers = {
        "grad_weight": ((prod(weight) if wide else 0,), real),
        "staged": ((shape.images, len(slabs.table), plane, shape.lanes), real),
        "grad_staged": ((shape.images, len(slabs.table), plane * wanted.input, shape.lanes), real),
        "staged_grad": ((parts, slots, LDA), real),
        "index": ((slots // tile, shape.OG * taps, 4, tile), np.int32),
        "factor": ((slots // tile, shape.OG * taps, 4, tile), real),
        "part": ((shape.OG * ranges, taps * slots * wanted.coordinates, 4), real),
        "packed": ((threads, per_group * columns), real),
        "slab_grad": ((threads, (per_group + (parts + 1) * MR) * wanted.weight, columns), real),
        "grad_columns": ((threads, tile, LDA), real),
        "columns": ((threads, tile, LDA), real),
        "lines": ((threads, 6, tile), real),
        "blocks": ((threads, max(16 * 64, shape.lanes * taps)), real),
    }
    return Plan(shape, slabs, threads, workspace.layout(buffers))
