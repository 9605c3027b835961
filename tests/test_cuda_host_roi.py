"""The CUDA kernels of the RoI operators on the CPU: what test_cuda_host.py does for those of deformable convolution."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_cuda_host as host
import test_properties
import test_roi_pool
from conftest import Backend, has_kernels
from cuda_host.host import SCHEDULES, HostDevice, Library
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_host import launcher

from dcn_kernels import OPS
from dcn_kernels.check.calls import output_shape, reduction_length, relative_error, tolerance
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES, accumulator

library, device, backend = host.library, host.device, host.backend  # the fixtures
pytestmark = pytest.mark.cuda_host

globals().update(host.backend_tests_of("roi_pool", "deform_roi_pool"))


@pytest.mark.parametrize(
    "test",
    [
        test_roi_pool.test_ties_go_to_the_first_and_a_nan_before_all,
        test_roi_pool.test_a_given_argmax_saves_the_search,
        test_roi_pool.test_coordinates_are_rounded_to_float32,
    ],
)
def test_of_named_backends(test: Callable[[str], None], backend: Backend) -> None:
    test(backend.name)


ROI_OPS = [op for op in OPS.values() if "rois" in op.arrays and has_kernels(op)]
ROWS = [pytest.param(op, id=op.name) for op in ROI_OPS]


def run_both(
    op: Op, sample: Sample, device: HostDevice, *, deterministic: bool = False, **options: Any
) -> dict[str, np.ndarray]:
    """Output and gradients straight from the launchers, with values that the public functions would refuse."""
    params = {**op.parameters(sample.params), "deterministic": deterministic}
    arrays = {name: sample.arrays.get(name) for name in op.arrays}
    y = launcher(op)(**arrays, **params, **options, device=device)
    grad = np.random.default_rng(7).standard_normal(y.shape)
    wrt = tuple(name for name in op.differentiable if arrays[name] is not None)
    grads = launcher(op, backward=True)(grad.astype(y.dtype), **arrays, **params, **options, wrt=wrt, device=device)
    return {"output": y, **grads}


# ---------------------------------------------------------------- drawn cases, under every way to run them


@st.composite
def poolings(draw: st.DrawFn) -> tuple[Op, Sample, str]:
    """A call of any RoI operator, on kinks or off them, with RoIs of every kind."""
    op, dtype = draw(st.sampled_from(ROI_OPS)), draw(st.sampled_from(list(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    N, R, (PH, PW) = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(test_properties.pairs(1, 4))
    # now and then more lines than a warp lists at a time
    H, W = (draw(st.one_of(st.integers(1, 12), st.integers(33, 50))) for _ in range(2))
    each, maps, classes = draw(st.sampled_from((1, 2, 3, 4, 8, 37, 40))), 1, 1
    scale = draw(st.sampled_from((1.0, 0.25, 0.1)))
    params: dict[str, Any] = {**op.samples(0)[0].params, "output_size": (PH, PW), "spatial_scale": scale}
    if op.name == "roi_pool":
        params["mode"] = draw(st.sampled_from(("max", "avg")))
    elif op.name == "ps_roi_pool":
        params["convention"] = draw(st.sampled_from(("rfcn", "torchvision")))
        group = PH * PW
        if params["convention"] == "rfcn":
            params["group_size"] = draw(st.integers(1, 3))
            group = params["group_size"] ** 2
        maps = group
    elif op.name in ("roi_align", "ps_roi_align"):
        params["sampling_ratio"] = draw(st.sampled_from((-1, 1, 2, 3)))
        if op.name == "roi_align":
            params["aligned"] = draw(st.booleans())
        else:
            maps = PH * PW
    elif op.name == "deform_roi_pool":
        params["convention"] = draw(st.sampled_from(("paper", "rfcn", "mmcv")))
        params["sampling_ratio"] = draw(st.integers(0, 3))
    elif op.name == "deform_ps_roi_pool":  # any other row: with the parameters of its first sample
        params["group_size"], params["part_size"] = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        params["sample_per_part"], classes = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        maps = params["group_size"] ** 2
    each = min(each, 400 // (maps * classes))  # the host is slow
    length = np.array([W, H]) / scale
    low = rng.uniform(-0.5, 1, (R, 2)) * length
    size = rng.uniform(-0.2, 1, (R, 2)) * length * rng.choice([0.2, 1, 3], (R, 1))
    corners = np.concatenate([low, low + size], axis=1)
    if draw(st.booleans()):
        corners = np.round(corners * 2) / 2  # on the kinks
    rois = np.concatenate([rng.integers(0, N, (R, 1)), corners], axis=1)
    arrays = {
        "input": draw(test_properties.arrays_of((N, each * maps * classes, H, W), dtype)),
        "rois": rois.astype(DTYPES[dtype]),
    }
    shapes = {
        "offset": (R, 2, PH, PW),
        "mask": (R, PH, PW),
        "trans": (R, 2 * classes, *(params.get("part_size", 1),) * 2),
    }
    for name in op.optional:
        if classes > 1 or draw(st.booleans()):
            arrays[name] = (np.round(rng.standard_normal(shapes[name]) * 16) / 8).astype(DTYPES[dtype])
    return op, Sample(arrays, params), dtype


@settings(host.DRAWN, max_examples=60)
@given(
    drawn=poolings(),
    how=host.devices(),
    deterministic=st.booleans(),
    workspace_bytes=st.sampled_from([1, 20_000, 64 << 20]),
)
def test_drawn_pooling_is_that_of_the_reference(
    library: Library, drawn: tuple[Op, Sample, str], how: dict[str, Any], deterministic: bool, workspace_bytes: int
) -> None:
    op, sample, dtype = drawn
    # the reference's values are float64, its coordinates of the same type as the kernels': no bin and no sample differs
    exact = {name: array.astype(accumulator(DTYPES[dtype])) for name, array in sample.arrays.items()}
    sizes, shape = output_shape(op, sample)
    grad = np.round(np.random.default_rng(9).standard_normal(shape) * 32) / 32
    reference = Backend("reference")
    want = {"output": reference.forward(op, exact, sample.params)}
    want |= reference.backward(op, {"grad_output": grad.astype(exact["input"].dtype), **exact}, sample.params)
    params = {**sample.params, "deterministic": deterministic}
    with pytest.MonkeyPatch.context() as patch:
        host.install(HostDevice(library, **how), patch, workspace_bytes=workspace_bytes)
        got = {"output": Backend(host.NAME).forward(op, sample.arrays, params)}
        given_arrays = {"grad_output": grad.astype(DTYPES[dtype]), **sample.arrays}
        got |= Backend(host.NAME).backward(op, given_arrays, params)
    for name, array in got.items():
        length = reduction_length(op, sizes, "forward" if name == "output" else "backward", array.size)
        error, index = relative_error(array, want[name])
        assert error <= tolerance(dtype, length), f"{op.name}: {name} at {index}: error {error:.3g}"


# ---------------------------------------------------------------- RoIs that are none


INVALID = [
    *((index, 0, 0, 3, 3) for index in (-1, 2, 0.5, np.nan, np.inf, -np.inf, 3e9)),
    *((0, *np.insert(np.arange(3.0), k, value)) for k in range(4) for value in (np.nan, np.inf, -np.inf)),
]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("op", ROWS)
def test_invalid_rois_give_nan_no_gradient_and_leave_the_others_alone(library: Library, op: Op, dtype: str) -> None:
    sample = max(op.samples(0), key=lambda sample: len(sample.arrays))
    arrays = {name: array.astype(DTYPES[dtype]) for name, array in sample.arrays.items()}
    R, bad = len(arrays["rois"]), len(INVALID)
    more = {
        name: np.concatenate([array[:1], np.resize(array, (bad, *array.shape[1:])), array[1:]])
        for name, array in arrays.items()
        if name != "input"
    }
    more["rois"][1 : 1 + bad] = INVALID
    valid = np.r_[0, 1 + bad : R + bad]
    for deterministic, workspace in ((False, 64 << 20), (True, 64 << 20), (False, 1)):
        options = {"deterministic": deterministic, "workspace_bytes": workspace}
        got = run_both(op, Sample({**arrays, **more}, sample.params), HostDevice(library), **options)
        assert np.isnan(got["output"][1 : 1 + bad].astype(float)).all()
        assert np.isfinite(got["output"][valid].astype(float)).all()
        for name in op.differentiable:
            if name in arrays:
                assert np.isfinite(got[name].astype(float)).all(), name
                if name != "input":
                    assert not got[name][1 : 1 + bad].any(), name
        alone = Sample(arrays, sample.params)
        assert np.array_equal(run_both(op, alone, HostDevice(library), **options)["output"], got["output"][valid])


def test_argmax_of_an_invalid_roi_is_none_and_a_wrong_argmax_adds_nothing(library: Library) -> None:
    image, rois = np.ones((1, 2, 4, 4), np.float32), np.array([[7, 0, 0, 3, 3], [0, 0, 0, 3, 3]], np.float32)
    params = {**OPS["roi_pool"].samples(0)[0].params, "output_size": (1, 1), "spatial_scale": 1.0}
    device = HostDevice(library)
    y, argmax = launcher(OPS["roi_pool"])(image, rois, **params, return_argmax=True, device=device)
    assert argmax.ravel().tolist() == [-1, -1, 0, 0] and np.isnan(y[0]).all() and (y[1] == 1).all()
    for deterministic in (False, True):
        params["deterministic"] = deterministic
        wrong = np.array([0, 0, 2**40, -7]).reshape(2, 2, 1, 1)
        run = functools.partial(launcher(OPS["roi_pool"], True), np.ones((2, 2, 1, 1), np.float32), image, rois, wrong)
        assert not run(**params, wrt=("input",), device=device)["input"].any()
        with pytest.raises(ValueError, match="roi_pool: argmax: expected indices"):
            run(**{**params, "validate": True}, wrt=("input",), device=device)


# ---------------------------------------------------------------- repeatable, within the workspace, all or nothing


def crowd(op: Op, channels: int = 8, dtype: str = "float32", images: int = 3) -> Sample:
    """Many RoIs over one another, with 2 x 2 bins and, where there are, shifts and masks."""
    rng = np.random.default_rng(5)
    R, maps = 12, 4 if op.name in ("ps_roi_pool", "ps_roi_align", "deform_ps_roi_pool") else 1
    low = rng.uniform(-2, 8, (R, 2))
    arrays = {
        "rois": np.concatenate([np.arange(R)[:, None] % min(images, 3), low, low + rng.uniform(1, 9, (R, 2))], axis=1),
        "offset": rng.standard_normal((R, 2, 2, 2)),
        "trans": rng.standard_normal((R, 2, 2, 2)),
        "mask": rng.random((R, 2, 2)),
        "input": rng.standard_normal((images, channels * maps, 11, 13)),
    }
    params: dict[str, Any] = {**op.samples(0)[0].params, "output_size": (2, 2), "spatial_scale": 1.0}
    arrays["input"][..., 5, 6] += 4  # the maximum of many bins
    return Sample({name: array.astype(DTYPES[dtype]) for name, array in arrays.items() if name in op.arrays}, params)


def test_deterministic_gradients_do_not_depend_on_the_order_of_threads(library: Library) -> None:
    told = []
    for op in ROI_OPS:
        sample, runs = crowd(op, images=1), {}
        for deterministic in (False, True):
            devices = (HostDevice(library, schedule=name, seed=i) for i, name in enumerate(SCHEDULES))
            runs[deterministic] = [run_both(op, sample, each, deterministic=deterministic) for each in devices]
        for name, first in runs[True][0].items():
            assert all(np.array_equal(run[name], first) for run in runs[True]), (op.name, name)
            assert name == "input" or all(np.array_equal(run[name], first) for run in runs[False]), (op.name, name)
        told.append((op.name, any(not np.array_equal(run["input"], runs[False][0]["input"]) for run in runs[False])))
    assert all(tells for _, tells in told), told  # the cases can tell: with atomics the order shows


@pytest.mark.parametrize("op", ROWS)
def test_temporary_memory_stays_within_the_workspace_and_changes_nothing(library: Library, op: Op) -> None:
    want, image_bytes = run_both(op, crowd(op), HostDevice(library)), crowd(op).arrays["input"][0].nbytes
    for workspace in (1024, 2 * image_bytes, 8 * image_bytes):
        for images in (3, 9):
            for deterministic in (False, True):
                device, sample = HostDevice(library), crowd(op, images=images)
                options = {"workspace_bytes": workspace, "deterministic": deterministic}
                got = run_both(op, sample, device, **options)
                used = sum(device.allocated) - sum(array.nbytes for array in got.values())
                assert used <= 2 * workspace, (workspace, images)  # forward and backward
                for name, array in got.items():
                    same = array[:3] if name == "input" else array
                    assert relative_error(same, want[name])[0] <= tolerance("float32", 16), (name, workspace)


@pytest.mark.parametrize("op", ROWS)
def test_nothing_is_written_when_memory_runs_out(library: Library, op: Op) -> None:
    sample = crowd(op)
    params = op.parameters(sample.params)
    arrays = {name: sample.arrays.get(name) for name in op.arrays}
    out = np.full(output_shape(op, sample)[1], 7, np.float32)
    device = host.OutOfMemory(library, 0)
    with pytest.raises(MemoryError):
        launcher(op)(**arrays, **params, out=out, device=device)
    assert (out == 7).all() and not device.launched
    wrt = tuple(name for name in op.differentiable if name in sample.arrays)
    for succeed in range(9):
        device = host.OutOfMemory(library, succeed)
        try:
            launcher(op, backward=True)(np.ones_like(out), **arrays, **params, wrt=wrt, device=device)
            break
        except MemoryError:
            assert not device.launched
    assert succeed >= 2


def test_channels_last_maps_are_read_in_place(library: Library) -> None:
    op, copies = OPS["roi_align"], []
    sample = crowd(op)
    for axes in ((0, 1, 2, 3), (0, 2, 3, 1)):
        laid = np.ascontiguousarray(sample.arrays["input"].transpose(axes)).transpose(np.argsort(axes))
        device = HostDevice(library)
        launcher(op)(laid, sample.arrays["rois"], **op.parameters(sample.params), device=device)
        copies.append(device.launched.count(("staging", "copy")))
    assert copies == [1, 0]


# ---------------------------------------------------------------- planted bugs: each is caught


@functools.cache
def wanted(op: Op) -> dict[str, np.ndarray]:
    """What the reference makes of a crowd."""
    sample, reference = crowd(op, images=1), Backend("reference")
    y = reference.forward(op, sample.arrays, sample.params)
    grad = np.random.default_rng(7).standard_normal(y.shape).astype(np.float32)
    return {"output": y, **reference.backward(op, {"grad_output": grad, **sample.arrays}, sample.params)}


def pools_are_right(library: Library) -> bool:
    """Crowds under every schedule, on few blocks, by atomics and without."""
    for op in (OPS["roi_pool"], OPS["deform_roi_pool"]):
        for i, schedule in enumerate(SCHEDULES):
            for deterministic in (False, True):
                device = HostDevice(library, schedule=schedule, max_blocks=2, capability=((9, 0), (7, 5))[i % 2])
                got = run_both(op, crowd(op, images=1), device, deterministic=deterministic)
                if any(not relative_error(got[n], wanted(op)[n])[0] <= tolerance("float32", 100) for n in got):
                    return False
    return True


IN_PROCESS = """
import sys
from pathlib import Path
import pytest
import test_cuda_host as host
import test_cuda_host_roi as t
library = host.Library(Path(sys.argv[1]), host.SANITIZER)
if len(sys.argv) > 3:
    host.plant(pytest.MonkeyPatch(), *sys.argv[3:6])
