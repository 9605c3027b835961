"""Bank conflicts and sectors: what a traced build of the stand-in logged of block 0, counted warp by warp.

``Library(cache, trace=True)`` compiles kernels that log every access made through the wrappers of matrix_units.cuh
(`shared_load`, `shared_store`, `global_load`, `global_store`, `ldmatrix`, `cp_async`, `mma`) and every atomic; `read`
takes the log after a launch. A warp's access is what its lanes do at one line, for the same time since they last met:
lanes that leave out an access must say so (an access of 0 bytes), or the next ones are counted with others.
"""

from __future__ import annotations

import ctypes
import itertools
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cuda_host.host import Library

LOGGED = np.dtype(
    [("address", np.uint64), *((n, np.uint32) for n in ("kind", "site", "bytes", "thread", "phase", "nth"))]
)
KINDS = (  # in the order of host::Access
    "shared load", "shared store", "global load", "global store", "ldmatrix", "cp.async to shared",
    "cp.async from global", "mma", "atomic",
)  # fmt: skip
SHARED = {"shared load", "shared store", "ldmatrix", "cp.async to shared"}
BANKS, SECTOR = 32, 32  # banks of 4 bytes; sectors of 32 bytes


@dataclass
class Row:
    """One kind of access at one line: how often a warp did it, what that took, and the least it could take.

    `passes` are of shared memory: 128 bytes each, so `passes - least` are bank conflicts. For global memory they are
    sectors of 32 bytes, and `least` is the number that the bytes asked for would fill.
    """

    instructions: int = 0
    passes: int = 0
    least: int = 0


def read(library: Library) -> dict[tuple[str, int], Row]:
    """(kind, line of the kernel's file or header) -> counts of what was logged since the last time; clears the log."""
    table: dict[tuple[str, int], Row] = defaultdict(Row)
    for warp_access in _warp_accesses(_take(library)):
        kind, site = KINDS[int(warp_access["kind"][0])], int(warp_access["site"][0])
        lanes = warp_access[warp_access["bytes"] > 0]
        if kind != "mma" and not len(lanes):
            continue
        row = table[kind, site]
        row.instructions += 1
        if kind in SHARED:
            passes, least = _passes(lanes)
        elif kind == "mma":
            passes = least = 0
        else:
            passes, least = _sectors(lanes)
        row.passes += passes
        row.least += least
    return dict(sorted(table.items()))


def _take(library: Library) -> np.ndarray:
    with tempfile.NamedTemporaryFile() as file:
        for loaded in library.loaded.values():  # whichever library writes it: the process has one log
            loaded.host_write_trace.restype = None
            loaded.host_write_trace(ctypes.c_char_p(file.name.encode()))
            log = np.fromfile(Path(file.name), LOGGED)
            if log.size:
                return log
    return np.empty(0, LOGGED)


def _warp_accesses(log: np.ndarray) -> list[np.ndarray]:
    """The log cut into the accesses of warps."""
    keys = np.stack([log["nth"], log["phase"], log["thread"] // 32, log["site"], log["kind"]])
    order = np.lexsort(keys)
    changed = np.any(np.diff(keys[:, order]) != 0, axis=0)
    return np.split(log[order], np.flatnonzero(changed) + 1) if log.size else []


def _passes(lanes: np.ndarray) -> tuple[int, int]:
    """Of shared memory: lanes are served 32, 16 or 8 at once (4, 8 or 16 bytes each), a bank gives a word a pass."""
    size = int(lanes["bytes"][0])
    passes = least = 0
    if size > 16:  # the compiler makes accesses of 16 bytes of it
        for start in range(0, size, 16):
            part = lanes.copy()
            part["address"] += np.uint64(start)
            part["bytes"] = 16
            passes, least = passes + (found := _passes(part))[0], least + found[1]
        return passes, least
    together = 8 if size == 16 else 16 if size == 8 else 32
    for _, some in itertools.groupby(lanes, key=lambda lane: int(lane["thread"]) % 32 // together):
        words = {int(lane["address"]) // 4 + i for lane in some for i in range(max(1, size // 4))}
        passes += max(Counter(word % BANKS for word in words).values())
        least += -(-len(words) // BANKS)
    return passes, least


def _sectors(lanes: np.ndarray) -> tuple[int, int]:
    first, size = lanes["address"].astype(np.int64), lanes["bytes"].astype(np.int64)
    touched = {s for a, n in zip(first, size, strict=True) for s in range(a // SECTOR, (a + n - 1) // SECTOR + 1)}
    wanted = {(a, n) for a, n in zip(first.tolist(), size.tolist(), strict=True)}
    return len(touched), -(-sum(n for _, n in wanted) // SECTOR)


def conflicts(table: dict[tuple[str, int], Row]) -> dict[tuple[str, int], int]:
    """Where shared memory took more passes than it had to."""
    return {
        where: row.passes - row.least for where, row in table.items() if where[0] in SHARED and row.passes > row.least
    }
