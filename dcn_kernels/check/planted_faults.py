"""Do the gradient checks notice a wrong gradient? Faults planted one at a time: `dcn-check gradients --self-test`.

A fault is put into the result of the backend's own backward, where a wrong kernel would put it. One that cannot be
seen in an argument's gradient, as it has no (y, x) pairs or no rows, is a row that says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from dcn_kernels.check.gradients import CHECKS, Case, all_cases, findings, not_written
from dcn_kernels.dispatch.call import module_of
from dcn_kernels.dispatch.row import Op
from dcn_kernels.dtypes import DTYPES, accumulator
from dcn_kernels.ops.registry import OPS


def _scaled(gradient: Any, named: str) -> Any:
    # half types have no 1.01: the product is rounded, not the factor
    wide = gradient.astype(accumulator(gradient.dtype))
    return (wide * np.asarray(1.01, wide.dtype)).astype(gradient.dtype)


def _zeroed(gradient: Any, named: str) -> Any:
    return gradient * 0


def _one_element_off(gradient: Any, named: str) -> Any:
    broken = gradient.copy()
    flat = broken.reshape(-1)
    flat[flat.size // 2] = flat[flat.size // 2] + abs(flat.astype(np.float64)).max() / 10
    return broken


def _x_and_y_swapped(gradient: Any, named: str) -> Any:
    axis = _pair_axis(named)
    if axis is None:
        raise ValueError(cannot("x and y swapped", named))
    order = np.arange(gradient.shape[axis]).reshape(-1, 2)[:, ::-1].ravel()
    return gradient[(slice(None),) * axis + (order,)]


def _border_row_missing(gradient: Any, named: str) -> Any:
    broken = gradient.copy()
    broken[..., 0, :] = 0  # the first row of the image, the kernel, the output or the bins
    return broken


FAULTS: dict[str, Callable[[Any, str], Any]] = {
    "scaled by 1.01": _scaled,
    "zeroed": _zeroed,
    "one element off": _one_element_off,
    "x and y swapped": _x_and_y_swapped,
    "border row missing": _border_row_missing,
}


def _pair_axis(named: str) -> int | None:
    """The axis that holds (y, x) pairs: its named size begins with 2*."""
    for axis, expression in enumerate(named.split()):
        if expression == "2" or expression.startswith("2*"):
            return axis
    return None


def cannot(fault: str, named: str) -> str:
    """Why a gradient of this named shape cannot have a fault; an empty string where it can."""
    if fault == "x and y swapped" and _pair_axis(named) is None:
        return f"no axis of ({named}) holds pairs of y and x"
    if fault == "border row missing" and len(named.split()) < 2:
        return f"({named}) has no rows"
    return ""


@contextmanager
def planted(op: Op, backend: str, argument: str, fault: str) -> Iterator[list[bool]]:
    """Within, the backend's backward gives a wrong gradient of one argument.

    Yields a list to which each call adds whether its gradient came out different.
    """
    module, name = import_module(module_of(op, backend)), f"{op.name}_backward"
    right = getattr(module, name)
    changed: list[bool] = []

    def wrong(**arguments: Any) -> dict[str, Any]:
        grads = dict(right(**arguments))
        if argument in grads and grads[argument].size:
            bad = FAULTS[fault](grads[argument], op.arrays[argument])
            changed.append(bool((bad != grads[argument]).any()))
            grads[argument] = bad
        return grads

    setattr(module, name, wrong)
    try:
        yield changed
    finally:
        setattr(module, name, right)


@dataclass
class SelfTest:
    """One planted fault."""

    op: str
    argument: str
    dtype: str
    backend: str
    fault: str
    status: str  # PASS: caught; FAIL: not; SKIP: this gradient cannot have it
    caught_by: tuple[str, ...] = ()
    reason: str = ""


def self_test(
    *,
    ops: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    backends: tuple[str, ...] = ("cpu",),
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[SelfTest]:
    """Break each gradient on purpose and see which checks notice.

    Yields
    ------
    SelfTest
        One for each operator, argument, dtype, backend and fault.
    """
    table = [
        (OPS[name], dtype, backend, argument)
        for name in (ops or OPS)
        for backend in backends
        for dtype in dtypes
        for argument in OPS[name].differentiable
        if not arguments or argument in arguments
    ]
    cases: list[Case] = []
    for done, (op, dtype, backend, argument) in enumerate(table):
        if progress:
            progress(f"{op.name} {argument} {dtype} {backend}", done, len(table))
        missing = not_written(op, backend)
        if not missing and (done == 0 or table[done - 1][:3] != (op, dtype, backend)):
            cases = list(all_cases(op, dtype, seed))
        before = "" if missing else _before(cases, backend, argument, seed)
        for fault in FAULTS:
            test = SelfTest(op.name, argument, dtype, backend, fault, "SKIP", (), missing)
            if not missing:
                test.reason = cannot(fault, op.arrays[argument])
            if not test.reason:
                test.status, test.reason = "FAIL", before
                if not before:
                    with planted(op, backend, argument, fault) as changed:
                        test.caught_by = _caught(cases, backend, argument, seed)
                    test.status = "PASS" if test.caught_by and any(changed) else "FAIL"
                    test.reason = "" if test.caught_by else "not caught" if any(changed) else "changed no gradient"
            yield test
    if progress and table:
        progress("", len(table), len(table))


def _before(cases: list[Case], backend: str, argument: str, seed: int) -> str:
    """What fails before anything is planted: where something does, noticing a fault proves nothing."""
    try:
        caught = _caught(cases, backend, argument, seed)
    except Exception as error:  # of the operator: a failed row, not the end of the table
        return f"raises before anything is planted: {type(error).__name__}: {error}"
    return f"fails {', '.join(caught)} before anything is planted" if caught else ""


def _caught(cases: list[Case], backend: str, argument: str, seed: int) -> tuple[str, ...]:
    """The checks that fail; looks no further once every check of a case has failed."""
    caught: set[str] = set()
    for case in cases:
        seen = set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a broken gradient may divide by zero
            for _, finding in findings(case, backend, (argument,), mode="fast", seed=seed, repeat=False):
                seen.add(finding.check)
                if not finding.ratio <= 1:
                    caught.add(finding.check)
        if seen and seen <= caught:
            break
    return tuple(check for check in CHECKS if check in caught)
