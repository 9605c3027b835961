"""The product of a deformable convolution as its kernels take it: product_t of sampled_tiles.cuh, and their tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.device import SPLIT_CAPABILITIES, shared_bytes_of_a_block

ROW_BYTES = 128  # of a tile's row along the summed axis
PIECE_BYTES = 16

PRODUCT = np.dtype(
    [(name, np.int32) for name in ("O", "width", "total", "padded")]
    + [(name, np.int64) for name in ("right", "down", "y_n", "y_o", "y_y", "y_x", "bias_o")]
    + [(name, np.int32) for name in ("splits", "padded_o")],
    align=True,
)


class Body(NamedTuple):
    """How two tiles are multiplied."""

    name: str  # "half", "split", "tf32"; "plain": multiply-adds in the type of sums
    matrix_units: bool
    split: bool


PLAIN = Body("plain", False, False)


def body(dtype: np.dtype, precision: str, capability: tuple[int, int]) -> Body:
    """On the matrix units where they are there and the precision allows it, else by plain multiply-adds."""
    if capability >= (8, 0) and dtype.itemsize == 2:
        return Body("half", True, False)
    if capability >= (8, 0) and dtype == np.float32 and precision == "tf32":
        return Body("tf32", True, False)
    if dtype == np.float32 and precision == "float32" and capability in SPLIT_CAPABILITIES:
        return Body("split", True, True)
    return PLAIN


class Tile(NamedTuple):
    """A row of a table of tiles."""

    body: str
    least: int  # output channels of a group from which it is for
    BM: int  # pixels by
    BN: int  # output channels, of a block
    WARPS_M: int
    WARPS_N: int
    STAGES: int  # tiles of weights: one multiplied, the others under way
    TAPS: int  # whose places are kept at a time
    reason: str

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.WARPS_M * self.WARPS_N

    def flags(self) -> Flags:
        """The macros of a build."""
        return {name: getattr(self, name) for name in ("BM", "BN", "WARPS_M", "WARPS_N", "STAGES", "TAPS")}

    def blocks(self, pixels: int, outputs: int, groups: int) -> int:
        """How many blocks have work."""
        return -(-pixels // self.BM) * -(-outputs // self.BN) * groups


MANY = 2**31

# The first row that is for a layer, fits a block's shared memory, and gives every multiprocessor a block is taken; if
# none does, the last that fits. Registers and shared memory (of the widest dtype) are read from NVRTC's machine code;
# what is said of time is an estimate: nothing here was measured on a GPU.
FORWARD = (
    Tile(
        "half",
        129,
        128,
        256,
        2,
        4,
        2,
        9,
        "132 KB, all registers (sm_100 has too few): a sample is blended once for 256 outputs",
    ),
    Tile("half", 65, 128, 128, 2, 4, 3, 9, "116 KB: up to 128 outputs, or more blocks"),
    Tile("half", 65, 128, 128, 2, 4, 2, 5, "84 KB: the same for sm_86, sm_89 and sm_120, which have 99"),
    Tile("half", 33, 128, 64, 4, 2, 3, 9, "92 KB: up to 64 outputs, or more blocks"),
    Tile("half", 33, 64, 64, 2, 2, 3, 9, "58 KB: more blocks, three of them on a multiprocessor"),
    Tile("half", 1, 64, 32, 2, 2, 3, 9, "46 KB: up to 32 outputs, or more blocks still"),
    Tile("split", 65, 128, 128, 2, 4, 2, 9, "164 KB: every tile is two"),
    Tile("split", 65, 128, 128, 2, 4, 2, 5, "148 KB: the same for sm_80, which has 163"),
    Tile("split", 33, 64, 64, 2, 2, 2, 9, "82 KB: up to 64 outputs, or more blocks, two of them on a multiprocessor"),
    Tile("split", 1, 64, 32, 2, 2, 2, 9, "66 KB: up to 32 outputs, or more blocks still"),
    Tile("tf32", 65, 128, 128, 2, 4, 3, 9, "116 KB: as halves, but for 256 outputs there are too few registers"),
    Tile("tf32", 65, 128, 128, 2, 4, 2, 5, "84 KB: the same for sm_86, sm_89 and sm_120, which have 99"),
    Tile("tf32", 33, 64, 64, 2, 2, 3, 9, "58 KB: up to 64 outputs, or more blocks"),
    Tile("tf32", 1, 64, 32, 2, 2, 3, 9, "46 KB: up to 32 outputs, or more blocks still"),
    Tile("plain", 65, 128, 128, 2, 4, 2, 5, "84 KB: 16 multiply-adds of float32 for a read of 16 bytes"),
    Tile("plain", 33, 64, 64, 2, 2, 2, 5, "42 KB: up to 64 outputs, or more blocks; 54 KB of float64"),
    Tile("plain", 1, 64, 32, 2, 2, 2, 5, "34 KB: up to 32 outputs, or more blocks still"),
)


def shared_bytes(tile: Tile, dtype: np.dtype, split: bool, wide: bool) -> int:
    """What a block of `deform_conv_forward` takes; checked when it is compiled."""
    parts, places = (2 if split else 1), (64 if dtype == np.float64 else 32) * tile.TAPS * tile.BM
    tiles = (2 * tile.BM + tile.STAGES * tile.BN) * ROW_BYTES * parts
    outputs = tile.BN * (tile.BM * dtype.itemsize + (32 if dtype == np.float64 else 16))
    return max(tiles, outputs) + places * wide


def fitting(body: Body, dtype: np.dtype, wide: bool, capability: tuple[int, int]) -> list[Tile]:
    """The rows that fit, of each size of tile the first.

    Registers, by NVRTC's machine code: of float64 no more than 64 outputs a block, before sm_90 no more than 32; of the
    others no more than 128 from sm_100 on.
    """
    newest, newer = capability >= (10, 0), capability >= (9, 0)
    most = (64 if newer else 32) if dtype == np.float64 else 128 if newest else MANY
    found: dict[tuple[int, int], Tile] = {}
    for tile in FORWARD:
        fits = shared_bytes(tile, dtype, body.split, wide) <= shared_bytes_of_a_block(capability)
        if tile.body == body.name and fits and most >= tile.BN:
            found.setdefault((tile.BM, tile.BN), tile)
    return list(found.values())


def choose(tiles: list[Tile], pixels: int, outputs: int, groups: int, multiprocessors: int) -> Tile:
    """The row that is taken, for `outputs` output channels of each group."""
    meant = [tile for tile in tiles if outputs >= tile.least]
    filling = (tile for tile in meant if tile.blocks(pixels, outputs, groups) >= multiprocessors)
    return next(filling, meant[-1])


def share_an_offset_group(width: int, per_og: int, dtype: np.dtype) -> bool:
    """WIDE: whether every chunk of a convolution group's channels lies in one offset group."""
    chunk = ROW_BYTES // dtype.itemsize
    return per_og % width == 0 or (per_og % chunk == 0 and width % per_og == 0)


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def product(**values: Any) -> np.ndarray:
    """A product_t."""
    f = np.zeros(1, PRODUCT)
    for name, value in values.items():
        f[name] = value
    return f
