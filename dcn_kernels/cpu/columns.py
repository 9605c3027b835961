"""Samples of deformable convolution: positions, columns m x(p0 + p_k + dp_k), and the way back of their gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dcn_kernels.cpu.convert import address_of, fetch_run, load_run, store_run
from dcn_kernels.cpu.gemm import LDA
from dcn_kernels.cpu.jit import inner, spliced, stay_apart, to_fixed_tuple
from dcn_kernels.cpu.lanes import blend8, blend16, dots8, dots16, scatter8, scatter16
from dcn_kernels.cpu.sampling import coordinate_gradients
from dcn_kernels.cpu.slabs import load_pixels


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


SHAPE_FIELDS = len(Shape._fields)


@spliced
def shape_from(numbers):
    """The Shape at the start of a call's numbers."""
    return Shape(*to_fixed_tuple(numbers[:SHAPE_FIELDS], SHAPE_FIELDS))


class Wanted(NamedTuple):
    """What the backward computes, as 0 or 1."""

    input: int
    weight: int
    bias: int
    coordinates: int  # offset or mask


@inner
def load_filter(s, weight, o, channel, count, line, at):
    """line[at + c*K + k] = weight[o, channel + c, k] for `count` channels."""
    stay_apart()
    taps = s.KH * s.KW
    address = weight.address + o * weight.s0 + channel * weight.s1
    if weight.s3 * s.KW == weight.s2 and weight.s3 * taps == weight.s1:
        load_run(line, at, address, weight.s3, count * taps, weight.kind)
        return
    for c in range(count):
        for k in range(taps):
            one = address + c * weight.s1 + (k // s.KW) * weight.s2 + (k % s.KW) * weight.s3
            load_run(line, at + c * taps + k, one, 0, 1, weight.kind)


@inner
def positions(s, offset, mask, n, g, k, start, count, y, x, m):
    """y, x, m of tap k of offset group g at `count` output pixels of image n from `start`: p0 + p_k + dp_k."""
    stay_apart()
    taps = s.KH * s.KW
    base = offset.address + n * offset.s0 + 2 * (g * taps + k) * offset.s1
    if offset.s2 == s.OW * offset.s3 and g * taps + k + 1 < s.OG * taps:  # the next tap's, while this one is worked on
        fetch_run(base + 2 * offset.s1 + start * offset.s3, count * offset.s3)
        fetch_run(base + 3 * offset.s1 + start * offset.s3, count * offset.s3)
    load_pixels(y, 0, base, offset, s.OW, start, count)
    load_pixels(x, 0, base + offset.s1, offset, s.OW, start, count)
    if mask.address != 0:
        base = mask.address + n * mask.s0 + (g * taps + k) * mask.s1
        if mask.s2 == s.OW * mask.s3 and g * taps + k + 1 < s.OG * taps:
            fetch_run(base + mask.s1 + start * mask.s3, count * mask.s3)
        load_pixels(m, 0, base, mask, s.OW, start, count)
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
            row_x[p] = x.dtype.type(x0 + p * s.stride_w) + row_x[p]
        done += length


@inner
def sample_columns(s, source, index, weight, row, count, columns, column):
    """columns[p, column : column + lanes] = sum_q w_q x_q for `count` pixels, by one row of the corner table."""
    stay_apart()
    itemsize = columns.itemsize
    to = address_of(columns, 0, column)
    for p in range(count):
        q00, q01 = np.int64(index[row, 0, p]), np.int64(index[row, 1, p])
        q10, q11 = np.int64(index[row, 2, p]), np.int64(index[row, 3, p])
        w00, w01, w10, w11 = weight[row, 0, p], weight[row, 1, p], weight[row, 2, p], weight[row, 3, p]
        if s.lanes == 16:
            blend16(to + p * LDA * itemsize, source, q00, q01, q10, q11, w00, w01, w10, w11)
        else:
            blend8(to + p * LDA * itemsize, source, q00, q01, q10, q11, w00, w01, w10, w11)


@inner
def sample_gradients(s, wanted, source, target, index, weight, row, count, grad_columns, columns, column, part):
    """For `count` samples of one slab and tap: their columns, their four dots, and their share of grad_input."""
    stay_apart()
    itemsize = columns.itemsize
    like = columns[0, 0]
    line = LDA * itemsize
    to, g = address_of(columns, 0, column), address_of(grad_columns, 0, column)
    still, some_still = s.H * s.W + 1, False
    for p in range(count):
        some_still |= index[row, 0, p] == still
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
                scatter16(g + p * line, target, q00, q01, q10, q11, w00, w01, w10, w11)
        else:
            if wanted.coordinates:
                dots8(like, part + p * 4 * itemsize, g + p * line, source, q00, q01, q10, q11)
            if wanted.weight:
                blend8(to + p * line, source, q00, q01, q10, q11, w00, w01, w10, w11)
            if wanted.input:
                scatter8(g + p * line, target, q00, q01, q10, q11, w00, w01, w10, w11)
    if some_still and wanted.weight:
        blend_nothing(s, source, index, weight, row, count, to)


@inner
def blend_nothing(s, source, index, weight, row, count, to):
    """Columns, from address `to` on, of the samples whose values do not count: 0, whatever the pixels are, or NaN of a
    NaN weight. They lie exactly at -1 under "zeros", so there are few."""
    stay_apart()
    empty, line = s.H * s.W, LDA * weight.itemsize
    for p in range(count):
        if index[row, 0, p] == empty + 1:
            w00, w01, w10, w11 = weight[row, 0, p], weight[row, 1, p], weight[row, 2, p], weight[row, 3, p]
            if s.lanes == 16:
                blend16(to + p * line, source, empty, empty, empty, empty, w00, w01, w10, w11)
            else:
                blend8(to + p * line, source, empty, empty, empty, empty, w00, w01, w10, w11)


@inner
def write_coordinate_gradients(
    s, limits, offset, mask, n, g, k, start, count, part, row, at, grad_offset, grad_mask, lines
):  # fmt: skip
    """grad_offset and grad_mask of one tap at `count` pixels: the ranges' dots from part[row, at] on, added up."""
    stay_apart()
    taps, pixels = s.KH * s.KW, s.OH * s.OW
    first = part[row, at:]
    for r in range(1, s.ranges):
        more = part[row + r, at:]
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
