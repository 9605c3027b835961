"""A layer's arrays in a dtype, and a call on them that is ready to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcn_kernels.bench import layers
from dcn_kernels.check import calls
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES
from dcn_kernels.ops.registry import OPS

DIRECTIONS = ("forward", "backward")


@dataclass
class Inputs:
    """A layer's arrays in a dtype."""

    op: Op
    sample: Sample
    grad_output: np.ndarray
    sizes: dict[str, int]
    shape: tuple[int, ...]


def make_inputs(layer: layers.Layer, offsets: str, dtype: str, seed: int) -> Inputs:
    """The arrays of a layer."""
    op = OPS[layer["op"]]
    sample = op.layer_sample(layer, offsets=offsets, spread=layer["spread"], seed=seed)
    storage = DTYPES[dtype]
    sample = dataclasses.replace(sample, arrays={name: a.astype(storage) for name, a in sample.arrays.items()})
    sizes, shape = calls.output_shape(op, sample)
    grad_output = np.random.default_rng([seed, 1]).standard_normal(shape, np.float32).astype(storage)
    return Inputs(op, sample, grad_output, sizes, shape)


def runner(inputs: Inputs, direction: str, backend: str, *, reuse: bool = False) -> Callable[[], Any]:
    """A function of no arguments that runs one call; the arrays are on the backend's device already.

    With `reuse` the forward always writes into the same array, and the backward is given what a forward can keep.
    """
    op, params = inputs.op, inputs.sample.params
    arrays = {**dict.fromkeys(op.arrays), **calls.to_backend(backend, inputs.sample.arrays)}
    if direction == "forward":
        out = calls.to_backend(backend, {"out": np.empty_like(inputs.grad_output)})["out"] if reuse else None
        return lambda: call(op, direction, arrays, params, backend=backend, out=out)
    if reuse and op.saved:
        asked = {**params, **{f"return_{name}": True for name in op.saved}}
        _, *kept = call(op, "forward", arrays, asked, backend=backend)
        arrays |= dict(zip(op.saved, kept, strict=True))
    arrays = {"grad_output": calls.to_backend(backend, {"g": inputs.grad_output})["g"], **arrays}
    return lambda: call(op, direction, arrays, params, backend=backend)
