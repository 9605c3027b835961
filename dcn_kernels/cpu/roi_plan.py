"""What every RoI operator does before and around its loops: the plan of a call, and how its arrays reach a worker.

The output channels of a call are cut into units, so small that their maps fit a cache. A piece of work is a unit of
one image, and where there are many RoIs a chunk of them. With lanes = 16 a unit's maps are staged as slabs of 16
channels, channels-last, and a bin's lines serve 16 channels at once. With lanes = 1 they are planes, read in place
where that can be: for position-sensitive maps, where bins of one RoI read different channels, and for little work.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.bins import peek, poke, pooled_bin, size_of, start_and_size
from dcn_kernels.cpu.jit import become_part, inner, spliced, stay_apart, to_fixed_tuple
from dcn_kernels.cpu.roi_lanes import LANES, SLABS
from dcn_kernels.cpu.slabs import array_from
from dcn_kernels.dispatch.memory import check
from dcn_kernels.dispatch.roi_rules import Rule
from dcn_kernels.dtypes import accumulator

IN_PLACE_BYTES = 2 << 20  # of maps read in place, of which a RoI reads a part: a bin's lines serve several channels
BLOCK_BYTES = 512 << 10  # of the map's values that a thread works on at a time: half a second-level cache of 1 MiB
RANGES = 8  # of channels in a class, where gradients are summed over channels


class Shape(NamedTuple):
    """Sizes and parameters of one call."""

    N: int
    C: int
    H: int
    W: int
    R: int
    PH: int
    PW: int
    classes: int
    groups_h: int  # of score maps; 1 where an operator is not position sensitive
    groups_w: int
    rule: int
    ratio: int
    part_h: int
    part_w: int
    shifted: int  # there are offsets
    masked: int
    lanes: int
    block: int  # output channels that are worked on at once, a multiple of lanes
    in_place: int  # planes are read, and gradients added, where they are
    chunks: int  # of an image's RoIs, forward
    sloped: int  # derivatives are wanted, also of points that do not count


SHAPE_FIELDS = len(Shape._fields)


class Plan(NamedTuple):
    """What follows from the shapes of a call alone."""

    shape: Shape
    units: np.ndarray  # (units, 4): first output channel, channels, class, range in the class
    threads: int
    buffers: workspace.Layout


@lru_cache(maxsize=256)  # a layer is called again and again with the same shapes
def make_plan(
    input: tuple[int, ...],  # shapes
    R: int,
    offset: tuple[int, ...] | None,
    dtype: np.dtype,
    rule: Rule,
    output_size: tuple[int, int],
    available: int,  # threads
    *,
    buffers: tuple[str, ...],
    unused: tuple[str, ...] = (),  # buffers that take no memory
    contiguous: bool = False,  # the maps may be worked on in place, if they are of the type of sums
    masked: bool = False,
    lanes: int | None = None,
    backward: bool = False,
    coordinates: bool = False,
) -> Plan:
    """How one call is worked on, with memory for the named `buffers`."""
    N, C, H, W = input
    real, maps = accumulator(dtype), rule.maps[0] * rule.maps[1]
    classes, parts = (1, (1, 1)) if offset is None else (offset[1] // 2, offset[2:])
    each = C // maps // classes
    # staging a map must be worth it: a bin touches about eight pixels
    worth = maps == 1 and each >= LANES // 2 and R * output_size[0] * output_size[1] * 8 >= N * H * W
    lanes = lanes or (LANES if worth else 1)
    in_place = contiguous and lanes == 1 and dtype == real
    fitting = (IN_PLACE_BYTES if in_place else BLOCK_BYTES) // (maps * lanes * H * W * real.itemsize)
    block = min(max(fitting, 1) * lanes, SLABS * LANES if lanes > 1 else 64, -(-each // lanes) * lanes)
    units = _cut(each, classes, block, RANGES if coordinates else None)
    chunks = 1 if backward else max(1, min(-(-4 * available // (N * len(units))), R // 256))
    shape = Shape(
        N=N, C=C, H=H, W=W, R=R, PH=output_size[0], PW=output_size[1], classes=classes,
        groups_h=rule.maps[0], groups_w=rule.maps[1], rule=rule.number, ratio=rule.samples,
        part_h=parts[0], part_w=parts[1], shifted=int(offset is not None), masked=int(masked),
        lanes=lanes, block=block, in_place=int(in_place), chunks=chunks, sloped=int(backward),
    )  # fmt: skip
    sizes = _buffers(shape, available, real)
    taken = {name: sizes[name] for name in buffers}
    taken |= dict.fromkeys(unused, ((available, 0), real))
    return Plan(shape, units, available, workspace.layout(taken))


def _cut(each: int, classes: int, block: int, ranges: int | None) -> np.ndarray:
    """Cut the channels, `each` in a class, into units of whole blocks, at most `ranges` in a class."""
    length = block if ranges is None else -(-each // (ranges * block)) * block
    rows = [
        (cls * each + first, min(length, each - first), cls, first // length)
        for cls in range(classes)
        for first in range(0, each, length)
    ]
    return np.array(rows, np.int64)


LISTS = ("index", "weight", "slope", "found", "number")  # the buffers of Lists


def _buffers(s: Shape, threads: int, real: np.dtype) -> workspace.Buffers:
    """All buffers that workers of RoI operators may want."""
    staged = 0 if s.in_place else s.block * s.groups_h * s.groups_w * s.H * s.W
    bins, lines = s.PH * s.PW, (threads, s.PW + 1, max(s.H, s.W) + 2)
    edges = 2 * (s.PH + s.PW)
    return {
        "staged": ((threads, staged), real),
        "grad_staged": ((threads, staged), real),
        "pooled": ((threads, s.block * bins), real),
        "line": ((threads, 64 * LANES), real),
        "dots": ((threads, LANES), real),  # a thread's on a cache line of their own
        "index": (lines, np.int64),
        "weight": (lines, real),
        "slope": (lines, real),
        "found": (lines[:2], np.int64),
        "number": (lines[:2], np.float64),
        "edges": ((threads, edges), np.int64),  # of the bins of a RoI
        "all_edges": ((s.R, edges), np.int64),  # of those of all RoIs
        "where": ((threads, bins * LANES), np.int64),  # the maxima of a slab are
    }


# ---------------------------------------------------------------- arrays, on their way to a worker


def constants_of(spatial_scale: float, rule: Rule, dtype: np.dtype) -> np.ndarray:
    """The numbers of a call that are no integers: `scale` and `factor` of Regions."""
    return np.array([spatial_scale, rule.factor], accumulator(dtype))


def prepared(*arrays: np.ndarray | None, dtype: np.dtype) -> list[np.ndarray | None]:
    """Arrays, or copies, that are C-contiguous, aligned and of the type of sums. Workers get addresses, so that no
    kernel is compiled again for other strides or alignments: the caller must hold the arrays until they are done."""
    real = accumulator(dtype)
    given = [array for array in arrays if array is not None]
    check(24 * len(given[0]) + sum(array.size for array in given) * real.itemsize, "RoIs in order")
    return [None if array is None else np.require(array, real, ("C", "A")) for array in arrays]


def by_image(rois: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """`order`: the RoIs' numbers, by image; `first_of`, (images + 1,): where each image's begin in it."""
    image = rois[:, 0].astype(np.int64)
    order = np.argsort(image, kind="stable")
    return order, np.searchsorted(image[order], np.arange(images + 1)).astype(np.int64)


# ---------------------------------------------------------------- pieces of all workers


@spliced
def shape_from(numbers):
    """The Shape at the start of a call's numbers."""
    return Shape(*to_fixed_tuple(numbers[:SHAPE_FIELDS], SHAPE_FIELDS))


