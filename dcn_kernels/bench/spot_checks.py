"""Nothing wrong is ever timed: a row's result against the reference, small and at full size.

Twice: on the same options with sizes cut, and at full size on some elements of the output and of each gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dcn_kernels.bench import layers
from dcn_kernels.bench.inputs import DIRECTIONS, Inputs, make_inputs
from dcn_kernels.check import calls
from dcn_kernels.dispatch.call import function, parameters_for
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import accumulator

_SPOTS = 32  # output positions at least, of all channels (or one RoI), whose results are compared at full size


_ELEMENTS = 256  # of the output, and of each gradient that has one value or more a position


class Mismatch(RuntimeError):
    """A result that is about to be timed is wrong."""


def check_small(
    layer: layers.Layer,
    offsets: str,
    dtype: str,
    backend: str,
    seed: int,
    directions: tuple[str, ...] = DIRECTIONS,
) -> float:
    """The same options with sizes cut, against the reference: the largest error over its tolerance."""
    inputs = make_inputs(layers.cut(layer), offsets, dtype, seed)
    return _compare(inputs, inputs.sample, {}, backend, directions)


def check_spots(inputs: Inputs, backend: str, direction: str, seed: int) -> float:
    """Some elements of the full-size result against the reference: the largest error over its tolerance."""
    arrays = inputs.sample.arrays
    channels = [inputs.shape[1], *(arrays[name].shape[1] for name in inputs.op.coordinates if name in arrays)]
    count = max(_SPOTS, -(-_ELEMENTS // min(channels)))
    part, index = (inputs.op.part or _leading_part(inputs.op))(inputs.sample, count, seed)
    return _compare(inputs, part, index, backend, (direction,))


def _leading_part(op: Op) -> Callable[[Sample, int, int], tuple[Sample, dict[str, Any]]]:
    """One slice of the output's first axis (an image or a RoI): they do not depend on each other."""
    letter = op.output.split()[0]

    def part(sample: Sample, count: int, seed: int) -> tuple[Sample, dict[str, Any]]:
        sizes, _ = calls.output_shape(op, sample)
        picked = np.random.default_rng(seed).integers(sizes[letter], size=1)
        sliced = [name for name in sample.arrays if op.arrays[name].split()[0] == letter]
        arrays = {**sample.arrays, **{name: sample.arrays[name][picked] for name in sliced}}
        return dataclasses.replace(sample, arrays=arrays), dict.fromkeys(["output", *sliced], (picked,))

    return part


def _compare(inputs: Inputs, part: Sample, index: dict[str, Any], backend: str, directions: Iterable[str]) -> float:
    """`part` on the reference against the whole on a backend, where the part's results belong."""
    op = inputs.op
    first = next(iter(inputs.sample.arrays.values()))
    wide = accumulator(first.dtype)
    exact = {**dict.fromkeys(op.arrays), **{name: array.astype(wide) for name, array in part.arrays.items()}}
    params = op.parameters(inputs.sample.params)
    worst = 0.0
    # a coordinate is rounded to the type of sums, which moves the weights of a sample as much
    rounding = float(np.finfo(wide).eps) * max(inputs.sizes.get(letter, 1) for letter in op.axes)
    here = index.get("output", (...,))
    # the function itself: a part is no call that the shape checks know
    given = parameters_for(op, "forward", "reference", params)
    want = calls.to_numpy(function(op, "forward", "reference")(**exact, **given, out=None))
    if "forward" in directions:
        got = calls.forward(op, inputs.sample, backend)[here]
        length = calls.reduction_length(op, inputs.sizes, "forward", int(np.prod(inputs.shape)))
        worst = _ratio(op, "output", got, want, calls.tolerance(first.dtype, length) + rounding)
    if "backward" in directions:
        names = tuple(name for name in op.differentiable if name in part.arrays)
        sparse = np.zeros_like(inputs.grad_output)
        sparse[here] = inputs.grad_output[here]
        got_all = calls.backward(op, inputs.sample, backend, sparse)
        grad_output = inputs.grad_output[here].astype(wide).reshape(want.shape)
        given = parameters_for(op, "backward", "reference", params)
        want_all = function(op, "backward", "reference")(grad_output=grad_output, **exact, **given, wrt=names)
        for name in names:
            got, want = got_all[name], want_all[name]
            if name in index:
                rest = got.copy()
                rest[index[name]] = 0
                if rest.any():
                    raise Mismatch(f"{op.name}: the gradient of {name} is not 0 where grad_output is 0")
                got = got[index[name]]
            length = calls.reduction_length(op, inputs.sizes, "backward", inputs.sample.arrays[name].size)
            bound = calls.tolerance(first.dtype, length) + rounding
            worst = max(worst, _ratio(op, f"the gradient of {name}", got, want, bound))
    return worst


def _ratio(op: Op, what: str, got: np.ndarray, want: np.ndarray, bound: float) -> float:
    error, at = calls.relative_error(got.reshape(want.shape), want)
    if not error <= bound:
        raise Mismatch(f"{op.name}: {what} differs from the reference by {error:.2g} (tolerance {bound:.2g}) at {at}")
    return error / bound
