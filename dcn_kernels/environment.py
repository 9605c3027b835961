"""What there is to compute with: which backends work and why the others do not, versions, cores, the BLAS."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dcn_kernels.dispatch.arrays import BACKENDS

PACKAGES = (
    "dcn-kernels",
    "numpy",
    "numba",
    "llvmlite",
    "ml_dtypes",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "scipy",
    "matplotlib",
)
_CUPY_HINT = "pip install 'dcn-kernels[cuda12x]' or 'dcn-kernels[cuda13x]'"


def why_not(backend: str) -> str:
    """Why a backend cannot be used here; an empty string where it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        return "" if importlib.util.find_spec("numba") else "Numba is not installed: pip install numba"
    if backend == "cuda":
        if importlib.util.find_spec("cupy") is None:
            return f"CuPy is not installed: {_CUPY_HINT}"
        try:
            import cupy
        except Exception as error:  # an installation that lacks a library of CUDA's, or was built for another NumPy
            return f"CuPy does not import: {' '.join(str(error).split())[:200]}"
        return "" if cupy.is_available() else "CuPy finds no usable NVIDIA GPU or driver"
    return f"no such backend: expected one of {', '.join(BACKENDS)}"


def available() -> tuple[str, ...]:
    """The backends that can be used here."""
    return tuple(backend for backend in BACKENDS if not why_not(backend))


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of memory that this process may use, where that can be told."""
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(path).read_text()))
    with suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _cpu_facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return facts
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def device() -> dict[str, Any]:
    """The machine's processor, and its GPU if there is one that works."""
    facts = _cpu_facts()
    flags = facts.get("flags", "").split()
    found: dict[str, Any] = {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "vectors": next((name for name in ("avx512f", "avx2", "avx") if name in flags), platform.machine()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if not why_not("cuda"):
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        found["gpu"] = properties["name"].decode()
        found["compute_capability"] = f"{properties['major']}.{properties['minor']}"
        found["cuda_driver"] = cupy.cuda.runtime.driverGetVersion()
    return found


def blas() -> dict[str, Any]:
    """NumPy's BLAS: its name and version, the kernels it chose for this processor, and its threads."""
    built = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    found: dict[str, Any] = {"name": built.get("name", "unknown"), "version": built.get("version", "")}
    np.dot(np.ones((2, 2)), np.ones((2, 2)))  # so that it is loaded
    try:
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "openblas" in line}
    except OSError:
        return found
    for path in sorted(loaded):
        library = ctypes.CDLL(path)
        for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            kernel = getattr(library, f"{prefix}openblas_get_corename{suffix}", None)
            if kernel is not None:
                kernel.restype = ctypes.c_char_p
                found["kernel"] = kernel().decode()
                found["threads"] = int(getattr(library, f"{prefix}openblas_get_num_threads{suffix}")())
                return found
    return found


def threads() -> int:
    """How many threads the CPU backend uses."""
    if why_not("cpu"):
        return cores()
    from dcn_kernels.cpu.threads import get_num_threads

    return get_num_threads()


def hints() -> list[str]:
    """What is slow or missing here, and what to do about it."""
    found = []
    vectors, kernel = device()["vectors"], blas().get("kernel", "")
    if vectors == "avx512f" and kernel in ("Haswell", "Zen"):
        found.append(
            f"NumPy's OpenBLAS chose its {kernel} (AVX2) kernels on a processor with AVX-512; "
            "OPENBLAS_CORETYPE=SkylakeX makes its matrix products faster (this concerns the reference and the ceiling)"
        )
    if threads() < cores():
        found.append(f"the CPU backend uses {threads()} of {cores()} cores (DCN_NUM_THREADS or --threads)")
    if why_not("cuda"):
        found.append(f"no cuda backend: {why_not('cuda')}")
    if importlib.util.find_spec("matplotlib") is None:
        found.append("dcn-bench plot needs matplotlib: pip install 'dcn-kernels[plot]'")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * cores():
        found.append(f"other work is running (load {load:.1f} on {cores()} cores): timings will be noisy")
    return found


def commit() -> tuple[str, bool]:
    """(the commit of this source tree, whether files differ from it); ("", False) outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "", False
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20)
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return "", False
    return head.stdout.strip(), bool(changed.stdout.strip())
