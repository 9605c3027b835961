"""What the GPU's clock and memory meter do, on a GPU made of two numbers: when the CPU and when the GPU are done."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dcn_kernels.bench import clocks, gpu_ceiling, record

CACHE = 50 << 20


class Machine:
    """CuPy's part of it. Times in milliseconds; work of the GPU starts once the CPU has asked for it."""

    def __init__(self) -> None:
        self.cpu = self.gpu = 0.0
        self.cached = ""  # what the second-level cache holds
        self.allocator: Any = None
        self.pools: list[Any] = []
        machine = self

        class Event:
            def record(self) -> None:
                self.at = machine.gpu = max(machine.gpu, machine.cpu)

            def synchronize(self) -> None:
                machine.cpu = max(machine.cpu, self.at)

        class MemoryPool:
            def __init__(self) -> None:
                self.held = 0
                machine.pools.append(self)

            def malloc(self, nbytes: int) -> None:
                self.held += nbytes

            def total_bytes(self) -> int:
                return self.held

        @contextmanager
        def using_allocator(allocator: Any) -> Any:
            self.allocator = allocator
            yield
            self.allocator = None

        def synchronize() -> None:
            self.cpu = max(self.cpu, self.gpu)

        def empty(size: int, dtype: Any) -> SimpleNamespace:
            def memset_async(value: int, nbytes: int, stream: Any) -> None:
                assert nbytes == size
                self.work(0.02, 0.005)
                if nbytes > CACHE:
                    self.cached = ""

            return SimpleNamespace(nbytes=size, data=SimpleNamespace(memset_async=memset_async))

        self.cupy = SimpleNamespace(
            empty=empty,
            uint8=np.uint8,
            cuda=SimpleNamespace(
                Event=Event,
                MemoryPool=MemoryPool,
                using_allocator=using_allocator,
                get_current_stream=lambda: SimpleNamespace(synchronize=synchronize),
                get_elapsed_time=lambda start, end: end.at - start.at,
                runtime=SimpleNamespace(getDevice=lambda: 0, getDeviceProperties=lambda number: {"l2CacheSize": CACHE}),
            ),
        )

    def work(self, of_gpu: float, of_cpu: float) -> None:
        """A launch: the CPU's time to ask for it, and the GPU's to do it."""
        self.cpu += of_cpu
        self.gpu = max(self.gpu, self.cpu) + of_gpu

    def call(self) -> None:
        """Ten kernels, each started far more slowly than it runs; slower with a cold cache."""
        for _ in range(10):
            self.work(0.03 if self.cached == "ours" else 0.05, 0.2)
        self.cached = "ours"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """In the place of CuPy and of the clock on the wall."""
    found = Machine()
    monkeypatch.setitem(sys.modules, "cupy", found.cupy)
    monkeypatch.setattr(clocks, "perf_counter", lambda: found.cpu / 1e3)
    return found


def test_times_are_the_gpus_alone_and_cold_ones_are_cold(machine: Machine) -> None:
    ticks = clocks.CudaClock()
    ticks.milliseconds(machine.call)  # how long the CPU takes is not known before
    for _ in range(3):
        assert ticks.milliseconds(machine.call) == pytest.approx(10 * 0.03)
        assert ticks.cold_milliseconds(machine.call) == pytest.approx([10 * 0.05])
    assert ticks.start_ms[1:] == pytest.approx([10 * 0.2] * 6), "and the CPU's share is known by itself"


def test_first_call_is_timed_by_the_wall(machine: Machine) -> None:
    def compiles_and_runs() -> None:
        machine.cpu += 700
        machine.call()

    assert clocks.CudaClock().first_milliseconds(compiles_and_runs) == pytest.approx(702, abs=1)


def test_temporary_memory_is_the_pools_peak_without_the_results(machine: Machine) -> None:
    results = {
        "array": np.zeros(100, np.uint8),
        "tuple": (np.zeros(100, np.uint8), np.zeros(20, np.uint8)),
        "dict": {"input": np.zeros(100, np.uint8), "offset": np.zeros(7, np.uint8)},
    }
    for name, size in (("array", 100), ("tuple", 120), ("dict", 107)):

        def run(name: str = name, size: int = size) -> Any:
            for nbytes in (4096, 512, size):
                machine.allocator(nbytes)
            return results[name]

        assert clocks.CudaClock().temporary_bytes(run) == 4096 + 512
    assert machine.allocator is None


def test_record_shows_cold_times_and_starts_where_there_are_some() -> None:
    row = dict.fromkeys(record.ROW_FIELDS, "x") | {
        "threads": 1, "median_ms": 1.0, "quartiles_ms": [1.0, 1.0], "samples_ms": [1.0], "gflops": 1.0, "gbytes_s": 1.0,
        "ceiling_share": 0.5, "plain_ratio": 1.0, "temp_bytes": 1, "compile_ms": 1.0, "against": {},
    }  # fmt: skip
    for cold, start in ((None, None), (1.25, 0.125)):
        columns, rows, _ = record.cells({"rows": [row | {"cold_ms": cold, "start_ms": start}]})
        shown = dict(zip(columns, rows[0], strict=True))
        assert (shown.get("cold ms"), shown.get("start ms")) == ((None, None) if cold is None else ("1.25", "0.125"))


def test_a_gpu_s_ceiling_is_of_the_products_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied = []

    class Clock:
        def milliseconds(self, run: Any) -> float:
            run()
            return 2.0

    def array(shape: Any, dtype: Any) -> SimpleNamespace:
        return SimpleNamespace(shape=shape, dtype=dtype, nbytes=1 << 28, copy=lambda: None)

    def matmul(a: Any, b: Any, c: Any) -> None:
        multiplied.append((a.shape, b.shape, c.shape, a.dtype, c.dtype))

    cupy = SimpleNamespace(uint8=np.uint8, ones=array, empty=array, matmul=matmul)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(gpu_ceiling, "CudaClock", Clock)
    found = gpu_ceiling.measure("bfloat16", ((3, 5, 6, 7), (1, 2, 3, 4)))
    assert found == {"gflops": 4096**3 / 1e6, "gbytes_s": (1 << 28) / 1e6, "products_ms": [6.0, 2.0]}
    assert ((5, 6), (6, 7), (5, 7), "float16", "float16") in multiplied  # CuPy multiplies no bfloat16
    multiplied.clear()
    assert gpu_ceiling.products_ms("float32", ((1, 2, 3, 4),)) == [2.0]
    assert set(multiplied) == {((2, 3), (3, 4), (2, 4), "float32", "float32")}
