"""Deformable RoI pooling: deform_roi_pool (Eq. 6 and two other conventions), deform_ps_roi_pool, and their gradients.

y(i, j) = sum_{p in bin(i, j)} x(p0 + p + dp_ij) / n_ij,   dp_ij = gamma * offset_ij o (w, h)          (Eq. 6)

Offsets are normalised by the RoI's size; x stands before y in them. See roi_pool.py for the type of coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dcn_kernels.dispatch import roi_rules
from dcn_kernels.dtypes import accumulator
from dcn_kernels.reference.roi_pool import (
    align_grid,
    points,
    rfcn_size,
    rounded,
    score_maps,
    touching,
    whole_bins,
    written,
)
from dcn_kernels.reference.sampling import Corners, corners, gradient, sample, scatter


class Bin(NamedTuple):
    """The channels of one class in one bin of one RoI."""

    to: tuple[int, slice, int, int]  # the index of their output
    image: int
    channels: slice  # the input channels they read
    at: Corners  # their sampling points (rows, columns)
    number: float  # what the sum is divided by
    offset_x: tuple[int, int, int, int]  # the index of their shift in the offset array
    offset_y: tuple[int, int, int, int]
    reach_x: float  # d shift / d offset, in pixels
    reach_y: float


Axis = tuple[float, list[np.ndarray], float]  # d shift / d offset; per bin its points and their number


def shifts(offset: np.ndarray | None, at: tuple[int, ...], factor: np.floating, size: np.floating) -> np.floating:
    """(offset * factor) * size, in the type of coordinates."""
    return size.dtype.type(0) if offset is None else (offset[at].astype(size.dtype) * factor) * size


def paper(
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    gamma: float,
) -> Iterator[Bin]:
    """Eq. 6: every pixel of an Eq. 5 bin, moved."""
    (height, width), real = input.shape[2:], accumulator(input.dtype).type
    for r, roi in enumerate(rois.astype(real)):
        tops, bottoms = whole_bins(roi[2], roi[4], real(spatial_scale), output_size[0])
        lefts, rights = whole_bins(roi[1], roi[3], real(spatial_scale), output_size[1])
        h, w = (rounded(roi[a], roi[a + 2], real(spatial_scale))[1] for a in (2, 1))
        for ph, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):
            for pw, (left, right) in enumerate(zip(lefts, rights, strict=True)):
                at_x, at_y = (r, 0, ph, pw), (r, 1, ph, pw)
                y = moved_pixels(top, bottom, shifts(offset, at_y, real(gamma), h), height)
                x = moved_pixels(left, right, shifts(offset, at_x, real(gamma), w), width)
                at = corners(*grid_of(y, x), height, width, "zeros")
                n = float(bottom - top) * float(right - left)
                reach = float(real(gamma) * w), float(real(gamma) * h)
                yield Bin((r, slice(None), ph, pw), int(roi[0]), slice(None), at, n, at_x, at_y, *reach)


def grid_of(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points at rows y and columns x; one NaN point if either shift is NaN, even where the other axis has none."""
    if np.isnan(y).any() or np.isnan(x).any():
        return np.full((1, 1), np.nan, y.dtype), np.full((1, 1), np.nan, x.dtype)
    return y[:, None], x[None]


def moved_pixels(first: int, last: int, shift: np.floating, length: int) -> np.ndarray:
    """p + shift for the pixels first <= p < last, without those that cannot touch the map."""
    if np.isnan(shift):
        return np.full(1, shift)
    if np.isinf(shift):
        return np.zeros(0, shift.dtype)
    k = touching(float(first) + float(shift), 1.0, float(last - first), length, shift.dtype)
    return (float(first) + k).astype(shift.dtype) + shift


def mmcv(
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    gamma: float,
    sampling_ratio: int,
) -> Iterator[Bin]:
    """RoIAlign's grid (aligned), each bin's moved."""
    (height, width), real = input.shape[2:], accumulator(input.dtype).type
    for r, roi in enumerate(rois.astype(real)):
        rows = align_grid(roi[2], roi[4], real(spatial_scale), output_size[0], sampling_ratio, aligned=True)
        columns = align_grid(roi[1], roi[3], real(spatial_scale), output_size[1], sampling_ratio, aligned=True)
        for ph, base_y in enumerate(rows.base):
            for pw, base_x in enumerate(columns.base):
                at_x, at_y = (r, 0, ph, pw), (r, 1, ph, pw)
                y = points(base_y + shifts(offset, at_y, real(gamma), rows.size), rows, height)
                x = points(base_x + shifts(offset, at_x, real(gamma), columns.size), columns, width)
                at = corners(*grid_of(y, x), height, width, "align")
                n = max(rows.number * columns.number, 1)
                reach = float(real(gamma) * columns.size), float(real(gamma) * rows.size)
                yield Bin((r, slice(None), ph, pw), int(roi[0]), slice(None), at, n, at_x, at_y, *reach)


