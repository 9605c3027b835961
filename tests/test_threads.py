"""The CPU backend on several threads: the same bits at every number of them, from several callers, after a fork."""

import os
import threading
import time
from queue import SimpleQueue

import numpy as np
import pytest

from dcn_kernels import OPS, deform_conv2d
from dcn_kernels.cpu import deform_conv, jit, threads
from dcn_kernels.cpu.threads import barrier, claim, join, leave
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


@jit.kernel
def add_one(thread, number, sync, pieces, rounds, seen):
    """Each piece gets 1 in each of `rounds` phases; seen[thread] counts what a thread did."""
    if not join(thread, sync):
        return
    for _ in range(rounds):
        piece = claim(sync)
        while piece < len(pieces):
            for i in range(pieces.shape[1]):
                pieces[piece, i] += 1
            seen[thread] += 1
            piece = claim(sync)
        barrier(sync)
    leave(thread, sync)


def test_a_team_is_whoever_comes(monkeypatch):
    """Helpers that never come, or fail before they begin, hold up nobody."""
    pieces, seen = np.zeros((50, 10)), np.zeros(4, np.int64)
    monkeypatch.setattr(threads, "_queues", [SimpleQueue() for _ in range(3)])  # nobody listens
    threads.run(add_one, 4, pieces, 5, seen)
    assert (pieces == 5).all()
    assert seen.tolist() == [250, 0, 0, 0]


def test_nobody_joins_before_the_caller_does():
    """So a call that fails before its own part has begun leaves nobody behind who works on its arrays."""
    pieces, seen = np.zeros((50, 10)), np.zeros(4, np.int64)

    calls = []

    def worker(thread, *args):
        calls.append(thread)
        if thread == 0 and len(calls) > 1:  # the first is to compile it
            time.sleep(0.2)  # the helpers have come by then
            raise MemoryError
        add_one(thread, *args)

    with pytest.raises(MemoryError):
        threads.run(worker, 4, pieces, 5, seen)
    time.sleep(0.2)
    assert (pieces == 0).all()
    threads.run(add_one, 4, pieces, 5, seen)
    assert (pieces == 5).all()


def test_threads_that_the_system_refuses_are_done_without(monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_queues", [])
    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    pieces, seen = np.zeros((50, 10)), np.zeros(4, np.int64)
    threads.run(add_one, 4, pieces, 5, seen)
    assert (pieces == 5).all()
    assert "1 threads of 4: the system starts no more" in caplog.text


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
    monkeypatch.setenv("DCN_NUM_THREADS", "\u00b2")
    with pytest.raises(ValueError, match="DCN_NUM_THREADS: expected a number of threads"):
        threads.get_num_threads()


def test_more_threads_than_cores_are_used_and_warned_of(monkeypatch, caplog):
    threads._warn_of_many.cache_clear()
    monkeypatch.setenv("DCN_NUM_THREADS", "1000")
    assert threads.get_num_threads() == 1000
    assert "DCN_NUM_THREADS: 1000 threads on" in caplog.text
