"""y_c(l) = x_c(l + dp(l)), linear between places: the reference, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def offset_sample1d(
    input: np.ndarray,  # (N, C, L)
    offset: np.ndarray,  # (N, L)
    *,
    border: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (N, C, L)."""
    y = np.zeros(input.shape)
    for n, place, neighbour, weight, _ in _terms(input, offset, border):
        y[n, :, place] += weight * input[n, :, neighbour].astype(np.float64)
    if out is None:
        return y.astype(input.dtype)
    out[...] = y
    return out


def offset_sample1d_backward(
    grad_output: np.ndarray,  # (N, C, L)
    input: np.ndarray,
    offset: np.ndarray,
    *,
    border: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    grads = {"input": np.zeros(input.shape), "offset": np.zeros(offset.shape)}
    for n, place, neighbour, weight, slope in _terms(input, offset, border):
        grad = grad_output[n, :, place].astype(np.float64)
        grads["input"][n, :, neighbour] += weight * grad
        grads["offset"][n, place] += slope * (grad @ input[n, :, neighbour].astype(np.float64))
    given = {"input": input, "offset": offset}
    return {name: grads[name].astype(given[name].dtype) for name in wrt}


def _terms(input: np.ndarray, offset: np.ndarray, border: str) -> Iterator[tuple[int, int, int, float, float]]:
    """Every term of the sum: (n, the place, its neighbour, the neighbour's weight, the weight's slope)."""
    N, _, L = input.shape
    for n in range(N):
        for place in range(L):
            at = place + float(offset[n, place])
            left = int(np.floor(at))
            part = at - left
            for neighbour, weight, slope in ((left, 1 - part, -1.0), (left + 1, part, 1.0)):
                if border == "edge":
                    neighbour = min(max(neighbour, 0), L - 1)
                if 0 <= neighbour < L:
                    yield n, place, neighbour, weight, slope
