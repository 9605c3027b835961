"""Exceptions at any moment of a call: none hangs, nothing is written later, the next call is right."""

from __future__ import annotations

import ctypes
import inspect
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
from test_threads import layer, threads_even_for_small_work  # noqa: F401  the fixture works on all tests here

from dcn_kernels import deform_conv2d
from dcn_kernels.cpu import threads


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


