"""Temporary memory of the CPU kernels: what they report, its bounds, and that the process really takes no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dcn_kernels import deform_conv2d, deform_conv2d_backward
from dcn_kernels.cpu.threads import set_num_threads
from dcn_kernels.cpu.workspace import track
from dcn_kernels.dtypes import DTYPES

MB = 1_000_000
BOUNDS = {"forward": 18 * MB, "backward": 24 * MB}  # at the paper's conv5: 512 channels, 38x63, a 3x3 kernel
PER_THREAD = 2 * MB


def arguments(N: int, C: int, H: int, W: int, O: int, dtype: str = "float32") -> tuple[dict, dict]:
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])

    arrays = {
        "input": drawn(N, C, H, W),
        "offset": drawn(N, 18, H, W),
        "weight": drawn(O, C, 3, 3),
        "bias": drawn(O),
        "mask": drawn(N, 9, H, W),
    }
    return arrays, {"padding": 2, "dilation": 2}


def run(direction: str, arrays: dict, params: dict) -> dict[str, np.ndarray]:
    if direction == "forward":
        return {"out": deform_conv2d(**arrays, **params, backend="cpu")}
    N, _, H, W = arrays["input"].shape
    grad = np.ones((N, len(arrays["weight"]), H, W), arrays["input"].dtype)
    return deform_conv2d_backward(grad, **arrays, **params, backend="cpu")


def reported(direction: str, *sizes: int, dtype: str = "float32", threads: int = 2) -> int:
    arrays, params = arguments(*sizes, dtype=dtype)
    try:
        set_num_threads(threads)
        with track() as tracked:
            run(direction, arrays, params)
    finally:
        set_num_threads(None)
    return tracked.peak_bytes


CONV5 = (1, 512, 38, 63, 512)


@pytest.mark.parametrize("direction", BOUNDS)
def test_temporary_memory_at_conv5_is_bounded_with_two_megabytes_for_each_further_thread(direction: str) -> None:
    one, two, four = (reported(direction, *CONV5, threads=threads) for threads in (1, 2, 4))
    assert 0 < two <= BOUNDS[direction]
    assert two - one <= PER_THREAD
    assert four - two <= 2 * PER_THREAD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", BOUNDS)
def test_temporary_memory_does_not_grow_with_the_number_of_images(direction: str, dtype: str) -> None:
    """Small images are staged several at a time, so it is the same from where such a chunk is full."""
    sizes = 16, 150, 150, 8
    eight, sixteen, thirty = (reported(direction, N, *sizes, dtype=dtype) for N in (8, 16, 30))
    assert eight == sixteen == thirty


@pytest.mark.parametrize("direction", BOUNDS)
def test_temporary_memory_of_a_batch_of_conv5_is_bounded_as_that_of_one_image(direction: str) -> None:
    assert reported(direction, 3, *CONV5[1:]) <= BOUNDS[direction]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", BOUNDS)
def test_column_buffer_is_never_held(direction: str, dtype: str) -> None:
    """On a large map the columns alone, C*K*OH*OW, would be nine images."""
    C, H, W = 32, 160, 160
    columns = C * 9 * H * W * (8 if dtype == "float64" else 4)
    assert reported(direction, 1, C, H, W, 8, dtype=dtype) < columns / 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("direction", BOUNDS)
def test_process_grows_by_what_is_reported(direction: str) -> None:
    """A fresh process, after a small call of the same kind; its peak is reset before the call."""
    code = f"import json, test_memory; print(json.dumps(test_memory.growth_of_this_process({direction!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["reported"] <= BOUNDS[direction]
    slack = 2 * MB  # of the allocator and of Python itself
    assert figures["grown"] <= figures["reported"] + figures["result"] + slack, figures
    assert figures["grown"] >= 0.5 * figures["reported"], figures  # the peak was really seen


def growth_of_this_process(direction: str) -> dict[str, int]:
    """What one call at conv5 reports, its result's size, and how far the process's peak rose, in bytes."""
    small, params = arguments(1, 48, 11, 13, 40)
    run(direction, small, params)
    large, params = arguments(*CONV5)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak starts again at what is held now
    before = _status("VmRSS")
    with track() as tracked:
        result = run(direction, large, params)
    grown = _status("VmHWM") - before
    grad_output = large["input"].nbytes if direction == "backward" else 0
    size = sum(array.nbytes for array in result.values()) + grad_output
    return {"reported": tracked.peak_bytes, "result": size, "grown": grown}


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
