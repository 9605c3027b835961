"""The border rules by hand, the one-sided slopes on kinks, and coordinates that are NaN, infinite or huge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Backend

from dcn_kernels.dtypes import DTYPES
from dcn_kernels.ops.deform_conv import BORDERS, DEFORM_CONV2D

IMAGE = [[1.0, 2.0], [4.0, 8.0]]

# border, y, x -> x(p), its right-hand derivatives along y and x; each worked out by hand from the rule
BY_HAND = (
    ("zeros", 0.5, 0.5, 3.75, 4.5, 2.5),  # the mean; 6 - 1.5; 5 - 2.5
    ("zeros", 0.25, 0.75, 3.0625, 5.25, 1.75),
    ("zeros", 0.0, 0.0, 1.0, 3.0, 1.0),  # on a pixel: the cell below and to the right
    ("zeros", 0.0, 1.0, 2.0, 6.0, -2.0),  # the last column: beyond it is 0
    ("zeros", 1.0, 0.0, 4.0, -4.0, 4.0),
    ("zeros", 1.0, 1.0, 8.0, -8.0, -8.0),
    ("zeros", -0.5, 0.0, 0.5, 1.0, 0.5),  # half of row -1, which is 0, and half of row 0
    ("zeros", 1.5, 0.5, 3.0, -6.0, 2.0),
    ("zeros", -1.0, 0.0, 0.0, 1.0, 0.0),  # a zero offset's border tap at padding 1: x(0), not 0
    ("zeros", -1.0, 0.5, 0.0, 1.5, 0.0),
    ("zeros", 0.0, -1.0, 0.0, 0.0, 1.0),
    ("zeros", -1.0, -1.0, 0.0, 0.0, 0.0),  # along either axis it stays 0
    ("zeros", 2.0, 0.0, 0.0, 0.0, 0.0),
    ("zeros", 0.0, 2.0, 0.0, 0.0, 0.0),
    ("zeros", -1.0, 2.0, 0.0, 0.0, 0.0),
    ("zeros", -1.5, 0.5, 0.0, 0.0, 0.0),
    ("zeros", 0.5, 2.5, 0.0, 0.0, 0.0),
    ("msra", 0.5, 0.5, 3.75, 4.5, 2.5),
    ("msra", 0.0, 0.0, 1.0, 3.0, 1.0),
    ("msra", 1.0, 0.0, 4.0, 0.0, 4.0),  # y = H-1 and beyond is clamped: no slope
    ("msra", 1.5, 0.5, 6.0, 0.0, 4.0),
    ("msra", 0.5, 1.5, 5.0, 6.0, 0.0),
    ("msra", 1.0, 1.0, 8.0, 0.0, 0.0),
    ("msra", -0.25, 0.0, 0.0, 0.0, 0.0),  # 0 at once above the first row
    ("msra", 0.5, -0.5, 0.0, 0.0, 0.0),
    ("msra", 2.0, 0.0, 0.0, 0.0, 0.0),
    ("edge", 0.5, 0.5, 3.75, 4.5, 2.5),
    ("edge", 0.0, 0.0, 1.0, 3.0, 1.0),
    ("edge", 1.0, 1.0, 8.0, 0.0, 0.0),
    ("edge", -0.5, 0.5, 1.5, 0.0, 1.0),
    ("edge", -3.0, 0.0, 1.0, 0.0, 1.0),
    ("edge", 0.5, 7.0, 5.0, 6.0, 0.0),
    ("edge", 5.0, 5.0, 8.0, 0.0, 0.0),
)

# coordinate -> what "zeros" and "msra" say (outside: 0) and the clamped coordinate of "edge"
FAR = ((1e30, 1), (-1e30, 0), (np.inf, 1), (-np.inf, 0), (2.0**31, 1), (-(2.0**31) - 1, 0), (2.0**32, 1), (2.0**63, 1))


def arguments(image: Any, y: float, x: float, dtype: str, coordinates: str | None = None) -> dict[str, np.ndarray]:
    """A 1x1 convolution with weight 1 and mask 1 whose output pixel (0, 0) is the image at (y, x)."""
    image = np.asarray(image, DTYPES[dtype])[None, None]
    offset = np.zeros((1, 2, *image.shape[2:]), DTYPES[coordinates or dtype])
    offset[0, :, 0, 0] = y, x
    ones = np.ones_like(offset[:, :1])
    return {"input": image, "offset": offset, "weight": np.ones((1, 1, 1, 1), DTYPES[dtype]), "mask": ones}


def at_origin(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A grad_output that is 1 at pixel (0, 0) alone."""
    grad = np.zeros_like(arrays["input"])
    grad[0, 0, 0, 0] = 1
    return grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("border", "y", "x", "value", "slope_y", "slope_x"), BY_HAND)
