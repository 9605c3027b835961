"""Deformable convolution: the launcher of deform_conv_forward.cu and, where groups = C, of depthwise.cu.

What depends on shapes, strides, dtypes and parameters alone is a plan: which kernel with which tile, its structs, what
is copied before it. It is made once and looked up. A call then takes its temporary memory and starts, for each chunk of
images, at most two kernels: the copy of the weights and of the images into the kernel's layout, and the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dcn_kernels.cuda import depthwise as depthwise_kernel
from dcn_kernels.cuda import device as _device
from dcn_kernels.cuda import product, staging
from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.device import DEFAULT_WORKSPACE, Device
from dcn_kernels.cuda.taps import LARGEST, all_types, channels_at_once, conv, set_strides, types, widths
from dcn_kernels.dtypes import DTYPES

OP, BUILD = "deform_conv2d", "deform_conv_forward"

MOST_OF_A_CHANNEL = 4  # outputs of an input channel: with more of them the product shares more samples
PLANS = 256  # kept


class Layout(NamedTuple):
    """What is known of an array before there is one."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: np.dtype


class Chunk(NamedTuple):
    """Some images of a call, and the launches for them."""

    images: slice | None  # None: all
    blocks: int
    structs: tuple[np.ndarray, np.ndarray]
    copy: Callable[[int, tuple[Any, ...]], None] | None
    copy_blocks: int
    copy_struct: np.ndarray | None
    packs: bool  # the copy also packs the weights ...
    splits: bool  # ... in two parts


class Plan(NamedTuple):
    """How a call is run."""

    start: Callable[[int, tuple[Any, ...]], None]
    chunks: tuple[Chunk, ...]
    stage_shape: tuple[int, ...] | None  # of the images of a chunk, channels last; None: they are read in place
    matrix_shape: tuple[int, ...] | None  # of the packed weights, in one or two parts; None: they are read in place


def deform_conv2d(
    input: Any,  # (N, C, H, W)
    offset: Any,  # (N, 2*OG*KH*KW, OH, OW)
    weight: Any,  # (O, C/groups, KH, KW)
    bias: Any,  # (O,) or None
    mask: Any,  # (N, OG*KH*KW, OH, OW) or None
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    precision: str,
    workspace_bytes: int | None,
    out: Any = None,
    device: Device | None = None,
) -> Any:
    """Eq. 2. Returns (N, O, OH, OW)."""
    device = device or _device.current()
    y = out
    if y is None:
        y = device.empty((input.shape[0], weight.shape[0], *offset.shape[2:]), input.dtype)
    if y.size == 0:
        return y
    arrays = (input, offset, weight, bias, mask, y)
    layouts = tuple(None if array is None else (array.shape, array.strides, array.dtype) for array in arrays)
    aligned = (device.address(input) % 16 == 0, device.address(weight) % 16 == 0)
    plan = _plan(device, layouts, aligned, stride, padding, dilation, border, precision, workspace_bytes)
    stage = None if plan.stage_shape is None else device.empty(plan.stage_shape, input.dtype)
    matrix = weight if plan.matrix_shape is None else device.empty(plan.matrix_shape, input.dtype)
    for chunk in plan.chunks:
        x, own_offset, own_mask, own_y = input, offset, mask, y
        if chunk.images is not None:
            x, own_offset, own_y = input[chunk.images], offset[chunk.images], y[chunk.images]
            own_mask = None if mask is None else mask[chunk.images]
        if chunk.copy is not None:
            jobs: tuple[Any, ...] = (weight, matrix, matrix[1] if chunk.splits else None) if chunk.packs else ()
            if stage is not None:
                jobs += (x, stage, None)
            chunk.copy(chunk.copy_blocks, (*jobs, *[None] * (3 * staging.COPIES - len(jobs)), chunk.copy_struct))
        source = x if stage is None else stage
        plan.start(chunk.blocks, (source, own_offset, own_mask, matrix, bias, own_y, *chunk.structs))
    return y


