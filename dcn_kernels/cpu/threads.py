"""Run one compiled worker on several threads at once.

Threads are plain Python threads: the workers hold no GIL. Unlike Numba's own pools this needs no threading library,
may be called from several Python threads, and survives a fork. A worker is called as
``worker(thread, threads, sync, *args)``; its first step is `join` and its last `leave`;
between them `claim` hands out the next piece of work and `barrier` waits for all who joined. A team is the caller and
whoever comes before the first barrier: no helper is counted on, so none that fails or is late can hold up the others.
What a worker writes must not depend on which thread claimed which piece: then results are the same, bit by bit, at
every number of threads.
"""

from __future__ import annotations

import _thread
import logging
import os
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from itertools import chain, repeat
from queue import SimpleQueue
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from dcn_kernels.cpu.jit import inner, intrinsic, spliced

_TEAM, _GENERATION, _CLAIMED = 0, 8, 16  # each on a cache line of its own
_SYNC_SIZE = 24
# The team in one number, so that a step changes all of it: how many joined, wait at the barrier, have left; and whether
# it takes no more.
_FIELD, _JOINED, _WAITING, _LEFT, _CLOSED = 0xFFFF, 1, 1 << 16, 1 << 32, 1 << 48
FLOPS_A_THREAD = 4e6
MOST = 1 << 14  # threads; their count has 16 bits


_log = logging.getLogger("dcn_kernels")


