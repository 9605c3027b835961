"""roi_pool, ps_roi_pool, roi_align, ps_roi_align: other libraries, cases by hand, identities, and strange RoIs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Backend

from dcn_kernels import OPS, roi_align, roi_pool, roi_pool_backward
from dcn_kernels.check.calls import to_backend, to_numpy
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op
from dcn_kernels.ops.roi_pool import PS_ROI_ALIGN, PS_ROI_POOL, ROI_ALIGN, ROI_POOL

ORACLE = Path(__file__).parent / "oracle"
ORACLE_CASES = [case for case in json.loads((ORACLE / "manifest.json").read_text())["cases"] if "roi" in case["op"]]
PEERS_NAMES = {"pooled": "output_size", "group": "group_size", "part": "part_size"}
ROI_OPS = [op for op in OPS.values() if "rois" in op.arrays]
ROWS = [pytest.param(op, id=op.name) for op in ROI_OPS]


def oracle_params(case: dict[str, Any]) -> dict[str, Any]:
    params = {PEERS_NAMES.get(name, name): value for name, value in case["params"].items() if name != "output_dim"}
    params["output_size"] = tuple(params["output_size"])
    if "trans_std" in params and case["dtype"] == "float64":
        params["trans_std"] = float(np.float32(params["trans_std"]))  # MXNet holds it so
    return {**params, "convention": "mmcv"} if case["op"] == "deform_roi_pool" else params


def test_every_stored_case_is_run() -> None:
    stored = {path.name for path in ORACLE.glob("*.npz") if "roi" in path.name}
    assert {case["file"] for case in ORACLE_CASES} == stored
    assert len(stored) == 39


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case["file"].removesuffix(".npz"))
def test_agrees_with_other_libraries(backend: Backend, case: dict[str, Any]) -> None:
    op, data, params = OPS[case["op"]], np.load(ORACLE / case["file"]), oracle_params(case)
    arrays = {name.removeprefix("in_"): data[name] for name in data.files if name.startswith("in_")}

    def assert_within(got: np.ndarray, expected: np.ndarray, rtol: float) -> None:
        assert got.shape == expected.shape
        if expected.size:
            assert np.abs(got - expected).max() <= case["atol"] + rtol * np.abs(expected).max()

    assert_within(backend.forward(op, arrays, params), data["out"], case["rtol"])
    names = [name.removeprefix("grad_") for name in data.files if name.startswith("grad_") and name != "grad_out"]
    if names:
        grads = backend.backward(op, {"grad_output": data["grad_out"], **arrays}, params, wrt=names)
        for name in names:
            assert_within(grads[name], data[f"grad_{name}"], case["grad_rtol"])


# ---------------------------------------------------------------- by hand

IMAGE = np.arange(1.0, 17.0).reshape(1, 1, 4, 4)  # 1 2 3 4 / 5 6 7 8 / 9 10 11 12 / 13 14 15 16


def rois(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array([(0, *row) for row in rows], float)


def pooled(backend: Backend, op: Op, arrays: dict[str, np.ndarray], **params: Any) -> np.ndarray:
    return backend.forward(op, arrays, {"spatial_scale": 1.0, **params})


def test_max_and_mean_by_hand(backend: Backend) -> None:
    # The RoI rounds to columns 0..2 and rows 1..3 (half away from zero: 0.5 -> 1, -0.4 -> 0); its 3 pixels in 2 bins
    # are 0..1 and 1..2: bins overlap.
    arrays = {"input": IMAGE, "rois": rois((-0.4, 0.5, 2.4, 2.5))}
    assert pooled(backend, ROI_POOL, arrays, output_size=2)[0, 0].tolist() == [[10, 11], [14, 15]]
    assert pooled(backend, ROI_POOL, arrays, output_size=2, mode="avg")[0, 0].tolist() == [[7.5, 8.5], [11.5, 12.5]]


def test_negative_halves_round_away_from_zero(backend: Backend) -> None:
    # x1 = -0.5 is -1, so the mean is over columns -1, 0 of rows 0, 1, of which two pixels are on the map.
    arrays = {"input": IMAGE, "rois": rois((-0.5, 0, 0, 1))}
    assert pooled(backend, ROI_POOL, arrays, output_size=1, mode="avg").item() == (1 + 5) / 4
    assert pooled(backend, ROI_POOL, arrays, output_size=1).item() == 5


def test_ps_roi_pool_conventions_by_hand(backend: Backend) -> None:
    # "rfcn": x from 1 to (2 + 1), y from 1 to 4: pixels 6 7 / 10 11 / 14 15. "torchvision": 1..2 and 1..3: 6 / 10.
    arrays = {"input": IMAGE, "rois": rois((1, 1, 2, 3))}
    assert pooled(backend, PS_ROI_POOL, arrays, output_size=1).item() == 10.5
    assert pooled(backend, PS_ROI_POOL, arrays, output_size=1, convention="torchvision").item() == 8
    # torchvision never reads the last row and column
    arrays["rois"] = rois((0, 0, 9, 9))
    assert pooled(backend, PS_ROI_POOL, arrays, output_size=1).item() == 8.5
    assert pooled(backend, PS_ROI_POOL, arrays, output_size=1, convention="torchvision").item() == 6


def test_score_maps_by_hand(backend: Backend) -> None:
    # Channel k holds k everywhere. 2 output channels, G = 2, 4x4 bins: channel (c*2 + gh)*2 + gw, gh = floor(ph*2/4).
    image = np.broadcast_to(np.arange(8.0)[:, None, None], (1, 8, 4, 4)).copy()
    arrays = {"input": image, "rois": rois((0, 0, 3, 3))}
    got = pooled(backend, PS_ROI_POOL, arrays, output_size=4, group_size=2)[0]
    quarter = np.repeat(np.repeat([[0.0, 1.0], [2.0, 3.0]], 2, axis=0), 2, axis=1)
    assert got.tolist() == [quarter.tolist(), (quarter + 4).tolist()]


def test_roi_align_conventions_by_hand(backend: Backend) -> None:
    # One sample at the middle of [1, 2] x [1, 2]: (1.5, 1.5), or half a pixel less when aligned.
    arrays = {"input": IMAGE, "rois": rois((1, 1, 2, 2))}
    assert pooled(backend, ROI_ALIGN, arrays, output_size=1, sampling_ratio=1).item() == 8.5
    assert pooled(backend, ROI_ALIGN, arrays, output_size=1, sampling_ratio=1, aligned=True).item() == 6
    # A point has size 1 unless aligned: a sample half a pixel on, or at the point less half a pixel.
    arrays["rois"] = rois((1, 1, 1, 1))
    assert pooled(backend, ROI_ALIGN, arrays, output_size=1, sampling_ratio=1).item() == 8.5
    assert pooled(backend, ROI_ALIGN, arrays, output_size=1, sampling_ratio=1, aligned=True).item() == 3.5
    assert pooled(backend, ROI_ALIGN, arrays, output_size=1, aligned=True).item() == 0  # no points at all
    # Up to one pixel outside counts in full, at the border's value; beyond is 0.
    arrays["rois"] = rois((-2, 0, 0, 0), (-2.5, 0, -0.5, 0))
    got = pooled(backend, ROI_ALIGN, arrays, output_size=1, sampling_ratio=1)
    assert got.ravel().tolist() == [3, 0]  # at (0.5, -1), which is column 0; at (0.5, -1.5)


# ---------------------------------------------------------------- argmax


def test_argmax_is_where_the_maximum_is(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    image, boxes = rng.standard_normal((2, 18, 6, 7)), rois((0, 0, 6, 5), (2, 1, 3, 4), (-9, -9, -5, -5))
    boxes[1, 0] = 1
    out, argmax = _with_argmax(backend, image, boxes)
    assert argmax.dtype == np.int64
    assert (argmax[2] == -1).all() and (out[2] == 0).all()
    planes = image.reshape(2, 18, -1)[[0, 1]]
    assert np.array_equal(np.take_along_axis(planes, argmax[:2].reshape(2, 18, -1), axis=2).ravel(), out[:2].ravel())


def _with_argmax(backend: Backend, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    arrays = to_backend(backend.name, {"input": image, "rois": boxes})
    out, argmax = roi_pool(**arrays, output_size=2, return_argmax=True, backend=backend.name)
    return to_numpy(out), to_numpy(argmax)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_ties_go_to_the_first_and_a_nan_before_all(name: str) -> None:
    image = np.zeros((1, 3, 3, 3))
    image[0, 1, 1, 1] = image[0, 1, 2, 0] = np.nan
    image[0, 2] = [[0, 5, 5], [5, 1, 1], [np.inf, -np.inf, np.inf]]
    out, argmax = roi_pool(image, rois((0, 0, 2, 2)), 1, return_argmax=True, backend=name)
    assert argmax.ravel().tolist() == [0, 4, 6]
    assert np.array_equal(out.ravel(), [0, np.nan, np.inf], equal_nan=True)
    assert np.array_equal(roi_pool(image, rois((0, 0, 2, 2)), 1, backend=name), out, equal_nan=True)
    grad = roi_pool_backward(np.ones((1, 3, 1, 1)), image, rois((0, 0, 2, 2)), 1, backend=name)["input"]
    assert np.flatnonzero(grad).tolist() == [0, 9 + 4, 18 + 6]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_given_argmax_saves_the_search(name: str) -> None:
    rng = np.random.default_rng(1)
    image, boxes = rng.standard_normal((1, 20, 5, 6)), rois((0, 0, 5, 4), (1, 1, 9, 3))
    out, argmax = roi_pool(image, boxes, 3, return_argmax=True, backend=name)
    grad = rng.standard_normal(out.shape)
    searched = roi_pool_backward(grad, image, boxes, 3, backend=name)["input"]
    assert np.allclose(roi_pool_backward(grad, image, boxes, 3, argmax=argmax, backend=name)["input"], searched)
    assert np.array_equal(
        roi_pool_backward(grad, image, boxes, 3, argmax=np.zeros_like(argmax), backend=name)["input"][0, :, 0, 0],
        roi_pool_backward(grad, np.ones_like(image), rois(*[(0, 0, 0, 0)] * 2), 3, backend=name)["input"][0, :, 0, 0],
    )


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_wrong_argmax_is_an_error(name: str) -> None:
    image, boxes, grad = np.ones((1, 2, 3, 3)), rois((0, 0, 2, 2)), np.ones((1, 2, 1, 1))
    for wrong in (9, -2, 2**40):
        argmax = np.array([0, wrong]).reshape(1, 2, 1, 1)
        with pytest.raises(ValueError, match=r"roi_pool: argmax: expected indices .* got"):
            roi_pool_backward(grad, image, boxes, 1, argmax=argmax, backend=name)
    with pytest.raises(TypeError, match="roi_pool: argmax: expected dtype int64, got int32"):
        roi_pool_backward(grad, image, boxes, 1, argmax=np.zeros((1, 2, 1, 1), np.int32), backend=name)
    with pytest.raises(ValueError, match=r"roi_pool: argmax: expected shape \(R, C, PH, PW\)"):
        roi_pool_backward(grad, image, boxes, 1, argmax=np.zeros((1, 2, 1, 2), int), backend=name)
    with pytest.raises(ValueError, match='argmax: expected None with mode "avg"'):
        roi_pool_backward(grad, image, boxes, 1, mode="avg", argmax=np.zeros((1, 2, 1, 1), int), backend=name)
    with pytest.raises(ValueError, match="return_argmax: expected False"):
        roi_pool(image, boxes, 1, mode="avg", return_argmax=True, backend=name)
    with pytest.raises(ValueError, match="not differentiable by definition"):
        roi_pool_backward(grad, image, boxes, 1, wrt="rois", backend=name)


# ---------------------------------------------------------------- strange RoIs, for every RoI operator


CONVENTIONS: dict[str, list[dict[str, Any]]] = {
    "roi_pool": [{"mode": "max"}, {"mode": "avg"}],
    "ps_roi_pool": [{"convention": "rfcn"}, {"convention": "torchvision"}],
    "roi_align": [{"aligned": False}, {"aligned": True}, {"sampling_ratio": 3}],
    "ps_roi_align": [{}, {"sampling_ratio": 3}],
    "deform_roi_pool": [
        {"convention": "paper"}, {"convention": "rfcn"}, {"convention": "mmcv"},
        {"convention": "mmcv", "sampling_ratio": 3},
    ],
    "deform_ps_roi_pool": [{}],
}  # fmt: skip
CASES = [
    pytest.param(op, options, id=" ".join([op.name, *(f"{name}={value}" for name, value in options.items())]))
    for op in ROI_OPS
    for options in CONVENTIONS[op.name]
]


def small_call(
    op: Op, boxes: np.ndarray, channels: int = 4, dtype: type = np.float64, **options: Any
) -> tuple[dict, dict]:
    """Arrays and parameters with 2x2 bins and, where there are, offsets and a mask; pixels of 1 to 2."""
    rng = np.random.default_rng(2)
    arrays = {"input": rng.uniform(1, 2, (1, channels, 5, 6)), "rois": boxes}
    for name in ("offset", "trans"):
        if name in op.arrays:
            arrays[name] = rng.uniform(-0.5, 0.5, (len(boxes), 2, 2, 2))
    if "mask" in op.arrays:
        arrays["mask"] = rng.uniform(0.5, 1, (len(boxes), 2, 2))
    return {name: np.asarray(array, dtype) for name, array in arrays.items()}, {"output_size": 2, **options}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("op", "options"), CASES)
def test_rois_outside_give_zeros_and_no_gradient(
    backend: Backend, op: Op, options: dict[str, Any], dtype: type
) -> None:
    boxes = rois((100, 100, 120, 110), (-50, -50, -40, -45), (1e6, 0, 1e6 + 9, 3), (1e30, 1e30, 1e30, 1e30))
    arrays, params = small_call(op, boxes, dtype=dtype, **options)
    out = backend.forward(op, arrays, params)
    assert not out.any()
    for name, grad in backend.backward(op, {"grad_output": np.ones_like(out), **arrays}, params).items():
        assert not grad.any(), name


@pytest.mark.parametrize("channels", [4, 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("op", "options"), CASES)
def test_tiny_inverted_and_huge_rois(
    backend: Backend, op: Op, options: dict[str, Any], dtype: type, channels: int
) -> None:
    boxes = rois(
        (2, 2, 2, 2), (2.2, 1.3, 2.2001, 1.3001), (4, 4, 1, 1), (3, 4, 5, -2), (-1e6, -1e6, 1e6, 1e6), (0, 0, 1e6, 4),
        (-1e30, -1e30, 1e30, 1e30), (-3e38, 0, 3e38, 3e38), (1e30, 1e30, -1e30, -1e30), (0, 0, 5, 4), (0, 0, 5, 4),
    )  # fmt: skip
    arrays, params = small_call(op, boxes, channels, dtype, **options)
    start = time.perf_counter()
    out = backend.forward(op, arrays, params)
    grads = backend.backward(op, {"grad_output": np.ones_like(out), **arrays}, params)
    assert time.perf_counter() - start < 60  # compiling included; a loop over 1e30 pixels would not end
    assert np.isfinite(out).all() and np.abs(out).max() <= 2
    assert all(np.isfinite(grad).all() for grad in grads.values())
    if "offset" not in arrays and "trans" not in arrays:
        assert np.array_equal(out[-1], out[-2])
    reference, close = Backend("reference"), 1e-6 if dtype == np.float32 else 1e-12
    assert np.allclose(out, reference.forward(op, arrays, params), atol=close)
    want = reference.backward(op, {"grad_output": np.ones_like(out), **arrays}, params)
    for name, grad in grads.items():
        assert np.allclose(grad, want[name], rtol=10 * close, atol=10 * close * np.abs(want[name]).max()), name


@pytest.mark.parametrize("op", ROWS)
def test_no_rois(backend: Backend, op: Op) -> None:
    arrays, params = small_call(op, np.empty((0, 5)))
    out = backend.forward(op, arrays, params)
    assert out.shape[0] == 0 and out.shape[2:] == (2, 2)
    grads = backend.backward(op, {"grad_output": out, **arrays}, params)
    assert grads["input"].shape == arrays["input"].shape and not grads["input"].any()


@pytest.mark.parametrize("op", ROWS)
def test_a_hundred_thousand_rois(op: Op) -> None:
    rng = np.random.default_rng(3)
    boxes = np.concatenate([np.zeros((100_000, 1)), rng.uniform(-3, 9, (100_000, 4))], axis=1)
    arrays, params = small_call(op, boxes)
    cpu, some = Backend("cpu"), slice(None, None, 997)
    out = cpu.forward(op, arrays, params)
    few = {name: array if name == "input" else array[some] for name, array in arrays.items()}
    assert np.allclose(out[some], Backend("reference").forward(op, few, params), atol=1e-12)
    # every RoI adds to grad_input: its sum is that of any split into calls
    grad = rng.standard_normal(out.shape)
    whole = cpu.backward(op, {"grad_output": grad, **arrays}, params)
    total = np.zeros_like(whole["input"])
    for part in (slice(0, 70_000), slice(70_000, None)):
        piece = {name: array if name == "input" else array[part] for name, array in arrays.items()}
        grads = cpu.backward(op, {"grad_output": grad[part], **piece}, params)
        total += grads.pop("input")
        assert all(np.array_equal(each, whole[name][part]) for name, each in grads.items())
    assert np.allclose(total, whole["input"], rtol=1e-9)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("op", ROWS)
def test_bad_rois_are_errors(op: Op, name: str) -> None:
    named = Backend(name)
    for column in range(1, 5):
        for value in (np.nan, np.inf, -np.inf):
            boxes = rois((0, 0, 3, 3), (0, 0, 3, 3))
            boxes[1, column] = value
            arrays, params = small_call(op, boxes)
            with pytest.raises(ValueError, match=rf"{op.name}: rois: expected finite numbers, .* in row 1"):
                named.forward(op, arrays, params)
    for index in (-1, 1, 0.5, 1e30, np.nan, np.inf):
        arrays, params = small_call(op, np.array([[index, 0, 0, 3, 3]]))
        grad = np.ones_like(named.forward(op, {**arrays, "rois": rois((0, 0, 3, 3))}, params))
        for run in (
            lambda arrays=arrays, params=params: named.forward(op, arrays, params),
            lambda arrays=arrays, params=params, grad=grad: named.backward(op, {"grad_output": grad, **arrays}, params),
        ):
            with pytest.raises(ValueError, match=rf"{op.name}: rois: expected"):
                run()


# ---------------------------------------------------------------- identities


def test_position_sensitive_with_one_group_is_plain(backend: Backend) -> None:
    rng = np.random.default_rng(4)
    arrays = {"input": rng.standard_normal((1, 3, 7, 8)), "rois": rois((0.3, 1.2, 6.1, 5.9), (-2, 3, 5, 9))}
    plain = pooled(backend, ROI_ALIGN, arrays, output_size=1, aligned=True)
    assert np.allclose(pooled(backend, PS_ROI_ALIGN, arrays, output_size=1), plain, atol=1e-12)
    # each map of a group alone
    stacked = {**arrays, "input": np.repeat(arrays["input"], 4, axis=1)}
    assert np.allclose(
        pooled(backend, PS_ROI_POOL, stacked, output_size=2),
        pooled(backend, PS_ROI_POOL, arrays, output_size=2, group_size=1),
        atol=1e-12,
    )
    assert np.allclose(
        pooled(backend, PS_ROI_ALIGN, stacked, output_size=2),
        pooled(backend, ROI_ALIGN, arrays, output_size=2, aligned=True),
        atol=1e-12,
    )


def test_whole_pixels_inside_pool_the_same_in_every_mean(backend: Backend) -> None:
    """A RoI of whole pixels with bins of whole pixels: Eq. 5, "rfcn" and RoIAlign on pixel centres agree."""
    arrays = {"input": np.random.default_rng(5).standard_normal((1, 2, 6, 8)), "rois": rois((1, 2, 6, 5))}
    mean = pooled(backend, ROI_POOL, arrays, output_size=2, mode="avg")
    assert np.allclose(pooled(backend, PS_ROI_POOL, arrays, output_size=2, group_size=1), mean, atol=1e-12)
    edges = {**arrays, "rois": rois((1, 2, 7, 6))}
    assert np.allclose(pooled(backend, ROI_ALIGN, edges, output_size=2, aligned=True), mean, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_coordinates_are_rounded_to_float32(name: str) -> None:
    """30 * s with s = 0.1 in float32 is a hair more than 3, and rounds to 3: a grid of 3 points, not 4."""
    box = np.array([[0, 0, 0, 30, 30]], np.float32)
    assert float(np.float32(0.1)) * 30 > 3
    image = np.random.default_rng(6).standard_normal((1, 1, 8, 8)).astype(np.float32)
    three = roi_align(image, box, 1, 0.1, sampling_ratio=3, backend=name)
    assert np.array_equal(roi_align(image, box, 1, 0.1, backend=name), three)
    assert not np.allclose(roi_align(image, box, 1, 0.1, sampling_ratio=4, backend=name), three, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "options"),
    [case for case in CASES if case.values[0].name in ("roi_pool", "ps_roi_pool")],
)
def test_float32_bins_are_those_of_the_reference(backend: Backend, op: Op, options: dict[str, Any]) -> None:
    # Each pixel is a power of two of its own, so a bin that begins or ends a pixel off shows. Where a RoI begins left
    # of the map, the edges of bins lose leading digits: a fused multiply-add moves some of them by a pixel.
    rng = np.random.default_rng(7)
    length, R, P = 20, 400, 7
    for axis in (0, 1):
        image = np.tile(2.0 ** np.arange(length, dtype=np.float32)[:, None], (1, 1, 1, 2))
        ends = np.sort(np.round(rng.uniform(-10 * length, 10 * length, (R, 2))), axis=1)
        boxes = np.zeros((R, 5), np.float32)
        boxes[:, 4] = 9
        boxes[:, [2, 4]] = ends
        if axis:
            image, boxes = image.swapaxes(2, 3).copy(), boxes[:, [0, 2, 1, 4, 3]]
        size = (1, P) if axis else (P, 1)
        params = {"output_size": size, "spatial_scale": 0.1, **options}
        if op.name == "ps_roi_pool":
            image, params["group_size"] = (image, 1) if options["convention"] == "rfcn" else (image.repeat(P, 1), None)
        arrays = {"input": image, "rois": boxes}
        got, want = (each.forward(op, arrays, params) for each in (backend, Backend("reference")))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def unaligned(array: np.ndarray) -> np.ndarray:
    """A read-only copy that begins one byte beyond an element."""
    memory = np.empty(array.nbytes + 1, np.uint8)
    copy = memory[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    copy.flags.writeable = False
    assert not copy.flags.aligned
    return copy


@pytest.mark.parametrize("op", ROWS)
def test_arrays_of_any_alignment_are_worked_on_by_the_kernels_there_are(op: Op) -> None:
    from dcn_kernels.cpu import roi_max, roi_mean, roi_sum

    def compiled() -> int:
        modules = (roi_max, roi_mean, roi_sum)
        return sum(len(value.signatures) for m in modules for name, value in vars(m).items() if name.endswith("worker"))

    def everything(arrays: dict[str, Any], grad: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        out = call(op, "forward", arrays, sample.params, backend="cpu")
        grad = np.ones_like(out) if grad is None else grad
        return out, call(op, "backward", {"grad_output": grad, **arrays}, sample.params, backend="cpu")

    sample = op.samples(0)[0]
    given = {name: array.astype(np.float32) for name, array in sample.arrays.items()}
    arrays = {name: given.get(name) for name in op.arrays}
    out, grads = everything(arrays)
    before = compiled()
    for names in [*((name,) for name in given), tuple(given)]:
        got, found = everything(arrays | {name: unaligned(given[name]) for name in names}, unaligned(np.ones_like(out)))
        assert np.array_equal(got, out, equal_nan=True), names
        assert all(np.array_equal(found[name], grads[name], equal_nan=True) for name in grads), names
    assert compiled() == before > 0
