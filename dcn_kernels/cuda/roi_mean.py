"""Means over bins of regions of interest and the gradient of the map: the launcher of roi_mean.cu.

Maps are copied channels-last a chunk of images at a time, and gradients summed up so, as far as the workspace reaches;
an image that does not fit is read, and its gradient summed up, in the caller's planes. All memory is taken before the
first launch. A RoI that is of no image of a chunk is passed over, so RoIs may come in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.device import DEFAULT_WORKSPACE, Device, has_vector_atomics
from dcn_kernels.cuda.roi_gather import collect
from dcn_kernels.cuda.staging import copy
from dcn_kernels.cuda.taps import LARGEST
from dcn_kernels.dispatch.roi_rules import Rule
from dcn_kernels.dtypes import accumulator

BUILD = "roi_mean"
THREADS, WARPS = 256, 8
VECTORS = {"float16": 8, "bfloat16": 8, "float32": 4, "float64": 1}  # channels of one load, of 16 bytes but for doubles

ROI = np.dtype(
    [("R", np.int64)]
    + [(name, np.int32) for name in (
        *("N", "C", "H", "W", "PH", "PW"),
        *("maps_h", "maps_w", "classes", "part_h", "part_w"),
        *("rule", "ratio", "first_image", "images", "wide_rois", "wide_offset", "wide_mask"),
    )]
    + [("scale", np.float64), ("factor", np.float64)]
    + [(f"{array}_{axis}", np.int64) for array, axes in (
        *(("rois", "rk"), ("offset", "rkyx"), ("mask", "ryx"), ("pooled", "rcyx"), ("argmax", "rcyx")),
        *(("input", "ncmyx"), ("grad", "ncmyx")),
    ) for axis in axes],
    align=True,
)  # fmt: skip


def set_strides(s: np.ndarray, name: str, axes: str, array: Any) -> None:
    """Note an array's strides in a roi_t, in elements."""
    for axis, stride in zip(axes, array.strides, strict=True):
        s[f"{name}_{axis}"] = stride // array.dtype.itemsize