class Regions(NamedTuple):
    """The regions of interest: addresses of C-contiguous arrays of the type of sums, and what they are scaled by."""

    rois: int  # (R, 5)
    offset: int  # (R, 2*classes, part_h, part_w); 0 if there is none
    mask: int  # (R, PH, PW); 0 if there is none
    scale: float
    factor: float


@spliced
def regions_from(arrays, i, constants):
    """Of `Array`s i (rois), i + 1 (offset) and i + 2 (mask) of a call's numbers."""
    rois, offset, mask = array_from(arrays, i), array_from(arrays, i + 1), array_from(arrays, i + 2)
    return Regions(rois.address, offset.address, mask.address, constants[0], constants[1])


class Piece(NamedTuple):
    """A piece of work: some RoIs of image n, and some channels."""

    n: int
    first: int  # channel
    last: int  # the channel after the last
    cls: int
    part: int  # the channels' range in their class
    low: int  # places in `order`
    high: int


@spliced
def pieces(s, units):
    """How many pieces of work there are."""
    return units.shape[0] * s.N * s.chunks


@spliced
def piece(s, units, first_of, item):
    """The item-th piece of work."""
    unit, rest = item // (s.N * s.chunks), item % (s.N * s.chunks)
    n, chunk = rest // s.chunks, rest % s.chunks
    first, here = first_of[n], first_of[n + 1] - first_of[n]
    low, high = first + here * chunk // s.chunks, first + here * (chunk + 1) // s.chunks
    channel = units[unit, 0]
    return Piece(n, channel, channel + units[unit, 1], units[unit, 2], units[unit, 3], low, high)


