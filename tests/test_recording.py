"""Layers noted while a program runs, and read back by `dcn-bench profile --shapes`."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import first_cases

from dcn_kernels.bench import layers
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.ops.recording import Array, Reach, Recording


def described(arrays: dict[str, Any]) -> dict[str, Array]:
    return {
        name: Array(array.shape, array.dtype.name, tuple(s // array.itemsize for s in array.strides))
        for name, array in arrays.items()
    }


@pytest.mark.parametrize(("op", "sample"), first_cases())
def test_what_is_written_gives_the_shapes_that_were_called(op: Op, sample: Sample, tmp_path: Path) -> None:
    recording = Recording()
    recording.add(op.name, described(sample.arrays), sample.params)
    recording.write(tmp_path / "layers.toml")
    (layer,) = layers.read_toml(str(tmp_path / "layers.toml")).values()
    drawn = op.layer_call(layer)[0]
    missing = {name for name in sample.arrays if name not in drawn}
    assert missing <= {"mask"} and {name: sample.arrays[name].shape for name in drawn} == drawn


def test_calls_of_one_size_are_one_layer_and_the_most_frequent_comes_first() -> None:
    recording = Recording()
    small, large = np.zeros((1, 2, 4, 4), "f"), np.zeros((1, 2, 8, 8), "f").transpose(0, 1, 3, 2)
    last = np.zeros((1, 4, 4, 2), "f").transpose(0, 3, 1, 2)
    for array, count in ((small, 1), (large, 3), (last, 2)):
        for _ in range(count):
            offset = np.zeros((1, 2, *array.shape[2:]), "f")
            recording.add("offset_sample2d", described({"input": array, "offset": offset}), {"border": "zeros"})
    tables = tomllib.loads(recording.toml())["layers"]
    assert [table["source"] for table in tables.values()] == [
        "3 calls, float32, input other strides, border=zeros",
        "2 calls, float32, input channels last, border=zeros",
        "1 call, float32, input contiguous, border=zeros",
    ]


def test_spread_is_of_all_calls_together() -> None:
    recording, rng = Recording(), np.random.default_rng(0)
    arrays = described({"input": np.zeros((1, 2, 8, 8), "f"), "offset": np.zeros((1, 2, 8, 8), "f")})
    drawn = [rng.normal(0.5, 3, (1, 2, 8, 8)) for _ in range(4)]
    for values in drawn:
        within = [int((abs(values) <= limit).sum()) for limit in (1, 4, 16)]
        reach = Reach(values.size, float(values.sum()), float((values**2).sum()), within)
        recording.add("offset_sample2d", arrays, {}, reach)
    (table,) = tomllib.loads(recording.toml())["layers"].values()
    assert table["spread"] == pytest.approx(np.std(drawn), abs=6e-4)
    share = 100 * np.mean(np.abs(drawn) <= 1)
    assert f"offsets {share:.0f} % within 1, " in table["source"]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "layers.toml"
    target.write_text("old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        Recording().write(target)
    monkeypatch.undo()
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["layers.toml"]


def test_a_call_without_regions_is_no_layer() -> None:
    recording = Recording()
    arrays = described({"input": np.zeros((1, 2, 4, 4), "f"), "rois": np.zeros((0, 5), "f")})
    recording.add("roi_align", arrays, {"output_size": 2})
    assert not recording.calls


# ---------------------------------------------------------------- torch


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def test_a_training_loop(torch: Any) -> None:
    """Forward calls alone are counted, each once; gradients and losses are what they are without."""
    from dcn_kernels.torch import ModulatedDeformConv2dPack, RoIAlign, record_layers

    def train() -> list[float]:
        torch.manual_seed(0)
        layer, pool = ModulatedDeformConv2dPack(3, 4, 3, padding=1), RoIAlign(2, 0.5, 2)
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.5)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        rois, losses = torch.tensor([[0.0, 1, 1, 9, 9], [1, 0, 2, 8, 8]]), []
        for _ in range(3):
            loss = pool(layer(torch.rand(2, 3, 8, 8)), rois).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with record_layers() as recording:
        losses = train()
    assert losses == train()
    assert {(call.op.name, call.count) for call in recording.calls.values()} == {("deform_conv2d", 3), ("roi_align", 3)}
    (conv,) = (call for call in recording.calls.values() if call.op.name == "deform_conv2d")
    assert conv.sizes["O"] == 4 and conv.sizes["kernel"] == (3, 3) and conv.reach.count == 3 * 2 * 18 * 64
    assert conv.reach.spread > 0.1


def test_what_was_seen_is_written_after_an_exception(torch: Any, tmp_path: Path) -> None:
    from dcn_kernels.torch import record_layers, roi_pool

    with pytest.raises(KeyError), record_layers(tmp_path / "layers.toml"):
        roi_pool(torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 0, 0, 7, 7]]), 2)
        raise KeyError
    assert "roi_pool" in (tmp_path / "layers.toml").read_text()


# torchvision's own definitions; it does not import beside a CPU build of torch, so its operators are stand-ins here.
SCHEMAS = {
    "deform_conv2d": "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, "
    "int groups, int offset_groups, bool use_mask",
    "roi_align": "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned",
    "roi_pool": "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width",
    "ps_roi_align": "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio",
    "ps_roi_pool": "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width",
}


def test_torchvisions_operators_are_watched(torch: Any) -> None:
    from dcn_kernels.torch import record_layers

    if hasattr(torch.ops.torchvision, "roi_align"):
        library = None
    else:
        library = torch.library.Library("torchvision", "DEF")
        for name, schema in SCHEMAS.items():
            library.define(f"{name}({schema}) -> Tensor")
            library.impl(name, lambda input, *rest: input + 0, "CompositeExplicitAutograd")
    ops, image, rois = torch.ops.torchvision, torch.rand(1, 8, 6, 6), torch.tensor([[0.0, 0, 0, 5, 5]])
    weight, offset, mask = torch.rand(4, 4, 3, 3), torch.rand(1, 36, 6, 6), torch.rand(1, 18, 6, 6)
    with record_layers() as recording:
        ops.deform_conv2d(image, weight, offset, mask, torch.rand(4), 1, 1, 1, 1, 1, 1, 2, 2, True)
        ops.deform_conv2d(image, weight, offset, mask[:, :0], torch.rand(4), 1, 1, 1, 1, 1, 1, 2, 2, False)
        ops.roi_align(image, rois, 0.5, 2, 3, 2, True)
        ops.roi_pool(image, rois, 0.5, 2, 2)
        ops.ps_roi_align(image, rois, 0.5, 2, 2, -1)
        ops.ps_roi_pool(image, rois, 0.5, 2, 2)
    del library
    calls = [(call.op.name, call.told) for call in recording.calls.values()]
    plain = ("float32", "input contiguous")
    assert calls == [
        ("deform_conv2d", plain),
        ("deform_conv2d", (*plain, "no mask")),
        ("roi_align", (*plain, "sampling_ratio=2", "aligned=True")),
        ("roi_pool", plain),
        ("ps_roi_align", plain),
        ("ps_roi_pool", (*plain, "convention=torchvision")),
    ]
    first = next(iter(recording.calls.values())).sizes
    assert first["groups"] == 2 and first["offset_groups"] == 2 and first["padding"] == (1, 1)


def capture(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from dcn_kernels.cli.bench import main; main()", "capture", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})


PROGRAM = """
import sys
from pathlib import Path
import torch
from dcn_kernels.torch import offset_sample2d
print(sys.argv[1:], Path(sys.path[0]).name)
offset_sample2d(torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4, 4))
sys.exit(5)
"""


def test_dcn_bench_capture(torch: Any, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = capture("-o", "layers.toml", "--", sys.executable, "program.py", "--flag", "3", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert done.stdout == f"['--flag', '3'] {tmp_path.name}\n" and "saved layers.toml" in done.stderr
    (layer,) = layers.read_toml(str(tmp_path / "layers.toml")).values()
    assert (layer["op"], layer["C"], layer["spread"]) == ("offset_sample2d", 2, 0.01)


def test_dcn_bench_capture_of_no_call_leaves_the_file(torch: Any, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("print('nothing')")
    (tmp_path / "layers.toml").write_text("old")
    done = capture("-o", "layers.toml", "--", sys.executable, "program.py", cwd=tmp_path)
    assert done.returncode == 0 and "nothing is saved: no call" in done.stderr and "saved layers" not in done.stderr
    assert (tmp_path / "layers.toml").read_text() == "old"


INTERRUPTED = PROGRAM.replace(
    "sys.exit(5)",
    """
