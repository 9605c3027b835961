"""The builds of depthwise_backward.cu, which deform_conv_backward.py launches."""

from __future__ import annotations

from collections.abc import Iterator

from dcn_kernels.cuda import depthwise
from dcn_kernels.cuda.compile import Flags
from dcn_kernels.cuda.device import has_vector_atomics


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build that is checked: those of the forward."""
    for flags in depthwise.variants(capability):
        own = {name: value for name, value in flags.items() if name != "TAPS"}
        yield {**own, "VECTOR_ATOMICS": has_vector_atomics(capability)}
