"""What the launchers ask of a GPU. The tests put a stand-in of the same methods in its place and run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from dcn_kernels.cuda import compile

DEFAULT_WORKSPACE = 64 << 20
BLOCKS_PER_MULTIPROCESSOR = 16  # enough to fill it; more work than that goes round the grid-stride loops
STATIC_SHARED_BYTES = 48 << 10  # of a block; a kernel that takes more asks for it
# of a block, by the compute capability (CUDA's programming guide, table of technical specifications, less the 1 KB that
# the system takes of each); an unknown GPU has at least the least of its kind
_SHARED_BYTES = {
    (7, 5): 64 << 10,
    **dict.fromkeys([(8, 0), (8, 7)], 163 << 10),
    **dict.fromkeys([(8, 6), (8, 9), (12, 0), (12, 1)], 99 << 10),
    **dict.fromkeys([(9, 0), (10, 0), (10, 3), (11, 0)], 227 << 10),
}
# where three products on the matrix units in TF32 are quicker than one in plain float32 (by the data sheets)
SPLIT_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))


class Device:
    """The current GPU through CuPy: memory from the current allocator, work on the current stream."""

    def __init__(self, number: int) -> None:
        import cupy

        attributes = cupy.cuda.runtime.getDeviceProperties(number)
        self.capability = (attributes["major"], attributes["minor"])
        self.cache_bytes = attributes["l2CacheSize"]
        self.multiprocessors = attributes["multiProcessorCount"]
        self.max_blocks = self.multiprocessors * BLOCKS_PER_MULTIPROCESSOR

    @property
    def vector_atomics(self) -> bool:
        """Whether atomicAdd takes a float4."""
        return has_vector_atomics(self.capability)

    @staticmethod
    def address(array: Any) -> int:
        """Of the first element."""
        return array.data.ptr

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        import cupy

        return cupy.empty(shape, dtype)

    @staticmethod
    def clear(array: Any) -> None:
        """Set a C-contiguous array to zero."""
        import cupy

        if array.size:
            array.data.memset_async(0, array.nbytes, cupy.cuda.get_current_stream())

    def launch(
        self, stem: str, kernel: str, flags: compile.Flags, blocks: int, threads: int, args: tuple[Any, ...], *, op: str
    ) -> None:
        """Start a kernel of `stem`.cu. Arguments are arrays, None (a null pointer), and NumPy scalars or structs."""
        self.function(stem, kernel, flags, threads, op=op)(blocks, args)

    def function(
        self, stem: str, kernel: str, flags: compile.Flags, threads: int, *, shared_bytes: int = 0, op: str
    ) -> Callable[[int, tuple[Any, ...]], None]:
        """A kernel to be started as often as one likes, by ``function(blocks, args)``.

        `shared_bytes` is the dynamic shared memory of a block.
        """
        import cupy

        errors = (
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.runtime.CUDARuntimeError,
            cupy.cuda.compiler.CompileException,
        )

        def failed(error: Exception, blocks: int) -> RuntimeError:
            return RuntimeError(f"{op}: kernel {kernel} of {stem}.cu ({blocks} blocks of {threads}): {error}")

        try:
            compiled = compile.kernel(stem, flags, kernel)
            if shared_bytes > STATIC_SHARED_BYTES:
                compiled.max_dynamic_shared_size_bytes = shared_bytes
        except errors as error:
            raise failed(error, 0) from error
        block, more = (threads,), {"shared_mem": shared_bytes} if shared_bytes else {}

        def start(blocks: int, args: tuple[Any, ...]) -> None:
            blocks = min(blocks, self.max_blocks)
            try:
                compiled((blocks,), block, tuple(map(_argument, args)), **more)
            except errors as error:
                raise failed(error, blocks) from error

        return start


def has_vector_atomics(capability: tuple[int, int]) -> bool:
    """Whether atomicAdd takes a float4."""
    return capability >= (9, 0)


def shared_bytes_of_a_block(capability: tuple[int, int]) -> int:
    """The most shared memory that a block may take."""
    return _SHARED_BYTES.get(capability, 64 << 10 if capability < (8, 0) else 99 << 10)


def _argument(value: Any) -> Any:
    """CuPy does not pass None as a null pointer (its issue 9046: the kernel sees 0xffffffff)."""
    return np.uintp(0) if value is None else value


def current() -> Device:
    """The current GPU."""
    import cupy

    return _device(cupy.cuda.runtime.getDevice())


_device = cache(Device)
