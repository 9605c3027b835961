"""deform_conv2d and offset_sample2d on drawn shapes, strides, groups, layouts and offsets, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import RUNNING, Backend, assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcn_kernels.check.calls import output_shape, reduction_length
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES
from dcn_kernels.ops.deform_conv import BORDERS, DEFORM_CONV2D
from dcn_kernels.ops.offset_sample import OFFSET_SAMPLE2D
from dcn_kernels.ops.samples.draw import off_kinks

REFERENCE = Backend("reference")
CHECKED = [Backend(name) for name in RUNNING if name != "reference"]


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def arrays_of(draw: st.DrawFn, shape: tuple[int, ...], dtype: str, *, reach: int | None = None) -> np.ndarray:
    """Values (or offsets within `reach` pixels) in any memory layout."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if reach is None:
        values = np.round(rng.standard_normal(shape) * 32) / 32
    elif draw(st.booleans()):
        values = off_kinks(rng, shape, reach)
    else:
        values = rng.integers(-reach, reach + 1, shape).astype(float)  # on the kinks
    order = draw(st.permutations(range(len(shape))))
    flip = tuple(slice(None, None, draw(st.sampled_from((1, -1)))) for _ in shape)
    step = draw(st.sampled_from((1, 1, 2)))
    room = np.full([step * shape[axis] for axis in order], 7, DTYPES[dtype])
    view = room[(slice(None, None, step),) * len(shape)].transpose(np.argsort(order))[flip]
    view[...] = values
    return view


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Sample, str]:
    dtype = draw(st.sampled_from(list(DTYPES)))
    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    N, O = draw(st.integers(0, 3)), groups * draw(st.integers(1, 18 // groups))
    C = np.lcm(groups, offset_groups) * draw(st.integers(1, 3))
    (KH, KW), stride, padding, dilation = draw(pairs(1, 3)), draw(pairs(1, 3)), draw(pairs(0, 3)), draw(pairs(1, 3))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, (KH, KW), padding, strict=True)]
    # now and then more outputs than any tile of a kernel holds
    H, W = (low + draw(st.one_of(st.integers(0, 12), st.integers(40, 60))) for low in least)
    OH = (H + 2 * padding[0] - dilation[0] * (KH - 1) - 1) // stride[0] + 1
    OW = (W + 2 * padding[1] - dilation[1] * (KW - 1) - 1) // stride[1] + 1
    taps = offset_groups * KH * KW
    arrays = {
        "input": draw(arrays_of((N, C, H, W), dtype)),
        "offset": draw(arrays_of((N, 2 * taps, OH, OW), dtype, reach=draw(st.sampled_from((1, 3, 12))))),
        "weight": draw(arrays_of((O, C // groups, KH, KW), dtype)),
    }
    if draw(st.booleans()):
        arrays["mask"] = draw(arrays_of((N, taps, OH, OW), dtype))
    if draw(st.booleans()):
        arrays["bias"] = draw(arrays_of((O,), dtype))
    params = {"stride": stride, "padding": padding, "dilation": dilation, "border": draw(st.sampled_from(BORDERS))}
    return Sample(arrays, {**DEFORM_CONV2D.samples(0)[0].params, **params}), dtype


@st.composite
def resamplings(draw: st.DrawFn) -> tuple[Sample, str]:
    dtype = draw(st.sampled_from(list(DTYPES)))
    N, OG = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    C, H, W = OG * draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    arrays = {
        "input": draw(arrays_of((N, C, H, W), dtype)),
        "offset": draw(arrays_of((N, 2 * OG, H, W), dtype, reach=draw(st.sampled_from((1, 3, 12))))),
    }
    return Sample(arrays, {**OFFSET_SAMPLE2D.samples(0)[0].params, "border": draw(st.sampled_from(BORDERS))}), dtype


def agrees_with_the_reference(op: Op, sample: Sample, dtype: str, wrt: Any) -> None:
    """Outputs and gradients of every backend are those of the float64 reference."""
    sizes, shape = output_shape(op, sample)
    exact = {name: array.astype(np.float64) for name, array in sample.arrays.items()}
    grad = np.round(np.random.default_rng(9).standard_normal(shape) * 32) / 32
    want = REFERENCE.forward(op, exact, sample.params)
    wanted = REFERENCE.backward(op, {"grad_output": grad, **exact}, sample.params)
    for backend in CHECKED:
        out = backend.forward(op, sample.arrays, sample.params)
        assert_close(out, want, dtype, reduction_length(op, sizes, "forward", out.size), "output")
        given_grad = {"grad_output": grad.astype(DTYPES[dtype]), **sample.arrays}
        for name, array in backend.backward(op, given_grad, sample.params, wrt=wrt).items():
            assert_close(array, wanted[name], dtype, reduction_length(op, sizes, "backward", array.size), name)


def some_of(names: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), unique=True, min_size=1)


def check(op: Op, drawn: tuple[Sample, str], data: st.DataObject) -> None:
    sample, dtype = drawn
    present = [name for name in op.differentiable if name in sample.arrays]
    agrees_with_the_reference(op, sample, dtype, data.draw(st.one_of(st.none(), some_of(present)), label="wrt"))


RELAXED = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@RELAXED
@given(drawn=convolutions(), data=st.data())
def test_drawn_deform_conv2d_is_that_of_the_reference(drawn: tuple[Sample, str], data: st.DataObject) -> None:
    check(DEFORM_CONV2D, drawn, data)


@RELAXED
@given(drawn=resamplings(), data=st.data())
def test_drawn_offset_sample2d_is_that_of_the_reference(drawn: tuple[Sample, str], data: st.DataObject) -> None:
    check(OFFSET_SAMPLE2D, drawn, data)


SLOW = settings(RELAXED, max_examples=2000)


@pytest.mark.slow
@SLOW
@given(drawn=convolutions(), data=st.data())
def test_many_drawn_deform_conv2d_are_those_of_the_reference(drawn: tuple[Sample, str], data: st.DataObject) -> None:
    check(DEFORM_CONV2D, drawn, data)


@pytest.mark.slow
@SLOW
@given(drawn=resamplings(), data=st.data())
def test_many_drawn_offset_sample2d_are_those_of_the_reference(drawn: tuple[Sample, str], data: st.DataObject) -> None:
    check(OFFSET_SAMPLE2D, drawn, data)
