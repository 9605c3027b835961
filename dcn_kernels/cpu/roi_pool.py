"""RoI pooling on the CPU: means go to roi_mean.py; maxima are worked on here.

Maximum: a thread owns slabs of 16 channels of one image, staged channels-last: one comparison serves 16 channels.
Backward: it owns the same slabs of grad_input, so nothing is written by two threads; with a given argmax it owns
planes, and no map is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dcn_kernels.cpu import bins as rules
from dcn_kernels.cpu import workspace
from dcn_kernels.cpu.bins import MAX, pooled_bin, start_and_size
from dcn_kernels.cpu.convert import store_run
from dcn_kernels.cpu.deform_conv import load_pixels
from dcn_kernels.cpu.jit import inner, kernel
from dcn_kernels.cpu.roi_lanes import LANES, grid_argmax, grid_max
from dcn_kernels.cpu.roi_mean import (
    Plan,
    array,
    buffers,
    load_block,
    load_pooled,
    mean,
    mean_backward,
    plan,
    store_block,
    store_pooled,
)
from dcn_kernels.cpu.threads import claim, run
from dcn_kernels.shapes import argmax_error


@inner
def edges_of(s, roi, scale, edges):  # type: ignore[no-untyped-def]
    """The bins' edges on the map: edges[0, ph] <= y < edges[1, ph], edges[2, pw] <= x < edges[3, pw]."""
    start_y, h = start_and_size(MAX, roi[2], roi[4], scale)
    start_x, w = start_and_size(MAX, roi[1], roi[3], scale)
    for ph in range(s.PH):
        edges[0, ph], edges[1, ph], _ = pooled_bin(MAX, start_y, h, s.PH, ph, s.H)
    for pw in range(s.PW):
        edges[2, pw], edges[3, pw], _ = pooled_bin(MAX, start_x, w, s.PW, pw, s.W)


