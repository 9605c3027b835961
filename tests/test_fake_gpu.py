"""The real CuPy and the launchers on a GPU that is not there (cuda_host/fake_gpu.py), each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT
from cuda_host import fake_gpu

if find_spec("cupy") is None:
    pytest.skip("CuPy is not installed", allow_module_level=True)
if fake_gpu.missing():
    pytest.skip(fake_gpu.missing(), allow_module_level=True)

PYTHON = [sys.executable, "tests/cuda_host/python_with_fake_gpu.py"]


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.cache.mkdir("cuda_host"))


def run(cache: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FAKE_GPU_CACHE": cache, "CUPY_ACCELERATORS": ""}
    done = subprocess.run(
        [*PYTHON, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    if check:
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done


# The files whose tests with the mark cuda call every operator, and how many of these there are at least.
FILES = [
    ("test_errors.py", 70),
    ("test_offset_sample.py", 30),
    ("test_deform_roi_pool.py", 30),
    pytest.param("test_deform_conv.py", 100, marks=pytest.mark.slow),
    pytest.param("test_roi_pool.py", 130, marks=pytest.mark.slow),
    pytest.param("test_sampling.py", 400, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("file", "least"), FILES)
def test_what_is_marked_cuda_passes(cache: str, file: str, least: int) -> None:
    done = run(cache, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda and not slow", f"tests/{file}")
    passed, skipped = (int(n[1]) if (n := re.search(rf"(\d+) {what}", done.stdout)) else 0 for what in ("passed", "sk"))
    assert passed >= least and not skipped, done.stdout[-600:]


@pytest.mark.slow
def test_every_kernel_runs_by_the_launchers(cache: str) -> None:
    done = run(cache, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py", "-k", "every_kernel")
    assert "1 passed" in done.stdout


def test_gradients_are_checked(cache: str) -> None:
    command = "from dcn_kernels.cli.check import main; main()"
    done = run(cache, "-c", command, "gradients", "--backend", "cuda", "--op", "deform_roi_pool", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) >= 4 and {row["status"] for row in rows} == {"PASS"}


CLOCK = """
import cupy, numpy as np
from dcn_kernels import roi_align
from dcn_kernels.bench.clocks import clock
input, rois, ticks = cupy.asarray(np.ones((1, 1, 4, 4), "f")), cupy.asarray([[0, 0, 0, 3, 3]], "f"), clock("cuda")
call = lambda: roi_align(input, rois, 2)
times = [ticks.first_milliseconds(call), ticks.milliseconds(call), *ticks.cold_milliseconds(call)]
print(all(time > 0 for time in times), len(ticks.start_ms), ticks.temporary_bytes(call) % 512)
"""


def test_the_clock_of_a_gpu_times_a_call(cache: str) -> None:
    """By events, cold and warm; what the times are means nothing."""
    assert run(cache, "-c", CLOCK).stdout.split() == ["True", "2", "496"]  # a pool's block of 512, less 4 numbers


ON_A_STREAM = """
import cupy, numpy as np
from cuda_host import fake_gpu
from dcn_kernels import roi_align
gpu = fake_gpu.GPU
input, rois = cupy.asarray(np.ones((1, 1, 4, 4), "f")), cupy.asarray([[0, 0, 0, 3, 3]], "f")
roi_align(input, rois, 2)
with cupy.cuda.Stream(non_blocking=True) as stream:
    del gpu.log[:]
    result = roi_align(input, rois, 2)
    print(sorted({event.stream == stream.ptr for event in gpu.log}), [event.what for event in gpu.log])
with cupy.cuda.Device(1):
    other = [cupy.asarray(array.get()) for array in (input, rois)]
result = roi_align(*other, 2)
print(result.device.id, cupy.cuda.Device().id, result.get().tolist() == np.ones((1, 1, 2, 2)).tolist())
try:
    roi_align(input, other[1], 2)
except TypeError as error:
    print(error)
"""


def test_work_goes_to_the_current_stream_and_the_arrays_device(cache: str) -> None:
    streams, device, error = run(cache, "-c", ON_A_STREAM).stdout.splitlines()
    assert streams.startswith("[True] ['launch'"), streams
    assert device == "1 0 True"
    assert error == "roi_align: rois: expected an array on cuda:0 as input is, got one on cuda:1"


def test_a_kernel_that_does_not_compile_ends_the_process(cache: str) -> None:
    """An exception cannot go through CuPy's C code: better than going on with a result that nobody wrote."""
    text = "import cupy; cupy.RawModule(code='KERNEL(wrong, 32)() { nothing; }').get_function('wrong')((1,), (1,), ())"
    done = run(cache, "-c", text, check=False)
    assert done.returncode == 70 and "nothing" in done.stderr
