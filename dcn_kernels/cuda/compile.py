"""From a `.cu` file and its flags to a compiled module, and the compile check that needs no GPU.

The text of every `#include "x.cuh"` is pasted into the source: CuPy's disk cache is keyed by the source string and
would run old machine code after an edit of a header that it merely includes.

How a kernel file is added:

1. `name.cu`: starts with ``#include "common.cuh"``; a kernel is ``KERNEL(kernel, THREADS)(arguments) {...}``, its
   shared memory ``SHARED(type, name, [size])``. Sizes come in one struct by value; types and small numbers are macros.
2. `name.py` beside it: its launcher (``device.launch(BUILD, "kernel", flags, blocks, threads, args, op=...)`` with
   ``BUILD = "name"``) and ``variants(capability)``, which yields the flags of every build that is checked.
3. Its stem goes into `FILES` below. The compile check, the package and the host tests then know it.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FILES = (
    "staging",
    "sort",
    "cells",
    "gather",
    "deform_conv_forward",
    "deform_conv_backward",
    "depthwise",
    "depthwise_backward",
    "sums",
    "offset_sample",
    "roi_gather",
    "roi_mean",
    "roi_pool",
    "deform_roi_pool",
)
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

Flags = dict[str, Any]  # macro -> C type or number

CTYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "float64": "double"}
_DTYPES = {ctype: dtype for dtype, ctype in CTYPES.items()}
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)".*$', re.MULTILINE)
_KERNEL = re.compile(r"^KERNEL\((\w+),", re.MULTILINE)


class CompilerNotFound(RuntimeError):
    """There is no NVRTC on this machine."""


class CompileError(RuntimeError):
    """A kernel file did not compile; the message holds the compiler's log."""


def source(stem: str) -> str:
    """The text of `stem`.cu with its headers pasted in; `#line` keeps the compiler's messages true."""
    return _paste(FOLDER / f"{stem}.cu")


def _paste(path: Path) -> str:
    text = path.read_text()

    def header(match: re.Match[str]) -> str:
        following = text.count("\n", 0, match.start()) + 2
        return f'{_paste(path.parent / match[1])}\n#line {following} "{path.name}"'

    return f'#line 1 "{path.name}"\n{_INCLUDE.sub(header, text)}'


def kernel_names(text: str) -> list[str]:
    """The kernels that a source defines."""
    return _KERNEL.findall(text)


def definitions(flags: Flags) -> tuple[str, ...]:
    """The flags as compiler options, in a fixed order."""
    return tuple(
        f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(flags.items())
    )


def variants(stem: str, capability: tuple[int, int]) -> list[Flags]:
    """The flags of every build of a kernel file that is checked, for GPUs of a compute capability."""
    return list(import_module(f"dcn_kernels.cuda.{stem}").variants(capability))


def kernel(stem: str, flags: Flags, name: str) -> Any:
    """A kernel compiled for the current GPU by CuPy, which keeps it on disk and, for each GPU, in memory."""
    return _function(stem, definitions(flags), name)


@cache
def _function(stem: str, options: tuple[str, ...], name: str) -> Any:
    import cupy

    module = cupy.RawModule(code=source(stem), options=("-std=c++17", *options), backend="nvrtc")
    return module.get_function(name)


# ---------------------------------------------------------------- the check: NVRTC alone, by ctypes


def capability(arch: str) -> tuple[int, int]:
    """sm_90 -> (9, 0), sm_120 -> (12, 0)."""
    number = int(re.sub(r"\D", "", arch))
    return divmod(number, 10)


