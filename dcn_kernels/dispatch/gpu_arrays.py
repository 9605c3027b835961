"""GPU arrays of other frameworks as CuPy arrays, on their device, their stream and in their memory pool, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import ml_dtypes


@contextmanager
def current(array: Any, framework: str, number: int) -> Iterator[None]:
    """Make GPU `number` current, and for torch its current stream and its memory pool, for the block's duration.

    CuPy arrays: CuPy's current stream and pool. JAX hands its arrays over to CuPy's current stream by DLPack.
    """
    import cupy

    with ExitStack() as stack:
        stack.enter_context(cupy.cuda.Device(number))
        if framework == "torch":
            stream = sys.modules["torch"].cuda.current_stream(number).cuda_stream
            stack.enter_context(cupy.cuda.ExternalStream(stream, number))
            stack.enter_context(cupy.cuda.using_allocator(_torch_allocator().malloc))
        yield


@cache
def _torch_allocator() -> Any:
    """torch's caching allocator for CuPy: one pool serves, and a freed block is reused in the stream's order."""
    import cupy

    torch = sys.modules["torch"]

    def allocate(size: int, number: int) -> int:
        return torch.cuda.caching_allocator_alloc(size, number, torch.cuda.current_stream(number))

    def free(pointer: int, number: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)

    return cupy.cuda.PythonFunctionAllocator(allocate, free)


def to_cupy(op: str, name: str, array: Any) -> Any:
    """A CuPy view of a GPU array, without a copy."""
    import cupy

    if isinstance(array, cupy.ndarray):
        return array
    try:
        if type(array).__module__.partition(".")[0] == "torch":
            torch = sys.modules["torch"]
            plain = array.detach().resolve_conj().resolve_neg()
            if plain.dtype == torch.bfloat16:
                return cupy.from_dlpack(plain.view(torch.int16)).view(ml_dtypes.bfloat16)
            return cupy.from_dlpack(plain)
        return cupy.from_dlpack(array)
    except (BufferError, TypeError, RuntimeError, ValueError) as error:
        raise TypeError(f"{op}: {name}: expected an array that CuPy can take by DLPack, got {error}") from error


def from_cupy(array: Any, framework: str) -> Any:
    """A CuPy array as the caller's own kind, without a copy."""
    if framework == "torch":
        torch = sys.modules["torch"]
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
        return torch.from_dlpack(array)
    if framework == "jax":
        return sys.modules["jax"].dlpack.from_dlpack(array)
    return array
