"""Is a drawn call wrong on a backend? The call is made forward and backward and compared with the reference's.

Wrong is:

raised     the backend raises; the reference does not
result     a result of another shape or dtype, or further from the reference's than calls.py allows, or not finite
           at other elements; NaN must be NaN, infinity infinity, but where an input holds infinities: then it is the
           order of products and sums, which nobody promises, that decides which of the two a result is. And where
           a row sums the samples of a bin line by line before it reads a pixel (`Op.sums_lines`), a pixel that is not
           finite may make a coordinate's gradient NaN that the reference has at 0, as 0 times it
threads    other bits at another number of threads (on a GPU with `deterministic`: in another run)
changed    an input was written to
fault      the process ended: with guard pages (guard.py), by touching memory outside an array
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np

from dcn_kernels.check import guard
from dcn_kernels.check.calls import backward, forward, reduction_length, relative_error, to_backend, to_numpy, tolerance
from dcn_kernels.check.drawn_calls import DrawnCall, Laid, laid
from dcn_kernels.check.gradients import not_written
from dcn_kernels.cpu import threads as cpu_threads
from dcn_kernels.dispatch.call import module_of, public
from dcn_kernels.dtypes import DTYPES, accumulator
from dcn_kernels.ops.registry import OPS

Problem = tuple[str, str, str]  # its kind, the result or argument, and both in words


@contextmanager
def every_thread() -> Iterator[None]:
    """Small calls too use as many threads as they are told, on the CPU."""
    usual = cpu_threads.FLOPS_A_THREAD
    _forget_plans()
    cpu_threads.FLOPS_A_THREAD = 1.0
    try:
        yield
    finally:
        cpu_threads.set_num_threads(None)
        cpu_threads.FLOPS_A_THREAD = usual
        _forget_plans()


def _forget_plans() -> None:
    """What the CPU backend keeps of former calls holds how many threads they were worth."""
    for module in {module_of(op, "cpu") for op in OPS.values() if not not_written(op, "cpu")}:
        for kept in vars(import_module(module)).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


def wrong(
    call: DrawnCall, backend: str, *, threads: tuple[int, ...] = (), slack: float = 1.0,
    sides: tuple[str, ...] = (), made: Callable[[int], None] = lambda calls: None,
) -> Problem | None:  # fmt: skip
    """What is wrong with a call on a backend: (kind, what, reason), or None.

    Parameters
    ----------
    call : DrawnCall
    backend : str
    threads : numbers
        The CPU's call is made at each number of threads, within `every_thread`, and must give the same bits.
    slack : float
        What the tolerances are multiplied with.
    sides : names of guard.SIDES
        Where arrays lie against an unreadable page, one way after the other.
    made : function of a number, optional
        Told how many calls were made.
    """
    with np.errstate(all="ignore"):
        return _wrong(call, backend, threads, slack, sides, made)


def _wrong(
    call: DrawnCall, backend: str, threads: tuple[int, ...], slack: float, sides: tuple[str, ...],
    made: Callable[[int], None],
) -> Problem | None:  # fmt: skip
    try:
        want = _reference(call)
    except Exception as error:  # the row draws what its own checks refuse, or the reference fails
        return "raised", "reference", f"the reference raised {type(error).__name__}: {error}"
    numbers: tuple[int, ...] = threads or (0,)
    if backend not in ("reference", "cpu") and call.sample.params.get("deterministic"):
        numbers = 0, 0
    first: dict[str, np.ndarray] | None = None
    for side in sides or ("",):
        for number in numbers:
            made(2)
            if number:
                cpu_threads.set_num_threads(number)
            with ExitStack() as stack:
                if side:
                    stack.enter_context(guard.guarded(side))
                try:
                    got, changed = _results(call, backend)
                except Exception as error:
                    return "raised", type(error).__name__, f"{type(error).__name__}: {error}"
            if changed:
                return "changed", changed, f"{changed} was written to"
            if first is None:
                first, problem = got, _compared(call, got, want, slack)
                if problem:
                    return problem
            elif different := _other_bits(first, got):
                return (
                    "threads",
                    different,
                    f"{different}: other bits {f'at {number} threads' if number else 'in another run'}",
                )
    return None


def _reference(call: DrawnCall) -> dict[str, np.ndarray]:
    """The results wanted, by name; the output is "output"."""
    wide = accumulator(DTYPES[call.dtype])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = {"output": forward(call.op, call.exact, "reference")}
        returned = _returned(call)
        if returned:
            exact = call.exact
            params = {**exact.params, **returned}
            outputs = public(call.op)(**exact.arrays, **params, backend="reference")
            want |= dict(zip(call.op.saved, outputs[1:], strict=True))
        grads = backward(call.op, call.exact, "reference", call.grad_output.astype(wide), call.wrt)
    return {**want, **{f"gradient of {name}": array for name, array in grads.items()}}


def _returned(call: DrawnCall) -> dict[str, bool]:
    return {f"return_{name}": True for name in call.op.saved if call.choices.get(f"return_{name}")}


def _results(call: DrawnCall, backend: str) -> tuple[dict[str, np.ndarray], str]:
    """(results by name, the name of an input that was changed)."""
    op, params = call.op, call.sample.params
    given = {"grad_output": call.grad_output, **call.sample.arrays}
    inputs: dict[str, Laid] = {
        name: laid(array, call.choices[f"layout.{name}"], call.seed) for name, array in given.items()
    }
    before = {name: each.memory.tobytes() for name, each in inputs.items()}
    arrays = to_backend(backend, {name: each.array for name, each in inputs.items()})
    grad_output = arrays.pop("grad_output")
    out = None
    if call.choices["out"] == "given":
        out = to_backend(backend, {"out": np.full(call.grad_output.shape, np.nan, call.grad_output.dtype)})["out"]
    returned = _returned(call)
    result = public(op)(**arrays, **params, **returned, out=out, backend=backend)
    outputs = result if returned else (result,)
    got = {"output": out if out is not None else outputs[0], **dict(zip(op.saved, outputs[1:], strict=False))}
    saved = {name: got[name] for name in op.saved if name in got}
    grads = public(op, "backward")(grad_output, **arrays, **params, **saved, wrt=call.wrt, backend=backend)
    got |= {f"gradient of {name}": array for name, array in grads.items()}
    changed = [name for name, each in inputs.items() if each.memory.tobytes() != before[name]]
    return {name: to_numpy(array) for name, array in got.items()}, ", ".join(changed)


def _other_bits(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> str:
    """The first result whose bits differ."""
    for name, array in one.items():
        if array.tobytes() != two[name].tobytes():
            return name
    return ""


def _compared(call: DrawnCall, got: dict[str, np.ndarray], want: dict[str, np.ndarray], slack: float) -> Problem | None:
    if list(got) != list(want):
        return "result", "names", f"results {list(got)}, expected {list(want)}"
    scales: dict[str, np.ndarray] | None = None
    endless = any(not np.isfinite(a).all() for n, a in call.sample.arrays.items() if n not in call.op.coordinates)
    infinite = any(np.isinf(array).any() for array in (call.grad_output, *call.sample.arrays.values()))
    for name, array in got.items():
        wanted, direction = want[name], "forward" if name == "output" else "backward"
        if name in call.op.saved:
            if array.dtype != np.int64 or not np.array_equal(array, wanted):
                return "result", name, f"{name} is not the reference's"
            continue
        storage = call.sample.arrays[name.removeprefix("gradient of ")].dtype if direction == "backward" else None
        storage = storage or DTYPES[call.dtype]
        if array.shape != wanted.shape or array.dtype != storage or not array.flags.c_contiguous:
            return "result", name, f"{name}: {array.shape} {array.dtype}, expected {wanted.shape} {storage}"
        length = reduction_length(call.op, call.sizes, direction, array.size)
        bound = slack * tolerance(call.dtype, length)
        wanted = _overflowed(array, wanted, bound)
        if call.op.sums_lines and name.removeprefix("gradient of ") in call.op.coordinates and endless:
            wanted = np.where(np.isnan(array), array, wanted)
        if infinite:
            wanted = np.where(np.isfinite(wanted) | np.isfinite(array), wanted, array)
        error, index = relative_error(array, wanted)
        if error <= bound:
            continue
        # The terms of a sum may cancel, in a result of few elements all of them. Its size is then that of the same
        # sum with other signs, and of denormal numbers no less than what they are rounded to.
        if scales is None:
            scales = _scales(call)
        error, index = _error(array, wanted, scales[name], _least(call, array.dtype, length))
        if not error <= bound:
            values = f"{array[index]!s} for {wanted[index]!s} at {index}" if index else "all"
            return "result", name, f"{name}: {values}: error {error:.3g}, bound {bound:.3g}"
    return None


def _overflowed(got: np.ndarray, want: np.ndarray, bound: float) -> np.ndarray:
    """What is wanted, where beyond the largest number of the result's dtype, is what came if that is as large."""
    largest = float(ml_dtypes.finfo(got.dtype).max)
    with np.errstate(all="ignore"):
        wide = got.astype(np.float64)
        beyond = (np.abs(want) > largest * (1 - 2 * bound)) & (np.abs(wide) > largest * (1 - 4 * bound))
        beyond &= np.signbit(want) == np.signbit(wide)
    return np.where(beyond, wide, want) if beyond.any() else want


