"""Calls that ask for more memory than there is: refused before any is touched, or an error that leaves nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from dcn_kernels import OPS
from dcn_kernels.check.calls import output_shape
from dcn_kernels.dispatch import memory
from dcn_kernels.dispatch.call import public
from dcn_kernels.dispatch.row import Op, Sample

MANY = {"R": 10**9, "N": 10**7}


def repeated(sample: Sample, op: Op, letter: str) -> dict[str, np.ndarray]:
    """The sample's arrays with the first image or RoI repeated: as often, in the memory of one."""
    arrays = {}
    for name, array in sample.arrays.items():
        first = op.arrays[name].split()[0] == letter
        arrays[name] = np.broadcast_to(array[:1], (MANY[letter], *array.shape[1:])) if first else array
    return arrays


CASES = [
    pytest.param(op, letter, id=f"{op.name}-{letter}")
    for op in OPS.values()
    for letter in (["R", "N"] if "rois" in op.arrays else ["N"])
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("op", "letter"), CASES)
def test_more_than_memory_holds_is_refused_at_once(op: Op, letter: str, backend: str, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free", lambda: 10**8)  # so that it is refused on every machine
    sample = op.samples(0)[0]
    _, shape = output_shape(op, sample)
    arrays = repeated(sample, op, letter)
    many = op.output.split()[0] == letter
    grad = np.broadcast_to(np.ones((1, *shape[1:])), (MANY[letter] if many else shape[0], *shape[1:]))
    refused = (
        rf"{op.name}: memory: expected at most the 0.1 GB that are free, got .* GB of .* {letter} = {MANY[letter]}"
    )
    calls = []
    if many:
        calls.append(lambda: public(op)(**arrays, **sample.params, backend=backend))
    if letter == "N":  # the gradients of so many RoIs may be small: that of one map
        function = public(op, "backward")
        calls.append(lambda: function(grad, **arrays, **sample.params, backend=backend))
    for call in calls:
        start = time.process_time()
        with pytest.raises(MemoryError, match=refused):
            call()
        assert time.process_time() - start < 1


@pytest.mark.parametrize("op", [op for op in OPS.values() if "rois" in op.arrays], ids=str)
def test_the_order_of_too_many_rois_is_refused(op: Op, monkeypatch) -> None:
    """Their gradient is that of one map, and `out` there already: what is left is the order in which they are taken."""
    monkeypatch.setattr(memory, "free", lambda: 10**8)
    monkeypatch.setattr(memory, "SMALL", 10**8)
    sample = op.samples(0)[0]
    _, shape = output_shape(op, sample)
    many = 5_000_000
    monkeypatch.setitem(MANY, "R", many)
    arrays = repeated(sample, op, "R")
    grad = np.broadcast_to(np.ones((1, *shape[1:])), (many, *shape[1:]))
    with pytest.raises(MemoryError, match=f"{op.name}: memory: .* got .* GB of .* R = {many}"):
        public(op, "backward")(grad, **arrays, **sample.params, wrt="input", backend="cpu")


def test_what_is_free_is_known_and_believed() -> None:
    there = memory.free()
    if there is None:
        pytest.skip("this system does not say how much memory is free")
    assert 0 < there < 1 << 50
    memory.check(memory.SMALL - 1, "small")
    with pytest.raises(MemoryError, match=r"expected at most the .* GB that are free, got 1125899.9 GB of results"):
        memory.check(1 << 50, "results")
    with pytest.raises(MemoryError, match="what; N = 1"):
        raise memory.said("op", MemoryError("what"), {"N": 1})


def in_a_process_of_its_own(text: str) -> str:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIMITED = """
import gc, resource, tracemalloc
import numpy as np
import dcn_kernels
from dcn_kernels import OPS
from dcn_kernels.check.calls import output_shape
from dcn_kernels.cpu import threads
from dcn_kernels.dispatch.call import public

def held(field="VmRSS"):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

threads.set_num_threads(2)
image = np.random.default_rng(0).standard_normal((1, 8, 400, 400)).astype(np.float32)
rois = np.array([[0, 0, 0, 300, 300]] * 3, np.float32)
offset = np.zeros((1, 18, 400, 400), np.float32)
weight = np.ones((8, 8, 3, 3), np.float32)
grad = np.ones((1, 8, 400, 400), np.float32)
many = np.broadcast_to(rois[:1], (300_000, 5))
calls = [
    (lambda: dcn_kernels.deform_conv2d(image, offset, weight, padding=1),
     lambda: dcn_kernels.deform_conv2d(np.broadcast_to(image, (90, 8, 400, 400)),
                                       np.broadcast_to(offset, (90, 18, 400, 400)), weight, padding=1)),
    (lambda: dcn_kernels.deform_conv2d_backward(grad, image, offset, weight, padding=1)["input"],
     lambda: dcn_kernels.deform_conv2d_backward(np.broadcast_to(grad, (90, 8, 400, 400)),
                                                np.broadcast_to(image, (90, 8, 400, 400)),
                                                np.broadcast_to(offset, (90, 18, 400, 400)), weight, padding=1)),
    (lambda: dcn_kernels.offset_sample2d(image, offset[:, :2]),
     lambda: dcn_kernels.offset_sample2d(np.broadcast_to(image, (90, 8, 400, 400)),
                                         np.broadcast_to(offset[:, :2], (90, 2, 400, 400)))),
    (lambda: dcn_kernels.roi_align(image, rois, 7),
     lambda: dcn_kernels.roi_align(image, many, 7)),
    (lambda: dcn_kernels.roi_pool(image, rois, 7),
     lambda: dcn_kernels.roi_pool(image, many, 7)),
]
for small, large in calls:
    small()
expected = [small() for small, _ in calls]

def failures():
    for (small, large), want in zip(calls, expected):
        try:
            large()
        except MemoryError as error:
            assert ": memory: " in str(error), error
        else:
            raise AssertionError("there was memory")
        np.testing.assert_array_equal(small(), want)

resource.setrlimit(resource.RLIMIT_AS, (held("VmSize") + (100 << 20),) * 2)
failures()
gc.collect()
tracemalloc.start()
failures()
before, resident = tracemalloc.get_traced_memory()[0], held()
for _ in range(20):
    failures()
gc.collect()
print(tracemalloc.get_traced_memory()[0] - before, held() - resident)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_an_error_for_want_of_memory_leaves_all_usable_and_nothing_behind() -> None:
    traced, resident = map(int, in_a_process_of_its_own(LIMITED).split())
    assert traced < 100_000  # of 100 failures, each of results or workspace of megabytes
    assert resident < 4_000_000
