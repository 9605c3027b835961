"""grad_input without atomics, bitwise repeatable: the launcher of gather.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda.cells import place_samples
from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.device import Device
from dcn_kernels.cuda.sort import Sorter

BUILD = "gather"
THREADS = 256


class Gatherer:
    """The memory for tiles of up to `samples` samples in `cells` cells, with sums of type `real`."""

    def __init__(self, device: Device, samples: int, cells: int, real: np.dtype, *, op: str) -> None:
        self.device, self.op = device, op
        self.sorter = Sorter(device, samples)
        self.placed = device.empty((samples, 3), real)
        self.starts = device.empty((cells + 1,), np.int64)

    @staticmethod
    def cells(images: int, OG: int, H: int, W: int) -> int:
        """Cells begin at -1 and at every pixel."""
        return images * OG * (H + 1) * (W + 1)

    @staticmethod
    def nbytes(samples: int, cells: int, real: np.dtype) -> int:
        """The memory of a Gatherer."""
        return Sorter.nbytes(samples) + 3 * real.itemsize * samples + 8 * (cells + 1)

    def add(
        self, s: np.ndarray, types: Flags, offset: Any, mask: Any, grad: Any, grad_input: Any, *, VEC: int, planes: bool
    ) -> None:
        """grad_input += the tile's part of the gradient; `grad` is that of the samples, as gather.cu says."""
        size = {name: int(s[name][0]) for name in ("images", "pixels", "KH", "KW", "OG", "H", "W", "lanes")}
        count = size["images"] * size["pixels"] * size["KH"] * size["KW"] * size["OG"]
        last = self.cells(size["images"], size["OG"], size["H"], size["W"])
        place_samples(self.device, s, types, offset, mask, self.sorter.keys, self.placed, count, op=self.op)
        keys, samples = self.sorter.sort(count, last, op=self.op)
        flags = _flags(self.placed.dtype.name, grad.dtype.name, VEC, planes)
        self._launch("cell_starts", flags, last + 1, (keys, self.starts, np.int64(count), np.int64(last)))
        threads = size["images"] * size["OG"] * size["H"] * size["W"] * size["lanes"]
        self._launch("gather", flags, threads, (self.starts, samples, self.placed, grad, grad_input, s))

    def _launch(self, kernel: str, flags: Flags, threads: int, args: tuple[Any, ...]) -> None:
        self.device.launch(BUILD, kernel, flags, -(-threads // THREADS), THREADS, args, op=self.op)


def _flags(real: str, grad: str, VEC: int, planes: bool) -> Flags:
    return {"acc_t": CTYPES[real], "grad_t": CTYPES[grad], "VEC": VEC, "PLANES": planes}


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """Columns are of the type of sums; planes of any."""
    for real, widths in (("float32", (1, 2, 4, 8)), ("float64", (1, 2))):
        for width in widths:
            yield _flags(real, real, width, False)
    for grad in CTYPES:
        yield _flags("float64" if grad == "float64" else "float32", grad, 1, True)
