"""Temporary memory of the CPU kernels: a launching function states what it needs, and it is made and counted here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

_ALIGN = 64  # a cache line, and the widest vector

Plan = dict[str, tuple[tuple[int, ...], Any]]  # buffer -> (shape, dtype)


@dataclass
class Tracked:
    """What the calls inside `track` allocated."""

    peak_bytes: int = 0


_tracked: ContextVar[Tracked | None] = ContextVar("dcn_kernels_workspace", default=None)


def size(plan: Plan) -> int:
    """The bytes that a plan takes."""
    return sum(_lengths(plan)) + _ALIGN


def allocate(plan: Plan) -> dict[str, np.ndarray]:
    """The buffers of a plan, uninitialised, each on a cache line of its own, all in one piece of memory."""
    lengths = _lengths(plan)
    total = sum(lengths) + _ALIGN
    tracked = _tracked.get()
    if tracked is not None:
        tracked.peak_bytes = max(tracked.peak_bytes, total)
    memory = np.empty(total, np.uint8)
    start = -memory.__array_interface__["data"][0] % _ALIGN
    buffers = {}
    for (name, (shape, dtype)), length in zip(plan.items(), lengths, strict=True):
        buffers[name] = np.ndarray(shape, dtype, memory, start)
        start += length
    return buffers


def _lengths(plan: Plan) -> list[int]:
    """Bytes of each buffer, in whole cache lines."""
    return [-(-prod(shape) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN for shape, dtype in plan.values()]


@contextmanager
def track() -> Iterator[Tracked]:
    """Count the temporary memory of the CPU calls inside: the largest of one call, in bytes."""
    tracked = Tracked()
    token = _tracked.set(tracked)
    try:
        yield tracked
    finally:
        _tracked.reset(token)