@kernel
def max_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, constants, units, order, first_of, rois, input, out, argmax, with_argmax,
    staged, pooled, line, edges, where,
):  # fmt: skip
    images, zero, bins = first_of.shape[0] - 1, constants.dtype.type(0), s.PH * s.PW
    buffer, block, edge, found = pooled[thread], staged[thread], edges[thread], where[thread]
    item = claim(sync)
    while item < images * units.shape[0] * s.chunks:
        unit = item // (images * s.chunks)
        n, chunk = item % (images * s.chunks) // s.chunks, item % s.chunks
        c0, count = units[unit, 0], units[unit, 1]
        here = first_of[n + 1] - first_of[n]
        low, high = first_of[n] + here * chunk // s.chunks, first_of[n] + here * (chunk + 1) // s.chunks
        if high > low:
            load_block(s, input, n, c0, count, block, line[thread])
        for t in range(low, high):
            r = order[t]
            edges_of(s, rois[r], constants[0], edge)
            for j in range((count + LANES - 1) // LANES):
                x = block[j].ctypes.data
                for ph in range(s.PH):
                    top, bottom = edge[0, ph], edge[1, ph]
                    for pw in range(s.PW):
                        left, right = edge[2, pw], edge[3, pw]
                        b = ph * s.PW + pw
                        if bottom <= top or right <= left:
                            for l in range(LANES):
                                buffer[j, b, l] = zero
                                found[b, l] = -1
                        elif with_argmax:
                            grid_argmax(
                                zero, buffer[j, b].ctypes.data, found[b].ctypes.data, x, s.W, top, bottom, left, right
                            )
                        else:
                            grid_max(zero, buffer[j, b].ctypes.data, 0, x, s.W, top, bottom, left, right)
                if with_argmax:
                    for l in range(min(LANES, count - j * LANES)):
                        for b in range(bins):
                            argmax[r, c0 + j * LANES + l, b] = found[b, l]
            store_pooled(s, buffer, r, c0, count, out, line[thread])
        item = claim(sync)


@kernel
def max_backward_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, constants, units, order, first_of, rois, input, grad, grad_input,
    staged, grad_staged, pooled, line, edges, where,
):  # fmt: skip
    images, zero = first_of.shape[0] - 1, constants.dtype.type(0)
    buffer, block, grad_block = pooled[thread], staged[thread], grad_staged[thread]
    edge, found = edges[thread], where[thread]
    item = claim(sync)
    while item < images * units.shape[0]:
        unit, n = item // images, item % images
        c0, count = units[unit, 0], units[unit, 1]
        if first_of[n + 1] > first_of[n]:
            load_block(s, input, n, c0, count, block, line[thread])
            grad_block[:] = zero
            for t in range(first_of[n], first_of[n + 1]):
                r = order[t]
                edges_of(s, rois[r], constants[0], edge)
                load_pooled(s, grad, r, c0, count, buffer, line[thread])
                for j in range((count + LANES - 1) // LANES):
                    x, to = block[j].ctypes.data, grad_block[j]
                    for ph in range(s.PH):
                        top, bottom = edge[0, ph], edge[1, ph]
                        for pw in range(s.PW):
                            left, right = edge[2, pw], edge[3, pw]
                            if bottom > top and right > left:
                                b = ph * s.PW + pw
                                at, unused = found[b].ctypes.data, line[thread].ctypes.data  # the maximum itself
                                grid_argmax(zero, unused, at, x, s.W, top, bottom, left, right)
                                for l in range(LANES):
                                    to[found[b, l] * LANES + l] += buffer[j, b, l]
            store_block(s, grad_block, n, c0, count, grad_input, line[thread])
        item = claim(sync)


@kernel
def argmax_backward_worker(  # type: ignore[no-untyped-def]
    thread, threads, sync, s, units, order, first_of, argmax, grad, grad_input, grad_staged, line, wrong
):
    """With a given argmax; wrong[thread] becomes an index that is no pixel's, if there is one."""
    images, bins, pixels = first_of.shape[0] - 1, s.PH * s.PW, s.H * s.W
    planes, row = grad_staged[thread], line[thread]
    item = claim(sync)
    while item < images * units.shape[0]:
        unit, n = item // images, item % images
        c0, count = units[unit, 0], units[unit, 1]
        base = grad_input.address + n * grad_input.s0
        if first_of[n + 1] > first_of[n]:
            planes[:] = planes.dtype.type(0)
            for t in range(first_of[n], first_of[n + 1]):
                r = order[t]
                for c in range(count):
                    load_pixels(row, 0, grad.address + r * grad.s0 + (c0 + c) * grad.s1, grad, s.PW, 0, bins)
                    to = planes[c]
                    for b in range(bins):
                        at = argmax[r, c0 + c, b]
                        if 0 <= at < pixels:
                            to[at] += row[b]
                        elif at != -1:
                            wrong[thread] = at
            for c in range(count):
                store_run(planes[c], 0, pixels, base + (c0 + c) * grad_input.s1, grad_input.kind)
        item = claim(sync)


def roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    mode: str,
    return_argmax: bool = False,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Returns (R, C, PH, PW), and the argmax."""
    if mode == "avg":
        return mean(input, rois, rule=rules.AVG, ratio=0, output_size=output_size, spatial_scale=spatial_scale, out=out)
    shape = (len(rois), input.shape[1], *output_size)
    if out is None:
        out = np.empty(shape, input.dtype)
    argmax = np.empty((*shape[:2], shape[2] * shape[3]) if return_argmax else (0, 0, 0), np.int64)
    if out.size:
        p = plan(input, rois, None, None, **_max(output_size, spatial_scale))
        b = buffers(p, ("staged",))
        edges, where = _bin_buffers(p)
        run(
            max_worker, p.threads, p.shape, p.constants, p.units, p.order, p.first_of, p.rois, array(input),
            array(out), argmax, int(return_argmax), b["staged"], b["pooled"], b["line"], edges, where,
        )  # fmt: skip
    return (out, argmax.reshape(shape)) if return_argmax else out


def _max(output_size: tuple[int, int], spatial_scale: float) -> dict[str, Any]:
    return {"rule": MAX, "ratio": 0, "output_size": output_size, "spatial_scale": spatial_scale, "lanes": LANES}


def _bin_buffers(p: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Each thread's edges of a RoI's bins, and the places of the maxima of one slab."""
    s = p.shape
    made = workspace.allocate(
        {
            "edges": ((p.threads, 4, max(s.PH, s.PW)), np.int64),
            "where": ((p.threads, s.PH * s.PW, LANES), np.int64),
        }
    )
    return made["edges"], made["where"]


def roi_pool_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    argmax: np.ndarray | None = None,  # (R, C, PH, PW)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    mode: str,
    wrt: tuple[str, ...],
    **_: Any,
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    if mode == "avg":
        options: dict[str, Any] = {
            "rule": rules.AVG,
            "ratio": 0,
            "output_size": output_size,
            "spatial_scale": spatial_scale,
        }
        return mean_backward(grad_output, input, rois, wrt=wrt, **options)
    grad_input = np.zeros(input.shape, input.dtype)
    if grad_output.size == 0:
        return {"input": grad_input}
    given = argmax is not None
    p = plan(input, rois, None, None, **{**_max(output_size, spatial_scale), **({"lanes": 1} if given else {})})
    p = p._replace(shape=p.shape._replace(direct=0))
    b = buffers(p, ("grad_staged",) if given else ("staged", "grad_staged"))
    if argmax is not None:
        wrong = np.full(p.threads, -1, np.int64)
        places = np.ascontiguousarray(argmax).reshape(*argmax.shape[:2], -1)
        run(
            argmax_backward_worker, p.threads, p.shape, p.units, p.order, p.first_of, places, array(grad_output),
            array(grad_input), b["grad_staged"], b["pooled"].reshape(p.threads, -1), wrong,
        )  # fmt: skip
        if (wrong != -1).any():
            raise argmax_error("roi_pool", input.shape[2] * input.shape[3], int(wrong[wrong != -1][0]))
        return {"input": grad_input}
    edges, where = _bin_buffers(p)
    run(
        max_backward_worker, p.threads, p.shape, p.constants, p.units, p.order, p.first_of, p.rois, array(input),
        array(grad_output), array(grad_input), b["staged"], b["grad_staged"], b["pooled"], b["line"], edges, where,
    )  # fmt: skip
    return {"input": grad_input}


def ps_roi_pool(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """Returns (R, C/(G*G), PH, PW)."""
    return mean(input, rois, out=out, **_ps(output_size, spatial_scale, group_size, convention))


def ps_roi_pool_backward(
    grad_output: np.ndarray,  # (R, C/(G*G), PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    group_size: tuple[int, int],
    convention: str,
    wrt: tuple[str, ...],
    **_: Any,
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    options = _ps(output_size, spatial_scale, group_size, convention)
    return mean_backward(grad_output, input, rois, wrt=wrt, **options)


def _ps(
    output_size: tuple[int, int], spatial_scale: float, group_size: tuple[int, int], convention: str
) -> dict[str, Any]:
    rule = rules.POOLED_RFCN if convention == "rfcn" else rules.POOLED_TORCHVISION
    common = {"output_size": output_size, "spatial_scale": spatial_scale}
    return {"rule": rule, "ratio": 0, "groups": group_size, **common}


def roi_align(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """Returns (R, C, PH, PW)."""
    return mean(input, rois, out=out, **_align(output_size, spatial_scale, sampling_ratio, aligned=aligned))


def roi_align_backward(
    grad_output: np.ndarray,  # (R, C, PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    wrt: tuple[str, ...],
    **_: Any,
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    options = _align(output_size, spatial_scale, sampling_ratio, aligned=aligned)
    return mean_backward(grad_output, input, rois, wrt=wrt, **options)


def ps_roi_align(
    input: np.ndarray,  # (N, C, H, W)
    rois: np.ndarray,  # (R, 5)
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """Returns (R, C/(PH*PW), PH, PW)."""
    options = _align(output_size, spatial_scale, sampling_ratio, aligned=True)
    return mean(input, rois, groups=output_size, out=out, **options)


def ps_roi_align_backward(
    grad_output: np.ndarray,  # (R, C/(PH*PW), PH, PW)
    input: np.ndarray,
    rois: np.ndarray,
    *,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    wrt: tuple[str, ...],
    **_: Any,
) -> dict[str, np.ndarray]:
    """Returns argument name -> gradient."""
    options = _align(output_size, spatial_scale, sampling_ratio, aligned=True)
    return mean_backward(grad_output, input, rois, groups=output_size, wrt=wrt, **options)


def _align(output_size: tuple[int, int], spatial_scale: float, sampling_ratio: int, *, aligned: bool) -> dict[str, Any]:
    rule = rules.ALIGN if aligned else rules.ALIGN_LEGACY
    return {"rule": rule, "ratio": sampling_ratio, "output_size": output_size, "spatial_scale": spatial_scale}
