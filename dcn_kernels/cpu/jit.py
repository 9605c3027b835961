"""Compile kernels with Numba and cache them on disk under a hash of the code that they are made of.

Numba's own cache looks at the file of the decorated function alone; an edited function that is inlined from another
file would go unnoticed. Here all functions and constants that a kernel reaches are part of the key, as the process
has loaded them: the files may say something else by the time it compiles.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher, cpu_target
from numba.extending import intrinsic as _intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple as _to_fixed_tuple

_log = logging.getLogger("dcn_kernels")

if vars(numba.config)["DISABLE_JIT"]:  # the kernels' own instructions are LLVM's: Python cannot run them
    raise RuntimeError(
        'the cpu backend needs compilation, which NUMBA_DISABLE_JIT turns off: unset it, or take backend="reference"'
    )

# mypy would hold callers in compiled code to the Python signatures
intrinsic: Any = _intrinsic
to_fixed_tuple: Any = _to_fixed_tuple
_njit: Any = numba.njit  # not all of its options are in its signature
_compile_for_args: Any = CPUDispatcher._compile_for_args  # type: ignore[attr-defined]

# Contraction lets loops use fused multiply-add. No reassociation: the vectors of a loop and its remainder would round
# differently, and results would depend on where a tile begins, which follows the number of threads. No flag that
# assumes there are no NaNs: it would delete the checks of coordinates.
OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}


def assembly(text: str) -> str:
    """What the compiler makes of LLVM code for the target that Numba compiles for: this host, or NUMBA_CPU_NAME's."""
    return str(cpu_target.target_context.codegen()._tm.emit_assembly(llvm.parse_assembly(text)))


# Their functions are in the stamp by name: what these reach, such as Numba's registries, changes while a process runs.
_VERSIONED = ("numba", "llvmlite", "numpy")


