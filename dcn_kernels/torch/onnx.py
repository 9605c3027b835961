"""What `torch.onnx.export` writes for the operators that ONNX has too.

ONNX knows three of them, with its own names and one convention each: DeformConv, RoiAlign and MaxRoiPool. While a
model is exported, a call is written down as that operator instead of one that only PyTorch knows, so the model runs
wherever ONNX does, without this package. Any other call stays an operator of `torch.ops.dcn_kernels`, and the exporter
refuses it by that name unless it is told how to translate it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dcn_kernels.dispatch.row import Params

NAMESPACE = "dcn_kernels"
Shape = Sequence[Any]


def _symbolic(name: str, inputs: Sequence[Tensor | None], attrs: dict[str, Any], shape: Shape, version: int) -> Tensor:
    from torch.onnx import ops

    dtype = inputs[0].dtype  # type: ignore[union-attr]
    return ops.symbolic(name, inputs, attrs, dtype=dtype, shape=shape, version=version)


def _like(first: Tensor, tensor: Tensor | None) -> Tensor | None:
    """ONNX has one dtype for all arrays of an operator; coordinates beside half maps may be float32 here."""
    return None if tensor is None else tensor.to(first.dtype)


def _deform_conv(arrays: dict[str, Any], params: Params, shape: Shape) -> Tensor:
    input, offset, weight, bias, mask = (arrays[name] for name in ("input", "offset", "weight", "bias", "mask"))
    kernel = [int(length) for length in weight.shape[2:]]
    taps = kernel[0] * kernel[1]
    padding = list(params["padding"])
    attrs = {
        "kernel_shape": kernel,
        "strides": list(params["stride"]),
        "pads": padding * 2,
        "dilations": list(params["dilation"]),
        "group": int(input.shape[1]) // int(weight.shape[1]),
        "offset_group": int(offset.shape[1]) // (2 * taps),
    }
    others = [_like(input, tensor) for tensor in (weight, offset, bias, mask)]
    while others[-1] is None:
        others.pop()
    return _symbolic("DeformConv", [input, *others], attrs, shape, 19)


def _roi_align(arrays: dict[str, Any], params: Params, shape: Shape) -> Tensor:
    input, rois = arrays["input"], arrays["rois"]
    height, width = params["output_size"]
    attrs = {
        "mode": "avg",
        "output_height": height,
        "output_width": width,
        "sampling_ratio": max(params["sampling_ratio"], 0),
        "spatial_scale": float(params["spatial_scale"]),
        "coordinate_transformation_mode": "half_pixel" if params["aligned"] else "output_half_pixel",
    }
    boxes, images = _like(input, rois[:, 1:]), rois[:, 0].to(torch.int64)
    return _symbolic("RoiAlign", [input, boxes, images], attrs, shape, 16)


def _roi_pool(arrays: dict[str, Any], params: Params, shape: Shape) -> Tensor:
    input = arrays["input"]
    attrs = {"pooled_shape": list(params["output_size"]), "spatial_scale": float(params["spatial_scale"])}
    return _symbolic("MaxRoiPool", [input, _like(input, arrays["rois"])], attrs, shape, 1)


WRITERS: dict[str, Callable[[dict[str, Any], Params, Shape], Tensor]] = {
    "deform_conv2d": _deform_conv,
    "roi_align": _roi_align,
    "roi_pool": _roi_pool,
}
# Where ONNX's operator has one way only.
ONLY = {"deform_conv2d": {"border": "zeros"}, "roi_pool": {"mode": "max"}}


def exporting() -> bool:
    """A model is being exported to ONNX by the exporter that goes through `torch.export`.

    Raises
    ------
    NotImplementedError
        It is the older exporter, which follows TorchScript.
    """
    if torch.compiler.is_exporting():
        return torch.onnx.is_in_onnx_export()
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError("dcn_kernels.torch: expected torch.onnx.export(..., dynamo=True), got dynamo=False")
    return False


def writes(op: str, params: Params) -> bool:
    """Whether ONNX has that operator; if not, a warning says why, as the exporter will only say that it has none."""
    reason = "ONNX has no such operator" if op not in WRITERS else ""
    for name, value in ONLY.get(op, {}).items():
        if params[name] != value:
            reason = f"{name}: ONNX's operator has only {value!r}, got {params[name]!r}"
    if reason:
        text = f"{op}: {reason}: torch.ops.{NAMESPACE}.{op} needs a row in torch.onnx.export's custom_translation_table"
        warnings.warn(text, stacklevel=2)
    return not reason


def write(op: str, arrays: dict[str, Any], params: Params, shape: Shape) -> Tensor:
    """The call as a node of the ONNX graph that is being made, with a result of that shape."""
    return WRITERS[op](arrays, params, shape)
