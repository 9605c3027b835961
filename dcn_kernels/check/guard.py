"""NumPy arrays that lie against an unreadable page: what touches memory outside them ends the process there and then.

Every allocation that NumPy makes within `guarded` is a piece of memory of its own between two pages without access.
The system protects whole pages, so an array touches one of the two: its last byte the page after it, or its first byte
the page before it. Linux alone.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

SIDES = ("after", "before")
_PAGE = mmap.PAGESIZE
_LINE = 64  # buffers of the CPU kernels begin, and may be read up to the end of, a cache line
_FRESH = 0xFF  # NaN in every type: an element that is read before it is written shows
_SET_HANDLER = 304  # in the table of NumPy's C interface, which keeps its places within a major version

_Malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Calloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_Realloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_side = "after"
_pieces: dict[int, tuple[int, int, int]] = {}  # address of an array -> its size, and its piece's address and size


class _Handler(ctypes.Structure):
    """NumPy's PyDataMem_Handler."""

    _fields_ = [
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", ctypes.c_void_p),
        ("malloc", _Malloc),
        ("calloc", _Calloc),
        ("realloc", _Realloc),
        ("free", _Free),
    ]


@lru_cache(maxsize=1)
def _system() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _take(size: int, fill: int) -> int | None:
    """Memory of its own against a page without access; None if there is none."""
    inner = max(_PAGE, -(-size // _PAGE) * _PAGE)
    whole = inner + 2 * _PAGE
    piece = _system().mmap(None, whole, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if piece in (None, ctypes.c_void_p(-1).value):
        return None
    first = int(piece) + _PAGE
    _system().mprotect(first, inner, mmap.PROT_READ | mmap.PROT_WRITE)
    address = first + inner - size if _side == "after" else first
    if fill:
        ctypes.memset(first, fill, inner)
    _pieces[address] = size, int(piece), whole
    return address


@_Malloc
def _malloc(ctx: Any, size: int) -> int | None:
    return _take(size, _FRESH)


@_Calloc
def _calloc(ctx: Any, count: int, size: int) -> int | None:
    return _take(count * size, 0)


@_Free
def _free(ctx: Any, address: int, size: int) -> None:
    if address:
        _, piece, whole = _pieces.pop(address)
        _system().munmap(piece, whole)


@_Realloc
def _realloc(ctx: Any, address: int, size: int) -> int | None:
    moved = _take(size, _FRESH)
    if address and moved:
        ctypes.memmove(moved, address, min(size, _pieces[address][0]))
        _free(ctx, address, 0)
    return moved


@lru_cache(maxsize=1)
def _interface() -> tuple[Any, Any]:
    """(PyDataMem_SetHandler, a capsule with the handler above)."""
    new, pointer = ctypes.pythonapi.PyCapsule_New, ctypes.pythonapi.PyCapsule_GetPointer
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = pointer(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]
    place = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[_SET_HANDLER]
    handler = _Handler(b"guard pages", 1, None, _malloc, _calloc, _realloc, _free)
    _keep.append(handler)
    capsule = new(ctypes.addressof(handler), b"mem_handler", None)
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(place), capsule


_keep: list[_Handler] = []


def why_not() -> str:
    """Why there are no guard pages here; empty where there are."""
    if not sys.platform.startswith("linux"):
        return "guard pages are made on Linux alone"
    if not hasattr(np, "_core") or np.lib.NumpyVersion(np.__version__) >= "3.0.0":
        return f"guard pages need NumPy 2, this is {np.__version__}"
    return ""


@contextmanager
def guarded(side: str) -> Iterator[None]:
    """All arrays that NumPy allocates in this thread, and all buffers of the CPU kernels, lie against a page.

    `side` is where the page is: "after" or "before" them.
    """
    global _side
    from dcn_kernels.cpu import workspace

    set_handler, capsule = _interface()
    _side = side
    before, usual = set_handler(capsule), workspace.allocate
    workspace.allocate = _allocate
    try:
        yield
    finally:
        workspace.allocate = usual
        set_handler(before)


def _allocate(plan: Any) -> dict[str, np.ndarray]:
    """`cpu.workspace.allocate` with a piece of memory for each buffer."""
    if isinstance(plan, dict):
        named = [(name, shape, dtype) for name, (shape, dtype) in plan.items()]
    else:
        named = [(name, shape, dtype) for name, shape, dtype, _ in plan.buffers]
    buffers = {}
    for name, shape, dtype in named:
        size = prod(shape) * np.dtype(dtype).itemsize
        memory = np.empty(-(-size // _LINE) * _LINE, np.uint8)
        buffers[name] = np.ndarray(shape, dtype, memory, 0)
    return buffers
