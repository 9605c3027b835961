"""An operator of one's own, in a package of its own: a signal resampled at each place plus an offset.

`row` is all that dcn_kernels needs to know. Registered by ``OPS[row.name] = row``, the operator is in both commands,
in `dcn_kernels.torch` and `dcn_kernels.jax`. CONTRIBUTING.md walks through these files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op, Params, Sample, Sizes
from dcn_kernels.ops.samples.draw import layer_offsets, off_kinks, values

__all__ = ["offset_sample1d", "offset_sample1d_backward", "row"]
BORDERS = ("zeros", "edge")


def offset_sample1d(
    input: Any, offset: Any, *, border: str = "zeros", out: Any = None, backend: str | None = None
) -> Any:
    """Resample a signal at each place plus an offset, linearly between places.

    Parameters
    ----------
    input : array (N, C, L)
        float16, bfloat16, float32 or float64; any strides.
    offset : array (N, L)
        In places. The input's dtype, or float32 beside half precision.
    border : {"zeros", "edge"}
        What lies outside of the signal: 0, or its nearest end.
    out : array (N, C, L), optional
        Where the result is written.
    backend : {None, "reference", "cpu"}
        None: by the arrays' device.

    Returns
    -------
    array (N, C, L)

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Examples
    --------
    >>> import numpy as np
    >>> from own_operator import offset_sample1d
    >>> offset_sample1d(np.array([[[1.0, 2.0, 4.0]]]), np.full((1, 3), 0.5))
    array([[[1.5, 3. , 2. ]]])
    """
    return call(row, "forward", {"input": input, "offset": offset}, {"border": border}, backend=backend, out=out)


def offset_sample1d_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    *,
    border: str = "zeros",
    wrt: Iterable[str] | str | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Gradients of `offset_sample1d`.

    Parameters
    ----------
    grad_output : array (N, C, L)
        Gradient of the loss with respect to the output.
    wrt : names among "input", "offset"
        None means both.

    Other parameters are those of `offset_sample1d`.

    Returns
    -------
    dict
        Argument name -> gradient.

    Raises
    ------
    ValueError, TypeError
        As `offset_sample1d`.

    Examples
    --------
    >>> import numpy as np
    >>> from own_operator import offset_sample1d_backward
    >>> signal = np.array([[[1.0, 2.0, 4.0]]])
    >>> offset_sample1d_backward(np.ones_like(signal), signal, np.full((1, 3), 0.5))["offset"]
    array([[ 1.,  2., -4.]])
    """
    arrays = {"grad_output": grad_output, "input": input, "offset": offset}
    return call(row, "backward", arrays, {"border": border}, backend=backend, wrt=wrt)


def _samples(seed: int) -> list[Sample]:
    """Small cases over every option, no sampling point near a kink, which is at every whole place."""
    rng, cases = np.random.default_rng(seed), []
    for border, (N, C, L) in (("zeros", (2, 3, 7)), ("edge", (1, 20, 9))):
        arrays = {"input": values(rng, (N, C, L)), "offset": off_kinks(rng, (N, L), 3)}
        cases.append(Sample(arrays, {"border": border}, border))
    return cases


def _layer_call(layer: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], Params]:
    """Shapes of the arrays of a layer of the benchmark, and the parameters of its call."""
    return {"input": (layer["N"], layer["C"], layer["L"]), "offset": (layer["N"], layer["L"])}, {"border": "zeros"}


def _layer_sample(layer: dict[str, Any], *, offsets: str, spread: float, seed: int) -> Sample:
    """Arrays of a layer's size, for timing; `offsets` is "zero", "smooth" or "random"."""
    rng, (shape_of, params) = np.random.default_rng(seed), _layer_call(layer)
    N, L = shape_of["offset"]
    offset = layer_offsets(rng, (N, 1, L), offsets, spread)[:, 0]
    return Sample({"input": rng.standard_normal(shape_of["input"]), "offset": offset}, params, offsets)


def _flops(sizes: Sizes, direction: str) -> float:
    """Two products and a sum a sample; a backward as much for each gradient."""
    return 3.0 * sizes["N"] * sizes["C"] * sizes["L"] * (1 if direction == "forward" else 2)


def _bytes(sizes: Sizes, direction: str, itemsize: int) -> float:
    """Input, offset and output once; a backward also the two gradients."""
    signal, offset = sizes["N"] * sizes["C"] * sizes["L"], sizes["N"] * sizes["L"]
    return float(itemsize * ((2 * signal + offset) if direction == "forward" else (3 * signal + 2 * offset)))


row = Op(
    name="offset_sample1d",
    module="offset_sample1d",
    package="own_operator",
    arrays={"input": "N C L", "offset": "N L"},
    output="N C L",
    optional=(),
    differentiable=("input", "offset"),
    coordinates=("offset",),
    axes=("L",),
    parameters=lambda params: {"border": shapes.choice("offset_sample1d", "border", params["border"], BORDERS)},
    derived={},
    divides=(),
    zero_sizes=("N",),
    samples=_samples,
    layer_sizes={"N": 1, "C": None, "L": None},
    layer_call=_layer_call,
    layer_sample=_layer_sample,
    flops=_flops,
    bytes=_bytes,
)
