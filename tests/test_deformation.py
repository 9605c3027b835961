"""Sampling points, effective dilation, offset statistics and RoI bins: by hand, and against what the operators read."""

from __future__ import annotations

from importlib.util import find_spec
from math import inf, nan, sqrt

import ml_dtypes
import numpy as np
import pytest

import dcn_kernels
from dcn_kernels import (
    deform_conv2d,
    deform_ps_roi_bins,
    deform_ps_roi_pool,
    deform_roi_bins,
    deform_roi_pool,
    effective_dilation,
    effective_dilation_by_class,
    offset_statistics,
    sampling_points,
    stacked_sampling_points,
)
from dcn_kernels.check.calls import to_backend, to_numpy
from dcn_kernels.environment import why_not

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

# ---------------------------------------------------------------- sampling points


def test_points_of_a_2x2_filter_by_hand() -> None:
    offset = np.zeros((1, 8, 1, 2))
    offset[0, :, 0, 1] = 0.5, 0, 0, -1, 2, 2, 0, 0.25  # dy, dx of taps (0,0), (0,1), (1,0), (1,1)
    points = sampling_points(offset, 2, stride=(1, 3), padding=(0, 1), dilation=(2, 1))
    assert points.shape == (1, 1, 4, 2, 1, 2)
    assert points[0, 0, :, :, 0, 0].tolist() == [[0, -1], [0, 0], [2, -1], [2, 0]]
    assert points[0, 0, :, :, 0, 1].tolist() == [[0.5, 2], [0, 2], [4, 4], [2, 3.25]]
    assert sampling_points(offset, 2, (1, 3), (0, 1), (2, 1), at=(0, 1)).tolist() == points[..., 0, 1].tolist()


