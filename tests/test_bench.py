"""dcn-bench: records, verdicts, peers, and how it ends."""

from __future__ import annotations

import csv
import functools
import json
import re
import runpy
import shutil
import stat
import sys
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import invoked, one_line
from dcn_kernels.cli.bench import main

import dcn_kernels.cpu.deform_conv as cpu_deform_conv
from dcn_kernels import environment
from dcn_kernels.bench import ceiling, layers, peers, plots, profiling, record, spot_checks
from dcn_kernels.bench.inputs import DIRECTIONS, make_inputs, runner
from dcn_kernels.environment import why_not
from dcn_kernels.ops.registry import OPS

ROOT = Path(__file__).parent.parent
SMALL = "C=8,H=9,W=10,O=8"
QUICK = ("profile", "--shape", SMALL, "--offsets", "random", "--budget", "0.01", "--threads", "1")


run = functools.partial(invoked, main)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a test go nowhere else; the machine's rates are not measured again for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        profiling.ceiling,
        "measure",
        lambda threads, dtype, shapes: {"gflops": 100.0, "gbytes_s": 10.0, "products_ms": [1.0] * len(shapes)},
    )


def measured(path: Path) -> dict[str, Any]:
    """A real record of two rows."""
    result = run(*QUICK, "--output", str(path))
    assert result.exit_code == 0, result.output
    return record.read(path)


# ---------------------------------------------------------------- profile


def test_a_record_holds_what_is_described(tmp_path: Path) -> None:
    found = measured(tmp_path / "run.json")
    assert set(found) == set(record.FIELDS)
    assert [row["direction"] for row in found["rows"]] == ["forward", "backward"]
    for row in found["rows"]:
        assert set(row) == set(record.ROW_FIELDS)
        assert len(row["samples_ms"]) >= 3 and row["median_ms"] == pytest.approx(np.median(row["samples_ms"]), rel=1e-3)
        assert row["small_check"] <= 1 and row["spot_check"] <= 1 and row["temp_bytes"] > 0
        products = 2 * 8 * 8 * 9 * 90 * (1 if row["direction"] == "forward" else 2)
        assert row["gflops"] == pytest.approx(products / row["median_ms"] / 1e6)
        assert row["plain_ratio"] == pytest.approx(row["median_ms"] / row["plain_ms"])


def test_the_first_call_of_each_direction_is_timed_before_a_check_makes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: set[str] = set()

    def compiles(name: str) -> None:
        right = getattr(cpu_deform_conv, name)

        def slow_at_first(*args: Any, **kwargs: Any) -> Any:
            if name not in compiled:
                compiled.add(name)
                sleep(0.2)
            return right(*args, **kwargs)

        monkeypatch.setattr(cpu_deform_conv, name, slow_at_first)

    compiles("deform_conv2d")
    compiles("deform_conv2d_backward")
    rows = json.loads(run(*QUICK, "--no-save", "--json").stdout)["rows"]
    assert [row["compile_ms"] > 150 for row in rows] == [True, True]


def test_a_product_is_the_fastest_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([4.0, 3.0])
    monkeypatch.setattr(
        profiling.ceiling,
        "measure",
        lambda threads, dtype, shapes: {"gflops": 1.0, "gbytes_s": 1.0, "products_ms": [next(times) for _ in shapes]},
    )
    rows = json.loads(run(*QUICK, "--offsets", "smooth", "--no-save", "--json").stdout)["rows"]
    assert next(times, None) is None  # once for each set of arrays
    assert [row["plain_ms"] for row in rows] == [3.0, 6.0, 3.0, 6.0]
    assert [row["plain_ratio"] for row in rows] == [row["median_ms"] / row["plain_ms"] for row in rows]


def test_a_row_without_a_weight_has_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"one": layers.parse("deform_conv2d", SMALL), "two": layers.parse("offset_sample2d", "C=4,H=8,W=9")}
    settings = profiling.Settings(("forward",), offsets=("zero",), budget=0.01)
    assert [row["plain_ms"] for row in profiling.profile(chosen, settings)] == [1.0, None]


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("of the kernel")

    monkeypatch.setattr(cpu_deform_conv, "deform_conv2d_backward", fails)
    result = run(*QUICK, "--output", str(tmp_path / "part.json"))
    assert result.exit_code == 1 and "error: ZeroDivisionError: of the kernel" in result.stderr
    assert [row["direction"] for row in record.read(tmp_path / "part.json")["rows"]] == ["forward"]


