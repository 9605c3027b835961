"""Which backends there are, and arrays on them. Nothing here names an operator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import dcn_kernels
from dcn_kernels.check.calls import BACKENDS, relative_error, to_backend, to_numpy, tolerance
from dcn_kernels.check.gradients import not_written
from dcn_kernels.dispatch.call import module_of, public
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES
from dcn_kernels.environment import why_not

ROOT = Path(__file__).parent.parent  # the checkout: README.md, Makefile, cli/

with suppress(ModuleNotFoundError):  # see pytest_make_collect_report
    from hypothesis import settings

    # Compiling a kernel takes seconds, so no example has a deadline; the same examples in every run.
    settings.register_profile("same every time", derandomize=True, deadline=None, max_examples=100, database=None)
    settings.load_profile("same every time")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """With `-m cuda` a file that lacks a package of tests alone is a skip: nothing is installed where a GPU is lent."""
    report = yield
    lacks = re.search(r"No module named '(hypothesis|scipy)", str(report.longrepr)) if report.failed else None
    if lacks and collector.config.option.markexpr == "cuda":
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {lacks[1]} is not installed")
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """The last lines of a run without torch or JAX: what was left out, and the command that runs it."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skips = [str(report.longrepr) for report in reporter.stats.get("skipped", [])] if reporter else []
    lacks = re.compile(r"(test_\w+\.py).*Skipped: (torch|jax|sklearn|onnx\w*|CuPy) is not installed")
    left_out = [found.groups() for found in map(lacks.search, skips) if found]
    if left_out:
        files, packages = (", ".join(sorted(set(names))) for names in zip(*left_out, strict=True))
        reporter.write_line(f"Left out, because {packages} cannot be imported: {len(left_out)} tests or whole files")
        reporter.write_line(f"of {files}.")
        reporter.write_line("They are run by: make test-frameworks", bold=True)


@dataclass(frozen=True)
class Backend:
    """A column of the table of operators."""

    name: str

    def forward(self, op: Op, arrays: dict[str, Any], params: dict[str, Any], **more: Any) -> np.ndarray:
        """Call the public function with NumPy arrays."""
        function = public(op)
        return to_numpy(function(**to_backend(self.name, arrays), **params, **more, backend=self.name))

    def backward(self, op: Op, arrays: dict[str, Any], params: dict[str, Any], **more: Any) -> dict[str, np.ndarray]:
        """Call the public gradient function with NumPy arrays, `grad_output` among them."""
        function = public(op, "backward")
        return to_numpy(function(**to_backend(self.name, arrays), **params, **more, backend=self.name))


def assert_close(got: np.ndarray, want: np.ndarray, dtype: str, length: float = 1, what: str = "") -> None:
    """Within `calls.tolerance` of sums of `length` terms."""
    error, index = relative_error(got, want)
    bound = tolerance(dtype, length)
    assert error <= bound, f"{what}: {got[index]} for {want[index]} at {index}: error {error:.3g}, bound {bound:.3g}"


def cast(sample: Sample, op: Op, dtype: str, coordinates: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a sample in one dtype, those that may differ in `coordinates`."""
    return {
        name: array.astype(DTYPES[(coordinates or dtype) if name in op.coordinates else dtype])
        for name, array in sample.arrays.items()
    }


def invoked(main: Any, *arguments: str) -> Result:
    """A command in this process; a traceback fails the test."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def one_line(result: Result, code: int) -> str:
    """A usage error: this exit code, one line on stderr, nothing on stdout."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and result.stdout == "", result.output
    return lines[0]


def cases() -> list[Any]:
    """(row, sample) for every sample of every row."""
    return [
        pytest.param(op, sample, id=f"{op.name}-{sample.label}")
        for op in dcn_kernels.OPS.values()
        for sample in op.samples(0)
    ]


def first_cases() -> list[Any]:
    """(row, sample) with the sample of each row that has the most arguments."""
    return [
        pytest.param(op, max(op.samples(0), key=lambda sample: len(sample.arrays)), id=op.name)
        for op in dcn_kernels.OPS.values()
    ]


def has_kernels(op: Op) -> bool:
    """The row has its CUDA file; until then what needs it is left out."""
    return find_spec(f"{op.package}.cuda") is not None and find_spec(module_of(op, "cuda")) is not None


def skip_without_kernels(request: pytest.FixtureRequest) -> None:
    """Leave out a test of a row that has no CUDA file."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "op" in params and not has_kernels(params["op"]):
        pytest.skip(not_written(params["op"], "cuda"))


# test_ops.py says which backends are left out here, and why; the others leave them out without a word. `reference` and
# `cpu` always run: where they do not, that is a failure.
RUNNING = [name for name in BACKENDS if name != "cuda" or not why_not(name)]


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.cuda] if name == "cuda" else []) for name in RUNNING])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that runs here, in turn."""
    if request.param == "cuda":
        skip_without_kernels(request)
    return Backend(request.param)
