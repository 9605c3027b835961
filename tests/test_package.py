"""What is installed, what an import costs, and that the documents' commands and examples run."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

import dcn_kernels
from dcn_kernels.environment import why_not

SOURCES = ("dcn_kernels", "cli", "pyproject.toml", "README.md", "LICENSE")
HEAVY = ("numba", "cupy", "torch", "jax", "click", "rich", "scipy", "matplotlib")
README = (ROOT / "README.md").read_text()
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, in a folder from which the checkout is not seen."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


# ---------------------------------------------------------------- installed


def copy_of_the_sources(folder: Path) -> Path:
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def install(folder: Path, source: Path, *options: str) -> Path:
    """Install with the build tools that are here already, under a prefix of its own; returns its site-packages."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*command, "--ignore-installed", "--prefix", str(folder / "prefix"), *options, str(source)], folder)
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder / "prefix")}))


LOOK = """
import site, sys
site.addsitedir({installed!r})
sys.path.append({dependencies!r})  # without its .pth files, so without any other dcn_kernels
import dcn_kernels, dcn_kernels.cli
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
print(dcn_kernels.__file__)
for package in {packages!r}:
    (folder,) = find_spec(package).submodule_search_locations  # without an import: that of torch may not be there
    for file in Path(folder).iterdir():
        if file.is_file():
            print("file", package, file.name)
for entry in metadata.distribution("dcn-kernels").entry_points:
    print("command", entry.name, entry.load().name)
"""


def check_installed(folder: Path, installed: Path, where: Path) -> None:
    """All files and both commands are there, in `where`."""
    code = LOOK.format(packages=PACKAGES, dependencies=sysconfig.get_path("purelib"), installed=str(installed))
    first, *lines = run([sys.executable, "-S", "-c", code], folder).stdout.splitlines()
    assert Path(first).is_relative_to(where)
    files = {tuple(line.split()[1:]) for line in lines if line.startswith("file")}
    expected = {("dcn_kernels", "py.typed")}
    for source, package in (("dcn_kernels", ""), ("cli", ".cli")):
        for path in (ROOT / source).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh", ".css", ".js"):
                inner = ".".join(path.relative_to(ROOT / source).parts[:-1])
                expected.add((f"dcn_kernels{package}" + (f".{inner}" if inner else ""), path.name))
    assert any(name.endswith(".cu") for _, name in expected)
    assert expected <= files
    assert {line.split()[1] for line in lines if line.startswith("command")} == {"dcn-bench", "dcn-check"}
    for command in ("dcn-bench", "dcn-check"):
        assert (folder / "prefix" / "bin" / command).is_file()


def test_installed_package_has_all_files_and_commands(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path / "source")
    installed = install(tmp_path, source)
    shutil.rmtree(source)  # it needs nothing of it
    check_installed(tmp_path, installed, installed)


def test_editable_package_has_all_files_and_commands_and_sees_edits(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path / "source")
    installed = install(tmp_path, source, "--editable")
    check_installed(tmp_path, installed, source)
    (source / "dcn_kernels" / "added_later.py").write_text("ANSWER = 42\n")
    code = LOOK.format(
        packages=PACKAGES, dependencies=sysconfig.get_path("purelib"), installed=str(installed)
    ).partition("print")[0]
    added = run([sys.executable, "-S", "-c", code + "print(import_module('dcn_kernels.added_later').ANSWER)"], tmp_path)
    assert added.stdout == "42\n"


def test_metadata_agrees_with_the_package() -> None:
    from importlib.metadata import metadata

    assert metadata("dcn-kernels")["Version"] == dcn_kernels.__version__
    assert f"## {dcn_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# ---------------------------------------------------------------- import


def test_import_loads_no_compiler_framework_or_command_line(tmp_path: Path) -> None:
    code = f"import dcn_kernels, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run([sys.executable, "-c", code], tmp_path).stdout == "[]\n"


def test_reference_backend_loads_no_compiler(tmp_path: Path) -> None:
    code = f"""
import sys, numpy as np, dcn_kernels
image = np.ones((1, 1, 2, 2))
dcn_kernels.offset_sample2d(image, np.zeros((1, 2, 2, 2)), backend="reference")
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run([sys.executable, "-c", code], tmp_path).stdout == "[]\n"


# ---------------------------------------------------------------- documents

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "dcn_kernels").rglob("*.py")
    if ">>>" in path.read_text()
)


def test_every_public_function_has_an_example() -> None:
    for name in dcn_kernels.__all__:
        function = getattr(dcn_kernels, name)
        if callable(function):
            assert ">>> " in function.__doc__, name


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    if name.startswith("dcn_kernels.torch"):
        pytest.importorskip("torch", reason="torch is not installed")
    if name == "dcn_kernels.jax":
        pytest.importorskip("jax", reason="jax is not installed")
    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_readme_example_runs(code: str, tmp_path: Path) -> None:
    for package in ("torch", "jax"):
        if f"import {package}" in code:
            pytest.importorskip(package, reason=f"{package} is not installed")
    if "import cupy" in code and why_not("cuda"):
        pytest.skip(f"cuda: {why_not('cuda')}")
    run([sys.executable, "-c", code], tmp_path)


# Run in other ways: the first by the tests above, the next two by .ci/run; a GPU is needed for the last.
ELSEWHERE = ("pip install .", "make profile", "make test", "make gpu")
COMMANDS = [
    line.removeprefix("$ ").partition("#")[0].strip()
    for block in blocks("console")
    for line in block.splitlines()
    if line.startswith("$ ")
]


def test_ci_begins_with_what_a_stranger_types() -> None:
    steps = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert steps[:2] == [command for command in COMMANDS if command in ("make profile", "make test")]


def test_readme_shows_commands() -> None:
    assert {"pip install .", "make profile", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_readme_command_runs(command: str, tmp_path: Path) -> None:
    """In a folder with the records alone, with the commands of this environment."""
    shutil.copytree(ROOT / "bench_results", tmp_path / "bench_results", ignore=shutil.ignore_patterns("local"))
    scripts = sysconfig.get_path("scripts")
    run(["bash", "-c", command], tmp_path, PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}")


def test_readme_names_every_operator_and_stays_short() -> None:
    """docs/reference/operators.md has their arguments: tests/test_docs.py."""
    for name in dcn_kernels.OPS:
        assert f"| `{name}` |" in README, name
    assert README.count("\n") < 130


def test_readme_s_table_of_speed_is_that_of_the_published_records(tmp_path: Path) -> None:
    (command,) = (command for command in COMMANDS if command.startswith("dcn-bench plot") and "speed.md" in command)
    shutil.copytree(ROOT / "bench_results", tmp_path / "bench_results", ignore=shutil.ignore_patterns("local"))
    run(["bash", "-c", command], tmp_path, PATH=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    assert f"<!-- speed -->\n{(tmp_path / 'speed.md').read_text()}<!-- /speed -->" in README


@pytest.mark.slow
def test_make_profile_works_on_a_fresh_clone_and_the_second_run_installs_nothing(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(["git", "clone", "--quiet", str(ROOT), str(clone)], tmp_path)
    first = run(["make", "profile"], clone)
    assert "pip install" in first.stdout
    assert len(list((clone / "bench_results" / "local").glob("*.json"))) == 1, "no record was saved"
    assert run(["git", "status", "--porcelain"], clone).stdout == ""
    second = run(["make", "--dry-run", "profile"], clone)
    assert "pip install" not in second.stdout and "dcn-bench profile" in second.stdout
