"""Copies between layouts, cast and in one or two parts: the launcher of staging.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.device import Device
from dcn_kernels.cuda.taps import accumulator_name

BUILD = "staging"
TILE, THREADS = 32, 256

COPY = np.dtype([(name, np.int64) for name in (
    *("A", "B", "R", "C"),
    *("from_a", "from_b", "from_r", "from_c"),
    *("to_a", "to_b", "to_r", "to_c"),
    "along_r",
)])  # fmt: skip


def copy(device: Device, source: Any, target: Any, target_low: Any = None, *, op: str) -> None:
    """target[...] = source[...], both of four axes, by strides; an axis of length 1 of the source is repeated.

    With `target_low` (float32) in two parts: TF32 numbers, and what they leave.
    """
    if target.size == 0:
        return
    # the kernel reads along its axis C, the source's fastest, and writes along R or C, the target's fastest
    read, write = _fastest(source), _fastest(target)
    if read == write:
        row = max((axis for axis in range(4) if axis != read), key=lambda axis: target.shape[axis])
    else:
        row = write
    a, b = (axis for axis in range(4) if axis not in (read, row))
    s = np.zeros(1, COPY)
    for letter, axis in zip("ABRC", (a, b, row, read), strict=True):
        s[letter] = target.shape[axis]
        step = source.strides[axis] // source.dtype.itemsize
        s[f"from_{letter.lower()}"] = step if source.shape[axis] > 1 else 0
        s[f"to_{letter.lower()}"] = target.strides[axis] // target.dtype.itemsize
    s["along_r"] = read != write
    shape = target.shape
    blocks = shape[a] * shape[b] * -(-shape[row] // TILE) * -(-shape[read] // TILE)
    flags = _flags(source.dtype.name, target.dtype.name, target_low is not None)
    device.launch(BUILD, "copy", flags, blocks, THREADS, (source, target, target_low, s), op=op)


def _fastest(array: Any) -> int:
    """The axis whose neighbours lie closest together."""
    return min(range(3, -1, -1), key=lambda axis: abs(array.strides[axis]) if array.shape[axis] > 1 else np.inf)


def _flags(source: str, target: str, split: bool) -> Flags:
    return {"source_t": CTYPES[source], "target_t": CTYPES[target], "SPLIT": split}


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build: within a dtype, and from its accumulators."""
    for name in CTYPES:
        yield _flags(name, name, False)
        if (sums := accumulator_name(name)) != name:
            yield _flags(sums, name, False)
    yield _flags("float32", "float32", True)
