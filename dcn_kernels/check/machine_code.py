"""What the machine code of the CUDA kernels says: blocks of a multiprocessor, and the instructions of the main loop.

NVRTC makes the machine code and nvdisasm reads it back; neither needs a GPU. A main loop is the smallest loop with at
least half of a kernel's matrix instructions (its multiply-adds, where it has none).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from dcn_kernels.cuda import compile

SHARED_KB = {  # of a multiprocessor; a block has 1 KB less. By NVIDIA's tuning guides
    "sm_75": 64, "sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100,
}  # fmt: skip
THREADS = {"sm_75": 1024, "sm_80": 2048, "sm_90": 2048, "sm_100": 2048}  # of a multiprocessor; 1536 elsewhere
REGISTERS, WARP = 65536, 32
MATRIX, MULTIPLY = ("HMMA", "DMMA"), ("FFMA", "DFMA", "HFMA2")

CLASSES = {  # the first letters of an instruction -> what it is counted as
    "matrix": MATRIX,
    "multiply and add": ("FFMA", "FMUL", "FADD", "DFMA", "DMUL", "DADD"),
    "convert": ("HADD2", "HFMA2", "HMUL2", "F2F", "F2I", "I2F", "PRMT"),
    "ldmatrix": ("LDSM",),
    "shared load": ("LDS",),
    "shared store": ("STS",),
    "copy to shared": ("LDGSTS",),
    "global load": ("LDG", "LD"),
    "global store": ("STG", "ST"),
    "atomic": ("RED", "ATOM"),
    "shuffle": ("SHFL",),
    "barrier": ("BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC"),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "YIELD", "BREAK"),
}
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class DisassemblerNotFound(RuntimeError):
    """There is no nvdisasm on this machine."""


def disassembler() -> str:
    """The path of nvdisasm: pip's package, or the toolkit's."""
    package = importlib.util.find_spec("nvidia")
    for base in (package.submodule_search_locations or []) if package else []:
        for found in sorted(Path(base).glob("*/bin/nvdisasm")):
            return str(found)
    for home in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and Path(home, "bin", "nvdisasm").is_file():
            return str(Path(home, "bin", "nvdisasm"))
    if found_on_path := shutil.which("nvdisasm"):
        return found_on_path
    raise DisassemblerNotFound("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")


def instruction_class(name: str) -> str:
    """`LDG.E.128` -> "global load, 16 bytes"; all that is not in CLASSES is "integer and other"."""
    stem = name.partition(".")[0]
    for kind, stems in CLASSES.items():
        if stem in stems or (kind in ("convert", "atomic") and stem.startswith(stems)):
            if kind in ("global load", "shared load", "shared store", "global store"):
                width = re.search(r"\.(128|64|U8|S8|U16|S16)\b", name)
                number = int(re.sub(r"\D", "", width[1])) // 8 if width else 4
                return f"{kind}, {number} bytes"
            return kind
    return "integer and other"


def loops(assembly: str) -> dict[str, dict[str, int]]:
    """Kernel -> the main loop's instructions by class, of what nvdisasm prints; empty where a kernel has no loop."""
    return {
        part.partition(":")[0]: _main_loop(part)
        for part in re.split(r"^\.text\.", assembly, flags=re.MULTILINE)[1:]
    }  # fmt: skip


def _main_loop(text: str) -> dict[str, int]:
    instructions: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            address = int(found[1], 16)
            instructions.append((address, found[2], found[3]))
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
    names = MATRIX if any(name.startswith(MATRIX) for _, name, _ in instructions) else MULTIPLY
    total = sum(name.startswith(names) for _, name, _ in instructions)
    best: list[str] = []
    for address, name, rest in instructions:
        target = _TARGET.search(rest) if name.startswith("BRA") else None
        begin = labels.get(target[1], address) if target else address
        if begin >= address:
            continue
        body = [other for at, other, _ in instructions if begin <= at <= address]
        enough = 2 * sum(other.startswith(names) for other in body) >= total > 0
        if enough and (not best or len(body) < len(best)):
            best = body
    return dict(Counter(map(instruction_class, best)).most_common())


# Cycles that one multiprocessor's unit takes for an instruction of one warp, estimated from NVIDIA's data sheets and
# tuning guides: four schedulers issue an instruction a cycle each, of integers one in two cycles; shared memory and the
# first-level cache move 128 bytes a cycle together. mma.sync on sm_90 reaches about 63 % of the peak by published
# measurements; on sm_86, sm_89 and sm_120 a matrix unit has half the width of sm_80's or sm_100's with float32 sums.
MATRIX_CYCLES = {"sm_80": 8.0, "sm_86": 16.0, "sm_89": 16.0, "sm_90": 6.4, "sm_100": 6.4, "sm_120": 16.0}
BYTES_A_CYCLE = 128


