"""The CUDA kernels on the CPU: compiled by g++ from the same text, started by the same launchers (tests/cuda_host).

The tests of the other backends are run again, with the kernels as a backend called "cuda_host"; then come schedules,
planted bugs, and what only GPU code has: workspaces, vector widths, 64-bit addresses.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import test_properties
from conftest import Backend, assert_close, has_kernels, skip_without_kernels
from cuda_host import primitives, small_calls
from cuda_host.host import SCHEDULES, HostDevice, Library, call, missing
from hypothesis import given, settings
from hypothesis import strategies as st

import dcn_kernels
from dcn_kernels.check.calls import output_shape, reduction_length, relative_error, tolerance
from dcn_kernels.cuda import compile
from dcn_kernels.dispatch import arrays as _arrays
from dcn_kernels.dispatch.call import function, module_of, parameters_for
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES, HALVES
from dcn_kernels.ops.deform_conv import BORDERS, DEFORM_CONV2D
from dcn_kernels.ops.offset_sample import OFFSET_SAMPLE2D

NAME = "cuda_host"
SANITIZER = os.environ.get("HOST_SANITIZER", "")
pytestmark = pytest.mark.cuda_host


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Library:
    """Compiled kernels, kept from run to run under a hash of all that went into them."""
    if missing():
        pytest.skip(missing())
    return Library(Path(pytestconfig.cache.mkdir("cuda_host")), SANITIZER)


@pytest.fixture
def device(library: Library) -> HostDevice:
    """One stand-in for a GPU."""
    return HostDevice(library)


@pytest.fixture
def backend(device: HostDevice, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The kernels as a backend that the public functions take by name."""
    skip_without_kernels(request)
    install(device, monkeypatch)
    yield Backend(NAME)


