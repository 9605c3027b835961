"""Is a backward the gradient of its forward? The checks behind `dcn-check` and the table tests.

For one operator, argument, dtype and backend:

differences  central differences of the backend's own forward. The cases keep every sampling point off the cell
             edges (`Sample.steps` says how far an argument may move), and there a forward is a polynomial of degree
             two along any direction that moves one argument: large steps are exact, so what is left is rounding.
             float64 and float32; in half precision a forward is too coarse.
reference    the gradient of the float64 reference at the same, already rounded, inputs.
adjoint      <v, f(u) - f(0)> = <J^T v, u> with random u and v, for the arguments in which the reference is affine.
repeat       two runs agree bit by bit, where that is promised.
kink         cases on the pixel lines give the documented one-sided value.

Errors are relative to the largest element of what they are compared with; calls.py has the only table of bounds.
planted_faults.py breaks gradients on purpose and sees whether these checks notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import prod, sqrt
from typing import Any

import numpy as np

from dcn_kernels.check.calls import (
    BACKENDS,
    backward,
    forward,
    output_shape,
    reduction_length,
    relative_error,
    tolerance,
    with_dtype,
)
from dcn_kernels.dispatch.call import module_of
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES, HALVES, accumulator
from dcn_kernels.ops.registry import OPS

CHECKS = ("differences", "reference", "adjoint", "repeat", "kink")


@dataclass
class Finding:
    """One check of one argument in one case."""

    check: str
    case: str
    error: float
    tolerance: float
    index: tuple[int, ...] = ()
    analytic: float | None = None
    numeric: float | None = None

    @property
    def ratio(self) -> float:
        """Error over tolerance: above 1 is a failure."""
        return self.error / self.tolerance if self.error == self.error else np.inf


@dataclass
class Row:
    """What is reported of one operator, argument, dtype and backend."""

    op: str
    argument: str
    dtype: str
    backend: str
    status: str  # PASS, FAIL or SKIP
    reason: str = ""
    check: str = ""  # the check with the largest error over tolerance, and its case
    case: str = ""
    error: float | None = None
    tolerance: float | None = None
    index: tuple[int, ...] = ()
    analytic: float | None = None
    numeric: float | None = None
    checks: dict[str, float] = dataclasses.field(default_factory=dict)  # check -> largest error over tolerance
    command: str = ""  # of a failure: runs this row alone


# ---------------------------------------------------------------- calls on a backend


def _grad_output(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (np.round(rng.standard_normal(shape) * 32) / 32).astype(DTYPES[dtype])


def step(op: Op, sample: Sample, argument: str) -> float:
    """How far central differences move an argument: an eighth of a pixel where the case says nothing else."""
    return sample.steps.get(argument, 0.125 if argument in op.coordinates else 1.0)


# ---------------------------------------------------------------- the checks of one case


class Case:
    """A case in one dtype, with the reference's answers."""

    def __init__(self, op: Op, sample: Sample, dtype: str, seed: int, *, wide_coordinates: bool) -> None:
        self.op, self.dtype = op, dtype
        values = dict(sample.arrays)
        if not sample.expected and DTYPES[dtype] not in HALVES:
            # digits down to the last one, so that a computation in a lower precision shows
            rng = np.random.default_rng([seed, 4])
            for name in op.differentiable:
                if name in values:
                    reach = step(op, sample, name) / 64
                    values[name] = values[name] + rng.uniform(-reach, reach, values[name].shape)
        arrays = with_dtype(op, values, dtype, wide_coordinates=wide_coordinates)
        self.sample = dataclasses.replace(sample, arrays=arrays)
        wide = accumulator(DTYPES[dtype])
        exact = {name: array.astype(wide) for name, array in arrays.items()}
        self.exact = dataclasses.replace(sample, arrays=exact)
        self.sizes, shape = output_shape(op, self.sample)
        rng = np.random.default_rng([seed, 1])
        if sample.expected:
            self.grad_output = np.ones(shape, DTYPES[dtype])
        else:
            self.grad_output = _grad_output(rng, shape, dtype)
        self.arguments = tuple(name for name in op.differentiable if name in arrays)
        self._reference: dict[str, np.ndarray] | None = None
        self._affine: dict[str, bool] = {}
        self._known: dict[tuple[Any, ...], Any] = {}  # forwards that do not depend on the gradient under test

    def reference(self, argument: str) -> np.ndarray:
        """The reference's gradient."""
        if self._reference is None:
            self._reference = backward(self.op, self.exact, "reference", self.grad_output.astype(self._exact_dtype()))
        return self._reference[argument]

    def _exact_dtype(self) -> np.dtype:
        return next(iter(self.exact.arrays.values())).dtype

    def with_argument(self, sample: Sample, argument: str, array: np.ndarray) -> Sample:
        """The case with another array for one argument."""
        return dataclasses.replace(sample, arrays={**sample.arrays, argument: array})

    def affine(self, argument: str) -> bool:
        """The reference's forward is affine in this argument: f(u + v) - f(u) - f(v) + f(0) = 0 at random u, v."""
        if argument not in self._affine:
            rng = np.random.default_rng(17)
            wide = {name: array.astype(np.float64) for name, array in self.exact.arrays.items()}
            sample = dataclasses.replace(self.exact, arrays=wide)
            u, v = rng.standard_normal((2, *wide[argument].shape))
            f = [
                forward(self.op, self.with_argument(sample, argument, at), "reference")
                for at in (u + v, u, v, np.zeros_like(u))
            ]
            size = max(float(np.abs(part).max(initial=0)) for part in f)
            self._affine[argument] = bool(np.abs(f[0] - f[1] - f[2] + f[3]).max(initial=0) <= 1e-9 * size)
        return self._affine[argument]

    def bound(self, elements: int) -> float:
        """The tolerance of a gradient of so many elements."""
        return tolerance(self.dtype, reduction_length(self.op, self.sizes, "backward", elements))

    # ------------------------------------------------------------

    def check_reference(self, backend: str, argument: str, gradient: np.ndarray) -> Finding:
        """Against the float64 reference."""
        want = self.reference(argument)
        error, index = relative_error(gradient, want)
        got = float(gradient[index]) if index else None
        numeric = float(want[index]) if index else None
        return Finding("reference", self.sample.label, error, self.bound(gradient.size), index, got, numeric)

    def check_kink(self, backend: str, argument: str, gradient: np.ndarray) -> Finding:
        """Against the documented one-sided value."""
        want = self.sample.expected[argument]
        error, index = relative_error(gradient, want)
        bound = self.bound(gradient.size)
        return Finding("kink", self.sample.label, error, bound, index, float(gradient[index]), float(want[index]))

    def _probes(
        self, backend: str, argument: str, seed: int, elements: int | None, directions: int
    ) -> list[tuple[tuple[int, ...], np.ndarray, float, float]]:
        """Central differences of the loss sum(grad_output * f): (index or (), the way moved, slope, its rounding)."""
        rng = np.random.default_rng([seed, 2, *argument.encode()])
        array = self.sample.arrays[argument]
        reach = step(self.op, self.sample, argument)
        grad_output = self.grad_output.astype(np.float64)
        chosen = np.arange(array.size)
        if elements is not None and elements < array.size:
            chosen = np.sort(rng.choice(array.size, elements, replace=False))
        ways: list[tuple[tuple[int, ...], np.ndarray]] = []
        for flat in chosen:
            index = tuple(int(i) for i in np.unravel_index(flat, array.shape))
            ways.append((index, np.zeros(array.shape)))
            ways[-1][1][index] = reach
        ways += [((), rng.choice([-reach, reach], array.shape)) for _ in range(directions)]
        probes = []
        for index, way in ways:
            moved = [(array.astype(np.float64) + sign * way).astype(array.dtype) for sign in (1, -1)]
            way = (moved[0].astype(np.float64) - moved[1].astype(np.float64)) / (2 * reach)  # as rounded
            high, low = (
                forward(self.op, self.with_argument(self.sample, argument, at), backend).astype(np.float64)
                for at in moved
            )
            slope = float((grad_output * (high - low)).sum() / (2 * reach))
            # what rounding the outputs that moved may do to it
            weight = np.where(high != low, grad_output, 0.0)
            noise = tolerance(self.dtype) * float(np.linalg.norm(weight * np.maximum(np.abs(high), np.abs(low))))
            probes.append((index, way, slope, noise / (2 * reach)))
        return probes

    def check_differences(
        self, backend: str, argument: str, gradient: np.ndarray, *, seed: int, elements: int | None, directions: int
    ) -> Finding:
        """Central differences along single elements (None: all of them) and along random directions."""
        key = (backend, argument, seed, elements, directions)
        if key not in self._known:
            self._known[key] = self._probes(*key)
        analytic_all = gradient.astype(np.float64)
        worst = Finding("differences", self.sample.label, 0.0, self.bound(gradient.size))
        for index, way, slope, noise in self._known[key]:
            if index:
                analytic, numeric = float(analytic_all[index]), slope / float(way[index])
                size = float(np.abs(analytic_all).max(initial=0))
            else:
                analytic, numeric = float((analytic_all * way).sum()), slope
                size = float(np.linalg.norm(analytic_all))
            error, bound = 0.0, self.bound(gradient.size)
            if analytic != numeric:
                finite = size > 0 and np.isfinite(numeric) and np.isfinite(analytic)
                error = abs(analytic - numeric) / size if finite else np.inf
                bound += noise / size if finite else 0.0
            found = Finding("differences", self.sample.label, error, bound, index, analytic, numeric)
            if found.ratio > worst.ratio or worst.analytic is None:
                worst = found
        return worst

    def check_adjoint(self, backend: str, argument: str, gradient: np.ndarray, *, seed: int) -> Finding:
        """<v, f(u) - f(0)> = <J^T v, u> with v = grad_output and random u."""
        rng = np.random.default_rng([seed, 3, *argument.encode()])
        array = self.sample.arrays[argument]
        key = (backend, argument, seed)
        u = (np.round(rng.standard_normal(array.shape) * 32) / 32).astype(array.dtype)
        if key not in self._known:
            self._known[key] = [
                forward(self.op, self.with_argument(self.sample, argument, at), backend).astype(np.float64)
                for at in (u, np.zeros_like(u))
            ]
        at_u, at_zero = self._known[key]
        v = self.grad_output.astype(np.float64)
        left, terms = float((v * (at_u - at_zero)).sum()), np.linalg.norm(v * np.maximum(np.abs(at_u), np.abs(at_zero)))
        products = gradient.astype(np.float64) * u.astype(np.float64)
        right = float(products.sum())
        size = max(float(terms), float(np.linalg.norm(products)), np.finfo(np.float64).tiny)
        error = abs(left - right) / size if np.isfinite(left - right) else np.inf
        bound = self.bound(array.size)
        if backend.startswith("cuda") and "weight" in self.op.arrays and DTYPES[self.dtype] in HALVES:
            # `left` and `right` are sums of terms, each with a rounding error of its own. The bound is for terms that
            # are rounded once, when a result is stored. Matrix units read half types, so there the samples are
            # rounded a second time, before the product: twice the variance of the error, sqrt(2) times its size.
            bound *= sqrt(2)
        return Finding("adjoint", self.sample.label, error, bound, (), right, left)


