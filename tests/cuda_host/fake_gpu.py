"""A GPU that is not there, under the real CuPy: memory is the host's, kernels run by the stand-in of `host.py`.

CuPy reaches CUDA through the functions of two of its modules, `runtime` and `driver`, which its other modules take from
a table of pointers when they are imported. `install` puts other functions into the tables first. From then on CuPy's
own arrays, pools, streams, events and launches work, in this process alone, and the launchers, the branches for CuPy
in `dispatch`, the clocks and the commands run as they would on a GPU.

What this does not show: a driver, another order of memory accesses than the stand-in's, kernels that run while Python
goes on, and how long anything takes. A kernel of CuPy's own (`a + b`) is compiled by g++ like ours, from the text that
CuPy hands to its compiler.

`python_with_fake_gpu.py` beside this file is an interpreter that has such a GPU.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib.util
import os
import re
import runpy
import sys
import tempfile
import traceback
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from cuda_host import host

from dcn_kernels.cuda import compile

GPU: Any = None  # this process's, once installed
GPUS = 2
CAPABILITY = (9, 0)
TOTAL_BYTES = 8 << 30
# What is asked of a device's properties, as an H100's data sheet has it where it matters to a launcher.
PROPERTIES: dict[str, Any] = {
    "name": b"a CPU that stands in for a GPU",
    "major": CAPABILITY[0],
    "minor": CAPABILITY[1],
    "multiProcessorCount": 2,
    "l2CacheSize": 1 << 20,
    "totalGlobalMem": TOTAL_BYTES,
    "sharedMemPerBlockOptin": 227 << 10,
    "clockRate": 1_000_000,
    "memoryClockRate": 1_000_000,
    "memoryBusWidth": 1024,
    "warpSize": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsDim": (1024, 1024, 64),
    "maxGridSize": (2**31 - 1, 65535, 65535),
    "sharedMemPerBlock": 48 << 10,
    "regsPerBlock": 65536,
}
_MAJOR, _MINOR = 75, 76  # cudaDeviceAttr
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_TYPES: dict[str, Any] = {
    "void": None,
    "int": ctypes.c_int,
    "CUdevice": ctypes.c_int,
    "cudaMemcpyKind": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t,
    "uintmax_t": ctypes.c_size_t,
    "intptr_t": ctypes.c_ssize_t,
    "float": ctypes.c_float,
    "PyObject *": ctypes.py_object,
}


def missing() -> str:
    """What this machine lacks for it; empty if nothing."""
    return "CuPy is not installed" if importlib.util.find_spec("cupy") is None else host.missing()


@dataclass
class Event:
    """Something that was asked of the GPU, in the order of asking."""

    what: str
    stream: int
    about: str = ""


@dataclass
class FakeGPU:
    """State of the devices, and the functions that CuPy calls."""

    library: Any
    attributes: Any  # CuPy's class of what is known of an address
    device: int = 0
    kept: list[Any] = field(default_factory=list)  # callbacks, which must outlive CuPy
    log: list[Event] = field(default_factory=list)
    blocks: dict[int, tuple[Any, int, int]] = field(default_factory=dict)  # address -> memory, bytes, device
    addresses: list[int] = field(default_factory=list)
    handles: dict[int, Any] = field(default_factory=dict)  # of streams, events, modules and functions
    capturing: set[int] = field(default_factory=set)
    shared_bytes: dict[int, int] = field(default_factory=dict)  # function -> the most it may be started with

    def _handle(self, thing: Any) -> int:
        number = 0x1000 + 16 * len(self.handles)
        self.handles[number] = thing
        return number

    def _note(self, what: str, stream: int, about: str = "") -> None:
        self.log.append(Event(what, stream, about))

    # ------------------------------------------------------------ devices

    def getDevice(self) -> int:
        return self.device

    def getDeviceCount(self) -> int:
        return GPUS

    def setDevice(self, number: int) -> None:
        self.device = number

    def getDeviceProperties(self, number: int) -> dict[str, Any]:
        return dict(PROPERTIES)

    def deviceGetAttribute(self, attribute: int, number: int) -> int:
        return {_MAJOR: CAPABILITY[0], _MINOR: CAPABILITY[1]}.get(attribute, 1)

    def deviceGetPCIBusId(self, number: int) -> str:
        return f"0000:{number:02x}:00.0"

    def deviceCanAccessPeer(self, one: int, other: int) -> int:
        return 1

    def deviceEnablePeerAccess(self, number: int, flags: int) -> None:
        pass

    def _deviceEnsurePeerAccess(self, number: int) -> None:
        pass

    def _ensure_context(self) -> None:
        pass

    def deviceSynchronize(self) -> None:
        self._note("synchronize", -1)

    def driverGetVersion(self) -> int:
        return 13000

    def runtimeGetVersion(self) -> int:
        return 13000

    def memGetInfo(self) -> tuple[int, int]:
        used = sum(size for _, size, device in self.blocks.values() if device == self.device)
        return TOTAL_BYTES - used, TOTAL_BYTES

    # ------------------------------------------------------------ memory

    def malloc(self, size: int) -> int:
        memory = ctypes.create_string_buffer(size + 512)
        address = -(-ctypes.addressof(memory) // 512) * 512
        ctypes.memset(address, 0xFF, size)  # not a number, in every type
        self.blocks[address] = (memory, size, self.device)
        insort(self.addresses, address)
        return address

    def free(self, address: int) -> None:
        if address:
            del self.blocks[address]
            self.addresses.remove(address)

    def mallocAsync(self, size: int, stream: int) -> int:
        return self.malloc(size)

    def freeAsync(self, address: int, stream: int) -> None:
        self.free(address)

    def hostAlloc(self, size: int, flags: int) -> int:
        return self.malloc(size)

    def freeHost(self, address: int) -> None:
        self.free(address)

    def _owner(self, address: int) -> int:
        """The device of an address, -2 if it is none of ours."""
        place = bisect_right(self.addresses, address) - 1
        if place >= 0:
            start = self.addresses[place]
            _, size, device = self.blocks[start]
            if address < start + max(size, 1):
                return device
        return -2

    def pointerGetAttributes(self, address: int) -> Any:
        device = self._owner(address)
        return self.attributes(device, address, 0 if device >= 0 else address, 2 if device >= 0 else 0)

    def pointerGetMemoryType(self, address: int) -> int:
        return 2 if self._owner(address) >= 0 else 0

    def memcpy(self, to: int, source: int, size: int, kind: int) -> None:
        ctypes.memmove(to, source, size)

    def memcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self._note("memcpy", stream)
        ctypes.memmove(to, source, size)

    def memcpyPeer(self, to: int, to_device: int, source: int, source_device: int, size: int) -> None:
        ctypes.memmove(to, source, size)

    def memcpyPeerAsync(self, to: int, to_device: int, source: int, source_device: int, size: int, stream: int) -> None:
        self._note("memcpy", stream)
        ctypes.memmove(to, source, size)

    def memset(self, to: int, value: int, size: int) -> None:
        ctypes.memset(to, value, size)

    def memsetAsync(self, to: int, value: int, size: int, stream: int) -> None:
        self._note("memset", stream)
        ctypes.memset(to, value, size)

    # ------------------------------------------------------------ streams and events

    def streamCreate(self) -> int:
        return self._handle("stream")

    def streamCreateWithFlags(self, flags: int) -> int:
        return self._handle("stream")

    def streamCreateWithPriority(self, flags: int, priority: int) -> int:
        return self._handle("stream")

    def streamDestroy(self, stream: int) -> None:
        pass

    def streamSynchronize(self, stream: int) -> None:
        self._note("synchronize", stream)

    def streamQuery(self, stream: int) -> None:
        pass

    def streamIsCapturing(self, stream: int) -> int:
        return int(stream in self.capturing)

    def streamWaitEvent(self, stream: int, event: int, flags: Any = None) -> None:
        self._note("wait", stream, str(event))

    def eventCreate(self) -> int:
        return self._handle(0.0)

    def eventCreateWithFlags(self, flags: int) -> int:
        return self._handle(0.0)

    def eventDestroy(self, event: int) -> None:
        self.handles.pop(event, None)

    def eventRecord(self, event: int, stream: int) -> None:
        self.handles[event] = perf_counter()
        self._note("record", stream, str(event))

    def eventSynchronize(self, event: int) -> None:
        self._note("synchronize", -1, str(event))

    def eventQuery(self, event: int) -> None:
        pass

    def eventElapsedTime(self, start: int, end: int) -> float:
        return 1e3 * (self.handles[end] - self.handles[start])

    # ------------------------------------------------------------ kernels

    def moduleLoadData(self, image: bytes) -> int:
        """An image is the text of a program and its options; see `compiled`."""
        options, _, source = bytes(image).decode().partition("\0")
        return self._handle((source, dict(_definition(option) for option in options.split("\x01") if option)))

    def moduleUnload(self, module: int) -> None:
        pass

    def moduleGetFunction(self, module: int, name: str) -> int:
        source, flags = self.handles[module]
        return self._handle((name, self.library.entry(source, flags, name), int(flags.get("SHARED_BYTES", 0))))

    def funcGetAttribute(self, attribute: int, function: int) -> int:
        return 0

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        if attribute == _MAX_DYNAMIC_SHARED_SIZE_BYTES:
            self.shared_bytes[function] = value

    def launchKernel(
        self,
        function: int,
        gx: int,
        gy: int,
        gz: int,
        bx: int,
        by: int,
        bz: int,
        shared: int,
        stream: int,
        arguments: int,
        extra: int,
    ) -> None:
        name, entry, needed = self.handles[function]
        # a driver refuses more than it was told of beforehand; a kernel with less would write past the end
        assert shared >= needed and shared <= self.shared_bytes.get(function, 48 << 10), (name, shared, needed)
        self._note("launch", stream, name)
        self.library.runtime.host_set_schedule(0, ctypes.c_uint64(0))
        entry(ctypes.c_uint(gx), ctypes.c_uint(bx), ctypes.c_void_p(arguments), None, ctypes.c_size_t(0))


class Library(host.Library):
    """Compiles CuPy's own kernels too, with its headers but for those that g++ does not take."""

    STUBS: ClassVar = {"complex.cuh": "#include <cupy_host.hpp>\n", "atomics.cuh": ""}

    def entry(self, source: str, flags: compile.Flags, name: str) -> Any:
        if source.startswith("#include <cupy/"):
            source += f"\nEXPORT({name})\n"
        return super().entry(source, flags, name)

    def _compile(self, *arguments: str, sanitizer: list[str] | None = None) -> None:
        folder = self.cache / "stubs" / "cupy"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.STUBS.items():
            (folder / name).write_text(text)
        (package,) = importlib.util.find_spec("cupy").submodule_search_locations  # type: ignore[union-attr]
        include = Path(package, "_core", "include")
        super()._compile("-I", str(folder.parent), "-isystem", str(include), *arguments, sanitizer=sanitizer)