def _describe(thing: Any, seen: set[int], digest: Any) -> None:
    """Add to `digest` all that a function is made of: its code, and by name what it refers to in this package."""
    if hasattr(thing, "py_func"):  # compiled by Numba
        digest.update(repr(sorted((k, str(v)) for k, v in thing.targetoptions.items() if k != "fastmath")).encode())
        thing = thing.py_func
    elif hasattr(thing, "_defn"):  # an intrinsic
        thing = thing._defn
    if isinstance(thing, bool | int | float | str | bytes | type(None)):
        digest.update(f"{thing!r};".encode())
    elif isinstance(thing, tuple | list):
        for each in thing:
            _describe(each, seen, digest)
    elif isinstance(thing, set | frozenset):
        digest.update(repr(sorted(map(repr, thing))).encode())
    elif isinstance(thing, dict):
        for key, value in thing.items():
            digest.update(f"{key!r}:".encode())
            _describe(value, seen, digest)
    elif id(thing) in seen:
        digest.update(getattr(thing, "__qualname__", "").encode())
    elif isinstance(thing, FunctionType) and thing.__module__.partition(".")[0] not in _VERSIONED:
        seen.add(id(thing))
        names = _describe_code(thing.__code__, digest)
        _describe([thing.__defaults__, thing.__kwdefaults__], seen, digest)
        for cell in thing.__closure__ or ():
            _describe(cell.cell_contents, seen, digest)
        for name in sorted(names):
            _describe(thing.__globals__.get(name), seen, digest)
    elif isinstance(thing, type) and thing.__module__.partition(".")[0] == __name__.partition(".")[0]:
        seen.add(id(thing))
        for name, value in sorted(vars(thing).items()):
            if isinstance(value, FunctionType | tuple | int | str) and name != "__doc__":
                digest.update(name.encode())
                _describe(value, seen, digest)
    else:  # of NumPy, Numba or llvmlite, whose versions are in the stamp
        digest.update(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__name__', type(thing).__name__)}".encode())


def _describe_code(code: CodeType, digest: Any) -> set[str]:
    """Add a code object; returns the names that it looks up, those of functions inside it too."""
    names = set(code.co_names)
    digest.update(code.co_code + repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _describe_code(constant, digest)
        else:
            _describe(constant, set(), digest)
    return names


def stamp(function: Callable[..., Any]) -> str:
    """What the machine code of `function` follows from, as the process holds it: files may have changed since."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {np.__version__} {sys.version}".encode())
    for part in (function, OPTIONS, kernel, inner, spliced, _Part):
        _describe(part, set(), digest)
    return digest.hexdigest()


class _Files(IndexDataCacheFile):
    """One file for each compiled signature, named by all that it follows from and headed by the hash of the rest.

    There is no index that could speak of another file than the one that is there: sources may change, and several
    processes of several versions may write, while a process runs. A file that is damaged counts as none.
    """

    def __init__(self, folder: str, base: str, function: Callable[..., Any]) -> None:
        self._folder, self._base, self._function = Path(folder), base, function
        self._stamp: str | None = None

    def _path(self, key: Any) -> Path:
        if self._stamp is None:
            self._stamp = stamp(self._function)[:16]
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return self._folder / f"{self._base}.{self._stamp}.{name}.nbc"

    def load(self, key: Any) -> Any:
        path = self._path(key)
        try:
            text = path.read_bytes()
        except OSError as error:
            if error.errno is None:  # not the system's: a TimeoutError, say, that a handler of a signal raised
                raise
            return None
        head, data = text[:32], text[32:]
        if head != hashlib.sha256(path.name.encode() + data).digest():
            _log.warning("%s is damaged: thrown away", path)
            return None
        return pickle.loads(data)

    def save(self, key: Any, data: Any) -> None:
        path, text = self._path(key), self._dump(data)
        with self._open_for_write(str(path)) as file:
            file.write(hashlib.sha256(path.name.encode() + text).digest() + text)
        for old in self._folder.glob(f"{glob.escape(self._base)}.*.nb[ci]"):
            if not old.name.startswith(f"{self._base}.{self._stamp}."):
                old.unlink(missing_ok=True)

    def flush(self) -> None:
        for path in self._folder.glob(f"{glob.escape(self._base)}.*.nb[ci]"):
            path.unlink(missing_ok=True)


class _FolderCache(FunctionCache):
    """Numba's function cache, with files of our own: whatever befalls them, the kernel is compiled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(self.cache_path, self._impl.filename_base, function)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except (pickle.UnpicklingError, EOFError, ImportError, AttributeError) as error:  # the caller's others pass
            _log.warning("%s: what is kept in %s cannot be used: %r", self._py_func.__name__, self.cache_path, error)
            found = None
        if found is None:
            _say(self._py_func, f"once, and keeps it in {self.cache_path}")
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:  # the disk is full, the folder is gone
            if error.errno is None:
                raise
            _log.warning("%s cannot be kept in %s: %s", self._py_func.__name__, self.cache_path, error)


class _NoCache(NullCache):
    """Where no folder is writable: each process compiles, and says so."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._py_func = function

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        _say(self._py_func, "in every process: no folder is writable to keep it in; NUMBA_CACHE_DIR can name one")


def _say(function: Callable[..., Any], kept: str) -> None:
    # the published records say 2 to 11 s
    kernel = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    _log.warning("dcn_kernels compiles %s for this processor, about 2 to 12 seconds, %s", kernel, kept)


class _Kernel(CPUDispatcher):
    """Loads and compiles in a thread of its own, where no handler of a signal runs and no recursion has begun.

    An exception half-way through would leave Numba's registries broken for all kernels. So the caller alone gets it,
    at once, while the work goes on for the next call.
    """

    def _compile_for_args(self, *args: Any, **kws: Any) -> Any:
        done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def work() -> None:
            try:
                with global_compiler_lock:  # whoever comes second finds it done
                    result = _compile_for_args(self, *args, **kws), None
            except BaseException as error:
                done.put((None, error))
            else:
                done.put(result)

        try:
            threading.Thread(target=work, name=f"compiles {self.py_func.__name__}").start()
        except RuntimeError:  # the system starts no more
            work()
        entry, error = done.get()
        try:
            if error is not None:
                raise error
        finally:
            del error  # which its traceback leads back to
        return entry


# A child that is forked while a thread compiles would wait for that thread, which it does not have.
os.register_at_fork(
    before=global_compiler_lock.acquire,
    after_in_parent=global_compiler_lock.release,
    after_in_child=global_compiler_lock.release,
)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a worker that Python calls: without the GIL, cached on disk."""
    dispatcher: Any = _njit(**OPTIONS, nogil=True, no_cfunc_wrapper=True)(function)
    dispatcher.__class__ = _Kernel
    try:
        dispatcher._cache = _FolderCache(function)
    except RuntimeError:  # no writable folder
        dispatcher._cache = _NoCache(function)
    return dispatcher


class _Part(JITCodeLibrary):
    """The code of an inner function: linked into the kernels that call it, and optimised and assembled there alone.

    Numba would do both for the function on its own, and again in each function that calls it: a sixth of the time
    that the kernels take to compile.
    """

    codegen = SimpleNamespace(set_env=lambda name, env: None)  # nothing is loaded that needs its globals

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0


class _PartCompiler(Compiler):
    def compile_extra(self, function: Callable[..., Any]) -> Any:
        self.state.library = _Part(self.state.targetctx.codegen(), function.__qualname__)
        return super().compile_extra(function)


class _Inner(CPUDispatcher):
    """There is no machine code to call from Python."""

    def __call__(self, *args: Any) -> Any:
        raise TypeError(f"{self.py_func.__name__}: only compiled functions can call it")


def inner(function: Callable[..., Any]) -> Any:
    """Compile a function that only kernels call."""
    dispatcher: Any = _njit(**OPTIONS, pipeline_class=_PartCompiler, no_cpython_wrapper=True, no_cfunc_wrapper=True)(
        function
    )
    dispatcher.__class__ = _Inner
    return dispatcher


def spliced(function: Callable[..., Any]) -> Any:
    """A function whose text becomes part of its callers' before anything is compiled."""
    return _njit(**OPTIONS, inline="always")(function)


@intrinsic
def stay_apart(typingctx):
    """Keep the function that says this from being inlined: its callers then compile several times faster."""

    def codegen(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def become_part(typingctx):
    """Have the function that says this inlined wherever it is called: a call copies every number of a Shape."""

    def codegen(context, builder, signature, args):
        builder.function.attributes.add("alwaysinline")
        return context.get_dummy_value()

    return types.void(), codegen
