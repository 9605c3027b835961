"""The backward of deformable convolution on the CPU: one thread owns a range of slabs.

    grad_column[p, (c, k)] = sum_o grad_output[o, p] w[o, c, k]
    grad_w[o, c, k]       += sum_p grad_output[o, p] column[p, (c, k)]
    dots[p, k, q]         += sum_c grad_column[p, (c, k)] x_c(q)       for the corners q of the sample (p, k)
    grad_x_c(q)           += m G(q, p) grad_column[p, (c, k)]

Channels own all elements of grad_input and grad_weight that they touch, so nothing is written by two threads. Only the
dots sum over channels: each range of slabs keeps its own, and they are added up in order. The order of every sum
follows from the shapes alone, so results are the same, bit by bit, at every number of threads.
"""

from __future__ import annotations

import numpy as np

from dcn_kernels.cpu.columns import (
    SHAPE_FIELDS,
    Wanted,
    load_filter,
    positions,
    sample_gradients,
    shape_from,
    write_coordinate_gradients,
)
from dcn_kernels.cpu.convert import address_of, clear, store_run
from dcn_kernels.cpu.gemm import DEPTH, LDA, MR, columns_by_rows, rows_by_panels
from dcn_kernels.cpu.jit import inner, kernel, stay_apart, to_fixed_tuple
from dcn_kernels.cpu.sampling import BOTH, corner_table
from dcn_kernels.cpu.slabs import array_from, load_pixels, round_up, stage, turn, unstage
from dcn_kernels.cpu.threads import barrier, claim, join, leave


@inner
def stage_grad_output(s, grad, n, start, count, slot, staged_grad, block):
    """staged_grad[o // DEPTH, slot + p, o % DEPTH] = grad[n, o, start + p]: the operand A of both products.

    Zeros up to whole blocks of the products: garbage there would be multiplied too, and denormals slowly.
    """
    stay_apart()
    whole = round_up(count, MR)
    for o16 in range(0, min(s.O + MR - 1, round_up(s.O, DEPTH)), 16):  # the last group's block may start anywhere
        several = max(0, min(16, s.O - o16))
        part, column = o16 // DEPTH, o16 % DEPTH
        for p64 in range(0, whole, 64):
            few = max(0, min(64, count - p64))
            if several < 16 or few < 64:
                clear(address_of(block, 0, 0), 16 * 64 * block.itemsize)
            if few > 0:
                for i in range(several):
                    base = grad.address + n * grad.s0 + (o16 + i) * grad.s1
                    load_pixels(block, i * 64, base, grad, s.OW, start + p64, few)
            to = address_of(staged_grad, part, slot + p64) + column * block.itemsize
            turn(block[0], block.itemsize, 16, address_of(block, 0, 0), 64, to, LDA, 16, min(64, whole - p64))