@pytest.mark.parametrize("groups", [1, 2])
def test_points_are_those_that_deform_conv2d_reads(groups: int) -> None:
    """Images whose value is the row (or the column) number, read by one tap at a time, tell where it was read."""
    rng = np.random.default_rng(0)
    size, kernel, stride, padding, dilation = (30, 40), (3, 2), (2, 1), (1, 2), (1, 3)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(float)
    output = (15, 41)
    offset = rng.uniform(-3, 3, (2, 12 * groups, *output))
    points = sampling_points(offset, kernel, stride, padding, dilation)
    for axis, values in enumerate((rows, columns)):
        image = np.broadcast_to(values, (2, groups, *size))
        for tap in range(6):
            weight = np.zeros((groups, 1, *kernel))
            weight.reshape(groups, 6)[:, tap] = 1
            read = deform_conv2d(image, offset, weight, None, stride, padding, dilation, backend="reference")
            y, x = points[:, :, tap, 0], points[:, :, tap, 1]
            whole = (y >= 0) & (y <= size[0] - 1) & (x >= 0) & (x <= size[1] - 1)
            assert whole.mean() > 0.7
            np.testing.assert_allclose(read[whole], points[:, :, tap, axis][whole], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_points_have_the_type_of_coordinates(dtype: type) -> None:
    offset = np.full((1, 2, 1, 500), 0.0625).astype(dtype)
    points = sampling_points(offset, 1)
    assert points.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert points[0, 0, 0, 1, 0, 499] == 499.0625  # in half precision it would be 499
    assert effective_dilation(np.zeros((1, 18, 2, 2), dtype), 3).dtype == points.dtype


def test_two_layers_of_two_taps_by_hand() -> None:
    lower, upper = np.zeros((1, 4, 1, 9)), np.zeros((1, 4, 1, 9))
    upper[0, :, 0, 2] = 0, 0.75, 0, -4  # (0, 2.75) and (0, -1): the second is beside the map
    lower[0, :, 0, 3] = 1, 0, 0, 0.5  # of the unit nearest to 2.75
    layers = [{"offset": lower, "kernel_size": (1, 2), "dilation": 3}, {"offset": upper, "kernel_size": (1, 2)}]
    points = stacked_sampling_points(layers, at=(0, 2))
    assert points[1].tolist() == [[0, 2.75], [0, -1]]
    assert points[0][:2].tolist() == [[1, 3], [0, 6.5]]
    assert np.isnan(points[0][2:]).all()


def test_a_stride_takes_points_to_the_map_beneath() -> None:
    layers = [{"offset": np.zeros((1, 2, size, size)), "kernel_size": 1, "stride": 2} for size in (8, 4)]
    points = stacked_sampling_points(layers, at=(1, 3))
    assert points[1].tolist() == [[2, 6]]
    assert points[0].tolist() == [[4, 12]]


def test_three_3x3_layers_sample_729_points_and_those_of_the_group_and_image_asked_for() -> None:
    rng = np.random.default_rng(1)
    offset = rng.standard_normal((2, 36, 30, 30))
    layer = {"offset": offset, "kernel_size": 3, "padding": 2, "dilation": 2}
    points = stacked_sampling_points([layer] * 3, at=(15, 15), image=1, group=1)
    assert [p.shape for p in points] == [(729, 2), (81, 2), (9, 2)]
    each = sampling_points(offset, 3, padding=2, dilation=2)[1, 1]
    assert np.array_equal(points[2], each[:, :, 15, 15])
    followed = [each[:, :, y, x] for y, x in np.round(points[2]).astype(int)]
    assert np.array_equal(points[1], np.concatenate(followed))
    followed = [each[:, :, y, x] for y, x in np.round(points[1]).astype(int)]
    assert np.array_equal(points[0], np.concatenate(followed))


def test_a_nan_offset_ends_its_branch_alone() -> None:
    offset = np.zeros((1, 18, 9, 9))
    offset[0, 0, 4, 4] = nan
    layer = {"offset": offset, "kernel_size": 3, "padding": 1}
    points = stacked_sampling_points([{**layer, "offset": np.zeros_like(offset)}, layer], at=(4, 4))
    assert np.isnan(points[0]).any(axis=1).tolist() == [True] * 9 + [False] * 72


def test_no_images_have_no_points_and_no_dilations() -> None:
    assert sampling_points(np.zeros((0, 36, 4, 5)), 3).shape == (0, 2, 9, 2, 4, 5)
    assert sampling_points(np.zeros((0, 36, 4, 5)), 3, at=(3, 4)).shape == (0, 2, 9, 2)
    assert effective_dilation(np.zeros((0, 36, 4, 5)), 3).shape == (0, 2, 4, 5)


# ---------------------------------------------------------------- effective dilation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dilation", [1, 2, 3, 7])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (5, 1), (7, 7)])
def test_zero_offsets_give_exactly_the_dilation(dtype: type, dilation: int, kernel: tuple[int, int]) -> None:
    offset = np.zeros((2, 2 * 2 * kernel[0] * kernel[1], 3, 4), dtype)
    assert (effective_dilation(offset, kernel, 2, 1, dilation) == np.full((2, 2, 3, 4), dilation)).all()


def test_pairs_of_a_2x2_filter_by_hand() -> None:
    offset = np.zeros((1, 8, 1, 1))
    offset[0, :, 0, 0] = 0, 0, 3, 3, 0, 0, 0, 0  # tap (0, 1) from (0, 1) to (3, 4), past (1, 1)
    # (0,0)-(3,4): 5; (1,0)-(1,1): 1; (0,0)-(1,0): 1; (3,4)-(1,1): sqrt(4 + 9)
    assert effective_dilation(offset, 2).item() == pytest.approx((5 + 1 + 1 + sqrt(13)) / 4, abs=1e-15)


def test_unequal_dilations_are_averaged_over_the_pairs() -> None:
    assert effective_dilation(np.zeros((1, 12, 1, 1)), (2, 3), dilation=(5, 1)).item() == (3 * 5 + 4 * 1) / 7


def test_scaling_and_turning_a_filter_scales_its_dilation() -> None:
    """Offsets that turn the 3x3 grid by 30 degrees and stretch it 2.5 times."""
    taps = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), axis=-1).reshape(9, 2)
    turn = 2.5 * np.array([[sqrt(3) / 2, 0.5], [-0.5, sqrt(3) / 2]])
    offset = (taps @ turn - taps).reshape(1, 18, 1, 1)
    assert effective_dilation(offset, 3).item() == pytest.approx(2.5, abs=1e-14)