import os, signal, time
try:
    os.killpg(os.getpgid(0), signal.SIGINT)  # as Ctrl-C in a terminal: to the command and to the program
    time.sleep(30)
except KeyboardInterrupt:
    time.sleep(1)
    raise
""",
)


def test_dcn_bench_capture_waits_for_an_interrupted_program(torch: Any, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(INTERRUPTED)
    command = [sys.executable, "-c", "from dcn_kernels.cli.bench import main; main()", "capture", "-o", "layers.toml"]
    done = subprocess.run(
        [*command, "--", sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 130 and "saved layers.toml" in done.stderr, done.stderr


@pytest.mark.parametrize("command", [["ls"], ["python"], ["python", "-c", "1"], ["python", "-m"]])
def test_dcn_bench_capture_refuses_what_is_no_program(command: list[str], tmp_path: Path) -> None:
    done = capture("-o", "layers.toml", "--", *command, cwd=tmp_path)
    assert done.returncode == 2 and "expected" in done.stderr and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- JAX


def test_jax_is_noted_while_it_is_traced() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from dcn_kernels.jax import deform_conv2d, record_layers

    image, offset, weight = jax.numpy.ones((1, 2, 6, 6)), jax.numpy.zeros((1, 18, 6, 6)), jax.numpy.ones((3, 2, 3, 3))
    gradient = jax.jit(jax.grad(lambda *arrays: deform_conv2d(*arrays, padding=1).sum()))
    with record_layers() as recording:
        for _ in range(3):
            gradient(image, offset, weight)
    (call,) = recording.calls.values()
    assert (call.count, call.sizes["O"], call.told) == (1, 3, ("float32", "no bias", "no mask"))
