"""Deformable convolution on the CPU: columns sampled a tile at a time straight into the operand of the product.

    y[o, p] = b[o] + sum_(c, k) w[o, c, k] column[p, (c, k)],   column = m x(p0 + p_k + dp_k)

Channels are cut into slabs of 8 or 16 that share a convolution group and an offset group, and the image is staged
as [slab][pixel][lane]: a sample is four runs of lanes, and one slab's image fits the cache. A unit is one (slab, tap);
units in order are the depth of the product.

Forward: a thread owns a tile of output pixels. Backward: a thread owns a range of slabs, and with it all elements of
grad_input and grad_weight that these channels touch, so nothing is written by two threads; sums over channels
(grad_offset, grad_mask) are kept per range and added up in order. Results do not depend on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.convert import kind, load_run, store_run
from dcn_kernels.cpu.gemm import DEPTH, LDA, MR, columns_by_rows, panel, rows_by_panels, vector
from dcn_kernels.cpu.jit import inner, kernel, stay_apart
from dcn_kernels.cpu.lanes import blend8, blend16, dots8, dots16, spread8, spread16, transpose8, transpose16
from dcn_kernels.cpu.sampling import coordinate_gradients, corner_table, limits
from dcn_kernels.cpu.threads import barrier, claim, get_num_threads, run
from dcn_kernels.shapes import accumulator


class Array(NamedTuple):
    """An array of any dtype and strides, as a kernel takes it; address 0 is an absent one."""

    address: int
    kind: int
    s0: int  # strides in bytes
    s1: int
    s2: int
    s3: int


class Shape(NamedTuple):
    """Sizes and parameters of one call."""

    N: int
    C: int
    H: int
    W: int
    O: int
    KH: int
    KW: int
    OH: int
    OW: int
    OG: int
    groups: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    lanes: int  # channels in a slab
    images: int  # staged at once
    tile: int  # output pixels, a multiple of MR
    width: int  # columns of one vector
    panel: int  # columns of one panel
    ranges: int  # of slabs in an offset group, backward


# ---------------------------------------------------------------- slabs


class Slabs(NamedTuple):
    """How the channels are cut."""

    lanes: int
    table: np.ndarray  # (slabs, 4): first channel, channels, convolution group, offset group
    of_group: np.ndarray  # (groups + 1,): the first slab of each convolution group
    of_offset: np.ndarray  # (OG + 1,): the first slab of each offset group


@lru_cache(maxsize=256)
def cut(C: int, groups: int, OG: int) -> Slabs:
    """Cut C channels into slabs, none of which straddles a convolution group or an offset group."""
    edges = sorted({*range(0, C + 1, C // groups), *range(0, C + 1, C // OG)})
    runs = list(zip(edges[:-1], edges[1:], strict=True))
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


# ---------------------------------------------------------------- pieces of both workers


@inner
def stage(s, input, n, b, slab, slabs, staged, block):  # type: ignore[no-untyped-def]
    """Copy one slab of image n to staged[b, slab] channels-last, with a pixel of zeros at its end."""
    stay_apart()
    first, count = slabs[slab, 0], slabs[slab, 1]
    plane = staged[b, slab]
    zero = block.dtype.type(0)
    pixels = s.H * s.W
    for start in range(0, pixels, 64):
        length = min(64, pixels - start)
        for c in range(count):
            base = input.address + n * input.s0 + (first + c) * input.s1
            load_pixels(block, c * 64, base, input, s.W, start, length)
        for c in range(count, s.lanes):
            for p in range(length):
                block[c * 64 + p] = zero
        turn(s.lanes, block, s.lanes, length, plane[start:])
    for c in range(s.lanes):
        plane[pixels, c] = zero


@inner
def turn(lanes, block, channels, pixels, runs):  # type: ignore[no-untyped-def]
    """runs[p, c] = block[c*64 + p] for a block of up to 64 pixels; channels a multiple of lanes."""
    stay_apart()
    like, itemsize = block[0], block.itemsize
    row = runs.strides[0] // itemsize
    whole = pixels // lanes * lanes
    for c in range(0, channels, lanes):
        for p in range(0, whole, lanes):
            source, target = block.ctypes.data + (c * 64 + p) * itemsize, runs.ctypes.data + (p * row + c) * itemsize
            if lanes == 16:
                transpose16(like, source, 64, target, row)
            else:
                transpose8(like, source, 64, target, row)
        for p in range(whole, pixels):
            for i in range(c, c + lanes):
                runs[p, i] = block[i * 64 + p]


@inner
def turn_back(lanes, runs, channels, pixels, block):  # type: ignore[no-untyped-def]
    """block[c*64 + p] = runs[p, c]: the inverse of `turn`."""
    stay_apart()
    like, itemsize = block[0], block.itemsize
    row = runs.strides[0] // itemsize
    whole = pixels // lanes * lanes
    for c in range(0, channels, lanes):
        for p in range(0, whole, lanes):
            source, target = runs.ctypes.data + (p * row + c) * itemsize, block.ctypes.data + (c * 64 + p) * itemsize
            if lanes == 16:
                transpose16(like, source, row, target, 64)
            else:
                transpose8(like, source, row, target, 64)
        for p in range(whole, pixels):
            for i in range(c, c + lanes):
                block[i * 64 + p] = runs[p, i]


@inner
def load_pixels(to, at, base, array, row_length, start, count):  # type: ignore[no-untyped-def]
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


@inner
def positions(s, offset, mask, n, g, k, start, count, y, x, m):  # type: ignore[no-untyped-def]
    """y, x, m of tap k of offset group g at `count` output pixels of image n from `start`: p0 + p_k + dp_k."""
    stay_apart()
    taps = s.KH * s.KW
    base = offset.address + n * offset.s0 + 2 * (g * taps + k) * offset.s1
    load_pixels(y, 0, base, offset, s.OW, start, count)
    load_pixels(x, 0, base + offset.s1, offset, s.OW, start, count)
    if mask.address != 0:
        load_pixels(m, 0, mask.address + n * mask.s0 + (g * taps + k) * mask.s1, mask, s.OW, start, count)
    else:
        for p in range(count):
            m[p] = m.dtype.type(1)
    down = (k // s.KW) * s.dilation_h - s.padding_h
    right = (k % s.KW) * s.dilation_w - s.padding_w
    done = 0
    while done < count:
        row, column = (start + done) // s.OW, (start + done) % s.OW
        length = min(s.OW - column, count - done)
        y0, x0 = y.dtype.type(row * s.stride_h + down), column * s.stride_w + right
        row_y, row_x = y[done : done + length], x[done : done + length]
        for p in range(length):
            row_y[p] = y0 + row_y[p]
            row_x[p] = x.dtype.type(np.int32(x0 + p * s.stride_w)) + row_x[p]
        done += length


@inner
def sample_columns(s, source, index, weight, row, count, columns, column):  # type: ignore[no-untyped-def]
    """columns[p, column : column + lanes] = sum_q w_q x_q for `count` pixels, by one row of the corner table."""
    stay_apart()
    itemsize = columns.itemsize
    to = columns.ctypes.data + column * itemsize
    for p in range(count):
        q00, q01 = np.int64(index[row, 0, p]), np.int64(index[row, 1, p])
        q10, q11 = np.int64(index[row, 2, p]), np.int64(index[row, 3, p])
        w00, w01, w10, w11 = weight[row, 0, p], weight[row, 1, p], weight[row, 2, p], weight[row, 3, p]
        if s.lanes == 16:
            blend16(to + p * LDA * itemsize, source, q00, q01, q10, q11, w00, w01, w10, w11)
        else:
            blend8(to + p * LDA * itemsize, source, q00, q01, q10, q11, w00, w01, w10, w11)


@inner
def round_up(value, multiple):  # type: ignore[no-untyped-def]
    return (value + multiple - 1) // multiple * multiple


# ---------------------------------------------------------------- forward


@inner
def pack_weights(s, weight, group, j, slabs, of_group, packed, columns):  # type: ignore[no-untyped-def]
    """Output channels j .. j + panel of one group as panels [pass][unit, lane][o] of the product's operand B."""
    stay_apart()
    taps, per_group = s.KH * s.KW, s.O // s.groups
    first_slab, last_slab = of_group[group], of_group[group + 1]
    padded = round_up(per_group, s.width)
    width = min(s.panel, padded - j)
    given = min(width, per_group - j)
    units = DEPTH // s.lanes  # of one pass
    total = (last_slab - first_slab) * taps
    base = of_group[group] * taps * s.lanes * padded
    zero = packed.dtype.type(0)
    o = group * per_group + j
    first_channel = slabs[first_slab, 0]
    for slab in range(first_slab, last_slab):
        for c in range(s.lanes):
            channel = slabs[slab, 0] + c - first_channel
            for k in range(taps):
                unit = (slab - first_slab) * taps + k
                start = unit // units * units  # of its pass
                depth = min(units, total - start) * s.lanes
                to = base + start * s.lanes * padded + j * depth + ((unit - start) * s.lanes + c) * width
                if c < slabs[slab, 1]:
                    address = weight.address + o * weight.s0 + channel * weight.s1
                    address += (k // s.KW) * weight.s2 + (k % s.KW) * weight.s3
                    load_run(packed, to, address, weight.s0, given, weight.kind)
                    for i in range(given, width):
                        packed[to + i] = zero
                else:
                    for i in range(width):
                        packed[to + i] = zero


@inner
def write_tile(s, sums, bias, out, n, o, count, start, length, block):  # type: ignore[no-untyped-def]
    """out[n, o : o + count, start : start + length] = sums^T + bias; out is C-contiguous."""
    stay_apart()
    pixels = s.OH * s.OW
    itemsize = out.s3
    for o16 in range(0, count, 16):
        several = min(16, count - o16)
        for p64 in range(0, length, 64):
            few = min(64, length - p64)
            turn_back(16, sums[p64:, o16:], 16, few, block)
            for i in range(several):
                if bias.address != 0:
                    load_run(block, 16 * 64, bias.address + (o + o16 + i) * bias.s0, 0, 1, bias.kind)
                    b, line = block[16 * 64], block[i * 64 : i * 64 + few]
                    for p in range(few):
                        line[p] += b
                to = out.address + ((n * s.O + o + o16 + i) * pixels + start + p64) * itemsize
                store_run(block, i * 64, few, to, out.kind)


@kernel
def forward_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, input, offset, mask, weight, bias, out,
    slabs, of_group, limits,
    packed,  # (depth of all units * padded outputs,): B of the product
    staged,  # (images, slabs, H*W + 1, lanes)
    columns,  # (threads, tile, LDA): A of the product
    sums,  # (threads, tile, padded outputs of a group): C
    index,  # (threads, OG*K, 4, tile): corner pixels
    factor,  # (threads, OG*K, 4, tile): their weights
    lines,  # (threads, 3, tile): y, x, m
    blocks,  # (threads, 16*64 + 64)
):  # fmt: skip
    """One thread of the forward: a thread owns a tile of output pixels at a time."""
    taps, pixels, per_group = s.KH * s.KW, s.OH * s.OW, s.O // s.groups
    itemsize = columns.itemsize
    column, total, block = columns[thread], sums[thread], blocks[thread]
    corners, weights = index[thread], factor[thread]
    y, x, m = lines[thread, 0], lines[thread, 1], lines[thread, 2]
    like = block[0]
    zero = block.dtype.type(0)
    padded = round_up(per_group, s.width)
    panels = (padded + s.panel - 1) // s.panel
    tiles = (pixels + s.tile - 1) // s.tile
    units = DEPTH // s.lanes
    for image in range(0, s.N, s.images):
        images = min(s.images, s.N - image)
        to_pack = s.groups * panels if image == 0 else 0
        to_stage = images * slabs.shape[0]
        item = claim(sync)
        while item < to_pack + to_stage:
            if item < to_pack:
                pack_weights(s, weight, item // panels, item % panels * s.panel, slabs, of_group, packed, column)
            else:
                b, slab = (item - to_pack) // slabs.shape[0], (item - to_pack) % slabs.shape[0]
                stage(s, input, image + b, b, slab, slabs, staged, block)
            item = claim(sync)
        barrier(threads, sync)
        item = claim(sync)
        while item < images * tiles:
            b, start = item // tiles, item % tiles * s.tile
            count = min(s.tile, pixels - start)
            for g in range(s.OG):
                for k in range(taps):
                    positions(s, offset, mask, image + b, g, k, start, count, y, x, m)
                    corner_table(y, x, m, count, s.H, s.W, limits, corners, weights, g * taps + k)
            for group in range(s.groups):
                for p in range(round_up(count, MR)):
                    for o in range(padded):
                        total[p, o] = zero
                first_unit, last_unit = of_group[group] * taps, of_group[group + 1] * taps
                for unit in range(first_unit, last_unit, units):
                    depth = min(units, last_unit - unit) * s.lanes
                    for u in range(min(units, last_unit - unit)):
                        slab, k = (unit + u) // taps, (unit + u) % taps
                        source, row = staged[b, slab].ctypes.data, slabs[slab, 3] * taps + k
                        sample_columns(s, source, corners, weights, row, count, column, u * s.lanes)
                    operand = packed.ctypes.data + unit * s.lanes * padded * itemsize
                    rows_by_panels(
                        like, itemsize, column.ctypes.data, count, depth, operand, padded,
                        total.ctypes.data, total.shape[1],
                    )  # fmt: skip
                write_tile(s, total, bias, out, image + b, group * per_group, per_group, start, count, block)
            item = claim(sync)
        barrier(threads, sync)


TILE_BYTES = 768 << 10  # of one thread's tile: most of a second-level cache of 1 MiB
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
    **_: Any,  # what concerns GPUs alone
) -> np.ndarray:
    """Eq. 2. Returns (N, O, OH, OW)."""
    if out is None:
        out = np.empty((input.shape[0], weight.shape[0], *offset.shape[2:]), input.dtype)
    if out.size == 0:
        return out
    real = accumulator(input.dtype)
    slabs = cut(input.shape[1], input.shape[1] // weight.shape[1], _offset_groups(offset, weight))
    shape = _shape(input, offset, weight, stride, padding, dilation, slabs, real.itemsize)
    per_group = shape.O // shape.groups
    padded = -(-per_group // shape.width) * shape.width
    pixels, taps, threads = shape.OH * shape.OW, shape.KH * shape.KW, get_num_threads()
    bytes_per_pixel = (padded + LDA + 8 * shape.OG * taps) * real.itemsize
    fitting = max(1, TILE_BYTES // (bytes_per_pixel * MR)) * MR
    tiles = -(-pixels // fitting)
    share = -(-tiles * shape.N // threads) * threads / shape.N  # tiles of an image such that all threads have as many
    tile = min(fitting, -(-pixels // (max(tiles, share) * MR)) * MR)
    shape = shape._replace(tile=int(tile))
    threads = min(threads, shape.N * -(-pixels // shape.tile))
    plan: workspace.Plan = {
        "packed": ((len(slabs.table) * taps * shape.lanes * padded,), real),
        "staged": ((shape.images, len(slabs.table), shape.H * shape.W + 1, shape.lanes), real),
        "columns": ((threads, shape.tile, LDA), real),
        "sums": ((threads, shape.tile, -(-padded // 16) * 16), real),  # read in blocks of 16
        "index": ((threads, shape.OG * taps, 4, shape.tile), np.int32),
        "factor": ((threads, shape.OG * taps, 4, shape.tile), real),
        "lines": ((threads, 3, shape.tile), real),
        "blocks": ((threads, 16 * 64 + 64), real),
    }
    buffers = workspace.allocate(plan)
    rule = limits(border, shape.H, shape.W, real)
    arrays = (_array(input), _array(offset), _array(mask), _array(weight), _array(bias), _array(out))
    run(forward_worker, threads, shape, *arrays, slabs.table, slabs.of_group, rule, *buffers.values())
    return out


def _array(array: np.ndarray | None) -> Array:
    if array is None:
        return Array(0, 0, 0, 0, 0, 0)
    strides = (*array.strides, 0, 0, 0)[:4]
    return Array(array.ctypes.data, kind(array), *strides)


def _offset_groups(offset: np.ndarray, weight: np.ndarray) -> int:
    return offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])


def _shape(
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    slabs: Slabs,
    itemsize: int,
) -> Shape:
    N, C, H, W = input.shape
    if H * W >= 2**31 - 1:
        raise ValueError(f"deform_conv2d: input: expected H*W below 2**31 - 1 on the CPU backend, got {H}*{W}")
    O, _, KH, KW = weight.shape
    image_bytes = len(slabs.table) * (H * W + 1) * slabs.lanes * itemsize
    return Shape(
        N, C, H, W, O, KH, KW, *offset.shape[2:], _offset_groups(offset, weight), C // weight.shape[1],
        *stride, *padding, *dilation,
        slabs.lanes, max(1, min(N, STAGE_BYTES // image_bytes)), MR, vector(itemsize), panel(itemsize), 1,
    )  # fmt: skip


# ---------------------------------------------------------------- backward


class Wanted(NamedTuple):
    """What the backward computes, as 0 or 1."""

    input: int
    weight: int
    bias: int
    coordinates: int  # offset or mask


@inner
def stage_grad_output(s, grad, n, start, count, slot, staged_grad, block):  # type: ignore[no-untyped-def]
    """staged_grad[o // DEPTH, slot + p, o % DEPTH] = grad[n, o, start + p]: the operand A of both products."""
    stay_apart()
    for o16 in range(0, s.O, 16):
        several = min(16, s.O - o16)
        part, column = o16 // DEPTH, o16 % DEPTH
        for p64 in range(0, count, 64):
            few = min(64, count - p64)
            for i in range(several):
                base = grad.address + n * grad.s0 + (o16 + i) * grad.s1
                load_pixels(block, i * 64, base, grad, s.OW, start + p64, few)
            turn(16, block, 16, few, staged_grad[part, slot + p64 :, column:])


@inner
def pack_slab(s, weight, group, first, count, k0, k1, to_columns, packed, line):  # type: ignore[no-untyped-def]
    """The weights of one slab and taps k0 .. k1 as the operand B of grad_output times weight.

    Panels [part of o][column / panel][o][panel], column = (k - k0)*lanes + c; the parts are those of staged_grad.
    """
    stay_apart()
    per_group, taps = s.O // s.groups, s.KH * s.KW
    first_o = group * per_group
    channel = first - group * (s.C // s.groups)
    zero = packed.dtype.type(0)
    dense = weight.s3 * s.KW == weight.s2 and weight.s3 * taps == weight.s1
    o = first_o
    base = 0
    while o < first_o + per_group:
        depth = min(first_o + per_group, (o // DEPTH + 1) * DEPTH) - o
        for i in range(depth):
            address = weight.address + (o + i) * weight.s0 + channel * weight.s1
            if dense:
                load_run(line, 0, address, weight.s3, count * taps, weight.kind)
            else:
                for c in range(count):
                    for k in range(taps):
                        at = address + c * weight.s1 + (k // s.KW) * weight.s2 + (k % s.KW) * weight.s3
                        load_run(line, c * taps + k, at, 0, 1, weight.kind)
            for k in range(k0, k1):
                column = (k - k0) * s.lanes
                j = column // s.panel * s.panel
                width = min(s.panel, to_columns - j)
                to = base + j * depth + i * width + column - j
                for c in range(s.lanes):
                    packed[to + c] = line[c * taps + k] if c < count else zero
            for column in range((k1 - k0) * s.lanes, to_columns):
                j = column // s.panel * s.panel
                packed[base + j * depth + i * min(s.panel, to_columns - j) + column - j] = zero
        base += depth * to_columns
        o += depth


@inner
def sample_gradients(s, wanted, source, target, index, weight, row, count, grad_columns, columns, column, part):  # type: ignore[no-untyped-def]
    """For `count` samples of one unit: their columns, their four dots, and their share of grad_input."""
    stay_apart()
    itemsize = columns.itemsize
    like = columns[0, 0]
    line = LDA * itemsize
    to = columns.ctypes.data + column * itemsize
    g = grad_columns.ctypes.data + column * itemsize
    for p in range(count):
        q00, q01 = np.int64(index[row, 0, p]), np.int64(index[row, 1, p])
        q10, q11 = np.int64(index[row, 2, p]), np.int64(index[row, 3, p])
        w00, w01, w10, w11 = weight[row, 0, p], weight[row, 1, p], weight[row, 2, p], weight[row, 3, p]
        if s.lanes == 16:
            if wanted.coordinates:
                dots16(like, part + p * 4 * itemsize, g + p * line, source, q00, q01, q10, q11)
            if wanted.weight:
                blend16(to + p * line, source, q00, q01, q10, q11, w00, w01, w10, w11)
            if wanted.input:
                spread16(g + p * line, target, q00, q01, q10, q11, w00, w01, w10, w11)
        else:
            if wanted.coordinates:
                dots8(like, part + p * 4 * itemsize, g + p * line, source, q00, q01, q10, q11)
            if wanted.weight:
                blend8(to + p * line, source, q00, q01, q10, q11, w00, w01, w10, w11)
            if wanted.input:
                spread8(g + p * line, target, q00, q01, q10, q11, w00, w01, w10, w11)


@inner
def add_weight_gradient(s, slab_grad, group, first, count, k0, k1, grad_weight):  # type: ignore[no-untyped-def]
    """grad_weight[o, c, k] += slab_grad[row of o, (k - k0)*lanes + c]; each part of o starts a multiple of MR rows."""
    stay_apart()
    per_group, taps, per_group_in = s.O // s.groups, s.KH * s.KW, s.C // s.groups
    channel = first - group * per_group_in
    o, row = group * per_group, 0
    while o < (group + 1) * per_group:
        rows = min((group + 1) * per_group, (o // DEPTH + 1) * DEPTH) - o
        for i in range(rows):
            to = ((o + i) * per_group_in + channel) * taps
            for k in range(k0, k1):
                for c in range(count):
                    grad_weight[to + c * taps + k] += slab_grad[row + i, (k - k0) * s.lanes + c]
        row += round_up(rows, MR)
        o += rows


@inner
def slab_backward(  # type: ignore[no-untyped-def]
    s, wanted, weight, slabs, slab, image, first_tile, last_tile, tiles, staged, grad_staged, staged_grad,
    index, factor, part, grad_weight, packed, slab_grad, grad_column, column, line,
):  # fmt: skip
    """All that one slab gives for the tiles of one chunk; `part` (taps, slots, 4) is its range's."""
    stay_apart()
    taps, pixels, per_group = s.KH * s.KW, s.OH * s.OW, s.O // s.groups
    itemsize = column.itemsize
    like, zero = column[0, 0], column.dtype.type(0)
    first, count, group, g = slabs[slab, 0], slabs[slab, 1], slabs[slab, 2], slabs[slab, 3]
    slots = (last_tile - first_tile) * s.tile
    back = wanted.input | wanted.coordinates
    for k0 in range(0, taps, DEPTH // s.lanes):
        k1 = min(taps, k0 + DEPTH // s.lanes)
        columns = round_up((k1 - k0) * s.lanes, s.width)
        if back:
            pack_slab(s, weight, group, first, count, k0, k1, columns, packed, line)
        if wanted.weight:
            slab_grad[:, :columns] = zero
        for tile in range(first_tile, last_tile):
            b, start = tile // tiles, tile % tiles * s.tile
            slot = (tile - first_tile) * s.tile
            length = min(s.tile, pixels - start)
            if back:
                grad_column[: round_up(length, MR), :columns] = zero
                o, base = group * per_group, 0
                while o < (group + 1) * per_group:
                    depth = min((group + 1) * per_group, (o // DEPTH + 1) * DEPTH) - o
                    a = staged_grad[o // DEPTH, slot].ctypes.data + o % DEPTH * itemsize
                    rows_by_panels(
                        like, itemsize, a, length, depth, packed.ctypes.data + base * itemsize, columns,
                        grad_column.ctypes.data, LDA,
                    )  # fmt: skip
                    base += depth * columns
                    o += depth
            for k in range(k0, k1):
                sample_gradients(
                    s, wanted, staged[b, slab].ctypes.data, grad_staged[b, slab].ctypes.data, index[tile - first_tile],
                    factor[tile - first_tile], g * taps + k, length, grad_column, column, (k - k0) * s.lanes,
                    part + (k * slots + slot) * 4 * itemsize,
                )  # fmt: skip
            if wanted.weight:
                o, row = group * per_group, 0
                while o < (group + 1) * per_group:
                    rows = min((group + 1) * per_group, (o // DEPTH + 1) * DEPTH) - o
                    a = staged_grad[o // DEPTH, slot].ctypes.data + o % DEPTH * itemsize
                    c = slab_grad[row].ctypes.data
                    columns_by_rows(
                        like, itemsize, a, rows, length, column.ctypes.data, columns, c, slab_grad.shape[1]
                    )
                    row += round_up(rows, MR)
                    o += rows
        if wanted.weight:
            add_weight_gradient(s, slab_grad, group, first, count, k0, k1, grad_weight)


@inner
def write_coordinate_gradients(  # type: ignore[no-untyped-def]
    s, limits, offset, mask, n, g, k, start, count, part, at, grad_offset, grad_mask, lines
):  # fmt: skip
    """grad_offset and grad_mask of one tap at `count` pixels: the ranges' dots added up in order."""
    stay_apart()
    taps, pixels = s.KH * s.KW, s.OH * s.OW
    first = part[g * s.ranges, at:]
    for r in range(1, s.ranges):
        more = part[g * s.ranges + r, at:]
        for p in range(count):
            for q in range(4):
                first[p, q] += more[p, q]
    y, x, m = lines[0], lines[1], lines[2]
    positions(s, offset, mask, n, g, k, start, count, y, x, m)
    coordinate_gradients(y, x, m, count, limits, first, lines[3], lines[4], lines[5])
    channel = g * taps + k
    if grad_offset.address != 0:
        to = grad_offset.address + ((n * s.OG * taps + channel) * 2 * pixels + start) * grad_offset.s3
        store_run(lines[3], 0, count, to, grad_offset.kind)
        store_run(lines[4], 0, count, to + pixels * grad_offset.s3, grad_offset.kind)
    if grad_mask.address != 0:
        to = grad_mask.address + ((n * s.OG * taps + channel) * pixels + start) * grad_mask.s3
        store_run(lines[5], 0, count, to, grad_mask.kind)


@inner
def unstage(s, grad_staged, b, slab, slabs, n, grad_input, block):  # type: ignore[no-untyped-def]
    """grad_input[n, channels of the slab] = the staged gradient, back to NCHW."""
    stay_apart()
    first, count = slabs[slab, 0], slabs[slab, 1]
    plane = grad_staged[b, slab]
    pixels = s.H * s.W
    for start in range(0, pixels, 64):
        length = min(64, pixels - start)
        turn_back(s.lanes, plane[start:], s.lanes, length, block)
        for c in range(count):
            to = grad_input.address + ((n * s.C + first + c) * pixels + start) * grad_input.s3
            store_run(block, c * 64, length, to, grad_input.kind)


@inner
def sum_bias(s, grad, o, grad_bias, block):  # type: ignore[no-untyped-def]
    """grad_bias[o] = the sum of grad over images and pixels, in pieces so that rounding errors stay small."""
    stay_apart()
    total = np.float64(0)
    for n in range(s.N):
        for start in range(0, s.OH * s.OW, 1024):
            count = min(1024, s.OH * s.OW - start)
            load_pixels(block, 0, grad.address + n * grad.s0 + o * grad.s1, grad, s.OW, start, count)
            piece = block.dtype.type(0)
            for p in range(count):
                piece += block[p]
            total += piece
    block[0] = total
    store_run(block, 0, 1, grad_bias.address + o * grad_bias.s0, grad_bias.kind)


@kernel
def backward_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, wanted, grad_output, input, offset, mask, weight,
    grad_input, grad_offset, grad_mask, grad_weight_out, grad_bias, slabs, of_offset, limits,
    grad_weight,  # (O * C/groups * K,): sums, perhaps in a wider type than grad_weight_out
    staged,  # (images, slabs, H*W + 1, lanes)
    grad_staged,  # the same, of grad_input
    staged_grad,  # (parts of O, slots = pixels of a chunk's tiles, LDA): grad_output
    index,  # (tiles of a chunk, OG*K, 4, tile): corner pixels
    factor,  # (tiles of a chunk, OG*K, 4, tile): their weights
    part,  # (OG * ranges, K * slots, 4): dots of a chunk
    packed,  # (threads, O/groups * columns): weights of one slab
    slab_grad,  # (threads, rows, columns): grad_weight of one slab
    grad_columns,  # (threads, tile, LDA)
    columns,  # (threads, tile, LDA)
    lines,  # (threads, 6, tile)
    blocks,  # (threads, 16*64 or lanes*K)
):  # fmt: skip
    """One thread of the backward: a thread owns a range of slabs at a time."""
    taps, pixels = s.KH * s.KW, s.OH * s.OW
    block, zero = blocks[thread], staged.dtype.type(0)
    y, x, m = lines[thread, 0], lines[thread, 1], lines[thread, 2]
    tiles = (pixels + s.tile - 1) // s.tile
    chunk = index.shape[0]
    sampling = wanted.input | wanted.weight | wanted.coordinates

    o = claim(sync)
    while o < s.O:
        if wanted.bias:
            sum_bias(s, grad_output, o, grad_bias, block)
        if wanted.weight:
            size = grad_weight.size // s.O
            grad_weight[o * size : (o + 1) * size] = zero
        o = claim(sync)
    barrier(threads, sync)
    if not sampling:
        return

    for image in range(0, s.N, s.images):
        images = min(s.images, s.N - image)
        item = claim(sync)
        while item < images * slabs.shape[0]:
            b, slab = item // slabs.shape[0], item % slabs.shape[0]
            stage(s, input, image + b, b, slab, slabs, staged, block)
            if wanted.input:
                grad_staged[b, slab] = zero
            item = claim(sync)
        barrier(threads, sync)
        for first_tile in range(0, images * tiles, chunk):
            last_tile = min(images * tiles, first_tile + chunk)
            used = (last_tile - first_tile) * s.tile
            # what all slabs share: grad_output in rows, corners and weights
            item = claim(sync)
            while item < (last_tile - first_tile) * (1 + s.OG):
                tile, g = first_tile + item // (1 + s.OG), item % (1 + s.OG) - 1
                b, start, slot = tile // tiles, tile % tiles * s.tile, (tile - first_tile) * s.tile
                count = min(s.tile, pixels - start)
                if g < 0:
                    stage_grad_output(s, grad_output, image + b, start, count, slot, staged_grad, block)
                else:
                    for k in range(taps):
                        positions(s, offset, mask, image + b, g, k, start, count, y, x, m)
                        corners, weights = index[tile - first_tile], factor[tile - first_tile]
                        corner_table(y, x, m, count, s.H, s.W, limits, corners, weights, g * taps + k)
                item = claim(sync)
            barrier(threads, sync)
            # slab by slab: each range of slabs has one owner
            item = claim(sync)
            while item < s.OG * s.ranges:
                g, r = item // s.ranges, item % s.ranges
                if wanted.coordinates:
                    part[item, : taps * used] = zero
                slabs_of_g = of_offset[g + 1] - of_offset[g]
                for slab in range(
                    of_offset[g] + slabs_of_g * r // s.ranges, of_offset[g] + slabs_of_g * (r + 1) // s.ranges
                ):
                    slab_backward(
                        s, wanted, weight, slabs, slab, image, first_tile, last_tile, tiles, staged, grad_staged,
                        staged_grad, index, factor, part[item].ctypes.data, grad_weight,
                        packed[thread], slab_grad[thread], grad_columns[thread], columns[thread], block,
                    )  # fmt: skip
                item = claim(sync)
            barrier(threads, sync)
            if wanted.coordinates:
                item = claim(sync)
                while item < (last_tile - first_tile) * s.OG:
                    tile, g = first_tile + item // s.OG, item % s.OG
                    b, start, slot = tile // tiles, tile % tiles * s.tile, (tile - first_tile) * s.tile
                    count = min(s.tile, pixels - start)
                    for k in range(taps):
                        write_coordinate_gradients(
                            s, limits, offset, mask, image + b, g, k, start, count, part, k * used + slot,
                            grad_offset, grad_mask, lines[thread],
                        )  # fmt: skip
                    item = claim(sync)
                barrier(threads, sync)
        if wanted.input:
            item = claim(sync)
            while item < images * slabs.shape[0]:
                b, slab = item // slabs.shape[0], item % slabs.shape[0]
                unstage(s, grad_staged, b, slab, slabs, image + b, grad_input, block)
                item = claim(sync)
            barrier(threads, sync)
    if wanted.weight and grad_weight.ctypes.data != grad_weight_out.address:
        size = grad_weight.size // s.O
        o = claim(sync)
        while o < s.O:
            to = grad_weight_out.address + o * grad_weight_out.s0
            store_run(grad_weight, o * size, size, to, grad_weight_out.kind)
            o = claim(sync)


BACKWARD_TILE = 120  # pixels: a multiple of every MR
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
    **_: Any,
) -> dict[str, np.ndarray]:
    """Eq. 7 and the transposes of Eq. 2 in its other arguments. Returns argument name -> gradient."""
    given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    shapes = {name: (given[name].shape, given[name].dtype) for name in wrt}  # type: ignore[union-attr]
    if grad_output.size == 0:
        return {name: np.zeros(size, dtype) for name, (size, dtype) in shapes.items()}
    grads = {name: np.empty(size, dtype) for name, (size, dtype) in shapes.items()}
    real = accumulator(input.dtype)
    slabs = cut(input.shape[1], input.shape[1] // weight.shape[1], _offset_groups(offset, weight))
    shape = _shape(input, offset, weight, stride, padding, dilation, slabs, real.itemsize)
    wanted = Wanted(*(int(name in wrt) for name in ("input", "weight", "bias")), int("offset" in wrt or "mask" in wrt))
    pixels, taps, threads = shape.OH * shape.OW, shape.KH * shape.KW, get_num_threads()
    tile = min(BACKWARD_TILE, -(-pixels // MR) * MR)
    ranges = int(min(RANGES, np.diff(slabs.of_offset).max()))
    parts = -(-shape.O // DEPTH)
    shape = shape._replace(tile=tile, ranges=ranges)
    bytes_per_pixel = (parts * LDA + shape.OG * taps * (8 + ranges * 4)) * real.itemsize
    tiles = shape.images * -(-pixels // tile)
    slots = min(tiles, max(1, CHUNK_BYTES // (bytes_per_pixel * tile))) * tile
    per_group = shape.O // shape.groups
    columns = -(-min(taps, DEPTH // shape.lanes) * shape.lanes // shape.width) * shape.width
    threads = min(threads, max(1, len(slabs.table)))
    wide = "weight" in wrt and weight.dtype != real
    plan: workspace.Plan = {
        "grad_weight": ((weight.size if wide else 0,), real),
        "staged": ((shape.images, len(slabs.table), shape.H * shape.W + 1, shape.lanes), real),
        "grad_staged": ((shape.images, len(slabs.table), (shape.H * shape.W + 1) * wanted.input, shape.lanes), real),
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
    buffers = workspace.allocate(plan)
    if "weight" in wrt and not wide:
        buffers["grad_weight"] = grads["weight"].reshape(-1)
    rule = limits(border, shape.H, shape.W, real)
    arrays = [_array(each) for each in (grad_output, input, offset, mask, weight)]
    outputs = [_array(grads.get(name)) for name in ("input", "offset", "mask", "weight", "bias")]
    run(
        backward_worker, threads, shape, wanted, *arrays, *outputs, slabs.table, slabs.of_offset, rule, *buffers.values()
    )
    return grads
