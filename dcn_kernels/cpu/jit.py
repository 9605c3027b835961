"""Compile kernels with Numba and cache them on disk under a hash of this folder's sources.

Numba's own cache looks at the file of the decorated function alone; an edited function that is inlined from another
file would go unnoticed. Here every source of the folder is part of the key.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic as _intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple as _to_fixed_tuple

_log = logging.getLogger("dcn_kernels")

# mypy would hold callers in compiled code to the Python signatures
intrinsic: Any = _intrinsic
to_fixed_tuple: Any = _to_fixed_tuple
_njit: Any = numba.njit  # not all of its options are in its signature

# Contraction and reassociation let loops use fused multiply-add and vectors. No flag that assumes there are no NaNs:
# it would delete the checks of coordinates.
OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


def _source_stamp() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


SOURCE_STAMP = _source_stamp()


class _FolderCache(FunctionCache):
    """Numba's function cache, keyed by the folder's sources instead of one file's time and size."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        own = hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()  # it may be of another folder
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, SOURCE_STAMP + own)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is None:
            _say(self._py_func, f"once; kept in {self.cache_path}")
        return found


class _NoCache(NullCache):
    """Where no folder is writable: each process compiles, and says so."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._py_func = function

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        _say(self._py_func, "in every process: no folder is writable to keep it; NUMBA_CACHE_DIR can name one")


def _say(function: Callable[..., Any], where: str) -> None:
    _log.warning("compiling %s.%s, %s", function.__module__.rpartition(".")[2], function.__name__, where)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a worker that Python calls: without the GIL, cached on disk."""
    dispatcher: Any = _njit(**OPTIONS, nogil=True, no_cfunc_wrapper=True)(function)
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
def stay_apart(typingctx):  # type: ignore[no-untyped-def]
    """Keep the function that says this from being inlined: its callers then compile several times faster."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen
