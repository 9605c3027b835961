"""Effective dilation of filters on small, medium and large objects and on background (Table 2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from dcn_kernels.deformation.sampling_points import check_neighbours, library, make_filter, mean_distances
from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.arrays import taken_in
from dcn_kernels.dtypes import BFLOAT16

CLASSES = ("small", "medium", "large", "background")


def effective_dilation_by_class(
    offset: Any,
    boxes: Any,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    spatial_scale: float = 1.0,
    areas: tuple[float, float] = (96.0**2, 224.0**2),
) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of filters' effective dilation on small, medium and large objects and background.

    A filter belongs to the smallest box that its centre lies in, and to the background where there is none.

    Parameters
    ----------
    offset : array (N, 2*OG*K, OH, OW)
        As `deform_conv2d` takes it.
    boxes : array (B, 5)
        Of objects: image of the batch, and the edges x1, y1, x2, y2 in image coordinates, in which pixel p covers
        [p, p + 1]. Where x2 and y2 are an object's last pixels, as in PASCAL VOC, add 1. Of the offset's framework.
    kernel_size, stride, padding, dilation : int or (h, w)
        Those of the layer.
    spatial_scale : float
        From image coordinates to the layer's input, 1/16 for a map of stride 16: position v of the map is
        (v + 0.5) / spatial_scale in the image.
    areas : (a, b)
        In image pixels: below `a` an object is small, from `b` on large. The default is Table 2's; COCO's own are
        (32**2, 96**2).

    Returns
    -------
    dict
        For "small", "medium", "large" and "background": ``mean`` and ``std`` (of the population) in pixels of the
        layer's input, ``filters``, of how many, each offset group being a filter, and ``not_finite``, how many are
        left out because an offset of theirs is NaN, infinite, or too long for its type. NaN for both
        numbers of no filters.

    Raises
    ------
    ValueError
        A shape or value does not fit; boxes that are not finite or of no image.
    TypeError
        Not arrays, or of two frameworks or devices.

    Notes
    -----
    Table 2 of arXiv 1703.06211, whose caption has the sizes: below 96^2 pixels small, above 224^2 large. The paper
    tells neither whether these are pixels of the image as it came or as it was resized, nor what overlapping boxes
    do, nor where in the image a unit's centre is. The smallest box is this library's choice. That the centre is the
    middle of the unit's cell, (v + 0.5) / spatial_scale, is how `deform_roi_bins` and the RoI operators that start at
    x * spatial_scale - 0.5 lay a map over its image.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import effective_dilation_by_class
    >>> offset = np.zeros((1, 18, 4, 4))
    >>> boxes = np.array([[0, 0, 0, 32, 32.0]])  # 2x2 cells of a map of stride 16, in a box of 32x32 pixels
    >>> found = effective_dilation_by_class(offset, boxes, 3, padding=2, dilation=2, spatial_scale=1 / 16)
    >>> found["small"]
    {'mean': 2.0, 'std': 0.0, 'filters': 4, 'not_finite': 0}
    >>> found["background"]["filters"]
    12
    """
    name = "effective_dilation_by_class"
    filter = make_filter(name, kernel_size, stride, padding, dilation)
    check_neighbours(name, filter)
    scale = shapes.number(name, "spatial_scale", spatial_scale, positive=True)
    if not isinstance(areas, (tuple, list)) or not all(isinstance(area, Real) for area in areas):
        raise TypeError(f"{name}: areas: expected a pair of numbers (a, b), got {areas!r}")
    if len(areas) != 2 or not 0 <= areas[0] <= areas[1]:
        raise ValueError(f"{name}: areas: expected a pair (a, b) with 0 <= a <= b, got {areas!r}")
    with taken_in(name, {"offset": offset, "boxes": boxes}, None, None) as taken:
        dilations = _host(mean_distances(library(taken), name, taken.arrays["offset"], filter))
        found = _host(taken.arrays["boxes"])
    N, _, OH, OW = dilations.shape
    if found.ndim != 2 or found.shape[1] != 5:
        raise shapes.shape_error(name, "boxes", "B 5", {}, found.shape)
    if found.dtype.kind not in "iuf" and found.dtype != BFLOAT16:
        raise TypeError(f"{name}: boxes: expected real numbers, got dtype {found.dtype}")
    found = found.astype(np.float64)
    known = np.isfinite(found).all(axis=1) & np.isin(found[:, 0], np.arange(N))
    if not known.all():
        row = int(np.argmin(known))
        raise ValueError(
            f"{name}: boxes: expected finite numbers and batch indices among 0..N-1, N = {N}, "
            f"got {found[row].tolist()} in row {row}"
        )
    centres = [(filter.regular(axis, length).mean(axis=0) + 0.5) / scale for axis, length in enumerate((OH, OW))]
    labels = _labels(found, centres, N, areas)
    classes = {}
    for number, label in enumerate(CLASSES):
        classes[label] = mean_and_deviation(np.moveaxis(dilations, 1, -1)[labels == number])
    return classes


def mean_and_deviation(dilations: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation and number of the finite ones, and the number of the others."""
    finite = dilations[np.isfinite(dilations)].astype(np.float64)
    with np.errstate(over="ignore"):  # float64 offsets whose squares are infinite
        mean, std = (finite.mean(), finite.std()) if finite.size else (np.nan, np.nan)
    return {
        "mean": float(mean),
        "std": float(std),
        "filters": finite.size,
        "not_finite": dilations.size - finite.size,
    }


def _labels(boxes: np.ndarray, centres: list[np.ndarray], N: int, areas: Sequence[float]) -> np.ndarray:
    """(N, OH, OW) indices of `CLASSES`; `centres` are the filters' rows and columns in the image."""
    y, x = centres
    labels = np.full((N, len(y), len(x)), CLASSES.index("background"))
    sizes = np.maximum(boxes[:, 3] - boxes[:, 1], 0) * np.maximum(boxes[:, 4] - boxes[:, 2], 0)
    for b in np.argsort(-sizes, kind="stable"):  # the smallest last, over those that it lies in
        image, x1, y1, x2, y2 = boxes[b]
        inside = ((y >= y1) & (y <= y2))[:, None] & ((x >= x1) & (x <= x2))
        labels[int(image)][inside] = int(np.searchsorted(areas, sizes[b], side="right"))
    return labels


def _host(array: Any) -> np.ndarray:
    return array.get() if hasattr(array, "get") else array
