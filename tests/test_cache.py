"""Compiled kernels are kept on disk, and an edited source is compiled anew."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import CodeType, ModuleType

import numpy as np
import pytest

import dcn_kernels
import dcn_kernels.cpu
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
# What whoever waits for a first call reads: what happens, about how long, and that it is kept.
COMPILES = r"dcn_kernels compiles deform_conv\.\w+ for this processor, about 2 to 12 seconds, once, and keeps it in "


def run(folder: Path) -> tuple[np.ndarray, int]:
    """deform_conv2d at zero offset, by a new process with the package of `folder`, and how many kernels it compiled."""
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
    said = done.stderr.splitlines()
    for line in said:
        assert re.fullmatch(COMPILES + re.escape(str(folder / "dcn_kernels" / "cpu" / "__pycache__")), line), line
    return np.array(eval(result)).reshape(4, 4), len(said)


def test_edited_sampler_changes_the_result_of_deform_conv2d_on_the_next_run(tmp_path: Path) -> None:
    package = tmp_path / "dcn_kernels"
    shutil.copytree(Path(dcn_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    image = np.arange(16.0).reshape(4, 4)
    output, said = run(tmp_path)
    assert (output == image).all() and said == 1, "a first call says once that it compiles"

    compiled = {path: path.stat().st_mtime_ns for path in package.rglob("*.nbc")}
    assert compiled, "nothing was kept on disk"
    output, said = run(tmp_path)
    assert (output == image).all() and said == 0
    assert {path: path.stat().st_mtime_ns for path in package.rglob("*.nbc")} == compiled, "compiled a second time"

    sampling = package / "cpu" / "sampling.py"
    source = sampling.read_text()
    assert source.count(WEIGHT) == 1
    sampling.write_text(source.replace(WEIGHT, EDITED))
    output, said = run(tmp_path)
    assert (output == 2 * image).all() and said == 1


def test_an_inner_function_has_no_machine_code_of_its_own() -> None:
    """It is optimised and assembled inside the kernels that call it, once; called from Python it would crash."""

    @jit.inner
    def twice(x):
        return 2 * x

    @jit.kernel
    def worker(x):
        return twice(x) + 1

    assert worker(20) == 41
    (overload,) = twice.overloads.values()
    assert "ret" in overload.library.get_llvm_str()
    assert overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name) == 0
    with pytest.raises(TypeError, match="twice: only compiled functions can call it"):
        twice(20)


MODULE = """
from dcn_kernels.cpu.jit import inner, kernel
FACTOR = 2

@inner
def times(x):
    return FACTOR * x

