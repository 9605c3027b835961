"""A stable sort of (key, value) pairs on the GPU: the launcher of sort.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.device import Device

BUILD = "sort"
THREADS, BITS, DIGITS = 256, 8, 256
MOST_BLOCKS = 256
STRETCH = 8 * THREADS  # keys that are worth a block


class Sorter:
    """The memory of sorts of up to `most` (below 2^31) pairs: keys and values twice, and the digits' counts."""

    def __init__(self, device: Device, most: int) -> None:
        self.device, self.blocks = device, min(MOST_BLOCKS, device.max_blocks)
        self.keys, self.spare_keys = (device.empty((most,), np.int64) for _ in range(2))
        self.values, self.spare_values = (device.empty((most,), np.int32) for _ in range(2))
        self.counts = device.empty((self.blocks, DIGITS), np.int64)

    @staticmethod
    def nbytes(most: int) -> int:
        """The memory of a Sorter."""
        return 2 * (8 + 4) * most + 8 * MOST_BLOCKS * DIGITS

    def sort(self, count: int, largest: int, *, op: str) -> tuple[Any, Any]:
        """Sort keys[:count], of at most `largest`; returns (sorted keys, the places where they stood)."""
        blocks = min(self.blocks, -(-count // STRETCH))
        stretch = np.int64(-(-count // blocks))
        keys, values, to_keys, to_values = self.keys, None, self.spare_keys, self.spare_values
        for shift in range(0, max(1, largest.bit_length()), BITS):
            at = (np.int64(count), np.int32(shift), stretch)
            self._launch("sort_count", blocks, (keys, self.counts, *at), op)
            self._launch("sort_scan", 1, (self.counts, np.int32(blocks)), op)
            self._launch("sort_place", blocks, (keys, values, to_keys, to_values, self.counts, *at), op)
            spare = self.values if values is None else values
            keys, values, to_keys, to_values = to_keys, to_values, keys, spare
        return keys, values

    def _launch(self, kernel: str, blocks: int, args: tuple[Any, ...], op: str) -> None:
        self.device.launch(BUILD, kernel, {}, blocks, THREADS, args, op=op)


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """One build: keys and values are integers."""
    yield {}
