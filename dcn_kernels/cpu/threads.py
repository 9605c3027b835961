"""Run one compiled worker on several threads at once.

Threads are plain Python threads: the workers hold no GIL. Unlike Numba's own pools this needs no threading library,
may be called from several Python threads, and survives a fork. A worker is called as
``worker(thread, threads, sync, *args)``; inside, `claim` hands out the next piece of work and `barrier` waits for all.
What a worker writes must not depend on which thread claimed which piece: then results are the same, bit by bit, at
every number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from dcn_kernels.cpu.jit import inner, intrinsic, spliced

_WAITING, _GENERATION, _CLAIMED = 0, 8, 16  # each on a cache line of its own
_SYNC_SIZE = 24
FLOPS_A_THREAD = 4e6


@intrinsic
def _atomic_add(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """array[index] += value; returns what it was."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", builder.gep(struct.data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def _atomic_load(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index], read afresh."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.load_atomic(builder.gep(struct.data, [args[1]]), "seq_cst", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def _give_way(typingctx):  # type: ignore[no-untyped-def]
    """Let another thread have this core."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(_declare(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _declare(module: ir.Module, kind: ir.FunctionType, name: str) -> ir.Function:
    return module.globals.get(name) or ir.Function(module, kind, name)


@spliced
def claim(sync):  # type: ignore[no-untyped-def]
    """The number of the next piece of work of this phase, from 0; the caller stops when there are no more."""
    return _atomic_add(sync, _CLAIMED, 1)


@inner
def barrier(threads, sync):  # type: ignore[no-untyped-def]
    """Wait until all threads are here; claims start at 0 again."""
    generation = _atomic_load(sync, _GENERATION)
    if _atomic_add(sync, _WAITING, 1) == threads - 1:
        _atomic_add(sync, _CLAIMED, -_atomic_load(sync, _CLAIMED))
        _atomic_add(sync, _WAITING, -threads)
        _atomic_add(sync, _GENERATION, 1)
        return
    spins = 0
    while _atomic_load(sync, _GENERATION) == generation:
        spins += 1
        if spins > 200:
            _give_way()


# ---------------------------------------------------------------- from Python


class _Helper:
    """A thread that waits for workers to run."""

    def __init__(self) -> None:
        self.todo: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], list[Any], SimpleQueue[None]]] = SimpleQueue()
        threading.Thread(target=self._loop, name="dcn-kernels", daemon=True).start()

    def _loop(self) -> None:
        while True:
            worker, args, finished, wake = self.todo.get()
            try:
                worker(*args)
                failure = None
            except BaseException as error:  # carried to the caller
                failure = error
            del worker, args  # their arrays are the caller's to free
            finished.append(failure)
            wake.put(None)


def _wait(finished: list[Any], started: int, wake: SimpleQueue[None]) -> None:
    """Wait for all started threads, also through an interrupt: they still write the caller's arrays."""
    interrupt = None
    while True:
        try:
            while len(finished) < started:
                wake.get()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


_helpers: list[_Helper] = []
_team = threading.Lock()
_threads: int | None = None


def _after_fork() -> None:
    """Threads do not survive a fork: start anew in the child."""
    global _team
    _helpers.clear()
    _team = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def get_num_threads() -> int:
    """How many threads a CPU kernel uses: `set_num_threads`, else DCN_NUM_THREADS, else the cores of this process."""
    if _threads is not None:
        return _threads
    setting = os.environ.get("DCN_NUM_THREADS")
    if setting:
        if not setting.isdigit() or int(setting) < 1:
            raise ValueError(f"DCN_NUM_THREADS: expected a number of threads of at least 1, got {setting!r}")
        return int(setting)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(flops: float, available: int | None = None) -> int:
    """How many threads a call of so much arithmetic is worth: waking one takes as long as a few million operations."""
    return int(min(available or get_num_threads(), 1 + flops // FLOPS_A_THREAD))


def set_num_threads(threads: int | None) -> None:
    """Use this many threads in all later calls of this process; None goes back to the default."""
    global _threads
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"set_num_threads: threads: expected at least 1 or None, got {threads!r}")
    _threads = threads


def run(worker: Callable[..., Any], threads: int, *args: Any) -> None:
    """Run `worker(thread, threads, sync, *args)` on `threads` threads and wait for all.

    The threads are one team: a call that comes while it is busy runs on its caller's thread alone.
    """
    sync = np.zeros(_SYNC_SIZE, np.int64)
    if threads == 1 or not _team.acquire(blocking=False):
        worker(0, 1, sync, *args)
        return
    try:
        while len(_helpers) < threads - 1:
            _helpers.append(_Helper())
        team = [helper.todo for helper in _helpers[: threads - 1]]
        finished: list[BaseException | None] = []
        wake: SimpleQueue[None] = SimpleQueue()
        jobs = [(worker, (thread, threads, sync, *args), finished, wake) for thread in range(1, threads)]
        started: list[None] = []
        try:
            started.extend(map(SimpleQueue.put, team, jobs))  # one step to an interrupt: all threads start, or none
            if started:
                worker(0, threads, sync, *args)
        finally:
            _wait(finished, len(started), wake)
        for failure in finished:
            if failure is not None:
                raise failure
    finally:
        _team.release()
