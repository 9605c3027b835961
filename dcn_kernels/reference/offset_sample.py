"""y_c(p) = x_c(p + dp_g(p)), one offset field per group g of channels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dcn_kernels.dtypes import accumulator
from dcn_kernels.reference.sampling import Corners, corners, gradient, sample, scatter


def offset_sample2d(
    input: np.ndarray,  # (N, C, H, W)
    offset: np.ndarray,  # (N, 2*OG, H, W)
    *,
    border: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns (N, C, H, W)."""
    y = np.zeros(input.shape)
    for n, _g, channels, at in groups(input, offset, border):
        y[n, channels] = sample(input[n, channels].astype(np.float64), at)
    if out is None:
        return y.astype(input.dtype)
    out[...] = y
    return out


def offset_sample2d_backward(
    grad_output: np.ndarray,  # (N, C, H, W)
    input: np.ndarray,
    offset: np.ndarray,
    *,
    border: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    grads = {"input": np.zeros(input.shape), "offset": np.zeros(offset.shape)}
    for n, g, channels, at in groups(input, offset, border):
        grad = grad_output[n, channels].astype(np.float64)
        slope_y, slope_x = gradient(input[n, channels].astype(np.float64), at)
        grads["offset"][n, 2 * g] = (grad * slope_y).sum(axis=0)
        grads["offset"][n, 2 * g + 1] = (grad * slope_x).sum(axis=0)
        scatter(grads["input"][n, channels], at, grad)
    given = {"input": input, "offset": offset}
    return {name: grads[name].astype(given[name].dtype) for name in wrt}


def groups(input: np.ndarray, offset: np.ndarray, border: str) -> Iterator[tuple[int, int, slice, Corners]]:
    """Per image and offset group: (n, g, its channels, its positions' corners)."""
    N, C, H, W = input.shape
    OG = offset.shape[1] // 2
    real = accumulator(input.dtype)
    row, column = np.mgrid[:H, :W]
    for n in range(N):
        for g in range(OG):
            y = row.astype(real) + offset[n, 2 * g].astype(real)
            x = column.astype(real) + offset[n, 2 * g + 1].astype(real)
            yield n, g, slice(g * (C // OG), (g + 1) * (C // OG)), corners(y, x, H, W, border)
