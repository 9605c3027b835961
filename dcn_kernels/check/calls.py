"""One call of an operator on a backend, and how far its result may be from another: the only table of tolerances."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from dcn_kernels.dispatch import arrays as _arrays
from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.call import call
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES, accumulator

BACKENDS = _arrays.BACKENDS

# Relative error of a rounding, with slack; bfloat16 so that a gradient scaled by 1.01, rounded, still shows.
TOLERANCES = {"float16": 1e-3, "bfloat16": 6e-3, "float32": 1e-6, "float64": 1e-13}


def tolerance(dtype: Any, length: float = 1) -> float:
    """The largest relative error of a sum of `length` terms of a dtype; halves are summed in float32.

    Examples
    --------
    >>> from dcn_kernels.check.calls import tolerance
    >>> tolerance("float64", 100) == 10 * tolerance("float64")
    True
    """
    storage = DTYPES[str(np.dtype(dtype) if dtype not in DTYPES else dtype)]
    return max(TOLERANCES[storage.name], TOLERANCES[accumulator(storage).name] * sqrt(max(1.0, length)))


def reduction_length(op: Op, sizes: dict[str, int], direction: str, elements: int) -> float:
    """About how many terms are summed for one element of a result."""
    return op.flops(sizes, direction) / 2 / max(1, elements)


def relative_error(got: np.ndarray, want: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """The error of `got` and the index of its worst element.

    The larger of two ratios: the worst element's error over the largest element of `want`, and the errors' root mean
    square over that of `want`. A result scaled by a factor close to 1 may pass the first as rounding, not the second.
    """
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    if got.shape != want.shape:
        return np.inf, ()
    if got.size == 0:
        return 0.0, ()
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - want)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    difference = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(difference)), got.shape))
    if difference[worst] == 0:
        return 0.0, worst
    finite = np.where(np.isfinite(want), np.abs(want), 0.0)
    if finite.max() == 0 or not np.isfinite(difference[worst]):
        return np.inf, worst
    rms = np.linalg.norm(difference) / np.linalg.norm(finite)
    return float(max(difference[worst] / finite.max(), rms)), worst


def with_dtype(op: Op, arrays: dict[str, Any], dtype: str, *, wide_coordinates: bool) -> dict[str, Any]:
    """A case's arrays in a dtype; beside halves the coordinates may stay float32."""
    storage = DTYPES[dtype]
    wide = accumulator(storage) if wide_coordinates else storage
    return {name: array.astype(wide if name in op.coordinates else storage) for name, array in arrays.items()}


def to_backend(backend: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """NumPy arrays as the backend's own; whatever else there is stays as it is."""
    if backend != "cuda":
        return arrays
    import cupy

    return {name: cupy.asarray(array) if isinstance(array, np.ndarray) else array for name, array in arrays.items()}


def to_numpy(array: Any) -> Any:
    """A result as NumPy arrays."""
    if isinstance(array, dict):
        return {name: to_numpy(value) for name, value in array.items()}
    if isinstance(array, tuple):
        return to_numpy(array[0])
    return array if isinstance(array, np.ndarray) else array.get()  # CuPy's way to the host


def forward(op: Op, sample: Sample, backend: str) -> np.ndarray:
    """The (first) output of a case, as NumPy."""
    arrays = {**dict.fromkeys(op.arrays), **to_backend(backend, sample.arrays)}
    return to_numpy(call(op, "forward", arrays, sample.params, backend=backend))


def backward(op: Op, sample: Sample, backend: str, grad_output: np.ndarray, wrt: Any = None) -> dict[str, np.ndarray]:
    """The gradients of a case, as NumPy."""
    arrays = {"grad_output": grad_output, **sample.arrays}
    arrays = {"grad_output": None, **dict.fromkeys(op.arrays), **to_backend(backend, arrays)}
    return to_numpy(call(op, "backward", arrays, sample.params, backend=backend, wrt=wrt))


def output_shape(op: Op, sample: Sample) -> tuple[dict[str, int], tuple[int, ...]]:
    """(sizes, output shape) of a case."""
    sizes = shapes.bind(op, sample.arrays, op.parameters(sample.params))
    return sizes, shapes.evaluate(op.output, sizes)