# ---------------------------------------------------------------- the table


def not_written(op: Op, backend: str) -> str:
    """Why a backend lacks an operator, or "" where it has it. A module that fails to import counts as written."""
    name = module_of(op, backend)
    try:
        if not _exists(name):
            return f"not written for {backend}: there is no {name}"
        module = import_module(name)
    except Exception:  # written, and broken: whoever calls it sees how
        return ""
    missing = [wanted for wanted in (op.name, f"{op.name}_backward") if not hasattr(module, wanted)]
    return f"not written for {backend}: {name} has no {missing[0]}" if missing else ""


def _exists(name: str) -> bool:
    """A module of this name can be found; so can the packages that it is in."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError as error:
        if name.startswith(f"{error.name}."):  # a package without this backend's folder
            return False
        raise


def all_cases(op: Op, dtype: str, seed: int) -> Iterator[Case]:
    """The cases of an operator in a dtype, those on the kinks last."""
    cases = [*op.samples(seed), *(op.kinks(seed) if op.kinks else [])]
    for number, sample in enumerate(cases):
        # beside half-precision inputs, every other case keeps its coordinates in float32
        yield Case(op, sample, dtype, seed, wide_coordinates=number % 2 == 1)


def _repeatable(op: Op, backend: str, sample: Sample) -> Sample:
    """The case as it must be called for bitwise repeatable gradients."""
    if backend == "cuda" and op.scatters and "deterministic" in sample.params:
        return dataclasses.replace(sample, params={**sample.params, "deterministic": True})
    return sample


def findings(
    case: Case, backend: str, arguments: tuple[str, ...], *, mode: str = "fast", seed: int = 0, repeat: bool = True
) -> Iterator[tuple[str, Finding]]:
    """Every check of one case: (argument, finding)."""
    wanted = tuple(name for name in case.arguments if name in arguments)
    if not wanted:
        return
    # all gradients, whichever are looked at: a row is the same alone and in the whole table
    grads = backward(case.op, case.sample, backend, case.grad_output)
    repeatable = _repeatable(case.op, backend, case.sample)
    again = [backward(case.op, repeatable, backend, case.grad_output) for _ in range(2 if repeat else 0)]
    half = DTYPES[case.dtype] in HALVES
    for argument in wanted:
        gradient = grads[argument]
        if case.sample.expected:
            if argument in case.sample.expected:
                yield argument, case.check_kink(backend, argument, gradient)
            continue
        yield argument, case.check_reference(backend, argument, gradient)
        if case.affine(argument):
            yield argument, case.check_adjoint(backend, argument, gradient, seed=seed)
        if not half:
            single, directions = (None, 4) if mode == "full" else (4, 2)
            yield (
                argument,
                case.check_differences(backend, argument, gradient, seed=seed, elements=single, directions=directions),
            )
        if not repeat:
            continue
        one, two = (np.ascontiguousarray(run[argument]).view(np.uint8) for run in again)
        different = float(np.mean(one != two)) if one.size else 0.0
        yield argument, Finding("repeat", case.sample.label, different, np.finfo(np.float64).tiny)


def _command(row: Row, mode: str, seed: int) -> str:
    return (
        f"dcn-check gradients --op {row.op} --arg {row.argument} --dtype {row.dtype} --backend {row.backend} "
        f"--mode {mode} --seed {seed}"
    )


def check_gradients(
    *,
    ops: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    backends: tuple[str, ...] = ("reference", "cpu"),
    mode: str = "fast",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Row]:
    """The table of `dcn-check gradients`, row by row.

    Parameters
    ----------
    ops, arguments, dtypes, backends : names
        Empty `ops` or `arguments`: all.
    mode : {"fast", "full"}
        "fast" takes central differences along a few elements and directions of each case, "full" along every element.
    seed : int
    progress : function of (what, done, total), optional

    Yields
    ------
    Row
        One for each operator, differentiable argument, dtype and backend.
    """
    table = [
        (op, dtype, backend)
        for op in (OPS[name] for name in (ops or OPS))
        for backend in backends
        for dtype in dtypes
        if any(not arguments or name in arguments for name in op.differentiable)
    ]
    for done, (op, dtype, backend) in enumerate(table):
        if progress:
            progress(f"{op.name} {dtype} {backend}", done, len(table))
        wanted = tuple(name for name in op.differentiable if not arguments or name in arguments)
        missing = not_written(op, backend)
        if missing:
            for argument in wanted:
                yield Row(op.name, argument, dtype, backend, "SKIP", missing)
            continue
        worst: dict[str, dict[str, Finding]] = {name: {} for name in wanted}
        failure = ""
        try:
            for case in all_cases(op, dtype, seed):
                for argument, finding in findings(case, backend, wanted, mode=mode, seed=seed):
                    known = worst[argument].get(finding.check)
                    if known is None or finding.ratio > known.ratio:
                        worst[argument][finding.check] = finding
        except Exception as error:  # an operator that raises is a failed row, not the end of the table
            failure = f"{type(error).__name__}: {error}"
        for argument in wanted:
            yield _row(op, argument, dtype, backend, worst[argument], failure, mode, seed)
    if progress and table:
        progress("", len(table), len(table))


def _row(
    op: Op, argument: str, dtype: str, backend: str, found: dict[str, Finding], failure: str, mode: str, seed: int
) -> Row:
    row = Row(op.name, argument, dtype, backend, "PASS")
    row.checks = {check: found[check].ratio for check in CHECKS if check in found}
    if found:
        # repeat has no tolerance, so it is the worst only where it failed
        worst = max(found.values(), key=lambda f: f.ratio if f.check != "repeat" or f.error else -1.0)
        row.check, row.case, row.error, row.tolerance = worst.check, worst.case, worst.error, worst.tolerance
        row.index, row.analytic, row.numeric = worst.index, worst.analytic, worst.numeric
        if worst.ratio > 1 or worst.ratio != worst.ratio:
            row.status, row.reason = "FAIL", f"{worst.check}: {worst.case}"
    if failure:
        row.status, row.reason = "FAIL", failure
    elif not found:
        row.status, row.reason = "SKIP", "no case has this argument"
    if row.status == "FAIL":
        row.command = _command(row, mode, seed)
    return row


# ---------------------------------------------------------------- backends against each other


def check_backends(
    *,
    ops: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    backends: tuple[str, ...] = BACKENDS,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Row]:
    """The table of `dcn-check backends`: outputs and gradients of every backend against the reference's.

    Yields
    ------
    Row
        One for each operator, result ("output" or an argument's gradient), dtype and backend but the reference.
    """
    table = [
        (OPS[name], dtype, backend)
        for name in (ops or OPS)
        for backend in backends
        if backend != "reference"
        for dtype in dtypes
    ]
    for done, (op, dtype, backend) in enumerate(table):
        if progress:
            progress(f"{op.name} {dtype} {backend}", done, len(table))
        results = ("output", *op.differentiable)
        missing = not_written(op, backend)
        if missing:
            for result in results:
                yield Row(op.name, result, dtype, backend, "SKIP", missing)
            continue
        worst: dict[str, Finding] = {}
        failure = ""
        try:
            for case in all_cases(op, dtype, seed):
                for result, finding in _against_reference(case, backend):
                    if result not in worst or finding.ratio > worst[result].ratio:
                        worst[result] = finding
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        for result in results:
            found = {"reference": worst[result]} if result in worst else {}
            row = _row(op, result, dtype, backend, found, failure, "fast", seed)
            if row.command:
                row.command = f"dcn-check backends --op {op.name} --dtype {dtype} --backend {backend} --seed {seed}"
            yield row
    if progress and table:
        progress("", len(table), len(table))


def _against_reference(case: Case, backend: str) -> Iterator[tuple[str, Finding]]:
    got, want = forward(case.op, case.sample, backend), forward(case.op, case.exact, "reference")
    error, index = relative_error(got, want)
    bound = tolerance(case.dtype, reduction_length(case.op, case.sizes, "forward", prod(got.shape)))
    values = (float(got[index]), float(want[index])) if index else (None, None)
    yield "output", Finding("reference", case.sample.label, error, bound, index, *values)
    grads = backward(case.op, case.sample, backend, case.grad_output)
    for argument in case.arguments:
        yield argument, case.check_reference(backend, argument, grads[argument])
