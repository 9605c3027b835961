"""Compiled kernels are kept on disk, and an edited source is compiled anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dcn_kernels
from dcn_kernels.cpu import jit

RUN = """
import sys
import numpy as np
import dcn_kernels
print(dcn_kernels.__file__)
image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
offset = np.zeros((1, 2, 4, 4), np.float32)
print(dcn_kernels.deform_conv2d(image, offset, np.ones((1, 1, 1, 1), np.float32)).ravel().tolist())
"""
WEIGHT = "(one - ly) * (one - lx) * factor"  # of the corner above and to the left, in compiled code
EDITED = "(one + one) * " + WEIGHT


def run(folder: Path) -> np.ndarray:
    """deform_conv2d at zero offset, computed by a new process with the package of `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, result = done.stdout.splitlines()
    assert Path(where).parent.parent == folder
    return np.array(eval(result)).reshape(4, 4)


def test_edited_sampler_changes_the_result_of_deform_conv2d_on_the_next_run(tmp_path: Path) -> None:
    package = tmp_path / "dcn_kernels"
    shutil.copytree(Path(dcn_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    image = np.arange(16.0).reshape(4, 4)
    assert (run(tmp_path) == image).all()

    compiled = {path: path.stat().st_mtime_ns for path in package.rglob("*.nbc")}
    assert compiled, "nothing was kept on disk"
    assert (run(tmp_path) == image).all()
    assert {path: path.stat().st_mtime_ns for path in package.rglob("*.nbc")} == compiled, "compiled a second time"

    sampling = package / "cpu" / "sampling.py"
    source = sampling.read_text()
    assert source.count(WEIGHT) == 1
    sampling.write_text(source.replace(WEIGHT, EDITED))
    assert (run(tmp_path) == 2 * image).all()


def test_an_inner_function_has_no_machine_code_of_its_own() -> None:
    """It is optimised and assembled inside the kernels that call it, once; called from Python it would crash."""

    @jit.inner
    def twice(x):  # type: ignore[no-untyped-def]
        return 2 * x

    @jit.kernel
    def worker(x):  # type: ignore[no-untyped-def]
        return twice(x) + 1

    assert worker(20) == 41
    (overload,) = twice.overloads.values()
    assert "ret" in overload.library.get_llvm_str()
    assert overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name) == 0
    with pytest.raises(TypeError, match="twice: only compiled functions can call it"):
        twice(20)
