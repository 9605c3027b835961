"""Every row on every backend in every dtype. No operator is named here: a new row is tested without an edit.

Gradients are checked with what `dcn-check gradients` uses (`gradcheck.findings`), so the two cannot disagree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from conftest import Backend, assert_close, cases, cast, first_cases

import dcn_kernels
from dcn_kernels.check.calls import (
    BACKENDS,
    output_shape,
    reduction_length,
    relative_error,
    to_backend,
    to_numpy,
    tolerance,
)
from dcn_kernels.check.gradients import Case, findings
from dcn_kernels.dispatch.call import function, module_of, public
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES, HALVES
from dcn_kernels.environment import why_not

FIRST = first_cases()
# dtype, and whether the coordinates stay float32 beside it
KINDS = [(dtype, False) for dtype in DTYPES] + [(str(dtype), True) for dtype in HALVES]
ROWS = [pytest.param(op, id=op.name) for op in dcn_kernels.OPS.values()]


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_tested_here(name: str) -> None:
    reason = why_not(name)
    if name == "cuda" and reason:
        pytest.skip(f"cuda: {reason}")
    assert not reason


@pytest.mark.parametrize("op", ROWS)
def test_row_is_complete(op: Op) -> None:
    for name in ("reference", "cpu"):
        for direction in ("forward", "backward"):
            assert callable(function(op, direction, name))
    for direction in ("forward", "backward"):
        shown = public(op, direction)
        assert shown.__name__ in import_module(op.package).__all__
        for section in ("Parameters", "Returns", "Raises", "Examples"):
            assert f"{section}\n    -----" in shown.__doc__, f"{shown.__name__}: {section}"
    given = set().union(*(sample.arrays for sample in op.samples(0)))
    assert given == set(op.arrays), "some argument is in no sample"
    for name in op.optional:
        assert any(name not in sample.arrays for sample in op.samples(0)), f"{name} is never absent"


def grad_output_of(op: Op, sample: Sample, dtype: str = "float64") -> np.ndarray:
    shape = output_shape(op, sample)[1]
    return (np.round(np.random.default_rng(5).standard_normal(shape) * 32) / 32).astype(DTYPES[dtype])


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("dtype", "wide"), KINDS)
@pytest.mark.parametrize(("op", "sample"), cases())
def test_forward_is_that_of_the_float64_reference(
    backend: Backend, op: Op, sample: Sample, dtype: str, wide: bool
) -> None:
    case = Case(op, sample, dtype, seed=0, wide_coordinates=wide)
    out = backend.forward(op, case.sample.arrays, sample.params)
    assert out.dtype == DTYPES[dtype] and out.flags.c_contiguous and out.size
    assert not any(np.shares_memory(out, array) for array in case.sample.arrays.values())
    want = Backend("reference").forward(op, case.exact.arrays, sample.params)
    assert_close(out, want, dtype, reduction_length(op, case.sizes, "forward", out.size))


@pytest.mark.parametrize(("dtype", "wide"), KINDS)
@pytest.mark.parametrize(("op", "sample"), cases())
def test_gradients_are_those_of_the_forward(backend: Backend, op: Op, sample: Sample, dtype: str, wide: bool) -> None:
    """By the float64 reference, the adjoint identity, central differences, and twice the same."""
    case = Case(op, sample, dtype, seed=0, wide_coordinates=wide)
    seen = set()
    for argument, finding in findings(case, backend.name, case.arguments):
        assert finding.ratio <= 1, f"{argument}: {finding}"
        assert dtype != "float64" or finding.error <= 1e-9, f"{argument}: {finding}"
        seen.add((argument, finding.check))
    for argument in case.arguments:
        assert (argument, "reference") in seen
        assert (argument, "differences") in seen or DTYPES[dtype] in HALVES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [row for row in ROWS if row.values[0].kinks])
def test_gradients_on_kinks_are_the_documented_ones(backend: Backend, op: Op, dtype: str) -> None:
    for sample in op.kinks(0):
        case = Case(op, sample, dtype, seed=0, wide_coordinates=False)
        found = [finding for _, finding in findings(case, backend.name, case.arguments)]
        assert found, sample.label
        for finding in found:
            assert finding.ratio <= 1, finding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "sample"), cases())
def test_gradients_have_their_arguments_shape_and_dtype(backend: Backend, op: Op, sample: Sample, dtype: str) -> None:
    wide = "float32" if DTYPES[dtype] in HALVES else None
    arrays = cast(sample, op, dtype, wide)
    grads = backend.backward(op, {"grad_output": grad_output_of(op, sample, dtype), **arrays}, sample.params)
    assert list(grads) == [name for name in op.differentiable if name in arrays]
    for name, grad in grads.items():
        assert grad.shape == arrays[name].shape and grad.dtype == arrays[name].dtype, name
        assert grad.flags.c_contiguous
        assert not any(np.shares_memory(grad, array) for array in arrays.values())


# ---------------------------------------------------------------- layouts


def transposed(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)


def reversed_everywhere(array: np.ndarray) -> np.ndarray:
    flip = (slice(None, None, -1),) * array.ndim
    return np.ascontiguousarray(array[flip])[flip]


def every_other(array: np.ndarray) -> np.ndarray:
    wider = np.full([2 * size + 1 for size in array.shape], np.nan, array.dtype)
    view = wider[tuple(slice(1, 2 * size, 2) for size in array.shape)]
    view[...] = array
    return view


def inner_window(array: np.ndarray) -> np.ndarray:
    wider = np.full([size + 3 for size in array.shape], np.nan, array.dtype)
    view = wider[tuple(slice(1, 1 + size) for size in array.shape)]
    view[...] = array
    return view


def unaligned(array: np.ndarray) -> np.ndarray:
    room = np.empty(array.nbytes + 1, np.uint8)
    view = room[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1) if array.ndim > 1 else array


LAYOUTS = (transposed, reversed_everywhere, every_other, inner_window, unaligned, channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_any_strides_give_the_same_result(
    backend: Backend, op: Op, sample: Sample, layout: Callable[[np.ndarray], np.ndarray], dtype: str
) -> None:
    if backend.name == "cuda":
        pytest.skip("cuda: NumPy layouts do not survive the copy to the GPU")
    arrays = {"grad_output": grad_output_of(op, sample, dtype), **cast(sample, op, dtype)}
    plain_out, plain_grads = run_both(backend, op, arrays, sample.params)
    for chosen in [(name,) for name in arrays] + [tuple(arrays)]:
        laid = {name: layout(array) if name in chosen else array for name, array in arrays.items()}
        out, grads = run_both(backend, op, laid, sample.params)
        assert_close(out, plain_out, dtype, 1, f"output with {chosen}")
        for name, grad in grads.items():
            assert_close(grad, plain_grads[name], dtype, 1, f"grad_{name} with {chosen}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_broadcast_arrays_give_the_result_of_their_copies(backend: Backend, op: Op, sample: Sample, dtype: str) -> None:
    arrays = {"grad_output": grad_output_of(op, sample, dtype), **cast(sample, op, dtype)}
    for name, array in arrays.items():
        if name not in ("grad_output", *op.differentiable):
            continue  # the rows of an index array must not all become the first
        flat = np.broadcast_to(array[(slice(0, 1),) * array.ndim], array.shape)
        got_out, got = run_both(backend, op, {**arrays, name: flat}, sample.params)
        want_out, want = run_both(backend, op, {**arrays, name: flat.copy()}, sample.params)
        assert_close(got_out, want_out, dtype, 1, name)
        for argument in want:
            assert_close(got[argument], want[argument], dtype, 1, f"grad_{argument} with {name}")


def run_both(
    backend: Backend, op: Op, arrays: dict[str, np.ndarray], params: dict[str, Any]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    inputs = {name: array for name, array in arrays.items() if name != "grad_output"}
    return backend.forward(op, inputs, params), backend.backward(op, arrays, params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_read_only_inputs_work_and_no_input_is_modified(backend: Backend, op: Op, sample: Sample, dtype: str) -> None:
    arrays = {"grad_output": grad_output_of(op, sample, dtype), **cast(sample, op, dtype)}
    before = {name: array.tobytes() for name, array in arrays.items()}
    run_both(backend, op, arrays, sample.params)  # writable: a write would show below
    assert {name: array.tobytes() for name, array in arrays.items()} == before
    for array in arrays.values():
        array.flags.writeable = False
    out, grads = run_both(backend, op, arrays, sample.params)
    assert out.flags.writeable and all(grad.flags.writeable for grad in grads.values())


# ---------------------------------------------------------------- wrt


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_every_subset_of_wrt_gives_those_gradients_alone(backend: Backend, op: Op, sample: Sample) -> None:
    arrays = {"grad_output": grad_output_of(op, sample), **sample.arrays}
    everything = backend.backward(op, arrays, sample.params)
    names = [name for name in op.differentiable if name in sample.arrays]
    for count in range(len(names) + 1):
        for subset in itertools.combinations(names, count):
            grads = backend.backward(op, arrays, sample.params, wrt=subset[::-1])
            assert tuple(grads) == subset
            for name, grad in grads.items():
                assert_close(grad, everything[name], "float64", 1, f"grad_{name} alone of {subset}")


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_wrt_may_be_one_name(backend: Backend, op: Op, sample: Sample) -> None:
    name = op.differentiable[0]
    arrays = {"grad_output": grad_output_of(op, sample), **sample.arrays}
    assert list(backend.backward(op, arrays, sample.params, wrt=name)) == [name]


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_wrt_that_names_something_else_is_an_error(backend: Backend, op: Op, sample: Sample) -> None:
    arrays = {"grad_output": grad_output_of(op, sample), **sample.arrays}
    bad = {"nothing": "no such argument", "grad_output": "no such argument"}
    bad |= dict.fromkeys(set(op.arrays) - set(op.differentiable), "not differentiable by definition")
    for name, why in bad.items():
        with pytest.raises(
            ValueError, match=rf"{op.name}_backward: wrt: expected names among .*, got '{name}': .*{why}"
        ):
            backend.backward(op, arrays, sample.params, wrt=[op.differentiable[0], name])


@pytest.mark.parametrize("op", ROWS)
def test_wrt_that_names_an_absent_argument_is_an_error(backend: Backend, op: Op) -> None:
    for sample in op.samples(0):
        arrays = {"grad_output": grad_output_of(op, sample), **sample.arrays}
        for name in set(op.differentiable) - set(sample.arrays):
            with pytest.raises(ValueError, match=rf"{op.name}_backward: wrt: .*got '{name}': {name} was not given"):
                backend.backward(op, arrays, sample.params, wrt=[name])


# ---------------------------------------------------------------- out=


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "sample"), cases())
def test_out_takes_the_result(op: Op, sample: Sample, dtype: str, backend: Backend) -> None:
    arrays = to_backend(backend.name, cast(sample, op, dtype))
    expected = backend.forward(op, arrays, sample.params)
    filled = np.full(expected.shape, np.nan, expected.dtype)  # not to be added to
    out = to_backend(backend.name, {"out": filled})["out"]
    assert public(op)(**arrays, **sample.params, out=out, backend=backend.name) is out
    assert to_numpy(out).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_out_that_does_not_fit_is_an_error(op: Op, sample: Sample, backend: Backend) -> None:
    shape = output_shape(op, sample)[1]

    def zeros(shape: tuple[int, ...], dtype: Any = np.float64) -> Any:
        return to_backend(backend.name, {"out": np.zeros(shape, dtype)})["out"]

    bad = [
        (zeros((*shape[:-1], shape[-1] + 1)), ValueError, "expected shape"),
        (zeros(shape[1:]), ValueError, "expected shape"),
        (zeros(shape, np.float32), TypeError, "expected dtype float64, got float32"),
        (zeros(shape[::-1]).T, ValueError, "expected a C-contiguous array"),
        (zeros((*shape[:-1], 2 * shape[-1]))[..., ::2], ValueError, "expected a C-contiguous array"),
        ([0.0], TypeError, "expected an array that supports DLPack, got list"),
    ]
    if backend.name != "cuda":  # on a GPU every array is writable
        read_only = np.zeros(shape)
        read_only.flags.writeable = False
        bad.append((read_only, ValueError, "expected a writable array"))
    for out, error, message in bad:
        with pytest.raises(error, match=f"{op.name}: out: {message}"):
            backend.forward(op, sample.arrays, sample.params, out=out)
        assert not np.any(out if isinstance(out, list) else to_numpy(out))  # nothing was written


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_out_that_overlaps_an_input_is_an_error(op: Op, sample: Sample, backend: Backend) -> None:
    shape = output_shape(op, sample)[1]
    size = int(np.prod(shape))
    for name, array in sample.arrays.items():
        # the argument's last element is the result's first, and the other way round
        for start in (array.size - 1, -(size - 1)):
            before = np.zeros(array.size + 2 * size)
            before[size : size + array.size] = array.reshape(-1)
            room = to_backend(backend.name, {"room": before.copy()})["room"]
            inside = room[size : size + array.size].reshape(array.shape)
            out = room[size + start : size + start + size].reshape(shape)
            with pytest.raises(ValueError, match=f"{op.name}: out: expected memory of its own, .* overlaps {name}"):
                backend.forward(op, {**sample.arrays, name: inside}, sample.params, out=out)
            assert (to_numpy(room) == before).all()


# ---------------------------------------------------------------- empty


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ROWS)
def test_no_images_or_regions_give_an_empty_result_and_zero_gradients(backend: Backend, op: Op, dtype: str) -> None:
    for sample in op.samples(0):
        arrays = cast(sample, op, dtype)
        letter = op.output.split()[0]
        assert letter in op.zero_sizes
        empty = {name: array[:0] if op.arrays[name].split()[0] == letter else array for name, array in arrays.items()}
        out = backend.forward(op, empty, sample.params)
        assert out.shape == (0, *output_shape(op, sample)[1][1:]) and out.dtype == DTYPES[dtype]
        grads = backend.backward(op, {"grad_output": out, **empty}, sample.params)
        for name, grad in grads.items():
            assert grad.shape == empty[name].shape and not grad.any(), name


# ---------------------------------------------------------------- wrong arrays


def raises_and_changes_nothing(
    backend: Backend, op: Op, sample: Sample, change: dict[str, Any], error: type[Exception], message: str
) -> str:
    """Both directions refuse the changed arguments in the same words; the inputs stay as they were."""
    arrays = {"grad_output": grad_output_of(op, sample), **sample.arrays, **change}
    inputs = {name: array for name, array in arrays.items() if name != "grad_output"}
    held = {name: array.tobytes() for name, array in arrays.items() if isinstance(array, np.ndarray)}
    with pytest.raises(error, match=message) as raised:
        backend.backward(op, arrays, sample.params)
    if "grad_output" not in change and ": grad_output: " not in str(raised.value):
        with pytest.raises(error, match=message):
            backend.forward(op, inputs, sample.params)
    assert {name: array.tobytes() for name, array in arrays.items() if isinstance(array, np.ndarray)} == held
    return str(raised.value)


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_wrong_number_of_dimensions_names_argument_expected_and_got(backend: Backend, op: Op, sample: Sample) -> None:
    for name, array in {"grad_output": grad_output_of(op, sample), **sample.arrays}.items():
        letters = op.output if name == "grad_output" else op.arrays[name]
        by_letter = ", ".join(letters.split())
        for wrong in (array[0, ...], array[None]):
            message = raises_and_changes_nothing(
                backend, op, sample, {name: wrong}, ValueError, f"^{op.name}: {name}: "
            )
            assert f"expected shape ({by_letter}" in message and f"got {wrong.shape}" in message


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_wrong_size_of_any_dimension_names_argument_expected_and_got(backend: Backend, op: Op, sample: Sample) -> None:
    """One more along a dimension of any argument but the first contradicts another argument."""
    arrays = {"grad_output": grad_output_of(op, sample), **sample.arrays}
    for name in [name for name in arrays if name != next(iter(op.arrays))]:
        for axis in range(arrays[name].ndim):
            wrong = np.concatenate([arrays[name], arrays[name].take([0], axis)], axis)
            with pytest.raises(ValueError, match=rf"^{op.name}: \w+: expected ") as raised:
                backend.backward(op, {**arrays, name: wrong}, sample.params)
            blamed = str(raised.value).split(": ")[1]
            if "expected shape" in str(raised.value):
                shape = wrong.shape if blamed == name else arrays[blamed].shape
                assert f"got {shape}" in str(raised.value)


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_wrong_dtype_names_argument_and_both_dtypes(backend: Backend, op: Op, sample: Sample) -> None:
    first = next(iter(op.arrays))
    for name, array in {"grad_output": grad_output_of(op, sample), **sample.arrays}.items():
        for wrong in (np.int32, np.complex128, np.bool_):
            change, start = {name: array.astype(wrong)}, f"^{op.name}: {name}: "
            message = raises_and_changes_nothing(backend, op, sample, change, TypeError, start)
            assert "expected dtype" in message and f"got {np.dtype(wrong)}" in message
        if name != first:
            for wrong in (np.float32, np.float16, DTYPES["bfloat16"]):
                change, start = {name: array.astype(wrong)}, f"^{op.name}: {name}: expected dtype float64"
                message = raises_and_changes_nothing(backend, op, sample, change, TypeError, start)
                assert f"got {np.dtype(wrong)}" in message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_only_coordinates_may_stay_float32_beside_half_precision(
    backend: Backend, op: Op, sample: Sample, dtype: str
) -> None:
    arrays = {"grad_output": grad_output_of(op, sample, dtype), **cast(sample, op, dtype)}
    for name, array in arrays.items():
        if name in op.coordinates or name == next(iter(op.arrays)):
            continue
        with pytest.raises(TypeError, match=f"{op.name}: {name}: expected dtype {dtype} .*got float32"):
            backend.backward(op, {**arrays, name: array.astype(np.float32)}, sample.params)
    for name in set(op.coordinates) & set(arrays):
        with pytest.raises(TypeError, match=f"{op.name}: {name}: expected dtype {dtype} or float32 .*got float64"):
            backend.backward(op, {**arrays, name: arrays[name].astype(np.float64)}, sample.params)


class OnDevice:
    """An array of another framework on some device; taking its memory would fail."""

    def __init__(self, like: np.ndarray, kind: int, number: int = 0) -> None:
        self.shape, self.dtype, self._device = like.shape, like.dtype, (kind, number)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_wrong_device_or_kind_names_argument_and_what_came(backend: Backend, op: Op, sample: Sample) -> None:
    arrays = {"grad_output": grad_output_of(op, sample), **sample.arrays}
    for name, array in arrays.items():
        for wrong, got in (([[0.0]], "list"), (3, "int"), (1.5, "float"), ("x", "str")):
            change, start = {name: wrong}, rf"^{op.name}: {name}: expected an array .*, got {got}"
            raises_and_changes_nothing(backend, op, sample, change, TypeError, start)
        if name not in op.optional:
            change = {name: None}
            raises_and_changes_nothing(
                backend, op, sample, change, TypeError, f"^{op.name}: {name}: expected an array, got None"
            )
        vulkan = OnDevice(array, 7)
        with pytest.raises(TypeError, match=f"^{op.name}: {name}: expected an array on a CPU .* got DLPack device 7"):
            backend.backward(op, {**arrays, name: vulkan}, sample.params)
    for name in list(arrays)[1:]:
        split = {other: OnDevice(array, 2, int(other == name)) for other, array in arrays.items()}
        with pytest.raises(
            TypeError, match=f"^{op.name}: {name}: expected an array on cuda:0 as .*, got one on cuda:1"
        ):
            backend.backward(op, split, sample.params)


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_backend_that_cannot_work_is_an_error(op: Op, sample: Sample) -> None:
    run = public(op)
    with pytest.raises(ValueError, match=f"{op.name}: backend: expected one of .*'cpu'.*, got 'gpu'"):
        run(**sample.arrays, **sample.params, backend="gpu")
    with pytest.raises(ValueError, match=f"{op.name}: backend: 'cuda' cannot work on arrays on the CPU"):
        run(**sample.arrays, **sample.params, backend="cuda")
    elsewhere = {name: OnDevice(array, 2, 1) for name, array in sample.arrays.items()}
    with pytest.raises(ValueError, match=f"{op.name}: backend: 'cpu' cannot work on arrays on cuda:1"):
        run(**elsewhere, **sample.params, backend="cpu")


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_arrays_on_a_cpu_are_computed_by_the_cpu_backend(
    op: Op, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    module = import_module(module_of(op, "cpu"))
    real = getattr(module, op.name)
    monkeypatch.setattr(module, op.name, lambda **arguments: called.append(op.name) or real(**arguments))
    public(op)(**sample.arrays, **sample.params)
    assert called == [op.name]


# ---------------------------------------------------------------- repeatable


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "sample"), cases())
def test_cpu_results_are_the_same_bits_at_every_number_of_threads(op: Op, sample: Sample, dtype: str) -> None:
    from dcn_kernels.cpu.threads import set_num_threads

    backend, arrays = Backend("cpu"), cast(sample, op, dtype)
    arrays = {"grad_output": grad_output_of(op, sample, dtype), **arrays}
    seen = set()
    try:
        for threads in (1, 2, 3, 7):
            set_num_threads(threads)
            out, grads = run_both(backend, op, arrays, sample.params)
            seen.add((out.tobytes(), *(grad.tobytes() for grad in grads.values())))
    finally:
        set_num_threads(None)
    assert len(seen) == 1


# ---------------------------------------------------------------- the checks themselves


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_a_gradient_that_is_one_percent_off_is_noticed(op: Op, sample: Sample) -> None:
    """What the tests above rest on: the bound is tight enough in every dtype."""
    for dtype in DTYPES:
        case = Case(op, sample, dtype, seed=0, wide_coordinates=False)
        for argument in case.arguments:
            gradient = case.reference(argument)
            assert relative_error(1.01 * gradient, gradient)[0] > case.bound(gradient.size), (dtype, argument)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_grows_with_the_root_of_the_length_and_stays_small(dtype: str) -> None:
    assert tolerance(dtype) <= tolerance(dtype, 10_000) <= 0.01
