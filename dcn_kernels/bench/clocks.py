"""How long a call takes and what it allocates: the wall clock of a CPU, the events of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from dcn_kernels import environment


class CpuClock:
    """Times and memory of calls that are done when they return."""

    start_ms: tuple[float, ...] = ()  # a call is done when it returns: no time apart for starting it

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Of one call."""
        start = perf_counter()
        run()
        return 1e3 * (perf_counter() - start)

    first_milliseconds = milliseconds

    def cold_milliseconds(self, run: Callable[[], Any]) -> list[float]:
        """No times: caches of a CPU are left as they are."""
        return []

    def temporary_bytes(self, run: Callable[[], Any]) -> int | None:
        """What one call allocates besides its results."""
        if environment.why_not("cpu"):
            return None
        from dcn_kernels.cpu.workspace import track

        with track() as tracked:
            run()
        return tracked.peak_bytes


class CudaClock:
    """Times by CUDA events on CuPy's current stream, memory by the peak of a pool of its own.

    A GPU that waits for the next launch would have the launches timed, not the kernels. So work that takes it longer
    than the CPU takes to start the call goes ahead: a buffer twice as large as the second-level cache is overwritten,
    as often as that takes. This also empties the cache; a warm time has one call more between it and the clock.
    """

    LEAD_MS = 0.05  # of work ahead, beyond what the launches take
    MOST_AHEAD = 500  # a GPU's queue is not endless

    def __init__(self) -> None:
        self._buffer: Any = None
        self._overwrite_ms = 0.0
        self.start_ms: list[float] = []  # the CPU's share of each call: checks, and starting the kernels

    def first_milliseconds(self, run: Callable[[], Any]) -> float:
        """Of one call by the wall, until the GPU is done: with all that is compiled in it."""
        import cupy

        begin = perf_counter()
        run()
        cupy.cuda.get_current_stream().synchronize()
        return 1e3 * (perf_counter() - begin)

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Of the GPU in one call, right after another."""
        return self._timed(run, run)

    def cold_milliseconds(self, run: Callable[[], Any]) -> list[float]:
        """The same with none of the call's arrays in the second-level cache."""
        return [self._timed(run, lambda: None)]

    def _timed(self, run: Callable[[], Any], before: Callable[[], Any]) -> float:
        import cupy

        self._keep_busy(3 * self.start_ms[-1] if self.start_ms else 0.0)
        before()
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        begin = perf_counter()
        run()
        self.start_ms.append(1e3 * (perf_counter() - begin))
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end))

    def _keep_busy(self, milliseconds: float) -> None:
        import cupy

        if self._buffer is None:
            number = cupy.cuda.runtime.getDevice()
            size = 2 * cupy.cuda.runtime.getDeviceProperties(number)["l2CacheSize"]
            self._buffer = cupy.empty(max(size, 32 << 20), cupy.uint8)
            for _ in range(2):  # the first may take longer
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record()
                self._overwrite()
                end.record()
                end.synchronize()
                self._overwrite_ms = float(cupy.cuda.get_elapsed_time(start, end))
        often = 1 + int((milliseconds + self.LEAD_MS) / max(self._overwrite_ms, 1e-3))
        for _ in range(min(often, self.MOST_AHEAD)):
            self._overwrite()

    def _overwrite(self) -> None:
        import cupy

        self._buffer.data.memset_async(0, self._buffer.nbytes, cupy.cuda.get_current_stream())

    def temporary_bytes(self, run: Callable[[], Any]) -> int | None:
        """What a pool that starts empty holds after one call, less the results: it gives nothing back meanwhile."""
        import cupy

        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            result = run()
            cupy.cuda.get_current_stream().synchronize()
            if isinstance(result, dict):
                result = tuple(result.values())
            results = result if isinstance(result, tuple) else (result,)
            return max(0, pool.total_bytes() - sum(array.nbytes for array in results))


def clock(backend: str) -> CpuClock | CudaClock:
    """The clock of a backend."""
    return CudaClock() if backend == "cuda" else CpuClock()


@contextmanager
def threads_set(threads: int | None) -> Iterator[int]:
    """Within, the CPU backend uses so many threads; yields how many that is."""
    if environment.why_not("cpu"):
        yield threads or environment.cores()
        return
    from dcn_kernels.cpu.threads import get_num_threads, set_num_threads

    if threads is None:
        yield get_num_threads()
        return
    set_num_threads(threads)
    try:
        yield threads
    finally:
        set_num_threads(None)