def _scales(call: DrawnCall) -> dict[str, np.ndarray]:
    """The size of the sums: the largest of the reference's results with the signs of what is summed drawn anew."""
    largest: dict[str, np.ndarray] = {}
    summed = [name for name in call.sample.arrays if name not in call.op.coordinates]
    for number in range(6):
        rng = np.random.default_rng([*call.seed, number])
        arrays = {
            name: (np.abs(array) if number == 0 else array * rng.choice([-1, 1], array.shape)).astype(array.dtype)
            if name in summed
            else array
            for name, array in call.sample.arrays.items()
        }
        grad = (call.grad_output * rng.choice([-1, 1], call.grad_output.shape)).astype(call.grad_output.dtype)
        grad = np.abs(grad) if number == 0 else grad
        other = dataclasses.replace(call, sample=dataclasses.replace(call.sample, arrays=arrays), grad_output=grad)
        for name, array in _reference(other).items():
            size = np.abs(array.astype(np.float64))
            size = np.where(np.isfinite(size), size, 0).max(initial=0)
            largest[name] = np.maximum(largest.get(name, np.float64(0)), size)
    return largest


def _least(call: DrawnCall, storage: Any, length: float) -> float:
    """What rounding may change in numbers that have no digits left: a step of the result's, and one of each term's.

    A huge factor makes a term's step as much larger, if it comes after the rounding. And where the same pixel is added
    and subtracted, which no other signs tell apart, the reference's own sums leave what float64 rounds of a term.
    """
    steps = [float(ml_dtypes.finfo(each).smallest_subnormal) for each in (storage, accumulator(DTYPES[call.dtype]))]
    arrays = [array.astype(np.float64) for array in (call.grad_output, *call.sample.arrays.values())]
    factor = max(float(np.abs(array[np.isfinite(array)]).max(initial=1)) for array in arrays)
    terms = 64 * max(1.0, length)
    term = 1.0
    for name, array in {"grad_output": call.grad_output, **call.sample.arrays}.items():
        if name not in call.op.coordinates:
            wide = array.astype(np.float64)
            term *= float(np.abs(wide[np.isfinite(wide)]).max(initial=1))
    return steps[0] + terms * (steps[1] * factor + np.finfo(np.float64).eps * term)


def _error(got: np.ndarray, want: np.ndarray, scale: Any, least: float) -> tuple[float, tuple[int, ...]]:
    """The worst element's error over the scale."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(all="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        difference = np.where(same, 0.0, np.maximum(np.abs(got - want) - least, 0))
    difference = np.where(np.isnan(difference), np.inf, difference)
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(difference)), got.shape))
    if difference[worst] == 0:
        return 0.0, worst
    finite = max(float(scale), float(np.where(np.isfinite(want), np.abs(want), 0).max()))
    return (float(difference[worst]) / finite if finite else np.inf), worst
