"""Whether there is memory for a call, before any of it is touched: systems promise more than they have."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from dcn_kernels.dispatch.row import Sizes

SMALL = 1 << 30  # bytes that nobody asks the system about: it takes longer than a small call
_CGROUPS = (  # limit, use, and what of it is given back when needed
    ("memory.max", "memory.current", r"^inactive_file (\d+)"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", r"^total_inactive_file (\d+)"),
)


def free() -> int | None:
    """Bytes that this process could still use, swap included; None where that cannot be told."""
    limits = []
    with suppress(OSError, ValueError, AttributeError):
        facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
        limits.append((int(facts["MemAvailable"]) + int(facts["SwapFree"])) * 1024)
    root = Path("/sys/fs/cgroup")
    for limit, used, kept in _CGROUPS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            most, now = int((root / limit).read_text()), int((root / used).read_text())
            found = re.search(kept, (root / used).with_name("memory.stat").read_text(), re.MULTILINE)
            limits.append(most - now + (int(found[1]) if found else 0))
    return min(limits, default=None)


def check(size: int, what: str) -> None:
    """`what`, of so many bytes, can be held."""
    if size < SMALL:
        return
    there = free()
    if there is not None and size > there:
        raise MemoryError(
            f"expected at most the {max(there, 0) / 1e9:.1f} GB that are free, got {size / 1e9:.1f} GB of {what}"
        )


def said(op: str, error: MemoryError, sizes: Sizes) -> MemoryError:
    """The same error with the operator and the sizes of its call."""
    letters = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
    return MemoryError(f"{op}: memory: {error or 'the system gives no more'}; {letters}")