@lru_cache(maxsize=PLANS)
def _plan(
    device: Device,
    layouts: tuple[Any, ...],
    aligned: tuple[bool, bool],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    precision: str,
    workspace_bytes: int | None,
) -> Plan:
    """The plan of a call: of its arrays' layouts and its parameters alone."""
    input, offset, weight, bias, mask, y = (None if layout is None else Layout(*layout) for layout in layouts)
    assert input and offset and weight and y
    (N, C, H, W), (O, width, KH, KW) = input.shape, weight.shape
    dtype, groups, taps, area = input.dtype, C // width, KH * KW, offset.shape[2] * offset.shape[3]
    per_og = C // (offset.shape[1] // (2 * taps))
    depthwise = groups == C > 1 and O <= MOST_OF_A_CHANNEL * C
    body = product.body(dtype, precision, device.capability) if not depthwise else product.PLAIN
    if depthwise:
        width = C  # to its kernel all channels are one group

    # memory: the packed weights, and as many images as fit beside them
    piece = product.PIECE_BYTES // dtype.itemsize
    padded = product.round_up(width, piece)
    matrix = Layout((O // C, taps, padded) if depthwise else (O, taps, padded), (), dtype)
    matrix_bytes = int(np.prod(matrix.shape)) * dtype.itemsize * (2 if body.split else 1)
    VEC = channels_at_once(dtype, per_og, width)
    staged, channels_last = False, is_channels_last(input, VEC, aligned[0])
    image_bytes = C * H * W * dtype.itemsize
    images = min(N, LARGEST // area)
    if not channels_last:
        fitting = ((workspace_bytes or DEFAULT_WORKSPACE) - matrix_bytes) // image_bytes
        if staged := fitting > 0:
            images = min(images, fitting)
        else:
            VEC = 1  # on the planes as they are
    stage = Layout((images, C, H, W), strides_of((images, H, W, C), dtype.itemsize, (0, 3, 1, 2)), dtype)
    source = stage if staged else input
    WIDE = product.share_an_offset_group(width, per_og, dtype)

    # kernel
    flags = {**types(dtype, offset.dtype, None if mask is None else mask.dtype), "VEC": VEC, "WIDE": WIDE}
    if depthwise:
        flags["TAPS"] = depthwise_kernel.TAPS
        start = device.function("depthwise", "depthwise_forward", flags, depthwise_kernel.THREADS, op=OP)
        across = -(-C * dtype.itemsize // product.ROW_BYTES) * (O // C)
    else:
        tiles = product.fitting(body, dtype, WIDE, device.capability)
        tile = product.choose(tiles, images * area, O // groups, groups, device.multiprocessors)
        flags, shared = _flags(flags, tile, body)
        start = device.function(BUILD, BUILD, flags, tile.threads, shared_bytes=shared, op=OP)
        across = tile.blocks(1, O // groups, groups)

    # weights: [O, C/groups, KH, KW] to [O, KH, KW, padded]; depthwise [C, M, KH, KW] to [M, KH, KW, padded]
    per_element = dtype.itemsize
    kernel_strides = (KW * padded * per_element, padded * per_element)
    if depthwise:
        M = O // C
        of_weight = Layout((C, M, KH, KW), (weight.strides[0] * M, weight.strides[0], *weight.strides[2:]), dtype)
        packed = Layout((padded, M, KH, KW), (per_element, taps * padded * per_element, *kernel_strides), dtype)
    else:
        of_weight = weight
        packed = Layout((O, padded, KH, KW), (taps * padded * per_element, per_element, *kernel_strides), dtype)
    packs = body.split or not aligned[1] or not _same(of_weight, packed)

    # structs
    s = conv(
        OP, input, offset, (KH, KW), groups=groups, stride=stride, padding=padding, dilation=dilation, border=border
    )
    s["pixels"] = area
    set_strides(s, "input", source)
    set_strides(s, "offset", offset)
    if mask is not None:
        set_strides(s, "mask", mask)
    steps = [step // dtype.itemsize for step in y.strides]
    f = product.product(
        O=O, width=width, padded=padded, right=source.strides[3], down=source.strides[2],
        y_n=steps[0], y_o=steps[1], y_y=steps[2], y_x=steps[3],
        bias_o=0 if bias is None else bias.strides[0] // dtype.itemsize,
    )  # fmt: skip
    chunks = []
    for first in range(0, N, images):
        n = min(images, N - first)
        own_s, own_f = s.copy(), f.copy()
        own_s["images"], own_f["total"] = n, n * area
        packs_now = packs and first == 0
        copies = [(of_weight, packed, True)] if packs_now else []
        if staged:
            some = Layout((n, C, H, W), stage.strides, dtype)
            copies.append((Layout(some.shape, input.strides, dtype), some, False))
        struct = staging.layout(copies)
        copy = device.function(
            staging.BUILD, "copy", staging.copy_flags(dtype.name, dtype.name, body.split and packs_now),
            staging.THREADS, op=OP,
        ) if copies else None  # fmt: skip
        down = -(-n * area // (depthwise_kernel.TILE if depthwise else tile.BM))
        chunks.append(
            Chunk(
                None if n == N else slice(first, first + n), down * across, (own_s, own_f), copy,
                int(struct["of"]["parts"].sum()), struct, packs_now, body.split,
            )
        )  # fmt: skip
    return Plan(
        start,
        tuple(chunks),
        (images, H, W, C) if staged else None,
        (2 if body.split else 1, *matrix.shape) if packs else None,
    )


def is_channels_last(input: Layout, VEC: int, aligned: bool) -> bool:
    """Whether the kernels can load VEC channels at once from the caller's own array."""
    steps = [stride // input.dtype.itemsize for stride in input.strides]
    return steps[1] == 1 and aligned and all(step % VEC == 0 for step in (steps[0], steps[2], steps[3]))


def _same(one: Layout, other: Layout) -> bool:
    """Whether two layouts place every element alike."""
    pairs = zip(one.shape, one.strides, other.strides, strict=True)
    return one.shape == other.shape and all(a == b or size == 1 for size, a, b in pairs)


def strides_of(shape: tuple[int, ...], itemsize: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a C-contiguous array, its axes transposed."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides[axis] for axis in axes)


def _flags(flags: Flags, tile: product.Tile, body: product.Body) -> tuple[Flags, int]:
    """The macros of a build, and the shared memory of its blocks."""
    dtype = next(np.dtype(DTYPES[name]) for name, ctype in CTYPES.items() if ctype == flags["scalar_t"])
    shared = product.shared_bytes(tile, dtype, body.split, flags["WIDE"])
    macros = {"MATRIX_UNITS": body.matrix_units, "SPLIT": body.split, "SHARED_BYTES": shared}
    return {**flags, **tile.flags(), **macros}, shared


def dynamic_shared_bytes(kernel: str, flags: Flags) -> int:
    """What a launch of the kernel asks for."""
    return flags["SHARED_BYTES"]


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """Builds of every row of the table, and of every way to load and mix of types, the hardest in the first row.

    bfloat16 differs from float16 in the words of a few instructions: of it the first row alone is checked.
    """
    for name, c_types in all_types():
        dtype, most = np.dtype(DTYPES[name]), widths(name)[-1]
        one_type = c_types["offset_t"] == c_types["mask_t"] == c_types["scalar_t"]
        precisions = ("float32", "ieee", "tf32") if name == "float32" else ("float32",)
        for body in dict.fromkeys(product.body(dtype, precision, capability) for precision in precisions):
            tiles = product.fitting(body, dtype, True, capability)
            if name == "bfloat16" or not one_type:
                tiles = tiles[:1] if one_type else tiles[-1:]
            builds = [(tile, most, True) for tile in tiles]
            if one_type and name != "bfloat16" and body.name != "tf32":
                builds += [(product.fitting(body, dtype, False, capability)[0], VEC, False) for VEC in widths(name)]
                builds += [(tiles[-1], VEC, True) for VEC in widths(name)[:-1]]
            for tile, VEC, WIDE in builds:
                if not one_type and (c_types["offset_t"] == c_types["scalar_t"] or c_types["mask_t"] == "float"):
                    continue  # of the mixes one: how the coordinates are read does not touch the main loop
                yield _flags({**c_types, "VEC": VEC, "WIDE": WIDE}, tile, body)[0]
