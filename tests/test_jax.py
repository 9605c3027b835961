"""dcn_kernels.jax: every row under jit, grad and vmap, through XLA's foreign function interface."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import cases, cast, first_cases

import dcn_kernels
from dcn_kernels.dispatch.call import public
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES

jax = pytest.importorskip("jax", reason="jax is not installed")

import dcn_kernels.jax as functions  # noqa: E402

FIRST = first_cases()


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def jax_arrays(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: jax.numpy.asarray(array) for name, array in arrays.items()}


def function(op: Op, sample: Sample) -> Any:
    return lambda arrays: getattr(functions, op.name)(**arrays, **sample.params)


def test_every_operator_is_there() -> None:
    assert set(functions.__all__) == {*dcn_kernels.OPS, "disabled_checks", "record_layers"}


@pytest.mark.parametrize(("op", "sample"), cases())
def test_values_and_gradients_are_those_of_the_plain_functions(op: Op, sample: Sample) -> None:
    arrays = jax_arrays(sample.arrays)
    want = public(op)(**sample.arrays, **sample.params)
    got, pull = jax.vjp(jax.jit(function(op, sample)), arrays)
    np.testing.assert_array_equal(got, want)
    grad = np.linspace(-1, 1, want.size).reshape(want.shape)
    params = {name: value for name, value in sample.params.items() if name != "return_argmax"}
    wants = public(op, "backward")(grad, **sample.arrays, **params)
    (gots,) = pull(jax.numpy.asarray(grad))
    for name, value in gots.items():
        np.testing.assert_array_equal(value, wants.get(name, np.zeros_like(value)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_every_dtype_under_jit(op: Op, sample: Sample, dtype: str) -> None:
    arrays = cast(sample, op, dtype)
    want = public(op)(**arrays, **sample.params)
    got = jax.jit(function(op, sample))(jax_arrays(arrays))
    assert got.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_vmap_of_values_and_gradients_gives_what_a_loop_gives(op: Op, sample: Sample) -> None:
    arrays = jax_arrays(sample.arrays)
    for name in op.differentiable:

        def loss(array: Any, name: str = name) -> Any:
            return (function(op, sample)({**arrays, name: array}) ** 2).sum()

        stacked = jax.numpy.stack([arrays[name], arrays[name] / 2])
        both = jax.jit(jax.value_and_grad(loss))
        wants = [both(part) for part in stacked]
        for got, want in zip(jax.vmap(both)(stacked), zip(*wants, strict=True), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    of_backend = functions.backend_function

    def spy(op: Op, direction: str, backend: str) -> Any:
        def run(**kwargs: Any) -> Any:
            if direction == "backward":
                asked.append(list(kwargs["wrt"]))
            return of_backend(op, direction, backend)(**kwargs)

        return run

    monkeypatch.setattr(functions, "backend_function", spy)
    op, sample = FIRST[0].values
    arrays = jax_arrays(sample.arrays)
    for name in op.differentiable:
        grad = jax.grad(lambda array, name=name: function(op, sample)({**arrays, name: array}).sum())
        for each in (grad, jax.jit(grad)):
            each(arrays[name]).block_until_ready()
            assert asked.pop() == [name] and not asked


def test_nothing_is_copied_on_the_way_in_and_the_result_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    of_backend = functions.backend_function

    def spy(op: Op, direction: str, backend: str) -> Any:
        def run(**kwargs: Any) -> Any:
            seen.append((kwargs["input"].ctypes.data, kwargs["out"].ctypes.data))
            return of_backend(op, direction, backend)(**kwargs)

        return run

    monkeypatch.setattr(functions, "backend_function", spy)
    image, offset = jax.numpy.ones((1, 4, 16, 16)), jax.numpy.zeros((1, 2, 16, 16))
    got = jax.jit(functions.offset_sample2d)(image, offset).block_until_ready()
    assert seen == [(image.unsafe_buffer_pointer(), got.unsafe_buffer_pointer())]


def test_wrong_arguments_are_errors_that_name_them() -> None:
    image, offset = jax.numpy.ones((1, 1, 2, 2)), jax.numpy.zeros((1, 2, 2, 2))
    sample2d = functions.offset_sample2d
    for call, error, what in (
        (lambda: sample2d(image, [0.0]), TypeError, "offset: expected a JAX or NumPy array, got list"),
        (lambda: sample2d(image), TypeError, "missing a required argument: 'offset'"),
        (lambda: sample2d(image, offset, out=image), TypeError, ".*unexpected keyword argument 'out'"),
        (lambda: sample2d(image, offset, border="far"), ValueError, "border: expected one of"),
        (lambda: sample2d(image, offset.astype("float32")), TypeError, "offset: expected dtype float64"),
        (lambda: jax.jit(sample2d)(image, offset[:, :1]), ValueError, "offset: expected shape"),
    ):
        with pytest.raises(error, match=f"offset_sample2d: {what}"):
            call()


def test_an_error_in_a_running_call_reaches_the_caller() -> None:
    """The values of RoIs are known only when the compiled call runs."""
    pool = jax.jit(lambda image, rois: functions.roi_pool(image, rois, 2))
    image = jax.numpy.ones((1, 1, 4, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="roi_pool: rois: expected batch indices"):
        pool(image, jax.numpy.array([[3.0, 0, 0, 1, 1]])).block_until_ready()
    assert (pool(image, jax.numpy.array([[0.0, 0, 0, 1, 1]])) == 1).all()


def test_no_regions_give_an_empty_result_and_zero_gradients() -> None:
    image, rois = jax.numpy.ones((1, 1, 4, 4)), jax.numpy.zeros((0, 5))
    assert functions.roi_pool(image, rois, 2).shape == (0, 1, 2, 2)
    assert not jax.grad(lambda image: functions.roi_pool(image, rois, 2).sum())(image).any()


def test_forward_mode_and_second_derivatives_are_errors() -> None:
    image, offset = jax.numpy.ones((1, 1, 2, 2)), jax.numpy.zeros((1, 2, 2, 2))
    square = lambda image: (functions.offset_sample2d(image, offset) ** 2).sum()  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(square, (image,), (image,))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda image: jax.grad(square)(image).sum())(image)


def test_exported_once_for_all_sizes() -> None:
    from jax import export

    scope = export.SymbolicScope()
    shapes = [export.symbolic_shape(shape, scope=scope) for shape in ("n, 4, h, 8", "n, 2, h, 8")]
    exported = export.export(
        jax.jit(functions.offset_sample2d), disabled_checks=[export.DisabledSafetyCheck.custom_call("dcn_kernels")]
    )(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes))
    image = jax.numpy.arange(480, dtype="float32").reshape(3, 4, 5, 8)
    offset = jax.numpy.full((3, 2, 5, 8), 0.5, "float32")
    np.testing.assert_array_equal(exported.call(image, offset), functions.offset_sample2d(image, offset))


def test_many_compiled_calls_at_once() -> None:
    """XLA calls the handler from threads of its own."""
    image, offset = jax.numpy.ones((2, 4, 16, 16)), jax.numpy.full((2, 2, 16, 16), 0.5)

    @jax.jit
    def several(image: Any) -> Any:
        return [functions.offset_sample2d(image * k, offset) for k in range(8)]

    want = functions.offset_sample2d(image, offset)
    for k, got in enumerate(several(image)):
        np.testing.assert_array_equal(got, want * k)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
def test_a_shared_weight_gets_the_sum_of_the_gradients_of_all_devices() -> None:
    """In a process of its own: JAX makes two devices of one CPU only at its start."""
    program = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import dcn_kernels.jax as functions

split, mesh = P("d"), jax.sharding.Mesh(np.array(jax.devices()), ("d",))
image, offset, weight = (jax.numpy.ones(s) for s in ((2, 2, 4, 4), (2, 18, 4, 4), (3, 2, 3, 3)))
image = image.at[1].set(3)
loss = lambda *arrays: (functions.deform_conv2d(*arrays, padding=1) ** 2).sum()
grad = jax.grad(loss, (0, 1, 2))
shard = lambda function, out: jax.jit(
    jax.shard_map(function, mesh=mesh, in_specs=(split, split, P()), out_specs=out))
for got, want in zip(shard(grad, (split, split, P()))(image, offset, weight), grad(image, offset, weight)):
    np.testing.assert_allclose(got, want, rtol=1e-5)
try:
    shard(loss, P())(image, offset, weight)
except ValueError as error:
    assert "out_specs" in str(error)
    print("a sum over one device is not taken for that over all")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a sum over one device" in done.stdout


def test_regions_may_be_a_list_of_boxes_for_each_image() -> None:
    image = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    boxes = [np.array([[0.0, 1, 5, 6]], np.float32), np.array([[1.0, 1, 6, 7], [0, 0, 3, 3]], np.float32)]
    rois = np.concatenate([np.repeat([[0.0], [1.0]], [1, 2], axis=0).astype(np.float32), np.concatenate(boxes)], axis=1)
    want = functions.roi_align(image, rois, 2)
    np.testing.assert_array_equal(functions.roi_align(image, boxes, 2), want)
    np.testing.assert_array_equal(jax.jit(lambda *b: functions.roi_align(image, list(b), 2))(*boxes), want)
    for wrong in ([], [rois], [1.0]):
        with pytest.raises(TypeError, match=r"roi_align: rois: expected \(R, 5\), or a list of \(R_n, 4\)"):
            functions.roi_align(image, wrong, 2)