print("right" if getattr(t, sys.argv[2])(library) else "wrong")
"""

PLANTED = {
    # name: (file, the line, what stands there instead)
    "no barrier before a tile is read": ("roi_mean", "__syncthreads();  // the tile is there", ""),
    "no barrier before the lists are read": ("roi_mean", "__syncwarp();  // the lists are there", ""),
    "no barrier before the bins are read": ("roi_gather", "__syncthreads();  // all bins are listed", ""),
    "no barrier before weights are overwritten": ("roi_gather", "__syncthreads();  // the weights are used up", ""),
    "no barrier before maxima are overwritten": ("roi_pool", "__syncthreads();  // the tile is used up", ""),
    "a vector load that is not aligned": ("deform_roi_pool", "load<VEC>(input + (at", "load<VEC>(input + (1 + at"),
}


def test_without_a_planted_bug_the_pools_are_right(library: Library) -> None:
    result = host.run_in_a_process(library, IN_PROCESS, "pools_are_right")
    assert result.stdout == "right\n", result.stderr


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(library: Library, bug: str) -> None:
    result = host.run_in_a_process(library, IN_PROCESS, "pools_are_right", *PLANTED[bug])
    # poisoned shared memory may also be taken for an address
    assert result.stdout == "wrong\n" or result.returncode < 0, result.stdout + result.stderr


PLANTED_FOR_SANITIZERS = {
    # name: (sanitizer, file, the line, what stands there instead, what gives it away)
    "a missing atomic in a mean": (
        "thread",
        "roi_mean",
        "atomicAdd(to + i, values[i]);",
        "to[i] += values[i];",
        "data race",
    ),
    "a missing atomic in a maximum": (
        "thread",
        "roi_pool",
        "atomicAdd(grad_input + (",
        "[](acc_t* to, acc_t value) { *to += value; }(grad_input + (",
        "data race",
    ),
    "a missing barrier": ("thread", "roi_gather", "__syncthreads();  // the weights are used up", "", "data race"),
    "a line past the end": ("address", "roi_mean", "if (a.last > length) a.last = length;", "", "heap-buffer-overflow"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_without_a_planted_bug_sanitizers_say_nothing(library: Library, sanitizer: str) -> None:
    result = host.run_in_a_process(library, IN_PROCESS, "pools_are_right", sanitizer=sanitizer)
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED_FOR_SANITIZERS)
def test_planted_bug_is_caught_by_a_sanitizer(library: Library, bug: str) -> None:
    sanitizer, *change, sign = PLANTED_FOR_SANITIZERS[bug]
    result = host.run_in_a_process(library, IN_PROCESS, "pools_are_right", *change, sanitizer=sanitizer)
    assert sign in result.stderr, result.stdout + result.stderr[-4000:]


# ---------------------------------------------------------------- more than 2^31 elements


def large_map_is_right(library: Library) -> bool:
    """The last pixels of a map of 2.5e9, by a mean and a maximum, and their gradients."""
    side = 50_000
    image = host.sparse_zeros((1, 1, side, side), np.float32)
    image[0, 0, -2:, -2:] = [[1, 2], [3, 8]]
    box = np.array([[0, side - 2, side - 2, side - 1, side - 1]], np.float32)
    device, grad = host.SparseDevice(library), np.full((1, 1, 1, 1), 4, np.float32)
    common = {"output_size": (1, 1), "spatial_scale": 1.0, "device": device}
    y, argmax = launcher(OPS["roi_pool"])(image, box, mode="max", return_argmax=True, **common)
    if (y.item(), argmax.item()) != (8, side * side - 1):
        return False
    options = {**common, "deterministic": False, "wrt": ("input",)}
    for mode, last, most in (("max", 4, 0), ("avg", 1, 1)):
        grad_input = launcher(OPS["roi_pool"], True)(grad, image, box, mode=mode, **options)["input"]
        if (grad_input[0, 0, -1, -1], grad_input[0, 0, -1, -2]) != (last, most):
            return False
    options = {**common, "gamma": 0.1, "sampling_ratio": 1, "convention": "mmcv"}
    box = np.array([[0, side - 1.5, side - 1.5, side - 0.5, side - 0.5]], np.float32)
    offset = np.zeros((1, 2, 1, 1), np.float32)
    if launcher(OPS["deform_roi_pool"])(image, box, offset, None, **options).item() != 3.5:
        return False
    options |= {"deterministic": False, "wrt": ("offset",)}
    slopes = launcher(OPS["deform_roi_pool"], True)(grad, image, box, offset, None, **options)["offset"]
    return bool(np.allclose(slopes.ravel(), [4 * 0.1 * 3, 4 * 0.1 * 4]))


@pytest.mark.parametrize("kernel", ["none", "mean", "spread", "maximum", "offset_gradients"])
def test_index_of_32_bits_is_caught(library: Library, kernel: str) -> None:
    rows, grad = "(at + rows.line[i] * s.input_y", "(at + rows.line[i] * s.grad_y"
    planted = {
        "none": (),
        "mean": ("roi_mean", rows, "(at + int(rows.line[i] * s.input_y)"),
        "spread": ("roi_mean", grad, "(at + int(rows.line[i] * s.grad_y)"),
        "maximum": ("roi_pool", "(at + y * s.input_y", "(at + int(y * s.input_y)"),
        "offset_gradients": ("deform_roi_pool", rows, "(at + int(rows.line[i] * s.input_y)"),
    }[kernel]
    result = host.run_in_a_process(library, IN_PROCESS, "large_map_is_right", *planted)
    if kernel == "none":
        assert result.stdout == "right\n", result.stderr
    else:  # another element, or no memory at all
        assert result.stdout == "wrong\n" or result.returncode == -signal.SIGSEGV, result.stderr
