"""`replace_layers` on layers that pass for those of torchvision, detectron2, mmcv and the stand-alone DCNv2.

Each stands for its library's class: same name, module, attributes, submodules, arguments, and the same arithmetic with
this library's functions. tests/test_torchvision.py replaces torchvision's own.
"""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import dcn_kernels

torch = pytest.importorskip("torch", reason="torch is not installed")

import dcn_kernels.torch as layers  # noqa: E402
from dcn_kernels.torch import deform_conv2d, deform_roi_pool, replacements, roi_align  # noqa: E402
from dcn_kernels.torch.replacements import RULES  # noqa: E402

nn = torch.nn
GROUPS = 2
SIZE = {"kernel_size": (3, 3), "in_channels": 4, "out_channels": 6, "groups": 2}


def of(module: str, name: str = "") -> Callable[[type], type]:
    """The class passes for one of that module."""

    def renamed(kind: type) -> type:
        kind.__module__ = module
        kind.__name__ = kind.__qualname__ = name or kind.__name__
        return kind

    return renamed


class Conv(nn.Module):
    """What all convolutions have."""

    def __init__(self, bias: bool = False, groups: str = "deform_groups", **more: Any) -> None:
        super().__init__()
        for key, value in {**SIZE, "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), groups: GROUPS}.items():
            setattr(self, key, value)
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))
        if bias:
            self.bias = nn.Parameter(torch.randn(6))
        for key, value in more.items():
            setattr(self, key, value)

    def conv(self, x: Any, offset: Any, mask: Any = None) -> Any:
        bias = self.bias if "bias" in self._parameters else None
        return deform_conv2d(x, offset, self.weight, bias, self.stride, self.padding, self.dilation, mask)

    def offsets(self, name: str, factor: int) -> None:
        conv = nn.Conv2d(4, factor * GROUPS * 9, 3, self.stride, self.padding, self.dilation)
        nn.init.normal_(conv.weight, 0, 0.1)
        setattr(self, name, conv)


@of("torchvision.ops.deform_conv", "DeformConv2d")
class TorchvisionDeformConv2d(Conv):
    def forward(self, input: Any, offset: Any, mask: Any = None) -> Any:
        return self.conv(input, offset, mask)


@of("mmcv.ops.deform_conv", "DeformConv2d")
class MmcvDeformConv2d(Conv):
    def forward(self, x: Any, offset: Any) -> Any:
        return self.conv(x, offset)


@of("mmcv.ops.deform_conv", "DeformConv2dPack")
class MmcvDeformConv2dPack(Conv):
    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.offsets("conv_offset", 2)

    def forward(self, x: Any) -> Any:
        return self.conv(x, self.conv_offset(x))


@of("mmcv.ops.modulated_deform_conv")
class ModulatedDeformConv2d(Conv):
    def forward(self, x: Any, offset: Any, mask: Any) -> Any:
        return self.conv(x, offset, mask)


@of("mmcv.ops.modulated_deform_conv")
class ModulatedDeformConv2dPack(Conv):
    child = "conv_offset"

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.offsets(self.child, 3)

    def forward(self, x: Any) -> Any:
        first, second, mask = torch.chunk(getattr(self, self.child)(x), 3, dim=1)
        return self.conv(x, torch.cat((first, second), dim=1), torch.sigmoid(mask))


@of("basicsr.ops.dcn.deform_conv")
class ModulatedDeformConvPack(ModulatedDeformConv2dPack):
    pass


@of("basicsr.ops.dcn.deform_conv")
class DeformConvPack(MmcvDeformConv2dPack):
    pass


@of("detectron2.layers.deform_conv", "DeformConv")
class Detectron2DeformConv(Conv):
    def forward(self, x: Any, offset: Any) -> Any:
        x = self.norm(self.conv(x, offset)) if self.norm is not None else self.conv(x, offset)
        return x if self.activation is None else self.activation(x)


@of("detectron2.layers.deform_conv", "ModulatedDeformConv")
class Detectron2ModulatedDeformConv(Conv):
    def forward(self, x: Any, offset: Any, mask: Any) -> Any:
        x = self.conv(x, offset, mask)
        x = self.norm(x) if self.norm is not None else x
        return x if self.activation is None else self.activation(x)


@of("DCNv2.dcn_v2")
class DCNv2(Conv):
    def forward(self, input: Any, offset: Any, mask: Any) -> Any:
        return self.conv(input, offset, mask)