def test_sample_and_slopes_are_those_worked_out_by_hand(
    backend: Backend, dtype: str, border: str, y: float, x: float, value: float, slope_y: float, slope_x: float
) -> None:
    arrays, params = arguments(IMAGE, y, x, dtype), {"border": border}
    assert backend.forward(DEFORM_CONV2D, arrays, params)[0, 0, 0, 0] == value  # all exact in every dtype
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": at_origin(arrays), **arrays}, params)
    assert grads["offset"][0, :, 0, 0].tolist() == [slope_y, slope_x]
    assert grads["mask"][0, 0, 0, 0] == value
    assert grads["weight"].item() == value
    assert (grads["input"].astype(float) * IMAGE).sum() == value  # the weights that made the value


def test_interpolation_weights_of_each_pixel_are_those_worked_out_by_hand(backend: Backend) -> None:
    arrays = arguments(IMAGE, 0.5, 0.25, "float64")
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": at_origin(arrays), **arrays}, {}, wrt=["input"])
    assert grads["input"][0, 0].tolist() == [[0.375, 0.125], [0.375, 0.125]]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("y", "x"), [(np.nan, 0.5), (0.5, np.nan), (np.nan, -9.0), (99.0, np.nan), (np.nan, np.nan)])
@pytest.mark.parametrize("mask", [1.0, 0.0])
def test_nan_coordinate_makes_its_sample_and_gradients_nan_and_nothing_else(
    backend: Backend, dtype: str, border: str, y: float, x: float, mask: float
) -> None:
    arrays, params = arguments(IMAGE, y, x, dtype), {"border": border}
    arrays["mask"][0, 0, 0, 0] = mask
    out = backend.forward(DEFORM_CONV2D, arrays, params)[0, 0]
    assert np.isnan(out[0, 0])
    assert out.ravel()[1:].tolist() == [2, 4, 8]  # the other pixels, at zero offset
    ones = np.ones_like(arrays["input"])
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": ones, **arrays}, params)
    assert np.isnan(grads["offset"][0, :, 0, 0]).all()
    assert np.isnan(grads["mask"][0, 0, 0, 0])
    assert np.isnan(grads["weight"]).all()
    assert np.isfinite(grads["offset"][0, :, 1]).all()
    assert grads["mask"].ravel()[1:].tolist() == [2, 4, 8]
    assert grads["input"][0, 0].tolist() == [[0, 1], [1, 1]]  # the NaN sample writes nothing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("far", "clamped"), FAR)
@pytest.mark.parametrize("axis", [0, 1])
def test_infinite_or_huge_coordinate_is_outside(
    backend: Backend, dtype: str, border: str, far: float, clamped: int, axis: int
) -> None:
    wide = "float32" if dtype == "float16" else None  # float16 has no 1e30
    arrays = arguments(IMAGE, far if axis == 0 else 0, far if axis == 1 else 0, dtype, wide)
    corner = (clamped, 0) if axis == 0 else (0, clamped)
    value = IMAGE[corner[0]][corner[1]] if border == "edge" else 0
    params = {"border": border}
    assert backend.forward(DEFORM_CONV2D, arrays, params)[0, 0].tolist() == [[value, 2], [4, 8]]
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": at_origin(arrays), **arrays}, params)
    assert grads["offset"][0, axis, 0, 0] == 0
    expected = np.zeros((2, 2))
    if border == "edge":
        expected[corner] = 1
    assert (grads["input"][0, 0] == expected).all()
    assert grads["mask"][0, 0, 0, 0] == value
    assert grads["weight"].item() == value


def test_infinite_float16_offset_is_outside(backend: Backend) -> None:
    arrays = arguments(IMAGE, np.inf, 0, "float16")
    assert backend.forward(DEFORM_CONV2D, arrays, {})[0, 0].tolist() == [[0, 2], [4, 8]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 times an infinite pixel, which is NaN
@pytest.mark.parametrize("pixel", [np.nan, np.inf])
@pytest.mark.parametrize("border", ["zeros", "msra"])
def test_outside_sample_reads_no_pixel(backend: Backend, border: str, pixel: float) -> None:
    arrays, params = arguments(np.full((2, 2), pixel), -7.0, 0.25, "float32"), {"border": border}
    assert backend.forward(DEFORM_CONV2D, arrays, params)[0, 0, 0, 0] == 0
    grads = backend.backward(
        DEFORM_CONV2D, {"grad_output": at_origin(arrays), **arrays}, params, wrt=["offset", "mask"]
    )
    assert grads["offset"][0, :, 0, 0].tolist() == [0, 0]
    assert grads["mask"][0, 0, 0, 0] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_positions_are_float32(backend: Backend, dtype: str) -> None:
    # Row 300 plus 0.125: float16 would round it to 300.25 (steps of 1/4 there), bfloat16 to 300 (steps of 2).
    column = np.zeros((302, 1), DTYPES[dtype])
    column[300], column[301] = 64, 72
    image = column[None, None]
    offset = np.zeros((1, 2, 302, 1), DTYPES[dtype])
    offset[0, 0, 300] = 0.125
    arrays = {"input": image, "offset": offset, "weight": np.ones((1, 1, 1, 1), DTYPES[dtype])}
    assert backend.forward(DEFORM_CONV2D, arrays, {})[0, 0, 300, 0] == 65
