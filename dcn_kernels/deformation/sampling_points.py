"""Where deformable filters look: sampling points, effective dilation, and what offsets do.

The paper's evidence (Table 2, Fig. 5 and 6) for anyone's own arrays. All functions take arrays of any DLPack framework.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.arrays import Taken, taken_in
from dcn_kernels.dtypes import DTYPES, accumulator

_NAMED = "N 2*OG*K OH OW"


class Filter(NamedTuple):
    """The parameters of a filter, as pairs (h, w)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def regular(self, axis: int, positions: int) -> np.ndarray:
        """(taps, positions) of one axis: where a filter without offsets samples."""
        start = np.arange(positions) * self.stride[axis] - self.padding[axis]
        return np.arange(self.kernel[axis])[:, None] * self.dilation[axis] + start


def make_filter(name: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Filter:
    """The parameters as a caller gives them, checked; `name` is the caller's."""
    return Filter(
        shapes.pair(name, "kernel_size", kernel_size, 1),
        shapes.pair(name, "stride", stride, 1),
        shapes.pair(name, "padding", padding, 0),
        shapes.pair(name, "dilation", dilation, 1),
    )


def library(taken: Taken) -> Any:
    """NumPy, or CuPy (which has been imported to take the arrays in)."""
    return sys.modules["cupy"] if taken.backend == "cuda" else np


def as_coordinates(name: str, argument: str, array: Any) -> Any:
    """An array in the type of coordinates."""
    if array.dtype not in DTYPES.values():
        raise TypeError(f"{name}: {argument}: expected dtype {', '.join(DTYPES)}, got {array.dtype}")
    return array.astype(accumulator(array.dtype), copy=False)


def _by_tap(name: str, offset: Any, kernel: tuple[int, int], argument: str = "offset") -> Any:
    """The offset as (N, OG, KH, KW, 2, OH, OW), in the type of coordinates."""
    taps = kernel[0] * kernel[1]
    if offset.ndim != 4 or offset.shape[1] % (2 * taps) or offset.shape[1] == 0:
        raise shapes.shape_error(name, argument, _NAMED, {"K": taps}, offset.shape)
    N, channels, OH, OW = offset.shape
    return as_coordinates(name, argument, offset).reshape(N, channels // (2 * taps), *kernel, 2, OH, OW)


def _positions(xp: Any, by_tap: Any, filter: Filter) -> Any:
    """The offset moved to where each tap samples, (N, OG, KH, KW, 2, OH, OW)."""
    rows = xp.asarray(filter.regular(0, by_tap.shape[5]), by_tap.dtype)
    columns = xp.asarray(filter.regular(1, by_tap.shape[6]), by_tap.dtype)
    y = by_tap[:, :, :, :, 0] + rows[:, None, :, None]
    x = by_tap[:, :, :, :, 1] + columns[None, :, None, :]
    return xp.stack([y, x], axis=4)


def _unit(name: str, at: Any, size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(at, (tuple, list)) or len(at) != 2:
        raise TypeError(f"{name}: at: expected a pair (oy, ox) of the output's rows and columns, got {at!r}")
    oy, ox = (shapes.integer(name, "at", value, 0) for value in at)
    if oy >= size[0] or ox >= size[1]:
        raise ValueError(f"{name}: at: expected a position within (OH, OW) = {size}, got {(oy, ox)}")
    return oy, ox


# ---------------------------------------------------------------- sampling points


def sampling_points(
    offset: Any,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    at: tuple[int, int] | None = None,
) -> Any:
    """The positions that a deformable filter samples, ``p_0 + p_n + dp_n`` of Eq. 2.

    Parameters
    ----------
    offset : array (N, 2*OG*K, OH, OW)
        As `deform_conv2d` takes it: dy, dx interleaved, in pixels of the input; K = KH*KW.
    kernel_size, stride, padding, dilation : int or (h, w)
        Those of the layer.
    at : (oy, ox), optional
        Only the filter at this output position.

    Returns
    -------
    array (N, OG, K, 2, OH, OW)
        (y, x) in pixels of the input, outside it too, in float32 (float64 for float64 offsets).
        With `at`: (N, OG, K, 2).

    Raises
    ------
    ValueError
        Channels that are not 2*OG*K, or a position outside the output.
    TypeError
        Not an array, or not of a floating dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import sampling_points
    >>> offset = np.zeros((1, 18, 5, 5), np.float32)
    >>> offset[0, 1, 2, 2] = 0.5  # dx of the first tap
    >>> sampling_points(offset, 3, padding=1, at=(2, 2))[0, 0, :3]
    array([[1. , 1.5],
           [1. , 2. ],
           [1. , 3. ]], dtype=float32)
    """
    name = "sampling_points"
    filter = make_filter(name, kernel_size, stride, padding, dilation)
    with taken_in(name, {"offset": offset}, None, None) as taken:
        by_tap = _by_tap(name, taken.arrays["offset"], filter.kernel)
        points = _positions(library(taken), by_tap, filter)
        N, groups, _, _, _, OH, OW = points.shape
        points = points.reshape(N, groups, filter.kernel[0] * filter.kernel[1], 2, OH, OW)  # N may be 0
        if at is not None:
            oy, ox = _unit(name, at, (OH, OW))
            points = points[..., oy, ox]
        return taken.give(library(taken).ascontiguousarray(points))


_LAYER = {"kernel_size": None, "stride": 1, "padding": 0, "dilation": 1}


def stacked_sampling_points(
    layers: Sequence[Mapping[str, Any]], at: tuple[int, int], *, image: int = 0, group: int = 0
) -> list[Any]:
    """The positions that one unit samples through several deformable layers (Fig. 5 and 6).

    Three layers of 3x3 filters sample 9 points, 81 points, and 729 points.

    Parameters
    ----------
    layers : sequence of mappings
        The arguments of `sampling_points` for each layer, ``dict(offset=..., kernel_size=3, ...)``, in the order of
        the network: the last one is the top.
    at : (oy, ox)
        The unit of the top layer's output.
    image : int
        Which image of the batch.
    group : int
        Which offset group, of each layer.

    Returns
    -------
    list of arrays (K**depth, 2)
        For each layer, in the order given, the positions (y, x) in its own input, depth being 1 for the top. Taps vary
        fastest at the bottom. Below a point that is beside the map of the layer beneath there is no filter: its
        points are NaN.

    Raises
    ------
    ValueError
        No layers, an offset of a wrong shape, or an `at`, `image` or `group` that there is not.
    TypeError
        Layers that are no mappings; not arrays, or of two frameworks or devices.

    Notes
    -----
    A point between four units mixes what their four filters see. It is followed to the unit nearest to it (of two
    equally near ones to the even one), as in the figures of the paper's authors, so that a layer multiplies the
    points by K and not by 4 K. Layers between which only 1x1 convolutions stand, as in ResNet, count as neighbours.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import stacked_sampling_points
    >>> layer = dict(offset=np.zeros((1, 18, 20, 20)), kernel_size=3, padding=2, dilation=2)
    >>> points = stacked_sampling_points([layer, layer, layer], at=(10, 10))
    >>> [len(p) for p in points]
    [729, 81, 9]
    >>> len(np.unique(points[0], axis=0))  # without offsets they fall together on a grid of 7x7
    49
    """
    name = "stacked_sampling_points"
    if not layers:
        raise ValueError(f"{name}: layers: expected at least one layer, got none")
    filters = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, Mapping):
            raise TypeError(f"{name}: layers[{number}]: expected a mapping, got {type(layer).__name__}")
        unknown = set(layer) - {"offset", *_LAYER}
        if unknown or "offset" not in layer or "kernel_size" not in layer:
            raise ValueError(
                f"{name}: layers[{number}]: expected offset, kernel_size and perhaps stride, padding, dilation, "
                f"got {', '.join(layer)}"
            )
        filters.append(make_filter(name, **{key: layer.get(key, default) for key, default in _LAYER.items()}))
    offsets = {f"layers[{number}].offset": layer["offset"] for number, layer in enumerate(layers)}
    with taken_in(name, offsets, None, None) as taken:
        xp, fields = library(taken), []
        for (argument, offset), filter in zip(taken.arrays.items(), filters, strict=True):
            by_tap = _by_tap(name, offset, filter.kernel, argument)
            for what, index, count in (("image", image, by_tap.shape[0]), ("group", group, by_tap.shape[1])):
                if not 0 <= shapes.integer(name, what, index, 0) < count:
                    raise ValueError(f"{name}: {what}: expected one of the {count} of {argument}, got {index}")
            fields.append(_positions(xp, by_tap[image : image + 1, group : group + 1], filter)[0, 0])
        top = fields[-1].shape[3:]
        points = xp.asarray([_unit(name, at, top)], fields[-1].dtype)
        found = []
        for field in reversed(fields):
            points = _below(xp, field, points)
            found.append(taken.give(points))
        return found[::-1]


def _below(xp: Any, field: Any, points: Any) -> Any:
    """The points (n*K, 2) that the units nearest to `points` (n, 2) sample; `field` is (KH, KW, 2, OH, OW)."""
    OH, OW = field.shape[3:]
    near = xp.round(points)
    inside = (near[:, 0] >= 0) & (near[:, 0] < OH) & (near[:, 1] >= 0) & (near[:, 1] < OW)  # False for NaN
    unit = xp.where(inside[:, None], near, 0).astype("int64")
    below = field.reshape(-1, 2, OH, OW)[:, :, unit[:, 0], unit[:, 1]]  # K, 2, n
    below = xp.where(inside, below, xp.asarray(np.nan, field.dtype))
    return xp.ascontiguousarray(below.transpose(2, 0, 1).reshape(-1, 2))


# ---------------------------------------------------------------- effective dilation


def effective_dilation(
    offset: Any,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Any:
    """How far apart neighbouring sampling points lie, for each filter (section 4.2 and Table 2 of the paper).

    Parameters
    ----------
    offset : array (N, 2*OG*K, OH, OW)
        As `deform_conv2d` takes it.
    kernel_size, stride, padding, dilation : int or (h, w)
        Those of the layer. Stride and padding move all points of a filter alike and do not matter here.

    Returns
    -------
    array (N, OG, OH, OW)
        Pixels: the mean of the distances between all pairs of sampling points whose taps are neighbours in a row or a
        column of the kernel (12 pairs of a 3x3 one). Zero offsets give exactly the dilation where it is equal on both
        axes. float32 (float64 for float64 offsets).

    Raises
    ------
    ValueError
        A 1x1 kernel, which has no neighbours; channels that are not 2*OG*K.
    TypeError
        Not an array, or not of a floating dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import effective_dilation
    >>> offset = np.zeros((1, 18, 1, 1))
    >>> effective_dilation(offset, 3, dilation=2).item()
    2.0
    >>> offset[0, 9, 0, 0] = 1  # the centre moves one pixel to the right: distances 1, 3, and twice sqrt(5)
    >>> round(effective_dilation(offset, 3, dilation=2).item(), 3)
    2.039
    """
    name = "effective_dilation"
    filter = make_filter(name, kernel_size, stride, padding, dilation)
    check_neighbours(name, filter)
    with taken_in(name, {"offset": offset}, None, None) as taken:
        xp = library(taken)
        return taken.give(xp.ascontiguousarray(mean_distances(xp, name, taken.arrays["offset"], filter)))


def check_neighbours(name: str, filter: Filter) -> None:
    """A 1x1 kernel has no effective dilation."""
    if filter.kernel == (1, 1):
        raise ValueError(f"{name}: kernel_size: expected a kernel with neighbouring taps, got {filter.kernel}")


def mean_distances(xp: Any, name: str, offset: Any, filter: Filter) -> Any:
    """The effective dilations (N, OG, OH, OW) of an array that has been taken in."""
    by_tap = _by_tap(name, offset, filter.kernel)
    (KH, KW), (dy, dx) = filter.kernel, filter.dilation
    with np.errstate(invalid="ignore", over="ignore"):  # infinite offsets, and such whose squares are
        down = by_tap[:, :, 1:] - by_tap[:, :, :-1]
        right = by_tap[:, :, :, 1:] - by_tap[:, :, :, :-1]
        total = xp.hypot(down[:, :, :, :, 0] + dy, down[:, :, :, :, 1]).sum(axis=(2, 3))
        total += xp.hypot(right[:, :, :, :, 0], right[:, :, :, :, 1] + dx).sum(axis=(2, 3))
    return total / by_tap.dtype.type((KH - 1) * KW + KH * (KW - 1))


# ---------------------------------------------------------------- statistics


def offset_statistics(
    offset: Any,
    input_size: int | tuple[int, int],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    quantiles: Iterable[float] = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0),
) -> dict[str, Any]:
    """What a layer's offsets do: how many points leave the image, NaNs and infinities, how far points move.

    Parameters
    ----------
    offset : array (N, 2*OG*K, OH, OW)
        As `deform_conv2d` takes it.
    input_size : int or (h, w)
        H and W of the layer's input, in pixels.
    kernel_size, stride, padding, dilation : int or (h, w)
        Those of the layer.
    quantiles : numbers in [0, 1]
        Which ones of the offsets' lengths.

    Returns
    -------
    dict
        ``points``: number of sampling points. ``outside``: share of them that touch no pixel, y <= -1 or y >= H or
        x <= -1 or x >= W, infinite ones too, those of NaN not. ``outside_without_offsets``: the same of the filter
        without offsets, because padding alone has points outside. ``nan``, ``infinite``: number of points with such a
        coordinate. ``mean_length`` and ``length``, a dict from quantile to length: of the finite offsets, in pixels.
        NaN where there are no points to tell from.

    Raises
    ------
    ValueError
        A shape or value does not fit.
    TypeError
        Not an array, or not of a floating dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels import offset_statistics
    >>> offset = np.zeros((1, 2, 2, 2), np.float32)
    >>> offset[0, :, 0, 0] = 3, 4  # one of four points moves 5 pixels, out of the image
    >>> found = offset_statistics(offset, 2, 1, quantiles=(0.5, 1.0))
    >>> found["outside"], found["length"]
    (0.25, {0.5: 0.0, 1.0: 5.0})
    """
    name = "offset_statistics"
    filter = make_filter(name, kernel_size, stride, padding, dilation)
    H, W = shapes.pair(name, "input_size", input_size, 1)
    if not isinstance(quantiles, Iterable):
        raise TypeError(f"{name}: quantiles: expected several numbers, got {quantiles!r}")
    levels = [shapes.number(name, "quantiles", level) for level in quantiles]
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"{name}: quantiles: expected numbers in [0, 1], got {levels}")
    with taken_in(name, {"offset": offset}, None, None) as taken:
        xp = library(taken)
        by_tap = _by_tap(name, taken.arrays["offset"], filter.kernel)
        N, groups, KH, KW, _, OH, OW = by_tap.shape
        due = tuple(
            (size + 2 * filter.padding[a] - filter.dilation[a] * (filter.kernel[a] - 1) - 1) // filter.stride[a] + 1
            for a, size in enumerate((H, W))
        )
        if due != (OH, OW):
            sizes = {"K": KH * KW, "OH": due[0], "OW": due[1]}
            raise shapes.shape_error(name, "offset", _NAMED, sizes, taken.arrays["offset"].shape)
        points = N * groups * KH * KW * OH * OW
        moved = _positions(xp, by_tap, filter)
        regular = _positions(xp, xp.zeros_like(by_tap[:1, :1]), filter)
        finite = xp.isfinite(by_tap).all(axis=4)
        # in float64, where the squares of exploding float32 offsets are finite
        length = xp.hypot(*(by_tap[:, :, :, :, i][finite].astype("float64") for i in range(2)))
        is_nan = xp.isnan(by_tap).any(axis=4)
        found = {
            "points": points,
            "outside": _share(outside(moved, (H, W), 4)),
            "outside_without_offsets": _share(outside(regular, (H, W), 4)) if points else np.nan,
            "nan": int(is_nan.sum()),
            "infinite": int(xp.isinf(by_tap).any(axis=4).sum()),
        }
        if not length.size:
            return found | {"mean_length": np.nan, "length": dict.fromkeys(levels, np.nan)}
        found["mean_length"] = float(length.mean())
        found["length"] = {level: float(xp.quantile(length, level)) for level in levels}
        return found


def outside(points: Any, size: tuple[int, int], axis: int) -> Any:
    """Which points touch no pixel of (H, W); `axis` is that of (y, x). NaN points do not count as outside."""
    y, x = (points.take(i, axis=axis) for i in range(2))
    return ((y <= -1) | (y >= size[0]) | (x <= -1) | (x >= size[1])) & (y == y) & (x == x)


def _share(flags: Any) -> float:
    return int(flags.sum()) / flags.size if flags.size else np.nan