@of("dcn_v2")
class DCN(ModulatedDeformConv2dPack):
    child = "conv_offset_mask"


class Roi(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        for key, value in {"output_size": (2, 3), "spatial_scale": 0.5, **options}.items():
            setattr(self, key, value)


@of("detectron2.layers.roi_align")
class ROIAlign(Roi):
    def forward(self, input: Any, rois: Any) -> Any:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


@of("mmcv.ops.roi_align")
class RoIAlign(ROIAlign):
    pass


@of("mmcv.ops.roi_pool")
class RoIPool(Roi):
    def forward(self, input: Any, rois: Any) -> Any:
        raise AssertionError


@of("mmcv.ops.deform_roi_pool")
class DeformRoIPool(Roi):
    def pool(self, input: Any, rois: Any, offset: Any = None) -> Any:
        options = {"sampling_ratio": self.sampling_ratio, "gamma": self.gamma, "convention": "mmcv"}
        return deform_roi_pool(
            input, rois, offset, output_size=self.output_size, spatial_scale=self.spatial_scale, **options
        )

    def forward(self, input: Any, rois: Any, offset: Any = None) -> Any:
        return self.pool(input, rois, offset)


@of("mmcv.ops.deform_roi_pool")
class DeformRoIPoolPack(DeformRoIPool):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.offset_fc = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 12))

    def forward(self, input: Any, rois: Any) -> Any:
        return self.pool(input, rois, self.offset_fc(self.pool(input, rois).flatten(1)).view(-1, 2, 2, 3))


@of("mmcv.ops.deform_roi_pool")
class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mask_fc = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 6), nn.Sigmoid())

    def forward(self, input: Any, rois: Any) -> Any:
        mask = self.mask_fc(self.pool(input, rois).flatten(1)).view(-1, 1, 2, 3)
        return super().forward(input, rois) * mask


