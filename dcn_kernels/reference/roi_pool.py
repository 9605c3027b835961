"""RoI pooling without learned offsets: roi_pool, ps_roi_pool, roi_align, ps_roi_align, and their transposes.

The geometry is separable, so it is written for one axis at a time, in the type of coordinates (`real`: float32 for
float32 and half-precision inputs), every product and sum rounded to it in the order written; the values are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dcn_kernels.dispatch import roi_rules
from dcn_kernels.dispatch.roi_rules import Rule
from dcn_kernels.dispatch.shapes import check_argmax
from dcn_kernels.dtypes import accumulator
from dcn_kernels.reference.sampling import Corners, corners, sample, scatter

FAR = 2.0**100  # pixels: coordinates beyond it are cut to it, so that sizes and bins stay finite


def half_away(v: np.floating) -> np.floating:
    """Round half away from zero, exactly, as C's round."""
    whole = np.trunc(v)
    return whole + np.copysign(v.dtype.type(1), v) if abs(v - whole) >= 0.5 else whole


def scaled(v: np.floating, scale: np.floating) -> np.floating:
    """v * scale, cut to where arithmetic with it cannot overflow."""
    with np.errstate(over="ignore"):
        return np.clip(v * scale, -v.dtype.type(FAR), v.dtype.type(FAR))


# ---------------------------------------------------------------- pooled pixels: bins of one axis


class Bins(NamedTuple):
    """The bins of one RoI along one axis: bin i pools the pixels first[i] <= p < last[i] of the map."""

    first: list[int]
    last: list[int]
    number: list[float]  # the pixels that its mean is taken over: with "avg" those outside the map count


def _clipped(first: np.ndarray, last: np.ndarray, limit: int) -> Bins:
    tops, ends = (np.clip(edge, 0, limit).astype(np.int64).tolist() for edge in (first, last))
    return Bins(tops, ends, [max(b - a, 0) for a, b in zip(tops, ends, strict=True)])


def rounded(low: np.floating, high: np.floating, scale: np.floating) -> tuple[np.floating, np.floating]:
    """(start, size) of RoI pooling: whole pixels, the last one included, at least one."""
    start, end = half_away(scaled(low, scale)), half_away(scaled(high, scale))
    return start, max(end - start + 1, start.dtype.type(1))


def max_bins(low: np.floating, high: np.floating, scale: np.floating, bins: int, length: int) -> Bins:
    """roi_pool "max": floor(i*bin) to ceil((i+1)*bin) from the start."""
    start, size = rounded(low, high, scale)
    i, step = np.arange(bins, dtype=start.dtype), size / bins
    return _clipped(np.floor(i * step) + start, np.ceil((i + 1) * step) + start, length)