def _definition(option: str) -> tuple[str, str]:
    name, _, value = option.removeprefix("-D").partition("=")
    return name, value or "1"


def _prototype(text: str) -> tuple[Any, list[Any]]:
    """The C type of a function as Cython writes it, without the last argument, which it adds to each."""
    found = re.fullmatch(r"(.+?)\s*\((.*)\)", text)
    assert found, text

    def kind(name: str) -> Any:
        name = name.replace("__pyx_skip_dispatch", "").strip()
        if name.startswith("struct"):
            return ctypes.py_object if "__pyx_obj_" in name else ctypes.c_void_p
        return _TYPES[name]

    arguments = [] if found[2] == "void" else [kind(each) for each in found[2].split(", ")]
    return kind(found[1]), arguments


def _replace(module: Any, name: str, function: Callable[..., Any], kept: list[Any]) -> None:
    """Let CuPy's C code and its Python code call `function` for a function of `runtime` or `driver`."""
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype = ctypes.c_char_p
    python.PyCapsule_GetName.argtypes = [ctypes.py_object]
    python.PyCapsule_SetPointer.argtypes = [ctypes.py_object, ctypes.c_void_p]
    capsule = module.__pyx_capi__[name]
    text = python.PyCapsule_GetName(capsule).decode()
    result, arguments = _prototype(text)
    names = [each.strip() for each in text[text.index("(") + 1 : -1].split(",")]
    own = [
        place for place, each in enumerate(names) if each != "void" and "__pyx_" not in each.replace("__pyx_obj", "")
    ]

    def called(*values: Any) -> Any:
        try:
            return function(*(values[i] for i in own))
        except BaseException:  # C code called, to which an exception cannot be handed on
            traceback.print_exc()
            os._exit(70)

    pointer = ctypes.PYFUNCTYPE(result, *arguments)(called)
    kept.append(pointer)
    python.PyCapsule_SetPointer(capsule, ctypes.cast(pointer, ctypes.c_void_p))
    setattr(module, name, function)


