"""RoI pooling and RoIAlign on the CPU: which of roi_max.py, roi_mean.py and roi_sum.py an operator is worked on by."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.cpu.roi_max import argmax_backward, maximum, maximum_backward
from dcn_kernels.cpu.roi_mean import mean, mean_backward
from dcn_kernels.cpu.roi_sum import pixel_mean, pixel_mean_backward
from dcn_kernels.dispatch import roi_rules


def roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    mode: str,
    return_argmax: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Returns (R, C, PH, PW), and the argmax."""
    rule = roi_rules.roi_pool(mode)
    if mode == "avg":
        return mean(input, rois, out=out, rule=rule, output_size=output_size, spatial_scale=spatial_scale)
    if out is None:
        out = np.empty((len(rois), input.shape[1], *output_size), input.dtype)
    argmax = np.empty(out.shape, np.int64) if return_argmax else None
    if out.size:
        maximum(input, rois, rule=rule, output_size=output_size, spatial_scale=spatial_scale, out=out, argmax=argmax)
    return out if argmax is None else (out, argmax)


def roi_pool_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    argmax: np.ndarray | None = None,  # (R, C, PH, PW)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    mode: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    sizes: dict[str, Any] = {"rule": roi_rules.roi_pool(mode), "output_size": output_size}
    if mode == "avg":
        return mean_backward(grad_output, input, rois, spatial_scale=spatial_scale, wrt=wrt, **sizes)
    grad_input = np.zeros(input.shape, input.dtype)
    if grad_output.size == 0:
        return {"input": grad_input}
    if argmax is None:
        maximum_backward(grad_output, input, rois, spatial_scale=spatial_scale, grad_input=grad_input, **sizes)
    else:
        argmax_backward(grad_output, rois, argmax, grad_input=grad_input, **sizes)
    return {"input": grad_input}


def ps_roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C/(G*G), PH, PW)."""
    rule = roi_rules.ps_roi_pool(group_size, convention)
    if out is None:
        out = np.empty((len(rois), input.shape[1] // (group_size[0] * group_size[1]), *output_size), input.dtype)
    if out.size:
        pixel_mean(input, rois, rule=rule, output_size=output_size, spatial_scale=spatial_scale, out=out)
    return out


def ps_roi_pool_backward(
    grad_output: np.ndarray,  # (R, C/(G*G), PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    grad_input = np.zeros(input.shape, input.dtype)
    if grad_output.size:
        rule = roi_rules.ps_roi_pool(group_size, convention)
        pixel_mean_backward(
            grad_output, rois, rule=rule, output_size=output_size, spatial_scale=spatial_scale, grad_input=grad_input
        )
    return {"input": grad_input}


def roi_align(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C, PH, PW)."""
    rule = roi_rules.roi_align(sampling_ratio, aligned)
    return mean(input, rois, out=out, rule=rule, output_size=output_size, spatial_scale=spatial_scale)


def roi_align_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    sizes: dict[str, Any] = {"output_size": output_size, "spatial_scale": spatial_scale}
    return mean_backward(grad_output, input, rois, wrt=wrt, rule=roi_rules.roi_align(sampling_ratio, aligned), **sizes)


def ps_roi_align(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C/(PH*PW), PH, PW)."""
    rule = roi_rules.ps_roi_align(output_size, sampling_ratio)
    return mean(input, rois, out=out, rule=rule, output_size=output_size, spatial_scale=spatial_scale)


def ps_roi_align_backward(
    grad_output: np.ndarray,  # (R, C/(PH*PW), PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    rule = roi_rules.ps_roi_align(output_size, sampling_ratio)
    sizes: dict[str, Any] = {"output_size": output_size, "spatial_scale": spatial_scale}
    return mean_backward(grad_output, input, rois, wrt=wrt, rule=rule, **sizes)
