"""What only a GPU can show: streams, devices, memory, accuracy of the matrix units. The table tests run there too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import has_kernels
from cuda_host import primitives, small_calls

from dcn_kernels import OPS, deform_conv2d, deform_conv2d_backward, offset_sample2d_backward
from dcn_kernels.check.calls import relative_error, tolerance
from dcn_kernels.cuda import compile
from dcn_kernels.cuda.device import current
from dcn_kernels.dispatch import arrays as _arrays
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op
from dcn_kernels.environment import why_not
from dcn_kernels.ops.deform_conv import DEFORM_CONV2D
from dcn_kernels.ops.offset_sample import OFFSET_SAMPLE2D

if why_not("cuda"):
    pytest.skip(f"cuda: {why_not('cuda')}", allow_module_level=True)

import cupy

pytestmark = pytest.mark.cuda


def layer(dtype: Any = np.float32, N: int = 4, C: int = 64, H: int = 38, W: int = 63) -> dict[str, Any]:
    """A 3 x 3 layer on the GPU."""
    rng = np.random.default_rng(0)
    arrays = {
        "input": rng.standard_normal((N, C, H, W)),
        "offset": rng.standard_normal((N, 2 * 9, H, W)) * 2,
        "weight": rng.standard_normal((C, C, 3, 3)),
        "mask": rng.random((N, 9, H, W)),
        "bias": rng.standard_normal(C),
    }
    return {name: cupy.asarray(array.astype(dtype)) for name, array in arrays.items()}


@pytest.mark.parametrize("vectors", [False, True])
def test_instructions_that_the_stand_in_emulates_are_those_of_the_hardware(vectors: bool) -> None:
    """The same kernel, the same numbers bit for bit, as test_cuda_host.py has from the CPU."""
    if vectors and not current().vector_atomics:
        pytest.skip("cuda: no atomics of 16 bytes before sm_90")

    def launch(flags: dict[str, Any], args: tuple[Any, ...]) -> None:
        options = ("-std=c++17", *compile.definitions({**flags, "VECTOR_ATOMICS": vectors}))
        module = cupy.RawModule(code=primitives.source(), options=options, backend="nvrtc")
        args = tuple(np.uintp(0) if arg is None else arg for arg in args)
        module.get_function("primitives")((primitives.BLOCKS,), (primitives.THREADS,), args)

    results = primitives.run(launch, cupy.asarray)
    primitives.compare({name: array.get() for name, array in results.items()})


@pytest.fixture
def memory_by_the_array() -> Iterator[None]:
    """No pool: what is read or written beyond an array is no other array's."""
    cupy.cuda.set_allocator(None)
    yield
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


