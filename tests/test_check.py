"""dcn-check: what it finds, what it must not overlook, and how it ends."""

from __future__ import annotations

import csv
import functools
import inspect
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import invoked, one_line
from dcn_kernels.cli.check import main

import dcn_kernels.cpu.deform_conv as cpu_deform_conv
from dcn_kernels.check import calls, planted_faults
from dcn_kernels.check import gradients as gradcheck
from dcn_kernels.dtypes import DTYPES
from dcn_kernels.environment import why_not
from dcn_kernels.ops.registry import OPS

run = functools.partial(invoked, main)


# ---------------------------------------------------------------- what it finds


def test_every_argument_has_a_row_that_passes() -> None:
    rows = list(gradcheck.check_gradients(dtypes=("float64",), backends=("reference",)))
    assert {(row.op, row.argument) for row in rows} == {(op.name, a) for op in OPS.values() for a in op.differentiable}
    assert [row for row in rows if row.status != "PASS"] == []
    for row in rows:
        assert {"differences", "reference", "repeat"} <= set(row.checks), row


def test_three_independent_checks_catch_every_planted_bug() -> None:
    ops = ("deform_conv2d", "offset_sample2d")
    tests = list(planted_faults.self_test(ops=ops, dtypes=("float64",), backends=("reference",)))
    assert {t.fault for t in tests} == set(planted_faults.FAULTS)
    assert len(tests) == len(planted_faults.FAULTS) * sum(len(OPS[name].differentiable) for name in ops)
    seen = [t for t in tests if t.status != "SKIP"]
    swapped = {(t.op, t.argument) for t in seen if t.fault == "x and y swapped"}
    assert swapped == {(name, "offset") for name in ops}
    assert all(t.reason and not t.caught_by for t in tests if t.status == "SKIP")
    for t in seen:
        assert {"differences"} <= set(t.caught_by), t  # by itself, without believing the reference
        if t.argument in ("input", "weight", "bias", "mask"):
            assert "adjoint" in t.caught_by, t


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_planted_bugs_are_caught_in_lower_precision(dtype: str) -> None:
    tests = list(planted_faults.self_test(ops=("deform_conv2d",), dtypes=(dtype,), backends=("cpu",)))
    assert [t for t in tests if t.status == "FAIL"] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_planted_scale_is_one_hundredth_also_in_half_precision(dtype: str) -> None:
    gradient = np.linspace(1, 2, 1000).astype(DTYPES[dtype])
    scaled = planted_faults.FAULTS["scaled by 1.01"](gradient, "N")
    assert scaled.dtype == gradient.dtype
    assert scaled.astype(float).sum() == pytest.approx(1.01 * gradient.astype(float).sum(), rel=5e-4)


def test_a_gradient_that_is_wrong_already_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_deform_conv.deform_conv2d_backward
    monkeypatch.setattr(
        cpu_deform_conv, "deform_conv2d_backward", lambda **given: {k: -v for k, v in right(**given).items()}
    )
    result = run("gradients", "--self-test", "--op", "deform_conv2d", "--arg", "bias", "--dtype", "float64", "--json")
    rows = [row for row in json.loads(result.stdout)["rows"] if row["backend"] == "cpu" and row["status"] != "SKIP"]
    assert result.exit_code == 1 and rows
    assert all(row["status"] == "FAIL" and "before anything is planted" in row["reason"] for row in rows)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda gradient, named: np.nextafter(gradient, np.inf), "not caught"),
        (lambda gradient, named: gradient, "changed no gradient"),
    ],
)
def test_an_uncaught_fault_fails_the_self_test(monkeypatch: pytest.MonkeyPatch, fault: Any, says: str) -> None:
    monkeypatch.setitem(planted_faults.FAULTS, "zeroed", fault)
    result = run("gradients", "--self-test", "--op", "offset_sample2d", "--dtype", "float64", "--backend", "reference")
    assert result.exit_code == 1 and result.stdout.count(says) == 2


