"""The ONNX package's own tests of DeformConv and RoiAlign, with these kernels as the backend."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

from dcn_kernels import deform_conv2d, roi_align

pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import helper, numpy_helper
from onnx.backend.test.case import node as onnx_node

# `collect_testcases` computes the cases of all operators, for 20 seconds; importing an operator's module adds its own.
for module in ("deformconv", "roialign"):
    import_module(f"onnx.backend.test.case.node.{module}")
CASES = [case for case in onnx_node._NodeTestCases if case.model.graph.node[0].op_type in ("DeformConv", "RoiAlign")]


# RoiAlign's expected values are written with four digits after the point.
TABLE = {"DeformConv": 0.0, "RoiAlign": 1e-4}


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes by name."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def deform_conv(options: dict[str, Any], named: dict[str, Any]) -> np.ndarray:
    pads = options.get("pads", [0, 0, 0, 0])
    assert pads[:2] == pads[2:]
    return deform_conv2d(
        named["X"], named["offset"], named["W"], named.get("B"),
        tuple(options.get("strides", (1, 1))), tuple(pads[:2]), tuple(options.get("dilations", (1, 1))),
        named.get("mask"),
    )  # fmt: skip


def align(options: dict[str, Any], named: dict[str, Any]) -> np.ndarray:
    rois = np.concatenate([named["batch_indices"][:, None].astype(np.float32), named["rois"]], axis=1)
    return roi_align(
        named["X"], rois, (options["output_height"], options["output_width"]), options["spatial_scale"],
        sampling_ratio=options.get("sampling_ratio", 0),
        aligned=options.get("coordinate_transformation_mode", "half_pixel") == "half_pixel",
    )  # fmt: skip


def test_there_are_cases() -> None:
    names = {case.name for case in CASES}
    assert {"test_basic_deform_conv_with_padding", "test_roialign_aligned_true"} <= names, names


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_onnx_node_test(case: Any) -> None:
    (node,) = case.model.graph.node
    options = attributes(node)
    if options.get("mode", "avg") != "avg":
        pytest.skip('RoiAlign of mode "max" takes the maximum of weighted corners, which no operator here does')
    run = {"DeformConv": deform_conv, "RoiAlign": align}[node.op_type]
    for inputs, outputs in case.data_sets:
        arrays = [a if isinstance(a, np.ndarray) else numpy_helper.to_array(a) for a in inputs]
        # by the place in the operator's signature: the names in a graph are the case's own
        names = {"DeformConv": ("X", "W", "offset", "B", "mask"), "RoiAlign": ("X", "rois", "batch_indices")}
        given = [name for name, there in zip(names[node.op_type], node.input, strict=False) if there]
        named = dict(zip(given, arrays, strict=True))
        (want,) = (a if isinstance(a, np.ndarray) else numpy_helper.to_array(a) for a in outputs)
        np.testing.assert_allclose(run(options, named), want, rtol=case.rtol, atol=max(case.atol, TABLE[node.op_type]))
