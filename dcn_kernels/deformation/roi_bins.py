"""Where the bins of a deformable RoI pooling lie (Fig. 7 of the paper), for arrays of any DLPack framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.deformation.sampling_points import as_coordinates, library
from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.arrays import Taken, taken_in


def deform_roi_bins(
    rois: Any,
    offset: Any = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    convention: str = "paper",
) -> Any:
    """Where the bins of `deform_roi_pool` lie (Fig. 7), each moved by its offset.

    Parameters
    ----------
    rois : array (R, 5)
        Image of the batch, x1, y1, x2, y2 in image coordinates.
    offset : array (R, 2, PH, PW), optional
        x first, then y, relative to the RoI's size. None: the bins of plain RoI pooling.
    output_size : int or (h, w)
        PH and PW.
    spatial_scale, gamma : float
    convention : {"paper", "rfcn", "mmcv"}
        As of `deform_roi_pool`.

    Returns
    -------
    array (R, PH, PW, 4)
        x1, y1, x2, y2 of each bin in pixels of the map, where pixel p covers [p - 0.5, p + 0.5], in float32 (float64
        for float64 RoIs). Position v of the map is (v + 0.5) / `spatial_scale` in the image, whose pixel p covers
        [p, p + 1]; `effective_dilation_by_class` and the picture of `dcn-bench sampling` say the same.

    Raises
    ------
    ValueError, TypeError
        As `deform_roi_pool`, but for RoIs that are not finite or of no image: the former have bins of NaN or infinity.

    Notes
    -----
    "paper": the pixels of an Eq. 5 bin, so neighbours may share a row. "rfcn" samples from a bin's corner in steps of
    bin / sample_per_part, "mmcv" around its centre.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import deform_roi_bins
    >>> rois = np.array([[0, 0, 0, 9, 9.0]])  # ten pixels wide
    >>> offset = np.zeros((1, 2, 1, 1))
    >>> offset[0, 0] = 2  # to the right by 0.1 * 2 * 10 pixels
    >>> deform_roi_bins(rois, offset, output_size=1)[0, 0, 0]
    array([ 1.5, -0.5, 11.5,  9.5])
    """
    name = "deform_roi_bins"
    shapes.choice(name, "convention", convention, ("paper", "rfcn", "mmcv"))
    P = shapes.pair(name, "output_size", output_size, 1)
    given = {"rois": rois} if offset is None else {"rois": rois, "offset": offset}
    with taken_in(name, given, None, None) as taken:
        boxes = _rois(name, taken)
        shift = taken.arrays.get("offset")
        if shift is not None and tuple(shift.shape) != (len(boxes), 2, *P):
            named = {"R": len(boxes), "PH": P[0], "PW": P[1]}
            raise shapes.shape_error(name, "offset", "R 2 PH PW", named, shift.shape)
        shift = None if shift is None else as_coordinates(name, "offset", shift)
        reach = shapes.number(name, "gamma", gamma)
        bins = _bins(library(taken), name, boxes, shift, P, P, spatial_scale, reach, convention)
        return taken.give(bins[:, 0].copy())


def deform_ps_roi_bins(
    rois: Any,
    trans: Any = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    part_size: int | None = None,
    trans_std: float = 0.1,
) -> Any:
    """Where the bins of `deform_ps_roi_pool` lie (Fig. 7), for each class, each moved by its translation.

    Parameters
    ----------
    rois : array (R, 5)
        Image of the batch, x1, y1, x2, y2 in image coordinates.
    trans : array (R, 2*classes, part_h, part_w), optional
        Per class x, then y, relative to the RoI's size. None: the bins without translation, of one class.
    output_size : int or (h, w)
        PH and PW.
    spatial_scale, part_size, trans_std
        As of `deform_ps_roi_pool`.

    Returns
    -------
    array (R, classes, PH, PW, 4)
        As of `deform_roi_bins`, convention "rfcn".

    Raises
    ------
    ValueError, TypeError
        As `deform_ps_roi_pool`, with the same exception as `deform_roi_bins`.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import deform_ps_roi_bins
    >>> rois = np.array([[0, 0, 0, 159, 159.0]])  # ten pixels of a map of stride 16
    >>> deform_ps_roi_bins(rois, output_size=2, spatial_scale=1 / 16)[0, 0, :, :, 0]  # left edges
    array([[-0.5,  4.5],
           [-0.5,  4.5]])
    """
    name = "deform_ps_roi_bins"
    P = shapes.pair(name, "output_size", output_size, 1)
    part = P if part_size is None else (shapes.integer(name, "part_size", part_size, 1),) * 2
    given = {"rois": rois} if trans is None else {"rois": rois, "trans": trans}
    with taken_in(name, given, None, None) as taken:
        boxes = _rois(name, taken)
        shift = taken.arrays.get("trans")
        if shift is not None and (
            shift.ndim != 4
            or shift.shape[1] % 2
            or shift.shape[1] == 0
            or (shift.shape[0], *shift.shape[2:]) != (len(boxes), *part)
        ):
            named = {"R": len(boxes), "part_h": part[0], "part_w": part[1]}
            raise shapes.shape_error(name, "trans", "R 2*classes part_h part_w", named, shift.shape)
        shift = None if shift is None else as_coordinates(name, "trans", shift)
        reach = shapes.number(name, "trans_std", trans_std)
        bins = _bins(library(taken), name, boxes, shift, P, part, spatial_scale, reach, "rfcn")
        return taken.give(bins)


def _rois(name: str, taken: Taken) -> Any:
    rois = taken.arrays["rois"]
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise shapes.shape_error(name, "rois", "R 5", {}, rois.shape)
    return as_coordinates(name, "rois", rois)


@np.errstate(invalid="ignore", over="ignore")  # RoIs that are not finite
def _bins(
    xp: Any,
    name: str,
    rois: Any,
    shift: Any,
    P: tuple[int, int],
    part: tuple[int, int],
    spatial_scale: Any,
    factor: float,
    convention: str,
) -> Any:
    """(R, classes, PH, PW, 4); the arithmetic is that of the operators, in the type of coordinates."""
    real = rois.dtype.type
    scale = real(shapes.number(name, "spatial_scale", spatial_scale, positive=True))
    reach = real(factor)
    classes = 1 if shift is None else shift.shape[1] // 2
    if shift is not None:
        shift = shift.astype(rois.dtype, copy=False)
        rows, columns = (np.arange(p) * q // p for p, q in zip(P, part, strict=True))
        shift = shift[:, :, rows][..., columns].reshape(len(rois), classes, 2, *P)
    edges: list[Any] = [None] * 4
    for axis, (low, high) in enumerate(((rois[:, 1], rois[:, 3]), (rois[:, 2], rois[:, 4]))):  # x, then y
        bins = P[1 - axis]
        i = xp.arange(bins, dtype=rois.dtype)
        if convention == "paper":
            start = _half_away(xp, low * scale)
            size = xp.maximum(_half_away(xp, high * scale) - start + 1, real(1))
            whole, k = size.astype("float64")[:, None], xp.arange(bins, dtype="float64")
            first = (k * whole // bins + start[:, None] - 0.5).astype(rois.dtype)
            last = (-(-(k + 1) * whole // bins) + start[:, None] - 0.5).astype(rois.dtype)
        else:
            if convention == "rfcn":
                start, end = _half_away(xp, low) * scale - real(0.5), (_half_away(xp, high) + 1) * scale - real(0.5)
                size = xp.maximum(end - start, real(0.1))
            else:
                start = low * scale - real(0.5)
                size = high * scale - real(0.5) - start
            step = (size / real(bins))[:, None]
            first, last = i * step + start[:, None], (i + 1) * step + start[:, None]
        along = (len(rois), 1, 1, bins) if axis == 0 else (len(rois), 1, bins, 1)
        moved = xp.zeros((len(rois), classes, *P), rois.dtype)
        if shift is not None:
            moved = (shift[:, :, axis] * reach) * size[:, None, None, None]
        edges[axis], edges[axis + 2] = first.reshape(along) + moved, last.reshape(along) + moved
    return xp.ascontiguousarray(xp.stack(edges, axis=-1))


def _half_away(xp: Any, v: Any) -> Any:
    """Round half away from zero, exactly."""
    whole = xp.trunc(v)
    return whole + xp.where(abs(v - whole) >= 0.5, xp.copysign(v.dtype.type(1), v), v.dtype.type(0))
