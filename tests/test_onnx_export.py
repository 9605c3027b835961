"""A model with these operators, exported by PyTorch to ONNX, gives the same numbers in ONNX Runtime."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import onnxruntime  # noqa: E402

import dcn_kernels.torch as dcn  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

GENERATOR = np.random.default_rng(3)
ROIS = torch.tensor([[0, 1.0, 2, 15, 20], [1, 3, 3, 8.5, 9], [0, -2, 0, 40, 8], [1, 5, 5, 5, 5]])


def normal(*shape: int) -> Any:
    return torch.from_numpy(GENERATOR.normal(size=shape).astype(np.float32))


class Call(torch.nn.Module):
    """One function with its options."""

    def __init__(self, function: Any, *args: Any, **options: Any) -> None:
        super().__init__()
        self.function, self.args, self.options = function, args, options

    def forward(self, *tensors: Any) -> Any:
        return self.function(*tensors, *self.args, **self.options)


class Conv(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
        return dcn.deform_conv2d(input, offset, weight, bias, mask=mask, **self.options)


def exported(model: Any, tensors: tuple[Any, ...], **options: Any) -> Any:
    return torch.onnx.export(model.eval(), tensors, dynamo=True, verbose=False, **options)


def nodes(program: Any) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in program.model_proto.graph.node]


def run(program: Any, *tensors: Any) -> list[np.ndarray]:
    file = BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    given = [tensor.numpy() for tensor in tensors if tensor is not None]
    return session.run(None, dict(zip((each.name for each in session.get_inputs()), given, strict=True)))


@pytest.mark.parametrize("absent", ["", "bias", "mask", "bias and mask"])
@pytest.mark.parametrize(
    "sizes",
    [
        (4, 6, (3, 2), 2, 2, {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)}),
        (3, 2, (1, 1), 1, 3, {}),
        (4, 4, (3, 3), 4, 1, {"padding": 1}),
    ],
    ids=["every option", "1x1", "depthwise"],
)
def test_deform_conv2d(sizes: tuple[Any, ...], absent: str) -> None:
    C, O, (KH, KW), groups, OG, options = sizes
    input, weight = normal(2, C, 9, 11), normal(O, C // groups, KH, KW)
    OH, OW = torch.nn.functional.conv2d(input, weight, None, **options, groups=groups).shape[2:]
    offset, mask = 2 * normal(2, 2 * OG * KH * KW, OH, OW), normal(2, OG * KH * KW, OH, OW)
    bias = None if "bias" in absent else normal(O)
    tensors = (input, offset, weight, bias, None if "mask" in absent else mask)
    program = exported(Conv(**options), tensors)
    assert nodes(program) == [("", "DeformConv")]
    np.testing.assert_allclose(run(program, *tensors)[0], Conv(**options)(*tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"sampling_ratio": 3}, {"aligned": True}, {"sampling_ratio": 2, "aligned": True}]
)
def test_roi_align(options: dict[str, Any]) -> None:
    model, tensors = Call(dcn.roi_align, (2, 3), 0.5, **options), (normal(2, 5, 12, 14), ROIS)
    program = exported(model, tensors)
    assert ("", "RoiAlign") in nodes(program) and not any(domain for domain, _ in nodes(program))
    np.testing.assert_allclose(run(program, *tensors)[0], model(*tensors), rtol=1e-5, atol=1e-5)


def test_roi_pool() -> None:
    model, tensors = Call(dcn.roi_pool, (2, 3), 0.5), (normal(2, 5, 12, 14), ROIS)
    program = exported(model, tensors)
    assert nodes(program) == [("", "MaxRoiPool")]
    np.testing.assert_array_equal(run(program, *tensors)[0], model(*tensors))


def test_a_model_with_sizes_left_open() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = dcn.ModulatedDeformConv2dPack(3, 8, 3, padding=1)
            torch.nn.init.normal_(self.conv.conv_offset.weight, std=0.3)
            self.align = dcn.RoIAlign(3, 0.5, 2)

        def forward(self, image: Any, rois: Any) -> Any:
            return self.align(self.conv(image).relu(), rois)

    dim, model = torch.export.Dim.AUTO, Head()
    program = exported(model, (normal(2, 3, 12, 14), ROIS), dynamic_shapes=({0: dim, 2: dim, 3: dim}, {0: dim}))
    for image, rois in ((normal(2, 3, 12, 14), ROIS), (normal(3, 3, 20, 9), ROIS[:2])):
        with torch.no_grad():
            expected = model(image, rois)
        np.testing.assert_allclose(run(program, image, rois)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Call(dcn.ps_roi_pool, 1, convention="rfcn"), "ps_roi_pool: ONNX has no such operator"),
        (Call(dcn.roi_pool, 2, mode="avg"), "roi_pool: mode: ONNX's operator has only 'max', got 'avg'"),
    ],
)
def test_what_onnx_lacks_is_refused_by_name(model: Any, why: str) -> None:
    name = why.split(":")[0]
    with pytest.warns(UserWarning, match=why), pytest.raises(Exception, match=f"No ONNX function found.*{name}"):
        exported(model, (normal(2, 4, 8, 8), ROIS))


def test_a_border_that_onnx_lacks_is_refused_by_name() -> None:
    tensors = (normal(1, 2, 5, 5), normal(1, 18, 3, 3), normal(2, 2, 3, 3), None, None)
    why = "deform_conv2d: border: ONNX's operator has only 'zeros', got 'msra'"
    with pytest.warns(UserWarning, match=why), pytest.raises(Exception, match=r"No ONNX function.*deform_conv2d"):
        exported(Conv(border="msra"), tensors)


def test_the_older_exporter_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="dynamo=True"):
        torch.onnx.export(Call(dcn.roi_pool, 2), (normal(1, 4, 8, 8), ROIS[:1]), BytesIO(), dynamo=False)