def test_without_output_the_record_goes_to_a_folder_that_git_ignores_unless_it_is_published(tmp_path: Path) -> None:
    forward = (*QUICK, "--direction", "forward")
    result = run(*forward)
    assert result.exit_code == 0
    (path,) = (tmp_path / "bench_results").rglob("*.*")
    assert path.parent.name == "local" and path.name in result.stderr and len(record.read(path)["rows"]) == 1
    assert "bench_results/local/" in (ROOT / ".gitignore").read_text().splitlines()
    run(*forward, "--no-save")
    assert list((tmp_path / "bench_results").rglob("*.*")) == [path]
    assert run(*forward, "--publish").exit_code == 0
    assert len(list((tmp_path / "bench_results").glob("*.json"))) == 1
    for other in (("--no-save",), ("--output", "run.json")):
        assert "expected one of them" in one_line(run(*forward, "--publish", *other), 2)


@pytest.mark.parametrize("kind", ["json", "csv", "markdown"])
def test_results_alone_are_on_stdout(kind: str) -> None:
    result = run(*QUICK, "--no-save", f"--{kind}")
    assert result.exit_code == 0
    if kind == "json":
        assert len(record.check(json.loads(result.stdout))["rows"]) == 2
    elif kind == "csv":
        rows = list(csv.DictReader(result.stdout.splitlines()))
        assert [row["direction"] for row in rows] == ["forward", "backward"] and float(rows[0]["median_ms"]) > 0
    else:
        assert result.stdout.count("| 1x8x9x10:8:3x3 | deform_conv2d |") == 2


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_deform_conv.deform_conv2d_backward

    def scaled(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: array * np.float32(1.01) for name, array in right(*args, **kwargs).items()}

    monkeypatch.setattr(cpu_deform_conv, "deform_conv2d_backward", scaled)
    result = run(*QUICK, "--no-save", "--json")
    assert result.exit_code == 1 and "differs from the reference" in result.stderr
    assert [row["direction"] for row in json.loads(result.stdout)["rows"]] == ["forward"]
    assert "differs from the reference" in one_line(run(*QUICK, "--no-save", "--direction", "backward"), 1)


