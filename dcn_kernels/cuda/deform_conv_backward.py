"""The gradients of deformable convolution: the launcher of deform_conv_backward.cu, depthwise_backward.cu and sums.cu.

As in the forward, what depends on shapes, strides, dtypes and parameters alone is a plan, made once and looked up. For
each chunk a call starts at most six kernels: the copies (images, rows of grad_output, weights), the gradients of the
samples, that of the weights, that of the bias, the sums of their splits, and the copy of grad_input into its own type
and layout. A deterministic grad_input takes those of gather.py beside them.

A chunk is some images or, where the workspace does not hold one image's part, some rows of one image's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dcn_kernels.cuda import depthwise as depthwise_kernel
from dcn_kernels.cuda import device as _device
from dcn_kernels.cuda import product, staging, sums
from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.deform_conv_forward import MOST_OF_A_CHANNEL, OP, PLANS, Layout, is_channels_last, strides_of
from dcn_kernels.cuda.device import DEFAULT_WORKSPACE, Device, has_vector_atomics
from dcn_kernels.cuda.gather import Gatherer
from dcn_kernels.cuda.product import Body, Tile, round_up
from dcn_kernels.cuda.taps import LARGEST, all_types, channels_at_once, conv, set_strides, team, types, widths
from dcn_kernels.dtypes import DTYPES, accumulator

BUILD, DEPTHWISE = "deform_conv_backward", "depthwise_backward"
SLOTS = 8  # of depthwise_backward.cu
LANES = 8  # at most, of a pixel in data_gradients: with V channels each they scatter 32 or more at once
LEAST_PIXELS = 256  # of a split

# As FORWARD in product.py; of `least` the larger of a group's input and output channels is meant. Both kernels of a
# build have the same tile: data_gradients BM pixels by BN channels of a tap, weight_gradient BM outputs by BN channels.
BACKWARD = (
    Tile("half", 65, 128, 128, 2, 4, 2, 1, "76 KB: fits the 99 of sm_86, sm_89 and sm_120 too"),
    Tile("half", 1, 64, 64, 2, 2, 2, 1, "36 KB: up to 64 channels, or more blocks"),
    Tile("split", 65, 128, 128, 2, 4, 2, 1, "136 KB: every tile is two"),
    Tile("split", 1, 64, 64, 2, 2, 2, 1, "68 KB: for 99 KB, up to 64 channels, or more blocks"),
    Tile("tf32", 65, 128, 128, 2, 4, 2, 1, "80 KB"),
    Tile("tf32", 1, 64, 64, 2, 2, 2, 1, "40 KB: up to 64 channels, or more blocks"),
    Tile("plain", 1, 64, 64, 2, 2, 2, 1, "40 KB, float64 too: 128 x 128 would leave no registers for the sampler"),
)


class Step(NamedTuple):
    """A kernel, and what it is started with behind the arrays."""

    start: Callable[[int, tuple[Any, ...]], None]
    blocks: int
    structs: tuple[Any, ...]


class Chunk(NamedTuple):
    """Some images of a call, or some rows of one image's output, and the launches for them."""

    images: slice
    rows: slice | None  # of the output; None: all
    copies: Step | None
    copied: tuple[bool, bool, bool]  # the images, grad_output, the weights
    samples: Step | None  # data_gradients
    gather: np.ndarray | None  # a conv_t: deterministic
    weights: Step | None
    input: Step | None  # from the sums to grad_input


class Plan(NamedTuple):
    """How a call is run."""

    memory: dict[str, tuple[tuple[int, ...], np.dtype]]  # temporary arrays
    chunks: tuple[Chunk, ...]
    bias: Step | None
    sums: Step | None
    depthwise: bool
    in_place: bool  # grad_input is summed up where the result stands
    gatherer: tuple[int, int, np.dtype] | None  # what a Gatherer is made of
    gather_VEC: int
    types: Flags