def cycles(arch: str, threads: int, loop: dict[str, int]) -> dict[str, float]:
    """Unit -> the cycles that a block's turn of the loop keeps it busy; the largest bounds. By estimate.

    Memory beyond the first-level cache is left out: its traffic depends on the layer.
    """
    warps, moved = threads / WARP, 0
    for kind, count in loop.items():
        width = re.search(r"(\d+) bytes", kind)
        if width and kind.startswith(("shared", "global")):
            moved += count * WARP * int(width[1])
        elif kind in ("ldmatrix", "copy to shared"):
            moved += count * WARP * 16
    found = {
        "issue": sum(loop.values()) * warps / 4,
        "matrix units": loop.get("matrix", 0) * warps / 4 * MATRIX_CYCLES.get(arch, 8.0),
        "shared memory and L1": moved * warps / BYTES_A_CYCLE,
        "integer units": loop.get("integer and other", 0) * warps / 4 * 2,
    }
    return {unit: round(count, 1) for unit, count in found.items()}


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks of a kernel a multiprocessor holds; 0: none fits."""
    if shared_bytes > (SHARED_KB[arch] - 1) * 1024:
        return 0
    by_shared = SHARED_KB[arch] * 1024 // (shared_bytes + 1024)  # each block costs 1 KB more
    by_registers = REGISTERS // (-(-threads // WARP) * WARP * -(-registers // 8) * 8)
    return min(by_shared, by_registers, THREADS.get(arch, 1536) // threads)


def check_machine_code(
    archs: tuple[str, ...] = compile.ARCHS, progress: Callable[[int, int, str], None] | None = None
) -> list[dict[str, Any]]:
    """What `compile.check_kernels` reports, with the machine code read too.

    Parameters
    ----------
    archs : names such as "sm_90"
    progress : called with (builds done, builds in all, "deform_conv for sm_90")

    Returns
    -------
    list of dict
        One per kernel, flags and architecture: what `check_kernels` gives (`shared_bytes` with what the launch asks
        for), `threads` of a block, `blocks` of a multiprocessor, `loop` (class of instruction -> how many a turn of
        the main loop has), `cycles` (unit -> how long such a turn keeps it busy, by estimate) and `bound` (the
        unit with most of them).

    Raises
    ------
    DisassemblerNotFound
        nvdisasm is not installed (``pip install nvidia-cuda-nvdisasm``).
    CompilerNotFound, CompileError
        As `check_kernels`.

    Examples
    --------
    >>> from dcn_kernels.check.machine_code import check_machine_code
    >>> kernels = check_machine_code(("sm_90",))  # doctest: +SKIP
    """
    program, nvrtc = disassembler(), compile.NVRTC()
    builds = compile.builds(archs)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(lambda build: _read(program, nvrtc, *build), builds)
        try:
            for done, (build, found) in enumerate(zip(builds, results, strict=True), 1):
                rows += found
                if progress is not None:
                    progress(done, len(builds), f"{build[0]} for {build[2]}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return rows


def _read(program: str, nvrtc: compile.NVRTC, stem: str, flags: compile.Flags, arch: str) -> list[dict[str, Any]]:
    compiled = nvrtc.compile(stem, flags, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        done = subprocess.run([program, "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise compile.CompileError(f"nvdisasm of {stem}.cu for {arch}: {done.stderr}")
    found = loops(done.stdout)
    asked = getattr(import_module(f"dcn_kernels.cuda.{stem}"), "dynamic_shared_bytes", None)  # what launches ask for
    rows = compile.records(stem, flags, arch, compiled.log)
    for row in rows:
        name = row["kernel"].partition(".")[2]
        bounds = re.search(rf"\.entry {name}\b.*?\.maxntid (\d+)", compiled.ptx, re.DOTALL)
        row["threads"] = int(bounds[1]) if bounds else 0
        row["shared_bytes"] += asked(name, flags) if asked else 0
        row["blocks"] = blocks_per_multiprocessor(arch, row["threads"], row["registers"], row["shared_bytes"])
        row["loop"] = found.get(name, {})
        row["cycles"] = cycles(arch, row["threads"], row["loop"])
        row["bound"] = max(row["cycles"], key=lambda unit: row["cycles"][unit]) if row["loop"] else "none"
    return rows