def test_is_the_mean_distance_of_adjacent_sampling_points() -> None:
    rng = np.random.default_rng(2)
    offset = rng.standard_normal((2, 36, 4, 5)) * 4
    points = sampling_points(offset, 3, 2, 1, (2, 3)).reshape(2, 2, 3, 3, 2, 4, 5)
    pairs = [
        np.linalg.norm(points[:, :, i, j] - points[:, :, k, m], axis=2)
        for i in range(3)
        for j in range(3)
        for k, m in ((i + 1, j), (i, j + 1))
        if k < 3 and m < 3
    ]
    assert len(pairs) == 12
    np.testing.assert_allclose(effective_dilation(offset, 3, 2, 1, (2, 3)), np.mean(pairs, axis=0), rtol=1e-13)


def _stretched(shape: tuple[int, int, int], stretch: np.ndarray) -> np.ndarray:
    """Offsets of 1x2 filters whose two taps lie `stretch` apart."""
    offset = np.zeros((shape[0], 4, *shape[1:]))
    offset[:, 3] = stretch - 1
    return offset


def test_classes_by_hand() -> None:
    """A map of 4x8 units of stride 10: a small box in a large one, a medium one in the second image.

    A 1x2 filter of output column x is centred on x + 0.5 of the map, which is (x + 0.5 + 0.5) * 10 in the image, and
    its row y on (y + 0.5) * 10: columns at 10 ... 80, rows at 5 ... 35.
    """
    stretch = np.arange(64.0).reshape(2, 4, 8)
    offset = _stretched((2, 4, 8), stretch)
    boxes = np.array(
        [
            [0, 10, 0, 49, 35],  # columns at 10, 20, 30, 40, all rows, the edges too: 39 * 35 = 1365, large
            [0, 5, 14, 25, 16],  # columns at 10 and 20, the row at 15: area 40, small, within the large one
            [1, 75, 20, 95, 35],  # the last column, rows at 25 and 35: area 300, medium
        ],
        float,
    )
    found = effective_dilation_by_class(offset, boxes, (1, 2), spatial_scale=0.1, areas=(100, 1000))
    small = [8, 9]
    large = [k for k in (y * 8 + x for y in range(4) for x in range(4)) if k not in small]
    medium = [32 + 2 * 8 + 7, 32 + 3 * 8 + 7]
    background = [k for k in range(64) if k not in small + large + medium]
    for name, of_class in {"small": small, "medium": medium, "large": large, "background": background}.items():
        expected = {"mean": np.mean(of_class), "std": np.std(of_class), "filters": len(of_class), "not_finite": 0}
        assert found[name] == pytest.approx(expected), name


@pytest.mark.parametrize(("x2", "y2", "filters"), [(8, 24, 2), (8, 23.9, 1), (7.9, 24, 0), (23.9, 8, 1), (24, 24, 4)])
def test_a_unit_is_at_the_middle_of_its_cell(x2: float, y2: float, filters: int) -> None:
    """A 3x3 filter with padding 1 and stride 16 between image and map: units at 8 and 24, not at 0 and 16."""
    box = np.array([[0, 0, 0, x2, y2]], np.float64)
    found = effective_dilation_by_class(np.zeros((1, 18, 2, 2)), box, 3, padding=1, spatial_scale=1 / 16)
    assert found["small"]["filters"] == filters and found["background"]["filters"] == 4 - filters


