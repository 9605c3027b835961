"""y_c(l) = x_c(l + dp(l)) on the CPU, compiled by Numba: each place's two weights once, then a run over channels.

Halves are converted as a whole, which costs a copy; dcn_kernels' own kernels convert while they read.
"""

from __future__ import annotations

import numba
import numpy as np

from dcn_kernels.dtypes import accumulator


def offset_sample1d(
    input: np.ndarray,  # (N, C, L)
    offset: np.ndarray,  # (N, L)
    *,
    border: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (N, C, L)."""
    real = accumulator(input.dtype)
    y = np.zeros(input.shape, real)
    _forward(input.astype(real), offset.astype(real), border == "edge", y)
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
    real = accumulator(input.dtype)
    grads = {"input": np.zeros(input.shape, real), "offset": np.zeros(offset.shape, real)}
    arrays = (grad_output.astype(real), input.astype(real), offset.astype(real))
    _backward(*arrays, border == "edge", grads["input"], grads["offset"])
    given = {"input": input, "offset": offset}
    return {name: grads[name].astype(given[name].dtype) for name in wrt}


@numba.njit
def _neighbours(at, L, edge):
    """Left and right neighbour with their weights; -1 where there is none."""
    left = int(np.floor(at))
    part = at - left
    right = left + 1
    if edge:
        left, right = min(max(left, 0), L - 1), min(max(right, 0), L - 1)
    return (left if 0 <= left < L else -1), (right if 0 <= right < L else -1), 1 - part, part


@numba.njit
def _forward(x, offset, edge, y):
    N, C, L = x.shape
    for n in range(N):
        for place in range(L):
            left, right, before, after = _neighbours(place + offset[n, place], L, edge)
            for c in range(C):
                if left >= 0:
                    y[n, c, place] += before * x[n, c, left]
                if right >= 0:
                    y[n, c, place] += after * x[n, c, right]


@numba.njit
def _backward(g, x, offset, edge, grad_x, grad_offset):
    N, C, L = x.shape
    for n in range(N):
        for place in range(L):
            left, right, before, after = _neighbours(place + offset[n, place], L, edge)
            for c in range(C):
                if left >= 0:
                    grad_x[n, c, left] += before * g[n, c, place]
                    grad_offset[n, place] -= g[n, c, place] * x[n, c, left]
                if right >= 0:
                    grad_x[n, c, right] += after * g[n, c, place]
                    grad_offset[n, place] += g[n, c, place] * x[n, c, right]