def whole_bins(low: np.floating, high: np.floating, scale: np.floating, bins: int) -> tuple[list[int], list[int]]:
    """Eq. 5: floor(i w/k) <= p < ceil((i+1) w/k) from the start, in exact integers, outside the map too."""
    start, size = (int(v) for v in rounded(low, high, scale))
    return [start + i * size // bins for i in range(bins)], [start - (-(i + 1) * size // bins) for i in range(bins)]


def avg_bins(low: np.floating, high: np.floating, scale: np.floating, bins: int, length: int) -> Bins:
    """roi_pool "avg": Eq. 5, where pixels outside the map count as 0."""
    first, last = whole_bins(low, high, scale, bins)
    tops, ends = ([min(max(v, 0), length) for v in edge] for edge in (first, last))
    return Bins(tops, ends, [float(b - a) for a, b in zip(first, last, strict=True)])


def rfcn_size(
    low: np.floating, high: np.floating, scale: np.floating, half: float = 0.0
) -> tuple[np.floating, np.floating]:
    """(start, size) of R-FCN: rounded in image coordinates, the last pixel included, at least 0.1."""
    start, end = (scaled(edge, scale) - low.dtype.type(half) for edge in (half_away(low), half_away(high) + 1))
    return start, max(end - start, start.dtype.type(0.1))


def rfcn_bins(low: np.floating, high: np.floating, scale: np.floating, bins: int, length: int) -> Bins:
    """ps_roi_pool "rfcn"."""
    start, size = rfcn_size(low, high, scale)
    i, step = np.arange(bins, dtype=start.dtype), size / bins
    return _clipped(np.floor(i * step + start), np.ceil((i + 1) * step + start), length)


def torchvision_bins(low: np.floating, high: np.floating, scale: np.floating, bins: int, length: int) -> Bins:
    """ps_roi_pool "torchvision": no last pixel, and clipped so that the map's last row is never read."""
    start, end = half_away(scaled(low, scale)), half_away(scaled(high, scale))
    i, step = np.arange(bins, dtype=start.dtype), max(end - start, start.dtype.type(1)) / bins
    return _clipped(np.floor(i * step) + start, np.ceil((i + 1) * step) + start, length - 1)


# ---------------------------------------------------------------- sampled points: the grid of one axis


class Grid(NamedTuple):
    """The sampling points of one RoI along one axis: bin i has points base[i] + ((k + 0.5)*step)/count."""

    base: np.ndarray
    step: np.floating  # the length of a bin
    number: float
    size: np.floating  # of the RoI


def align_grid(
    low: np.floating, high: np.floating, scale: np.floating, bins: int, ratio: int, *, aligned: bool
) -> Grid:
    """RoIAlign's grid: nothing is rounded; `ratio` points a bin, or as many as it has pixels."""
    half = low.dtype.type(0.5 if aligned else 0)
    start, end = scaled(low, scale) - half, scaled(high, scale) - half
    size = end - start if aligned else max(end - start, start.dtype.type(1))
    step = size / bins
    count = float(ratio) if ratio > 0 else max(float(np.ceil(step)), 0.0)
    return Grid(np.arange(bins, dtype=start.dtype) * step + start, step, count, size)


def points(base: np.floating, grid: Grid, length: int) -> np.ndarray:
    """A bin's centred points from `base` on, without those that cannot touch a map of `length` pixels."""
    if np.isnan(base):
        return np.full(1, base)  # one NaN point, which makes the bin NaN even where its grid is empty
    if grid.number == 0:
        return np.zeros(0, base.dtype)
    spacing = float(grid.step) / grid.number
    k = touching(float(base) + 0.5 * spacing, spacing, grid.number, length, base.dtype).astype(base.dtype)
    return base + ((k + base.dtype.type(0.5)) * grid.step) / base.dtype.type(grid.number)


def touching(first: float, spacing: float, count: float, length: int, real: np.dtype) -> np.ndarray:
    """The k, 0 <= k < count, for which first + k*spacing may lie in [-1, length]: the cost is the map's, not the RoI's.

    Roundings of the true coordinate are allowed for, up to 100 points: beyond, a bin has so many that none counts.
    """
    if spacing == 0:
        return np.arange(count)
    with np.errstate(over="ignore"):
        ends = np.sort(np.array([-1 - first, length - first]) / spacing)
        margin = min(2 + 8 * np.finfo(real).eps * np.abs(first) / np.abs(spacing), 100)
    low, high = (min(max(v, 0), count) for v in (np.floor(ends[0] - margin), np.ceil(ends[1] + margin) + 1))
    return low + np.arange(high - low)


# ---------------------------------------------------------------- roi_pool, ps_roi_pool


class Pooled(NamedTuple):
    """One bin of one RoI as pixels of the map."""

    to: tuple[int, slice, int, int]  # where its output stands
    image: int
    channels: slice  # the input channels it reads
    rows: slice
    columns: slice
    number: float

    @property
    def source(self) -> tuple[int, slice, slice, slice]:
        return self.image, self.channels, self.rows, self.columns


def pooled(
    input: np.ndarray,
    rois: np.ndarray,
    output_size: tuple[int, int],
    spatial_scale: float,
    axis: Callable[[np.floating, np.floating, np.floating, int, int], Bins],
    channels: Callable[[int, int], slice],
) -> Iterator[Pooled]:
    """All bins; `axis` gives those of one axis, `channels` the input channels of bin (ph, pw)."""
    real = accumulator(input.dtype).type
    for r, roi in enumerate(rois.astype(real)):
        ys = axis(roi[2], roi[4], real(spatial_scale), output_size[0], input.shape[2])
        xs = axis(roi[1], roi[3], real(spatial_scale), output_size[1], input.shape[3])
        for ph, (top, bottom, tall) in enumerate(zip(*ys, strict=True)):
            for pw, (left, right, wide) in enumerate(zip(*xs, strict=True)):
                yield Pooled(
                    (r, slice(None), ph, pw),
                    int(roi[0]),
                    channels(ph, pw),
                    slice(top, max(bottom, top)),
                    slice(left, max(right, left)),
                    tall * wide,
                )


def every_channel(ph: int, pw: int) -> slice:
    return slice(None)


def score_maps(groups: tuple[int, int], output_size: tuple[int, int]) -> Callable[[int, int], slice]:
    """Position sensitive: output channel c of bin (ph, pw) reads input channel (c*GH + gh)*GW + gw."""

    def channels(ph: int, pw: int) -> slice:
        gh, gw = (min(p * g // size, g - 1) for p, g, size in zip((ph, pw), groups, output_size, strict=True))
        return slice(gh * groups[1] + gw, None, groups[0] * groups[1])

    return channels


def _mean(input: np.ndarray, bins: Iterator[Pooled], shape: tuple[int, ...]) -> np.ndarray:
    y = np.zeros(shape)
    for b in bins:
        if b.number:
            y[b.to] = input[b.source].astype(np.float64).sum(axis=(1, 2)) / b.number
    return y


def _mean_backward(grad_output: np.ndarray, input: np.ndarray, bins: Iterator[Pooled]) -> np.ndarray:
    grad = np.zeros(input.shape)
    for b in bins:
        if b.number:
            grad[b.source] += (grad_output[b.to].astype(np.float64) / b.number)[:, None, None]
    return grad


def _first_maximum(input: np.ndarray, b: Pooled) -> np.ndarray:
    """Flat index in the map of each channel's maximum: the first in row-major order, a NaN before all else."""
    window = input[b.source].astype(np.float64)
    at = window.reshape(len(window), -1).argmax(axis=1)
    y, x = np.divmod(at, window.shape[2])
    return (y + b.rows.start) * input.shape[3] + x + b.columns.start


def written(y: np.ndarray, dtype: np.dtype, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return y.astype(dtype)
    out[...] = y
    return out


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
    shape = (len(rois), input.shape[1], *output_size)
    if mode == "avg":
        bins = pooled(input, rois, output_size, spatial_scale, avg_bins, every_channel)
        return written(_mean(input, bins, shape), input.dtype, out)
    y, argmax = np.zeros(shape), np.full(shape, -1, np.int64)
    for b in pooled(input, rois, output_size, spatial_scale, max_bins, every_channel):
        if b.number:
            argmax[b.to] = at = _first_maximum(input, b)
            planes = input[b.image].reshape(input.shape[1], -1)
            y[b.to] = np.take_along_axis(planes, at[:, None], axis=1)[:, 0]
    result = written(y, input.dtype, out)
    return (result, argmax) if return_argmax else result


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
    if mode == "avg":
        bins = pooled(input, rois, output_size, spatial_scale, avg_bins, every_channel)
        return {"input": _mean_backward(grad_output, input, bins).astype(input.dtype)}
    if argmax is None:
        argmax = np.full(grad_output.shape, -1, np.int64)
        for b in pooled(input, rois, output_size, spatial_scale, max_bins, every_channel):
            if b.number:
                argmax[b.to] = _first_maximum(input, b)
    pixels = input.shape[2] * input.shape[3]
    check_argmax("roi_pool", argmax, pixels)
    grad = np.zeros((*input.shape[:2], pixels))
    for image, at, values in zip(rois[:, 0].astype(int), argmax, grad_output.astype(np.float64), strict=True):
        for channel in range(input.shape[1]):
            held = at[channel] >= 0
            np.add.at(grad[image, channel], at[channel][held], values[channel][held])
    return {"input": grad.reshape(input.shape).astype(input.dtype)}


def _ps_bins(
    input: np.ndarray,
    rois: np.ndarray,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
) -> Iterator[Pooled]:
    rule = roi_rules.ps_roi_pool(group_size, convention)
    axis = {"ps_rfcn": rfcn_bins, "ps_torchvision": torchvision_bins}[rule.name]
    return pooled(input, rois, output_size, spatial_scale, axis, score_maps(rule.maps, output_size))


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
    bins = _ps_bins(input, rois, output_size, spatial_scale, group_size, convention)
    shape = (len(rois), input.shape[1] // (group_size[0] * group_size[1]), *output_size)
    return written(_mean(input, bins, shape), input.dtype, out)


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
    bins = _ps_bins(input, rois, output_size, spatial_scale, group_size, convention)
    return {"input": _mean_backward(grad_output, input, bins).astype(input.dtype)}


# ---------------------------------------------------------------- roi_align, ps_roi_align


class Sampled(NamedTuple):
    """One bin of one RoI as sampling points."""

    to: tuple[int, slice, int, int]
    image: int
    channels: slice
    at: Corners
    number: float


def _aligned_bins(
    input: np.ndarray,
    rois: np.ndarray,
    output_size: tuple[int, int],
    spatial_scale: float,
    rule: Rule,
) -> Iterator[Sampled]:
    (height, width), real = input.shape[2:], accumulator(input.dtype).type
    aligned, channels = rule.name == "aligned", score_maps(rule.maps, output_size)
    for r, roi in enumerate(rois.astype(real)):
        rows = align_grid(roi[2], roi[4], real(spatial_scale), output_size[0], rule.samples, aligned=aligned)
        columns = align_grid(roi[1], roi[3], real(spatial_scale), output_size[1], rule.samples, aligned=aligned)
        for ph, base_y in enumerate(rows.base):
            for pw, base_x in enumerate(columns.base):
                y, x = np.meshgrid(points(base_y, rows, height), points(base_x, columns, width), indexing="ij")
                at = corners(y, x, height, width, "align")
                count = max(rows.number * columns.number, 1)
                yield Sampled((r, slice(None), ph, pw), int(roi[0]), channels(ph, pw), at, count)


def _sampled_mean(input: np.ndarray, bins: Iterator[Sampled], shape: tuple[int, ...]) -> np.ndarray:
    y = np.zeros(shape)
    for b in bins:
        y[b.to] = sample(input[b.image, b.channels].astype(np.float64), b.at).sum(axis=(1, 2)) / b.number
    return y


def _sampled_mean_backward(grad_output: np.ndarray, input: np.ndarray, bins: Iterator[Sampled]) -> np.ndarray:
    grad = np.zeros(input.shape)
    for b in bins:
        each = grad_output[b.to].astype(np.float64)[:, None, None] / b.number
        scatter(grad[b.image, b.channels], b.at, np.broadcast_to(each, (len(each), *b.at.y.shape[1:])))
    return grad


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
    bins = _aligned_bins(input, rois, output_size, spatial_scale, rule)
    return written(_sampled_mean(input, bins, (len(rois), input.shape[1], *output_size)), input.dtype, out)


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
    rule = roi_rules.roi_align(sampling_ratio, aligned)
    bins = _aligned_bins(input, rois, output_size, spatial_scale, rule)
    return {"input": _sampled_mean_backward(grad_output, input, bins).astype(input.dtype)}


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
    bins = _aligned_bins(input, rois, output_size, spatial_scale, rule)
    shape = (len(rois), input.shape[1] // (output_size[0] * output_size[1]), *output_size)
    return written(_sampled_mean(input, bins, shape), input.dtype, out)


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
    bins = _aligned_bins(input, rois, output_size, spatial_scale, rule)
    return {"input": _sampled_mean_backward(grad_output, input, bins).astype(input.dtype)}
