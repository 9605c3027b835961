"""Means over bins of regions of interest and the gradient of the map: the launcher of roi_mean.cu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dcn_kernels.cuda.compile import CTYPES, Flags
from dcn_kernels.cuda.device import DEFAULT_WORKSPACE, has_vector_atomics
from dcn_kernels.cuda.roi_gather import collect
from dcn_kernels.cuda.roi_plan import VECTORS, Pooling, Source, Target, set_strides

BUILD = "roi_mean"


def mean(pooling: Pooling, out: Any = None, budget: int = DEFAULT_WORKSPACE) -> Any:
    """The mean of every bin: (R, C, PH, PW)."""
    y = pooling.device.empty(pooling.shape, pooling.dtype) if out is None else out
    if y.size:
        source = Source(pooling, budget)
        for some, s in pooling.chunks(source.images):
            args = (source.read(s, some), pooling.rois, pooling.offset, pooling.mask, y)
            pooling.launch(BUILD, "mean", s, source.VEC, pooling.blocks, args)
    return y


def input_gradient(pooling: Pooling, target: Target, grad_output: Any, *, deterministic: bool) -> None:
    """The gradient of the map by that of the means."""
    arrays = (grad_output, pooling.rois, pooling.offset, pooling.mask)
    for some, s in pooling.chunks(target.images):
        sums = target.begin(s, some)
        set_strides(s, "pooled", "rcyx", grad_output)
        if deterministic:
            collect(pooling.device, pooling.dtype, s, (*arrays, None, sums), op=pooling.op)
        else:
            pooling.launch(BUILD, "scatter", s, target.VEC, pooling.blocks, (*arrays, sums))
        target.end(some)


def variants(capability: tuple[int, int]) -> Iterator[Flags]:
    """The flags of every build: one channel at a time, or several."""
    for dtype, width in VECTORS.items():
        for VEC in sorted({1, width}):
            yield {"scalar_t": CTYPES[dtype], "VEC": VEC, "VECTOR_ATOMICS": has_vector_atomics(capability)}