class Pooling:
    """What the launches of one call share: sizes, and the map as the kernels read and write it."""

    def __init__(
        self,
        op: str,
        device: Device,
        input: Any,  # (N, C*maps, H, W)
        rois: Any,  # (R, 5)
        rule: Rule,
        output_size: tuple[int, int],
        spatial_scale: float,
        offset: Any = None,  # (R, 2*classes, part_h, part_w)
        mask: Any = None,  # (R, PH, PW)
    ) -> None:
        self.op, self.device, self.rois, self.offset, self.mask = op, device, rois, offset, mask
        self.dtype, self.real = input.dtype, accumulator(input.dtype)
        (N, channels, H, W), self.maps = input.shape, rule.maps[0] * rule.maps[1]
        self.C = channels // self.maps
        self.shape = (len(rois), self.C, *output_size)
        sizes = {"N": N, "C": channels, "H": H, "W": W, "PH*PW": output_size[0] * output_size[1]}
        for name, size in sizes.items():
            if size > LARGEST:
                raise ValueError(f"{op}: expected {name} <= {LARGEST} on a GPU, got {size}")
        classes, part = (1, output_size) if offset is None else (offset.shape[1] // 2, offset.shape[2:])
        s = self.sizes = np.zeros(1, ROI)
        s["N"], s["C"], s["H"], s["W"], (s["PH"], s["PW"]) = N, self.C, H, W, output_size
        s["R"], s["classes"], (s["part_h"], s["part_w"]) = len(rois), classes, part
        (s["maps_h"], s["maps_w"]), s["scale"], s["factor"] = rule.maps, spatial_scale, rule.factor
        s["rule"], s["ratio"] = rule.number, rule.samples
        for name, axes, array in (("rois", "rk", rois), ("offset", "rkyx", offset), ("mask", "ryx", mask)):
            if array is not None:
                set_strides(s, name, axes, array)
                s[f"wide_{name}"] = array.dtype == self.real
        self.input = self.split(input)
        self.image_size = channels * H * W
        self.VEC = VECTORS[self.dtype.name] if self.C // classes % VECTORS[self.dtype.name] == 0 else 1

    def split(self, array: Any) -> Any:
        """(N, C*maps, H, W) as (N, C, maps, H, W)."""
        return array.reshape(array.shape[0], self.C, self.maps, *array.shape[2:])

    def launch(self, stem: str, kernel: str, s: np.ndarray, VEC: int, blocks: int, args: tuple[Any, ...]) -> None:
        """Start a kernel that takes VEC channels at once."""
        flags = {"scalar_t": CTYPES[self.dtype.name], "VEC": VEC, "VECTOR_ATOMICS": self.device.vector_atomics}
        self.device.launch(stem, kernel, flags, blocks, THREADS, (*args, s), op=self.op)

    @property
    def blocks(self) -> int:
        """Of kernels in which a warp owns a bin of a class."""
        return -(-len(self.rois) * int(self.sizes["classes"][0]) * self.shape[2] * self.shape[3] // WARPS)

    def chunks(self, images: int) -> Iterator[tuple[slice, np.ndarray]]:
        """So many images after the other, each with its roi_t; without images once all the same, for invalid RoIs."""
        N = self.input.shape[0]
        for first in range(0, max(N, 1), images):
            some, s = slice(first, min(first + images, N)), self.sizes.copy()
            s["first_image"], s["images"] = first, some.stop - first
            yield some, s

    def copy(self, source: Any, target: Any) -> None:
        """target = source, both (images, C, maps, H, W)."""
        if self.maps == 1:
            copy(self.device, source[:, :, 0], target[:, :, 0], op=self.op)
        else:
            for maps, to in zip(source, target, strict=True):
                copy(self.device, maps, to, op=self.op)


class Source:
    """The map as kernels read it: a copy channels-last, or in place where it lies so or an image exceeds the budget."""

    def __init__(self, pooling: Pooling, budget: int) -> None:
        self.pooling, self.VEC, self.memory = pooling, pooling.VEC, None
        N, _, maps, *_ = pooling.input.shape
        steps = [stride // pooling.dtype.itemsize for stride in pooling.input.strides]
        aligned = pooling.device.address(pooling.input) % 16 == 0 and all(
            step % self.VEC == 0 for step in (steps[0], *steps[3:])
        )
        self.images = max(1, N)
        if maps == steps[1] == 1 and (aligned or self.VEC == 1):
            return
        image_bytes = pooling.image_size * pooling.dtype.itemsize
        if image_bytes > budget:
            self.VEC = 1
            return
        self.images = min(self.images, budget // image_bytes)
        self.memory = channels_last(pooling, self.images, pooling.dtype)

    def read(self, s: np.ndarray, some: slice) -> Any:
        """An array of some images; its strides go into the roi_t."""
        maps = self.pooling.input[some]
        if self.memory is not None:
            staged = self.memory.transpose(0, 4, 3, 1, 2)[: len(maps)]
            self.pooling.copy(maps, staged)
            maps = staged
        set_strides(s, "input", "ncmyx", maps)
        return maps


class Target:
    """Where the gradient of the map is summed up, in the type of sums: in place, or in memory for some images.

    With `planes` as the result lies; else channels-last, if the budget is enough for an image.
    """

    def __init__(self, pooling: Pooling, grad_input: Any, budget: int, *, planes: bool) -> None:
        self.pooling, self.grad, self.memory = pooling, pooling.split(grad_input), None
        image_bytes = pooling.image_size * pooling.real.itemsize
        self.channels_last = not planes and image_bytes <= budget
        self.VEC = pooling.VEC if self.channels_last else 1
        self.images = max(1, len(grad_input))
        if not self.channels_last and pooling.real == pooling.dtype:
            return
        self.images = max(1, min(self.images, budget // image_bytes))
        if self.channels_last:
            self.memory = channels_last(pooling, self.images, pooling.real)
        else:
            self.memory = pooling.device.empty((self.images, *self.grad.shape[1:]), pooling.real)

    def begin(self, s: np.ndarray, some: slice) -> Any:
        """Zero sums of some images; their strides go into the roi_t."""
        sums = self.grad[some] if self.memory is None else self.memory[: some.stop - some.start]
        self.pooling.device.clear(sums)
        self.sums = sums.transpose(0, 4, 3, 1, 2) if self.channels_last else sums
        set_strides(s, "grad", "ncmyx", self.sums)
        return self.sums

    def end(self, some: slice) -> None:
        """The sums become the result."""
        if self.memory is not None:
            self.pooling.copy(self.sums, self.grad[some])


def channels_last(pooling: Pooling, images: int, dtype: np.dtype) -> Any:
    """Memory for maps, (images, H, W, maps, C)."""
    _, C, maps, H, W = pooling.input.shape
    return pooling.device.empty((images, H, W, maps, C), dtype)


def mean(pooling: Pooling, out: Any = None, budget: int = DEFAULT_WORKSPACE) -> Any:
    """The mean of every bin: (R, C, PH, PW)."""
    y = pooling.device.empty(pooling.shape, pooling.dtype) if out is None else out
    if y.size:
        source = Source(pooling, budget)
        for some, s in pooling.chunks(source.images):
            args = (source.read(s, some), pooling.rois, pooling.offset, pooling.mask, y)
            pooling.launch(BUILD, "mean", s, source.VEC, pooling.blocks, args)
    return y


def input_gradient(pooling: Pooling, target: Target, grad_output: Any, *, deterministic: bool) -> None:
    """The gradient of the map by that of the means."""
    arrays = (grad_output, pooling.rois, pooling.offset, pooling.mask)
    for some, s in pooling.chunks(target.images):
        sums = target.begin(s, some)
        set_strides(s, "pooled", "rcyx", grad_output)
        if deterministic:
            collect(pooling.device, pooling.dtype, s, (*arrays, None, sums), op=pooling.op)
        else:
            pooling.launch(BUILD, "spread", s, target.VEC, pooling.blocks, (*arrays, sums))
        target.end(some)


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build: one channel at a time, or several."""
    for dtype, width in VECTORS.items():
        for VEC in sorted({1, width}):
            yield {"scalar_t": CTYPES[dtype], "VEC": VEC, "VECTOR_ATOMICS": has_vector_atomics(capability)}
