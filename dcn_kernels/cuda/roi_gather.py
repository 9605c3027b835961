"""The gradient of the map without atomics, bitwise repeatable: the launcher of roi_gather.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.device import Device

BUILD = "roi_gather"
THREADS = 256
TALL, WIDE, CHANNELS = 4, 8, 32  # of a block


def collect(device: Device, dtype: np.dtype, s: np.ndarray, args: tuple[Any, ...], *, op: str) -> None:
    """Add to sums (images, C, maps, H, W) what the means of RoIs or, with argmax, their maxima have to.

    `args` are grad_output, rois, offset, mask, argmax and the sums, as roi_gather.cu says, with strides as `s` says.
    """
    images, C, maps, H, W = args[-1].shape
    classes = int(s["classes"][0])
    tiles = -(-H // TALL) * -(-W // WIDE) * -(-(C // classes) // CHANNELS)
    flags = {"scalar_t": CTYPES[dtype.name]}
    device.launch(BUILD, "collect", flags, images * maps * classes * tiles, THREADS, (*args, s), op=op)


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """One build for each dtype."""
    for dtype in CTYPES.values():
        yield {"scalar_t": dtype}