def deform_conv2d_backward(
    grad_output: Any,  # (N, O, OH, OW)
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    precision: str,
    deterministic: bool,
    workspace_bytes: int | None,
    wrt: tuple[str, ...],
    device: Device | None = None,
) -> dict[str, Any]:
    """Eq. 7 and the transposes of Eq. 2 in its other arguments. Returns argument name -> gradient."""
    device = device or _device.current()
    given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    grads = {name: device.empty(given[name].shape, given[name].dtype) for name in wrt}
    if grad_output.size == 0:
        for grad in grads.values():
            device.clear(grad)
        return grads
    arrays = (grad_output, input, offset, weight, mask)
    plan = _plan(
        device, tuple(None if array is None else (array.shape, array.strides, array.dtype) for array in arrays),
        device.address(input) % 16 == 0, tuple(wrt), stride, padding, dilation, border, precision, deterministic,
        workspace_bytes,
    )  # fmt: skip
    # all memory before the first launch
    memory = {name: device.empty(shape, dtype) for name, (shape, dtype) in plan.memory.items()}
    gatherer = None if plan.gatherer is None else Gatherer(device, *plan.gatherer, op=OP)
    if plan.in_place:
        device.clear(grads["input"])
    for chunk in plan.chunks:
        _run(device, plan, chunk, arrays, grads, memory, gatherer)
    if plan.bias is not None:
        plan.bias.start(plan.bias.blocks, (grad_output, memory["bias"], *plan.bias.structs))
    if plan.sums is not None:
        own = (memory.get("weight"), grads.get("weight"), memory.get("bias"), grads.get("bias"))
        plan.sums.start(plan.sums.blocks, (*own, *plan.sums.structs))
    return grads


def _run(
    device: Device, plan: Plan, chunk: Chunk, arrays: tuple[Any, ...], grads: dict[str, Any], memory: dict[str, Any],
    gatherer: Gatherer | None,
) -> None:  # fmt: skip
    """Start a chunk's kernels."""
    grad_output, input, offset, weight, mask = arrays
    images = chunk.images
    x, own_offset, own_mask = input[images], offset[images], None if mask is None else mask[images]
    outputs = grad_output[images] if chunk.rows is None else grad_output[images, :, chunk.rows]
    stage, total, column = memory.get("stage"), memory.get("sums"), memory.get("column")
    rows, matrix = _parts(memory.get("rows")), _parts(memory.get("matrix"))
    if chunk.copies is not None:
        jobs: tuple[Any, ...] = ()
        for wanted, job in zip(chunk.copied, ((x, stage, None), (outputs, *rows), (weight, *matrix)), strict=True):
            jobs += job if wanted else ()
        nothing = (None,) * (3 * staging.COPIES - len(jobs))
        chunk.copies.start(chunk.copies.blocks, (*jobs, *nothing, *chunk.copies.structs))
    source = x if stage is None else stage
    if plan.depthwise:  # its kernels know of no low part
        rows, matrix = rows[:1], matrix[:1]
    if chunk.samples is not None:
        if total is not None and (chunk.rows is None or chunk.rows.start == 0):
            device.clear(total)
        sums_of_input = grads["input"][images] if plan.in_place else total
        own = tuple(grads[name][images] if name in grads else None for name in ("offset", "mask"))
        scattered = None if gatherer else sums_of_input
        args = (source, own_offset, own_mask, *rows, *matrix, scattered, *own, column, *chunk.samples.structs)
        chunk.samples.start(chunk.samples.blocks, args)
        if gatherer is not None and chunk.gather is not None:
            gatherer.add(
                chunk.gather, plan.types, own_offset, own_mask, column, sums_of_input, VEC=plan.gather_VEC,
                planes=False,
            )  # fmt: skip
    if chunk.weights is not None:
        args = (source, own_offset, own_mask, *rows, memory["weight"], *chunk.weights.structs)
        chunk.weights.start(chunk.weights.blocks, args)
    if chunk.input is not None:
        nothing = (None,) * (3 * (staging.COPIES - 1) + 1)
        chunk.input.start(chunk.input.blocks, (total, grads["input"][images], *nothing, *chunk.input.structs))


def _parts(matrix: Any) -> tuple[Any, ...]:
    """A matrix of one or two parts as (high, low); low may be None, as both may."""
    if matrix is None:
        return None, None
    return matrix[0], matrix[1] if len(matrix) > 1 else None