@kernel
def work(x):
    return times(x) + 1
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch):
    """Import a module anew, as a new process would, with its cache beside it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "mill.py"

    def load(text: str = MODULE):
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("mill", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("mill.work*.nbc"))


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_random(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def damage_one_bit(path: Path) -> None:
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 1
    path.write_bytes(text)


def damage_folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_unreadable(path: Path) -> None:
    """Whoever reads it: of a file without permissions the superuser reads all the same."""
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_empty, damage_random, damage_one_bit, damage_folder_in_its_place, damage_unreadable],
)
def test_a_damaged_file_is_compiled_again(damage, load, tmp_path: Path) -> None:
    assert load().work(20) == 41
    (path,) = kept(tmp_path)
    damage(path)
    assert load().work(20) == 41
    again = load()
    assert again.work(20) == 41
    assert len(again.work.stats.cache_hits) == (0 if path.is_dir() else 1)


def test_where_no_folder_is_writable_each_process_says_that_it_compiles(
    load, tmp_path: Path, monkeypatch, caplog
) -> None:
    def none(function):
        raise RuntimeError("no locator available")

    monkeypatch.setattr(jit, "_FolderCache", none)
    assert load().work(20) == 41
    assert [record.getMessage() for record in caplog.records] == [
        "dcn_kernels compiles mill.work for this processor, about 2 to 12 seconds, in every process: no folder is "
        "writable to keep it in; NUMBA_CACHE_DIR can name one"
    ]
    assert not kept(tmp_path)


def test_a_kernel_that_cannot_be_kept_works(load, tmp_path: Path, monkeypatch, caplog) -> None:
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit._Files, "_open_for_write", full)
    assert load().work(20) == 41
    assert "cannot be kept" in caplog.text
    assert not kept(tmp_path)


FULL = """
import logging, resource, signal, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
import mill
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the write ends within the file, as on a disk that is full
print("result", mill.work(20))
"""


def process(folder: Path, code: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-B", "-c", code]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX systems do")
def test_a_disk_that_is_full_half_way_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "mill.py").write_text(MODULE)
    said = process(tmp_path, FULL).communicate()[0]
    assert "result 41" in said
    assert "work cannot be kept in" in said
    assert not kept(tmp_path)
    assert process(tmp_path, "import mill; print(mill.work(20))").communicate()[0] == "41\n"
    assert len(kept(tmp_path)) == 1


def test_a_folder_that_vanishes_is_made_again_or_done_without(load, tmp_path: Path) -> None:
    module = load()
    shutil.rmtree(tmp_path / "__pycache__")
    assert module.work(20) == 41
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert module.work(20.0) == 41.0
    module = load()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    (tmp_path / "__pycache__").write_text("a file in its place")
    assert module.work(20) == 41


def test_six_processes_at_once_on_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "mill.py").write_text(MODULE)
    six = [process(tmp_path, "import mill; print(mill.work(20))") for _ in range(6)]
    assert [each.communicate()[0] for each in six] == ["41\n"] * 6
    assert len(kept(tmp_path)) == 1
    assert len(list((tmp_path / "__pycache__").iterdir())) == 1, "what was being written is left behind"
    hits = "import mill; print(mill.work(20), sum(mill.work.stats.cache_hits.values()))"
    assert process(tmp_path, hits).communicate()[0] == "41 1\n"


def test_an_upgrade_and_a_rollback_under_running_processes(load, tmp_path: Path) -> None:
    upgraded = MODULE.replace("FACTOR = 2", "FACTOR = 3")
    for compile_first in (False, True):
        old = load()
        if compile_first:
            assert old.work(20) == 41
        new = load(upgraded)
        assert new.work(20) == 61  # throws away what is kept of the old
        assert old.work(20) == 41  # and the other way about, where it had not been compiled
        assert load(upgraded).work(20) == 61
        assert load().work(20) == 41  # rolled back
        assert new.work(20.0) == 61.0  # the upgraded process goes on, with another type
        assert old.work(20.0) == 41.0
        assert load().work(20.0) == 41.0


def test_what_is_kept_is_named_by_the_code_that_was_compiled(load, tmp_path: Path) -> None:
    """The file may say something else by the time that what was loaded of it is compiled."""
    edited = load(MODULE.replace("FACTOR = 2", "FACTOR = 3"))
    (tmp_path / "mill.py").write_text(MODULE)  # restored before anything is compiled
    assert edited.work(20) == 61
    assert load().work(20) == 41
    assert load(MODULE.replace("FACTOR * x", "FACTOR + x")).work(20) == 23
    hit = load(MODULE.replace("FACTOR * x", "FACTOR + x"))
    assert hit.work(20) == 23
    assert sum(hit.work.stats.cache_hits.values()) == 1


def _globals(code: CodeType) -> set[str]:
    """The names that a function looks up, those of functions inside it too."""
    inside = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_globals, inside))


def test_no_kernel_reads_an_attribute_of_a_module_of_ours() -> None:
    """The stamp of a kernel follows the names that it looks up; what stands behind a module's name it would not see."""
    looked_at = 0
    for found in pkgutil.iter_modules(dcn_kernels.cpu.__path__):
        for name, thing in vars(import_module(f"dcn_kernels.cpu.{found.name}")).items():
            function = getattr(thing, "py_func", None) or getattr(thing, "_defn", None)
            if function is None:
                continue
            looked_at += 1
            for used in _globals(function.__code__):
                module = function.__globals__.get(used)
                ours = isinstance(module, ModuleType) and module.__name__.startswith("dcn_kernels")
                assert not ours, f"{found.name}.{name} reads {used}, a module"
    assert looked_at > 50


def test_without_compilation_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    code = """
import numpy as np
from dcn_kernels import offset_sample2d
arrays = np.ones((1, 1, 3, 3)), np.zeros((1, 2, 3, 3))
print(offset_sample2d(*arrays, backend="reference").sum())
offset_sample2d(*arrays)
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "9.0\n"
    assert done.stderr.rstrip().endswith(
        "RuntimeError: the cpu backend needs compilation, which NUMBA_DISABLE_JIT turns off: unset it, or take "
        'backend="reference"'
    )


def test_the_stamp_of_a_kernel_is_the_same_in_every_process() -> None:
    """Numba's functools.singledispatch holds a number that grows with the classes that a process registers."""
    import_it = "from dcn_kernels.cpu import deform_conv, jit; print(jit.stamp(deform_conv.forward_worker.py_func))"
    other = "import numba; numba.njit(lambda x: x + 1)(1); "
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for code in (import_it, other + import_it)
    ]
    assert runs[0].stdout == runs[1].stdout


def test_a_kernel_is_kept_under_the_same_name_whatever_was_compiled_before() -> None:
    """Else programs that compile in another order throw away each other's files."""
    program = (
        "import numpy as np\nfrom dcn_kernels import offset_sample2d\n"
        "from dcn_kernels.cpu import offset_sample, roi_mean\n"
        "from dcn_kernels.cpu.jit import stamp\n"
        "workers = offset_sample.forward_worker.py_func, roi_mean.backward_worker.py_func\n"
        "before = [stamp(worker) for worker in workers]\n"
        "offset_sample2d(np.zeros((1, 1, 4, 4), np.float32), np.zeros((1, 2, 4, 4), np.float32))\n"
        "assert before == [stamp(worker) for worker in workers]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