@inner
def pack_slab(s, weight, group, first, count, k0, k1, to_columns, packed, line):
    """The weights of one slab and taps k0 .. k1 as the operand B of grad_output times weight.

    Panels [part of o][column / panel][o][panel], column = (k - k0)*lanes + c; the parts are those of staged_grad.
    """
    stay_apart()
    per_group, taps = s.O // s.groups, s.KH * s.KW
    first_o = group * per_group
    channel = first - group * (s.C // s.groups)
    zero = packed.dtype.type(0)
    o = first_o
    base = 0
    while o < first_o + per_group:
        depth = min(first_o + per_group, (o // DEPTH + 1) * DEPTH) - o
        for i in range(depth):
            load_filter(s, weight, o + i, channel, count, line, 0)
            for k in range(k0, k1):
                for c0 in range(0, s.lanes, s.width):  # lanes may be more than a panel: a vector is all in one
                    column = (k - k0) * s.lanes + c0
                    j = column // s.panel * s.panel
                    width = min(s.panel, to_columns - j)
                    to = base + j * depth + i * width + column - j
                    for c in range(c0, min(s.lanes, c0 + s.width)):
                        packed[to + c - c0] = line[c * taps + k] if c < count else zero
            for column in range((k1 - k0) * s.lanes, to_columns):
                j = column // s.panel * s.panel
                packed[base + j * depth + i * min(s.panel, to_columns - j) + column - j] = zero
        base += depth * to_columns
        o += depth


@inner
def add_weight_gradient(s, slab_grad, group, first, count, k0, k1, grad_weight):
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
def slab_backward(
    s, wanted, weight, slabs, slab, image, first_tile, last_tile, tiles, staged, grad_staged, staged_grad,
    index, factor, part, grad_weight, packed, slab_grad, grad_column, column, line,
):  # fmt: skip
    """All that one slab gives for the tiles of one chunk; `part` (taps, slots, 4) is its range's."""
    stay_apart()
    taps, pixels, per_group = s.KH * s.KW, s.OH * s.OW, s.O // s.groups
    itemsize = column.itemsize
    like = column[0, 0]
    first, count, group, g = slabs[slab, 0], slabs[slab, 1], slabs[slab, 2], slabs[slab, 3]
    slots = (last_tile - first_tile) * s.tile
    back = wanted.input | wanted.coordinates
    for k0 in range(0, taps, DEPTH // s.lanes):
        k1 = min(taps, k0 + DEPTH // s.lanes)
        columns = round_up((k1 - k0) * s.lanes, s.width)
        if back:
            pack_slab(s, weight, group, first, count, k0, k1, columns, packed, line)
        if wanted.weight:
            clear(address_of(slab_grad, 0, 0), slab_grad.size * itemsize)
        for tile in range(first_tile, last_tile):
            b, start = tile // tiles, tile % tiles * s.tile
            slot = (tile - first_tile) * s.tile
            length = min(s.tile, pixels - start)
            if back:
                for p in range(round_up(length, MR)):
                    clear(address_of(grad_column, p, 0), columns * itemsize)
                o, base = group * per_group, 0
                while o < (group + 1) * per_group:
                    depth = min((group + 1) * per_group, (o // DEPTH + 1) * DEPTH) - o
                    a = address_of(staged_grad, o // DEPTH, slot) + o % DEPTH * itemsize
                    rows_by_panels(
                        like, itemsize, a, length, depth, address_of(packed, 0, 0) + base * itemsize, columns,
                        address_of(grad_column, 0, 0), LDA,
                    )  # fmt: skip
                    base += depth * columns
                    o += depth
            for k in range(k0, k1):
                source, target = address_of(staged, b, slab), address_of(grad_staged, b, slab)
                sample_gradients(
                    s, wanted, source, target, index[tile - first_tile], factor[tile - first_tile],
                    g * taps + k, length, grad_column, column, (k - k0) * s.lanes,
                    part + (k * slots + slot) * 4 * itemsize,
                )  # fmt: skip
            if wanted.weight:
                if columns > (k1 - k0) * s.lanes:
                    for p in range(length):
                        unused = columns - (k1 - k0) * s.lanes
                        clear(address_of(column, p, (k1 - k0) * s.lanes), unused * itemsize)
                o, row = group * per_group, 0
                while o < (group + 1) * per_group:
                    rows = min((group + 1) * per_group, (o // DEPTH + 1) * DEPTH) - o
                    a = address_of(staged_grad, o // DEPTH, slot) + o % DEPTH * itemsize
                    c = address_of(slab_grad, row, 0)
                    columns_by_rows(
                        like, itemsize, a, rows, length, address_of(column, 0, 0), columns, c, slab_grad.shape[1]
                    )
                    row += round_up(rows, MR)
                    o += rows
        if wanted.weight:
            add_weight_gradient(s, slab_grad, group, first, count, k0, k1, grad_weight)


@inner
def sum_bias(s, grad, o, grad_bias, block):
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
def backward_worker(
    thread, threads, sync,
    numbers,  # a Shape, a Wanted and ten Arrays
    slabs, of_offset, limits,
    grad_weight,  # (O * C/groups * K,): sums, perhaps in a wider type than grad_weight_out
    staged,  # (images, slabs, staged_pixels, lanes)
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
    if not join(thread, sync):
        return
    s, arrays = shape_from(numbers), numbers[SHAPE_FIELDS + 4 :]
    wanted = Wanted(*to_fixed_tuple(numbers[SHAPE_FIELDS : SHAPE_FIELDS + 4], 4))
    grad_output, input, offset = array_from(arrays, 0), array_from(arrays, 1), array_from(arrays, 2)
    mask, weight, grad_input = array_from(arrays, 3), array_from(arrays, 4), array_from(arrays, 5)
    grad_offset, grad_mask = array_from(arrays, 6), array_from(arrays, 7)
    grad_weight_out, grad_bias = array_from(arrays, 8), array_from(arrays, 9)
    taps, pixels, plane = s.KH * s.KW, s.OH * s.OW, staged.shape[2]
    block = blocks[thread]
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
            clear(address_of(grad_weight, 0, 0) + o * size * grad_weight.itemsize, size * grad_weight.itemsize)
        o = claim(sync)
    barrier(sync)
    if not sampling:
        leave(thread, sync)
        return

    for image in range(0, s.N, s.images):
        images = min(s.images, s.N - image)
        item = claim(sync)
        while item < images * slabs.shape[0]:
            b, slab = item // slabs.shape[0], item % slabs.shape[0]
            stage(s, input, image + b, b, slab, slabs, staged, block)
            if wanted.input:
                clear(address_of(grad_staged, b, slab), plane * s.lanes * staged.itemsize)
            item = claim(sync)
        barrier(sync)
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
                        corner_table(BOTH, y, x, m, count, s.H, s.W, limits, corners, weights, g * taps + k)
                item = claim(sync)
            barrier(sync)
            # slab by slab: each range of slabs has one owner
            item = claim(sync)
            while item < s.OG * s.ranges:
                g, r = item // s.ranges, item % s.ranges
                if wanted.coordinates:
                    clear(address_of(part, item, 0), taps * used * 4 * part.itemsize)
                slabs_of_g = of_offset[g + 1] - of_offset[g]
                for slab in range(
                    of_offset[g] + slabs_of_g * r // s.ranges, of_offset[g] + slabs_of_g * (r + 1) // s.ranges
                ):
                    slab_backward(
                        s, wanted, weight, slabs, slab, image, first_tile, last_tile, tiles, staged, grad_staged,
                        staged_grad, index, factor, address_of(part, item, 0), grad_weight,
                        packed[thread], slab_grad[thread], grad_columns[thread], columns[thread], block,
                    )  # fmt: skip
                item = claim(sync)
            barrier(sync)
            if wanted.coordinates:
                item = claim(sync)
                while item < (last_tile - first_tile) * s.OG:
                    tile, g = first_tile + item // s.OG, item % s.OG
                    b, start, slot = tile // tiles, tile % tiles * s.tile, (tile - first_tile) * s.tile
                    count = min(s.tile, pixels - start)
                    for k in range(taps):
                        write_coordinate_gradients(
                            s, limits, offset, mask, image + b, g, k, start, count, part, g * s.ranges, k * used + slot,
                            grad_offset, grad_mask, lines[thread],
                        )  # fmt: skip
                    item = claim(sync)
                barrier(sync)
        if wanted.input:
            item = claim(sync)
            while item < images * slabs.shape[0]:
                b, slab = item // slabs.shape[0], item % slabs.shape[0]
                unstage(s, grad_staged, b, slab, slabs, image + b, grad_input, block)
                item = claim(sync)
            barrier(sync)
    if wanted.weight and address_of(grad_weight, 0, 0) != grad_weight_out.address:
        size = grad_weight.size // s.O
        o = claim(sync)
        while o < s.O:
            to = grad_weight_out.address + o * grad_weight_out.s0
            store_run(grad_weight, o * size, size, to, grad_weight_out.kind)
            o = claim(sync)
    leave(thread, sync)
