"""Temporary memory of the CPU kernels: a launching function states what it needs, and it is made and counted here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from dcn_kernels.dispatch.memory import check

_ALIGN = 64  # a cache line, and the widest vector

Plan = dict[str, tuple[tuple[int, ...], Any]]  # buffer -> (shape, dtype)


@dataclass
class Tracked:
    """What the calls inside `track` allocated."""

    peak_bytes: int = 0


_tracked: ContextVar[Tracked | None] = ContextVar("dcn_kernels_workspace", default=None)


class Layout(NamedTuple):
    """Where the buffers of a plan lie in one piece of memory."""

    size: int  # bytes in all
    buffers: tuple[tuple[str, tuple[int, ...], Any, int], ...]  # name, shape, dtype, first byte


def layout(plan: Plan) -> Layout:
    """Each buffer on a cache line of its own."""
    buffers, start = [], 0
    for name, (shape, dtype) in plan.items():
        buffers.append((name, shape, dtype, start))
        start += -(-prod(shape) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
    return Layout(start + _ALIGN, tuple(buffers))


def allocate(plan: Plan | Layout) -> dict[str, np.ndarray]:
    """The buffers of a plan, uninitialised."""
    size, buffers = plan if isinstance(plan, Layout) else layout(plan)
    tracked = _tracked.get()
    if tracked is not None:
        tracked.peak_bytes = max(tracked.peak_bytes, size)
    check(size, "temporary memory")
    memory = np.empty(size, np.uint8)
    first = -memory.__array_interface__["data"][0] % _ALIGN
    return {name: np.ndarray(shape, dtype, memory, first + start) for name, shape, dtype, start in buffers}


@contextmanager
def track() -> Iterator[Tracked]:
    """Count the temporary memory of the CPU calls inside: the largest of one call, in bytes."""
    tracked = Tracked()
    token = _tracked.set(tracked)
    try:
        yield tracked
    finally:
        _tracked.reset(token)