def install(device: HostDevice, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Put the launchers, on this device and with more options, where the dispatcher looks for a backend's functions."""
    monkeypatch.setattr(_arrays, "BACKENDS", (*_arrays.BACKENDS, NAME))
    for op in dcn_kernels.OPS.values():
        if not has_kernels(op):
            continue
        path = module_of(op, NAME)
        module = sys.modules.get(path, ModuleType(path))
        launcher = import_module(module_of(op, "cuda"))
        for name in (op.name, f"{op.name}_backward"):
            setattr(module, name, functools.partial(getattr(launcher, name), device=device, **options))
        folder = path.removesuffix(f".{op.module}")
        monkeypatch.setitem(sys.modules, folder, ModuleType(folder))
        monkeypatch.setitem(sys.modules, path, module)


def launcher(op: Op, backward: bool = False) -> Any:
    """The launcher of a row, given the parameters that the dispatcher would give it."""
    direction = "backward" if backward else "forward"
    kernels = function(op, direction, "cuda")

    def launch(*arrays: Any, **named: Any) -> Any:
        return kernels(*arrays, **parameters_for(op, direction, "cuda", named))

    return launch


# Differences of every element; the drawn cases compare the same gradients with the reference's.
LONG = {"test_ops_gradients_are_those_of_the_forward"}


def _slow(test: Any) -> Any:
    """The test under the marker slow, here alone."""

    @functools.wraps(test)
    def of_this_module(*args: Any, **kwargs: Any) -> None:
        test(*args, **kwargs)

    of_this_module.pytestmark = [*getattr(test, "pytestmark", ()), pytest.mark.slow]  # type: ignore[attr-defined]
    return of_this_module


def backend_tests_of(*stems: str) -> dict[str, Any]:
    """The tests of modules that take a backend; collected elsewhere, they get the backend of there."""
    found = {}
    for stem in stems:
        for name, test in vars(import_module(f"test_{stem}")).items():
            if name.startswith("test_") and "backend" in inspect.signature(test).parameters:
                name = f"test_{stem}_{name.removeprefix('test_')}"
                found[name] = _slow(test) if name in LONG else test
    return found


globals().update(backend_tests_of("ops", "deform_conv", "offset_sample", "sampling"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_the_stand_in_emulates_is_what_cuda_says(library: Library, schedule: str) -> None:
    def launch(flags: compile.Flags, args: tuple[Any, ...]) -> None:
        library.runtime.host_set_schedule(SCHEDULES[schedule], 0)
        call(library.entry(primitives.source(), flags, "primitives"), primitives.BLOCKS, primitives.THREADS, args)

    primitives.compare(primitives.run(launch, lambda array: array))


def test_small_calls_run_every_kernel(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """So compute-sanitizer, which runs them on a GPU, sees every kernel."""
    install(device, monkeypatch)
    small_calls.run(NAME)
    assert set(device.launched) == small_calls.every_kernel()


# ---------------------------------------------------------------- drawn cases, under every way to run them


@st.composite
def devices(draw: st.DrawFn) -> dict[str, Any]:
    """A GPU to stand in for: schedule, architecture, and how little fits on it."""
    return {
        "schedule": draw(st.sampled_from(list(SCHEDULES))),
        "seed": draw(st.integers(0, 99)),
        "capability": draw(st.sampled_from([(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])),
        "max_blocks": draw(st.sampled_from([1, 2, 5, 1000])),
        "cache_bytes": draw(st.sampled_from([1 << 20, 48 << 20])),
    }


def agrees_with_the_reference(
    library: Library, op: Op, sample: Sample, dtype: str, how: dict[str, Any], **more: Any
) -> None:
    """Output and all gradients are those of the float64 reference, under `how` and with the parameters `more`."""
    sample = dataclasses.replace(sample, params={**sample.params, **more})
    sizes, shape = output_shape(op, sample)
    exact = {name: array.astype(np.float64) for name, array in sample.arrays.items()}
    grad = np.round(np.random.default_rng(9).standard_normal(shape) * 32) / 32
    reference = Backend("reference")
    want = {"output": reference.forward(op, exact, sample.params)}
    want |= reference.backward(op, {"grad_output": grad, **exact}, sample.params)
    with pytest.MonkeyPatch.context() as patch:
        install(HostDevice(library, **how), patch)
        got = {"output": Backend(NAME).forward(op, sample.arrays, sample.params)}
        grad = grad.astype(DTYPES[dtype])
        got |= Backend(NAME).backward(op, {"grad_output": grad, **sample.arrays}, sample.params)
    # in half precision the samples too are rounded, before the product: one rounding more
    slack = np.sqrt(2) if DTYPES[dtype] in HALVES else 1
    for name, array in got.items():
        length = reduction_length(op, sizes, "forward" if name == "output" else "backward", array.size)
        error, index = relative_error(array, want[name])
        assert error <= slack * tolerance(dtype, length), f"{name} at {index}: error {error:.3g}"


DRAWN = settings(test_properties.RELAXED, max_examples=40)


@DRAWN
@given(
    drawn=test_properties.convolutions(),
    how=devices(),
    deterministic=st.booleans(),
    precision=st.sampled_from(["float32", "ieee"]),
    workspace_bytes=st.sampled_from([None, 1, 40_000]),
)
def test_drawn_deform_conv2d_is_that_of_the_reference(
    library: Library, drawn: tuple[Sample, str], how: dict[str, Any], **more: Any
) -> None:
    agrees_with_the_reference(library, DEFORM_CONV2D, *drawn, how, **more)


@DRAWN
@given(drawn=test_properties.resamplings(), how=devices(), deterministic=st.booleans())
def test_drawn_offset_sample2d_is_that_of_the_reference(
    library: Library, drawn: tuple[Sample, str], how: dict[str, Any], **more: Any
) -> None:
    agrees_with_the_reference(library, OFFSET_SAMPLE2D, *drawn, how, **more)


@pytest.mark.slow
@settings(DRAWN, max_examples=1000)
@given(
    drawn=test_properties.convolutions(),
    how=devices(),
    deterministic=st.booleans(),
    precision=st.sampled_from(["float32", "ieee"]),
    workspace_bytes=st.sampled_from([None, 1, 40_000]),
)
@pytest.mark.nightly
def test_many_drawn_deform_conv2d_are_those_of_the_reference(
    library: Library, drawn: tuple[Sample, str], how: dict[str, Any], **more: Any
) -> None:
    agrees_with_the_reference(library, DEFORM_CONV2D, *drawn, how, **more)


SPECIAL = [np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, 1.0, -1.0, 2.5, 6.0, -6.0, 7.0, 3e9]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_special_coordinates_are_those_of_the_reference(
    library: Library, border: str, dtype: str, deterministic: bool
) -> None:
    for op in (DEFORM_CONV2D, OFFSET_SAMPLE2D):
        sample = max(op.samples(0), key=lambda sample: sample.arrays["input"].size)
        arrays = {name: array.astype(DTYPES[dtype]) for name, array in sample.arrays.items()}
        rng = np.random.default_rng(3)
        arrays["offset"] = rng.choice(SPECIAL, arrays["offset"].shape).astype(DTYPES[dtype])
        sample = dataclasses.replace(sample, arrays=arrays, params={**sample.params, "border": border})
        agrees_with_the_reference(library, op, sample, dtype, {}, deterministic=deterministic)


@pytest.mark.parametrize("border", BORDERS)
def test_nan_masks_are_those_of_the_reference(library: Library, border: str) -> None:
    """0 * NaN is NaN: also of a sample outside, and at y = -1, where the border taps of a zero offset lie."""
    arrays, params = layer(border=border)
    rng = np.random.default_rng(0)
    arrays["mask"].reshape(-1)[rng.choice(arrays["mask"].size, 40, replace=False)] = np.nan
    for spread in (0, 4):
        few = {**arrays, "offset": arrays["offset"] * np.float32(spread)}
        for deterministic in (False, True):
            agrees_with_the_reference(
                library, DEFORM_CONV2D, Sample(few, params), "float32", {}, deterministic=deterministic
            )


def test_infinite_numbers_go_through_split_products_as_through_plain_ones(library: Library) -> None:
    """In the sum of three products infinity meets no 0 that is none of the numbers'."""
    arrays, params = layer()
    arrays["offset"][...] = 0.25
    arrays["input"][0, 3, 5, 6], arrays["weight"][2, 1, 0, 0] = np.inf, -np.inf
    plain, split = (
        launcher(DEFORM_CONV2D)(**arrays, **{**params, "precision": precision}, device=HostDevice(library))
        for precision in ("ieee", "float32")
    )
    for kind in (np.isnan, np.isposinf, np.isneginf):
        assert np.array_equal(kind(split), kind(plain)), kind.__name__
    assert np.isposinf(plain).any() and np.isneginf(plain).any()


# ---------------------------------------------------------------- repeatable, within the workspace, all or nothing


def layer(channels: int = 16, dtype: str = "float32", **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and parameters of a 3 x 3 layer in which samples of many pixels share cells."""
    rng = np.random.default_rng(2)
    N, O, H, W = 3, 8, 12, 13
    arrays = {
        "input": rng.standard_normal((N, channels, H, W)),
        "offset": rng.standard_normal((N, 2 * 2 * 9, H, W)) * 2,
        "weight": rng.standard_normal((O, channels, 3, 3)),
        "mask": rng.random((N, 2 * 9, H, W)),
        "bias": rng.standard_normal(O),
    }
    params = {**DEFORM_CONV2D.samples(0)[0].params, "stride": 1, "padding": 1, "dilation": 1, **more}
    params = DEFORM_CONV2D.parameters(params)
    return {name: array.astype(DTYPES[dtype]) for name, array in arrays.items()}, params


def gradients(device: HostDevice, arrays: dict[str, Any], params: dict[str, Any]) -> dict[str, np.ndarray]:
    """All gradients on a device."""
    N, O, (OH, OW) = arrays["input"].shape[0], arrays["weight"].shape[0], arrays["offset"].shape[2:]
    grad = np.random.default_rng(4).standard_normal((N, O, OH, OW)).astype(arrays["input"].dtype)
    names = DEFORM_CONV2D.differentiable
    return launcher(DEFORM_CONV2D, True)(grad, **arrays, **params, wrt=names, device=device)


def test_deterministic_gradients_do_not_depend_on_the_order_of_threads(library: Library) -> None:
    arrays, params = layer()
    runs = {}
    for deterministic in (False, True):
        params = {**params, "deterministic": deterministic}
        runs[deterministic] = [
            gradients(HostDevice(library, schedule=schedule, seed=i), arrays, params)
            for i, schedule in enumerate(SCHEDULES)
        ]
    for name in DEFORM_CONV2D.differentiable:
        assert all(np.array_equal(run[name], runs[True][0][name]) for run in runs[True]), name
    # the case can tell: with atomics the order shows
    assert any(not np.array_equal(run["input"], runs[False][0]["input"]) for run in runs[False])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("workspace_bytes", [100_000, 200_000, 1_000_000])
def test_temporary_memory_stays_within_the_workspace(
    library: Library, workspace_bytes: int, deterministic: bool, dtype: str
) -> None:
    if deterministic:
        workspace_bytes += 600_000  # the sort's counts
    arrays, params = layer(dtype=dtype, workspace_bytes=workspace_bytes, deterministic=deterministic)
    for scale in (1, 4):  # and does not grow with the number of images
        many = {n: np.concatenate([a] * scale) if n in ("input", "offset", "mask") else a for n, a in arrays.items()}
        device = HostDevice(library)
        if scale > 1:
            many["weight"] = many["weight"].transpose(0, 1, 3, 2)  # read where it stands
        y = launcher(DEFORM_CONV2D)(**many, **params, device=device)
        assert sum(device.allocated) - y.nbytes <= workspace_bytes
        device = HostDevice(library)
        grads = gradients(device, many, params)
        assert sum(device.allocated) - sum(grad.nbytes for grad in grads.values()) <= workspace_bytes


def test_every_workspace_gives_the_same_result(library: Library) -> None:
    for dtype in ("float64", "float16"):
        arrays, params = layer(dtype=dtype)
        want = gradients(HostDevice(library), arrays, params)
        for workspace_bytes in (1, 30_000, 60_000, 150_000, 400_000):
            params["workspace_bytes"] = workspace_bytes
            device = HostDevice(library)
            y = launcher(DEFORM_CONV2D)(**arrays, **params, device=device)
            assert_close(y, Backend("reference").forward(DEFORM_CONV2D, arrays, params), dtype, 1e3)
            for name, grad in gradients(device, arrays, params).items():
                assert_close(grad, want[name], dtype, 1e3, f"{name} within {workspace_bytes}")


def test_channels_last_input_is_read_in_place(library: Library) -> None:
    arrays, params = layer()
    held = []
    for axes in ((0, 1, 2, 3), (0, 2, 3, 1)):
        inverse = np.argsort(axes)
        arrays["input"] = np.ascontiguousarray(arrays["input"].transpose(axes)).transpose(inverse)
        device = HostDevice(library)
        launcher(DEFORM_CONV2D)(**arrays, **params, device=device)
        gradients(device, arrays, {**params, "deterministic": False})
        held.append(sum(device.allocated))
    assert held[1] == held[0] - 2 * arrays["input"].nbytes, "the copy of the images is left out, in both directions"


class OutOfMemory(HostDevice):
    """A GPU on which only so many allocations succeed."""

    def __init__(self, library: Library, succeed: int) -> None:
        super().__init__(library)
        self.succeed = succeed

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if self.succeed == 0:
            raise MemoryError
        self.succeed -= 1
        return super().empty(shape, dtype)


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_is_written_when_memory_runs_out(library: Library, deterministic: bool) -> None:
    arrays, params = layer(deterministic=deterministic)
    shape = (3, 8, 12, 13)
    for succeed in range(20):
        device, out = OutOfMemory(library, succeed), np.full(shape, 7, np.float32)
        try:
            launcher(DEFORM_CONV2D)(**arrays, **params, device=device, out=out)
            break
        except MemoryError:
            assert np.all(out == 7) and not device.launched
    assert succeed == 2, "packed weights and staged images"
    for succeed in range(20):
        device = OutOfMemory(library, succeed)
        try:
            gradients(device, arrays, params)
            break
        except MemoryError:
            assert not device.launched
    assert succeed >= 8


def test_split_products_are_as_exact_as_float32(library: Library) -> None:
    arrays, params = layer(channels=128, dtype="float32")
    want = Backend("reference").forward(DEFORM_CONV2D, {n: a.astype(np.float64) for n, a in arrays.items()}, params)
    errors = {}
    for precision in ("float32", "ieee", "tf32"):
        y = launcher(DEFORM_CONV2D)(**arrays, **{**params, "precision": precision}, device=HostDevice(library))
        errors[precision] = np.abs(y - want).max() / np.abs(want).max()
    assert errors["float32"] <= 4 * errors["ieee"] < errors["tf32"] / 100


# ---------------------------------------------------------------- planted bugs: each is caught


PLANTED = {
    # name: (file, the line, what stands there instead, what gives it away)
    "no barrier in the transposition": ("staging", "__syncthreads();  // the tile is there", "", "wrong"),
    "a barrier that not all threads reach": (
        "deform_conv_backward",
        "__syncthreads();  // the columns' gradient is used up",
        "if (threadIdx.x < 40) __syncthreads();",
        "__syncthreads()",
    ),
    "a vector load that is not aligned": (
        "deform_conv_backward",
        "corner = load<V>(from);",
        "corner = load<V>(from + 1);",
        "a vector access is not aligned",
    ),
    "a pointer advanced inside the grid-stride loop": (
        "staging",
        "const index_t across = (s.C",
        "source_0 += nth > 0; const index_t across = (s.C",
        "wrong",
    ),
    "a grid that goes round once": (
        "deform_conv_backward",
        "tile < tiles; tile += gridDim.x",
        "tile < tiles; tile += tiles",
        "wrong",
    ),
}


def plant(monkeypatch: pytest.MonkeyPatch, stem: str, line: str, instead: str) -> None:
    """Change a kernel file's text (with its headers), in all places where the line stands."""
    honest = compile.source

    def source(name: str) -> str:
        text = honest(name)
        if name == stem:
            assert line in text, f"{stem}.cu has changed: {line!r} is not in it"
            text = text.replace(line, instead)
        return text

    monkeypatch.setattr(compile, "source", source)


def layer_is_right(library: Library) -> bool:
    """Forward and gradients of a layer under every schedule, on few blocks."""
    arrays, params = layer(dtype="float32")
    want = Backend("reference").forward(DEFORM_CONV2D, arrays, params)
    for schedule, capability in zip(SCHEDULES, ((9, 0), (7, 5)) * 2, strict=True):
        device = HostDevice(library, schedule=schedule, capability=capability, max_blocks=2)
        y = launcher(DEFORM_CONV2D)(**arrays, **params, device=device)
        if not relative_error(y, want)[0] <= tolerance("float32", 144):
            return False
        for name, grad in gradients(device, arrays, params).items():
            if not relative_error(grad, _reference_gradients()[name])[0] <= tolerance("float32", 1000):
                return False
    return True


@functools.cache
def _reference_gradients() -> dict[str, np.ndarray]:
    arrays, params = layer(dtype="float32")
    grad = np.random.default_rng(4).standard_normal((3, 8, 12, 13)).astype(np.float32)
    return Backend("reference").backward(DEFORM_CONV2D, {"grad_output": grad, **arrays}, params)


def run_in_a_process(library: Library, code: str, *arguments: str, sanitizer: str = "") -> subprocess.CompletedProcess:
    """Python code beside this module, in a process that may end in an abort."""
    environment = {**os.environ, "HOST_SANITIZER": sanitizer, "PYTHONPATH": str(Path(__file__).parent)}
    if sanitizer:
        name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        environment["LD_PRELOAD"] = found.stdout.strip()
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
        environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
        environment["TSAN_OPTIONS"] = "report_signal_unsafe=0:exitcode=66:ignore_noninstrumented_modules=1"
        environment["OPENBLAS_NUM_THREADS"] = environment["OMP_NUM_THREADS"] = "1"
    no_core = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"  # an abort is what some wait for
    command = [sys.executable, "-c", no_core + code, str(library.cache), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


PLANT_AND_RUN = """
import sys
from pathlib import Path
import pytest
import test_cuda_host as t
library = t.Library(Path(sys.argv[1]), t.SANITIZER)
if len(sys.argv) > 2:
    t.plant(pytest.MonkeyPatch(), *sys.argv[2:5])
print("right" if t.layer_is_right(library) else "wrong")
"""


def test_without_a_planted_bug_the_layer_is_right(library: Library) -> None:
    result = run_in_a_process(library, PLANT_AND_RUN)
    assert result.stdout == "right\n", result.stderr


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(library: Library, bug: str) -> None:
    *change, sign = PLANTED[bug]
    result = run_in_a_process(library, PLANT_AND_RUN, *change)
    assert sign in (result.stdout if sign == "wrong" else result.stderr), result.stdout + result.stderr


PLANTED_FOR_SANITIZERS = {
    # name: (sanitizer, file, the line, what stands there instead, what gives it away)
    "a missing atomic": (
        "thread",
        "deform_conv_backward",
        "atomicAdd(to + i, values[i]);",
        "to[i] += values[i];",
        "data race",
    ),
    "a missing barrier": (
        "thread",
        "deform_conv_backward",
        "__syncthreads();  // the columns' gradient is used up",
        "",
        "data race",
    ),
    "a read past the end": (
        "address",
        "deform_conv_backward",
        "at.inside_y1 = near && at.y + 1 < height;",
        "at.inside_y1 = near;",
        "heap-buffer-overflow",
    ),
    "a shared array that is too short": (
        "address",
        "sums",
        "SHARED(acc_t, of_warp, [THREADS / 32]);",
        "SHARED(acc_t, of_warp, [THREADS / 32 - 1]);",
        "out of bounds",
    ),
    "a shift that is not defined": (
        "address",
        "deform_conv_backward",
        "at.flags >> q & 1);",
        "at.flags >> (q + 32) & 1);",
        "shift exponent",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_without_a_planted_bug_sanitizers_say_nothing(library: Library, sanitizer: str) -> None:
    result = run_in_a_process(library, PLANT_AND_RUN, sanitizer=sanitizer)
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED_FOR_SANITIZERS)
def test_planted_bug_is_caught_by_a_sanitizer(library: Library, bug: str) -> None:
    sanitizer, *change, sign = PLANTED_FOR_SANITIZERS[bug]
    result = run_in_a_process(library, PLANT_AND_RUN, *change, sanitizer=sanitizer)
    assert sign in result.stderr, result.stdout + result.stderr[-4000:]


# ---------------------------------------------------------------- more than 2^31 elements


class SparseDevice(HostDevice):
    """Takes large memory from the system as zeros that cost nothing until they are touched."""

    LARGE = 1 << 30

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if np.prod(shape, dtype=np.int64) < self.LARGE:
            return super().empty(shape, dtype)
        return sparse_zeros(shape, dtype)

    @classmethod
    def clear(cls, array: np.ndarray) -> None:
        if array.size < cls.LARGE:
            super().clear(array)


def sparse_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros in memory that is there only where it is touched."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype).reshape(shape)


def large_image_is_right(library: Library) -> bool:
    """Four outputs that sample the corners of an image of 2.5e9 pixels, and their gradients."""
    side = 50_000
    arrays = {"input": sparse_zeros((1, 1, side, side), np.float32), "offset": np.zeros((1, 2, 2, 2), np.float32)}
    arrays["offset"] -= 0.25
    arrays["input"][0, 0, -1, -1], arrays["input"][0, 0, -2, -1], arrays["input"][0, 0, 0, 0] = 16, 32, 8
    arrays |= {"weight": np.full((1, 1, 1, 1), 2, np.float32), "mask": None, "bias": None}
    params = DEFORM_CONV2D.parameters({**DEFORM_CONV2D.samples(0)[0].params, "stride": side - 1, "padding": 0})
    device = SparseDevice(library)
    y = launcher(DEFORM_CONV2D)(**arrays, **params, device=device)
    if y.ravel().tolist() != [2 * 8 * 0.75**2, 0, 0, 2 * (16 * 0.75**2 + 32 * 0.25 * 0.75)]:
        return False
    grad = np.full((1, 1, 2, 2), 4, np.float32)
    names = ("input", "offset", "weight")
    grads = launcher(DEFORM_CONV2D, True)(grad, **arrays, **params, wrt=names, device=device)
    slope_y = 8 * (0.75 * (16 - 32))  # between the last two rows, by the weights of the last two columns
    slope_x = 8 * (0.75 * 16 + 0.25 * 32)
    return (
        grads["input"][0, 0, -1, -1] == 8 * 0.75**2
        and grads["input"][0, 0, -2, -2] == 8 * 0.25**2
        and grads["offset"][0, :, 1, 1].tolist() == [slope_y, slope_x]
        and grads["weight"].item() == 4 * y.sum() / 2
    )


LARGE = "import sys; from pathlib import Path; import pytest; import test_cuda_host as t\n" + (
    "library = t.Library(Path(sys.argv[1]))\n"
    "if len(sys.argv) > 2: t.plant(pytest.MonkeyPatch(), *sys.argv[2:5])\n"
    "print('right' if t.large_image_is_right(library) else 'wrong')"
)


@pytest.mark.parametrize("kernel", ["none", "forward", "gradients: reads", "gradients: writes"])
def test_index_of_32_bits_is_caught(library: Library, kernel: str) -> None:
    planted = {
        "none": (),
        "forward": (
            "deform_conv_forward",
            "= sample.image * s.input_n + at.y * s.input_y",
            "= int(sample.image * s.input_n + at.y * s.input_y)",
        ),
        "gradients: reads": ("deform_conv_backward", "(at.cell + c * s.input_c", "(int(at.cell) + c * s.input_c"),
        "gradients: writes": ("deform_conv_backward", "(at.grad_cell + c", "(int(at.grad_cell) + c"),
    }[kernel]
    result = run_in_a_process(library, LARGE, *planted)
    if kernel == "none":
        assert result.stdout == "right\n", result.stderr
    else:  # another element, or no memory at all
        assert result.stdout == "wrong\n" or result.returncode == -signal.SIGSEGV, result.stderr
