"""Resampling at each pixel plus its offset: the launcher of offset_sample.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda import device as _device
from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.device import DEFAULT_WORKSPACE, Device
from dcn_kernels.cuda.gather import Gatherer
from dcn_kernels.cuda.staging import copy
from dcn_kernels.cuda.taps import LARGEST, all_types, conv, set_strides, team, types
from dcn_kernels.dtypes import accumulator

OP, BUILD = "offset_sample2d", "offset_sample"
THREADS, MOST_SLICES = 256, 8


def offset_sample2d(
    input: Any,  # (N, C, H, W)
    offset: Any,  # (N, 2*OG, H, W)
    *,
    border: str,
    out: Any = None,
    device: Device | None = None,
) -> Any:
    """Returns (N, C, H, W)."""
    device = device or _device.current()
    y = device.empty(input.shape, input.dtype) if out is None else out
    if y.size:
        s = _tile(input, offset, border)
        device.launch(BUILD, "resample", _flags(input, offset), _blocks(s), THREADS, (input, offset, y, s), op=OP)
    return y


def offset_sample2d_backward(
    grad_output: Any,  # (N, C, H, W)
    input: Any,
    offset: Any,
    *,
    border: str,
    deterministic: bool,
    wrt: tuple[str, ...],
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> dict[str, Any]:
    """Returns argument name -> gradient."""
    device = device or _device.current()
    grads = {}
    if "input" in wrt:
        grads["input"] = device.empty(input.shape, input.dtype)
    if "offset" in wrt:
        grads["offset"] = device.empty(offset.shape, offset.dtype)
    if input.size == 0:
        return grads
    scatters = "input" in grads and not deterministic
    if deterministic and "input" in grads:
        _gather_input(device, grads["input"], grad_output, input, offset, border, workspace_bytes)
    if scatters or "offset" in grads:
        N, target = input.shape[0], None
        sums, images = _sums(device, grads["input"], workspace_bytes) if scatters else (None, N)
        for first in range(0, N, images):
            some = slice(first, min(first + images, N))
            s = _tile(input[some], offset[some], border)
            if sums is not None:
                target = sums[some] if sums is grads["input"] else sums[: some.stop - first]
                device.clear(target)
                set_strides(s, "grad", target)
            strides = (np.int64(stride // grad_output.dtype.itemsize) for stride in grad_output.strides)
            grad_offset = grads["offset"][some] if "offset" in grads else None
            arrays = (grad_output[some], input[some], offset[some], target, grad_offset)
            flags, args = _flags(input, offset), (*arrays, *strides, s)
            device.launch(BUILD, "resample_gradients", flags, _blocks(s), THREADS, args, op=OP)
            if sums is not None and sums is not grads["input"]:
                copy(device, target, grads["input"][some], op=OP)
    return grads


def _sums(device: Device, grad_input: Any, workspace_bytes: int) -> tuple[Any, int]:
    """Where sums are kept and of how many images: the result itself, or for halves a float32 buffer."""
    real = accumulator(grad_input.dtype)
    N, *image = grad_input.shape
    if real == grad_input.dtype:
        return grad_input, N
    images = min(N, max(1, workspace_bytes // (int(np.prod(image, dtype=np.int64)) * real.itemsize)))
    return device.empty((images, *image), real), images


def _gather_input(
    device: Device, grad_input: Any, grad_output: Any, input: Any, offset: Any, border: str, workspace_bytes: int
) -> None:
    """The gradient of the input by sort-and-gather, of some images, or some offset groups of one, at a time."""
    (N, C, H, W), OG = input.shape, offset.shape[1] // 2
    width, real, itemsize = C // OG, accumulator(input.dtype), input.dtype.itemsize
    # of one offset group of one image: sorted samples and cells, a copy of grad_output, sums
    base, cells = Gatherer.nbytes(0, 0, real), Gatherer.cells(1, 1, H, W)
    group_bytes = Gatherer.nbytes(H * W, cells, real) - base + H * W * width * (itemsize + real.itemsize)
    most = max(1, min((workspace_bytes - base) // group_bytes, LARGEST // (H * W)))
    groups, images = (OG, min(N, most // OG)) if most >= OG else (most, 1)
    gatherer = Gatherer(device, images * groups * H * W, images * groups * cells, real, op=OP)
    plane = device.empty((images, groups * width, H, W), input.dtype)
    sums = device.empty((images, groups * width, H, W), real)
    for first in range(0, N, images):
        some = slice(first, min(first + images, N))
        for group in range(0, OG, groups):
            last = min(group + groups, OG)
            channels, fields = slice(group * width, last * width), slice(2 * group, 2 * last)
            shape = (some.stop - first, (last - group) * width, H, W)
            part = plane.reshape(-1)[: int(np.prod(shape))].reshape(shape)
            target = sums.reshape(-1)[: int(np.prod(shape))].reshape(shape)
            copy(device, grad_output[some, channels], part, op=OP)
            device.clear(target)
            s = _tile(input[some, channels], offset[some, fields], border)
            s["lanes"] = team(width, 32)
            set_strides(s, "grad", target)
            gatherer.add(s, _flags(input, offset), offset[some, fields], None, part, target, VEC=1, planes=True)
            copy(device, target, grad_input[some, channels], op=OP)


def _tile(input: Any, offset: Any, border: str) -> np.ndarray:
    """All pixels of all given images."""
    (N, C, H, W), OG = input.shape, offset.shape[1] // 2
    one = (1, 1)
    s = conv(OP, input, offset, one, groups=1, stride=one, padding=(0, 0), dilation=one, border=border)
    s["images"], s["pixels"], s["lanes"] = N, H * W, team(C // OG, MOST_SLICES)
    set_strides(s, "input", input)
    set_strides(s, "offset", offset)
    return s


def _blocks(s: np.ndarray) -> int:
    lanes, images, OG, pixels = (int(s[name][0]) for name in ("lanes", "images", "OG", "pixels"))
    return images * OG * -(-pixels // (THREADS // lanes))


def _flags(input: Any, offset: Any) -> Flags:
    return types(input.dtype, offset.dtype, None)


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build."""
    for _, flags in all_types(with_mask=False):
        yield flags
