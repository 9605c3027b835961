"""What every launcher of sums.cu needs: its builds, and into how many parts a sum is cut."""

from __future__ import annotations

from collections.abc import Iterator

from dcn_kernels.cuda.compile import CTYPES, Flags

BUILD, THREADS = "sums", 256


def splits(parts: int, terms: int, least: int, multiprocessors: int, most: int) -> int:
    """Into how many splits `parts` sums of `terms` terms each are cut: what takes the fewest rounds for its length.

    A split has at least `least` terms; there are at most `most` splits.
    """
    most = max(1, min(most, terms // least, max(4, multiprocessors // parts)))
    return min(range(1, most + 1), key=lambda n: (-(-parts * n // multiprocessors) / n, n))


def flags(dtype: str) -> Flags:
    """The macros of a build, by the dtype's name."""
    return {"scalar_t": CTYPES[dtype]}


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """A build for each dtype."""
    for dtype in CTYPES:
        yield flags(dtype)
