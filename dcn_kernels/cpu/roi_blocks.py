"""Maps and pooled values of regions of interest, in and out of the layouts that their workers use.

With lanes = 16 planes become slabs of 16 channels, channels-last: [slab][element][lane]; with lanes = 1 they stay
planes. `line` is a thread's memory for 16 runs of 64 elements, in which they are converted.
"""

from __future__ import annotations

from dcn_kernels.cpu.bins import peek, poke
from dcn_kernels.cpu.convert import F32, F64, address_of, fetch_run, store_run
from dcn_kernels.cpu.jit import inner, spliced, stay_apart
from dcn_kernels.cpu.lanes import transpose16
from dcn_kernels.cpu.roi_lanes import LANES
from dcn_kernels.cpu.slabs import load_pixels


@inner
def load_planes(lanes, array, base, planes, row_length, length, to, line):
    """to = `length` elements of each of `planes` planes, the first at address `base`."""
    stay_apart()
    zero, itemsize = line.dtype.type(0), line.itemsize
    plain = array.kind == (F32 if itemsize == 4 else F64) and array.s3 == itemsize and array.s2 == row_length * itemsize
    plain = plain and array.s1 % itemsize == 0
    lines = address_of(line, 0, 0)
    for j in range(0, planes, lanes):
        target = address_of(to, j * length, 0)
        if lanes == 1:
            load_pixels(to, j * length, base + j * array.s1, array, row_length, 0, length)
        elif plain and j + LANES <= planes:
            turn_in(zero, itemsize, base + j * array.s1, array.s1, length, target)
        else:
            for start in range(0, length, 64):
                few = min(64, length - start)
                for l in range(LANES):
                    if j + l < planes:
                        load_pixels(line, l * 64, base + (j + l) * array.s1, array, row_length, start, few)
                    else:
                        for p in range(few):
                            line[l * 64 + p] = zero
                turn_in(zero, itemsize, lines, 64 * itemsize, few, target + start * LANES * itemsize)


@inner
def store_planes(lanes, values, planes, length, to, base, line):
    """The inverse of load_planes, into C-contiguous planes."""
    stay_apart()
    zero, itemsize = line.dtype.type(0), line.itemsize
    plain = to.kind == (F32 if itemsize == 4 else F64)
    lines = address_of(line, 0, 0)
    for j in range(0, planes, lanes):
        source = address_of(values, j * length, 0)
        if lanes == 1:
            store_run(values, j * length, length, base + j * to.s1, to.kind)
        elif plain and j + LANES <= planes:
            turn_out(zero, itemsize, source, length, base + j * to.s1, to.s1)
        else:
            for start in range(0, length, 64):
                few = min(64, length - start)
                turn_out(zero, itemsize, source + start * LANES * itemsize, few, lines, 64 * itemsize)
                for l in range(min(LANES, planes - j)):
                    store_run(line, l * 64, few, base + (j + l) * to.s1 + start * to.s3, to.kind)


@inner
def turn_in(like, itemsize, source, plane, length, target):
    """The 16 x `length` numbers at `source`, rows `plane` bytes apart, as `length` x 16 at `target`."""
    stay_apart()
    whole = length // LANES * LANES
    for p in range(0, whole, LANES):
        transpose16(like, source + p * itemsize, plane // itemsize, target + p * LANES * itemsize, LANES)
    for p in range(whole, length):
        for l in range(LANES):
            poke(target + (p * LANES + l) * itemsize, peek(like, source + l * plane + p * itemsize))


@inner
def turn_out(like, itemsize, source, length, target, plane):
    """The inverse of turn_in."""
    stay_apart()
    whole = length // LANES * LANES
    for p in range(0, whole, LANES):
        transpose16(like, source + p * LANES * itemsize, LANES, target + p * itemsize, plane // itemsize)
    for p in range(whole, length):
        for l in range(LANES):
            poke(target + l * plane + p * itemsize, peek(like, source + (p * LANES + l) * itemsize))


@spliced
def load_block(s, input, n, c0, count, to, line):
    """Stage the maps of output channels c0 .. c0 + count of image n at `to`."""
    maps = s.groups_h * s.groups_w
    base = input.address + n * input.s0 + c0 * maps * input.s1
    load_planes(s.lanes, input, base, count * maps, s.W, s.H * s.W, to, line)


@spliced
def store_block(s, values, n, c0, count, to, line):
    """The inverse of load_block, into a C-contiguous array."""
    maps = s.groups_h * s.groups_w
    base = to.address + n * to.s0 + c0 * maps * to.s1
    store_planes(s.lanes, values, count * maps, s.H * s.W, to, base, line)


@spliced
def load_pooled(s, grad, r, c0, count, pooled, line):
    """pooled = the gradients of one RoI's output channels c0 .. c0 + count, as [slab, bin, lane]."""
    base = grad.address + r * grad.s0 + c0 * grad.s1
    load_planes(s.lanes, grad, base, count, s.PW, s.PH * s.PW, pooled, line)


@spliced
def store_pooled(s, pooled, r, c0, count, out, line):
    """out[r, c0 .. c0 + count] = pooled[slab, bin, lane]."""
    base = out.address + r * out.s0 + c0 * out.s1
    store_planes(s.lanes, pooled, count, s.PH * s.PW, out, base, line)


@spliced
def expect(array, r, c0, count):
    """Prefetch one RoI's channels c0 .. c0 + count, to be read or written soon where the processor does not foresee."""
    fetch_run(array.address + r * array.s0 + c0 * array.s1, count * abs(array.s1))