def test_a_gradient_scaled_from_outside_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_deform_conv.deform_conv2d_backward

    def scaled(*args: Any, **kwargs: Any) -> dict[str, Any]:
        grads = right(*args, **kwargs)
        grads["weight"] = grads["weight"] * np.asarray(1.01, grads["weight"].dtype) if "weight" in grads else None
        return {name: array for name, array in grads.items() if array is not None}

    monkeypatch.setattr(cpu_deform_conv, "deform_conv2d_backward", scaled)
    result = run("gradients", "--op", "deform_conv2d", "--backend", "cpu", "--dtype", "float32", "--json")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)["rows"]
    assert [row["argument"] for row in rows if row["status"] == "FAIL"] == ["weight"]
    failed = next(row for row in rows if row["status"] == "FAIL")
    assert failed["analytic"] == pytest.approx(1.01 * failed["numeric"], rel=1e-3)
    assert "--op deform_conv2d --arg weight --dtype float32 --backend cpu" in result.stderr
    again = run(*failed["command"].split()[1:])  # the command that it prints runs that row alone
    assert again.exit_code == 1 and again.stdout.count("deform_conv2d") == 1


def test_a_row_is_the_same_alone_and_in_the_table() -> None:
    selection: dict[str, Any] = {"ops": ("deform_conv2d",), "dtypes": ("float32",), "backends": ("cpu",)}
    for row in gradcheck.check_gradients(**selection):
        assert list(gradcheck.check_gradients(**selection, arguments=(row.argument,))) == [row]


def test_the_other_one_sided_value_fails_on_the_kinks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_deform_conv.deform_conv2d_backward

    def flat_at_minus_one(*args: Any, **kwargs: Any) -> dict[str, Any]:
        grads = right(*args, **kwargs)
        if not kwargs["offset"].any():  # offset 0 with padding 1: what mmcv and paddle give
            grads["offset"][:, 0:6:2, 0] = 0
        return grads

    monkeypatch.setattr(cpu_deform_conv, "deform_conv2d_backward", flat_at_minus_one)
    (row,) = gradcheck.check_gradients(
        ops=("deform_conv2d",), arguments=("offset",), dtypes=("float64",), backends=("cpu",)
    )
    assert (row.status, row.check, row.case) == ("FAIL", "kink", "kink: zeros, offset 0")


def test_full_mode_finds_an_element_in_the_last_corner(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["offset_sample2d"]
    case = next(gradcheck.all_cases(op, "float64", 0))
    gradient = calls.backward(op, case.sample, "reference", case.grad_output)["offset"]
    gradient[-1, -1, -1, -1] += 1e-6
    found = case.check_differences("reference", "offset", gradient, seed=0, elements=None, directions=0)
    assert found.ratio > 1 and found.index == tuple(n - 1 for n in gradient.shape)
    assert found.analytic is not None and found.numeric is not None
    assert found.analytic - found.numeric == pytest.approx(1e-6, rel=1e-3)


def test_an_operator_that_raises_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("of the kernel")

    monkeypatch.setattr(cpu_deform_conv, "deform_conv2d_backward", raises)
    result = run("gradients", "--op", "deform_conv2d", "--backend", "cpu", "--dtype", "float64")
    assert result.exit_code == 1 and "ZeroDivisionError: of the kernel" in result.stdout


def test_a_backend_that_fails_to_import_is_no_operator_that_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["offset_sample2d"]
    assert gradcheck.not_written(op, "cpu") == ""
    monkeypatch.setitem(sys.modules, "dcn_kernels.cpu.sampling", None)  # what this kernel is built on
    monkeypatch.delitem(sys.modules, "dcn_kernels.cpu.offset_sample")
    result = run("gradients", "--op", op.name, "--backend", "cpu", "--backend", "reference", "--dtype", "float64")
    assert result.exit_code == 1 and "2 pass, 2 fail, 0 skip" in result.stdout and "ModuleNotFound" in result.stdout
    monkeypatch.undo()
    assert "has no offset_sample3d" in gradcheck.not_written(replace(op, name="offset_sample3d"), "cpu")
    assert "there is no dcn_kernels.cpu.none" in gradcheck.not_written(replace(op, module="none"), "cpu")


def test_a_backend_that_disagrees_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("backends", "--op", "deform_conv2d", "--dtype", "float32", "--backend", "cpu")
    assert run(*arguments).exit_code == 0
    right = cpu_deform_conv.deform_conv2d

    def shifted(*args: Any, **kwargs: Any) -> Any:
        return np.roll(right(*args, **kwargs), 1, axis=-1)

    monkeypatch.setattr(cpu_deform_conv, "deform_conv2d", shifted)
    result = run(*arguments, "--json")
    assert result.exit_code == 1
    assert [r["argument"] for r in json.loads(result.stdout)["rows"] if r["status"] == "FAIL"] == ["output"]


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([np.nan], [np.nan], 0.0),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([1.0], [np.nan], np.inf),
        ([1e-30], [0.0], np.inf),
        ([np.inf], [1.0], np.inf),
        ([0.0, 2.2], [0.0, 2.0], 0.1),
    ],
)
def test_relative_error(got: list[float], want: list[float], error: float) -> None:
    assert calls.relative_error(np.array(got), np.array(want))[0] == pytest.approx(error)


