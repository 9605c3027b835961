"""Deformable RoI pooling on the CPU: each convention is a rule of bins.py, worked on by roi_mean.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.cpu.roi_mean import mean, mean_backward
from dcn_kernels.dispatch import roi_rules


def deform_roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    offset: np.ndarray | None,  # (R, 2, PH, PW)
    mask: np.ndarray | None,  # (R, PH, PW)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    gamma: float,
    sampling_ratio: int,
    convention: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C, PH, PW)."""
    options = _options(output_size, spatial_scale, gamma, sampling_ratio, convention)
    return mean(input, rois, offset, mask, out=out, **options)


def deform_roi_pool_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    gamma: float,
    sampling_ratio: int,
    convention: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    options = _options(output_size, spatial_scale, gamma, sampling_ratio, convention)
    return mean_backward(grad_output, input, rois, offset, mask, wrt=wrt, **options)


def _options(
    output_size: tuple[int, int], spatial_scale: float, gamma: float, sampling_ratio: int, convention: str
) -> dict[str, Any]:
    return {
        "rule": roi_rules.deform_roi_pool(gamma, sampling_ratio, convention),
        "output_size": output_size,
        "spatial_scale": spatial_scale,
    }


def deform_ps_roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    trans: np.ndarray | None,  # (R, 2*classes, part, part)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    part_size: tuple[int, int],  # as trans says
    sample_per_part: int,
    trans_std: float,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C/(G*G), PH, PW)."""
    options = _ps_options(output_size, spatial_scale, group_size, sample_per_part, trans_std)
    return mean(input, rois, trans, out=out, **options)


def deform_ps_roi_pool_backward(
    grad_output: np.ndarray,  # (R, C/(G*G), PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    trans: np.ndarray | None,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    part_size: tuple[int, int],  # as trans says
    sample_per_part: int,
    trans_std: float,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    options = _ps_options(output_size, spatial_scale, group_size, sample_per_part, trans_std)
    names = tuple("offset" if name == "trans" else name for name in wrt)
    grads = mean_backward(grad_output, input, rois, trans, wrt=names, **options)
    return {name: grads["offset" if name == "trans" else name] for name in wrt}


def _ps_options(
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    sample_per_part: int,
    trans_std: float,
) -> dict[str, Any]:
    return {
        "rule": roi_rules.deform_ps_roi_pool(group_size, sample_per_part, trans_std),
        "output_size": output_size,
        "spatial_scale": spatial_scale,
    }
