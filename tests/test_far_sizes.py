"""Lines of 2^24 pixels and more, of whose positions float32 cannot tell all apart; strange values and strides."""

from __future__ import annotations

import numpy as np
import pytest

from dcn_kernels import (
    deform_conv2d,
    deform_conv2d_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
    offset_sample2d,
    offset_sample2d_backward,
    roi_align,
    roi_align_backward,
)

LENGTHS = [2**24 + 1, 2**24 + 2, 2**24 + 4]  # the last pixel rounds to: even below, itself, off the map


def line(length: int, axis: int) -> np.ndarray:
    shape = (1, 1, 1, length) if axis == 3 else (1, 1, length, 1)
    image = np.zeros(length, np.float32)
    image[-8:] = np.arange(1, 9)
    return image.reshape(shape)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_roi_at_the_end_of_a_line_past_2_to_the_24_reads_and_writes_the_last_pixels(length: int, axis: int) -> None:
    image, far = line(length, axis), float(length + 2)
    rois = np.array([[0, 0, 0, 0, 0]], np.float32)
    rois[0, [1, 3] if axis == 3 else [2, 4]] = far - 6, far
    grad = np.ones((1, 1, 1, 1), np.float32)
    calls = [
        (roi_align, roi_align_backward, {"output_size": 1, "sampling_ratio": 2}),
        (deform_roi_pool, deform_roi_pool_backward, {"output_size": 1, "convention": "mmcv", "sampling_ratio": 2}),
        (deform_roi_pool, deform_roi_pool_backward, {"output_size": 1, "convention": "rfcn"}),
    ]
    for forward, backward, given in calls:
        for function, arrays in ((forward, (image, rois)), (backward, (grad, image, rois))):
            got, want = (function(*arrays, **given, backend=each) for each in ("cpu", "reference"))
            if isinstance(got, dict):
                got, want = got["input"].ravel()[-16:], want["input"].ravel()[-16:]
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=f"{function.__name__} {given}")


@pytest.mark.parametrize("border", ["edge", "msra", "zeros"])
@pytest.mark.parametrize("axis", [2, 3])
def test_samples_beyond_the_end_of_a_line_past_2_to_the_24_are_clamped_to_its_last_pixel(
    axis: int, border: str
) -> None:
    length = LENGTHS[-1]
    image = line(length, axis)
    offset = np.zeros((1, 2, *image.shape[2:]), np.float32)
    end = offset[0, axis - 2].reshape(-1)[-6:]
    end[:] = [0, 6, 100, -1, np.inf, 1]
    grad = np.ones_like(image)
    got, grads = (
        offset_sample2d(image, offset, border=border, backend="cpu").ravel()[-6:],
        offset_sample2d_backward(grad, image, offset, border=border, backend="cpu"),
    )
    assert np.isfinite(grads["input"]).all()
    if border == "edge":
        assert got[[1, 2, 4]].tolist() == [8, 8, 8]
        assert grads["input"].ravel()[-1] >= 3
    else:
        assert got[[2, 4]].tolist() == [0, 0]


@pytest.mark.parametrize("pixel", [np.inf, np.nan])
@pytest.mark.parametrize("place", [(-1.0, 0.5), (0.5, -1.0), (-1.0, -1.0)])
def test_a_sample_whose_value_guard_fails_reads_no_pixel(place: tuple[float, float], pixel: float) -> None:
    image = np.full((1, 8, 3, 3), pixel, np.float32)
    offset = np.zeros((1, 2, 3, 3), np.float32)
    rows, columns = np.mgrid[:3, :3]
    offset[0, 0], offset[0, 1] = place[0] - rows, place[1] - columns
    assert (offset_sample2d(image, offset, border="zeros", backend="cpu") == 0).all()
    weight, grad = np.ones((4, 8, 1, 1), np.float32), np.ones((1, 4, 3, 3), np.float32)
    assert (deform_conv2d(image, offset, weight, backend="cpu") == 0).all()
    got, want = (deform_conv2d_backward(grad, image, offset, weight, backend=each) for each in ("cpu", "reference"))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_an_axis_of_length_1_may_have_any_stride() -> None:
    rng = np.random.default_rng(0)
    plain = {
        "input": rng.standard_normal((1, 1, 5, 6)).astype(np.float32),
        "offset": rng.standard_normal((1, 18, 5, 6)).astype(np.float32),
        "weight": rng.standard_normal((1, 1, 3, 3)).astype(np.float32),
    }
    strange = {
        name: np.lib.stride_tricks.as_strided(array, strides=(1 << 50, *array.strides[1:]))
        for name, array in plain.items()
    }
    np.testing.assert_array_equal(deform_conv2d(**strange, padding=1), deform_conv2d(**plain, padding=1))
    rois = np.array([[0, 0, 0, 4, 4]], np.float32)
    grad = np.ones((1, 1, 2, 2), np.float32)
    odd = np.lib.stride_tricks.as_strided(grad, strides=(1 << 50, 1 << 50, 8, 4))
    for each in (grad, odd):
        got = roi_align_backward(each, plain["input"], rois, 2)["input"]
        np.testing.assert_allclose(got.sum(), 4, rtol=1e-5)
