"""The CPU backend on several threads: the same bits at every number of them, from several callers, after a fork."""

import os
import threading

import numpy as np
import pytest

from dcn_kernels import OPS, deform_conv2d
from dcn_kernels.cpu import deform_conv, threads
from dcn_kernels.dispatch.call import call


@pytest.fixture(autouse=True)
def threads_even_for_small_work(monkeypatch):
    plans = deform_conv._forward, deform_conv._backward  # they hold how many threads a shape is worth
    for plan in plans:
        plan.cache_clear()
    monkeypatch.setattr(threads, "FLOPS_A_THREAD", 1.0)
    yield
    for plan in plans:
        plan.cache_clear()
    threads.set_num_threads(None)


def everything(op):
    """Forward and gradients of all samples of an operator, as one list of arrays."""
    results = []
    for sample in op.samples(5):
        arrays = {name: array.astype(np.float32) for name, array in sample.arrays.items()}
        arrays = {name: arrays.get(name) for name in op.arrays}
        out = call(op, "forward", arrays, sample.params)
        results.append(out)
        grad = np.random.default_rng(0).standard_normal(out.shape).astype(np.float32)
        grads = call(op, "backward", {"grad_output": grad, **arrays}, sample.params)
        results.extend(grads.values())
    return results


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_results_are_the_same_bits_at_every_number_of_threads(op):
    threads.set_num_threads(1)
    expected = everything(op)
    for number in (2, 3, 7):
        threads.set_num_threads(number)
        for got, want in zip(everything(op), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def layer(seed=0, N=2, C=24, H=30, W=31, O=40, OG=2):
    """A layer of several tiles, chunks of channels and parts of outputs."""
    rng = np.random.default_rng(seed)
    arrays = {
        "input": rng.standard_normal((N, C, H, W)),
        "offset": rng.standard_normal((N, 18 * OG, H, W)) * 2,
        "weight": rng.standard_normal((O, C, 3, 3)),
        "bias": rng.standard_normal(O),
        "mask": rng.random((N, 9 * OG, H, W)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def test_a_layer_of_many_tiles_is_the_same_bits_at_every_number_of_threads():
    op, arrays = OPS["deform_conv2d"], layer(O=300)
    params = {**op.samples(0)[0].params, "padding": (1, 1)}
    grad = np.random.default_rng(1).standard_normal((2, 300, 30, 31)).astype(np.float32)
    seen = {}
    for number in (1, 2, 5):
        threads.set_num_threads(number)
        results = {"out": call(op, "forward", arrays, params)}
        results |= call(op, "backward", {"grad_output": grad, **arrays}, params)
        for name, array in results.items():
            np.testing.assert_array_equal(array, seen.setdefault(name, array), err_msg=f"{name}, {number} threads")


def test_several_python_threads_may_call_at_once():
    threads.set_num_threads(2)
    cases = [layer(seed) for seed in range(4)]
    expected = [deform_conv2d(**case, padding=1) for case in cases]
    wrong = []

    def work(case, want):
        for _ in range(5):
            if not np.array_equal(deform_conv2d(**case, padding=1), want):
                wrong.append(True)

    callers = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong
    assert not any(caller.is_alive() for caller in callers)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_forked_after_use_works():
    threads.set_num_threads(2)
    case = layer()
    expected = deform_conv2d(**case, padding=1)
    child = os.fork()
    if child == 0:  # exit codes, not exceptions, tell the parent
        code = 1
        try:
            code = 0 if np.array_equal(deform_conv2d(**case, padding=1), expected) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_array_equal(deform_conv2d(**case, padding=1), expected)  # and the parent still does


def test_a_failing_worker_raises_in_its_caller_and_frees_the_team():
    def worker(thread, number, sync):
        if thread == 1:
            raise ArithmeticError("of thread 1")

    with pytest.raises(ArithmeticError, match="of thread 1"):
        threads.run(worker, 2)
    seen = []
    threads.run(lambda thread, number, sync: seen.append((thread, number)), 2)
    assert sorted(seen) == [(0, 2), (1, 2)]


def test_a_busy_team_leaves_a_call_to_its_own_thread():
    seen = []
    with threads._team:
        threads.run(lambda thread, number, sync: seen.append((thread, number)), 4)
    assert seen == [(0, 1)]


def test_number_of_threads_comes_from_the_call_then_the_environment_then_the_cores(monkeypatch):
    monkeypatch.setenv("DCN_NUM_THREADS", "5")
    assert threads.get_num_threads() == 5
    threads.set_num_threads(3)
    assert threads.get_num_threads() == 3
    threads.set_num_threads(None)
    monkeypatch.delenv("DCN_NUM_THREADS")
    assert threads.get_num_threads() == len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="set_num_threads: threads: expected at least 1"):
        threads.set_num_threads(0)


def test_an_interrupt_waits_for_the_threads_that_still_write():
    import signal
    import time

    finished = []

    def worker(thread, number, sync):
        if thread == 1:
            time.sleep(0.5)
            finished.append(thread)

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            threads.run(worker, 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert finished == [1]
    threads.run(worker, 2)  # the team is free again, and nothing of the last call is taken for this one
    assert finished == [1, 1]
