"""A stand-in for the GPU: compiles the kernels with g++, runs them on the CPU; the methods of `cuda.device.Device`.

A new kernel file needs nothing here: its launcher takes ``device=``, and what it launches is compiled when it is first
launched, one library for each set of flags, kept in the cache folder under a hash of all that went into it. A kernel
that uses more of CUDA than `cuda_host.hpp` defines adds that there.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dcn_kernels.cuda import compile
from dcn_kernels.cuda.device import shared_bytes_of_a_block

FOLDER = Path(__file__).parent
SANITIZERS = {
    "": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-DHOST_ASAN"),
    "thread": ("-fsanitize=thread", "-DHOST_TSAN"),
}
SCHEDULES = {"forward": 0, "backward": 1, "warps": 2, "lanes": 3}


def include_folder() -> Path | None:
    """NVIDIA's headers of pip's nvidia-cuda-runtime."""
    package = importlib.util.find_spec("nvidia")
    for base in (package.submodule_search_locations or []) if package else []:
        for folder in (Path(base, "cu13/include"), Path(base, "cuda_runtime/include")):
            if (folder / "cuda_fp16.h").is_file():
                return folder
    return None


def missing() -> str:
    """What this machine lacks to run kernels on its CPU; empty if nothing."""
    if os.uname().machine != "x86_64":
        return "the stand-in for a GPU runs on x86-64 alone"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if include_folder() is None:
        return "NVIDIA's headers are not installed (pip install 'dcn-kernels[test]')"
    return ""


class Library:
    """Kernels compiled by g++, by their file and flags; with `trace`, kernels that log their accesses (accesses.py)."""

    def __init__(self, cache: Path, sanitizer: str = "", *, trace: bool = False) -> None:
        self.cache, self.sanitizer, self.trace = cache, sanitizer, trace
        self.loaded: dict[str, ctypes.CDLL] = {}

    def kernel(self, stem: str, flags: compile.Flags, name: str) -> Any:
        """The entry of one kernel; compiled if it is not in the cache."""
        return self.entry(compile.source(stem), flags, name)

    def entry(self, source: str, flags: compile.Flags, name: str) -> Any:
        """The same of a source's text."""
        exports = "".join(f"EXPORT({kernel})\n" for kernel in compile.kernel_names(source))
        text = f"{source}\n{exports}"
        key = self._hash(text, *compile.definitions(flags))
        if key not in self.loaded:
            path = self._object(text, flags, key)
            self.runtime  # noqa: B018  loaded first: the kernels' libraries find it in the process
            self.loaded[key] = ctypes.CDLL(str(path))
        return getattr(self.loaded[key], f"host_{name}")

    def _object(self, text: str, flags: compile.Flags, key: str) -> Path:
        path = self.cache / f"{key}.so"
        if not path.exists():
            file = self.cache / f"{key}.{os.getpid()}.cpp"
            file.write_text(text)
            done = file.with_suffix(".so")
            header = self.header
            self._compile("-shared", *compile.definitions(flags), "-include", str(header), str(file), "-o", str(done))
            done.rename(path)
            file.unlink()
        return path

    @cached_property
    def header(self) -> Path:
        """cuda_host.hpp in the cache, compiled beforehand: NVIDIA's headers are most of the work."""
        folder = self.cache / self._hash("header")
        copy, done = folder / "cuda_host.hpp", folder / "cuda_host.hpp.gch"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("cuda_host.hpp", "matrix_host.hpp", "runtime.hpp"):
                shutil.copy(FOLDER / name, folder / name)
            made = folder / f"{os.getpid()}.gch"
            self._compile("-x", "c++-header", str(copy), "-o", str(made))
            made.rename(done)
        return copy

    @cached_property
    def runtime(self) -> ctypes.CDLL:
        """The scheduler."""
        path = self.cache / f"{self._hash('runtime')}.so"
        if not path.exists():
            made = path.with_suffix(f".{os.getpid()}")
            flags = [flag for flag in SANITIZERS[self.sanitizer] if flag != "-fsanitize=thread"]
            self._compile("-shared", str(FOLDER / "runtime.cpp"), "-o", str(made), sanitizer=flags)
            made.rename(path)
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)

    def _compile(self, *arguments: str, sanitizer: list[str] | None = None) -> None:
        own = list(SANITIZERS[self.sanitizer] if sanitizer is None else sanitizer)
        own += ["-DHOST_TRACE"] if self.trace else []
        # -ffp-contract=off: no fused multiply-add, whatever the CPU
        command = ["g++", "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-Wno-attributes", *own,
                   "-isystem", str(include_folder()), "-I", str(FOLDER), *arguments]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")

    def _hash(self, *texts: str) -> str:
        names = ("cuda_host.hpp", "matrix_host.hpp", "runtime.hpp", "runtime.cpp", "host.py")
        own = [(FOLDER / name).read_text() for name in names]
        return hashlib.sha256("\0".join([self.sanitizer, str(self.trace), *own, *texts]).encode()).hexdigest()[:24]


