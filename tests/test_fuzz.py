"""dcn-check fuzz: what it draws, that it finds faults that are there, makes them smaller and repeats them."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT
from dcn_kernels.cli.check import main

import dcn_kernels.cpu.offset_sample as cpu_offset_sample
from dcn_kernels.check import fuzz, guard
from dcn_kernels.check.drawn_calls import LAYOUTS, SPECIAL, drawn, laid, repeated
from dcn_kernels.check.planted_faults import planted
from dcn_kernels.check.wrong_calls import wrong
from dcn_kernels.dtypes import DTYPES
from dcn_kernels.environment import why_not
from dcn_kernels.ops.registry import OPS

GUARDED = pytest.mark.skipif(bool(guard.why_not()), reason=guard.why_not())


@pytest.fixture(autouse=True)
def little_time_to_make_a_failure_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SHRINKING_S", 5.0)


def run(*arguments: str) -> Result:
    """The command in this process; a traceback fails the test."""
    result = CliRunner().invoke(main, ["fuzz", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def commands(result: Result) -> list[list[str]]:
    """The arguments of the commands that repeat failures."""
    lines = [line.partition("failed: ")[2] for line in result.stderr.splitlines() if line.startswith("failed: ")]
    return [shlex.split(line)[2:] for line in lines]


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_a_call_is_the_same_again_from_its_seed_and_from_its_recipe(op: Any) -> None:
    for number in range(30):
        call = drawn(op, (0, number))
        for other in (drawn(op, (0, number)), repeated(json.loads(json.dumps(call.recipe)))):
            assert other.choices == call.choices and other.sample.params == call.sample.params
            for name, array in call.sample.arrays.items():
                assert array.tobytes() == other.sample.arrays[name].tobytes(), name


def test_every_option_that_the_samples_have_is_drawn() -> None:
    for op in OPS.values():
        wanted = {(name, str(v)) for s in op.samples(0) for name, v in s.params.items() if isinstance(v, (str, bool))}
        seen = {(name, str(v)) for n in range(150) for name, v in drawn(op, (1, n)).sample.params.items()}
        assert wanted <= seen, op.name
        present = {frozenset(s.arrays) for s in op.samples(0)}
        assert present <= {frozenset(drawn(op, (1, n)).sample.arrays) for n in range(150)}, op.name


def test_every_array_holds_every_kind_of_number_and_lies_in_every_way() -> None:
    for op in OPS.values():
        seen: set[tuple[str, str]] = set()
        for number in range(300):
            choices = drawn(op, (2, number)).choices
            seen |= {(name, str(value)) for name, value in choices.items() if name.startswith(("values.", "layout."))}
        for name in (*op.arrays, "grad_output"):
            assert {(f"values.{name}", kind) for kind in SPECIAL} <= seen
            assert {(f"layout.{name}", layout) for layout in LAYOUTS} <= seen


def test_finite_values_are_finite() -> None:
    for op in OPS.values():
        for number in range(100):
            call = drawn(op, (3, number), "finite")
            assert all(np.isfinite(a).all() for a in (call.grad_output, *call.sample.arrays.values()))


def test_a_row_that_draws_nothing_is_fuzzed_with_the_shapes_of_its_samples() -> None:
    bare = replace(OPS["roi_pool"], drawn=None)
    calls = [drawn(bare, (4, number)) for number in range(40)]
    assert {call.sample.params["mode"] for call in calls} == {"max", "avg"}
    assert len({call.dtype for call in calls}) == 4
    assert [problem for call in calls if (problem := wrong(call, "reference"))] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_hold_the_values_and_nothing_around_them(dtype: str) -> None:
    values = np.arange(24).reshape(2, 1, 3, 4).astype(DTYPES[dtype])
    seen = set()
    for layout in dict.fromkeys(LAYOUTS):
        for number in range(8):
            each = laid(values, layout, (number,))
            if layout != "broadcast":
                np.testing.assert_array_equal(each.array.astype(float), values.astype(float))
            first = each.array.ctypes.data - each.memory.ctypes.data
            assert 0 <= first < each.memory.nbytes
            seen |= {layout} if each.array.flags.c_contiguous else {f"{layout}, other strides"}
            seen |= set() if each.array.flags.aligned else {"not aligned"}
            seen |= {"negative"} if min(each.array.strides) < 0 else set()
            seen |= {"far"} if each.array.strides[1] > 1 << 32 else set()
    assert {"contiguous", "stepped, other strides", "negative", "far"} <= seen
    assert "not aligned" in seen


# ---------------------------------------------------------------- what it finds


def test_nothing_is_wrong_with_a_thousand_calls_and_the_table_says_what_they_were() -> None:
    result = run("--backend", "cpu", "--count", "1000", "--seed", "5", "--json")
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    assert found["summary"]["calls"] >= 1000 and found["failures"] == [] and found["skipped"] == {}
    rows = {(row["operator"], row["option"]): row["how often"] for row in found["options"]}
    assert {op for op, _ in rows} == set(OPS)
    for op in OPS:
        assert all(f"{kind} x" in rows[op, "values"] for kind in ("drawn", *SPECIAL))
        assert all(f"{number} x" in rows[op, "threads"] for number in (2, 3, 7))
        assert all(f"{dtype} x" in rows[op, "dtype"] for dtype in DTYPES)


@pytest.mark.parametrize(
    ("op", "argument", "fault"),
    [("deform_conv2d", "offset", "x and y swapped"), ("roi_align", "input", "scaled by 1.01")],
)
def test_a_planted_fault_is_found_made_smaller_and_repeated(op: str, argument: str, fault: str) -> None:
    with planted(OPS[op], "cpu", argument, fault):
        result = run("--op", op, "--backend", "cpu", "--count", "60", "--seed", "1")
        assert result.exit_code == 1, result.output
        (command, *_) = commands(result)
        assert f"FAIL {op} cpu: result: gradient of {argument}" in result.stdout
        again = run(*command)
        assert again.exit_code == 1 and commands(again)[0] == command
    assert run(*command).exit_code == 0  # the call alone is right
    recipe = json.loads(command[command.index("--call") + 1])
    first = next(c for n in range(100) if fuzz_fails(c := drawn(OPS[op], (1, n)), op, argument, fault))
    assert len(recipe) < len(first.recipe)
    assert repeated(recipe).sample.arrays["input"].size <= first.sample.arrays["input"].size


def fuzz_fails(call: Any, op: str, argument: str, fault: str) -> bool:
    """The planted fault shows in this call."""
    with planted(OPS[op], "cpu", argument, fault):
        return wrong(call, "cpu") is not None


@pytest.mark.parametrize(
    ("breaks", "kind"),
    [("writes to its input", "changed"), ("depends on the threads", "threads"), ("raises", "raised"),
     ("gives another dtype", "result")],
)  # fmt: skip
def test_each_kind_of_fault_is_told(monkeypatch: pytest.MonkeyPatch, breaks: str, kind: str) -> None:
    from dcn_kernels.cpu.threads import get_num_threads

    right = cpu_offset_sample.offset_sample2d

    def broken(input: np.ndarray, offset: np.ndarray, **more: Any) -> np.ndarray:
        if breaks == "raises":
            raise RuntimeError("broken")
        result = right(input=input, offset=offset, **more)
        if breaks == "writes to its input" and offset.size:
            offset[...] += offset.dtype.type(1)
        if breaks == "depends on the threads" and get_num_threads() == 3 and result.size:
            result.view(np.uint8).reshape(-1)[0] ^= 1
        return result.astype(np.float64) if breaks == "gives another dtype" else result

    monkeypatch.setattr(cpu_offset_sample, "offset_sample2d", broken)
    result = run("--op", "offset_sample2d", "--backend", "cpu", "--count", "100")
    assert result.exit_code == 1
    assert f"FAIL offset_sample2d cpu: {kind}" in result.stdout
    assert run(*commands(result)[0]).exit_code == 1


def test_other_bits_than_the_reference_at_a_nan_or_an_infinity_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN for a number, and a number for a NaN."""
    right = cpu_offset_sample.offset_sample2d

    def quiet(**arguments: Any) -> np.ndarray:
        result = right(**arguments)
        result[np.isnan(result)] = 0
        return result

    monkeypatch.setattr(cpu_offset_sample, "offset_sample2d", quiet)
    assert run("--op", "offset_sample2d", "--count", "400", "--backend", "cpu", "--values", "finite").exit_code == 0
    assert run("--op", "offset_sample2d", "--count", "400", "--backend", "cpu").exit_code == 1