@spliced
def slabs_of(channels):
    """How many slabs hold so many channels."""
    return (channels + LANES - 1) // LANES


@spliced
def in_place(s, array, n, c0, itemsize):
    """The address of the maps of output channel c0 of image n in a C-contiguous array of the type of sums."""
    return array.address + (n * s.C + c0 * s.groups_h * s.groups_w) * s.H * s.W * itemsize


@spliced
def map_step(s, itemsize):
    """Bytes from one slab's maps, or one channel's where lanes = 1, to the next."""
    return s.groups_h * s.groups_w * s.H * s.W * s.lanes * itemsize


@inner
def score_map(s, ph, pw):
    """Which of a class's score maps bin (ph, pw) reads."""
    become_part()
    gh = min(ph * s.groups_h // s.PH, s.groups_h - 1)
    return gh * s.groups_w + min(pw * s.groups_w // s.PW, s.groups_w - 1)


@spliced
def extent(s, regions, r):
    """Where RoI r starts and its size, along y and along x."""
    scale, itemsize = regions.scale, size_of(regions.scale)
    at = regions.rois + r * 5 * itemsize
    start_y, h = start_and_size(s.rule, peek(scale, at + 2 * itemsize), peek(scale, at + 4 * itemsize), scale)
    start_x, w = start_and_size(s.rule, peek(scale, at + itemsize), peek(scale, at + 3 * itemsize), scale)
    return start_y, h, start_x, w


@inner
def find_edges(s, regions, r, edges):
    """RoI r's bins of whole pixels, at the address `edges`: the first row and the row after the last of each ph, then
    the same of the columns of each pw."""
    stay_apart()
    start_y, h, start_x, w = extent(s, regions, r)
    for ph in range(s.PH):
        top, bottom, _ = pooled_bin(s.rule, start_y, h, s.PH, ph, s.H)
        poke(edges + 16 * ph, top)
        poke(edges + 16 * ph + 8, bottom)
    for pw in range(s.PW):
        left, right, _ = pooled_bin(s.rule, start_x, w, s.PW, pw, s.W)
        poke(edges + 16 * (s.PH + pw), left)
        poke(edges + 16 * (s.PH + pw) + 8, right)


@spliced
def edge_pair(edges, i):
    """The i-th pair that find_edges wrote."""
    return peek(i, edges + 16 * i), peek(i, edges + 16 * i + 8)
