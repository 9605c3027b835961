"""dcn-bench cost and sampling: the layers of Table 4 counted by hand, and the two commands."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from dcn_kernels.cli.bench import main

from dcn_kernels.network_cost import Layer, Network, measure, networks, resnet101

# ---------------------------------------------------------------- parameters and arithmetic


def test_resnet101_has_its_known_parameters_and_arithmetic() -> None:
    """torchvision's resnet101 has 44,549,160 parameters, 2,049,000 of them in the classifier."""
    assert sum(layer.parameters for layer in resnet101(600, 1000)) == 44_549_160 - 2_049_000
    # 7.8e9 multiplications at 224x224 with conv5 at stride 32; here it is at stride 16, four times as many
    conv5 = sum(layer.gflop() for layer in resnet101(224, 224) if "res5" in layer.name)
    rest = sum(layer.gflop() for layer in resnet101(224, 224)) - conv5
    assert rest / 2 + conv5 / 2 / 4 == pytest.approx(7.8, abs=0.3)


def test_offset_parameters_by_hand() -> None:
    """3x3 layers from 512 to 18 channels with a bias; R-FCN's 1x1 layers; Faster R-CNN's fully connected one."""
    convolutions = 3 * (512 * 9 * 18 + 18)
    known = networks()
    assert known["DeepLab"].parameters("offsets") == convolutions == 248_886
    maps = 1024 * (2 * 49 * 21) + 2 * 49 * 21 + 1024 * (2 * 49) + 2 * 49
    assert known["R-FCN"].parameters("offsets") == convolutions + maps
    assert known["Faster R-CNN"].parameters("offsets") == convolutions + 256 * 49 * 98 + 98
    assert networks(4)["DeepLab"].parameters("offsets") == 4 * convolutions


def test_deforming_adds_only_offset_parameters() -> None:
    for network in networks().values():
        plain, deformable = network.totals()
        assert deformable - plain == network.parameters("offsets")


def test_r_fcn_adds_what_the_paper_says() -> None:
    """47.1 to 49.5 M, each rounded: 2.3 to 2.5 M. With the four offset groups of the released code it would not."""
    assert networks()["R-FCN"].beyond_rounding() == 0
    assert networks(4)["R-FCN"].beyond_rounding() > 0.5


@pytest.mark.parametrize(("added", "beyond"), [(0.05e6, 0.0), (0.3e6, 0.1), (0.0, 0.0), (2.35e6, 2.15)])
def test_beyond_rounding_by_hand(added: float, beyond: float) -> None:
    layer = Layer("", "offsets", int(added))
    network = Network("", (1, 1), (layer,), (10.0, 10.1), (1, 1))
    assert network.beyond_rounding() == pytest.approx(beyond, abs=1e-9)
    network = Network("", (1, 1), (layer,), (10.0, 13.0), (1, 1))
    assert network.beyond_rounding() == pytest.approx(added / 1e6 - 2.9)


def test_totals_stay_below_the_paper_s_by_what_is_told() -> None:
    """The remark printed with the table names this range."""
    for network in networks().values():
        for ours, theirs in zip(network.totals(), network.paper_parameters, strict=True):
            assert 0.95 < theirs - ours / 1e6 < 1.45


def test_arithmetic_of_a_product_and_of_a_deformable_layer_by_hand() -> None:
    assert Layer("", "shared", count=3, product=(2, 5, 7)).gflop() == pytest.approx(2e-9 * 3 * 2 * 5 * 7)
    by_name = {(layer.name, layer.part): layer for layer in networks()["R-FCN"].layers}
    plain, moved = (by_name["res5a 3x3", part].gflop() for part in ("plain", "deformable"))
    assert plain == pytest.approx(2e-9 * 512 * 512 * 9 * 38 * 63)
    assert moved - plain == pytest.approx(8e-9 * 512 * 9 * 38 * 63)  # eight operations a sample and channel


def test_measure_times_products_and_operators() -> None:
    from dcn_kernels import layers

    call = layers.layer("deform_conv2d", N=1, C=8, H=10, W=12, O=8, kernel=3, padding=2, dilation=2)
    product = Layer("b", "shared", count=1, product=(8, 16, 32))
    thrice = Layer("c", "shared", count=3, product=(8, 16, 32))
    moved, one, three = measure([Layer("a", "deformable", call=call), product, thrice], budget=0.01)
    assert moved.how == "deform_conv2d" and moved.milliseconds > 0 and moved.temporary_bytes > 0
    assert moved.offset_bytes == 18 * 10 * 12 * 4
    assert three.milliseconds == pytest.approx(3 * one.milliseconds) and one.milliseconds > 0


# ---------------------------------------------------------------- dcn-bench cost


def test_cost_prints_each_layer_s_share_and_what_cannot_be_compared() -> None:
    result = CliRunner().invoke(main, ["cost", "--no-time"])
    assert result.exit_code == 0, result.output
    for text in ("85.8 %", "83.2 %", "33.3 %", "2,109,450", "49.5", "59.9", "The paper's seconds are of its own GPU"):
        assert text in result.stdout
    assert "matrix product" not in result.stdout.partition("- The paper's")[0]


def test_cost_json_adds_up() -> None:
    result = CliRunner().invoke(main, ["cost", "--no-time", "--json", "--network", "r-fcn"])
    found = json.loads(result.stdout)["networks"]["R-FCN"]
    offsets = [row for row in found["layers"] if row["part"] == "offsets"]
    assert sum(row["share_of_added"] for row in offsets) == pytest.approx(1)
    added = found["deformable"]["parameters"] - found["plain"]["parameters"]
    assert sum(row["parameters"] for row in offsets) == added == 2_458_786