class HostDevice:
    """`cuda.device.Device` on the CPU, with NumPy arrays. Counts the bytes it holds."""

    def __init__(
        self,
        library: Library,
        *,
        capability: tuple[int, int] = (9, 0),
        schedule: str = "forward",
        seed: int = 0,
        max_blocks: int = 3,  # smaller than the work: every grid-stride loop goes round
        cache_bytes: int = 1 << 20,
        multiprocessors: int = 4,
    ) -> None:
        self.library, self.capability, self.max_blocks, self.cache_bytes = library, capability, max_blocks, cache_bytes
        self.schedule, self.seed, self.multiprocessors = schedule, seed, multiprocessors
        self.allocated: list[int] = []
        self.launched: list[tuple[str, str]] = []
        self.flags: list[compile.Flags] = []  # of the kernels asked for

    @property
    def vector_atomics(self) -> bool:
        return self.capability >= (9, 0)

    @staticmethod
    def address(array: np.ndarray) -> int:
        return array.ctypes.data

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        array.view(np.uint8).reshape(-1)[:] = 0xFF  # not a number, in every type
        self.allocated.append(array.nbytes)
        return array

    @staticmethod
    def clear(array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        array.view(np.uint8).reshape(-1)[:] = 0

    def launch(
        self,
        stem: str,
        kernel: str,
        flags: compile.Flags,
        blocks: int,
        threads: int,
        args: tuple[Any, ...],
        *,
        op: str,
    ) -> None:
        self.function(stem, kernel, flags, threads, op=op)(blocks, args)

    def function(
        self, stem: str, kernel: str, flags: compile.Flags, threads: int, *, shared_bytes: int = 0, op: str
    ) -> Callable[[int, tuple[Any, ...]], None]:
        assert shared_bytes <= shared_bytes_of_a_block(self.capability)
        self.flags.append(flags)

        def start(blocks: int, args: tuple[Any, ...]) -> None:
            entry = self.library.kernel(stem, flags, kernel)
            self.library.runtime.host_set_schedule(SCHEDULES[self.schedule], ctypes.c_uint64(self.seed))
            call(entry, min(blocks, self.max_blocks), threads, args)
            self.launched.append((stem, kernel))

        return start


def call(entry: Any, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
    """Start a kernel with arrays (by address), None (a null pointer) and NumPy scalars or structs (by value)."""
    values = []
    for arg in args:
        if arg is None:
            values.append(np.zeros(1, np.uintp))
        elif isinstance(arg, np.ndarray) and not (arg.size == 1 and arg.dtype.names):
            values.append(np.array([arg.ctypes.data], np.uintp))
        else:
            values.append(np.atleast_1d(np.asarray(arg)))
    pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
    sizes = (ctypes.c_size_t * len(values))(*[value.dtype.itemsize for value in values])
    entry(ctypes.c_uint(blocks), ctypes.c_uint(threads), pointers, sizes, ctypes.c_size_t(len(values)))
