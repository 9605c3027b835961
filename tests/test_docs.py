"""The documentation: what its pages show is what happens, its commands run, and it leaves out no public name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import dcn_kernels
from dcn_kernels.environment import why_not

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md")) if "made" not in path.parts
}
BLOCK = re.compile(r"^```(python|text|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [name for name, text in PAGES.items() if "```python" in text]


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("page", WITH_CODE)
def test_a_page_s_code_runs_and_prints_what_the_page_says(page: str, tmp_path: Path) -> None:
    """In one session, from top to bottom; a block that begins with `# folder/file.py` is that file."""
    blocks = BLOCK.findall(PAGES[page])
    code = "\n".join(text for kind, text in blocks if kind == "python")
    for package in ("torch", "jax"):
        if re.search(rf"^import {package}\b", code, re.MULTILINE):
            pytest.importorskip(package, reason=f"{package} is not installed")
    if "import cupy" in code and why_not("cuda"):
        pytest.skip(f"cuda: {why_not('cuda')}")
    session, printed = [], []
    for place, (kind, text) in enumerate(blocks):
        named = re.match(r"# (\w+(?:/\w+)*\.py)\n", text)
        if kind == "python" and named:
            file = tmp_path / named[1]
            for folder in [*file.parents][: named[1].count("/")]:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").touch()
            file.write_text(text)
        elif kind == "python":
            shown = place + 1 < len(blocks) and blocks[place + 1][0] == "text"
            session.append(text + f"print({'=' * 8 + str(place)!r})\n")
            printed.append((f"{'=' * 8}{place}", blocks[place + 1][1] if shown else None))
    rest = run([sys.executable, "-c", "import sys; sys.path.insert(0, '')\n" + "\n".join(session)], tmp_path).stdout
    for mark, expected in printed:
        got, _, rest = rest.partition(f"{mark}\n")
        if expected is not None:
            assert got == expected


def commands() -> list[Any]:
    found = []
    for name, text in PAGES.items():
        for kind, block in BLOCK.findall(text):
            lines = [line for line in block.splitlines() if line.startswith("$ ")] if kind == "console" else []
            for line in lines:
                command = line.removeprefix("$ ").partition("  #")[0].strip()
                if not command.startswith(("pip install", "make gpu")):  # the tests of the package; a GPU is needed
                    found.append(pytest.param(command, id=f"{name}: {command}"))
    return found


@pytest.mark.parametrize("command", commands())
def test_a_page_s_command_runs(command: str, tmp_path: Path) -> None:
    """In a folder with the records alone, with the commands of this environment."""
    shutil.copytree(ROOT / "bench_results", tmp_path / "bench_results", ignore=shutil.ignore_patterns("local"))
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    run(["bash", "-c", command], tmp_path, PATH=path)


def test_the_reference_names_every_public_function() -> None:
    text = PAGES["reference/operators.md"] + PAGES["reference/deformation.md"]
    listed = set(re.findall(r"^   (\w+)$", text, re.MULTILINE))
    assert listed == {name for name in dcn_kernels.__all__ if callable(getattr(dcn_kernels, name))}


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_reference_names_everything_of_an_adapter(name: str) -> None:
    if name == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        from dcn_kernels import torch as adapter

        wanted = set(adapter.__all__)
        assert torch
    else:
        wanted = {*dcn_kernels.OPS, "disabled_checks"}
    listed = set(re.findall(r"^   (\w+)$", PAGES[f"reference/{name}.md"], re.MULTILINE))
    assert listed == wanted


def test_the_operator_table_is_that_of_the_rows() -> None:
    """The table is copied from what this test prints; a new row must be in it."""
    for op in dcn_kernels.OPS.values():
        assert operator_line(op) in PAGES["reference/operators.md"], (
            f"docs/reference/operators.md lacks this line of its table:\n{operator_line(op)}"
        )


def operator_line(op: Any) -> str:
    """One line of the table, from the row alone."""
    arrays = ", ".join(
        f"{name}{'?' * (name in op.optional)} ({', '.join(shape.split())})" for name, shape in op.arrays.items()
    )
    return f"| `{op.name}` | {arrays} | ({', '.join(op.output.split())}) | {', '.join(op.differentiable)} |"


def test_links_between_pages_and_to_pictures_lead_somewhere() -> None:
    made = ("made/borders.svg", "made/corners.svg")
    beside = {f"../{name}": (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
    for name, text in {**PAGES, **beside}.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http") and target not in made:
                assert (DOCS / name).parent.joinpath(target).exists(), f"{name}: {target}"
