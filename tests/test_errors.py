"""Bad values: what each operator's own parameters and sizes must be. Wrong arrays of any operator: test_ops.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Backend

import dcn_kernels
from dcn_kernels.check.calls import output_shape, to_backend
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.ops.deform_conv import DEFORM_CONV2D
from dcn_kernels.ops.offset_sample import OFFSET_SAMPLE2D


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape)


# N 2, C 4, H 6, W 7, O 6, a 3x3 kernel, padding 1: 6x7 outputs
CONVOLUTION = Sample(
    {
        "input": zeros(2, 4, 6, 7),
        "offset": zeros(2, 18, 6, 7),
        "weight": zeros(6, 4, 3, 3),
        "bias": zeros(6),
        "mask": zeros(2, 9, 6, 7),
    },
    {"stride": 1, "padding": 1, "dilation": 1},
)
RESAMPLING = Sample({"input": zeros(2, 4, 6, 7), "offset": zeros(2, 4, 6, 7)}, {})

PAIRS = [
    ({name: value}, error, f"{name}: expected {expected}, got {got}")
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1))
    for value, error, expected, got in (
        (least - 1, ValueError, f"an integer of at least {least}", least - 1),
        ((1, least - 1), ValueError, f"an integer of at least {least}", least - 1),
        ((-7, 1), ValueError, f"an integer of at least {least}", -7),
        ((1, 1, 1), ValueError, r"an int or a pair \(h, w\)", r"\(1, 1, 1\)"),
        ((1,), ValueError, r"an int or a pair \(h, w\)", r"\(1,\)"),
        ((), ValueError, r"an int or a pair \(h, w\)", r"\(\)"),
        (1.5, TypeError, r"an int or a pair \(h, w\)", "1.5"),
        ((1, 1.0), TypeError, "an integer", "1.0"),
        ("1", TypeError, r"an int or a pair \(h, w\)", "'1'"),
        (None, TypeError, r"an int or a pair \(h, w\)", "None"),
    )
]

VALUES = [
    *[(DEFORM_CONV2D, CONVOLUTION, *case) for case in PAIRS],
    *[
        (op, sample, {"border": border}, ValueError, f"border: expected one of .*'zeros'.*'edge'.*, got {border!r}")
        for op, sample in ((DEFORM_CONV2D, CONVOLUTION), (OFFSET_SAMPLE2D, RESAMPLING))
        for border in ("reflect", "align", "", None, 0)
    ],
    *[
        (op, sample, {"deterministic": value}, TypeError, f"deterministic: expected True or False, got {value!r}")
        for op, sample in ((DEFORM_CONV2D, CONVOLUTION), (OFFSET_SAMPLE2D, RESAMPLING))
        for value in (None, 1, "yes")
    ],
    *[
        (DEFORM_CONV2D, CONVOLUTION, {"precision": value}, ValueError, f"precision: expected one of .*, got {value!r}")
        for value in ("float16", None)
    ],
    (DEFORM_CONV2D, CONVOLUTION, {"workspace_bytes": 0}, ValueError, "workspace_bytes: expected .* at least 1, got 0"),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"workspace_bytes": 1e6},
        TypeError,
        "workspace_bytes: expected an integer, got 1000000",
    ),
]

LAST = "the shapes fit if {} came with channels last, \\(N, H, W, C\\); here they are second"

SIZES: list[tuple[Op, Sample, dict[str, Any], str]] = [
    # channels last, the input's alone or those of all maps
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"input": zeros(2, 6, 7, 4)},
        "weight: .*4 does not divide C = 6: " + LAST.format("input"),
    ),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"input": zeros(2, 6, 7, 4), "offset": zeros(2, 6, 7, 18), "mask": None},
        "weight: .*4 does not divide C = 6: " + LAST.format("input, offset"),
    ),
    (DEFORM_CONV2D, CONVOLUTION, {"offset": zeros(2, 6, 7, 18)}, "offset: .*: " + LAST.format("offset")),
    (DEFORM_CONV2D, CONVOLUTION, {"mask": zeros(2, 6, 7, 9)}, "mask: .*: " + LAST.format("mask")),
    (DEFORM_CONV2D, CONVOLUTION, {"input": zeros(2, 6, 8, 4)}, "weight: .*: 4 does not divide C = 6$"),
    # the offsets of another output size, named by letter and number
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"offset": zeros(2, 18, 4, 5)},
        r"offset: expected shape \(N, 2\*OG\*KH\*KW, OH, OW\) = \(2, 18\*OG, 6, 7\), got \(2, 18, 4, 5\)",
    ),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"stride": 2},
        r"offset: expected shape .* = \(2, 18\*OG, 3, 4\), got \(2, 18, 6, 7\)",
    ),
    (DEFORM_CONV2D, CONVOLUTION, {"padding": (0, 1)}, r"offset: expected shape .*\(2, 18\*OG, 4, 7\), got"),
    (DEFORM_CONV2D, CONVOLUTION, {"dilation": (1, 2)}, r"offset: expected shape .*\(2, 18\*OG, 6, 5\), got"),
    # channels that do not divide
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"weight": zeros(6, 3, 3, 3)},
        r"weight: expected shape \(O, C/groups, KH, KW\).*, got \(6, 3, 3, 3\): 3 does not divide C = 4",
    ),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"weight": zeros(6, 8, 3, 3)},
        r"weight: .*got \(6, 8, 3, 3\): 8 does not divide C = 4",
    ),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"weight": zeros(6, 0, 3, 3)},
        r"weight: .*got \(6, 0, 3, 3\): 0 does not divide C = 4",
    ),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"weight": zeros(6, 1, 3, 3), "bias": None},
        r"weight: .*got \(6, 1, 3, 3\): groups = 4 does not divide O = 6",
    ),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"offset": zeros(2, 54, 6, 7), "mask": None},
        r"offset: .*got \(2, 54, 6, 7\): OG = 3 does not divide C = 4",
    ),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"offset": zeros(2, 19, 6, 7)},
        r"offset: .*got \(2, 19, 6, 7\): 19 is not a multiple of",
    ),
    (DEFORM_CONV2D, CONVOLUTION, {"offset": zeros(2, 0, 6, 7)}, r"offset: .*got \(2, 0, 6, 7\): OG must be at least 1"),
    (DEFORM_CONV2D, CONVOLUTION, {"offset": zeros(3, 18, 6, 7)}, r"offset: .*\(2, 18\*OG, 6, 7\), got \(3, 18, 6, 7\)"),
    (DEFORM_CONV2D, CONVOLUTION, {"mask": zeros(2, 18, 6, 7)}, r"mask: expected .*\(2, 9, 6, 7\), got \(2, 18, 6, 7\)"),
    (DEFORM_CONV2D, CONVOLUTION, {"mask": zeros(1, 9, 6, 7)}, r"mask: expected .*\(2, 9, 6, 7\), got \(1, 9, 6, 7\)"),
    (DEFORM_CONV2D, CONVOLUTION, {"bias": zeros(4)}, r"bias: expected shape \(O,\) = \(6,\), got \(4,\)"),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"input": zeros(2, 0, 6, 7)},
        r"input: expected .*got \(2, 0, 6, 7\): C must be at least 1",
    ),
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"input": zeros(2, 4, 0, 7)},
        r"input: expected .*got \(2, 4, 0, 7\): H must be at least 1",
    ),
    # a kernel larger than the padded image
    (
        DEFORM_CONV2D,
        CONVOLUTION,
        {"weight": zeros(6, 4, 9, 3)},
        r"weight: expected a kernel within the padded image, dilation\*\(KH-1\)\+1 <= H\+2\*padding = 8, got 9",
    ),
    (DEFORM_CONV2D, CONVOLUTION, {"dilation": (1, 5)}, r"weight: expected a kernel within .*W\+2\*padding = 9, got 11"),
    (
        OFFSET_SAMPLE2D,
        RESAMPLING,
        {"offset": zeros(2, 4, 6, 6)},
        r"offset: expected shape \(N, 2\*OG, H, W\) = \(2, 2\*OG, 6, 7\), got \(2, 4, 6, 6\)",
    ),
    (
        OFFSET_SAMPLE2D,
        RESAMPLING,
        {"offset": zeros(2, 3, 6, 7)},
        r"offset: .*got \(2, 3, 6, 7\): 3 is not a multiple of 2",
    ),
    (OFFSET_SAMPLE2D, RESAMPLING, {"offset": zeros(2, 6, 6, 7)}, r"offset: .*got .*: OG = 3 does not divide C = 4"),
]


def refuses(
    op: Op, sample: Sample, change: dict[str, Any], error: type[Exception], message: str, backend: Backend
) -> None:
    """Forward and backward raise with the message; the kernels are not reached."""
    for direction in ("", "_backward"):
        arguments: dict[str, Any] = {**sample.arrays, **sample.params, **change}
        if direction:
            arguments["grad_output"] = np.zeros(output_shape(op, with_defaults(op, sample))[1])
        with pytest.raises(error, match=f"^{op.name}: {message}"):
            getattr(dcn_kernels, op.name + direction)(**to_backend(backend.name, arguments), backend=backend.name)


def with_defaults(op: Op, sample: Sample) -> Sample:
    """The sample with every parameter that `op.parameters` reads."""
    return Sample(sample.arrays, {**op.samples(0)[0].params, **sample.params})


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any) -> None:
        raise AssertionError("a kernel was reached")

    monkeypatch.setattr("dcn_kernels.dispatch.call.function", reached)


@pytest.mark.parametrize(("op", "sample"), [(DEFORM_CONV2D, CONVOLUTION), (OFFSET_SAMPLE2D, RESAMPLING)])
def test_unchanged_arguments_reach_the_kernel(backend: Backend, op: Op, sample: Sample) -> None:
    """So each error below is that of its one change."""
    with pytest.raises(AssertionError, match="a kernel was reached"):
        backend.forward(op, sample.arrays, sample.params)


@pytest.mark.parametrize(("op", "sample", "change", "error", "message"), VALUES)
def test_bad_value_names_operator_argument_expected_and_got(
    backend: Backend, op: Op, sample: Sample, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    refuses(op, sample, change, error, message, backend)


@pytest.mark.parametrize(("op", "sample", "change", "message"), SIZES)
def test_sizes_that_contradict_each_other_are_named_by_letter_and_number(
    backend: Backend, op: Op, sample: Sample, change: dict[str, Any], message: str
) -> None:
    refuses(op, sample, change, ValueError, message, backend)


def test_mixed_dtypes_name_both(backend: Backend) -> None:
    for name in CONVOLUTION.arrays:
        if name != "input":
            change = {name: CONVOLUTION.arrays[name].astype(np.float32)}
            message = rf"{name}: expected dtype float64 \(that of input: float64\), got float32"
            refuses(DEFORM_CONV2D, CONVOLUTION, change, TypeError, message, backend)


def test_arrays_of_two_frameworks_are_an_error(backend: Backend) -> None:
    class Foreign:
        __module__ = "elsewhere"

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    change = {"weight": Foreign()}
    message = "weight: expected a (numpy|cupy) array as .* is, got a elsewhere one"
    refuses(DEFORM_CONV2D, CONVOLUTION, change, TypeError, message, backend)


POOLED = [op for op in dcn_kernels.OPS.values() if "spatial_scale" in op.samples(0)[0].params]


@pytest.mark.parametrize("op", POOLED, ids=str)
@pytest.mark.parametrize("scale", [1e39, 10**400, float("inf"), float("nan"), 0, -1])
def test_a_scale_that_float32_does_not_hold_is_refused(backend: Backend, op: Op, scale: float) -> None:
    message = "spatial_scale: expected a positive finite number, got"
    refuses(op, op.samples(0)[0], {"spatial_scale": scale}, ValueError, message, backend)


@pytest.mark.parametrize("op", POOLED, ids=str)
@pytest.mark.parametrize("number", [4097, 10**9, 2**63])
def test_more_samples_of_a_bin_than_a_call_could_end_with_are_refused(backend: Backend, op: Op, number: int) -> None:
    sample = op.samples(0)[0]
    names = [name for name in ("sampling_ratio", "sample_per_part") if name in sample.params]
    assert names or op.name in ("roi_pool", "ps_roi_pool")  # whole pixels
    for name in names:
        refuses(op, sample, {name: number}, ValueError, f"{name}: expected an integer of at most 4096, got", backend)
