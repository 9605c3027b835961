"""Deformable RoI pooling, plain and position-sensitive: the launcher of deform_roi_pool.cu."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from dcn_kernels.cuda import device as _device
from dcn_kernels.cuda import roi_mean
from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.device import DEFAULT_WORKSPACE, Device
from dcn_kernels.cuda.roi_mean import input_gradient, mean
from dcn_kernels.cuda.roi_plan import WARPS, Pooling, Source, Target, set_strides
from dcn_kernels.dispatch import roi_rules

BUILD = "deform_roi_pool"


def deform_roi_pool(
    input: Any,  # (N, C, H, W)
    rois: Any,  # (R, 5)
    offset: Any,  # (R, 2, PH, PW) or None
    mask: Any,  # (R, PH, PW) or None
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    gamma: float,
    sampling_ratio: int,
    convention: str,
    out: Any = None,
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> Any:
    """Returns (R, C, PH, PW)."""
    device = device or _device.current()
    rule = roi_rules.deform_roi_pool(gamma, sampling_ratio, convention)
    pooling = Pooling("deform_roi_pool", device, input, rois, rule, output_size, spatial_scale, offset, mask)
    return mean(pooling, out, workspace_bytes)


def deform_roi_pool_backward(
    grad_output: Any,  # (R, C, PH, PW)
    input: Any,
    rois: Any,
    offset: Any,
    mask: Any,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    gamma: float,
    sampling_ratio: int,
    convention: str,
    deterministic: bool,
    wrt: tuple[str, ...],
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> dict[str, Any]:
    """Returns argument name -> gradient."""
    device = device or _device.current()
    rule = roi_rules.deform_roi_pool(gamma, sampling_ratio, convention)
    pooling = Pooling("deform_roi_pool", device, input, rois, rule, output_size, spatial_scale, offset, mask)
    given = {"input": input, "offset": offset, "mask": mask}
    grads = {name: device.empty(given[name].shape, given[name].dtype) for name in wrt}
    _gradients(pooling, grad_output, grads, deterministic, workspace_bytes)
    return grads


def deform_ps_roi_pool(
    input: Any,  # (N, C, H, W)
    rois: Any,  # (R, 5)
    trans: Any,  # (R, 2*classes, part, part) or None
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    part_size: tuple[int, int],
    sample_per_part: int,
    trans_std: float,
    out: Any = None,
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> Any:
    """Returns (R, C/(G*G), PH, PW)."""
    device = device or _device.current()
    rule = roi_rules.deform_ps_roi_pool(group_size, sample_per_part, trans_std)
    pooling = Pooling("deform_ps_roi_pool", device, input, rois, rule, output_size, spatial_scale, trans)
    return mean(pooling, out, workspace_bytes)


def deform_ps_roi_pool_backward(
    grad_output: Any,  # (R, C/(G*G), PH, PW)
    input: Any,
    rois: Any,
    trans: Any,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    part_size: tuple[int, int],
    sample_per_part: int,
    trans_std: float,
    deterministic: bool,
    wrt: tuple[str, ...],
    workspace_bytes: int = DEFAULT_WORKSPACE,
    device: Device | None = None,
) -> dict[str, Any]:
    """Returns argument name -> gradient."""
    device = device or _device.current()
    rule = roi_rules.deform_ps_roi_pool(group_size, sample_per_part, trans_std)
    pooling = Pooling("deform_ps_roi_pool", device, input, rois, rule, output_size, spatial_scale, trans)
    given = {"input": input, "trans": trans}
    grads = {name: device.empty(given[name].shape, given[name].dtype) for name in wrt}
    named = {"offset" if name == "trans" else name: grad for name, grad in grads.items()}
    _gradients(pooling, grad_output, named, deterministic, workspace_bytes)
    return grads


def _gradients(pooling: Pooling, grad_output: Any, grads: dict[str, Any], deterministic: bool, budget: int) -> None:
    """Fill the gradients of "input", "offset" and "mask" as far as they are there."""
    if grad_output.size == 0:
        for grad in grads.values():
            pooling.device.clear(grad)
        return
    of_shifts = grads.get("offset"), grads.get("mask")
    shifts = any(grad is not None for grad in of_shifts)
    budget //= 1 + (shifts and "input" in grads)
    # all memory before the first launch
    target = Target(pooling, grads["input"], budget, planes=deterministic) if "input" in grads else None
    source = Source(pooling, budget) if shifts else None
    if target is not None and grads["input"].size:
        input_gradient(pooling, target, grad_output, deterministic=deterministic)
    if source is not None:
        parts = len(pooling.rois) * prod(int(pooling.sizes[name][0]) for name in ("classes", "part_h", "part_w"))
        for some, s in pooling.chunks(source.images):
            maps = source.read(s, some)
            set_strides(s, "pooled", "rcyx", grad_output)
            args = (grad_output, maps, pooling.rois, pooling.offset, pooling.mask, *of_shifts)
            pooling.launch(BUILD, "offset_gradients", s, source.VEC, -(-parts // WARPS), args)


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build."""
    return roi_mean.variants(capability)
