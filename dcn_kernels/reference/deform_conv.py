"""Deformable convolution beside Eq. 2 and 7, one tap p_n at a time.

y(p0) = b + sum_n w(p_n) m_n(p0) x(p0 + p_n + dp_n)                                       (Eq. 2; m: version 2)
dy(p0)/d dp_n = w(p_n) m_n(p0) sum_q dG(q, p0 + p_n + dp_n)/d dp_n x(q)                   (Eq. 7)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dcn_kernels.dtypes import accumulator
from dcn_kernels.reference.sampling import Corners, corners, gradient, sample, scatter


def deform_conv2d(
    input: np.ndarray,  # (N, C, H, W)
    offset: np.ndarray,  # (N, 2*OG*KH*KW, OH, OW)
    weight: np.ndarray,  # (O, C/groups, KH, KW)
    bias: np.ndarray | None,  # (O,)
    mask: np.ndarray | None,  # (N, OG*KH*KW, OH, OW)
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Eq. 2. Returns (N, O, OH, OW)."""
    x, w = input.astype(np.float64), weight.astype(np.float64)
    y = np.zeros((input.shape[0], weight.shape[0], *offset.shape[2:]))
    for n, tap_at, modulation, groups in taps(input, offset, weight, mask, stride, padding, dilation, border):
        sampled = np.concatenate([sample(x[n, channels], at) for channels, at, _ in groups]) * modulation
        y[n] += through_weight(w[:, :, *tap_at], sampled)
    if bias is not None:
        y += bias.astype(np.float64)[:, None, None]
    if out is None:
        return y.astype(input.dtype)
    out[...] = y
    return out


def deform_conv2d_backward(
    grad_output: np.ndarray,  # (N, O, OH, OW)
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    wrt: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Eq. 7 and the transposes of Eq. 2 in its other arguments. Returns argument name -> gradient."""
    x, w, grad_y = (array.astype(np.float64) for array in (input, weight, grad_output))
    given = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    grads = {name: np.zeros(array.shape) for name, array in given.items() if array is not None}
    kernel_width = weight.shape[3]
    for n, tap_at, modulation, groups in taps(input, offset, weight, mask, stride, padding, dilation, border):
        grad_sampled = through_weight_transposed(
            w[:, :, *tap_at], grad_y[n], x.shape[1] // w.shape[1]
        )  # dL / d(m x(p))
        sampled = np.concatenate([sample(x[n, channels], at) for channels, at, _ in groups])
        grads["weight"][:, :, *tap_at] += weight_gradient(grad_y[n], sampled * modulation, weight.shape[1])
        tap = tap_at[0] * kernel_width + tap_at[1]
        for group, (channels, at, m) in enumerate(groups):
            taken = group * weight.shape[2] * kernel_width + tap
            slope_y, slope_x = gradient(x[n, channels], at)
            grads["offset"][n, 2 * taken] = (grad_sampled[channels] * slope_y).sum(axis=0) * m
            grads["offset"][n, 2 * taken + 1] = (grad_sampled[channels] * slope_x).sum(axis=0) * m
            if mask is not None:
                grads["mask"][n, taken] = (grad_sampled[channels] * sampled[channels]).sum(axis=0)
            scatter(grads["input"][n, channels], at, grad_sampled[channels] * m)
    if bias is not None:
        grads["bias"] = grad_y.sum(axis=(0, 2, 3))
    return {name: grads[name].astype(given[name].dtype) for name in wrt}  # type: ignore[union-attr]


Group = tuple[slice, Corners, np.ndarray]  # its channels, its positions' corners, its mask (OH, OW)


def taps(
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    mask: np.ndarray | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
) -> Iterator[tuple[int, tuple[int, int], np.ndarray, list[Group]]]:
    """Per image and tap: (n, (i, j), the mask of each channel (C, OH, OW), the offset groups' positions)."""
    (N, C, H, W), (KH, KW), (OH, OW) = input.shape, weight.shape[2:], offset.shape[2:]
    OG = offset.shape[1] // (2 * KH * KW)
    real = accumulator(input.dtype)  # the type of coordinates on every backend
    oy, ox = np.mgrid[:OH, :OW]
    for n in range(N):
        for i in range(KH):
            for j in range(KW):
                groups = []
                for g in range(OG):
                    k = (g * KH + i) * KW + j
                    # p0 + p_n + dp_n
                    y = (oy * stride[0] - padding[0] + i * dilation[0]).astype(real) + offset[n, 2 * k].astype(real)
                    x = (ox * stride[1] - padding[1] + j * dilation[1]).astype(real) + offset[n, 2 * k + 1].astype(real)
                    m = np.ones((OH, OW)) if mask is None else mask[n, k].astype(np.float64)
                    groups.append((slice(g * (C // OG), (g + 1) * (C // OG)), corners(y, x, H, W, border), m))
                yield n, (i, j), np.repeat([m for _, _, m in groups], C // OG, axis=0), groups


def through_weight(tap_weight: np.ndarray, sampled: np.ndarray) -> np.ndarray:
    """sum_c w[o, c] sampled[c]: tap_weight (O, C/groups), sampled (C, OH, OW) -> (O, OH, OW)."""
    groups = sampled.shape[0] // tap_weight.shape[1]
    by_group = tap_weight.reshape(groups, -1, tap_weight.shape[1])
    parts = sampled.reshape(groups, tap_weight.shape[1], *sampled.shape[1:])
    return np.einsum("goc,gchw->gohw", by_group, parts).reshape(-1, *sampled.shape[1:])


def through_weight_transposed(tap_weight: np.ndarray, grad: np.ndarray, groups: int) -> np.ndarray:
    """sum_o w[o, c] grad[o]: tap_weight (O, C/groups), grad (O, OH, OW) -> (C, OH, OW)."""
    by_group = tap_weight.reshape(groups, -1, tap_weight.shape[1])
    parts = grad.reshape(groups, -1, *grad.shape[1:])
    return np.einsum("goc,gohw->gchw", by_group, parts).reshape(-1, *grad.shape[1:])


def weight_gradient(grad: np.ndarray, sampled: np.ndarray, channels: int) -> np.ndarray:
    """sum_p grad[o, p] sampled[c, p]: (O, C/groups)."""
    groups = sampled.shape[0] // channels
    by_group = grad.reshape(groups, -1, *grad.shape[1:])
    parts = sampled.reshape(groups, channels, *sampled.shape[1:])
    return np.einsum("gohw,gchw->goc", by_group, parts).reshape(-1, channels)
