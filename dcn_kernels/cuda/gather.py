"""grad_input without atomics, bitwise repeatable: the launcher of gather.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.device import Device
from dcn_kernels.cuda.sort import Sorter
from dcn_kernels.cuda.taps import accumulator_name, all_types, widths

BUILD = "gather"
THREADS = 256


class Gatherer:
    """The memory for tiles of up to `samples` samples in `cells` cells."""

    def __init__(self, device: Device, samples: int, cells: int, *, op: str) -> None:
        self.device, self.op = device, op
        self.sorter = Sorter(device, samples)
        self.starts = device.empty((cells + 1,), np.int64)

    @staticmethod
    def cells(images: int, OG: int, H: int, W: int) -> int:
        """Cells begin at -1 and at every pixel."""
        return images * OG * (H + 1) * (W + 1)

    def add(self, s: np.ndarray, flags: Flags, offset: Any, mask: Any, grad: Any, grad_input: Any) -> None:
        """grad_input += the tile's part of the gradient; `grad` is that of the samples, as gather.cu says."""
        size = {name: int(s[name][0]) for name in ("images", "pixels", "KH", "KW", "OG", "H", "W", "lanes")}
        count = size["images"] * size["pixels"] * size["KH"] * size["KW"] * size["OG"]
        cells = self.cells(size["images"], size["OG"], size["H"], size["W"])
        build = {**flags, "grad_t": CTYPES[grad.dtype.name]}
        self._launch("cells", build, count, (offset, self.sorter.keys, s))
        keys, samples = self.sorter.sort(count, cells, op=self.op)
        self._launch("cell_starts", build, cells + 1, (keys, self.starts, np.int64(count), np.int64(cells)))
        threads = size["images"] * size["OG"] * size["H"] * size["W"] * size["lanes"]
        self._launch("gather", build, threads, (offset, mask, self.starts, samples, grad, grad_input, s))

    def _launch(self, kernel: str, flags: Flags, threads: int, args: tuple[Any, ...]) -> None:
        self.device.launch(BUILD, kernel, flags, -(-threads // THREADS), THREADS, args, op=self.op)


def variants(vector_atomics: bool) -> Iterator[Flags]:
    """Columns of every mix of types and every VEC; planes of every mix without a mask."""
    for dtype, types in all_types():
        for width in widths(dtype):
            yield {**types, "grad_t": CTYPES[accumulator_name(dtype)], "VEC": width, "PLANES": 0}
    for dtype, types in all_types(with_mask=False):
        yield {**types, "grad_t": CTYPES[dtype], "VEC": 1, "PLANES": 1}
