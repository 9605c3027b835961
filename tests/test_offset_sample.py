"""offset_sample2d: by hand, by scipy's interpolation, and as a 1x1 depthwise deform_conv2d."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Backend, assert_close
from scipy.ndimage import map_coordinates

from dcn_kernels.ops.deform_conv import BORDERS, DEFORM_CONV2D
from dcn_kernels.ops.offset_sample import OFFSET_SAMPLE2D


def test_2x2_case_by_hand(backend: Backend) -> None:
    image = np.array([[[[1.0, 2.0], [4.0, 8.0]]]])
    offset = np.zeros((1, 2, 2, 2))
    offset[0, :, 0, 0] = 0.5, 0.5  # the middle of all four
    offset[0, :, 0, 1] = 1, -1  # pixel (1, 0)
    offset[0, :, 1, 0] = 3, 0.25  # clamped to row 1, a quarter from 4 to 8
    offset[0, :, 1, 1] = -0.5, -9  # half way between rows, clamped to column 0
    arrays = {"input": image, "offset": offset}
    assert backend.forward(OFFSET_SAMPLE2D, arrays, {})[0, 0].tolist() == [[3.75, 4], [5, 2.5]]
    grads = backend.backward(OFFSET_SAMPLE2D, {"grad_output": np.array([[[[1.0, 10], [100, 1000]]]]), **arrays}, {})
    # slopes: 6 - 1.5 and 5 - 2.5; at pixel (1, 0) none along y (the last row), 8 - 4 along x; clamped in y, 8 - 4
    # along x; 4 - 1 along y, clamped in x
    assert grads["offset"][0, 0].tolist() == [[4.5, 0], [0, 3000]]
    assert grads["offset"][0, 1].tolist() == [[2.5, 40], [400, 0]]
    quarter = 0.25
    assert grads["input"][0, 0].tolist() == [[quarter + 500, quarter], [quarter + 10 + 75 + 500, quarter + 25]]


@pytest.mark.parametrize("offset_groups", [1, 2, 6])
def test_edge_border_is_nearest_mode_of_scipy(backend: Backend, offset_groups: int) -> None:
    """ConvOffset2D has an offset field per channel (offset_groups = C) and clamps positions to the image."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 6, 9, 11))
    offset = rng.standard_normal((2, 2 * offset_groups, 9, 11)) * 4
    rows, columns = np.mgrid[:9, :11]
    expected = np.empty_like(image)
    for n, c in np.ndindex(2, 6):
        group = c // (6 // offset_groups)
        at = [rows + offset[n, 2 * group], columns + offset[n, 2 * group + 1]]
        expected[n, c] = map_coordinates(image[n, c], at, order=1, mode="nearest")
    out = backend.forward(OFFSET_SAMPLE2D, {"input": image, "offset": offset}, {})
    assert_close(out, expected, "float64", 4)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("offset_groups", [1, 2, 4])
def test_is_a_1x1_depthwise_deform_conv2d(backend: Backend, border: str, offset_groups: int) -> None:
    rng = np.random.default_rng(1)
    image, grad = rng.standard_normal((2, 2, 4, 7, 9))
    offset = rng.standard_normal((2, 2 * offset_groups, 7, 9)) * 3
    arrays, params = {"grad_output": grad, "input": image, "offset": offset}, {"border": border}
    convolved = {**arrays, "weight": np.ones((4, 1, 1, 1))}
    forward = {name: array for name, array in arrays.items() if name != "grad_output"}
    out = backend.forward(OFFSET_SAMPLE2D, forward, params)
    same = backend.forward(DEFORM_CONV2D, {**forward, "weight": convolved["weight"]}, params)
    assert_close(out, same, "float64", 4)
    grads = backend.backward(OFFSET_SAMPLE2D, arrays, params)
    others = backend.backward(DEFORM_CONV2D, convolved, params)
    for name, grad in grads.items():
        assert_close(grad, others[name], "float64", 100, name)


@pytest.mark.parametrize("border", BORDERS)
def test_zero_offset_is_the_image(backend: Backend, border: str) -> None:
    image = np.random.default_rng(2).standard_normal((1, 3, 5, 4)).astype(np.float32)
    arrays = {"input": image, "offset": np.zeros((1, 2, 5, 4), np.float32)}
    assert (backend.forward(OFFSET_SAMPLE2D, arrays, {"border": border}) == image).all()


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_offset_makes_its_pixel_nan_in_every_channel_and_nothing_else(
    backend: Backend, border: str, axis: int
) -> None:
    image, offset = np.ones((1, 4, 3, 3)), np.zeros((1, 4, 3, 3))
    offset[0, 2 + axis, 1, 1] = np.nan  # of the second of two groups
    offset[0, 3 - axis, 1, 1] = -99
    arrays, params = {"input": image, "offset": offset}, {"border": border}
    expected = np.zeros(image.shape, bool)
    expected[0, 2:, 1, 1] = True
    assert (np.isnan(backend.forward(OFFSET_SAMPLE2D, arrays, params)) == expected).all()
    grads = backend.backward(OFFSET_SAMPLE2D, {"grad_output": np.ones_like(image), **arrays}, params)
    assert (np.isnan(grads["offset"]) == expected).all()
    assert (grads["input"] == ~expected).all()


@pytest.mark.parametrize("far", [1e30, -1e30, np.inf, -np.inf])
@pytest.mark.parametrize(("border", "edge"), [("edge", True), ("zeros", False), ("msra", False)])
def test_infinite_or_huge_offset_is_clamped_by_edge_and_outside_for_the_others(
    backend: Backend, far: float, border: str, edge: bool
) -> None:
    image = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3)
    offset = np.zeros((1, 2, 3, 3), np.float32)
    offset[0, 1, 1, 1] = far
    out = backend.forward(OFFSET_SAMPLE2D, {"input": image, "offset": offset}, {"border": border})
    assert out[0, 0, 1, 1] == ((6 if far > 0 else 4) if edge else 0)