def test_a_fault_of_large_sizes_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(layers.parse("deform_conv2d", "C=8,H=40,W=40,O=8"), "random", "float32", 0)
    for direction in DIRECTIONS:
        assert spot_checks.check_spots(inputs, "cpu", direction, 0) <= 1
    right = cpu_deform_conv.deform_conv2d

    def forgets_the_last_rows(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        out[:, :, 12:] *= 0.99
        return out

    monkeypatch.setattr(cpu_deform_conv, "deform_conv2d", forgets_the_last_rows)
    assert spot_checks.check_small(layers.parse("deform_conv2d", SMALL), "random", "float32", "cpu", 0) <= 1
    with pytest.raises(spot_checks.Mismatch, match="output differs"):
        spot_checks.check_spots(inputs, "cpu", "forward", 0)


def test_every_operator_of_the_layers_can_be_profiled() -> None:
    """Sizes cut, on the reference: every row's layer gives arrays that its operator takes."""
    assert {layer["op"] for layer in layers.LAYERS.values()} == set(OPS)
    for name in layers.DEFAULT_SET:
        layer = layers.LAYERS[name]
        inputs = make_inputs(layer, "random", "float32", 0)
        assert inputs.shape[0] == inputs.sizes[OPS[layer["op"]].output.split()[0]], name


def test_reuse_writes_into_one_array_and_gives_the_backward_what_the_forward_kept(tmp_path: Path) -> None:
    inputs = make_inputs(layers.cut(layers.LAYERS["frcnn-roi"]), "random", "float32", 0)
    want = {direction: runner(inputs, direction, "cpu")() for direction in DIRECTIONS}
    forward, backward = (runner(inputs, each, "cpu", reuse=True) for each in DIRECTIONS)
    assert forward() is forward()
    assert np.array_equal(forward(), want["forward"])
    inputs.sample.arrays["input"][:] = 0  # the maxima's places are known
    assert np.array_equal(backward()["input"], want["backward"]["input"])
    path = tmp_path / "reused.json"
    assert run(*QUICK, "--direction", "forward", "--reuse", "--output", str(path)).exit_code == 0
    assert record.read(path)["settings"]["reuse"] and "arrays reused" in record.caption(record.read(path))


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = profiling.profile

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        yield next(right(*args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "profile", interrupted)
    result = run(*QUICK, "--output", str(tmp_path / "part.json"))
    assert result.exit_code == 130 and len(record.read(tmp_path / "part.json")["rows"]) == 1


def test_layers_come_from_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "layers.toml"
    path.write_text('[layers.mine]\nop = "offset_sample2d"\nC = 4\nH = 8\nW = 9\noffset_groups = 2\n')
    result = run("profile", "--shapes", str(path), "--backend", "reference", "--budget", "0.01", "--json", "--no-save",
                 "--offsets", "zero")  # fmt: skip
    rows = json.loads(result.stdout)["rows"]
    assert [(row["layer"], row["op"]) for row in rows] == [("mine", "offset_sample2d")] * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not toml", "not a TOML file"),
        ("a = 1", "[layers.NAME]"),
        ("[layers.x]\nC = true\nH = 4\nW = 4\nO = 4", "True"),
        ("[layers.x]\nC = 4\nH = 4\nW = 4\nO = 4\nspread = nan", "spread"),
        ("[layers.x]\nC = 4\nH = 4\nW = 4\nO = 4\ngroups = 3", "groups = 3 does not divide C = 4"),
        ("[layers.x]\nC = 4\nH = 4\nW = 4\nO = 4\nkernel = 9", "larger than the padded input"),
        ("[layers.x]\nop = [1]", "op"),
        ("[layers.x]\nC = 0\nH = 4\nW = 4\nO = 4", "C"),
        ("[layers.x]\nC = 4\nH = 4\nW = 4\nO = 4\nkernle = 3", "kernle"),
        ('[layers.x]\nop = "none"\nC = 4', "none"),
        ("[layers.x]\nC = 4\nW = 4\nO = 4", "'H'"),
    ],
)
def test_wrong_layers_are_one_line_and_2(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "layers.toml"
    path.write_text(text)
    assert says in one_line(run("profile", "--shapes", str(path)), 2)


def test_wrong_usage_is_one_line_and_2(tmp_path: Path) -> None:
    assert "no layer" in one_line(run("profile", "--layer", "Z"), 2)
    assert "no operator" in one_line(run("profile", "--op", "conv"), 2)
    assert "regular expression" in one_line(run("profile", "--filter", "("), 2)
    assert "no layer is left" in one_line(run("profile", "--filter", "nothing"), 2)
    assert "NAME=NUMBER" in one_line(run("profile", "--shape", "C=four"), 2)
    assert "does not divide C = 8" in one_line(run("profile", "--shape", SMALL + ",offset_groups=3"), 2)
    assert ".json" in one_line(run("profile", "--output", "run.xls"), 2)
    assert "no folder" in one_line(run("profile", "--output", str(tmp_path / "none" / "r.json")), 2)
    assert "no peer" in one_line(run(*QUICK, "--against", "caffe"), 2)
    assert "--budget" in one_line(run("profile", "--budget", "0"), 2)
    assert "--threads" in one_line(run("profile", "--threads", "0"), 2)
    assert "--seed" in one_line(run("profile", "--seed", "-1"), 2)
    assert "No such option '--treads'" in one_line(run("profile", "--treads", "2"), 2)
    assert "Missing argument 'NEW'" in one_line(run("compare", "old.json"), 2)


@pytest.mark.skipif(not why_not("cuda"), reason="a GPU is there")
def test_a_backend_that_is_not_there_is_3() -> None:
    assert "cuda is not available" in one_line(run("profile", "--backend", "cuda"), 3)


def test_a_folder_that_cannot_be_made_is_2_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "bench_results").write_text("a file")
    assert "cannot make the folder bench_results" in one_line(run(*QUICK), 2)


def test_named_layers_of_a_toml_file_are_run_alone(tmp_path: Path) -> None:
    path = tmp_path / "layers.toml"
    path.write_text("".join(f"[layers.{name}]\nC = 4\nH = 8\nW = 9\nO = 4\nspread = 2.5\n" for name in "ab"))
    result = run("profile", "--shapes", str(path), "--layer", "b", "--list")
    assert [line[:3] for line in result.stdout.splitlines()[2:]] == ["b  "] and "2.5" in result.stdout
    assert "no layer 'A'" in one_line(run("profile", "--shapes", str(path), "--layer", "A"), 2)


def test_a_dilation_wider_than_the_cut_is_checked_on_more_pixels() -> None:
    layer = layers.parse("deform_conv2d", "C=8,H=64,W=20,O=8,dilation=12x1,padding=0")
    assert spot_checks.check_small(layer, "random", "float32", "cpu", 0) <= 1
    assert (layers.cut(layer)["H"], layers.cut(layer)["W"]) == (29, 12)