# ---------------------------------------------------------------- how it ends


def test_json_is_all_that_json_prints() -> None:
    result = run("gradients", "--op", "offset_sample2d", "--dtype", "float64", "--backend", "reference", "--json")
    read = json.loads(result.stdout)
    assert result.exit_code == 0 and read["summary"] == {"pass": 2, "fail": 0, "skip": 0}


@pytest.mark.parametrize("suffix", [".json", ".csv", ".md"])
def test_output_picks_the_format_by_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    result = run(
        "gradients", "--op", "offset_sample2d", "--dtype", "float64", "--backend", "reference", "--output", str(path)
    )
    assert result.exit_code == 0
    text = path.read_text()
    if suffix == ".json":
        assert len(json.loads(text)["rows"]) == 2
    elif suffix == ".csv":
        assert len(list(csv.DictReader(text.splitlines()))) == 2
    else:
        assert text.count("\n") == 4 and text.startswith("| operator |")


def test_wrong_usage_is_one_line_and_2(tmp_path: Path) -> None:
    assert "deform_conv2d" in one_line(run("gradients", "--op", "convolution"), 2)
    assert "offset" in one_line(run("gradients", "--arg", "stride"), 2)
    assert ".json" in one_line(run("gradients", "--output", str(tmp_path / "table.xls")), 2)
    assert "no folder" in one_line(run("gradients", "--output", str(tmp_path / "none" / "t.json")), 2)
    assert "'int8' is not one of" in one_line(run("gradients", "--dtype", "int8"), 2)
    assert "'slow' is not one of" in one_line(run("gradients", "--mode", "slow"), 2)
    assert "No such option '--modes'" in one_line(run("gradients", "--modes", "fast"), 2)
    assert "--seed" in one_line(run("gradients", "--seed", "-1"), 2)
    assert "no --mode full" in one_line(run("gradients", "--self-test", "--mode", "full"), 2)
    assert "such as sm_90" in one_line(run("kernels", "--arch", "hopper"), 2)
    assert "No such command 'gradient'" in one_line(run("gradient"), 2)
    assert run().exit_code == 2  # the help, on stderr


def test_nothing_run_is_not_0() -> None:
    result = run("gradients", "--op", "offset_sample2d", "--arg", "weight", "--backend", "reference")
    assert result.exit_code == 1 and "nothing was checked" in result.stderr
    assert run("backends", "--backend", "reference").exit_code == 1


@pytest.mark.skipif(not why_not("cuda"), reason="a GPU is there")
def test_a_backend_that_is_not_there_is_3() -> None:
    for command in ("gradients", "backends"):
        assert "cuda is not available" in one_line(run(command, "--backend", "cuda"), 3)