def test_filters_with_a_nan_or_infinite_offset_are_left_out_and_counted() -> None:
    """1x2 filters of dilations 1 ... 6: those of 2 and 5 are lost, and (1 + 3 + 4 + 6) / 4 = 3.5."""
    offset = _stretched((1, 1, 6), np.arange(1.0, 7).reshape(1, 1, 6))
    offset[0, 0, 0, 1], offset[0, :, 0, 4] = nan, inf
    found = effective_dilation_by_class(offset, np.zeros((0, 5)), (1, 2))
    # the squares of -2.5, -0.5, 0.5, 2.5 are 13 together
    assert found["background"] == {"mean": 3.5, "std": pytest.approx(sqrt(13 / 4)), "filters": 4, "not_finite": 2}
    assert np.isnan(effective_dilation(offset, (1, 2))[0, 0, 0]).tolist() == [False, True, False, False, True, False]


def test_a_class_without_filters_is_nan() -> None:
    found = effective_dilation_by_class(np.zeros((1, 18, 2, 2)), np.zeros((0, 5)), 3, padding=1)
    assert found["background"] == {"mean": 1.0, "std": 0.0, "filters": 4, "not_finite": 0}
    assert np.isnan(found["large"]["mean"]) and found["large"]["filters"] == 0


def test_the_sizes_of_objects_are_those_of_table_2() -> None:
    side = {"small": 95.9, "medium": 96.0, "large": 224.0}
    for name, length in side.items():
        box = np.array([[0, 0, 0, length, length]])
        found = effective_dilation_by_class(np.zeros((1, 18, 1, 1)), box, 3, padding=1)
        assert found[name]["filters"] == 1


def test_spread_of_layers_gives_the_paper_s_effective_dilation() -> None:
    """The benchmark's offsets are normal with a spread computed from Table 2; measured by the definition."""
    from dcn_kernels.bench.layers import TABLE_2, spread

    rng = np.random.default_rng(3)
    for mean in TABLE_2.values():
        offset = rng.standard_normal((1, 18, 60, 60)) * spread(mean)
        assert effective_dilation(offset, 3, padding=2, dilation=2).mean() == pytest.approx(mean, rel=0.02)


# ---------------------------------------------------------------- statistics


def test_statistics_by_hand() -> None:
    """1x1 filters of a 2x3 image: one leaves, one stays half outside, one is NaN, one infinite."""
    offset = np.zeros((1, 2, 2, 3))
    offset[0, :, 0, 0] = -1, 0  # y = -1: touches nothing
    offset[0, :, 0, 1] = -0.5, 0  # half outside
    offset[0, :, 0, 2] = 3, nan  # y = 3 is outside, but the point is no point
    offset[0, :, 1, 0] = inf, 0
    offset[0, :, 1, 1] = 0.6, 0.8
    found = offset_statistics(offset, (2, 3), 1, quantiles=[0, 0.5, 1])
    # finite lengths: 1, 0.5, 1, 0
    assert found.pop("length") == pytest.approx({0.0: 0.0, 0.5: 0.75, 1.0: 1.0})
    assert found == {
        "points": 6,
        "outside": pytest.approx(2 / 6),
        "outside_without_offsets": 0.0,
        "nan": 1,
        "infinite": 1,
        "mean_length": pytest.approx(2.5 / 4),
    }


def test_padding_alone_has_points_outside() -> None:
    """A 3x3 filter with padding 1 on 4x4 pixels."""
    found = offset_statistics(np.zeros((2, 36, 4, 4), np.float32), 4, 3, padding=1)
    # along one axis 2 of 12 (tap, position) pairs are outside, so 1 - (10/12)**2 of the points
    assert found["outside"] == found["outside_without_offsets"] == pytest.approx(1 - 100 / 144)
    assert found["points"] == 2 * 2 * 144 and found["mean_length"] == 0


def test_outside_is_where_deform_conv2d_reads_nothing() -> None:
    rng = np.random.default_rng(4)
    offset = rng.integers(-12, 12, (1, 2, 6, 7)) / 2
    read = deform_conv2d(np.ones((1, 1, 6, 7)), offset, np.ones((1, 1, 1, 1)), backend="reference")
    assert offset_statistics(offset, (6, 7), 1)["outside"] == np.mean(read == 0)


