"""dcn-bench cost: the layers of Table 4 counted by hand, and the command."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import pytest
from click.testing import CliRunner
from dcn_kernels.cli.bench import main

from dcn_kernels.bench import ceiling, layers, network_cost
from dcn_kernels.bench.network_cost import Measured, Network, NetworkLayer, measure, networks, resnet101

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
    layer = NetworkLayer("", "offsets", int(added))
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
    assert NetworkLayer("", "shared", count=3, product=(2, 5, 7)).gflop() == pytest.approx(2e-9 * 3 * 2 * 5 * 7)
    by_name = {(layer.name, layer.part): layer for layer in networks()["R-FCN"].layers}
    plain, moved = (by_name["res5a 3x3", part].gflop() for part in ("plain", "deformable"))
    assert plain == pytest.approx(2e-9 * 512 * 512 * 9 * 38 * 63)
    assert moved - plain == pytest.approx(8e-9 * 512 * 9 * 38 * 63)  # eight operations a sample and channel


@pytest.mark.parametrize(("name", "plain"), [
    # conv1 to conv5 of ResNet-101 without its classifier, the 1x1 layer behind it, the head; weights and biases
    ("DeepLab", 42_500_160 + 2048 * 1024 + 1024 + 1024 * 21 + 21),
    ("class-aware RPN", 42_500_160 + 2048 * 1024 + 1024 + 1024 * (9 * 21) + 9 * 21 + 1024 * (9 * 4) + 9 * 4),
    ("Faster R-CNN", 42_500_160 + 2048 * 256 + 256 + 256 * 49 * 1024 + 1024 + 1024 * 1024 + 1024
     + 1024 * 21 + 21 + 1024 * 84 + 84),
    ("R-FCN", 42_500_160 + 2048 * 1024 + 1024 + 1024 * (49 * 21) + 49 * 21 + 1024 * (49 * 8) + 49 * 8),
])  # fmt: skip
def test_plain_parameters_by_hand(name: str, plain: int) -> None:
    assert networks()[name].totals()[0] == plain


def test_the_class_aware_rpn_has_no_3x3_layer_before_its_scores() -> None:
    """As its remark says: with 512 channels of 3x3 on 1024 the plain network would be beyond the paper's 46.0 M."""
    network = networks()["class-aware RPN"]
    layer = 512 * 1024 * 9 + 512
    halved = 512 * 9 * (21 + 4)  # scores and boxes would then be on 512 channels, not 1024
    assert (network.totals()[0] + layer - halved) / 1e6 > network.paper_parameters[0] + 3
    assert "4.7 M" in network.remark and round(layer / 1e6, 1) == 4.7


def test_measure_times_products_and_operators() -> None:
    call = layers.layer("deform_conv2d", N=1, C=8, H=10, W=12, O=8, kernel=3, padding=2, dilation=2)
    product = NetworkLayer("b", "shared", count=1, product=(8, 16, 32))
    thrice = NetworkLayer("c", "shared", count=3, product=(8, 16, 32))
    moved, one, three = measure([NetworkLayer("a", "deformable", call=call), product, thrice], budget=0.01)
    assert moved.how == "deform_conv2d" and moved.milliseconds > 0 and moved.temporary_bytes
    assert moved.result_bytes == 8 * 10 * 12 * 4
    assert three.milliseconds == pytest.approx(3 * one.milliseconds) and one.milliseconds > 0
    assert one.result_bytes == 8 * 32 * 4 and three.result_bytes == 3 * one.result_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
def test_memory_of_a_product_is_what_blas_takes_and_neither_operands_nor_result() -> None:
    """The operands have 16 MB, the result 4 MB; a BLAS packs tiles of them, of which there is something."""
    found = ceiling.product_memory(1, "float32", (1000, 2000, 1000))
    assert found is not None and 0 < found < 10e6


# ---------------------------------------------------------------- dcn-bench cost


def _strict(text: str) -> dict[str, Any]:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_cost_shares_by_hand() -> None:
    """From the layers' shapes: 3x3 from 512 to 18 channels, thrice; 1x1 from 1024; fully connected from 256*7*7."""
    result = CliRunner().invoke(main, ["cost", "--no-time", "--json"])
    assert result.exit_code == 0, result.output
    convolution = 512 * 3 * 3 * 18 + 18
    thrice = {f"res5{letter} 3x3 offsets": convolution for letter in "abc"}
    expected = {
        "DeepLab": thrice,
        "class-aware RPN": thrice,
        "Faster R-CNN": thrice | {"RoI offsets, fully connected": 256 * 7 * 7 * (2 * 7 * 7) + 2 * 7 * 7},
        "R-FCN": thrice
        | {
            "offset maps, scores": 1024 * (2 * 7 * 7 * 21) + 2 * 7 * 7 * 21,
            "offset maps, boxes": 1024 * (2 * 7 * 7) + 2 * 7 * 7,
        },
    }
    found = _strict(result.stdout)["networks"]
    assert list(found) == list(expected)
    for name, parameters in expected.items():
        rows = {row["layer"]: row for row in found[name]["layers"] if row["part"] == "offsets" and row["parameters"]}
        assert {layer: row["parameters"] for layer, row in rows.items()} == parameters
        total = sum(parameters.values())
        assert {layer: row["share_of_added"] for layer, row in rows.items()} == pytest.approx(
            {layer: count / total for layer, count in parameters.items()}
        )
        whole = found[name]["whole"]
        assert whole["deformable"]["parameters"] - whole["plain"]["parameters"] == total


