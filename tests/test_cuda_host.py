"""The CUDA kernels on the CPU: compiled by g++ from the same text, started by the same launchers (tests/cuda_host).

The tests of the other backends are run again, with the kernels behind a backend called "cuda_host"; then come schedules,
planted bugs, and what only GPU code has: workspaces, vector widths, 64-bit addresses.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Backend
from cuda_host.host import HostDevice, Library, missing

import dcn_kernels
from dcn_kernels import arrays as _arrays
from dcn_kernels.op import Op

NAME = "cuda_host"
SANITIZER = os.environ.get("HOST_SANITIZER", "")
pytestmark = pytest.mark.cuda_host


def on_kernels(op: Op) -> bool:
    """Whether an operator has kernels."""
    return find_spec(f"dcn_kernels.cuda.{op.module}") is not None


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Library:
    """Compiled kernels, kept from run to run under a hash of all that went into them."""
    if missing():
        pytest.skip(missing())
    return Library(Path(pytestconfig.cache.mkdir("cuda_host")), SANITIZER)


@pytest.fixture
def device(library: Library) -> HostDevice:
    """One stand-in for a GPU."""
    return HostDevice(library)


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The kernels as a backend that the public functions take by name."""
    op = getattr(request.node, "callspec", None) and request.node.callspec.params.get("op")
    if op is not None and not on_kernels(op):
        pytest.skip(f"no kernels of {op.name} yet")
    install(device, monkeypatch)
    yield Backend(NAME)


def install(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the launchers, on this device, where the dispatcher looks for a backend's functions."""
    monkeypatch.setattr(_arrays, "BACKENDS", (*_arrays.BACKENDS, NAME))
    for op in dcn_kernels.OPS.values():
        if on_kernels(op):
            path = f"dcn_kernels.{NAME}.{op.module}"
            module = sys.modules.get(path, ModuleType(path))
            launcher = import_module(f"dcn_kernels.cuda.{op.module}")
            for name in (op.name, f"{op.name}_backward"):
                setattr(module, name, functools.partial(getattr(launcher, name), device=device))
            monkeypatch.setitem(sys.modules, f"dcn_kernels.{NAME}", ModuleType(f"dcn_kernels.{NAME}"))
            monkeypatch.setitem(sys.modules, path, module)


def _tests_of_backends() -> dict[str, Any]:
    """The tests of these modules that take a backend; collected here, they get this module's."""
    found = {}
    for stem in ("ops", "deform_conv", "offset_sample", "sampling"):
        for name, test in vars(import_module(f"test_{stem}")).items():
            if name.startswith("test_") and "backend" in inspect.signature(test).parameters:
                found[f"test_{stem}_{name.removeprefix('test_')}"] = test
    return found


globals().update(_tests_of_backends())