def test_a_layer_larger_than_memory_is_one_line_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "memory", lambda: None)  # where it cannot be told
    huge = "C=8,H=1000000,W=1000000,O=8"
    assert "does not fit into memory" in one_line(run("profile", "--shape", huge, "--no-save"), 1)


@pytest.mark.parametrize("name", layers.LAYERS)
def test_the_memory_of_a_layer_is_that_of_its_arrays(name: str) -> None:
    small = layers.cut(layers.LAYERS[name])
    inputs = make_inputs(small, "random", "float32", 0)
    kept = sum(a.size for a in inputs.sample.arrays.values()) + inputs.grad_output.size
    assert layers.memory(small, 4) == 16 * kept


@pytest.mark.parametrize("sizes", ["N=1000000000,C=64,H=56,W=56,O=64", "1x64x56x56:64:1x65536,padding=40000",
                                   "2147483647x2147483647x2147483647x2147483647:2147483647"])  # fmt: skip
def test_sizes_that_memory_does_not_hold_are_refused_before_anything_is_allocated(
    sizes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "memory", lambda: 16 * 10**9)
    monkeypatch.setattr("dcn_kernels.bench.inputs.make_inputs", lambda *_: pytest.fail("allocated"))
    said = one_line(run("profile", "--shape", sizes, "--no-save"), 2)
    assert re.search(r"timing it takes at least [\d.,e+]+ GB of memory, there are 16.0 GB", said)
    (tmp_path / "layers.toml").write_text(f'[layers.mine]\nsizes = "{sizes}"\n')
    assert "layer mine: timing it takes" in one_line(run("profile", "--shapes", "layers.toml", "--no-save"), 2)


def test_a_small_check_has_a_slab_of_channels_and_the_layer_s_remainder_in_every_group() -> None:
    layer = layers.parse("deform_conv2d", "1x1920000x64x64:3000000:1x1,groups=96,offset_groups=64,padding=0")
    small = layers.cut(layer)
    assert small["C"] == 16 * 192 and small["O"] == (16 + 3_000_000 // 96 % 16) * 96
    assert layers.cut(layers.LAYERS["A"])["C"] == 16
    assert layers.cut(layers.LAYERS["rfcn-psroi"])["C"] == (16 + 21 % 16) * 49
    classes = layers.parse("deform_ps_roi_pool", "1x2058x38x63,classes=21")
    assert (
        layers.cut(classes)["C"] == 2 * 21 * 49 and spot_checks.check_small(classes, "random", "float32", "cpu", 0) <= 1
    )


def test_shapes_are_named_by_their_sizes_and_may_be_short(tmp_path: Path) -> None:
    both = ("--shape", "2x8x9x10:8:3x3,padding=2", "--shape", "C=8,H=9,W=10,O=8,kernel=1,offset_groups=2")
    rows = json.loads(run(*QUICK[:1], *both, *QUICK[3:], "--no-save", "--json", "--direction", "forward").stdout)[
        "rows"
    ]
    assert [row["layer"] for row in rows] == ["2x8x9x10:8:3x3,padding=2x2", "1x8x9x10:8:1x1,offset_groups=2"]
    assert rows[0]["shape"] == "N=2,C=8,H=9,W=10,O=8,kernel=3x3,padding=2x2"
    for layer in layers.LAYERS.values():
        again = layers.parse(layer["op"], layers.named(layer))
        assert {k: again[k] for k in OPS[layer["op"]].layer_sizes} == {
            k: layer[k] for k in OPS[layer["op"]].layer_sizes
        }
    (tmp_path / "layers.toml").write_text('[layers.mine]\nsizes = "2x8x9x10:8:3x3"\npadding = 2\n')
    assert layers.named(layers.read_toml("layers.toml")["mine"]) == "2x8x9x10:8:3x3,padding=2x2"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", SMALL + ",C=9"), "C is given twice"),
        (("--shape", "1x8x9x10:8,C=9"), "C is given twice"),
        (("--shape", SMALL, "--shape", "1x8x9x10:8"), "the same sizes are given twice"),
        (("--shape", "1x8x9x10:8", "--op", "roi_pool"), "roi_pool has no size 'O'"),
        (("--shape", "C=8,H=9,W=10,O=8,R=3"), "deform_conv2d has no size 'R'"),
        (("--shape", "C=8,H=9,W=10"), "needs the size 'O'"),
        (("--shape", "1x8x9:8"), "NxCxHxW"),
        (("--shape", SMALL, "--op", "deform_conv2d", "--op", "roi_pool"), "one operator"),
        (("--layer", "A", "--op", "deform_conv2d", "--op", "roi_pool"), "no layer of roi_pool"),
        (("--layer", "A", "--layer", "A"), "--layer: A is named twice"),
        (("--threads", "1", "--threads", "1"), "--threads: 1 is named twice"),
        (("--seed", "1", "--seed", "2"), "--seed is given twice"),
        (("--json", "--csv"), "--json and --csv: expected one of them"),
        (("--json", "--wide"), "--wide is about the table"),
        (("--no-save", "--output", "run.json"), "expected one of them"),
        (("--layer", "frcnn-roi", "--offsets", "zero"), "none of the operators has offsets"),
        (("--backend", "reference", "--threads", "1"), "--threads: expected the CPU backend"),
        (("--list", "--budget", "1"), "--list runs nothing: --budget would be ignored"),
    ],
)
def test_what_would_be_ignored_is_an_error(arguments: tuple[str, ...], says: str) -> None:
    assert says in one_line(run("profile", *arguments), 2)