def test_exploding_offsets_have_a_length() -> None:
    """3e38 and 2e38 are float32 numbers, and their length, 3.6e38, is none."""
    offset = np.zeros((1, 2, 1, 2), np.float32)
    offset[0, :, 0, 0] = 3e38, 2e38
    found = offset_statistics(offset, (1, 2), 1, quantiles=[0.5, 1])
    assert found["length"] == pytest.approx({0.5: 13**0.5 * 0.5e38, 1.0: 13**0.5 * 1e38}, rel=1e-6)
    assert found["outside"] == 0.5 and found["infinite"] == 0


def test_statistics_of_no_images_are_nan_and_not_zero() -> None:
    found = offset_statistics(np.zeros((0, 18, 4, 4)), 4, 3, padding=1)
    assert found["points"] == 0 and np.isnan([found["outside"], found["mean_length"], *found["length"].values()]).all()


# ---------------------------------------------------------------- RoI bins


def test_bins_by_hand() -> None:
    """A RoI of 16x8 map pixels from (x, y) = (2, 1), two bins a side, the right ones moved."""
    rois = np.array([[0, 4, 2, 35, 17.0]])
    offset = np.zeros((1, 2, 2, 2))
    offset[0, :, 0, 1] = 1, -5  # 0.1 * 16 to the right, 0.1 * 8 * 5 up
    bins = deform_roi_bins(rois, offset, output_size=2, spatial_scale=0.5, convention="rfcn")
    assert bins[0, 0, 0].tolist() == pytest.approx([1.5, 0.5, 9.5, 4.5])
    assert bins[0, 0, 1].tolist() == pytest.approx([9.5 + 1.6, 0.5 - 4, 17.5 + 1.6, 4.5 - 4])
    assert bins[0, 1, 1].tolist() == pytest.approx([9.5, 4.5, 17.5, 8.5])
    # no rounding and no last pixel: 15.5 x 7.5 from (1.5, 0.5)
    aligned = deform_roi_bins(rois, offset, output_size=2, spatial_scale=0.5, convention="mmcv")
    assert aligned[0, 0, 1].tolist() == pytest.approx([9.25 + 1.55, 0.5 - 3.75, 17 + 1.55, 4.25 - 3.75])
    # rounded to pixels 2..18 and 1..9: 17 x 9, whose halves share a column and a row
    whole = deform_roi_bins(rois, output_size=2, spatial_scale=0.5)
    assert whole[0, 0, 0].tolist() == [1.5, 0.5, 10.5, 5.5]
    assert whole[0, 1, 1].tolist() == [9.5, 4.5, 18.5, 9.5]


def _ramps(size: int) -> np.ndarray:
    """(1, 2, H, W): the column number and the row number."""
    rows, columns = np.mgrid[:size, :size].astype(float)
    return np.stack([columns, rows])[None]