def _compiled(source: str, options: tuple[str, ...] = (), **more: Any) -> Any:
    """In place of CuPy's compiler: nothing is compiled before a kernel of it is asked for."""
    from cupy.cuda import function

    definitions = [option for option in options if option.startswith("-D")]
    module = function.Module()
    module.load("\0".join(["\x01".join(definitions), source]).encode())
    return module


def install(library: Any) -> FakeGPU:
    """Give this process a GPU; CuPy may not have been imported before."""
    global GPU
    if "cupy" in sys.modules:
        raise RuntimeError("fake_gpu: expected a process without CuPy, got one that has imported it")
    from cupy_backends.cuda.api import driver, runtime

    GPU = gpu = FakeGPU(library, runtime.PointerAttributes)
    for module in (runtime, driver):
        for name in module.__pyx_capi__:
            function = getattr(gpu, name, None)
            if callable(function):
                _replace(module, name, function, gpu.kept)
    import cupy
    from cupy.cuda import compiler

    compiler._compile_module_with_cache = _compiled
    cupy.is_available = lambda: True
    cupy.matmul = _matmul
    return gpu


def view(array: Any) -> np.ndarray:
    """A CuPy array's memory as a NumPy array."""
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    first = np.ctypeslib.as_array((ctypes.c_uint8 * array.itemsize).from_address(array.data.ptr)).view(array.dtype)
    return np.lib.stride_tricks.as_strided(first, array.shape, array.strides)


def _matmul(a: Any, b: Any, out: Any = None) -> Any:
    """CuPy's product, which would ask cuBLAS."""
    import cupy

    product = view(a) @ view(b)
    if out is None:
        return cupy.asarray(product)
    view(out)[...] = product
    return out


def main(arguments: list[str]) -> None:
    """Be an interpreter with such a GPU, for `-m MODULE`, `-c TEXT` or a file, with or without -P before."""
    while arguments and arguments[0] == "-P":
        arguments = arguments[1:]
    kept = Path(os.environ.get("FAKE_GPU_CACHE") or Path(tempfile.gettempdir(), f"fake-gpu-{os.getuid()}"))
    kept.mkdir(parents=True, exist_ok=True)
    install(Library(kept))
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(builtins.compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(what, run_name="__main__")
