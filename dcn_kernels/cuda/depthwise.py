"""The builds of depthwise.cu, which deform_conv_forward.py launches."""

from __future__ import annotations

from collections.abc import Iterator

from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.taps import all_types, widths

TILE, THREADS, TAPS = 32, 256, 9


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """Every way to load, of bfloat16 (in few instructions other than float16) the widest; and the widest of a mix."""
    for name, c_types in all_types():
        one_type = c_types["offset_t"] == c_types["mask_t"] == c_types["scalar_t"]
        for VEC in widths(name) if one_type and name != "bfloat16" else widths(name)[-1:]:
            for WIDE in (False, True) if one_type else (True,):
                yield {**c_types, "VEC": VEC, "WIDE": WIDE, "TAPS": TAPS}