# ---------------------------------------------------------------- guard pages


@GUARDED
@pytest.mark.parametrize("side", guard.SIDES)
@pytest.mark.parametrize("shape", [(3,), (5, 7), (64, 64)])
def test_an_array_lies_against_a_page_that_cannot_be_touched(side: str, shape: tuple[int, ...]) -> None:
    with guard.guarded(side):
        array = np.ones(shape, np.float32)
    for distance, ends in ((0, False), (1, True)):
        at = array.ctypes.data + (array.nbytes - 1 + distance if side == "after" else -distance)
        statuses = list(fuzz.in_child(lambda send, at=at: ctypes.string_at(at, 1) and None))
        assert [os.WTERMSIG(status) for status in statuses] == ([signal.SIGSEGV] if ends else [])


@GUARDED
@pytest.mark.parametrize("what", ["offset", "grad_offset", "index"])
@pytest.mark.parametrize("side", guard.SIDES)
def test_a_planted_access_outside_an_array_is_caught(monkeypatch: pytest.MonkeyPatch, what: str, side: str) -> None:
    """Of an input, a result and a buffer, in the backward of a call with an array as plain as possible."""
    right = cpu_offset_sample.offset_sample2d_backward

    def touch(array: np.ndarray) -> None:
        if array.size and array.flags.c_contiguous:
            padded = -(-array.nbytes // 64) * 64 if what == "index" else array.nbytes  # a buffer ends with its line
            ctypes.string_at(array.ctypes.data + (padded if side == "after" else -1), 1)

    def overrun(**arguments: Any) -> dict[str, np.ndarray]:
        if what == "offset":
            touch(arguments["offset"])
        inner = cpu_offset_sample.workspace.allocate
        if what == "index":
            monkeypatch.setattr(
                cpu_offset_sample.workspace, "allocate",
                lambda plan: (buffers := inner(plan)) and (touch(buffers["index"]), buffers)[1],
            )  # fmt: skip
        grads = right(**arguments)
        monkeypatch.setattr(cpu_offset_sample.workspace, "allocate", inner)
        if what == "grad_offset" and "offset" in grads:
            touch(grads["offset"])
        return grads

    monkeypatch.setattr(cpu_offset_sample, "offset_sample2d_backward", overrun)
    result = run("--op", "offset_sample2d", "--guard", "--count", "40", "--seconds", "60", "--seed", "2")
    assert result.exit_code == 1, result.output
    assert "FAIL offset_sample2d cpu: fault: the process ended by SIGSEGV" in result.stdout
    command = commands(result)[0]
    assert command[-1] == "--guard" and run(*command).exit_code == 1


@GUARDED
def test_guard_pages_stop_nothing_that_is_right() -> None:
    result = run("--guard", "--backend", "cpu", "--count", "600", "--seed", "3")
    assert result.exit_code == 0, result.stdout


# ---------------------------------------------------------------- how it ends


def test_wrong_usage_is_one_line_and_2() -> None:
    for arguments, says in (
        (("--op", "nothing"), "no operator 'nothing'"),
        (("--call", "{"), "--call: expected the JSON that a failure printed"),
        (("--call", '{"op": "nothing", "seed": [0]}'), "--call: expected the JSON"),
        (("--call", '{"op": "roi_pool", "seed": [0]}', "--count", "3"), "--call is one call"),
        (("--values", "odd"), "--values"),
        (("--seconds", "0"), "--seconds"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and result.stdout == "", result.output
        assert says in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(not why_not("cuda"), reason="a GPU is here")
def test_a_backend_that_is_not_there_is_3() -> None:
    assert run("--backend", "cuda").exit_code == 3


def test_the_reference_s_own_calls_are_checked_too() -> None:
    assert run("--backend", "reference", "--count", "100").exit_code == 0


@pytest.mark.parametrize("more", [(), ("--guard",)] if not guard.why_not() else [()])
def test_ctrl_c_shows_what_was_drawn_until_then(more: tuple[str, ...]) -> None:
    """A signal to the process group, as a terminal sends it."""
    code = "from dcn_kernels.cli.check import main; main(prog_name='dcn-check')"
    command = [sys.executable, "-c", code, "fuzz", "--op", "roi_pool", "--backend", "cpu", "--seconds", "300", *more]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert "calls of" in out
