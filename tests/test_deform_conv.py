"""deform_conv2d: what other libraries compute, cases worked out by hand, and identities with plain convolution."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Backend, assert_close
from scipy.signal import correlate2d

from dcn_kernels import convert_offsets, deform_conv2d, deform_conv2d_backward
from dcn_kernels.check.calls import tolerance
from dcn_kernels.ops.deform_conv import DEFORM_CONV2D

ORACLE = Path(__file__).parent / "oracle"
ORACLE_CASES = [
    case for case in json.loads((ORACLE / "manifest.json").read_text())["cases"] if case["op"] == DEFORM_CONV2D.name
]


def test_every_stored_case_of_deform_conv2d_is_run() -> None:
    stored = {path.name for path in ORACLE.glob("dcn_*.npz")} | {path.name for path in ORACLE.glob("onnx_*.npz")}
    assert {case["file"] for case in ORACLE_CASES} == stored
    assert len(stored) == 22


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case["file"].removesuffix(".npz"))
def test_agrees_with_other_libraries(backend: Backend, case: dict[str, Any]) -> None:
    data = np.load(ORACLE / case["file"])
    arrays = {name.removeprefix("in_"): data[name] for name in data.files if name.startswith("in_")}
    params = {name: tuple(case["params"][name]) for name in ("stride", "padding", "dilation")}
    params["border"] = "msra" if case["peer"] == "mxnet" else "zeros"

    def bound(expected: np.ndarray, rtol: float) -> float:
        return case["atol"] + rtol * np.abs(expected).max()

    out = backend.forward(DEFORM_CONV2D, arrays, params)
    assert np.abs(out - data["out"]).max() <= bound(data["out"], case["rtol"])
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": data["grad_out"], **arrays}, params)
    assert {f"grad_{name}" for name in grads} == {
        name for name in data.files if name.startswith("grad_") and name != "grad_out"
    }
    for name, grad in grads.items():
        expected = data[f"grad_{name}"]
        assert np.abs(grad - expected).max() <= bound(expected, case["grad_rtol"]), name


# ---------------------------------------------------------------- by hand

IMAGE = np.array([[[[1.0, 2.0], [4.0, 8.0]]]])


def test_2x2_case_by_hand(backend: Backend) -> None:
    # One output pixel; the taps (0,0), (0,1), (1,0), (1,1) read 1, (2 + 8)/2 = 5 (half a row down),
    # (4 + 8)/2 = 6 (half a column right), and 8 (1, 1 moved by nothing); times the masks, weights; plus the bias.
    arrays = {
        "input": IMAGE,
        "offset": np.array([0, 0, 0.5, 0, 0, 0.5, 0, 0]).reshape(1, 8, 1, 1),
        "weight": np.array([1.0, 10, 100, 1000]).reshape(1, 1, 2, 2),
        "bias": np.array([0.25]),
        "mask": np.array([1, 0.5, 0.25, 2]).reshape(1, 4, 1, 1),
    }
    out = backend.forward(DEFORM_CONV2D, arrays, {})
    assert out.tolist() == [[[[1 * 1 + 10 * 0.5 * 5 + 100 * 0.25 * 6 + 1000 * 2 * 8 + 0.25]]]]
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": np.full((1, 1, 1, 1), 2.0), **arrays}, {})
    assert grads["bias"].tolist() == [2]
    assert grads["weight"].ravel().tolist() == [2 * 1, 2 * 0.5 * 5, 2 * 0.25 * 6, 2 * 2 * 8]
    assert grads["mask"].ravel().tolist() == [2 * 1 * 1, 2 * 10 * 5, 2 * 100 * 6, 2 * 1000 * 8]
    # weight * mask * slope: at (0, 0) slopes 3, 1; at (0.5, 1) 8-2 and, beyond the last column, -(2+8)/2;
    # at (1, 0.5) beyond the last row -(4+8)/2, and 8-4; at (1, 1) -8, -8
    slopes = np.array([[3, 1], [6, -5], [-6, 4], [-8, -8]])
    factors = 2 * np.array([1 * 1, 10 * 0.5, 100 * 0.25, 1000 * 2])
    assert grads["offset"].ravel().tolist() == (slopes * factors[:, None]).ravel().tolist()
    # weight * mask of each tap, shared out over the pixels it reads
    assert grads["input"].ravel().tolist() == [2 * 1, 2 * 2.5, 2 * 12.5, 2 * (2.5 + 12.5 + 2000)]


def test_offset_order_is_y_first(backend: Backend) -> None:
    offset = np.zeros((1, 2, 2, 2))
    offset[0, 0, 0, 0] = 1  # channel 0 moves one row down
    arrays = {"input": IMAGE, "offset": offset, "weight": np.ones((1, 1, 1, 1))}
    assert backend.forward(DEFORM_CONV2D, arrays, {})[0, 0, 0, 0] == 4


def test_taps_are_row_major(backend: Backend) -> None:
    weight = np.arange(1.0, 7.0).reshape(1, 1, 2, 3)
    for tap, moved in enumerate(range(1, 7)):
        mask = np.zeros((1, 6, 1, 1))
        mask[0, tap] = 1
        offset = np.zeros((1, 12, 1, 1))
        offset[0, 2 * tap : 2 * tap + 2, 0, 0] = -(tap // 3), -(tap % 3)  # to pixel (0, 0)
        image = np.zeros((1, 1, 2, 3))
        image[0, 0, 0, 0] = 1
        arrays = {"input": image, "offset": offset, "weight": weight, "mask": mask}
        assert backend.forward(DEFORM_CONV2D, arrays, {}).item() == moved


def test_channels_groups_and_offset_groups_by_hand(backend: Backend) -> None:
    # 6 channels of 1 pixel hold 1, 2, ..., 32; 2 groups of 3 channels and 3 offset groups of 2, so that the middle
    # one straddles them; each offset group's mask and weight are told apart by powers of ten.
    image = 2.0 ** np.arange(6).reshape(1, 6, 1, 1)
    mask = np.array([1.0, 10, 100]).reshape(1, 3, 1, 1)
    arrays = {"input": image, "offset": np.zeros((1, 6, 1, 1)), "weight": np.ones((2, 3, 1, 1)), "mask": mask}
    out = backend.forward(DEFORM_CONV2D, arrays, {})
    assert out.ravel().tolist() == [1 * (1 + 2) + 10 * 4, 10 * 8 + 100 * (16 + 32)]
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": np.array([1.0, 1000]).reshape(1, 2, 1, 1), **arrays}, {})
    assert grads["mask"].ravel().tolist() == [3, 4 + 1000 * 8, 1000 * 48]
    assert grads["input"].ravel().tolist() == [1, 1, 10, 10_000, 100_000, 100_000]
    assert grads["weight"].ravel().tolist() == [1, 2, 40, 80_000, 1_600_000, 3_200_000]


# ---------------------------------------------------------------- identities


def drawn(
    *,
    seed: int = 0,
    N: int = 2,
    C: int = 4,
    H: int = 7,
    W: int = 9,
    O: int = 6,
    kernel: tuple[int, int] = (3, 2),
    groups: int = 1,
    offset_groups: int = 1,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Random float64 arguments with zero offsets and no mask."""
    rng = np.random.default_rng(seed)
    OH = (H + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    OW = (W + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    arrays = {
        "input": rng.standard_normal((N, C, H, W)),
        "offset": np.zeros((N, 2 * offset_groups * kernel[0] * kernel[1], OH, OW)),
        "weight": rng.standard_normal((O, C // groups, *kernel)),
    }
    return arrays, {"stride": stride, "padding": padding, "dilation": dilation}


def convolution(
    image: np.ndarray,
    weight: np.ndarray,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> np.ndarray:
    """An ordinary convolution by scipy: the kernel is spread out by the dilation, the result thinned by the stride."""
    O, per_group, KH, KW = weight.shape
    spread = np.zeros((O, per_group, dilation[0] * (KH - 1) + 1, dilation[1] * (KW - 1) + 1))
    spread[:, :, :: dilation[0], :: dilation[1]] = weight
    padded = np.pad(image, ((0, 0), (0, 0), (padding[0], padding[0]), (padding[1], padding[1])))
    groups = image.shape[1] // per_group
    return np.array(
        [
            [
                sum(
                    correlate2d(one[o // (O // groups) * per_group + c], spread[o, c], mode="valid")
                    for c in range(per_group)
                )[:: stride[0], :: stride[1]]
                for o in range(O)
            ]
            for one in padded
        ]
    )


OPTIONS = (
    {},
    {"stride": (2, 3), "padding": (2, 0)},
    {"dilation": (2, 3), "padding": (3, 2), "kernel": (2, 3)},
    {"groups": 2, "offset_groups": 2, "O": 4},
    {"C": 12, "groups": 2, "offset_groups": 3, "kernel": (1, 3)},
    {"C": 12, "groups": 3, "offset_groups": 4, "stride": (2, 1)},
    {"C": 4, "groups": 4, "O": 8, "kernel": (1, 1)},
    {"C": 37, "O": 19, "kernel": (3, 3)},  # no multiple of any vector length
    # more outputs than any tile of a kernel holds, in rows that no tile ends with
    {"N": 3, "C": 3, "O": 5, "H": 41, "W": 123, "stride": (1, 2), "kernel": (2, 2)},
    {"N": 2, "C": 4, "O": 4, "H": 83, "W": 62, "stride": (2, 1), "groups": 2, "offset_groups": 2, "kernel": (2, 3)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zero_offset_is_convolution(backend: Backend, options: dict[str, Any]) -> None:
    arrays, params = drawn(**options)
    bias = np.arange(arrays["weight"].shape[0], dtype=float)
    expected = convolution(arrays["input"], arrays["weight"], **params) + bias[:, None, None]
    out = backend.forward(DEFORM_CONV2D, {**arrays, "bias": bias}, params)
    assert_close(out, expected, "float64", arrays["weight"][0].size)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shift", [(1, -2), (-3, 0), (0, 1)])
def test_integer_offset_is_a_shift(backend: Backend, options: dict[str, Any], shift: tuple[int, int]) -> None:
    arrays, params = drawn(**options)
    arrays["offset"][:, 0::2], arrays["offset"][:, 1::2] = shift
    out = backend.forward(DEFORM_CONV2D, arrays, params)
    reach = 4  # of the shifts, with room
    padded = np.pad(arrays["input"], ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    H, W = arrays["input"].shape[2:]
    moved = np.zeros_like(padded)
    moved[:, :, reach - shift[0] : reach - shift[0] + H, reach - shift[1] : reach - shift[1] + W] = arrays["input"]
    # the moved image on a wider canvas: nothing of it is cut off, and the output's first pixel is found by padding
    padding = tuple(params["padding"][axis] for axis in (0, 1))
    wide = tuple(reach - padding[axis] for axis in (0, 1))
    canvas = moved[:, :, wide[0] :, wide[1] :]
    expected = convolution(canvas, arrays["weight"], params["stride"], (0, 0), params["dilation"])
    expected = expected[:, :, : out.shape[2], : out.shape[3]]
    assert_close(out, expected, "float64", arrays["weight"][0].size)


def moved_about(options: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, params = drawn(**options)
    arrays["offset"] = np.random.default_rng(1).standard_normal(arrays["offset"].shape) * 2
    return arrays, params


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mask_of_ones_is_version_1(backend: Backend, options: dict[str, Any]) -> None:
    arrays, params = moved_about(options)
    N, channels, OH, OW = arrays["offset"].shape
    ones = np.ones((N, channels // 2, OH, OW))
    grad = np.random.default_rng(2).standard_normal((N, arrays["weight"].shape[0], OH, OW))
    length = arrays["weight"].size * OH * OW
    plain = backend.forward(DEFORM_CONV2D, arrays, params)
    assert_close(backend.forward(DEFORM_CONV2D, {**arrays, "mask": ones}, params), plain, "float64", length)
    expected = backend.backward(DEFORM_CONV2D, {"grad_output": grad, **arrays}, params)
    got = backend.backward(DEFORM_CONV2D, {"grad_output": grad, **arrays, "mask": ones}, params)
    for name in expected:
        assert_close(got[name], expected[name], "float64", length, name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mask_of_zeros_is_the_bias(backend: Backend, options: dict[str, Any]) -> None:
    arrays, params = moved_about(options)
    N, channels, OH, OW = arrays["offset"].shape
    bias = np.arange(arrays["weight"].shape[0], dtype=float)
    arrays |= {"mask": np.zeros((N, channels // 2, OH, OW)), "bias": bias}
    out = backend.forward(DEFORM_CONV2D, arrays, params)
    assert (out == bias[:, None, None]).all()
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": np.ones_like(out), **arrays}, params)
    for name in ("input", "offset", "weight"):
        assert not grads[name].any(), name
    assert grads["mask"].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zero_offset_gradients_are_those_of_convolution(backend: Backend, options: dict[str, Any]) -> None:
    """Linear in input and in weight: <g, conv(v, weight)> = <grad_input, v>, and so for the weight."""
    arrays, params = drawn(**options)
    rng = np.random.default_rng(4)
    grad, v, u = (
        rng.standard_normal(shape)
        for shape in (
            (len(arrays["input"]), len(arrays["weight"]), *arrays["offset"].shape[2:]),
            arrays["input"].shape,
            arrays["weight"].shape,
        )
    )
    grads = backend.backward(DEFORM_CONV2D, {"grad_output": grad, **arrays}, params, wrt=["input", "weight"])
    along_input = grad * convolution(v, arrays["weight"], **params)
    along_weight = grad * convolution(arrays["input"], u, **params)
    for got, want in ((grads["input"] * v, along_input), (grads["weight"] * u, along_weight)):
        size = np.abs(want).sum()
        assert abs(got.sum() - want.sum()) <= tolerance("float64", want.size) * size


@pytest.mark.parametrize("options", OPTIONS[3:7], ids=str)
def test_groups_are_separate_convolutions(backend: Backend, options: dict[str, Any]) -> None:
    arrays, params = moved_about(options)
    (C, O, per_group) = arrays["input"].shape[1], *arrays["weight"].shape[:2]
    OG, groups, taps = options.get("offset_groups", 1), C // per_group, arrays["weight"][0, 0].size
    # One offset field per channel says the same as one per group, and can be cut at any channel.
    fields = arrays["offset"].reshape(len(arrays["offset"]), OG, 2 * taps, *arrays["offset"].shape[2:])
    fields = np.repeat(fields, C // OG, axis=1)
    parts = []
    for group in range(groups):
        channels = slice(group * per_group, (group + 1) * per_group)
        offset = fields[:, channels].reshape(len(fields), -1, *fields.shape[3:])
        part = {
            "input": arrays["input"][:, channels],
            "offset": offset,
            "weight": arrays["weight"][group * (O // groups) : (group + 1) * (O // groups)],
        }
        parts.append(backend.forward(DEFORM_CONV2D, part, params))
    out = backend.forward(DEFORM_CONV2D, arrays, params)
    assert_close(out, np.concatenate(parts, axis=1), "float64", per_group * taps)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_int_parameter_means_the_same_for_both_axes(backend: Backend, name: str) -> None:
    params = {"stride": (1, 1), "padding": (2, 2), "dilation": (1, 1), name: (2, 2)}
    arrays, _ = drawn(**params)
    arrays["offset"] += 0.25
    pairs = backend.forward(DEFORM_CONV2D, arrays, params)
    ints = backend.forward(DEFORM_CONV2D, arrays, {key: value[0] for key, value in params.items()})
    assert (pairs == ints).all()


def test_axes_are_not_swapped(backend: Backend) -> None:
    """The transposed problem has the transposed answer, so no option of one axis leaks into the other."""
    arrays, params = drawn(kernel=(3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2), offset_groups=2)
    rng = np.random.default_rng(3)
    N, channels, OH, OW = arrays["offset"].shape
    arrays["offset"] = rng.standard_normal(arrays["offset"].shape)
    pairs = arrays["offset"].reshape(N, 2, 3, 2, 2, OH, OW)  # group, i, j, (y, x)
    flipped = {
        "input": arrays["input"].swapaxes(2, 3),
        "weight": arrays["weight"].swapaxes(2, 3),
        "offset": pairs[:, :, :, :, ::-1].transpose(0, 1, 3, 2, 4, 6, 5).reshape(N, channels, OW, OH),
    }
    out = backend.forward(DEFORM_CONV2D, arrays, params)
    other = backend.forward(DEFORM_CONV2D, flipped, {name: value[::-1] for name, value in params.items()})
    assert_close(other.swapaxes(2, 3), out, "float64", arrays["weight"][0].size)


# ---------------------------------------------------------------- convert_offsets


def test_layouts_by_hand() -> None:
    names = {
        "interleaved": ["dy0", "dx0", "dy1", "dx1", "dy2", "dx2"],
        "split_yx": ["dy0", "dy1", "dy2", "dx0", "dx1", "dx2"],
        "split_xy": ["dx0", "dx1", "dx2", "dy0", "dy1", "dy2"],
    }
    number = {name: i for i, name in enumerate(names["interleaved"])}
    arrays = {
        layout: np.array([[number[name] + 10 * group for group in (0, 1) for name in order]], float)[..., None, None]
        for layout, order in names.items()
    }
    for source, target in itertools.product(names, names):
        got = convert_offsets(arrays[source], source=source, target=target, offset_groups=2)
        assert got.tolist() == arrays[target].tolist(), (source, target)
    assert (convert_offsets(arrays["split_xy"], source="split_xy", offset_groups=2) == arrays["interleaved"]).all()


def test_converted_offsets_are_a_new_contiguous_array_of_the_same_dtype() -> None:
    offset = np.arange(16, dtype=np.float16).reshape(1, 4, 2, 2)[:, :, ::-1]
    got = convert_offsets(offset, source="interleaved")
    assert got.dtype == offset.dtype and got.flags.c_contiguous and not np.shares_memory(got, offset)
    assert (got == offset).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": "yx"}, ValueError, "convert_offsets: source: expected one of .*'split_yx'.*, got 'yx'"),
        ({"target": None}, ValueError, "convert_offsets: target: expected one of .*, got None"),
        ({"offset_groups": 0}, ValueError, "convert_offsets: offset_groups: expected .* at least 1, got 0"),
        ({"offset_groups": 1.5}, TypeError, "convert_offsets: offset_groups: expected an integer, got 1.5"),
        ({"offset_groups": 3}, ValueError, r"convert_offsets: offset: expected shape .*6\*K.*, got \(1, 4, 2, 2\)"),
        ({"offset": np.zeros((4, 2, 2))}, ValueError, r"convert_offsets: offset: expected shape .*, got \(4, 2, 2\)"),
        ({"offset": [[0]]}, TypeError, "convert_offsets: offset: expected an array that supports DLPack, got list"),
    ],
)
def test_bad_argument_of_convert_offsets(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"offset": np.zeros((1, 4, 2, 2)), "source": "split_yx", **change}
    with pytest.raises(error, match=message):
        convert_offsets(arguments.pop("offset"), **arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_out_may_have_any_strides_along_axes_of_length_one(backend):
    rng = np.random.default_rng(0)
    image, weight = rng.standard_normal((1, 2, 5, 1)), rng.standard_normal((3, 2, 1, 1))
    offset = rng.standard_normal((1, 2, 5, 1))
    expected = deform_conv2d(image, offset, weight, backend="reference")
    for out in (np.empty((1, 3, 5))[..., None], np.empty((1, 3, 1, 5)).swapaxes(2, 3)):
        assert out.flags.c_contiguous  # whatever the strides of the last axis
        assert deform_conv2d(image, offset, weight, out=out, backend=backend) is out
        np.testing.assert_allclose(out, expected, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_positions_are_counted_in_64_bits(backend):
    image, step = np.full((1, 1, 1, 1), 5.0), 2**31 - 1
    got = deform_conv2d(
        image, np.zeros((1, 2, 1, 3)), np.ones((1, 1, 1, 1)), stride=(1, step), padding=(0, step), backend=backend
    )
    np.testing.assert_array_equal(got.ravel(), [0, 5, 0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_nan_mask_makes_its_sample_nan_also_outside_the_image(backend):
    image, one = np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1))
    offset, mask = np.zeros((1, 2, 2, 2)), np.ones((1, 1, 2, 2))
    offset[0, 0, 0, 0], mask[0, 0, 0, 0] = 100, np.nan
    out = deform_conv2d(image, offset, one, mask=mask, backend=backend)
    np.testing.assert_array_equal(np.isnan(out[0, 0]), [[True, False], [False, False]])
    grads = deform_conv2d_backward(np.ones_like(out), image, offset, one, mask=mask, backend=backend)
    assert np.isnan(grads["offset"][0, :, 0, 0]).all() and np.isnan(grads["weight"]).all()
    assert np.isfinite(grads["input"]).all()