def test_a_broken_cupy_is_a_backend_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert why_not("cuda") == "CuPy does not import: libnvrtc is missing"


def test_list_runs_nothing() -> None:
    result = run("profile", "--list", "--filter", "^resnet")
    assert result.exit_code == 0 and "resnet101-res5a" in result.stdout and "centernet" not in result.stdout
    assert set(json.loads(run("layers", "--json").stdout)) == set(layers.LAYERS)


def test_env_says_why_a_backend_is_missing() -> None:
    found = json.loads(run("env", "--json").stdout)
    assert found["backends"]["cpu"] == "available"
    assert found["backends"]["cuda"] == (why_not("cuda") or "available")
    assert found["blas"]["name"] and found["threads"] >= 1
    assert run("env").exit_code == 0


@pytest.mark.parametrize("commit", [("", False), ("0123abc", True)])
def test_env_names_the_commit_of_a_checkout_and_none_where_there_is_none(
    commit: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "commit", lambda: commit)
    found = json.loads(run("env", "--json").stdout)
    assert (found["commit"], found["dirty"]) == commit
    assert ("commit" in run("env").stdout) == bool(commit[0])


def test_spread_gives_the_paper_s_effective_dilation() -> None:
    rng = np.random.default_rng(0)
    for mean in layers.TABLE_2.values():
        first, second = rng.standard_normal((2, 2, 200_000)) * layers.spread(mean)
        distance = np.hypot(2 + second[0] - first[0], second[1] - first[1])
        assert distance.mean() == pytest.approx(mean, abs=0.02)


def test_shares_are_of_the_best_rates_of_the_run() -> None:
    common = {"backend": "cpu", "dtype": "float32", "threads": 2, "gflops": 50.0, "gbytes_s": 1.0, "plain_ms": None}
    busy, idle = ({**common, "ceiling": {"gflops": rate, "gbytes_s": 10.0}} for rate in (25.0, 100.0))
    profiling.best_ceilings([busy, idle])
    assert busy["ceiling_share"] == idle["ceiling_share"] == 0.5 and busy["bound"] == "arithmetic"


def test_the_machine_s_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = ceiling.measure(1, "float32", ((2, 64, 64, 64),))
    assert 0.1 < found["gflops"] < 1e5 and 0.1 < found["gbytes_s"] < 1e4 and 0 < found["products_ms"][0] < 1e3


# ---------------------------------------------------------------- peers

STAND_IN = """#!{python}
# speaks a peer's part: {factor} times what it is asked to compute, so that the disagreement is known, and its {way}
import json, os, sys, time
import numpy as np
from dcn_kernels import deform_conv2d, deform_conv2d_backward
print(json.dumps({{"version": "9.9"}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    assert asked["do"] == "run" or asked["device"] == "cpu"
    if asked["do"] == "run":
        if "{way}" == "crashes":
            sys.exit("of its own accord")
        if "{way}" == "hangs":
            time.sleep(60)
        print(json.dumps({{"samples_ms": [5.0, 7.0]}}), flush=True)
        continue
    if "{way}" == "is loud":
        sys.stderr.write("no news " * 50_000)
    if asked["direction"] == "backward":
        print(json.dumps({{"error": "has no backward"}}), flush=True)
        continue
    stored = dict(np.load(asked["path"]))
    stored.pop("grad_output")
    path = os.path.join(os.path.dirname(asked["path"]), "results.npz")
    np.savez(path, output={factor} * deform_conv2d(**stored, padding=1, backend="reference"))
    print(json.dumps({{"what": "a stand-in", "path": path, "comparable": True}}), flush=True)
"""