def check_kernels(
    archs: tuple[str, ...] = ARCHS, progress: Callable[[int, int, str], None] | None = None
) -> list[dict[str, Any]]:
    """Compile every kernel file with every set of flags for the given architectures; no driver or GPU is used.

    Parameters
    ----------
    archs : names such as "sm_90"
    progress : called with (builds done, builds in all, "deform_conv for sm_90")

    Returns
    -------
    list of dict
        One per kernel, flags and architecture: kernel, dtype, flags, arch, registers, spill_bytes, shared_bytes,
        stack_bytes.

    Raises
    ------
    CompilerNotFound
        NVRTC is not installed (``pip install dcn-kernels[nvrtc]``).
    CompileError
        With the file, the flags, the architecture and the compiler's log.

    Examples
    --------
    >>> from dcn_kernels.cuda.compile import check_kernels
    >>> kernels = check_kernels(("sm_90",))  # doctest: +SKIP
    """
    nvrtc, everything = NVRTC(), builds(archs)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # NVRTC compiles in several threads at once
        results = pool.map(lambda build: _check(nvrtc, *build), everything)
        try:
            for done, (build, found) in enumerate(zip(everything, results, strict=True), 1):
                rows += found
                if progress is not None:
                    progress(done, len(everything), f"{build[0]} for {build[2]}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return rows


def builds(archs: tuple[str, ...]) -> list[tuple[str, Flags, str]]:
    """(file, flags, architecture) of everything that is compiled."""
    return [(stem, flags, arch) for arch in archs for stem in FILES for flags in variants(stem, capability(arch))]


def _check(nvrtc: NVRTC, stem: str, flags: Flags, arch: str) -> list[dict[str, Any]]:
    return records(stem, flags, arch, nvrtc.compile(stem, flags, arch).log)


def records(stem: str, flags: Flags, arch: str, log: str) -> list[dict[str, Any]]:
    """What the compiler's log says of each kernel of a build."""
    dtype = flags.get("scalar_t") or flags.get("source_t") or flags.get("grad_t")
    rest = ["{}={}".format(*item) for item in sorted(flags.items())]
    return [
        {"kernel": f"{stem}.{name}", "dtype": _DTYPES.get(str(dtype), "none"), "flags": rest, "arch": arch, **used}
        for name, used in _resources(log).items()
    ]


_USED = re.compile(
    r"Function properties for (\w+)\s+(?:ptxas\s+\.\s+)?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    r"\s+ptxas info\s+: Used (\d+) registers([^\n]*)"
)


def _resources(log: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` says of each kernel."""
    found = {}
    for name, stack, stores, loads, registers, rest in _USED.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = {
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": int(stack),
        }
    return found


class Compiled:
    """What NVRTC made of one file: its `log`, the `ptx`, and the machine code."""

    def __init__(self, log: str, ptx: str, cubin: bytes) -> None:
        self.log, self.ptx, self.cubin = log, ptx, cubin


class NVRTC:
    """The compiler as a library, from pip's packages or the system's."""

    def __init__(self) -> None:
        self.library, self.include = _find()

    def compile(self, stem: str, flags: Flags, arch: str) -> Compiled:
        """Compile one file to machine code, with the options that CuPy adds."""
        lib, program = self.library, ctypes.c_void_p()
        options = [f"-arch={arch}", "-std=c++17", "-ftz=true", "--ptxas-options=-v", f"-I{self.include}"]
        options += definitions(flags)
        encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        text = source(stem)
        self._ok(lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{stem}.cu".encode(), 0, None, None))
        try:
            failed = lib.nvrtcCompileProgram(program, len(options), encoded)
            log = self._bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
            if failed:
                raise CompileError(f"{stem}.cu {' '.join(definitions(flags))} for {arch}:\n{log}")
            missing = set(kernel_names(text)) - set(_resources(log))
            if missing:
                raise CompileError(
                    f"{stem}.cu for {arch}: no resources reported of {', '.join(sorted(missing))}:\n{log}"
                )
            ptx = self._bytes(program, "nvrtcGetPTXSize", "nvrtcGetPTX").rstrip(b"\0").decode()
            return Compiled(log, ptx, self._bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"))
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        self._ok(getattr(self.library, size_of)(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(max(1, size.value))
        self._ok(getattr(self.library, get)(program, buffer))
        return buffer.raw

    @staticmethod
    def _ok(status: int) -> None:
        if status:
            raise CompileError(f"NVRTC failed with status {status}")


def _find() -> tuple[ctypes.CDLL, str]:
    """NVRTC and the folder of its headers."""
    for folder, library in _candidates():
        if (Path(folder) / "cuda_fp16.h").is_file():
            try:
                for builtins in glob.glob(f"{Path(library).parent}/libnvrtc-builtins.so.1*"):
                    ctypes.CDLL(builtins)  # NVRTC asks for it by its bare name, which finds it once it is loaded
                return ctypes.CDLL(library), folder
            except OSError:
                continue
    raise CompilerNotFound("NVRTC was not found: pip install 'dcn-kernels[nvrtc]'")


def _candidates() -> Iterator[tuple[str, str]]:
    """(header folder, library) pairs that may exist, pip's packages first."""
    package = importlib.util.find_spec("nvidia")
    for base in (package.submodule_search_locations or []) if package else []:
        for library in sorted(glob.glob(f"{base}/cu1*/lib/libnvrtc.so.1*"), reverse=True):
            yield str(Path(library).parents[1] / "include"), library
        for library in glob.glob(f"{base}/cuda_nvrtc/lib/libnvrtc.so.1*"):
            yield f"{base}/cuda_runtime/include", library
    for home in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        for library in glob.glob(f"{home}/lib64/libnvrtc.so.1*"):
            yield f"{home}/include", library