@lru_cache(maxsize=PLANS)
def _plan(
    device: Device,
    layouts: tuple[Any, ...],
    aligned: bool,
    wrt: tuple[str, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    precision: str,
    deterministic: bool,
    workspace_bytes: int | None,
) -> Plan:
    """The plan of a call: of its arrays' layouts and its parameters alone."""
    grad_output, input, offset, weight, mask = (None if layout is None else Layout(*layout) for layout in layouts)
    assert grad_output and input and offset and weight
    (N, C, H, W), (O, width, KH, KW), (OH, OW) = input.shape, weight.shape, offset.shape[2:]
    dtype, real, groups, taps, area = input.dtype, accumulator(input.dtype), C // width, KH * KW, OH * OW
    OG = offset.shape[1] // (2 * taps)
    per_og, itemsize, piece = C // OG, dtype.itemsize, product.PIECE_BYTES // dtype.itemsize
    depthwise = groups == C > 1 and O <= MOST_OF_A_CHANNEL * C
    body = product.PLAIN if depthwise else product.body(dtype, precision, device.capability)
    parts = 2 if body.split else 1
    samples, weights = bool({"input", "offset", "mask"} & set(wrt)), "weight" in wrt
    reads = weights or bool({"offset", "mask"} & set(wrt))  # the input
    sorts = deterministic and "input" in wrt
    gather_VEC = channels_at_once(dtype, per_og, width)
    if depthwise:
        M, width = O // C, C  # to its kernels all channels are one group
        row_shape: tuple[int, ...] = (M, round_up(C, piece))
        matrix_shape: tuple[int, ...] = (M, taps, row_shape[1])
    else:
        row_shape = (groups, round_up(O // groups, piece))
        matrix_shape = (groups, taps, width, row_shape[1])
    VEC = channels_at_once(dtype, per_og, width)
    c_types = types(dtype, offset.dtype, None if mask is None else mask.dtype)
    WIDE = product.share_an_offset_group(width, per_og, dtype)

    # how the kernels are built, and how many splits the sum over pixels has
    if depthwise:
        flags: Flags = {**c_types, "VEC": VEC, "WIDE": WIDE, "VECTOR_ATOMICS": device.vector_atomics}
        stem, threads, shared = DEPTHWISE, depthwise_kernel.THREADS, (0, 0)
        weight_tiles = taps * -(-C * itemsize // product.ROW_BYTES) * M
    else:
        tile = _choose(body, dtype, WIDE, device, N * area, max(width, O // groups), taps)
        flags, shared = build_flags({**c_types, "VEC": VEC, "WIDE": WIDE}, tile, body, device.capability)
        stem, threads = BUILD, tile.threads
        weight_tiles = groups * taps * -(-width // tile.BN) * -(-(O // groups) // tile.BM)
    budget = workspace_bytes or DEFAULT_WORKSPACE
    weight_bytes = math.prod(weight.shape) * real.itemsize
    splits = sums.splits(
        weight_tiles, N * area, LEAST_PIXELS, device.multiprocessors, max(1, budget // 4 // max(1, weight_bytes))
    )
    bias_splits = sums.splits(O, N * area, LEAST_PIXELS, device.max_blocks, 1 << 10)

    # memory: what all chunks share, then as many images as fit beside it, else rows of one image's output
    memory: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    if samples:
        memory["matrix"] = (parts, *matrix_shape), dtype
    if weights:
        memory["weight"] = (splits, O, taps, weight.shape[1]), real
    if "bias" in wrt:
        memory["bias"] = (bias_splits, O), real
    budget -= sum(math.prod(shape) * kind.itemsize for shape, kind in memory.values())
    staged = reads and not is_channels_last(input, VEC, aligned)
    stage_bytes, sums_bytes = C * H * W * itemsize * staged, C * H * W * real.itemsize * ("input" in wrt)
    sort_bytes = 0
    slot_bytes = 0
    if sorts:
        empty = Gatherer.nbytes(0, 0, real)
        budget -= empty
        sort_bytes, slot_bytes = 8 * Gatherer.cells(1, OG, H, W), Gatherer.nbytes(taps * OG, 0, real) - empty
    image_bytes = stage_bytes + sums_bytes
    channels_last = not (image_bytes and 4 * image_bytes > 3 * budget)
    if not channels_last:  # on the planes as they are
        VEC = gather_VEC = 1
        flags = {**flags, "VEC": 1}
        staged, stage_bytes = False, 0
    in_place = "input" in wrt and not channels_last and real == dtype
    image_bytes = stage_bytes + (0 if in_place else sums_bytes) + sort_bytes
    row_bytes = parts * math.prod(row_shape) * itemsize
    pixel_bytes = row_bytes + sorts * (C * taps * real.itemsize + slot_bytes)
    most = LARGEST // max(1, taps * OG if sorts else 1)
    images = max(0, min(N, most // area, budget // (image_bytes + area * pixel_bytes)))
    lines = OH
    if images == 0:
        images, lines = 1, max(1, min(OH, most // OW, (budget - image_bytes) // (pixel_bytes * OW)))
    pixels = images * lines * OW  # of the largest chunk
    if samples or weights:
        memory["rows"] = (parts, pixels, *row_shape), dtype
    if staged:
        memory["stage"] = (images, H, W, C), dtype
    total = None
    if "input" in wrt and not in_place:
        shape = (images, H, W, C) if channels_last else (images, C, H, W)
        memory["sums"] = shape, real
        axes = (0, 3, 1, 2) if channels_last else (0, 1, 2, 3)
        total = Layout((images, C, H, W), strides_of(shape, real.itemsize, axes), real)
    gatherer = None
    if sorts:
        memory["column"] = (pixels, C, taps), real
        gatherer = (pixels * taps * OG, Gatherer.cells(images, OG, H, W), real)
    result = Layout(input.shape, strides_of(input.shape, itemsize, (0, 1, 2, 3)), dtype)

    # structs
    stage = Layout((images, C, H, W), strides_of((images, H, W, C), itemsize, (0, 3, 1, 2)), dtype)
    source = stage if staged else input
    s = conv(
        OP, input, offset, (KH, KW), groups=groups, stride=stride, padding=padding, dilation=dilation, border=border
    )
    set_strides(s, "input", source)
    set_strides(s, "offset", offset)
    if mask is not None:
        set_strides(s, "mask", mask)
    if "input" in wrt:
        set_strides(s, "grad", total or result)
    s["lanes"] = team(-(-per_og // min(VEC, 4)), 32 if depthwise else LANES)
    f = product.product(
        O=O, width=width, padded=row_shape[1], padded_o=row_shape[1], splits=splits, right=source.strides[3],
        down=source.strides[2],
    )  # fmt: skip
    wide = not depthwise and (per_og % width == 0 or (per_og % tile.BN == 0 and width % per_og == 0))

    def function(name: str, build: Flags, of: str = stem, block: int = threads, shared_bytes: int = 0) -> Any:
        return device.function(of, name, build, block, shared_bytes=shared_bytes, op=OP)

    def copies(of: list[tuple[Layout, Layout, bool]], split: bool) -> Step | None:
        if not of:
            return None
        struct = staging.layout(of)
        build = staging.copy_flags(of[0][0].dtype.name, of[0][1].dtype.name, split)
        start = function("copy", build, staging.BUILD, staging.THREADS)
        return Step(start, int(struct["of"]["parts"].sum()), (struct,))

    chunks: list[Chunk] = []
    for first in range(0, N, images) if samples or weights else ():
        for line in range(0, OH, lines):
            n, run = min(images, N - first), slice(line, min(line + lines, OH))
            own, own_f = s.copy(), f.copy()
            own["images"], own["first_pixel"], own["pixels"] = n, line * OW, (run.stop - line) * OW
            own_f["total"] = m = n * int(own["pixels"][0])
            begins, ends, first_of_all = line == 0, run.stop == OH, not chunks
            copied = (staged and begins, True, samples and first_of_all)
            output = Layout((n, O, run.stop - line, OW), grad_output.strides, dtype)
            targets = (
                (Layout((n, C, H, W), input.strides, dtype), Layout((n, C, H, W), stage.strides, dtype), False),
                (*_rows(output, row_shape, groups, depthwise), True),
                (*_matrix(weight, matrix_shape, groups, depthwise), True),
            )
            data = weight_step = finish = gather = None
            if samples:
                if depthwise:
                    blocks = -(-m // depthwise_kernel.TILE) * -(-taps * OG // SLOTS)
                    data = Step(function("depthwise_data_gradients", flags), blocks, (own, own_f))
                else:
                    start = function("data_gradients", flags, shared_bytes=shared[0])
                    data = Step(start, -(-m // tile.BM) * taps, (own, own_f, np.int32(wide)))
            if sorts:
                gather = own.copy()
                gather["lanes"] = team(per_og // gather_VEC, 32)
            if weights:
                name = "depthwise_weight_gradient" if depthwise else "weight_gradient"
                start = function(name, flags, shared_bytes=shared[1])
                weight_step = Step(start, weight_tiles * splits, (own, own_f, np.int32(not first_of_all)))
            if total is not None and ends:
                some = Layout((n, C, H, W), total.strides, real), Layout((n, C, H, W), result.strides, dtype)
                finish = copies([(*some, False)], False)
            chunks.append(
                Chunk(
                    slice(first, first + n), None if lines == OH else run,
                    copies([target for target, wanted in zip(targets, copied, strict=True) if wanted], body.split),
                    copied, data, gather, weight_step, finish,
                )
            )  # fmt: skip
    bias_step = sums_step = None
    if "bias" in wrt:
        steps = (np.int64(step // itemsize) for step in grad_output.strides)
        sizes = (np.int32(size) for size in (O, N * area, OH, OW, bias_splits))
        start = function("bias_gradient", sums.flags(dtype.name), sums.BUILD, sums.THREADS)
        bias_step = Step(start, O * bias_splits, (*sizes, *steps))
    if weights or "bias" in wrt:
        start = function("ordered_sums", sums.flags(dtype.name), sums.BUILD, sums.THREADS)
        sizes = (np.int32(size) for size in (O, taps, weight.shape[1], splits, bias_splits))
        sums_step = Step(start, -(-(math.prod(weight.shape) + O) // sums.THREADS), tuple(sizes))
    return Plan(memory, tuple(chunks), bias_step, sums_step, depthwise, in_place, gatherer, gather_VEC, c_types)


def _rows(output: Layout, shape: tuple[int, ...], groups: int, depthwise: bool) -> tuple[Layout, Layout]:
    """grad_output of a chunk, and its rows [pixels, *shape], with the same axes: channels as two."""
    (n, O, height, width), (step_n, step_o, step_y, step_x) = output.shape, output.strides
    itemsize = output.dtype.itemsize
    pixel = math.prod(shape) * itemsize
    if depthwise:  # (image, channel, one of M, y, x)
        M, padded = shape
        source = (n, O // M, M, height, width), (step_n, step_o * M, step_o, step_y, step_x)
        target = (
            (n, padded, M, height, width),
            (height * width * pixel, itemsize, padded * itemsize, width * pixel, pixel),
        )
    else:  # (image, group, channel, y, x)
        padded, of_group = shape[1], O // groups
        source = (n, groups, of_group, height, width), (step_n, step_o * of_group, step_o, step_y, step_x)
        target = (
            (n, groups, padded, height, width),
            (height * width * pixel, padded * itemsize, itemsize, width * pixel, pixel),
        )
    return Layout(*source, output.dtype), Layout(*target, output.dtype)


def _matrix(weight: Layout, shape: tuple[int, ...], groups: int, depthwise: bool) -> tuple[Layout, Layout]:
    """The weights, and their matrix of `shape`, with the same axes: output channels as two."""
    (O, width, KH, KW), (step_o, step_c, step_y, step_x) = weight.shape, weight.strides
    itemsize, padded = weight.dtype.itemsize, shape[-1]
    source: tuple[tuple[int, ...], tuple[int, ...]]
    target: tuple[tuple[int, ...], tuple[int, ...]]
    if depthwise:  # (channel, one of M, ky, kx) to [M, KH*KW, padded]
        M = shape[0]
        source = (O // M, M, KH, KW), (step_o * M, step_o, step_y, step_x)
        tap = padded * itemsize
        target = (padded, M, KH, KW), (itemsize, KH * KW * tap, KW * tap, tap)
    else:  # (group, output, input, ky, kx) to [groups, KH*KW, width, padded]
        of_group, tap = O // groups, width * padded * itemsize
        source = (groups, of_group, width, KH, KW), (step_o * of_group, step_o, step_c, step_y, step_x)
        target = (groups, padded, width, KH, KW), (KH * KW * tap, itemsize, padded * itemsize, KW * tap, tap)
    return Layout(source[0], source[1], weight.dtype), Layout(target[0], target[1], weight.dtype)


def shared_bytes(tile: Tile, dtype: np.dtype, split: bool, WIDE: bool) -> tuple[int, int]:
    """What a block of data_gradients takes, and one of weight_gradient; checked when they are compiled."""
    real, parts, chunk = accumulator(dtype).itemsize, (2 if split else 1), product.ROW_BYTES // dtype.itemsize
    spot, place = (48, 64) if real == 8 else (32, 32)
    A, B = (size * product.ROW_BYTES * parts for size in (tile.BM, tile.BN))
    grad_row = tile.BN + (product.PIECE_BYTES // real if tile.body == "plain" else 8)
    data = max(tile.STAGES * (A + B), tile.BM * grad_row * real) + tile.BM * (2 * 4 * real + spot)
    return data, tile.STAGES * A + 2 * B + WIDE * 2 * tile.BN // chunk * chunk * place


def fitting(body: Body, dtype: np.dtype, WIDE: bool, capability: tuple[int, int]) -> list[Tile]:
    """The rows that a block's shared memory takes."""
    most = product.shared_bytes_of_a_block(capability)
    return [t for t in BACKWARD if t.body == body.name and max(shared_bytes(t, dtype, body.split, WIDE)) <= most]


def _choose(body: Body, dtype: np.dtype, WIDE: bool, device: Device, pixels: int, channels: int, taps: int) -> Tile:
    """The first row that is for the layer and gives every multiprocessor a block, else the last."""
    tiles = [tile for tile in fitting(body, dtype, WIDE, device.capability) if channels >= tile.least]
    filling = (tile for tile in tiles if -(-pixels // tile.BM) * taps >= device.multiprocessors)
    return next(filling, tiles[-1])


def build_flags(flags: Flags, tile: Tile, body: Body, capability: tuple[int, int]) -> tuple[Flags, tuple[int, int]]:
    """The macros of a build, and the shared memory of the blocks of its two kernels."""
    dtype = next(np.dtype(DTYPES[name]) for name, ctype in CTYPES.items() if ctype == flags["scalar_t"])
    data, weight = shared_bytes(tile, dtype, body.split, flags["WIDE"])
    macros = {"MATRIX_UNITS": body.matrix_units, "SPLIT": body.split, "DATA_BYTES": data, "WEIGHT_BYTES": weight}
    sizes = {name: getattr(tile, name) for name in ("BM", "BN", "WARPS_M", "WARPS_N", "STAGES")}
    return {**flags, **sizes, **macros, "VECTOR_ATOMICS": has_vector_atomics(capability)}, (data, weight)


def dynamic_shared_bytes(kernel: str, flags: Flags) -> int:
    """What a launch of a kernel asks for."""
    return {"data_gradients": flags["DATA_BYTES"], "weight_gradient": flags["WEIGHT_BYTES"]}[kernel]


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """Builds of every row of the table, and of every way to load and mix of types: those that the forward has too."""
    for name, c_types in all_types():
        dtype, most = np.dtype(DTYPES[name]), widths(name)[-1]
        one_type = c_types["offset_t"] == c_types["mask_t"] == c_types["scalar_t"]
        precisions = ("float32", "ieee", "tf32") if name == "float32" else ("float32",)
        for body in dict.fromkeys(product.body(dtype, precision, capability) for precision in precisions):
            tiles = fitting(body, dtype, True, capability)
            if name == "bfloat16" or not one_type:
                tiles = tiles[:1] if one_type else tiles[-1:]
            builds = [(tile, most, True) for tile in tiles]
            if one_type and name != "bfloat16" and body.name != "tf32":
                builds += [(tiles[0], VEC, False) for VEC in widths(name)]
                builds += [(tiles[-1], VEC, True) for VEC in widths(name)[:-1]]
            for tile, VEC, WIDE in builds:
                if not one_type and (c_types["offset_t"] == c_types["scalar_t"] or c_types["mask_t"] == "float"):
                    continue  # of the mixes one: how the coordinates are read does not touch the main loop
                yield build_flags({**c_types, "VEC": VEC, "WIDE": WIDE}, tile, body, capability)[0]