def stand_in(tmp_path: Path, factor: str, way: str = "behaves") -> str:
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable, factor=factor, way=way))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(("factor", "way", "error"), [("1.0", "behaves", 0.0), ("1.5", "is loud", 0.5)])
def test_a_peer_is_timed_and_its_disagreement_shown(tmp_path: Path, factor: str, way: str, error: float) -> None:
    result = run(*QUICK, "--no-save", "--json", "--against", f"torchvision={stand_in(tmp_path, factor, way)}")
    found = record.check(json.loads(result.stdout))
    forward, backward = found["rows"]
    theirs = forward["against"]["torchvision"]
    assert theirs["max_error"] == pytest.approx(error, abs=1e-5)
    assert theirs["ratio"] == pytest.approx(6.0 / forward["median_ms"]) and theirs["median_ms"] == 6.0
    assert backward["against"] == {} and "has no backward" in result.stderr
    assert found["versions"]["torchvision"] == "9.9"
    shown = record.markdown(found)
    assert "| torchvision, ms (x ours) |" in shown and ("differs by 0.5" in shown) == (error > 0)


@pytest.mark.parametrize(
    ("factor", "way", "says"),
    [
        ("1.0", "crashes", "its process ended: of its own accord"),
        ("1.0", "hangs", "did not answer within 2 s and was ended"),
        ("np.nan", "behaves", "output has elements that are not finite"),
    ],
)
def test_a_peer_that_fails_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: str, way: str, says: str
) -> None:
    monkeypatch.setattr(peers, "_PATIENCE", 2.0 if way == "hangs" else 60.0)
    with peers.Peer(f"torchvision={stand_in(tmp_path, factor, way)}") as peer:
        peer._threads = 1
        warnings: list[str] = []
        rows = list(
            profiling.profile(
                {"one": layers.parse("deform_conv2d", SMALL), "two": layers.parse("deform_conv2d", SMALL)},
                profiling.Settings(("forward",), offsets=("zero",), budget=0.01),
                [peer],
                warn=warnings.append,
            )
        )
        assert peer._process is None or way == "behaves"
    assert [row["against"] for row in rows] == [{}, {}]
    assert sum(says in warning for warning in warnings) == 2  # it was started again for the second row


def test_a_peer_named_twice_is_2(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "1.0")
    twice = ("--against", f"torchvision={python}", "--against", f"torchvision={python}")
    assert "torchvision is named twice" in one_line(run(*QUICK, "--no-save", *twice), 2)


@pytest.mark.parametrize("command", ["echo", "true", "nothing"])
def test_what_is_no_python_is_no_peer(command: str) -> None:
    path = shutil.which(command) or "/nowhere/python"
    with peers.Peer(f"torchvision={path}") as peer, pytest.raises(peers.PeerError, match=re.escape(path) + "|ended"):
        peer.start(1)


def test_a_missing_peer_is_named_with_how_to_get_it() -> None:
    result = run(
        *QUICK, "--no-save", "--direction", "forward", "--against", "tvdcn=/nowhere/python", "--against", "paddle"
    )
    assert result.exit_code == 3 and result.stdout, (
        "what was measured is shown, and the exit code says that not all was"
    )
    assert "tvdcn is left out: cannot run /nowhere/python" in result.stderr
    assert "pip install paddlepaddle" in result.stderr
    assert result.stderr.endswith("error: --against: not measured: tvdcn, paddle\n")


