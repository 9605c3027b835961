"""The sdist and the wheel: what is in them, what they say of themselves, and that a bare environment can use them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_classifiers_are_what_the_workflow_runs() -> None:
    pythons = set(re.findall(r'python-version: "(3\.\d+)"', WORKFLOW))
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", c)}
    assert named == pythons
    systems = {"ubuntu": "POSIX :: Linux", "macos": "MacOS"}
    runs = {systems[name] for name in re.findall(r"runs-on: ([a-z]+)-", WORKFLOW)}
    assert {c.partition(" :: ")[2] for c in PROJECT["classifiers"] if c.startswith("Operating System")} == runs


def test_the_workflow_runs_the_oldest_of_each_dependency() -> None:
    (pinned,) = re.findall(r"pip install (numpy==.*)", WORKFLOW)
    oldest = dict(part.split("==") for part in pinned.split())
    for requirement in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["plot"]):
        name, least = requirement.split(">=")
        assert oldest[name].removesuffix(".0").startswith(least.removesuffix(".0")), requirement


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of the tracked files, and the wheel made of that sdist."""
    if not find_spec("build"):
        pytest.skip("build is not installed")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    tracked = run(["git", "ls-files", "-z"], ROOT).split("\0")
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)], folder)
    (sdist,), (wheel,) = (list((folder / "dist").glob(kind)) for kind in ("*.tar.gz", "*.whl"))
    return {"sdist": sdist, "wheel": wheel, "source": source}


@pytest.mark.slow
def test_wheel_and_sdist_hold_all_files_and_are_for_every_platform(built: dict[str, Path]) -> None:
    assert built["wheel"].name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built["wheel"]) as wheel, tarfile.open(built["sdist"]) as sdist:
        inside = set(wheel.namelist())
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    for folder, installed in (("dcn_kernels", "dcn_kernels"), ("cli", "dcn_kernels/cli")):
        for path in (built["source"] / folder).rglob("*"):
            if path.is_file():
                assert f"{installed}/{path.relative_to(built['source'] / folder)}" in inside, path
                assert str(path.relative_to(built["source"])) in in_sdist, path
    assert {"README.md", "LICENSE", "pyproject.toml"} <= in_sdist
    assert not [name for name in inside if not name.startswith(("dcn_kernels/", "dcn_kernels-"))]


@pytest.mark.slow
def test_metadata_is_complete_and_twine_accepts_it(built: dict[str, Path]) -> None:
    pytest.importorskip("twine", reason="twine is not installed")
    run([sys.executable, "-m", "twine", "check", "--strict", str(built["sdist"]), str(built["wheel"])], ROOT)
    with zipfile.ZipFile(built["wheel"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "dcn-kernels" and metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == "MIT" and metadata["Summary"] == PROJECT["description"]
    assert metadata["Description-Content-Type"] == "text/markdown" and "deform_conv2d" in metadata.get_payload()
    assert metadata.get_all("Classifier") == PROJECT["classifiers"]
    needed = {re.split(r"[>=!~ ]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra" not in line}
    assert needed == {"numpy", "numba", "ml_dtypes", "click", "rich"}


USE = """
import numpy as np
from importlib.metadata import requires
from dcn_kernels import deform_conv2d, deform_conv2d_backward
image, weight = np.ones((1, 4, 6, 6), np.float32), np.ones((2, 4, 3, 3), np.float32)
offset = np.zeros((1, 18, 6, 6), np.float32)
print(deform_conv2d(image, offset, weight, padding=1)[0, 0, 3, 3])
print(deform_conv2d_backward(np.ones((1, 2, 6, 6), np.float32), image, offset, weight, padding=1)["weight"][0, 0, 1, 1])
"""


@pytest.mark.slow
def test_a_bare_environment_installs_and_uses_the_wheel_that_was_made_of_the_sdist(
    built: dict[str, Path], tmp_path: Path
) -> None:
    """With the dependencies that its metadata names and nothing else; needs a package index."""
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", str(built["wheel"])], tmp_path)
    assert run([str(python), "-c", USE], tmp_path) == "36.0\n36.0\n"
    assert "0.1.0" in run([str(tmp_path / "bare" / "bin" / "dcn-bench"), "--version"], tmp_path)
    checked = ["gradients", "--op", "offset_sample2d", "--backend", "cpu", "--dtype", "float64"]
    assert "2 pass, 0 fail" in run([str(tmp_path / "bare" / "bin" / "dcn-check"), *checked], tmp_path)
    assert "available" in run([str(tmp_path / "bare" / "bin" / "dcn-bench"), "env"], tmp_path)