def test_ctrl_c_shows_what_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradcheck.check_gradients

    def interrupted(**arguments: Any) -> Any:
        yield next(right(**arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(gradcheck, "check_gradients", interrupted)
    result = run("gradients", "--op", "offset_sample2d", "--dtype", "float64", "--backend", "reference", "--json")
    assert result.exit_code == 130 and len(json.loads(result.stdout)["rows"]) == 1


def test_ctrl_c_anywhere_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcn_kernels.environment.why_not", interrupted)
    result = run("gradients", "--backend", "cpu")
    assert result.exit_code == 130 and result.stderr.strip() == "warning: interrupted"


def test_what_was_asked_to_be_saved_is_saved_also_if_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*arguments: Any, **options: Any) -> None:
        raise SystemExit(1)  # what rich makes of a broken pipe

    monkeypatch.setattr("dcn_kernels.cli.console.table", closed)
    path = tmp_path / "table.json"
    run("gradients", "--op", "offset_sample2d", "--dtype", "float64", "--backend", "reference", "--output", str(path))
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_numbers_that_json_has_not_are_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = cpu_deform_conv.deform_conv2d_backward

    def undefined(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: array * np.nan for name, array in right(*args, **kwargs).items()}

    monkeypatch.setattr(cpu_deform_conv, "deform_conv2d_backward", undefined)
    path = tmp_path / "table.json"
    selection = ("--op", "deform_conv2d", "--arg", "bias", "--dtype", "float64", "--backend", "cpu")
    result = run("gradients", *selection, "--json", "--output", str(path))
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["status"], row["error"], row["analytic"]) == ("FAIL", None, None)
    assert json.loads(path.read_text()) == json.loads(result.stdout)


# ---------------------------------------------------------------- kernels


def kernel(spill: int) -> dict[str, Any]:
    return {
        "kernel": "k", "dtype": "float32", "flags": ["a=1"], "arch": "sm_90", "registers": 32, "spill_bytes": spill,
        "shared_bytes": 0, "stack_bytes": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "code"), [([kernel(0)], 0), ([kernel(0), kernel(8)], 1), ([], 1)])
def test_a_spill_fails_the_kernels(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], code: int) -> None:
    from dcn_kernels.cuda import compile as cuda_compile

    asked: list[Any] = []
    monkeypatch.setattr(cuda_compile, "check_kernels", lambda archs, progress: asked.append(archs) or rows)
    result = run("kernels", "--arch", "sm_80", "--arch", "sm_90", "--json")
    assert result.exit_code == code and asked == [("sm_80", "sm_90")]
    assert json.loads(result.stdout) == rows


def test_no_compiler_is_3_and_a_compile_error_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from dcn_kernels.cuda import compile as cuda_compile

    for error, code in ((cuda_compile.CompilerNotFound("NVRTC"), 3), (cuda_compile.CompileError("line 3"), 1)):

        def raises(archs: Any, progress: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(cuda_compile, "check_kernels", raises)
        assert str(error) in one_line(run("kernels"), code)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("module", ["check", "bench"])
def test_help_imports_no_compiler_and_every_command_has_an_example(module: str) -> None:
    code = (
        f"import sys\nfrom dcn_kernels.cli.{module} import main\n"
        "heavy = {'numba', 'cupy', 'rich', 'matplotlib', 'scipy', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all('Example' in command.help for command in [main, *main.commands.values()])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["check", "bench"])
def test_examples_of_the_help_are_commands(module: str) -> None:
    """Each can be pasted: its command, options and their values exist."""
    group = import_module(f"dcn_kernels.cli.{module}").main
    seen = 0
    for name, command in [("", group), *group.commands.items()]:
        text = inspect.cleandoc(command.help or "").replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith(f"dcn-{module} ")]
        assert lines, name
        for line in lines:
            words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
            with group.commands[words[0]].make_context(words[0], words[1:]):
                seen += 1
    assert seen > 5
