"""Each file of examples/ runs to its end; its own checks are in it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from dcn_kernels.environment import why_not

# What each needs beside the package, and how it is called.
NEEDS = {
    "numpy_only.py": [],
    "torch_training.py": ["torch"],
    "jax_training.py": ["jax"],
    "cupy_arrays.py": ["cupy"],
    "digits.py": ["torch", "sklearn", "matplotlib"],
    "overhead.py": ["torch", "jax"],
}
OPTIONS = {"digits.py": ["--quick", "--picture", "digits.png"], "overhead.py": ["--rounds", "2", "--output", "o.json"]}


@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    for package in NEEDS[name]:
        if package == "cupy" and why_not("cuda"):
            pytest.skip(f"cuda: {why_not('cuda')}")
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, str(ROOT / "examples" / name), *OPTIONS.get(name, [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if name == "digits.py":
        assert (tmp_path / "digits.png").stat().st_size > 10_000
        for kind in ("plain", "deformable"):
            share = float(re.search(rf"^{kind} +([\d.]+) %", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
            assert share > 20, "no better than guessing"
    if name == "overhead.py":
        record = json.loads((tmp_path / "o.json").read_text())
        assert all(len(samples) == 2 and min(samples) > 0 for samples in record["samples_us"].values())


@pytest.mark.parametrize(
    ("lacks", "options", "says"),
    [
        (("torch", "sklearn"), [], "needs torch and sklearn: pip install torch scikit-learn"),
        (("matplotlib",), ["--picture", "a.png"], "--picture needs matplotlib: pip install matplotlib"),
    ],
)
def test_digits_says_what_it_needs_before_it_starts(
    lacks: tuple[str, ...], options: list[str], says: str, tmp_path: Path
) -> None:
    if "torch" not in lacks and not (find_spec("torch") and find_spec("sklearn")):
        pytest.skip("torch is not installed")
    file = str(ROOT / "examples" / "digits.py")
    code = f"""
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {lacks} else find_spec(name, *more)
sys.argv = {[file, *options]}
runpy.run_path({file!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_documentation_says_what_the_overhead_record_says() -> None:
    (path,) = (ROOT / "bench_results" / "overhead").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    torch, gradient, jitted = (
        round(rows[name]["over_plain_us"]) for name in ("torch", "torch, recording a gradient", "JAX, jitted")
    )
    said = f"torch {torch}, torch recording a gradient {gradient}, JAX jitted {jitted}."
    assert said in " ".join((ROOT / "docs" / "how-to" / "measure.md").read_text().split())
