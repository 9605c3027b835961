"""The rooms of the package: imports run downwards only, without a circle, and a module never hides a function."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from conftest import ROOT

import dcn_kernels

# From the top floor down; a room imports from its own floor's room and from those below.
FLOORS = (
    ("cli",),
    ("torch", "jax", "check", "bench", "deformation"),
    ("ops",),
    ("environment",),
    ("reference", "cpu", "cuda"),
    ("dispatch",),
    ("dtypes",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms of one floor know nothing of each other, but that a benchmark compares by the checks' own tolerances.
NEIGHBOURS = {("bench", "check")}


def _modules() -> dict[str, Path]:
    """Dotted name -> file, of the package as it is installed (the commands in cli/ are dcn_kernels.cli)."""
    found = {}
    for folder, name in ((ROOT / "dcn_kernels", "dcn_kernels"), (ROOT / "cli", "dcn_kernels.cli")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = _modules()


def _imports(module: str) -> set[str]:
    """The modules of the package that a file imports, those inside functions and under TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES and name != module}


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_module_stands_in_a_room() -> None:
    assert {_room(module) for module in MODULES} - {""} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"dcn_kernels"}))
def test_imports_run_downwards(module: str) -> None:
    here = _room(module)
    for other in _imports(module):
        there = _room(other)
        if not there:  # the public functions: for adapters and commands, as for anyone
            assert here in ("cli", "torch", "jax"), f"{module} imports the package itself"
        elif there != here and (here, there) not in NEIGHBOURS:
            assert FLOOR[here] < FLOOR[there], f"{module} imports {other}, which stands on its own floor or above"


def test_no_circle_of_imports() -> None:
    edges = {module: _imports(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in edges[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_no_module_of_the_top_level_bears_a_function_s_name() -> None:
    functions = {name for name in dcn_kernels.__all__ if inspect.isfunction(getattr(dcn_kernels, name))}
    assert functions
    assert not functions & {module.split(".")[1] for module in MODULES if module.count(".") == 1}
