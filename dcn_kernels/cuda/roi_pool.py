"""RoI pooling (maximum and mean), position-sensitive pooling and RoIAlign: the launcher of roi_pool.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda import device as _device
from dcn_kernels.cuda import roi_mean
from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.device import DEFAULT_WORKSPACE, Device
from dcn_kernels.cuda.roi_gather import collect
from dcn_kernels.cuda.roi_mean import input_gradient, mean
from dcn_kernels.cuda.roi_plan import THREADS, WARPS, Pooling, Source, Target, set_strides
from dcn_kernels.dispatch import roi_rules
from dcn_kernels.dispatch.shapes import check_argmax

BUILD = "roi_pool"


def roi_pool(
    input: Any,  # (N, C, H, W)
    rois: Any,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    mode: str,
    return_argmax: bool = False,
    out: Any = None,
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> Any:
    """Returns (R, C, PH, PW), and the argmax."""
    device = device or _device.current()
    pooling = Pooling("roi_pool", device, input, rois, roi_rules.roi_pool(mode), output_size, spatial_scale)
    if mode == "avg":
        return mean(pooling, out, workspace_bytes)
    y = device.empty(pooling.shape, input.dtype) if out is None else out
    argmax = device.empty(pooling.shape, np.int64) if return_argmax else None
    if y.size:
        source = Source(pooling, workspace_bytes)
        for some, s in pooling.chunks(source.images):
            args = (source.read(s, some), rois, y, argmax)
            pooling.launch(BUILD, "maximum", s, source.VEC, pooling.blocks, args)
    return (y, argmax) if return_argmax else y


def roi_pool_backward(
    grad_output: Any,  # (R, C, PH, PW)
    input: Any,
    rois: Any,
    argmax: Any = None,  # (R, C, PH, PW)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    mode: str,
    deterministic: bool,
    validate: bool = False,
    wrt: tuple[str, ...],
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> dict[str, Any]:
    """Returns argument name -> gradient."""
    device = device or _device.current()
    pooling = Pooling("roi_pool", device, input, rois, roi_rules.roi_pool(mode), output_size, spatial_scale)
    if mode == "avg":
        return _mean_gradient(pooling, grad_output, deterministic, workspace_bytes)
    if validate and argmax is not None:
        check_argmax("roi_pool", argmax, input.shape[2] * input.shape[3])
    grad_input = device.empty(input.shape, input.dtype)
    if grad_output.size == 0:
        device.clear(grad_input)
    elif grad_input.size:
        _maximum_gradient(pooling, grad_output, grad_input, argmax, deterministic, workspace_bytes)
    return {"input": grad_input}


def _maximum_gradient(
    pooling: Pooling, grad_output: Any, grad_input: Any, argmax: Any, deterministic: bool, budget: int
) -> None:
    """Through the argmax, which where it is not given is found again for some RoIs at a time."""
    device, rois, R = pooling.device, pooling.rois, len(pooling.rois)
    target = Target(pooling, grad_input, budget // 4, planes=True)
    images, at_once, source, memory = target.images, R, None, None
    if argmax is None:
        source = Source(pooling, budget // 4)
        images = min(images, source.images)
        at_once = min(R, max(1, budget // 2 // (8 * grad_output[0].size)))
        memory = device.empty((at_once, *pooling.shape[1:]), np.int64)
    for some, s in pooling.chunks(images):
        sums = target.begin(s, some)
        maps = None if source is None else source.read(s, some)
        for first in range(0, R, at_once):
            part = slice(first, min(first + at_once, R))
            s["R"] = part.stop - first
            places = argmax[part] if memory is None else memory[: part.stop - first]
            if source is not None:
                blocks = -(-int(s["R"][0]) * pooling.shape[2] * pooling.shape[3] // WARPS)
                pooling.launch(BUILD, "maximum", s, source.VEC, blocks, (maps, rois[part], None, places))
            set_strides(s, "pooled", "rcyx", grad_output)
            set_strides(s, "argmax", "rcyx", places)
            grad, own = grad_output[part], rois[part]
            if deterministic:
                collect(device, pooling.dtype, s, (grad, own, None, None, places, sums), op=pooling.op)
            else:
                blocks = -(-grad.size // THREADS)
                pooling.launch(BUILD, "maximum_gradient", s, 1, blocks, (grad, own, places, sums))
        target.end(some)


def ps_roi_pool(
    input: Any,  # (N, C, H, W)
    rois: Any,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
    out: Any = None,
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> Any:
    """Returns (R, C/(G*G), PH, PW)."""
    device = device or _device.current()
    rule = roi_rules.ps_roi_pool(group_size, convention)
    pooling = Pooling("ps_roi_pool", device, input, rois, rule, output_size, spatial_scale)
    return mean(pooling, out, workspace_bytes)


def ps_roi_pool_backward(
    grad_output: Any,  # (R, C/(G*G), PH, PW)
    input: Any,
    rois: Any,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
    deterministic: bool,
    wrt: tuple[str, ...],
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> dict[str, Any]:
    """Returns argument name -> gradient."""
    device = device or _device.current()
    rule = roi_rules.ps_roi_pool(group_size, convention)
    pooling = Pooling("ps_roi_pool", device, input, rois, rule, output_size, spatial_scale)
    return _mean_gradient(pooling, grad_output, deterministic, workspace_bytes)


def roi_align(
    input: Any,  # (N, C, H, W)
    rois: Any,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    out: Any = None,
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> Any:
    """Returns (R, C, PH, PW)."""
    device = device or _device.current()
    rule = roi_rules.roi_align(sampling_ratio, aligned)
    pooling = Pooling("roi_align", device, input, rois, rule, output_size, spatial_scale)
    return mean(pooling, out, workspace_bytes)


def roi_align_backward(
    grad_output: Any,  # (R, C, PH, PW)
    input: Any,
    rois: Any,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    deterministic: bool,
    wrt: tuple[str, ...],
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> dict[str, Any]:
    """Returns argument name -> gradient."""
    device = device or _device.current()
    rule = roi_rules.roi_align(sampling_ratio, aligned)
    pooling = Pooling("roi_align", device, input, rois, rule, output_size, spatial_scale)
    return _mean_gradient(pooling, grad_output, deterministic, workspace_bytes)


def ps_roi_align(
    input: Any,  # (N, C, H, W)
    rois: Any,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    out: Any = None,
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> Any:
    """Returns (R, C/(PH*PW), PH, PW)."""
    device = device or _device.current()
    rule = roi_rules.ps_roi_align(output_size, sampling_ratio)
    pooling = Pooling("ps_roi_align", device, input, rois, rule, output_size, spatial_scale)
    return mean(pooling, out, workspace_bytes)


def ps_roi_align_backward(
    grad_output: Any,  # (R, C/(PH*PW), PH, PW)
    input: Any,
    rois: Any,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    deterministic: bool,
    wrt: tuple[str, ...],
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> dict[str, Any]:
    """Returns argument name -> gradient."""
    device = device or _device.current()
    rule = roi_rules.ps_roi_align(output_size, sampling_ratio)
    pooling = Pooling("ps_roi_align", device, input, rois, rule, output_size, spatial_scale)
    return _mean_gradient(pooling, grad_output, deterministic, workspace_bytes)


def _mean_gradient(pooling: Pooling, grad_output: Any, deterministic: bool, budget: int) -> dict[str, Any]:
    N, C, maps, H, W = pooling.input.shape
    grad_input = pooling.device.empty((N, C * maps, H, W), pooling.dtype)
    if grad_output.size == 0:
        pooling.device.clear(grad_input)
    elif grad_input.size:
        target = Target(pooling, grad_input, budget, planes=deterministic)
        input_gradient(pooling, target, grad_output, deterministic=deterministic)
    return {"input": grad_input}


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build."""
    return roi_mean.variants(capability)