@of("torchvision.ops.poolers")
class MultiScaleRoIAlign(nn.Module):
    """One region after the other."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.featmap_names, self.output_size, self.sampling_ratio = names, (2, 3), 2
        self.scales, self.canonical_scale, self.canonical_level = None, 32, 3

    def forward(self, x: Any, boxes: Any, image_shapes: Any) -> Any:
        maps = [x[name] for name in self.featmap_names]
        height = max(h for h, _ in image_shapes)
        steps = [round(float(np.log2(height / each.shape[2]))) for each in maps]
        parts = []
        for image, rows in enumerate(boxes):
            for x1, y1, x2, y2 in rows.tolist():
                size = np.sqrt((x2 - x1) * (y2 - y1))
                level = int(np.floor(self.canonical_level + np.log2(size / self.canonical_scale) + 1e-6))
                i = min(max(level, steps[0]), steps[-1]) - steps[0]
                row = torch.tensor([[image, x1, y1, x2, y2]])
                parts.append(roi_align(maps[i], row, self.output_size, 0.5 ** steps[i], self.sampling_ratio))
        return torch.cat(parts)


def offset() -> Any:
    return torch.randn(2, 2 * GROUPS * 9, 4, 8)


def mask() -> Any:
    return torch.rand(2, GROUPS * 9, 4, 8)


ROIS = torch.tensor([[0, 1, 2, 9, 11], [1, 0, 0, 15, 6]], dtype=torch.float32)
ALIGN = {"sampling_ratio": 2, "aligned": True}
DEFORM = {"sampling_ratio": 2, "gamma": 0.3}
OLD = {"groups": "deformable_groups"}
NORMS = {**OLD, "norm": None, "activation": None}


def known() -> list[tuple[Callable[[], Any], Callable[[], tuple[Any, ...]]]]:
    """Each layer, and what it is called with after the feature map."""
    return [
        (lambda: TorchvisionDeformConv2d(bias=True), lambda: (offset(), mask())),
        (TorchvisionDeformConv2d, lambda: (offset(),)),
        (MmcvDeformConv2d, lambda: (offset(),)),
        (MmcvDeformConv2dPack, lambda: ()),
        (lambda: ModulatedDeformConv2d(bias=True), lambda: (offset(), mask())),
        (lambda: ModulatedDeformConv2dPack(bias=True), lambda: ()),
        (lambda: ModulatedDeformConvPack(**OLD), lambda: ()),
        (lambda: DeformConvPack(**OLD), lambda: ()),
        (lambda: Detectron2DeformConv(**{**NORMS, "norm": nn.BatchNorm2d(6)}), lambda: (offset(),)),
        (lambda: Detectron2DeformConv(**{**NORMS, "activation": torch.relu}), lambda: (offset(),)),
        (
            lambda: Detectron2ModulatedDeformConv(**{**NORMS, "norm": nn.BatchNorm2d(6), "activation": nn.Tanh()}),
            lambda: (offset(), mask()),
        ),
        (lambda: Detectron2ModulatedDeformConv(bias=True, **NORMS), lambda: (offset(), mask())),
        (lambda: DCNv2(bias=True, **OLD), lambda: (offset(), mask())),
        (lambda: DCN(bias=True, **OLD), lambda: ()),
        (lambda: ROIAlign(**ALIGN), lambda: (ROIS,)),
        (lambda: ROIAlign(sampling_ratio=0, aligned=False), lambda: (ROIS,)),
        (lambda: RoIAlign(pool_mode="avg", use_torchvision=False, **ALIGN), lambda: (ROIS,)),
        (lambda: DeformRoIPool(**DEFORM), lambda: (ROIS, torch.randn(2, 2, 2, 3))),
        (lambda: DeformRoIPool(**DEFORM), lambda: (ROIS,)),
        (lambda: DeformRoIPoolPack(**DEFORM), lambda: (ROIS,)),
        (lambda: ModulatedDeformRoIPoolPack(**DEFORM), lambda: (ROIS,)),
    ]


@pytest.mark.parametrize(("make", "more"), known())
def test_a_replaced_layer_gives_the_same_output_and_gradients_with_the_same_parameters(
    make: Callable[[], Any], more: Callable[[], tuple[Any, ...]]
) -> None:
    torch.manual_seed(0)
    layer, args = make(), (torch.rand(2, 4, 8, 8), *more())
    name, parameters = type(layer).__name__, dict(layer.named_parameters())
    state = list(layer.state_dict())
    results = []
    for each in (layer, None):
        each = each or layers.replace_layers(layer)
        image = args[0].clone().requires_grad_()
        output = each(image, *args[1:])
        wants = torch.autograd.grad((output**2).sum(), (image, *parameters.values()))
        results.append((output, *wants))
    assert type(each).__module__.startswith("dcn_kernels.torch") and name in RULES
    assert list(each.state_dict()) == state and str(each)
    assert all(dict(each.named_parameters())[key] is value for key, value in parameters.items())
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(each)(*args), results[1][0], rtol=0, atol=0)
    torch.testing.assert_close(torch.fx.symbolic_trace(each)(*args), results[1][0], rtol=0, atol=0)


@pytest.mark.parametrize("names", [["0", "1", "2"], ["1"]])
def test_multi_scale_roi_align_pools_each_region_on_its_level(names: list[str]) -> None:
    torch.manual_seed(0)
    theirs = MultiScaleRoIAlign(names)
    maps = {str(i): torch.rand(2, 3, 64 >> i, 96 >> i) for i in range(3)}
    maps["pool"] = torch.rand(2, 3, 1, 1)
    corners = torch.rand(40, 2) * 40
    boxes = torch.cat((corners, corners + torch.rand(40, 2) * 80 + 0.1), dim=1)
    args = (maps, [boxes[:15], boxes[15:]], [(120, 192), (128, 150)])
    want = theirs(*args)
    ours = layers.replace_layers(theirs)
    assert type(ours) is replacements.MultiScaleRoIAlign and "featmap_names" in str(ours)
    torch.testing.assert_close(ours(*args), want, rtol=1e-6, atol=1e-6)
    assert ours.scales == ([0.5, 0.25, 0.125] if len(names) == 3 else [0.25])
    torch.testing.assert_close(ours(maps, args[1], [(1000, 1000)] * 2), want)  # scales are those of the first call
    traced = torch.fx.symbolic_trace(layers.replace_layers(MultiScaleRoIAlign(names)))
    torch.testing.assert_close(traced(*args), want, rtol=1e-6, atol=1e-6)
    empty = ours(maps, [torch.zeros(0, 4)] * 2, args[2])
    assert empty.shape == (0, 3, 2, 3)


def test_half_precision_regions_have_the_level_of_their_size() -> None:
    """Their area does not fit into float16: every region wider than 256 would be taken for the largest."""
    pool = layers.replace_layers(MultiScaleRoIAlign([str(i) for i in range(3)]))
    pool.canonical_scale, pool.canonical_level = 224, 4
    maps = {str(i): torch.full((1, 1, 256 >> i, 256 >> i), float(i), dtype=torch.float16) for i in range(3)}
    boxes = torch.tensor([[0, 0, 100, 100], [0, 0, 300, 300], [0, 0, 600, 600]], dtype=torch.float16)
    assert pool(maps, [boxes], [(1024, 1024)]).amax(dim=(1, 2, 3)).tolist() == [0, 2, 2]
    boxes = torch.tensor([[0, 0, 440, 440], [0, 0, 260, 260], [0, 0, 450, 450]], dtype=torch.float16)
    maps["3"] = torch.full((1, 1, 32, 32), 3.0, dtype=torch.float16)
    pool.featmap_names, pool.scales = ["0", "1", "2", "3"], None
    assert pool(maps, [boxes], [(1024, 1024)]).amax(dim=(1, 2, 3)).tolist() == [2, 2, 3]


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = TorchvisionDeformConv2d(bias=True)
        self.b = nn.ModuleList([self.a, nn.ReLU(), MmcvDeformConv2dPack()])


def test_hooks_stay_a_shared_layer_stays_one_and_what_was_replaced_is_logged(caplog: Any) -> None:
    model, called = Holder(), []
    model.a.register_forward_hook(lambda *args: called.append("a"))
    model.b[2].conv_offset.register_forward_hook(lambda *args: called.append("offset"))
    state = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, logger="dcn_kernels.torch"):
        assert layers.replace_layers(model) is model
    assert model.a is model.b[0] and type(model.a) is layers.DeformConv2d
    assert type(model.b[2]) is layers.DeformConv2dPack and model.b[2].offset_groups == GROUPS
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    image = torch.rand(2, 4, 8, 8)
    model.a(image, offset())
    model.b[2](image)
    assert called == ["a", "offset"]
    assert [record.getMessage() for record in caplog.records] == [
        "a: torchvision.ops.deform_conv.DeformConv2d -> dcn_kernels.torch.layers.DeformConv2d",
        "b.2: mmcv.ops.deform_conv.DeformConv2dPack -> dcn_kernels.torch.layers.DeformConv2dPack",
        "2 layers replaced",
    ]
    with pytest.warns(UserWarning, match="nothing was replaced in Holder"):  # all layers are ours now
        layers.replace_layers(model)


def test_a_model_with_nothing_to_replace_is_returned_with_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="nothing was replaced in Sequential: it has no layer of torchvision, detect"):
        assert layers.replace_layers(model) is model


@of("ultralytics.nn.modules.conv", "DCNv2")
class WithNormInside(ModulatedDeformConv2dPack):
    child = "conv_offset_mask"

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.bn = nn.BatchNorm2d(6)


@of("somebodys.layers", "DeformConv2d")
class OtherDeformConv2d(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 6, 3)
        self.p_conv = nn.Conv2d(4, 18, 3)

    def forward(self, x: Any, offset: Any) -> Any:
        raise AssertionError


@of("somebodys.layers", "DCNv2")
class LinearDCNv2(nn.Linear):
    def forward(self, x: Any, offset: Any, mask: Any) -> Any:
        raise AssertionError


@of("somebodys.layers", "DeformConv2d")
class BoundedDeformConv2d(TorchvisionDeformConv2d):
    def forward(self, input: Any, offset: Any, mask: Any = None) -> Any:
        raise AssertionError


@of("somebodys.layers", "DCNv2")
class ScaledDCNv2(Conv):
    def __init__(self) -> None:
        super().__init__(bias=True)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, input: Any, offset: Any, mask: Any) -> Any:
        raise AssertionError


def patched() -> Any:
    layer = MmcvDeformConv2d()
    layer.forward = layer.forward
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: RoIPool(), r"mmcv.ops.roi_pool.RoIPool\): expected that of torchvision"),
        (lambda: RoIAlign(pool_mode="max", **ALIGN), "it takes the maximum of samples"),
        (lambda: RoIAlign(), "it has no sampling_ratio, aligned"),
        (WithNormInside, r"DCNv2\): expected a forward of \(x, offset, mask\), got \(x\)"),
        (OtherDeformConv2d, r"expected the submodules \[\], got \['p_conv'\]"),
        (lambda: LinearDCNv2(3, 4), "it has no stride, padding, dilation"),
        (patched, "its forward was replaced by another"),
        (BoundedDeformConv2d, "it is a subclass of a layer of that name"),
        (ScaledDCNv2, "it has parameters or buffers of its own: gain, seen"),
    ],
)
def test_another_layer_of_a_known_name_stays_and_the_warning_says_why(make: Callable[[], Any], reason: str) -> None:
    model = nn.Sequential(make())
    before = model[0]
    with pytest.warns(UserWarning) as seen:
        layers.replace_layers(model)
    first, second = (str(each.message) for each in seen)
    assert first.startswith("replace_layers: not replaced: 0 (") and "nothing was replaced in Sequential" in second
    assert re.search(reason, first), first
    assert model[0] is before


def test_a_subclass_stays() -> None:
    class Alignment(ModulatedDeformConv2d):
        """Computes its offsets in a forward of its own, as BasicVSR++'s."""

    model = nn.Sequential(Alignment())
    with pytest.warns(UserWarning, match="nothing was replaced"):
        assert type(layers.replace_layers(model)[0]) is Alignment


