"""A row needs nothing but its own files: examples/own_operator has no CUDA file, and no list names it.

It is registered in processes of their own, and everything that reads the rows must take it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from dcn_kernels.dispatch.row import Op

REGISTER = "from dcn_kernels import OPS\nfrom own_operator import row\n\nOPS[row.name] = row\n"
NAME = "offset_sample1d"


def test_contributing_walks_through_all_of_its_files() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = [path for path in (ROOT / "examples" / "own_operator").rglob("*.py") if path.read_text()]
    assert len(files) == 3
    for path in files:
        assert f"`{path.relative_to(ROOT)}`" in text
    assert REGISTER.splitlines()[-1] in text
    for field in dataclasses.fields(Op):
        without = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        assert not without or field.name in ("name", "module") or f"`{field.name}`" in text, field.name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the package alone, and a module `register` that puts its row into the registry."""
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "examples" / "own_operator", tmp_path / "own_operator", ignore=leave_out)
    (tmp_path / "register.py").write_text(REGISTER)
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    """What Python prints in a process of its own that finds the package."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout


def command(name: str, *arguments: str) -> str:
    """The text of a program that registers the row and runs a command."""
    return f"import register\nfrom dcn_kernels.cli.{name} import main\nmain({list(arguments)!r})\n"


def counts(report: str) -> dict[str, int]:
    """How pytest's last line counts."""
    last = report.strip().splitlines()[-1]
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}


def test_its_examples_run(folder: Path) -> None:
    run(folder, "-c", "import doctest, own_operator, sys; sys.exit(doctest.testmod(own_operator).failed)")


@pytest.mark.parametrize("check", ["gradients", "backends"])
def test_dcn_check_takes_it(folder: Path, check: str) -> None:
    said = run(folder, "-c", command("check", check, "--op", NAME, "--backend", "reference", "--backend", "cpu"))
    rows = 16 if check == "gradients" else 12  # input, offset (and output) in four dtypes
    assert said.splitlines()[-1] == f"{rows} pass, 0 fail, 0 skip"


def test_dcn_check_leaves_its_cuda_rows_out_with_the_reason(folder: Path) -> None:
    said = run(folder, "-c", "import register\nfrom dcn_kernels.check.gradients import check_gradients\n"
               f"for row in check_gradients(ops=({NAME!r},), backends=('cuda',)):\n"
               "    print(row.status, row.reason)\n")  # fmt: skip
    reason = f"not written for cuda: there is no own_operator.cuda.{NAME}"
    assert said.splitlines() == [f"SKIP {reason}"] * 8


def test_dcn_bench_takes_it(folder: Path) -> None:
    arguments = ("profile", "--op", NAME, "--shape", "2x20x300", "--shape", "C=4,L=50,spread=1.5", "--budget", "0.001")
    lines = run(folder, "-c", command("bench", *arguments, "--no-save", "--csv")).splitlines()
    rows = [line.split(",") for line in lines[1:]]
    assert len(rows) == 2 * 2 * 2  # layers, offsets, directions
    assert {row[lines[0].split(",").index("layer")] for row in rows} == {"2x20x300", "1x4x50"}
    listed = run(folder, "-c", command("bench", "profile", "--op", NAME, "--shape", "2x20x300", "--list"))
    assert "N=2,C=20,L=300" in listed


def test_dcn_bench_refuses_sizes_that_it_has_not(folder: Path) -> None:
    program = command("bench", "profile", "--op", NAME, "--shape", "C=4,L=50,H=3")
    with pytest.raises(AssertionError, match=f"{NAME} has no size 'H'; it has: N, C, L, spread"):
        run(folder, "-c", program)


@pytest.mark.parametrize(
    ("files", "least"),
    [
        ("ops roi_rules threads", 100),
        pytest.param("interop", 10, marks=pytest.mark.slow),
        pytest.param("torch", 10, marks=pytest.mark.slow),
        pytest.param("jax", 5, marks=pytest.mark.slow),
    ],
)
def test_the_table_tests_take_it(folder: Path, files: str, least: int) -> None:
    for package in ("torch", "jax"):
        if package in files and not find_spec(package):
            pytest.skip(f"{package} is not installed")
    paths = [str(ROOT / "tests" / f"test_{name}.py") for name in files.split()]
    report = run(folder, "-m", "pytest", "-p", "register", "-q", "-rs", "-o", f"cache_dir={folder / 'cache'}",
                 "-c", str(ROOT / "pyproject.toml"), "-k", NAME, *paths)  # fmt: skip
    found = counts(report)
    assert found["passed"] >= least and "failed" not in found and "error" not in found, report[-2000:]
    if "roi_rules" in files:
        assert f"not written for cuda: there is no own_operator.cuda.{NAME}" in " ".join(report.split())


@pytest.mark.slow
def test_the_stand_in_for_a_gpu_leaves_it_out(folder: Path) -> None:
    """Its tests there are skips with the reason; the other rows' launchers are put in place as before."""
    report = run(folder, "-m", "pytest", "-p", "register", "-q", "-rs", "-o", f"cache_dir={folder / 'cache'}",
                 "-c", str(ROOT / "pyproject.toml"), "-k", f"{NAME} or (wrt_may_be_one_name and offset_sample2d)",
                 str(ROOT / "tests" / "test_cuda_host.py"))  # fmt: skip
    if "runs on x86-64 alone" in report or "not installed" in report:
        pytest.skip("the stand-in does not run here")
    found = counts(report)
    assert found["passed"] == 1 and found["skipped"] >= 50 and "failed" not in found and "error" not in found
    assert f"not written for cuda: there is no own_operator.cuda.{NAME}" in " ".join(report.split())
