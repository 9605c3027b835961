"""Lines of 2^24 pixels and more, of whose positions float32 cannot tell all apart; strange values and strides."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dcn_kernels import (
    OPS,
    deform_conv2d,
    deform_conv2d_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
    offset_sample2d,
    offset_sample2d_backward,
    roi_align,
    roi_align_backward,
)
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op

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


def strange(array: np.ndarray, stride: int) -> np.ndarray:
    """The same elements, every axis of length 1 with this stride."""
    strides = [stride if length == 1 else step for length, step in zip(array.shape, array.strides, strict=True)]
    return np.lib.stride_tricks.as_strided(array, strides=strides)


# Axes of length 1 wherever a row lets them be: all that kernels walk or prefetch by is a stride of one of them.
OF_LENGTH_1 = {
    "deform_conv2d": [
        {"N": 1, "C": 1, "H": 3, "W": 3, "O": 1, "KH": 3, "KW": 3},
        {"N": 1, "C": 1, "H": 9, "W": 1, "O": 1, "KH": 1, "KW": 1},
        {"N": 1, "C": 1, "H": 1, "W": 9, "O": 1, "KH": 1, "KW": 1},
        {"N": 1, "C": 32, "H": 9, "W": 8, "O": 1, "KH": 1, "KW": 1},
    ],
    "offset_sample2d": [{"N": 1, "C": 1, "H": 9, "W": 1}, {"N": 1, "C": 1, "H": 1, "W": 9}],
    "roi": [{"N": 1, "C": 1, "H": 1, "W": 9, "R": 5}, {"N": 1, "C": 16, "H": 9, "W": 1, "R": 5}],
}


def drawn(op: Op, sizes: dict[str, int]) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Every array of a call, grad_output too, and its parameters; one bin."""
    rng = np.random.default_rng(0)
    params = dict(op.samples(0)[0].params)
    small = {"output_size": 1, "group_size": 1, "part_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    params |= {name: value for name, value in small.items() if name in params}
    sizes = {**sizes, "OG": 1, "G": 1, "PH": 1, "PW": 1, "classes": 1}
    kernel = sizes.get("KH", 1), sizes.get("KW", 1)
    sizes |= {"OH": sizes["H"] - kernel[0] + 1, "OW": sizes["W"] - kernel[1] + 1, "K": kernel[0] * kernel[1]}
    sizes["2K"] = 2 * sizes["K"]
    shapes = {
        "input": ("N", "C", "H", "W"),
        "weight": ("O", "C", "KH", "KW"),
        "bias": ("O",),
        "rois": ("R", 5),
        "trans": ("R", 2, 1, 1),
        "grad_output": ("R", "C", 1, 1) if "rois" in op.arrays else ("N", "O", "OH", "OW"),
    }
    shapes["offset"] = ("R", 2, 1, 1) if "rois" in op.arrays else ("N", "2K", "OH", "OW")
    shapes["mask"] = ("R", 1, 1) if "rois" in op.arrays else ("N", "K", "OH", "OW")
    sizes.setdefault("O", sizes["C"])
    arrays = {}
    for name in ("grad_output", *op.arrays):
        shape = [sizes.get(each, each) for each in shapes[name]]
        arrays[name] = rng.standard_normal(shape).astype(np.float32)
        if name == "rois":
            arrays[name][:] = [0, 0, 0, sizes["W"] - 1, sizes["H"] - 1]
    return arrays, params


@pytest.mark.parametrize("stride", [1 << 50, -(1 << 50), 4])
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        pytest.param(op, sizes, id=f"{op.name}-{number}")
        for op in OPS.values()
        for number, sizes in enumerate(OF_LENGTH_1["roi" if "rois" in op.arrays else op.name])
    ],
)
def test_an_axis_of_length_1_may_have_any_stride(op: Op, sizes: dict[str, int], stride: int) -> None:
    plain, params = drawn(op, sizes)
    odd = {name: strange(array, stride) for name, array in plain.items()}
    results = []
    for arrays in (plain, odd):
        start = time.process_time()
        results.append(call(op, "backward", arrays, params, backend="cpu"))
        results[-1]["output"] = call(op, "forward", {name: arrays[name] for name in op.arrays}, params, backend="cpu")
        seconds = time.process_time() - start
    assert seconds < 5  # a walk of 2^50 bytes, in steps of 64, would take hours
    for name in results[0]:
        np.testing.assert_array_equal(results[1][name], results[0][name], err_msg=name)