def _some_rois(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = rng.uniform(300, 500, (count, 2))
    return np.concatenate([np.zeros((count, 1)), corners, corners + rng.uniform(10, 150, (count, 2))], axis=1)


@pytest.mark.parametrize("convention", ["paper", "rfcn", "mmcv"])
@pytest.mark.parametrize("moved", [True, False])
def test_bins_are_those_that_deform_roi_pool_reads(convention: str, moved: bool) -> None:
    """The mean of a ramp over a bin is its centre, or for "rfcn", which samples from the corner, 3/8 of the way."""
    rng = np.random.default_rng(5)
    rois = _some_rois(rng, 20)
    offset = rng.uniform(-3, 3, (20, 2, 3, 4)) if moved else None
    params = {"output_size": (3, 4), "spatial_scale": 0.1, "gamma": 0.1, "convention": convention}
    bins = deform_roi_bins(rois, offset, **params)
    read = deform_roi_pool(_ramps(100), rois, offset, **params, sampling_ratio=4, backend="reference")
    way = 3 / 8 if convention == "rfcn" else 1 / 2
    centre = bins[..., :2] + way * (bins[..., 2:] - bins[..., :2])
    np.testing.assert_allclose(np.moveaxis(read, 1, -1), centre, rtol=0, atol=1e-10)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("part", [2, 5, 7])
def test_bins_are_those_that_deform_ps_roi_pool_reads(classes: int, part: int) -> None:
    rng = np.random.default_rng(6)
    rois = _some_rois(rng, 10)
    trans = rng.uniform(-2, 2, (10, 2 * classes, part, part))
    params = {"output_size": 5, "spatial_scale": 0.1, "part_size": part, "trans_std": 0.2}
    bins = deform_ps_roi_bins(rois, trans, **params)
    for axis in range(2):
        image = np.repeat(_ramps(100)[:, axis : axis + 1], classes, axis=1)
        read = deform_ps_roi_pool(image, rois, trans, **params, group_size=1, sample_per_part=4, backend="reference")
        expected = bins[..., axis] + 3 / 8 * (bins[..., axis + 2] - bins[..., axis])
        np.testing.assert_allclose(read, expected, rtol=0, atol=1e-10)


def test_bins_lie_in_the_image_where_their_roi_does() -> None:
    """Map position v is (v + 0.5) / scale in the image; pixels 32 to 95 and 16 to 47 are [32, 96] x [16, 48]."""
    rois, edges = np.array([[0, 32, 16, 95, 47.0]]), np.array([[0, 32, 16, 96, 48.0]])
    bins = deform_roi_bins(rois, output_size=2, spatial_scale=1 / 16, convention="rfcn")
    assert bins[0, 0, 0].tolist() == [1.5, 0.5, 3.5, 1.5]
    assert ((bins[0, 0, 0] + 0.5) * 16).tolist() == [32, 16, 64, 32]
    assert ((bins[0, 1, 1] + 0.5) * 16).tolist() == [64, 32, 96, 48]
    aligned = deform_roi_bins(edges, output_size=2, spatial_scale=1 / 16, convention="mmcv")
    assert aligned.tolist() == bins.tolist()  # that convention takes the edges themselves
    # a unit's centre is in the bin of its own cell: columns 2 to 5 and rows 1 and 2 of the map
    offset = np.zeros((1, 18, 4, 8))
    found = effective_dilation_by_class(offset, edges, 3, padding=1, spatial_scale=1 / 16)
    assert found["small"]["filters"] == 4 * 2


def test_negative_halves_are_rounded_away_from_zero() -> None:
    bins = deform_roi_bins(np.array([[0, -0.5, -1.5, 4, 4]]), output_size=1)
    assert bins[0, 0, 0].tolist() == [-1.5, -2.5, 4.5, 4.5]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("convention", ["paper", "rfcn", "mmcv"])
def test_only_the_bins_of_a_roi_that_is_not_finite_are_not(convention: str) -> None:
    rois = np.array([[0, nan, 0, 3, 3], [0, 0, 0, 3, 3], [0, -inf, 0, inf, 3]])
    bins = deform_roi_bins(rois, output_size=2, convention=convention)
    whole = np.isfinite(bins).all(axis=(1, 2))
    assert whole.tolist() == [[False, True, False, True], [True] * 4, [False, True, False, True]]  # y is finite in all


# ---------------------------------------------------------------- arrays and errors


def _calls() -> dict[str, tuple[np.ndarray, ...]]:
    offset, boxes = np.zeros((1, 18, 4, 4), np.float32), np.array([[0, 0, 0, 2, 2]], np.float32)
    return {
        "sampling_points": (offset, 3),
        "effective_dilation": (offset, 3),
        "effective_dilation_by_class": (offset, boxes, 3),
        "offset_statistics": (offset, 6, 3),
    }


@pytest.mark.parametrize("name", _calls())
def test_errors_name_function_argument_and_shape(name: str) -> None:
    function, (offset, *rest) = getattr(dcn_kernels, name), _calls()[name]
    with pytest.raises(ValueError, match=rf"{name}: offset: expected shape \(N, 2\*OG\*K, OH, OW\).*\(1, 17, 4, 4\)"):
        function(offset[:, 1:], *rest)
    with pytest.raises(TypeError, match=f"{name}: offset: .*DLPack, got list"):
        function([1, 2], *rest)
    with pytest.raises(TypeError, match=f"{name}: offset: expected dtype float16.*int64"):
        function(offset.astype(np.int64), *rest)
    with pytest.raises(ValueError, match=f"{name}: stride: expected an integer of at least 1, got 0"):
        function(*_calls()[name], 0)


def test_other_errors() -> None:
    offset = np.zeros((1, 18, 4, 4))
    layer = {"offset": offset, "kernel_size": 3}
    for function in (effective_dilation, lambda offset, k: effective_dilation_by_class(offset, np.zeros((0, 5)), k)):
        with pytest.raises(ValueError, match=r"kernel_size: expected a kernel with neighbouring taps, got \(1, 1\)"):
            function(offset, 1)
    with pytest.raises(ValueError, match=r"at: expected a position within \(OH, OW\) = \(4, 4\), got \(4, 0\)"):
        sampling_points(offset, 3, at=(4, 0))
    with pytest.raises(ValueError, match=r"offset: expected shape .*18\*OG, 5, 5"):
        offset_statistics(offset, 5, 3, padding=1)
    with pytest.raises(ValueError, match="quantiles"):
        offset_statistics(offset, 6, 3, quantiles=[2])
    with pytest.raises(ValueError, match=r"boxes: .*batch indices among 0..N-1, N = 1"):
        effective_dilation_by_class(offset, np.array([[1, 0, 0, 1, 1.0]]), 3)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        stacked_sampling_points([], at=(0, 0))
    with pytest.raises(ValueError, match=r"layers\[1\]: expected offset, kernel_size.*got offset"):
        stacked_sampling_points([layer, {"offset": offset}], at=(0, 0))
    with pytest.raises(TypeError, match=r"layers\[0\]: expected a mapping, got ndarray"):
        stacked_sampling_points([offset], at=(0, 0))
    with pytest.raises(TypeError, match=r"offset_statistics: quantiles: expected several numbers, got 0.5"):
        offset_statistics(offset, 6, 3, quantiles=0.5)
    with pytest.raises(TypeError, match=r"effective_dilation_by_class: areas: expected a pair of numbers .*'a'"):
        effective_dilation_by_class(offset, np.zeros((0, 5)), 3, areas=("a", 2))
    with pytest.raises(TypeError, match="effective_dilation_by_class: boxes: expected real numbers, got dtype complex"):
        effective_dilation_by_class(offset, np.zeros((1, 5), complex), 3)
    with pytest.raises(TypeError, match=r"deform_ps_roi_bins: trans: expected dtype .*got int64"):
        deform_ps_roi_bins(np.zeros((3, 5)), np.zeros((3, 2, 3, 3), np.int64), output_size=3)
    with pytest.raises(ValueError, match="deform_ps_roi_bins: trans_std: expected a finite number"):
        deform_ps_roi_bins(np.zeros((3, 5)), output_size=3, trans_std=inf)
    with pytest.raises(ValueError, match=r"group: expected one of the 1 of layers\[0\].offset, got 1"):
        stacked_sampling_points([layer], at=(0, 0), group=1)
    with pytest.raises(ValueError, match=r"offset: expected shape \(R, 2, PH, PW\)"):
        deform_roi_bins(np.zeros((3, 5)), np.zeros((3, 2, 2, 2)), output_size=3)
    with pytest.raises(ValueError, match="trans: expected shape"):
        deform_ps_roi_bins(np.zeros((3, 5)), np.zeros((3, 3, 3, 3)), output_size=3)


def test_results_are_contiguous_and_the_same_for_any_strides() -> None:
    rng = np.random.default_rng(8)
    offset, trans = rng.standard_normal((2, 18, 4, 5)), rng.standard_normal((2, 4, 3, 3))
    rois = np.array([[0, 0, 0, 9, 9], [0, 3, 1, 8, 20.0]])
    for function in (
        lambda turn: sampling_points(turn(offset), 3),
        lambda turn: sampling_points(turn(offset), 3, at=(1, 2)),
        lambda turn: effective_dilation(turn(offset), 3),
        lambda turn: deform_roi_bins(turn(rois), turn(trans[:, :2]), output_size=3),
        lambda turn: deform_ps_roi_bins(turn(rois), turn(trans), output_size=3),
    ):
        plain = function(lambda array: array)
        for turn in (np.asfortranarray, lambda array: array[..., ::-1].copy()[..., ::-1]):
            turned = function(turn)
            assert turned.flags.c_contiguous
            np.testing.assert_allclose(turned, plain, rtol=1e-14)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_torch_tensors_give_torch_tensors() -> None:
    import torch

    offset = torch.randn(1, 18, 6, 6, dtype=torch.bfloat16)
    plain = offset.float().numpy()
    points = sampling_points(offset, 3, padding=1)
    assert points.dtype == torch.float32 and np.array_equal(points.numpy(), sampling_points(plain, 3, padding=1))
    stacked = stacked_sampling_points([{"offset": offset, "kernel_size": 3, "padding": 1}] * 2, at=(3, 3))
    assert [type(p) for p in stacked] == [torch.Tensor] * 2
    assert isinstance(effective_dilation(offset, 3), torch.Tensor)
    boxes = torch.tensor([[0, 0, 0, 3, 3.0]])
    assert isinstance(deform_roi_bins(boxes, output_size=3), torch.Tensor)
    assert effective_dilation_by_class(offset, boxes, 3, padding=1)["small"]["filters"] == 9


@pytest.mark.cuda
@pytest.mark.skipif(bool(why_not("cuda")), reason=f"cuda: {why_not('cuda')}")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    rng = np.random.default_rng(7)
    host = {
        "offset": rng.standard_normal((2, 36, 9, 9)).astype(np.float32),
        "boxes": np.array([[0, 0, 0, 3, 3], [1, 2, 2, 8, 8]], np.float32),
        "shift": rng.standard_normal((2, 2, 3, 3)).astype(np.float32),
    }
    device = to_backend("cuda", host)

    def results(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        offset, boxes, shift = arrays.values()
        layer = {"offset": offset, "kernel_size": 3, "padding": 1}
        found = {f"stacked {i}": p for i, p in enumerate(stacked_sampling_points([layer] * 3, at=(4, 4)))}
        found |= {f"bins {c}": deform_roi_bins(boxes, shift, output_size=3, convention=c) for c in ("paper", "mmcv")}
        found["ps bins"] = deform_ps_roi_bins(boxes, shift, output_size=5, part_size=3)
        found["points"] = sampling_points(offset, 3, padding=1)
        found["dilation"] = effective_dilation(offset, 3)
        return found

    want, got = results(host), results(device)
    for name, array in got.items():
        assert type(array) is type(device["offset"]), name
        np.testing.assert_allclose(to_numpy(array), want[name], rtol=1e-6, atol=1e-6, err_msg=name)
    for function in (
        lambda a: offset_statistics(a["offset"], 9, 3, padding=1, quantiles=[1.0]),
        lambda a: effective_dilation_by_class(a["offset"], a["boxes"], 3, padding=1),
    ):
        assert repr(jsonable(function(device))) == repr(jsonable(function(host)))


def jsonable(found: dict) -> dict:
    """Numbers rounded, so that the last bits of float32 sums do not count."""
    return {k: jsonable(v) if isinstance(v, dict) else round(float(v), 4) for k, v in found.items()}