def test_a_peer_of_a_row_on_the_gpu_is_timed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is to see of it without a GPU: the request, a peer that refuses the CPU, and the clock."""
    asked: dict[str, Any] = {}

    def ask(self: peers.Peer, field: str, **request: Any) -> dict[str, Any]:
        asked.update(request)
        return {"what": "", "comparable": False}

    monkeypatch.setattr(peers.Peer, "_ask", ask)
    monkeypatch.setattr(peers.Peer, "start", lambda self, threads: None)
    inputs = make_inputs(layers.parse("deform_conv2d", SMALL), "zero", "float32", 0)
    for backend, device in (("cuda", "cuda"), ("cpu", "cpu"), ("reference", "cpu")):
        peers.Peer("torch").load(inputs, "forward", backend, None)
        assert asked["device"] == device

    monkeypatch.setattr(sys, "argv", ["peer_worker.py", "torch", "1"])
    worker = runpy.run_path(str(peers.WORKER))
    state = worker["milliseconds"].__globals__
    state["DEVICE"] = "cuda"
    for name in ("onnxruntime_peer", "openvino_peer"):
        with pytest.raises(worker["NotThere"], match="on the CPU only"):
            worker["only_forward_float32"](name, "forward", "float32")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, end: Any) -> float:
            return 3.0

    calls: list[str] = []
    cuda = SimpleNamespace(Event=Event, is_available=lambda: False)
    backends = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace()), cudnn=SimpleNamespace())
    buffer = SimpleNamespace(zero_=lambda: calls.append("ahead"))
    torch = SimpleNamespace(
        cuda=cuda, backends=backends, set_num_threads=lambda threads: None, empty=lambda *_, **__: buffer, uint8=None
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert worker["milliseconds"](lambda: calls.append("prepare"), lambda: calls.append("run")) == 3.0
    assert calls == ["ahead", "ahead", "prepare", "record", "run", "record", "synchronize"]
    with pytest.raises(worker["NotThere"], match="finds no GPU"):
        worker["torch_ready"]({})


def test_the_worker_knows_every_peer() -> None:
    text = peers.WORKER.read_text()
    for name in peers.PEERS:
        assert f'"{name}": (' in text


# ---------------------------------------------------------------- compare


def test_verdicts_follow_the_samples() -> None:
    rng = np.random.default_rng(0)
    steady = 10 + 0.05 * rng.standard_normal(40)
    noisy = 10 * np.exp(0.5 * rng.standard_normal(8))
    assert record.verdict(steady, steady[::-1])[0] == "same"
    assert record.verdict(steady, 1.2 * steady)[0] == "slower"
    assert record.verdict(steady, 0.8 * steady)[0] == "faster"
    assert record.verdict(steady, noisy)[0] == "unsure"
    assert record.verdict([10.0] * 4, [20.0] * 4)[0] == "unsure"  # too few for an interval
    assert record.verdict(steady, 1.2 * steady)[1] == pytest.approx(1.2)


def test_compare_fails_above_a_ratio(tmp_path: Path) -> None:
    old = measured(tmp_path / "old.json")
    new = json.loads(json.dumps(old))
    for row in old["rows"]:
        row["samples_ms"] = [10.0, 10.1, 9.9, 10.0, 10.0]
    for row, factor in zip(new["rows"], (2.0, 1.0), strict=True):
        row["samples_ms"] = [factor * s for s in (10.0, 10.1, 9.9, 10.0, 10.0)]
    for name, found in (("old", old), ("new", new)):
        found["settings"]["load"] = 0.0  # whatever else runs beside the tests
        (tmp_path / f"{name}.json").write_text(record.to_json(found))
    both = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    result = run("compare", *both, "--json")
    assert [row["verdict"] for row in json.loads(result.stdout)["rows"]] == ["slower", "same"]
    assert result.exit_code == 0 and result.stderr == ""
    assert run("compare", *both, "--fail-above", "1.5").exit_code == 1
    assert run("compare", *both, "--fail-above", "2.5").exit_code == 0
    new["device"]["cpu"], new["versions"]["numpy"] = "another", "0.1"
    (tmp_path / "new.json").write_text(record.to_json(new))
    warnings = run("compare", *both).stderr
    assert "the machines differ (cpu)" in warnings and "numpy" in warnings
    new["settings"]["reuse"] = True
    (tmp_path / "new.json").write_text(record.to_json(new))
    assert "the settings differ: reuse False -> True" in run("compare", *both).stderr
    new["settings"]["load"] = 9.5 * new["device"]["cores"]
    (tmp_path / "new.json").write_text(record.to_json(new))
    assert "other work was running before the new record" in run("compare", *both).stderr
    assert "in the minute before" in record.caption(new) and "load" not in record.caption(old)
    new["rows"] = []
    (tmp_path / "new.json").write_text(record.to_json(new))
    assert run("compare", *both).exit_code == 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[]", "not a record"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema 99"),
        (lambda text: text.replace('"median_ms"', '"medium_ms"'), "median_ms is missing"),
        (lambda text: text.replace('"direction": "forward"', '"direction": 3'), "direction"),
        (lambda text: text.replace('"commit"', '"comit"'), "commit is missing"),
        (lambda text: text.replace('"gflops": ', '"gflops": 1e999, "was": ', 1), "gflops: expected a finite number"),
        (lambda text: text.replace('"against": {}', '"against": {"x": {}}', 1), "against x: median_ms is missing"),
        (lambda text: text.replace('"cpu": "', '"gpu": "'), "device: cpu is missing"),
        (lambda text: text.replace('"backend": "cpu"', '"backend": "cuda"'), "device: "),
        (lambda text: "[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_record_is_one_line_and_2(tmp_path: Path, damage: Any, says: str) -> None:
    measured(tmp_path / "good.json")
    text = (tmp_path / "good.json").read_text()
    (tmp_path / "bad.json").write_text(damage(text))
    for arguments in (("compare", "good.json", "bad.json"), ("plot", "bad.json", "-o", "p.png")):
        assert says in one_line(run(*arguments), 2)
    assert "No such file" in one_line(run("compare", "good.json", "none.json"), 2)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("what was there")

    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    result = run(*QUICK, "--direction", "forward", "--output", str(path))
    assert result.exit_code == 2 and "No space left" in result.stderr
    assert path.read_text() == "what was there" and [p.name for p in tmp_path.iterdir()] == ["run.json"]


# ---------------------------------------------------------------- pictures and the published records


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(*QUICK, "--threads", "2", "--output", "run.json")
    assert result.exit_code == 0
    for what in ("speed", "memory", "scaling", "cost"):
        assert run("plot", "run.json", "-o", f"{what}.png", "--what", what).exit_code == 0
        assert (tmp_path / f"{what}.png").read_bytes().startswith(b"\x89PNG")
    assert ".png" in one_line(run("plot", "run.json", "-o", "picture.gif"), 2)
    one = record.read("run.json")
    one["rows"] = [row for row in one["rows"] if row["threads"] == 1]
    Path("one.json").write_text(record.to_json(one))
    Path("none.json").write_text(record.to_json({**one, "rows": []}))
    assert "no rows to draw" in one_line(run("plot", "none.json", "-o", "n.png"), 2)
    assert "two numbers of threads" in one_line(run("plot", "one.json", "-o", "s.png", "--what", "scaling"), 2)


def test_bars_are_told_apart_by_record_only_where_rows_are_in_both(tmp_path: Path) -> None:
    both = measured(tmp_path / "run.json")
    forward, backward = ({**both, "rows": [row]} for row in both["rows"])
    assert plots._series({"a": forward, "b": backward}, forward["rows"][0], "a") == "dcn-kernels cpu"
    assert plots._series({"a": forward, "b": both}, forward["rows"][0], "a") == "dcn-kernels cpu (a)"


def test_published_records_are_whole_and_their_readme_is_theirs() -> None:
    folder = ROOT / "bench_results"
    records = {path.name: record.read(path) for path in folder.glob("*.json")}
    assert records, "no record is published"
    assert (folder / "README.md").read_text() == record.readme(records)
    beside = (ROOT / "README.md").read_text()
    assert record.with_gpus(beside, records) == beside and record.gpus(records) in beside
    for name, found in records.items():
        for row in found["rows"]:
            assert row["small_check"] <= 1 and (row["spot_check"] or 0) <= 1, (name, row["layer"])


def test_readme_names_the_gpus_of_the_records(tmp_path: Path) -> None:
    found = record.read(next((ROOT / "bench_results").glob("*.json")))
    cuda = json.loads(json.dumps(found)) | {"created": "2027-01-02T03:04:05+00:00"}
    cuda["device"] |= {"gpu": "NVIDIA H200", "compute_capability": "9.0"}
    Path("bench_results").mkdir()
    for number, backend in enumerate(("cpu", "cuda")):  # that a machine has a GPU does not say that it was used
        cuda["rows"][0]["backend"] = backend
        Path("bench_results", f"{number}.json").write_text(record.to_json(cuda))
        Path("README.md").write_text("run <!-- gpus -->\nanything\n<!-- /gpus --> today\n")
        assert run("readme").exit_code == 0
        says = ("on no GPU yet", "on NVIDIA H200 (9.0; 2027-01-02)")[number]
        assert Path("README.md").read_text() == f"run <!-- gpus -->{says}<!-- /gpus --> today\n"


def test_spots_are_256_elements_also_of_narrow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        spot_checks,
        "_compare",
        lambda inputs, part, index, *rest: seen.extend(a.size for n, a in part.arrays.items() if n in index) or 0.0,
    )
    layer = layers.parse("deform_conv2d", "N=1,C=4,H=40,W=40,O=2,kernel=1x1")
    spot_checks.check_spots(make_inputs(layer, "random", "float32", 0), "cpu", "backward", 0)
    assert min(seen) >= 256