def test_every_kernel_on_small_calls(memory_by_the_array: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make gpu-sanitize` runs."""
    honest, run = compile.kernel, set()

    def kernel(stem: str, flags: compile.Flags, name: str) -> Any:
        run.add((stem, name))
        return honest(stem, flags, name)

    monkeypatch.setattr(compile, "kernel", kernel)
    small_calls.run("cuda")
    assert run == small_calls.every_kernel()


@pytest.mark.parametrize("op", [DEFORM_CONV2D, OFFSET_SAMPLE2D], ids=lambda op: op.name)
def test_deterministic_gradients_are_the_same_bits_every_time(op: Any) -> None:
    arrays = layer()
    grad_output = cupy.asarray(np.random.default_rng(1).standard_normal(arrays["input"].shape).astype(np.float32))
    runs = []
    for _ in range(5):
        if op is DEFORM_CONV2D:
            grads = deform_conv2d_backward(grad_output, **arrays, padding=1, deterministic=True)
        else:
            offset = arrays["offset"][:, :2].copy()
            grads = offset_sample2d_backward(grad_output, arrays["input"], offset, deterministic=True)
        runs.append({name: grad.get() for name, grad in grads.items()})
    for run in runs[1:]:
        for name, grad in run.items():
            assert np.array_equal(grad, runs[0][name]), name


def regions(op: Op, N: int = 2, dtype: Any = np.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and parameters of 300 regions over one another, 7 x 7 bins, on the GPU."""
    rng, R, P = np.random.default_rng(3), 300, 7
    low = rng.uniform(-2, 50, (R, 2))
    maps = P * P if "ps_roi" in op.name else 1
    arrays = {
        "rois": np.concatenate([rng.integers(0, N, (R, 1)), low, low + rng.uniform(1, 30, (R, 2))], axis=1),
        "offset": rng.standard_normal((R, 2, P, P)),
        "trans": rng.standard_normal((R, 2, P, P)),
        "mask": rng.random((R, P, P)),
        "input": rng.standard_normal((N, (64 if maps == 1 else 4) * maps, 38, 63)),
    }
    params = {**op.samples(0)[0].params, "output_size": (P, P), "spatial_scale": 1.0}
    return {name: cupy.asarray(array.astype(dtype)) for name, array in arrays.items() if name in op.arrays}, params


ROI_OPS = [pytest.param(op, id=op.name) for op in OPS.values() if "rois" in op.arrays and has_kernels(op)]


@pytest.mark.parametrize("op", ROI_OPS)
def test_pooling_gradients_are_those_of_the_reference_and_repeatable(op: Op) -> None:
    arrays, params = regions(op)
    out = call(op, "forward", arrays, params)
    grad_output = cupy.asarray(np.random.default_rng(1).standard_normal(out.shape).astype(np.float32))
    given = {"grad_output": grad_output, **arrays}
    host = {name: array.get() for name, array in given.items()}
    want = call(op, "backward", host, params, backend="cpu")
    runs = [call(op, "backward", given, {**params, "deterministic": True}) for _ in range(5)]
    for name, grad in call(op, "backward", given, params).items():
        assert relative_error(grad.get(), want[name])[0] <= tolerance("float32", 1000), name
        assert relative_error(runs[0][name].get(), want[name])[0] <= tolerance("float32", 1000), name
        assert all(np.array_equal(run[name].get(), runs[0][name].get()) for run in runs), name


@pytest.mark.parametrize("op", ROI_OPS)
def test_invalid_regions_are_not_read_back(op: Op) -> None:
    """NaN for them alone, without an error, unless it is asked for."""
    arrays, params = regions(op)
    arrays["rois"][5, 0], arrays["rois"][7, 2] = 9, np.nan
    invalid = cupy.isnan(call(op, "forward", arrays, params)).all(axis=(1, 2, 3)).get()
    assert np.flatnonzero(invalid).tolist() == [5, 7]
    with pytest.raises(ValueError, match=f"{op.name}: rois: expected"):
        call(op, "forward", arrays, {**params, "validate": True})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_temporary_memory_stays_within_the_workspace(dtype: Any, deterministic: bool) -> None:
    """By the pool, which rounds each of some ten blocks up to 512 bytes."""
    workspace = 8 << 20

    def temporary_bytes(backward: bool, N: int) -> int:
        arrays = layer(dtype, N=N)
        grad_output = cupy.ones_like(arrays["input"])

        def run() -> dict[str, Any]:
            if not backward:
                return {"output": deform_conv2d(**arrays, padding=1, workspace_bytes=workspace)}
            options = {"workspace_bytes": workspace, "deterministic": deterministic}
            return deform_conv2d_backward(grad_output, **arrays, padding=1, **options)

        run()
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            results = run()
            return pool.total_bytes() - sum(array.nbytes for array in results.values())

    for backward in (False, True):
        for N in (4, 16):
            assert temporary_bytes(backward, N) <= workspace + (64 << 10)


@pytest.mark.parametrize("op", ROI_OPS)
def test_pooling_is_captured_in_a_graph(op: Op) -> None:
    """Which no synchronisation survives, and replayed on new numbers."""
    arrays, params = regions(op)
    stream, out = cupy.cuda.Stream(non_blocking=True), call(op, "forward", arrays, params)
    cupy.cuda.Device().synchronize()  # the stream does not wait for what made the arrays
    with stream:
        call(op, "forward", arrays, params, out=out)  # compiles, and fills the pool
        stream.synchronize()
        stream.begin_capture()
        call(op, "forward", arrays, params, out=out)
        graph = stream.end_capture()
        arrays["input"][...] = cupy.flip(arrays["input"], 3).copy()
        out.fill(0)
        graph.launch(stream)
        stream.synchronize()
    assert np.array_equal(out.get(), call(op, "forward", arrays, params).get())


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolution_gradients_are_captured_in_a_graph(deterministic: bool) -> None:
    """Which no synchronisation survives, and replayed on new numbers."""
    arrays, stream = layer(), cupy.cuda.Stream(non_blocking=True)
    grad_output = cupy.ones_like(arrays["input"])

    def run() -> dict[str, Any]:
        return deform_conv2d_backward(grad_output, **arrays, padding=1, deterministic=deterministic)

    run()
    cupy.cuda.Device().synchronize()  # the stream does not wait for what made the arrays
    with stream:
        run()  # compiles, and fills the pool
        stream.synchronize()
        stream.begin_capture()
        grads = run()
        graph = stream.end_capture()
        grad_output[...] = cupy.flip(arrays["input"], 3)
        graph.launch(stream)
        stream.synchronize()
        replayed = {name: grad.get() for name, grad in grads.items()}
        for name, want in run().items():
            # without `deterministic` the order of grad_input's additions is another each time
            close = {} if deterministic or name != "input" else {"rtol": 1e-4, "atol": 1e-4}
            np.testing.assert_allclose(replayed[name], want.get(), **(close or {"rtol": 0}))


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolution_runs_on_the_callers_stream_without_a_synchronisation(deterministic: bool) -> None:
    """On a stream that is held up: the calls come back all the same."""
    arrays, stream, gate = layer(), cupy.cuda.Stream(non_blocking=True), threading.Event()
    grad_output = cupy.ones_like(arrays["input"])

    def both() -> Any:
        deform_conv2d_backward(grad_output, **arrays, padding=1, deterministic=deterministic)
        return deform_conv2d(**arrays, padding=1)

    want = both().get()
    cupy.cuda.Device().synchronize()  # the stream does not wait for what made the arrays
    with stream:
        both()  # fills the pool
        stream.synchronize()
        stream.launch_host_func(lambda _: gate.wait(20), None)
        try:
            out = both()
            held_up = not stream.done
        finally:
            gate.set()
        stream.synchronize()
    assert held_up and np.array_equal(out.get(), want)


def test_float32_is_as_exact_as_a_plain_product() -> None:
    """Over 4608 terms: at most 4 times the error of plain float32; TF32 is far beyond."""
    arrays = layer(N=1, C=512, H=20, W=20)
    arrays["offset"][...] = 0  # samples are then exact, and the product's error is all there is
    arrays["mask"][...] = 1
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    want = deform_conv2d(**exact, padding=1).get()
    errors = {
        precision: np.abs(deform_conv2d(**arrays, padding=1, precision=precision).get() - want).max()
        for precision in ("float32", "ieee", "tf32")
    }
    assert errors["float32"] <= 4 * errors["ieee"], errors


def test_more_than_2_31_elements() -> None:
    side = 47_000
    if cupy.cuda.runtime.memGetInfo()[0] < 14e9:
        pytest.skip("cuda: less than 14 GB free")
    image = cupy.zeros((1, 1, side, side), np.float16)
    image[0, 0, -1, -1], image[0, 0, -2, -1] = 16, 32
    offset = cupy.full((1, 2, 2, 2), -0.25, np.float16)
    y = deform_conv2d(image, offset, cupy.ones((1, 1, 1, 1), np.float16), stride=side - 1)
    assert y.get()[0, 0, 1, 1] == 16 * 0.75**2 + 32 * 0.25 * 0.75


def test_arrays_of_two_devices_are_an_error_and_another_device_works() -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("cuda: one GPU alone")
    arrays = layer()
    want = deform_conv2d(**arrays, padding=1).get()
    with cupy.cuda.Device(1):
        other = {name: cupy.asarray(array.get()) for name, array in arrays.items()}
    out = deform_conv2d(**other, padding=1)
    assert out.device.id == 1 and np.array_equal(out.get(), want)
    with pytest.raises(TypeError, match=r"cuda:0.*cuda:1|cuda:1.*cuda:0"):
        deform_conv2d(**{**arrays, "weight": other["weight"]}, padding=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_arrays_on_the_gpu(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    tensors = {name: torch.as_tensor(array.get()).cuda().to(kind) for name, array in layer(N=1).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = deform_conv2d(**tensors, padding=1)
        grads = deform_conv2d_backward(torch.ones_like(y), **tensors, padding=1)
    stream.synchronize()
    assert y.is_cuda and y.dtype == kind
    assert all(grads[name].shape == tensors[name].shape and grads[name].is_cuda for name in grads)
    exact = {name: tensor.double().cpu().numpy() for name, tensor in tensors.items()}
    want = deform_conv2d(**exact, padding=1, backend="reference")
    assert relative_error(y.double().cpu().numpy(), want)[0] <= np.sqrt(2) * tolerance(dtype, 576)


def test_backend_is_chosen_by_the_arrays() -> None:
    assert _arrays.framework_of(layer()["input"]) == "cupy"
    with pytest.raises(ValueError, match="'cpu' cannot work on arrays on cuda:0"):
        deform_conv2d(**layer(), padding=1, backend="cpu")
