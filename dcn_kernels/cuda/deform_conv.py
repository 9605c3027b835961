"""Deformable convolution as sampled columns times a matrix: the launcher of deform_conv.cu.

Tile by tile: whole images while several fit, else runs of one image's pixels. A tile's columns
(pixels, groups, KH*KW*C/groups) are small enough to stay in the GPU's second-level cache between the kernel that
writes them and the matrix product that reads them. All temporary memory is taken before the first launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcn_kernels.cuda import device as _device
from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.deform_conv_forward import deform_conv2d
from dcn_kernels.cuda.device import DEFAULT_WORKSPACE, SPLIT_CAPABILITIES, Device, has_vector_atomics
from dcn_kernels.cuda.gather import Gatherer
from dcn_kernels.cuda.staging import copy
from dcn_kernels.cuda.taps import LARGEST, all_types, channels_at_once, conv, set_strides, team, types, widths
from dcn_kernels.dtypes import accumulator

__all__ = ["deform_conv2d", "deform_conv2d_backward"]

OP, BUILD = "deform_conv2d", "deform_conv"
THREADS, PIXELS, SLOTS = 256, 32, 8
LEAST_TILE_BYTES = 16 << 20  # of columns, where the cache is small: a matrix product needs some rows
# The matrix units round sums towards zero. Added up in pieces of this length by plain float32 additions, the error of
# a long product stays near that of plain float32.
SPLIT_LENGTH = 1024

Parts = tuple[Any, ...]  # a matrix, or its TF32 numbers and what they leave


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
    call = _Convolution(device, input, offset, weight, mask, stride, padding, dilation, border, precision)
    given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    grads = {name: device.empty(given[name].shape, given[name].dtype) for name in wrt}
    if grad_output.size == 0:
        for grad in grads.values():
            device.clear(grad)
        return grads
    if set(wrt) - {"bias"}:
        _Backward(call, grad_output, grads, deterministic, workspace_bytes or DEFAULT_WORKSPACE).run()
    if "bias" in wrt:
        O, (OH, OW) = weight.shape[0], grad_output.shape[2:]
        sizes = (np.int32(size) for size in (O, input.shape[0], OH, OW))
        strides = (np.int64(stride // grad_output.dtype.itemsize) for stride in grad_output.strides)
        flags = _flags(device, types(input.dtype, offset.dtype, None), 1, False)
        args = (grad_output, grads["bias"], *sizes, *strides)
        device.launch(BUILD, "bias_gradient", flags, O, THREADS, args, op=OP)
    return grads


class _Convolution:
    """What the tiles of one call share, and the steps that both directions take."""

    def __init__(
        self,
        device: Device,
        input: Any,
        offset: Any,
        weight: Any,
        mask: Any,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        border: str,
        precision: str,
    ) -> None:
        self.device, self.input, self.offset, self.weight, self.mask = device, input, offset, weight, mask
        (_, self.C, self.H, self.W), (self.O, width, *kernel) = input.shape, weight.shape
        self.taps, self.groups, self.area = kernel[0] * kernel[1], self.C // width, offset.shape[2] * offset.shape[3]
        self.OG = offset.shape[1] // (2 * self.taps)
        self.row = self.taps * self.C  # elements of a pixel's columns
        self.dtype, self.real = input.dtype, accumulator(input.dtype)
        single = input.dtype == np.float32
        self.split = single and precision == "float32" and device.capability in SPLIT_CAPABILITIES
        self.parts = 2 if self.split else 1
        self.tf32 = single and precision == "tf32"
        self.matrix_bytes = self.parts * weight.size * self.dtype.itemsize
        self.column_bytes = self.parts * self.row * self.dtype.itemsize  # of one pixel
        self.types = types(input.dtype, offset.dtype, None if mask is None else mask.dtype)
        self.conv = conv(
            OP, input, offset, (kernel[0], kernel[1]), groups=self.groups, stride=stride, padding=padding,
            dilation=dilation, border=border,
        )  # fmt: skip
        self.VEC = channels_at_once(input.dtype, self.C // self.OG, width)
        self.channels_last = True
        self.ready = self._is_channels_last()
        self.stage_bytes = 0 if self.ready else self.C * self.H * self.W * self.dtype.itemsize  # of one image

    def _is_channels_last(self) -> bool:
        """Whether the kernels can load VEC channels at once from the caller's own array."""
        steps = [stride // self.dtype.itemsize for stride in self.input.strides]
        aligned = self.device.address(self.input) % 16 == 0 and all(
            step % self.VEC == 0 for step in steps[:1] + steps[2:]
        )
        return steps[1] == 1 and aligned

    def lay_out(self, budget: int, image_bytes: int) -> None:
        """Work channels-last if one image's `image_bytes` leave memory for columns, else on the planes as they are."""
        if image_bytes and 4 * image_bytes > 3 * budget:
            self.channels_last, self.VEC, self.stage_bytes = False, 1, 0
        self.conv["lanes"] = team(self.C // self.OG // self.VEC, 32)

    def weight_matrix(self) -> Parts:
        """The weight as (groups, O/groups, taps*C/groups), channels last as columns are."""
        O, width = self.weight.shape[:2]
        parts = tuple(
            self.device.empty((self.groups, O // self.groups, self.taps * width), self.dtype) for _ in range(self.parts)
        )
        if _merges(self.weight, 2):  # the taps as one axis: fuller tiles
            by_tap = (part.reshape(1, O, self.taps, width).transpose(0, 1, 3, 2) for part in parts)
            copy(self.device, self.weight.reshape(1, O, width, self.taps), *by_tap, op=OP)
        else:
            by_tap = (part.reshape(O, *self.weight.shape[2:], width).transpose(0, 3, 1, 2) for part in parts)
            copy(self.device, self.weight, *by_tap, op=OP)
        return parts

    def stage(self, tiles: _Tiles) -> Any:
        """Memory for the images of a tile, channels last; None where they are read in place."""
        if not self.stage_bytes:
            return None
        return self.device.empty((tiles.images, self.H, self.W, self.C), self.dtype).transpose(0, 3, 1, 2)

    def read(self, images: slice, stage: Any) -> tuple[np.ndarray, Any]:
        """A conv_t of some images, and those images as the kernels read them."""
        s, source = self.conv.copy(), self.input[images]
        if stage is not None:
            staged = stage[: source.shape[0]]
            copy(self.device, source, staged, op=OP)
            source = staged
        s["images"] = source.shape[0]
        set_strides(s, "input", source)
        set_strides(s, "offset", self.offset)
        if self.mask is not None:
            set_strides(s, "mask", self.mask)
        return s, source

    def coordinates(self, images: slice) -> tuple[Any, Any]:
        """Offset and mask of some images."""
        return self.offset[images], None if self.mask is None else self.mask[images]

    def launch(self, kernel: str, s: np.ndarray, run: slice, args: tuple[Any, ...]) -> None:
        """Start a kernel on a run of the pixels of the images of `s`."""
        s["first_pixel"], s["pixels"] = run.start, run.stop - run.start
        rows = int(s["images"][0]) * (run.stop - run.start)
        blocks = -(-rows // PIXELS) * -(-self.taps * self.OG // SLOTS)
        split = self.split and kernel == "columns"
        self.device.launch(
            BUILD, kernel, _flags(self.device, self.types, self.VEC, split), blocks, THREADS, (*args, s), op=OP
        )

    def sample(self, s: np.ndarray, source: Any, images: slice, run: slice, columns: Parts) -> Parts:
        """The columns of a tile: (pixels, row) in one or two parts."""
        low = columns[1] if self.split else None
        self.launch("columns", s, run, (source, *self.coordinates(images), columns[0], low))
        return tuple(part[: source.shape[0] * (run.stop - run.start)] for part in columns)

    def multiply(self, a: Parts, b: Parts, out: Any, *, accumulate: bool = False) -> None:
        """out (+)= a @ b in the precision asked for; see Device.matmul."""
        if not self.split:
            self.device.matmul(a[0], b[0], out, tf32=self.tf32, accumulate=accumulate, op=OP)
            return
        (a_high, a_low), (b_high, b_low) = a, b
        inner = a_high.shape[2]
        for start in range(0, inner, SPLIT_LENGTH):  # the small products first
            some = slice(start, min(start + SPLIT_LENGTH, inner))
            for left, right in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
                self.device.matmul(left[:, :, some], right[:, some], out, tf32=True, accumulate=accumulate, op=OP)
                accumulate = True


class _Backward:
    """The gradients but the bias's, accumulated tile by tile."""

    def __init__(
        self, call: _Convolution, grad_output: Any, grads: dict[str, Any], deterministic: bool, budget: int
    ) -> None:
        self.call, self.grad_output, self.grads, device = call, grad_output, grads, call.device
        self.samples = bool({"input", "offset", "mask"} & set(grads))  # wants the gradient of the columns
        self.reads = bool({"offset", "mask", "weight"} & set(grads))  # reads the input
        weight_grad, sorts = "weight" in grads, deterministic and "input" in grads
        O, real, itemsize = call.O, call.real.itemsize, call.dtype.itemsize
        slots, maps = call.taps * call.OG, call.C * call.H * call.W
        if not self.reads:
            call.stage_bytes = 0
        budget -= call.matrix_bytes * self.samples + call.weight.size * real * weight_grad
        slot_bytes = 0
        if sorts:
            base = Gatherer.nbytes(0, 0, call.real)
            budget -= base
            slot_bytes = Gatherer.nbytes(slots, 0, call.real) - base  # of a pixel
        sums_bytes = maps * real if "input" in grads else 0
        self.flat = _merges(grad_output, 2)
        other_bytes = 0 if self.flat else O * call.area * itemsize
        if sorts:
            other_bytes += 8 * Gatherer.cells(1, call.OG, call.H, call.W)
        call.lay_out(budget, call.stage_bytes + sums_bytes + other_bytes)
        # on planes, sums of the result's own type go straight into it
        self.in_place = not call.channels_last and call.real == call.dtype
        image_bytes = call.stage_bytes + other_bytes + (0 if self.in_place else sums_bytes)
        row_bytes = max(call.row * real * self.samples, call.column_bytes * weight_grad)
        pixel_bytes = row_bytes + call.parts * O * itemsize + slot_bytes
        tiles = _Tiles.fit(device, budget, call, image_bytes, pixel_bytes, row_bytes)
        self.tiles = tiles
        # all memory before the first launch
        memory = device.empty((tiles.rows * row_bytes,), np.uint8)  # first the columns' gradient, then the columns
        self.grad_rows = _views(memory, call.real, (tiles.rows, call.row), int(self.samples))
        self.columns = _views(memory, call.dtype, (tiles.rows, call.row), call.parts * weight_grad)
        self.outputs = tuple(device.empty((O, tiles.rows), call.dtype) for _ in range(call.parts))
        self.contiguous = None if self.flat else device.empty((tiles.images, *grad_output.shape[1:]), call.dtype)
        self.stage = call.stage(tiles)
        self.sums = self._sums_memory()
        cells = Gatherer.cells(tiles.images, call.OG, call.H, call.W)
        self.gatherer = Gatherer(device, tiles.rows * slots, cells, call.real, op=OP) if sorts else None
        shape = (call.groups, O // call.groups, call.row // call.groups)
        self.weight_sums = device.empty(shape, call.real) if weight_grad else None
        self.matrix = call.weight_matrix() if self.samples else ()

    def _sums_memory(self) -> Any:
        """Where grad_input is summed up, (images, C, H, W) by strides: the result, or memory for a tile's images."""
        call = self.call
        if "input" not in self.grads or self.in_place:
            return self.grads.get("input")
        if call.channels_last:
            memory = call.device.empty((self.tiles.images, call.H, call.W, call.C), call.real)
            return memory.transpose(0, 3, 1, 2)
        return call.device.empty((self.tiles.images, call.C, call.H, call.W), call.real)

    def run(self) -> None:
        """Fill the gradients."""
        call, device = self.call, self.call.device
        if self.weight_sums is not None:
            device.clear(self.weight_sums)
        for images in self.tiles.chunks():
            s, source = call.read(images, self.stage)
            grad_output, sums = self._grad_output(images), self._cleared_sums(images)
            if sums is not None:
                set_strides(s, "grad", sums)
            for run in self.tiles.runs():
                outputs = self._stage_outputs(grad_output, run)
                if self.samples:
                    self._sample_gradients(s, source, images, run, outputs, sums)
                if self.weight_sums is not None:
                    columns = call.sample(s, source, images, run, self.columns)
                    call.multiply(outputs, tuple(map(self._by_group, columns)), self.weight_sums, accumulate=True)
            if sums is not None and not self.in_place:
                copy(device, sums, self.grads["input"][images], op=OP)
        if self.weight_sums is not None:
            O, width = call.weight.shape[:2]
            by_tap = self.weight_sums.reshape(1, O, call.taps, width).transpose(0, 1, 3, 2)
            copy(device, by_tap, self.grads["weight"].reshape(1, O, width, call.taps), op=OP)

    def _grad_output(self, images: slice) -> Any:
        """(images, O, area)"""
        part = self.grad_output[images]
        if self.contiguous is not None:
            copy(self.call.device, part, self.contiguous[: part.shape[0]], op=OP)
            part = self.contiguous[: part.shape[0]]
        return part.reshape(*part.shape[:2], self.call.area)

    def _cleared_sums(self, images: slice) -> Any:
        if self.sums is None:
            return None
        sums = self.sums[images] if self.in_place else self.sums[: images.stop - images.start]
        self.call.device.clear(sums.transpose(0, 2, 3, 1) if self.call.channels_last else sums)
        return sums

    def _stage_outputs(self, grad_output: Any, run: slice) -> Parts:
        """The tile's part of grad_output as (groups, O/groups, pixels), the pixels of all images in a row."""
        part = grad_output[..., run]
        images, O, pixels = part.shape
        targets = (output[:, : images * pixels].reshape(1, O, images, pixels) for output in self.outputs)
        copy(self.call.device, part.reshape(1, *part.shape).transpose(0, 2, 1, 3), *targets, op=OP)
        groups = self.call.groups
        return tuple(output.reshape(groups, O // groups, -1)[:, :, : images * pixels] for output in self.outputs)

    def _by_group(self, rows: Any) -> Any:
        """(pixels, row) as (groups, pixels, row/groups)."""
        return rows.reshape(rows.shape[0], self.call.groups, -1).transpose(1, 0, 2)

    def _sample_gradients(
        self, s: np.ndarray, source: Any, images: slice, run: slice, outputs: Parts, sums: Any
    ) -> None:
        """From the gradient of the columns, those of input, offset and mask."""
        call = self.call
        rows = self.grad_rows[0][: outputs[0].shape[2]]
        call.multiply(tuple(part.transpose(0, 2, 1) for part in outputs), self.matrix, self._by_group(rows))
        coordinates = call.coordinates(images)
        own = tuple(self.grads[name][images] if name in self.grads else None for name in ("offset", "mask"))
        if self.gatherer is not None:
            s["first_pixel"], s["pixels"] = run.start, run.stop - run.start
            self.gatherer.add(s, call.types, *coordinates, rows, sums, VEC=call.VEC, planes=False)
            sums = None
        if sums is not None or any(grad is not None for grad in own):
            call.launch("gradients", s, run, (source, *coordinates, rows, sums, *own))


@dataclass(frozen=True)
class _Tiles:
    """How a call is cut: `images` images at a time and, where that is 1, `pixels` output pixels of it at a time."""

    N: int
    area: int
    images: int
    pixels: int

    @classmethod
    def fit(
        cls,
        device: Device,
        budget: int,
        call: _Convolution,
        image_bytes: int,
        pixel_bytes: int,
        row_bytes: int,
    ) -> _Tiles:
        """The largest tiles within the budget whose columns stay in the cache; at least a block's pixels."""
        N, area = call.input.shape[0], call.area
        most = max(device.cache_bytes * 2 // 3, LEAST_TILE_BYTES) // row_bytes
        most = min(most, LARGEST // (call.taps * call.OG))  # samples of a tile are numbered by an int
        images = min(N, most // area, budget // (image_bytes + area * pixel_bytes))
        if images >= 1:
            return cls(N, area, images, area)
        pixels = min(most, (budget - image_bytes) // pixel_bytes) // PIXELS * PIXELS
        return cls(N, area, 1, min(area, max(pixels, PIXELS)))

    @property
    def rows(self) -> int:
        """Pixels of the largest tile."""
        return self.images * self.pixels

    def chunks(self) -> Iterator[slice]:
        """The images of one tile after the other."""
        for first in range(0, self.N, self.images):
            yield slice(first, min(first + self.images, self.N))

    def runs(self) -> Iterator[slice]:
        """The pixels of one tile after the other."""
        for first in range(0, self.area, self.pixels):
            yield slice(first, min(first + self.pixels, self.area))


def _merges(array: Any, axis: int) -> bool:
    """Whether an axis and the next are one run of equal steps, so that reshape needs no copy."""
    return (
        array.shape[axis] == 1
        or array.shape[axis + 1] == 1
        or (array.strides[axis] == array.shape[axis + 1] * array.strides[axis + 1])
    )


def _views(memory: Any, dtype: np.dtype, shape: tuple[int, int], count: int) -> Parts:
    """The same memory as `count` arrays one behind the other."""
    nbytes = shape[0] * shape[1] * dtype.itemsize
    return tuple(memory[i * nbytes : (i + 1) * nbytes].view(dtype).reshape(shape) for i in range(count))


def _flags(device: Device, c_types: Flags, VEC: int, split: bool) -> Flags:
    return {**c_types, "VEC": VEC, "SPLIT": split, "VECTOR_ATOMICS": device.vector_atomics}


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build."""
    for dtype, c_types in all_types():
        for width in widths(dtype):
            for split in (False, True) if dtype == "float32" else (False,):
                yield {**c_types, "VEC": width, "SPLIT": split, "VECTOR_ATOMICS": has_vector_atomics(capability)}
