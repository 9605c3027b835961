"""Copies between layouts, cast and in one or two parts: the launcher of staging.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.device import Device
from dcn_kernels.cuda.taps import accumulator_name

BUILD = "staging"
TILE, THREADS, COPIES = 32, 256, 3

COPY = np.dtype([(name, np.int64) for name in (
    *("Z", "A", "B", "R", "C", "rows", "columns"),
    *("from_z", "from_a", "from_b", "from_r", "from_c"),
    *("to_z", "to_a", "to_b", "to_r", "to_c"),
    *("along_r", "parts"),
)])  # fmt: skip
JOBS = np.dtype([("of", COPY, COPIES)])


class Job(NamedTuple):
    """One copy: target[...] = source[...], both of four or five axes, by strides.

    Where an axis of the source is shorter, it is repeated if its length is 1; with `padded` the target is 0 beyond it.
    With `low` (float32) the copy has two parts: TF32 numbers, and what they leave.
    """

    source: Any
    target: Any
    low: Any = None
    padded: bool = False


def copy(device: Device, source: Any, target: Any, target_low: Any = None, *, op: str) -> None:
    """One copy; see Job."""
    copy_all(device, [Job(source, target, target_low)], op=op)


def copy_all(device: Device, jobs: list[Job], *, op: str) -> None:
    """Up to COPIES copies in one launch; sources are of one dtype, and targets are."""
    jobs = [job for job in jobs if job.target.size]
    if not jobs:
        return
    structs = layout([(job.source, job.target, job.padded) for job in jobs])
    arrays = [array for job in jobs for array in job[:3]] + [None] * (3 * (COPIES - len(jobs)))
    flags = copy_flags(jobs[0].source.dtype.name, jobs[0].target.dtype.name, any(job.low is not None for job in jobs))
    device.launch(BUILD, "copy", flags, int(structs["of"]["parts"].sum()), THREADS, (*arrays, structs), op=op)


def layout(copies: list[tuple[Any, Any, bool]]) -> np.ndarray:
    """The copies_t of (source, target, padded): of their shapes, strides and dtypes alone."""
    structs = np.zeros(1, JOBS)
    for i, (source, target, padded) in enumerate(copies):
        structs["of"][0, i] = _struct(source, target, padded)
    return structs


def _struct(source: Any, target: Any, padded: bool) -> np.ndarray:
    # the kernel reads along its axis C, the source's fastest, and writes along R or C, the target's fastest
    shape = target.shape
    read, write = _fastest(source), _fastest(target)
    if read == write:
        row = max((axis for axis in range(len(shape)) if axis != read), key=lambda axis: shape[axis])
    else:
        row = write
    others = [axis for axis in range(len(shape)) if axis not in (read, row)]
    s = np.zeros((), COPY)
    s["Z"] = 1
    for letter, axis in zip("ZAB"[-len(others) :] + "RC", (*others, row, read), strict=True):
        s[letter] = shape[axis]
        repeated = source.shape[axis] == 1 and not padded
        s[f"from_{letter.lower()}"] = 0 if repeated else source.strides[axis] // source.dtype.itemsize
        s[f"to_{letter.lower()}"] = target.strides[axis] // target.dtype.itemsize
    s["rows"], s["columns"] = ((source if padded else target).shape[axis] for axis in (row, read))
    s["along_r"] = read != write
    s["parts"] = math.prod(shape[axis] for axis in others) * -(-shape[row] // TILE) * -(-shape[read] // TILE)
    return s


def _fastest(array: Any) -> int:
    """The axis whose neighbours lie closest together."""
    return min(
        reversed(range(len(array.shape))),
        key=lambda axis: abs(array.strides[axis]) if array.shape[axis] > 1 else np.inf,
    )


def copy_flags(source: str, target: str, split: bool) -> Flags:
    """The flags of a build, by the names of dtypes."""
    return {"source_t": CTYPES[source], "target_t": CTYPES[target], "SPLIT": split}


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build: within a dtype, and from its accumulators."""
    for name in CTYPES:
        yield copy_flags(name, name, False)
        if (sums := accumulator_name(name)) != name:
            yield copy_flags(sums, name, False)
    yield copy_flags("float32", "float32", True)