# ---------------------------------------------------------------- docs/how-to/migrate.md


def test_the_layers_that_readmes_table_names_load_the_others_state_dict_and_give_the_same() -> None:
    torch.manual_seed(0)
    image, sizes = torch.rand(2, 4, 8, 8), (4, 6, 3, (2, 1), (1, 2), (1, 2), 2)
    for theirs, ours, args in (
        (MmcvDeformConv2d(), layers.DeformConv2d(*sizes, bias=False), (offset(),)),
        (ModulatedDeformConv2d(bias=True), layers.DeformConv2d(*sizes), (offset(), mask())),
        (MmcvDeformConv2dPack(), layers.DeformConv2dPack(*sizes, bias=False, offset_groups=GROUPS), ()),
        (
            ModulatedDeformConv2dPack(bias=True),
            layers.ModulatedDeformConv2dPack(*sizes, offset_groups=GROUPS),
            (),
        ),
        (Detectron2DeformConv(**NORMS), layers.DeformConv2d(*sizes, bias=False), (offset(),)),
        (Detectron2ModulatedDeformConv(bias=True, **NORMS), layers.DeformConv2d(*sizes), (offset(), mask())),
        (DCNv2(bias=True, **OLD), layers.DeformConv2d(*sizes), (offset(), mask())),
        (DCN(bias=True, **OLD), layers.ModulatedDeformConv2dPack(*sizes, offset_groups=GROUPS), ()),
    ):
        state = {key.replace("conv_offset_mask", "conv_offset"): value for key, value in theirs.state_dict().items()}
        ours.load_state_dict(state, strict=True)
        torch.testing.assert_close(ours(image, *args), theirs(image, *args), rtol=1e-6, atol=1e-6)
    aligned = layers.RoIAlign((2, 3), 0.5, 2, aligned=True)
    torch.testing.assert_close(aligned(image, ROIS), ROIAlign(**ALIGN)(image, ROIS))