def test_cost_prints_shares_the_paper_s_figures_and_what_cannot_be_compared() -> None:
    result = CliRunner().invoke(main, ["cost", "--no-time"])
    assert result.exit_code == 0, result.output
    # 2,109,450 of 2,458,786 (R-FCN's score offsets) and 1,229,410 of 1,478,296 (Faster R-CNN's fully connected)
    lines = result.stdout.splitlines()
    (scores,) = [line.split() for line in lines if line.strip().startswith("offset maps, scores")]
    assert scores[4:7] == ["2,109,450", "85.8", "%"] and round(100 * 2_109_450 / 2_458_786, 1) == 85.8
    (connected,) = [line.split() for line in lines if line.strip().startswith("RoI offsets, fully connected")]
    assert connected[5:8] == ["1,229,410", "83.2", "%"] and round(100 * 1_229_410 / 1_478_296, 1) == 83.2
    papers = [line.split()[2:4] for line in lines if line.strip().startswith("the paper's  ")]
    assert papers == [["46.0", "46.1"], ["46.0", "46.1"], ["58.3", "59.9"], ["47.1", "49.5"]]
    forwards = [line.split()[5:7] for line in lines if "net forward, ms" in line]
    assert forwards == [["84", "88"], ["142", "152"], ["147", "192"], ["143", "169"]]
    assert "- The paper's seconds are those of its column net forward" in result.stdout
    assert "those of DeepLab and of the class-aware RPN are unverified" in result.stdout
    assert "The paper does not tell the layers of its class-aware RPN" in result.stdout
    assert "on this machine" not in result.stdout.partition("- The paper's")[0]


def _tiny() -> Network:
    """A product that both have, a plain one, and in its place an operator and the product that makes its offsets."""
    call = layers.layer("deform_conv2d", N=1, C=8, H=6, W=5, O=8, kernel=3, padding=1)
    parts = (
        NetworkLayer("before", "shared", 64, 2, (8, 8, 30)),
        NetworkLayer("filter", "plain", 576, product=(8, 72, 30)),
        NetworkLayer("filter", "deformable", 576, call=call),
        NetworkLayer("offsets", "offsets", 1314, product=(18, 72, 30)),
    )
    return Network("DeepLab", (6, 5), parts, (46.0, 46.1), (0.084, 0.088))


def test_cost_measures_time_and_memory_and_their_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_cost, "networks", lambda offset_groups: {"DeepLab": _tiny()})
    command = ["cost", "--network", "deeplab", "--budget", "0.01"]
    result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = _strict(result.stdout)["networks"]["DeepLab"]
    before, filter, moved, offsets = found["layers"]
    assert [row["how"] for row in found["layers"]] == ["matrix product"] * 2 + ["deform_conv2d", "matrix product"]
    assert all(row["ms"] > 0 for row in found["layers"])
    assert [row["result_bytes"] for row in found["layers"]] == [2 * 8 * 30 * 4, 8 * 30 * 4, 8 * 30 * 4, 18 * 30 * 4]
    for sums, shared in ((found["differing"], []), (found["whole"], [before])):
        for variant, own in (("plain", [filter]), ("deformable", [moved, offsets])):
            rows = [*shared, *own]
            assert sums[variant]["ms"] == pytest.approx(sum(row["ms"] for row in rows))
            held = sums[variant]["memory_bytes"]
            assert held["weights"] == 4 * sum(row["parameters"] for row in rows)
            assert held["results"] == sum(row["result_bytes"] for row in rows)
            temporary = [row["temporary_bytes"] for row in rows]
            if None in temporary:  # not Linux
                assert held["together"] is None
            else:
                assert held["largest_temporary"] == max(temporary)
                assert held["together"] == held["weights"] + held["results"] + max(temporary)


def test_cost_shows_ratios_and_says_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times and memory of 2 + 1 plain and 2 + 4 + 3 deformable; once without the memory of the products."""
    times = {"before": 2.0, "filter": 1.0, "offsets": 3.0}

    def measured(temporary: int | None, chosen: list[NetworkLayer], **more: Any) -> list[Measured]:
        return [
            Measured(4.0, "deform_conv2d", 2_000_000, 7_000_000)
            if layer.call
            else Measured(times[layer.name], "matrix product", 1_000_000, temporary)
            for layer in chosen
        ]

    monkeypatch.setattr(network_cost, "networks", lambda offset_groups: {"DeepLab": _tiny()})
    shown = []
    for temporary in (500_000, None):
        monkeypatch.setattr(network_cost, "measure", partial(measured, temporary))
        result = CliRunner().invoke(main, ["cost", "--network", "DeepLab"])
        assert result.exit_code == 0, result.output
        shown.append([" ".join(line.split()) for line in result.stdout.splitlines()])
    known, unknown = shown
    assert "ms on this machine 3.0 9.0 6.0 3.000" in known
    assert "of the layers that differ 1.0 7.0 6.0 7.000" in known
    # plain: 2 MB of results, 640 parameters of 4 bytes, 0.5 MB; deformable: 4 MB, 1954 parameters, 7 MB
    assert "MB on this machine 2.50 11.01 8.51 4.399" in known
    assert "of the layers that differ 1.50 10.01 8.51 6.661" in known
    assert "largest temporary 0.50 7.00 6.50 14.000" in known
    assert "MB on this machine not measured not measured" in unknown
    assert "ms on this machine 3.0 9.0 6.0 3.000" in unknown


def test_an_interrupted_cost_keeps_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(chosen: list[NetworkLayer], **more: Any) -> list[Measured]:
        raise KeyboardInterrupt

    monkeypatch.setattr(network_cost, "measure", measured)
    result = CliRunner().invoke(main, ["cost", "--network", "R-FCN"])
    assert result.exit_code == 130 and "interrupted: time and memory are left out" in result.stderr
    assert "2,109,450" in result.stdout
