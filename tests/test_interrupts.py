"""Exceptions at any moment of a call: none hangs, nothing is written later, the next call is right."""

from __future__ import annotations

import ctypes
import faulthandler
import inspect
import os
import random
import signal
import sys
import threading
import time
from collections import deque

import numpy as np
import pytest
import test_threads
from test_threads import layer, threads_even_for_small_work  # noqa: F401  the fixture works on all tests here

from dcn_kernels import deform_conv2d, offset_sample2d
from dcn_kernels.cpu import deform_conv, jit, offset_sample, threads


@pytest.fixture(autouse=True)
def hangs_end():
    """What hangs here hangs in machine code, where no signal ends it: end the process, and say where it was."""
    faulthandler.dump_traceback_later(900, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Struck(Exception):
    """Raised by a handler of a signal: no KeyboardInterrupt."""


def strike(calls, most, deadline):
    """Run `calls` while SIGALRM raises at random moments; returns how often it did."""
    rng, struck = random.Random(0), 0

    def handler(signum, frame):
        raise Struck

    before = signal.signal(signal.SIGALRM, handler)
    end = time.monotonic() + deadline
    try:
        while struck < most and time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
                # Where Python cannot hand an exception on, as in a finaliser, it drops it: then no strike comes.
                lost = time.monotonic() + 0.2
                while time.monotonic() < lost:
                    calls()
            except Struck:
                struck += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return struck


@pytest.mark.parametrize("most", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_interrupts_at_random_moments_neither_hang_nor_write_later(most):
    threads.set_num_threads(3)
    case = layer(C=16, O=16, OG=1)
    expected = deform_conv2d(**case, padding=1)
    out = np.empty_like(expected)
    late = []

    def calls():
        try:
            deform_conv2d(**case, padding=1, out=out)
        except Struck:  # nobody may write any more
            out[:] = 7
            late.append(not (out == 7).all())
            raise

    assert strike(calls, most, 60) > 0
    assert not any(late)
    out[:] = 7
    assert (out == 7).all()
    np.testing.assert_array_equal(deform_conv2d(**case, padding=1), expected)


def test_a_recursion_error_at_any_depth_leaves_the_team_usable():
    threads.set_num_threads(2)
    case = layer(C=16, O=16, OG=1, H=12, W=12)
    expected = deform_conv2d(**case, padding=1)

    def at(depth):
        return deform_conv2d(**case, padding=1) if depth == 0 else at(depth - 1)

    failed = 0
    room = sys.getrecursionlimit() - len(inspect.stack(0))
    for depth in range(room - 60, room):
        try:
            np.testing.assert_array_equal(at(depth), expected)
        except RecursionError:
            failed += 1
    assert 0 < failed < 60
    np.testing.assert_array_equal(deform_conv2d(**case, padding=1), expected)


def test_exceptions_of_another_thread_do_not_hang_a_caller():
    threads.set_num_threads(2)
    case = layer(C=16, O=16, OG=1)
    expected = deform_conv2d(**case, padding=1)
    wrong, struck, stop = [], [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                if not np.array_equal(deform_conv2d(**case, padding=1), expected):
                    wrong.append(True)
            except Struck:
                struck.append(True)

    caller = threading.Thread(target=work, daemon=True)
    caller.start()
    for _ in range(100):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller.ident), ctypes.py_object(Struck))
        deform_conv2d(**case, padding=1)
        if not caller.is_alive():  # struck outside its try
            break
    stop.set()
    caller.join(60)
    assert not caller.is_alive()
    assert not wrong
    np.testing.assert_array_equal(deform_conv2d(**case, padding=1), expected)


# ---------------------------------------------------------------- while the worker is loaded or compiled


def anew(module, name, monkeypatch, *, compiled):
    """A module's worker as in a new process: to be loaded from the cache or, with its parts, compiled."""
    py_func = getattr(module, name).py_func
    if compiled:
        for part, thing in list(vars(module).items()):
            if isinstance(thing, jit._Inner):
                monkeypatch.setattr(module, part, jit.inner(thing.py_func))
    worker = jit.kernel(py_func)
    if compiled:
        worker._cache = jit._NoCache(py_func)
    monkeypatch.setattr(module, name, worker)


def loading():
    case = layer(C=16, O=16, OG=1, H=12, W=12)
    return deform_conv, "forward_worker", lambda: deform_conv2d(**case, padding=1)


def compiling():
    rng = np.random.default_rng(0)
    image, offset = rng.standard_normal((1, 8, 20, 20)), rng.standard_normal((1, 2, 20, 20))
    return offset_sample, "forward_worker", lambda: offset_sample2d(image, offset)


def compiling_a_small_worker():
    def run():
        pieces = np.zeros((50, 10))
        threads.run(test_threads.add_one, 2, pieces, 5, np.zeros(4, np.int64))
        return pieces

    return test_threads, "add_one", run


@pytest.mark.parametrize(
    ("work", "most"),
    [
        (loading, 20),
        pytest.param(loading, 200, marks=pytest.mark.slow),
        pytest.param(compiling_a_small_worker, 50, marks=pytest.mark.slow),
    ],
)
def test_interrupts_while_a_worker_is_loaded_or_compiled(work, most, monkeypatch):
    threads.set_num_threads(2)
    module, name, run = work()
    rng, struck, tries, compiled = random.Random(0), 0, 0, work is not loading
    expected = run()
    anew(module, name, monkeypatch, compiled=compiled)
    start = time.perf_counter()
    np.testing.assert_array_equal(run(), expected)
    longest = time.perf_counter() - start

    def handler(signum, frame):
        raise Struck

    before = signal.signal(signal.SIGALRM, handler)
    try:
        while struck < most:
            tries += 1
            assert tries < 4 * most + 20, f"{struck} of {tries} tries were struck"
            anew(module, name, monkeypatch, compiled=compiled)
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, longest))
                np.testing.assert_array_equal(run(), expected)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Struck:
                struck += 1
                if not compiled or struck % 5 == 0:
                    np.testing.assert_array_equal(run(), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("work", [loading, pytest.param(compiling, marks=pytest.mark.slow)])
def test_a_recursion_error_at_any_depth_of_loading_and_compiling(work, monkeypatch):
    """From the deepest on, until there is room for all of it: each depth of loading, a third of compiling."""
    threads.set_num_threads(2)
    module, name, run = work()
    expected = run()

    def at(depth):
        return run() if depth == 0 else at(depth - 1)

    monkeypatch.setattr(sys, "unraisablehook", deque(maxlen=0).append)  # pytest's own would fail at such depths
    room, failed, done = sys.getrecursionlimit() - len(inspect.stack(0)), 0, 0
    for depth in range(room, 0, -3 if work is compiling else -1):
        anew(module, name, monkeypatch, compiled=work is compiling)
        try:
            np.testing.assert_array_equal(at(depth), expected)
            done += 1
        except RecursionError:
            failed += 1
            if work is loading or failed % 10 == 0:
                np.testing.assert_array_equal(run(), expected)
        if done == 3:
            break
    assert failed > 5
    assert done == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_forked_while_another_thread_compiles_works(monkeypatch):
    module, name, run = compiling()
    expected = run()
    anew(module, name, monkeypatch, compiled=True)
    other = threading.Thread(target=run)
    other.start()
    time.sleep(0.3)
    child = os.fork()
    if child == 0:
        signal.alarm(300)  # ends it; the watchdog of the parent has no thread here
        code = 2
        try:
            code = 0 if np.array_equal(run(), expected) else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    other.join()
