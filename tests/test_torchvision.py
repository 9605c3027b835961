"""torchvision's own layers and detectors, replaced and not: same outputs, losses and gradients.

torchvision needs the build of torch that it was made for, several gigabytes: `make test-torchvision` installs both into
an environment of their own and runs this file there.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
try:
    import torchvision
except (ImportError, RuntimeError) as error:  # RuntimeError: beside a torch of another build
    pytest.skip(
        f"torchvision cannot be imported: {str(error).splitlines()[0]}: run `make test-torchvision`",
        allow_module_level=True,
    )

import dcn_kernels.torch as layers  # noqa: E402

ops, detection = torchvision.ops, torchvision.models.detection


def test_replaced_layers_give_what_torchvisions_give() -> None:
    rois = torch.tensor([[0, 1, 2, 9, 11], [1, 0, 0, 15, 6]], dtype=torch.float32)
    inputs = {"RoIPool": 3, "RoIAlign": 3, "PSRoIPool": 12, "PSRoIAlign": 12}
    for name, channels in inputs.items():
        args = (2, 0.5, 2) if "Align" in name else (2, 0.5)
        theirs, image = getattr(ops, name)(*args), torch.rand(2, channels, 8, 8)
        want = theirs(image, rois)
        replaced = layers.replace_layers(theirs)
        assert type(replaced) is getattr(layers, name)
        torch.testing.assert_close(replaced(image, rois), want)
    theirs = ops.DeformConv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2), groups=2)
    args = torch.rand(2, 4, 7, 8), torch.randn(2, 24, 7, 3), torch.rand(2, 12, 7, 3)
    want = theirs(*args)
    torch.testing.assert_close(layers.replace_layers(theirs)(*args), want, rtol=1e-5, atol=1e-5)


def targets(name: str) -> list[dict[str, Any]]:
    """Two boxes in the first image, one in the second, with masks and keypoints where the model wants them."""
    labels = 1 if name.startswith("keypoint") else 3
    found = []
    for boxes in ([[4.0, 6, 50, 60], [30, 10, 90, 62]], [[10.0, 5, 44, 49]]):
        rows = torch.tensor(boxes, dtype=torch.float64)
        target = {"boxes": rows, "labels": torch.full((len(rows),), labels)}
        if name.startswith("mask"):
            target["masks"] = torch.zeros(len(rows), 64, 96, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(target["masks"], rows.int().tolist(), strict=True):
                mask[y1 : y2 - 5, x1 + 3 : x2] = 1
        if name.startswith("keypoint"):
            spread = torch.rand(len(rows), 17, 2)
            points = rows[:, None, :2] + spread * (rows[:, None, 2:] - rows[:, None, :2])
            target["keypoints"] = torch.cat((points, torch.ones(len(rows), 17, 1)), dim=2).float()
        found.append(target)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_a_detector_gives_the_same_detections_losses_and_gradients(name: str, caplog: Any) -> None:
    """In float64, so that no score of the random weights changes places with its neighbour by a rounding."""
    torch.manual_seed(0)
    # few regions, as every one passes the heads in float64; every score is near 1 / classes with random weights
    regions = {"rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 40, "box_batch_size_per_image": 8}
    small = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "box_detections_per_img": 5, **regions}
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, **small).double()
    images, wanted = [torch.rand(3, 64, 96).double(), torch.rand(3, 64, 80).double()], targets(name)
    ours = copy.deepcopy(theirs)
    with caplog.at_level(logging.INFO, logger="dcn_kernels.torch"):
        assert layers.replace_layers(ours) is ours
    pools = [record.getMessage() for record in caplog.records if "MultiScaleRoIAlign" in record.getMessage()]
    assert len(pools) == (2 if name.startswith(("mask", "keypoint")) else 1)
    losses, gradients, detections = [], [], []
    for model in (theirs, ours):
        model.train()
        torch.manual_seed(1)  # torchvision draws the regions that it learns from
        losses.append(model(images, wanted))
        sum(losses[-1].values()).backward()
        gradients.append({key: value.grad for key, value in model.named_parameters()})
        model.eval()
        with torch.no_grad():
            detections.append(model(images))
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) >= 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-12)
    assert sum(grad.abs().max() > 0 for grad in gradients[0].values()) > 50
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)
    assert all(len(found["boxes"]) == 5 for found in detections[0])
    torch.testing.assert_close(detections[1], detections[0], rtol=1e-6, atol=1e-9)


def test_create_feature_extractor_takes_a_model_with_layers_of_here() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = layers.ModulatedDeformConv2dPack(3, 4, 3, padding=1)
            self.second = layers.ConvOffset2D(4)
            self.pool = layers.RoIAlign(2, 1.0, 2)

        def forward(self, image: Any, rois: Any) -> Any:
            features = self.second(self.first(image).relu())
            return self.pool(features, rois) + layers.roi_align(features, boxes=rois, output_size=2)

    model, image, rois = Model(), torch.rand(1, 3, 6, 7), torch.tensor([[0.0, 0, 1, 5, 4]])
    assert {"first.deform_conv2d", "pool.roi_align"} <= set(get_graph_node_names(model)[0])
    extractor = create_feature_extractor(model, {"relu": "features", "add": "out"})
    got = extractor(image, rois)
    torch.testing.assert_close(got["features"], model.first(image).relu(), rtol=0, atol=0)
    torch.testing.assert_close(got["out"], model(image, rois), rtol=0, atol=0)
    got["out"].sum().backward()
    assert extractor.first.weight.grad.abs().max() > 0
    # a network of torchvision's whose convolution was changed for one of ours
    network = torchvision.models.resnet18(weights=None).eval()
    network.layer4[1].conv2 = layers.DeformConv2dPack(512, 512, 3, padding=1, bias=False)
    image = torch.rand(1, 3, 64, 64)
    got = create_feature_extractor(network, {"layer4.1.conv2": "deformed", "fc": "logits"})(image)
    assert got["deformed"].shape == (1, 512, 2, 2)
    torch.testing.assert_close(got["logits"], network(image))
