"""deform_roi_pool and deform_ps_roi_pool: cases by hand, identities, kinks, and offsets that are no numbers.

Other libraries' cases and strange RoIs are in test_roi_pool.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Backend

from dcn_kernels.dispatch.row import Op
from dcn_kernels.ops.deform_roi_pool import DEFORM_PS_ROI_POOL, DEFORM_ROI_POOL
from dcn_kernels.ops.roi_pool import PS_ROI_ALIGN, ROI_ALIGN, ROI_POOL

CONVENTIONS = ("paper", "rfcn", "mmcv")
IMAGE = np.arange(1.0, 17.0).reshape(1, 1, 4, 4)  # 1 2 3 4 / 5 6 7 8 / 9 10 11 12 / 13 14 15 16


def rois(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array([(0, *row) for row in rows], float)


def moved(x: float, y: float) -> np.ndarray:
    return np.array([x, y], float).reshape(1, 2, 1, 1)


def pooled(backend: Backend, arrays: dict[str, np.ndarray], **params: Any) -> np.ndarray:
    return backend.forward(DEFORM_ROI_POOL, arrays, params)


def gradients(backend: Backend, arrays: dict[str, np.ndarray], **params: Any) -> dict[str, np.ndarray]:
    shape = pooled(backend, arrays, **params).shape
    return backend.backward(DEFORM_ROI_POOL, {"grad_output": np.ones(shape), **arrays}, params)


# ---------------------------------------------------------------- by hand


def test_equation_6_by_hand(backend: Backend) -> None:
    # Pixels 6 7 / 10 11 (w = h = 2), moved by gamma * offset * 2 = half a pixel right, one down: 10.5 11.5 / 14.5 15.5
    arrays = {"input": IMAGE, "rois": rois((1, 1, 2, 2)), "offset": moved(2.5, 5)}
    assert pooled(backend, arrays, output_size=1).item() == 13
    # Two pixels right: columns 3 and 4; pixels outside the map count as 0: (8 + 0 + 12 + 0) / 4
    arrays["offset"] = moved(10, 0)
    assert pooled(backend, arrays, output_size=1).item() == 5
    # and the mask multiplies
    arrays["mask"] = np.full((1, 1, 1), 0.5)
    assert pooled(backend, arrays, output_size=1).item() == 2.5


def test_rfcn_by_hand(backend: Backend) -> None:
    # From 1 - 0.5 to (2 + 1) - 0.5: size 2; two samples a side from the corner on, one pixel apart: 0.5 and 1.5;
    # moved 0.1 * 5 * 2 = one pixel right: x 1.5, 2.5, y 0.5, 1.5: the mean is that at (1, 2): 7
    arrays = {"input": IMAGE, "rois": rois((1, 1, 2, 2)), "offset": moved(5, 0)}
    assert np.isclose(pooled(backend, arrays, output_size=1, sampling_ratio=2, convention="rfcn").item(), 7)
    # Two pixels more: x = 3.5 is on the rim and clamped to 3, x = 4.5 is not counted: (0.5, 3), (1.5, 3)
    arrays["offset"] = moved(15, 0)
    assert np.isclose(pooled(backend, arrays, output_size=1, sampling_ratio=2, convention="rfcn").item(), 8)


def test_mmcv_by_hand(backend: Backend) -> None:
    # [0.5, 2.5] squared, one sample in the middle (1.5, 1.5), moved one pixel down: (2.5, 1.5)
    arrays = {"input": IMAGE, "rois": rois((1, 1, 3, 3)), "offset": moved(0, 5)}
    got = pooled(backend, arrays, output_size=1, sampling_ratio=1, convention="mmcv")
    assert np.isclose(got.item(), 12.5)
    # as many points as pixels, 2 x 2, of which (3, .) stay and (4, .) is one outside: still counted, clamped
    arrays["offset"] = moved(0, 10)
    got = pooled(backend, arrays, output_size=1, convention="mmcv")
    assert np.isclose(got.item(), 14.5)


def test_classes_and_parts_by_hand(backend: Backend) -> None:
    # 2 output channels of 2 classes, 2x2 bins, one part: class 0 stays, class 1 moves one pixel right (4 * 0.25).
    image = np.repeat(IMAGE, 2, axis=1)
    trans = np.array([0, 0, 1, 0], float).reshape(1, 4, 1, 1)
    params = {"output_size": 2, "group_size": 1, "part_size": 1, "sample_per_part": 1, "trans_std": 0.25}
    arrays = {"input": image, "rois": rois((0.0, 0.0, 3.0, 3.0)), "trans": trans}
    got = backend.forward(DEFORM_PS_ROI_POOL, arrays, params)[0]
    # samples at -0.5 and 1.5 (no half-sample centring), clamped to 0 and 1.5; class 1 at 0.5 and 2.5
    assert np.allclose(got[0], [[1, 2.5], [7, 8.5]])
    assert np.allclose(got[1], [[1.5, 3.5], [7.5, 9.5]])
    grad = backend.backward(DEFORM_PS_ROI_POOL, {"grad_output": np.ones((1, 2, 2, 2)), **arrays}, params)["trans"]
    # class 0: x moves only in the second column of bins, y only in the second row, 0.25 * 4 pixels a unit;
    # class 1: x moves in all four
    assert np.allclose(grad.ravel(), [2 * 1, 2 * 4, 4 * 1, 2 * 4])


# ---------------------------------------------------------------- coordinates


@pytest.mark.parametrize("op", [ROI_ALIGN, PS_ROI_ALIGN, DEFORM_ROI_POOL, DEFORM_PS_ROI_POOL], ids=lambda op: op.name)
def test_float32_coordinates_are_those_of_the_reference_to_the_bit(backend: Backend, op: Op) -> None:
    # A map of one row, four points a bin, more than two pixels apart: each pixel's gradient is a quarter of one
    # point's weight, so one bit of a coordinate shows. A fused multiply-add changes a fifth of them.
    R, W, P = 100, 300, 6
    rng = np.random.default_rng(0)
    left, width = rng.uniform(20, 40, R), rng.uniform(9 * P, 180, R)
    boxes = np.stack([np.arange(R), 16 * left, 0 * left, 16 * (left + width), 0 * left], axis=1).astype(np.float32)
    offset = rng.uniform(-1, 1, (R, 2, P)).astype(np.float32)
    several: list[dict[str, Any]] = {
        "roi_align": [{"aligned": False, "sampling_ratio": 4}, {"aligned": True, "sampling_ratio": 4}],
        "ps_roi_align": [{"sampling_ratio": 4}],
        "deform_roi_pool": [{"convention": each, "sampling_ratio": 4} for each in ("rfcn", "mmcv")],
        "deform_ps_roi_pool": [{"group_size": 1, "part_size": 1, "sample_per_part": 4}],
    }[op.name]
    channels = P if op.name == "ps_roi_align" else 1
    arrays = {"input": np.zeros((R, channels, 1, W), np.float32), "rois": boxes}
    if op.name == "deform_ps_roi_pool":
        arrays["trans"] = offset[:, :, None, :1]
    if op.name == "deform_roi_pool":  # all of a RoI move alike, and stay apart
        arrays["offset"] = np.repeat(offset[:, :, None, :1], P, axis=3)
    arrays["grad_output"] = np.ones((R, 1, 1, P), np.float32)
    for params in several:
        common = {"output_size": (1, P), "spatial_scale": 0.058, **params, "wrt": "input"}
        got, want = (each.backward(op, arrays, common)["input"] for each in (backend, Backend("reference")))
        assert np.count_nonzero(want) > 20 * R
        np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("channels", [3, 20])
def test_zero_offset_is_the_plain_pooling_of_the_same_convention(backend: Backend, channels: int) -> None:
    rng = np.random.default_rng(0)
    boxes = rois((0.4, 1.2, 6.1, 5.9), (-2, 3, 5, 9), (2, 2, 2, 2), (5, 5, 3, 4), *[(1, 0, 7, 6)] * 8)
    arrays = {"input": rng.standard_normal((1, channels, 7, 8)), "rois": boxes}
    zero = {**arrays, "offset": np.zeros((len(boxes), 2, 3, 2))}
    shape = {"output_size": (3, 2)}
    plain = {
        "paper": backend.forward(ROI_POOL, arrays, {**shape, "mode": "avg"}),
        "mmcv": backend.forward(ROI_ALIGN, arrays, {**shape, "aligned": True}),
        "rfcn": backend.forward(DEFORM_PS_ROI_POOL, arrays, {**shape, "group_size": 1}),
    }
    for convention in CONVENTIONS:
        for given in (arrays, zero):
            got = pooled(backend, given, **shape, convention=convention)
            assert np.allclose(got, plain[convention], atol=1e-12), convention


def test_whole_pixel_shift_is_a_shifted_roi(backend: Backend) -> None:
    image = np.random.default_rng(1).standard_normal((1, 2, 12, 12))
    offset = np.broadcast_to(np.array([5.0, 2.5])[:, None, None], (1, 2, 2, 2)).copy()  # 0.1 * 4 pixels a unit: 2, 1
    shifted = {"input": image, "rois": rois((4, 4, 7, 7)), "offset": offset}
    plain = {"input": image, "rois": rois((6, 5, 9, 8))}
    assert np.allclose(pooled(backend, shifted, output_size=2), pooled(backend, plain, output_size=2), atol=1e-12)
    there = backend.forward(DEFORM_PS_ROI_POOL, plain, {"output_size": 2, "group_size": 1})
    assert np.allclose(pooled(backend, shifted, output_size=2, convention="rfcn"), there, atol=1e-12)


@pytest.mark.parametrize("channels", [3, 20])
def test_one_group_of_score_maps_is_the_plain_rfcn_convention(backend: Backend, channels: int) -> None:
    rng = np.random.default_rng(4)
    boxes = rois((0.4, 1.2, 6.1, 5.9), (-2, 3, 5, 9), (2, 2, 2, 2))
    arrays, shift = {"input": rng.standard_normal((1, channels, 7, 8)), "rois": boxes}, rng.uniform(-1, 1, (3, 2, 2, 2))
    grad, common = rng.standard_normal((3, channels, 2, 2)), {"output_size": 2}
    plain, grouped = {**arrays, "offset": shift}, {**arrays, "trans": shift}
    rfcn, one = {**common, "convention": "rfcn"}, {**common, "group_size": 1}
    out = pooled(backend, plain, **rfcn)
    assert np.allclose(backend.forward(DEFORM_PS_ROI_POOL, grouped, one), out, atol=1e-12)
    got = backend.backward(DEFORM_PS_ROI_POOL, {"grad_output": grad, **grouped}, one)
    want = backend.backward(DEFORM_ROI_POOL, {"grad_output": grad, **plain}, rfcn)
    assert np.allclose(got["input"], want["input"], atol=1e-12)
    assert np.allclose(got["trans"], want["offset"], atol=1e-12)


# ---------------------------------------------------------------- kinks


def test_slope_of_equation_6_on_pixel_lines_is_the_right_hand_one(backend: Backend) -> None:
    # One pixel RoI at (1, 1): the slopes to its right and below are 1 and 4, gamma = 0.1 pixels a unit.
    arrays = {"input": IMAGE, "rois": rois((1, 1, 1, 1)), "offset": moved(0, 0)}
    assert np.allclose(gradients(backend, arrays, output_size=1)["offset"].ravel(), [0.1, 0.4])
    # at the last pixel (3, 3) it falls to 0 outside
    arrays["rois"] = rois((3, 3, 3, 3))
    assert np.allclose(gradients(backend, arrays, output_size=1)["offset"].ravel(), [-1.6, -1.6])


def test_slope_is_zero_where_clamped_and_rfcn_also_at_whole_pixels(backend: Backend) -> None:
    def slope(convention: str, box: tuple[float, ...], offset: np.ndarray) -> list[float]:
        arrays = {"input": IMAGE, "rois": rois(box), "offset": offset}
        grads = gradients(backend, arrays, output_size=1, sampling_ratio=1, convention=convention)
        return np.round(grads["offset"].ravel(), 12).tolist()

    # mmcv, size 1: the sample is at x1, and moves 0.1 pixels a unit.
    assert slope("mmcv", (1, 1, 2, 2), moved(0, 0)) == [0.1, 0.4]  # on a line: right-hand
    assert slope("mmcv", (3, 1.5, 4, 2.5), moved(0, 0)) == [0, 0.4]  # x = W - 1: clamped from here on
    assert slope("mmcv", (-0.5, 1.5, 0.5, 2.5), moved(0, 0)) == [0, 0.4]  # x = -0.5: clamped to 0
    # rfcn, size 1: the sample is at round(x1) - 0.5, moved by half a pixel (5 units) onto a line
    assert slope("rfcn", (1, 1, 1, 1), moved(0, 0)) == [0.1, 0.4]
    assert slope("rfcn", (1, 1, 1, 1), moved(5, 0)) == [0, 0.4]
    assert slope("rfcn", (0, 1, 0, 1), moved(0, 0)) == [0, 0.4]  # x = -0.5: counted, clamped


# ---------------------------------------------------------------- offsets that are no numbers


@pytest.mark.parametrize("channels", [2, 20])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_nan_offset_makes_its_bin_nan_alone(backend: Backend, convention: str, channels: int) -> None:
    rng = np.random.default_rng(2)
    boxes = rois((1, 1, 5, 4), (90, 90, 95, 95), (5, 4, 1, 1), *[(0, 0, 5, 5)] * 9)
    arrays = {
        "input": rng.standard_normal((1, channels, 6, 7)),
        "rois": boxes,
        "offset": rng.standard_normal((len(boxes), 2, 2, 2)),
        "mask": rng.uniform(0.5, 1, (len(boxes), 2, 2)),
    }
    params = {"output_size": 2, "convention": convention}
    clean = pooled(backend, arrays, **params)
    clean_grads = gradients(backend, {**arrays, "mask": arrays["mask"] * _without_bins(len(boxes))}, **params)
    arrays["offset"][0, 0, 0, 1] = arrays["offset"][1, 1, 1, 0] = arrays["offset"][2, 0, 1, 1] = np.nan
    arrays["mask"][0, 0, 1] = 0
    hit = np.zeros((len(boxes), 1, 2, 2), bool)
    hit[0, 0, 0, 1] = hit[1, 0, 1, 0] = hit[2, 0, 1, 1] = True
    out = pooled(backend, arrays, **params)
    assert np.isnan(out[np.broadcast_to(hit, out.shape)]).all()
    assert np.array_equal(out[~np.broadcast_to(hit, out.shape)], clean[~np.broadcast_to(hit, out.shape)])
    grads = gradients(backend, arrays, **params)
    assert np.array_equal(np.isnan(grads["offset"]), np.broadcast_to(hit, grads["offset"].shape))
    assert np.array_equal(np.isnan(grads["mask"]), hit[:, 0])
    assert np.allclose(grads["input"], clean_grads["input"], atol=1e-12)  # nothing of the three bins


def _without_bins(count: int) -> np.ndarray:
    keep = np.ones((count, 2, 2))
    keep[0, 0, 1] = keep[1, 1, 0] = keep[2, 1, 1] = 0
    return keep


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, -1e30])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_infinite_or_huge_offset_is_outside(backend: Backend, convention: str, value: float) -> None:
    arrays = {"input": IMAGE, "rois": rois((0, 0, 3, 3)), "offset": moved(value, 0)}
    assert pooled(backend, arrays, output_size=1, convention=convention).item() == 0
    grads = gradients(backend, arrays, output_size=1, convention=convention)
    assert not grads["input"].any() and not grads["offset"].any()


def test_nan_translation_concerns_its_class_and_part_alone(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    arrays = {
        "input": rng.standard_normal((1, 4 * 4, 6, 7)),
        "rois": rois((0, 0, 6, 5)),
        "trans": rng.standard_normal((1, 4, 2, 2)) / 4,
    }
    arrays["trans"][0, 2, 1, 0] = np.nan  # class 1, x, part (1, 0)
    params = {"output_size": 4, "group_size": 2, "part_size": 2}
    out = backend.forward(DEFORM_PS_ROI_POOL, arrays, params)
    hit = np.zeros((1, 4, 4, 4), bool)
    hit[0, 2:, 2:, :2] = True
    assert np.array_equal(np.isnan(out), hit)
    grads = backend.backward(DEFORM_PS_ROI_POOL, {"grad_output": np.ones_like(out), **arrays}, params)
    where = np.zeros((1, 4, 2, 2), bool)
    where[0, 2:, 1, 0] = True
    assert np.array_equal(np.isnan(grads["trans"]), where)
    assert np.isfinite(grads["input"]).all()
