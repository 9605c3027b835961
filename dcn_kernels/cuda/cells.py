"""Which cell each sample lies in: the launcher of cells.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.device import Device
from dcn_kernels.cuda.taps import all_types

BUILD = "cells"
THREADS = 256


def place_samples(
    device: Device,
    s: np.ndarray,
    flags: Flags,
    offset: Any,
    mask: Any,
    keys: Any,
    placed: Any,
    samples: int,
    *,
    op: str,
) -> None:
    """Fill keys (samples,), the cell of each sample of a tile, and placed (samples, 3): its place there, and mask."""
    blocks = -(-samples // THREADS)
    device.launch(BUILD, "cells", flags, blocks, THREADS, (offset, mask, keys, placed, s), op=op)


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """One build for each mix of types."""
    for _, flags in all_types():
        yield flags