def rfcn(
    input: np.ndarray,
    rois: np.ndarray,
    trans: np.ndarray | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    part_size: tuple[int, int],
    sample_per_part: int,
    trans_std: float,
) -> Iterator[Bin]:
    """Deformable R-FCN's: samples from each bin's corner, those outside the map not counted."""
    (height, width), real = input.shape[2:], accumulator(input.dtype).type
    classes = 1 if trans is None else trans.shape[1] // 2
    stride = group_size[0] * group_size[1]
    each = input.shape[1] // stride // classes  # output channels of a class
    score_map = score_maps(group_size, output_size)
    k = np.arange(sample_per_part, dtype=real)
    for r, roi in enumerate(rois.astype(real)):
        (start_y, h), (start_x, w) = (rfcn_size(roi[a], roi[a + 2], real(spatial_scale), 0.5) for a in (2, 1))
        bin_y, bin_x = h / output_size[0], w / output_size[1]
        for ph, pw, cls in np.ndindex(*output_size, classes):
            part = ph * part_size[0] // output_size[0], pw * part_size[1] // output_size[1]
            at_x, at_y = (r, 2 * cls, *part), (r, 2 * cls + 1, *part)
            base_y = (ph * bin_y + start_y) + shifts(trans, at_y, real(trans_std), h)
            base_x = (pw * bin_x + start_x) + shifts(trans, at_x, real(trans_std), w)
            y, x = base_y + k * (bin_y / sample_per_part), base_x + k * (bin_x / sample_per_part)
            at = corners(y[:, None], x, height, width, "psroi")
            to, first = slice(cls * each, (cls + 1) * each), score_map(ph, pw).start + cls * each * stride
            channels = slice(first, first + (each - 1) * stride + 1, stride)
            counted = float(np.count_nonzero(~at.still[0]))
            reach = float(real(trans_std) * w), float(real(trans_std) * h)
            yield Bin((r, to, ph, pw), int(roi[0]), channels, at, max(counted, 1), at_x, at_y, *reach)


def _forward(input: np.ndarray, mask: np.ndarray | None, bins: Iterator[Bin], shape: tuple[int, ...]) -> np.ndarray:
    y = np.zeros(shape)
    for b in bins:
        y[b.to] = sample(input[b.image, b.channels].astype(np.float64), b.at).sum(axis=(1, 2)) / b.number
    return y if mask is None else y * mask[:, None].astype(np.float64)


def _backward(
    grad_output: np.ndarray,
    input: np.ndarray,
    offset: np.ndarray | None,
    mask: np.ndarray | None,
    bins: Iterator[Bin],
) -> dict[str, np.ndarray]:
    """Gradients by name, that of the offset or trans as "offset"; all in float64."""
    grads = {"input": np.zeros(input.shape)}
    if offset is not None:
        grads["offset"] = np.zeros(offset.shape)
    if mask is not None:
        grads["mask"] = np.zeros(mask.shape)
    for b in bins:
        r, _, ph, pw = b.to
        m = 1.0 if mask is None else float(mask[r, ph, pw])
        plane = input[b.image, b.channels].astype(np.float64)
        grad = grad_output[b.to].astype(np.float64) / b.number
        each = np.broadcast_to(grad[:, None, None] * m, (len(grad), *b.at.y.shape[1:]))
        scatter(grads["input"][b.image, b.channels], b.at, each)
        if offset is not None:
            slope_y, slope_x = gradient(plane, b.at)
            nothing = (grad * m * 0).sum()  # NaN where one is not finite, also in a bin without samples
            grads["offset"][b.offset_x] += ((each * slope_x).sum() + nothing) * b.reach_x
            grads["offset"][b.offset_y] += ((each * slope_y).sum() + nothing) * b.reach_y
        if mask is not None:
            grads["mask"][r, ph, pw] = (grad * sample(plane, b.at).sum(axis=(1, 2))).sum()
    return grads


def _bins(
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    gamma: float,
    sampling_ratio: int,
    convention: str,
) -> Iterator[Bin]:
    rule = roi_rules.deform_roi_pool(gamma, sampling_ratio, convention)
    if rule.name == "paper":
        return paper(input, rois, offset, output_size, spatial_scale, rule.factor)
    if rule.name == "aligned":
        return mmcv(input, rois, offset, output_size, spatial_scale, rule.factor, rule.samples)
    return rfcn(input, rois, offset, output_size, spatial_scale, (1, 1), output_size, rule.samples, rule.factor)


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
    bins = _bins(input, rois, offset, output_size, spatial_scale, gamma, sampling_ratio, convention)
    return written(_forward(input, mask, bins, (len(rois), input.shape[1], *output_size)), input.dtype, out)


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
    bins = _bins(input, rois, offset, output_size, spatial_scale, gamma, sampling_ratio, convention)
    grads = _backward(grad_output, input, offset, mask, bins)
    given = {"input": input, "offset": offset, "mask": mask}
    return {name: grads[name].astype(given[name].dtype) for name in wrt}  # type: ignore[union-attr]


def deform_ps_roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    trans: np.ndarray | None,  # (R, 2*classes, part, part)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    part_size: tuple[int, int],
    sample_per_part: int,
    trans_std: float,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (R, C/(G*G), PH, PW)."""
    bins = rfcn(input, rois, trans, output_size, spatial_scale, group_size, part_size, sample_per_part, trans_std)
    shape = (len(rois), input.shape[1] // (group_size[0] * group_size[1]), *output_size)
    return written(_forward(input, None, bins, shape), input.dtype, out)


def deform_ps_roi_pool_backward(
    grad_output: np.ndarray,  # (R, C/(G*G), PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    trans: np.ndarray | None,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    part_size: tuple[int, int],
    sample_per_part: int,
    trans_std: float,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    bins = rfcn(input, rois, trans, output_size, spatial_scale, group_size, part_size, sample_per_part, trans_std)
    grads = _backward(grad_output, input, trans, None, bins)
    given, names = {"input": input, "trans": trans}, {"input": "input", "trans": "offset"}
    return {name: grads[names[name]].astype(given[name].dtype) for name in wrt}  # type: ignore[union-attr]