@intrinsic
def _atomic_add(typingctx, array, index, value):
    """array[index] += value; returns what it was."""

    def codegen(context, builder, signature, args):
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", builder.gep(struct.data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def _atomic_load(typingctx, array, index):
    """array[index], read afresh."""

    def codegen(context, builder, signature, args):
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.load_atomic(builder.gep(struct.data, [args[1]]), "seq_cst", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def _give_way(typingctx):
    """Let another thread have this core."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(_declare(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _declare(module: ir.Module, kind: ir.FunctionType, name: str) -> ir.Function:
    return module.globals.get(name) or ir.Function(module, kind, name)


@spliced
def claim(sync):
    """The number of the next piece of work of this phase, from 0; the caller stops when there are no more."""
    return _atomic_add(sync, _CLAIMED, 1)


@intrinsic
def _replace(typingctx, array, index, old, new):
    """Make array[index] `new` if it is `old`; returns whether it was."""

    def codegen(context, builder, signature, args):
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.gep(struct.data, [args[1]])
        return builder.extract_value(builder.cmpxchg(place, args[2], args[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(array, types.intp, types.int64, types.int64), codegen


@inner
def join(thread, sync):
    """Become one of the team, if it takes threads; a worker that may not must return at once.

    The caller's own thread, 0, opens the team: whoever comes before it, or after the first barrier, is not of it.
    """
    if thread == 0:
        _atomic_add(sync, _TEAM, _JOINED - _CLOSED)
        return True
    team = _atomic_load(sync, _TEAM)
    while team & _CLOSED == 0:
        if _replace(sync, _TEAM, team, team + _JOINED):
            return True
        team = _atomic_load(sync, _TEAM)
    return False


@inner
def leave(thread, sync):
    """The worker's last word. The caller's thread takes no more into the team and stays until all have left."""
    _atomic_add(sync, _TEAM, _LEFT)
    if thread == 0:
        team = _atomic_load(sync, _TEAM)
        while not _replace(sync, _TEAM, team, team | _CLOSED):
            team = _atomic_load(sync, _TEAM)
        spins = 0
        while team & _FIELD != (team // _LEFT) & _FIELD:
            spins += 1
            if spins > 200:
                _give_way()
            team = _atomic_load(sync, _TEAM)


@inner
def barrier(sync):
    """Wait until all of the team are here; claims start at 0 again. Nobody joins after the first barrier."""
    generation = _atomic_load(sync, _GENERATION)
    while True:
        team = _atomic_load(sync, _TEAM)
        if (team // _WAITING) & _FIELD == (team & _FIELD) - 1:  # the last to come
            if _replace(sync, _TEAM, team, (team & (_FIELD | _LEFT * _FIELD)) | _CLOSED):
                _atomic_add(sync, _CLAIMED, -_atomic_load(sync, _CLAIMED))
                _atomic_add(sync, _GENERATION, 1)
                return
        elif _replace(sync, _TEAM, team, team + _WAITING):
            break
    spins = 0
    while _atomic_load(sync, _GENERATION) == generation:
        spins += 1
        if spins > 200:
            _give_way()


# ---------------------------------------------------------------- from Python

_Job = list[Any]  # a worker and its arguments; nothing once the call is over
_queues: list[SimpleQueue[tuple[int, _Job]]] = []  # of the helpers
_threads: int | None = None


def _help(todo: SimpleQueue[tuple[int, _Job]]) -> None:
    """What a helper thread does. A helper that fails has not joined its team, which does the work without it."""
    while True:
        try:
            thread, job = todo.get()
            if job:
                worker, threads, sync, args = job
                worker(thread, threads, sync, *args)
        except BaseException as error:
            _log.debug("a helper thread could not help: %r", error)
        thread = job = worker = sync = args = None  # type: ignore[assignment] # the arrays are the caller's to free


def _after_fork() -> None:
    """Threads do not survive a fork: start anew in the child."""
    _queues.clear()


os.register_at_fork(after_in_child=_after_fork)


def get_num_threads() -> int:
    """How many threads a CPU kernel uses: `set_num_threads`, else DCN_NUM_THREADS, else the cores of this process."""
    if _threads is not None:
        return _threads
    setting = os.environ.get("DCN_NUM_THREADS")
    if setting:
        if not (setting.isascii() and setting.isdigit() and len(setting) < 7 and 1 <= int(setting) <= MOST):
            raise ValueError(f"DCN_NUM_THREADS: expected a number of threads of 1 to {MOST}, got {setting!r}")
        _warn_of_many(int(setting))
        return int(setting)
    return cores()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=16)
def _warn_of_many(threads: int) -> None:
    """Say it once where threads are to share cores; they stay as many as asked for, which tests need."""
    if threads > cores():
        _log.warning("DCN_NUM_THREADS: %d threads on %d cores wait for each other", threads, cores())


def threads_for(flops: float, available: int | None = None) -> int:
    """How many threads a call of so much arithmetic is worth: waking one takes as long as a few million operations."""
    return int(min(available or get_num_threads(), 1 + flops // FLOPS_A_THREAD))


def set_num_threads(threads: int | None) -> None:
    """Use this many threads in all later calls of this process; None goes back to the default."""
    global _threads
    if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= MOST):
        raise ValueError(f"set_num_threads: threads: expected at least 1 and at most {MOST}, or None, got {threads!r}")
    _threads = threads


def run(worker: Callable[..., Any], threads: int, *args: Any) -> None:
    """Run `worker(thread, threads, sync, *args)` on up to `threads` threads, and return when none works any more.

    Whatever is raised, and whenever, nobody waits for a thread that does not come and nobody leaves before one that
    did. The worker is compiled or loaded here, before any helper hears of it. Then the helpers are woken and the caller
    does its own part in one step of the interpreter, within which it runs no handler of a signal. Until the caller's
    part is in machine code no helper can join it, so whatever fails before leaves nothing behind; from there on nothing
    can fail, and it ends when all who joined have left.
    """
    sync = np.zeros(_SYNC_SIZE, np.int64)
    sync[_TEAM] = _CLOSED
    if threads == 1:
        worker(0, 1, sync, *args)
        return
    worker(1, threads, sync, *args)  # compiles or loads it, and may not join
    queues = _queues_of(threads - 1)
    job: _Job = [worker, threads, sync, args]
    wake = map(SimpleQueue.put, queues, zip(range(1, threads), repeat(job)))
    own = map(worker, *((each,) for each in (0, threads, sync, *args)))
    try:
        deque(chain(wake, own), maxlen=0)
    finally:
        job.clear()  # a helper that comes late holds none of the arrays


def _queues_of(helpers: int) -> list[SimpleQueue[tuple[int, _Job]]]:
    """The queues of so many helper threads, or of as many as the system lets us start."""
    while len(_queues) < helpers:
        todo: SimpleQueue[tuple[int, _Job]] = SimpleQueue()
        try:
            _thread.start_new_thread(_help, (todo,))
        except RuntimeError as error:
            _log.warning("%d threads of %d: the system starts no more (%s)", len(_queues) + 1, helpers + 1, error)
            break
        _queues.append(todo)
    return _queues[:helpers]