def table_calls() -> list[str]:
    """The calls in the middle column of the migration table."""
    text = (ROOT / "docs" / "how-to" / "migrate.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert all(len(row) == 3 for row in rows)
    calls = [call for row in rows[1:] for call in re.findall(r"`([^`]+\))`", row[1])]
    assert len(calls) > 15
    return calls


@pytest.mark.parametrize("text", table_calls())
def test_the_calls_of_the_migration_table_name_arguments_that_there_are(text: str) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    kind = getattr(layers, call.func.id, None) or getattr(dcn_kernels, call.func.id)
    names = [keyword.arg for keyword in call.keywords]
    while inspect.isclass(kind) and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind).parameters.values()):
        own = inspect.signature(kind).parameters
        names = [name for name in names if name not in own]  # the base class takes the others
        kind = kind.__mro__[1]
    signature = inspect.signature(kind)
    values = [arg for arg in call.args if not (isinstance(arg, ast.Constant) and arg.value is ...)]
    signature.bind_partial(*values, **dict.fromkeys(names))
    for value, name in zip(values, signature.parameters, strict=False):
        if isinstance(value, ast.Name) and value.id in signature.parameters:
            assert value.id == name, f"{value.id} stands where {name} does"


def test_every_rule_is_tried_here_or_with_torchvision() -> None:
    tried = {type(make()).__name__ for make, _ in known()} | {"MultiScaleRoIAlign"}
    assert set(RULES) - tried == {"RoIPool", "PSRoIPool", "PSRoIAlign"}  # tests/test_torchvision.py
