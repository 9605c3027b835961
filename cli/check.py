"""`dcn-check`: are the gradients right, do the backends agree, also on drawn calls, do the CUDA kernels compile."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from dcn_kernels.cli import console

BACKENDS = ("reference", "cpu", "cuda")
DTYPES = ("float16", "bfloat16", "float32", "float64")
SUFFIXES = (".json", ".csv", ".md", ".txt")


@click.group(cls=console.Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dcn-kernels")
def main() -> None:
    """Check gradients, backends and kernels. Results go to stdout, progress and warnings to stderr.

    Exit codes: 0 all passed, 1 a check failed, 2 wrong usage, 3 a backend that was asked for is not available.
    Nothing run is never 0.

    \b
    Examples:
      dcn-check gradients
      dcn-check gradients --op deform_conv2d --arg offset --dtype float64 --mode full
      dcn-check gradients --self-test
      dcn-check backends --json
      dcn-check kernels --arch sm_90
      dcn-check fuzz --seconds 600 --guard
      eval "$(_DCN_CHECK_COMPLETE=bash_source dcn-check)"   # completion (also zsh_source, fish_source)
    """


def _selection(command: Any) -> Any:
    for option in reversed(
        [
            click.option("--op", "ops", multiple=True, metavar="NAME", help="Operator; repeatable. Default: all."),
            click.option(
                "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Repeatable. Default: all."
            ),
            click.option(
                "--backend",
                "backends",
                multiple=True,
                type=click.Choice(BACKENDS),
                help="Repeatable. Default: all that are available.",
            ),
            click.option(
                "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of cases and directions."
            ),
            click.option("--json", "as_json", is_flag=True, help="Print only JSON."),
            console.WIDE,
            click.option("--output", metavar="FILE", help="Also write the table to FILE (.json, .csv, .md or .txt)."),
        ]
    ):
        command = option(command)
    return command


def _checked(ops: Sequence[str], backends: Sequence[str], output: str | None) -> tuple[str, ...]:
    """The backends to run; refuses unknown operators, unavailable backends and unwritable files."""
    from dcn_kernels.environment import available, why_not
    from dcn_kernels.ops.registry import OPS

    for name in ops:
        if name not in OPS:
            console.fail(f"--op: no operator {name!r}; there are: {', '.join(OPS)}")
    if output:
        if Path(output).suffix not in SUFFIXES:
            console.fail(f"--output: expected a name that ends in {', '.join(SUFFIXES)}, got {output!r}")
        console.check_writable(output)
    for backend in backends:
        reason = why_not(backend)
        if reason:
            console.fail(f"backend {backend} is not available: {reason}", console.UNAVAILABLE)
    return tuple(backends) or available()


@main.command()
@_selection
@click.option("--arg", "arguments", multiple=True, metavar="NAME", help="Argument, such as offset; repeatable.")
@click.option(
    "--mode",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="Central differences along a few elements and directions, or along every element.",
)
@click.option(
    "--self-test",
    is_flag=True,
    help="Break each gradient on purpose and report whether that is noticed; a fault that is not fails.",
)
def gradients(
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    backends: tuple[str, ...],
    seed: int,
    as_json: bool,
    wide: bool,
    output: str | None,
    arguments: tuple[str, ...],
    mode: str,
    self_test: bool,
) -> None:
    """Check each backward against its own forward and against the float64 reference.

    A row is an operator, an argument, a dtype and a backend. Its checks: central differences of the backend's own
    forward (float32 and float64), the reference's gradient, the adjoint identity where the operator is affine in the
    argument, equality of two runs, and the documented one-sided values on pixel lines. Errors are relative to the
    gradient's largest element. A failed row prints the command that runs it alone.

    \b
    Examples:
      dcn-check gradients
      dcn-check gradients --op deform_conv2d --arg offset --dtype float64 --mode full
      dcn-check gradients --backend cpu --json
      dcn-check gradients --self-test --backend cpu
    """
    from dcn_kernels.check import gradients as gradcheck
    from dcn_kernels.check import planted_faults
    from dcn_kernels.ops.registry import OPS

    chosen = _checked(ops, backends, output)
    known = {name for op in OPS.values() for name in op.differentiable}
    for name in arguments:
        if name not in known:
            console.fail(f"--arg: no differentiable argument {name!r}; there are: {', '.join(sorted(known))}")
    if self_test and mode != "fast":
        console.fail("--self-test has no --mode full: a fault must show in the fast checks")
    common: dict[str, Any] = {
        "ops": ops, "arguments": arguments, "dtypes": dtypes or DTYPES, "backends": chosen, "seed": seed,
    }  # fmt: skip
    rows: list[Any] = []
    with console.progress("self-test" if self_test else "gradients") as report:
        table: Iterable[Any]
        if self_test:
            table = planted_faults.self_test(**common, progress=report)
        else:
            table = gradcheck.check_gradients(**common, mode=mode, progress=report)
        interrupted = console.until_interrupted(table, rows)
    if self_test:
        names = ("op", "argument", "dtype", "backend", "fault", "status")
        shown = [[*(getattr(row, name) for name in names), ", ".join(row.caught_by) or row.reason] for row in rows]
        columns = ["operator", "argument", "dtype", "backend", "planted fault", "status", "caught by"]
    else:
        shown, columns = [_cells(row) for row in rows], list(_COLUMNS)
    _finish(
        rows, columns, shown, as_json, wide, output, interrupted, {"mode": mode, "seed": seed, "self_test": self_test}
    )


_WHICH = ("operator", "argument", "result", "dtype", "backend", "planted fault")
_LONG = ("worst check", "worst case", "planted fault", "caught by")
_COLUMNS = (
    "operator", "argument", "dtype", "backend", "status", "error", "tolerance", "worst index", "analytic", "numeric",
    "worst check",
)  # fmt: skip


def _cells(row: Any) -> list[str]:
    reason = row.reason if row.status != "PASS" else f"{row.check}: {row.case}"
    index = "(" + ", ".join(map(str, row.index)) + ")" if row.index else ""
    return [
        row.op, row.argument, row.dtype, row.backend, row.status, console.number(row.error, 2),
        console.number(row.tolerance, 2), index, console.number(row.analytic, 6), console.number(row.numeric, 6),
        reason,
    ]  # fmt: skip


@main.command()
@_selection
def backends(
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    backends: tuple[str, ...],
    seed: int,
    as_json: bool,
    wide: bool,
    output: str | None,
) -> None:
    """Run every available backend on the same inputs and compare outputs and gradients with the reference's.

    \b
    Examples:
      dcn-check backends
      dcn-check backends --op deform_conv2d --dtype bfloat16 --backend cpu
    """
    from dcn_kernels.check import gradients as gradcheck

    chosen = _checked(ops, backends, output)
    rows: list[Any] = []
    with console.progress("backends") as report:
        table = gradcheck.check_backends(ops=ops, dtypes=dtypes or DTYPES, backends=chosen, seed=seed, progress=report)
        interrupted = console.until_interrupted(table, rows)
    columns = ["operator", "result", *_COLUMNS[2:7], "worst index", "got", "reference", "worst case"]
    _finish(rows, columns, [_cells(row) for row in rows], as_json, wide, output, interrupted, {"seed": seed})


def _finish(
    rows: list[Any],
    columns: list[str],
    shown: list[list[str]],
    as_json: bool,
    wide: bool,
    output: str | None,
    interrupted: bool,
    settings: dict[str, Any],
) -> None:
    """Show and save a table, say how it went, and leave with the exit code."""
    counts = Counter(row.status for row in rows)
    summary = {status.lower(): counts[status] for status in ("PASS", "FAIL", "SKIP")}
    text = console.as_json({"summary": summary, "settings": settings, "rows": [asdict(row) for row in rows]})
    if output:  # before anything is shown: whoever reads stdout may have gone
        console.write(output, _formatted(Path(output).suffix, text, columns, shown))
    if as_json:
        console.say(text)
    else:
        right = ("error", "tolerance", "analytic", "numeric", "got", "reference")
        first = (*(c for c in columns if c in _WHICH), "status", *right[:2])
        console.table("", columns, shown, right, first=first, folded=[c for c in columns if c in _LONG], wide=wide)
        console.say(", ".join(f"{count} {status}" for status, count in summary.items()))
    for row in rows:
        if row.status == "FAIL" and getattr(row, "command", ""):
            console.note(f"failed: {row.command}", command=True)
    if interrupted:
        console.warn("interrupted: the table holds what was checked until then")
        raise SystemExit(console.INTERRUPTED)
    if counts["FAIL"]:
        raise SystemExit(console.FAILED)
    if not counts["PASS"]:
        console.fail("nothing was checked", console.FAILED)


def _formatted(suffix: str, text: str, columns: list[str], shown: list[list[str]]) -> str:
    if suffix == ".json":
        return text + "\n"
    if suffix == ".csv":
        buffer = io.StringIO()
        csv.writer(buffer).writerows([columns, *shown])
        return buffer.getvalue()
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in shown]  # an error may have lines
    lines = ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *cells]]
    return "\n".join(lines) + "\n"


@main.command()
@click.option(
    "--arch", "archs", multiple=True, metavar="sm_NN", help="GPU architecture; repeatable. Default: all known."
)
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@click.option("--detail", is_flag=True, help="Read the machine code too (nvdisasm).")
@console.WIDE
def kernels(archs: tuple[str, ...], as_json: bool, detail: bool, wide: bool) -> None:
    """Compile every CUDA kernel with NVRTC and list its registers, spills and memory. Needs no GPU.

    With --detail also the blocks that a multiprocessor holds and, of the main loop, the instructions counted in the
    machine code, the cycles that each unit takes for them by estimate, and the unit that bounds it.

    Exit codes: 0 all compile without a spill, 1 otherwise, 3 NVRTC or, with --detail, nvdisasm is not installed.

    \b
    Examples:
      dcn-check kernels
      dcn-check kernels --arch sm_80 --arch sm_90
      dcn-check kernels --arch sm_90 --detail
    """
    from dcn_kernels.check import machine_code
    from dcn_kernels.cuda import compile as cuda_compile

    for arch in archs:
        if not re.fullmatch(r"sm_\d{2,3}[a-z]?", arch):
            console.fail(f"--arch: expected a name such as sm_90, got {arch!r}")
    with console.progress("kernels") as report:

        def show(done: int, total: int, what: str) -> None:
            report(what, done, total)

        try:
            check = machine_code.check_machine_code if detail else cuda_compile.check_kernels
            rows = check(archs or cuda_compile.ARCHS, show)
        except (cuda_compile.CompilerNotFound, machine_code.DisassemblerNotFound) as error:
            console.fail(str(error), console.UNAVAILABLE)
        except cuda_compile.CompileError as error:
            console.fail(str(error), console.FAILED)
    columns: tuple[str, ...] = ("kernel", "dtype", "flags", "arch")
    numbers: tuple[str, ...] = ("registers", "spill_bytes", "shared_bytes", "stack_bytes")
    numbers += ("threads", "blocks") if detail else ()
    columns += (*numbers, *(("bound", "cycles", "loop") if detail else ()))
    if as_json:
        console.say_json(rows)
    else:
        cells = [[_shown(row[column]) for column in columns] for row in rows]
        folded = [c for c in columns if c in ("flags", "cycles", "loop")]
        first = [c for c in columns if c not in folded]
        console.table("", columns, cells, numbers, first=first, folded=folded, wide=wide)
    spills = [row for row in rows if row["spill_bytes"]]
    for row in spills:
        console.note(f"{row['kernel']} {row['dtype']} {row['arch']}: spills {row['spill_bytes']} bytes of registers")
    if not rows:
        console.fail("no kernel was compiled", console.FAILED)
    if spills:
        raise SystemExit(console.FAILED)


def _shown(value: object) -> str:
    """A cell of the table of kernels."""
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)


@main.command()
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Operator; repeatable. Default: all.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    help="Repeatable. Default: all that are available but the reference.",
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Where to stop. Default: 60, without --count.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Stop after so many calls.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
@click.option(
    "--values",
    type=click.Choice(["all", "finite"]),
    default="all",
    show_default=True,
    help="Whether arrays hold infinities and NaN now and then, or only zeros, denormal and huge numbers.",
)
@click.option("--guard", is_flag=True, help="Every array and buffer lies against an unreadable page (Linux, CPU).")
@click.option("--call", "recipe", metavar="JSON", help="Repeat this one call, as a failure prints it.")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@console.WIDE
@click.option("--output", metavar="FILE", help="Also write the table to FILE (.json, .csv, .md or .txt).")
def fuzz(
    ops: tuple[str, ...],
    backends: tuple[str, ...],
    seconds: float | None,
    count: int | None,
    seed: int,
    values: str,
    guard: bool,
    recipe: str | None,
    as_json: bool,
    wide: bool,
    output: str | None,
) -> None:
    """Draw calls of every operator over all its options and compare them with the reference.

    Drawn are sizes, options, dtypes, memory layouts and values: zeros, denormal and huge numbers, infinities and NaN
    in every array. Wrong is a result that differs from the reference's by more than `backends` allows or is not finite
    elsewhere, other bits at another number of threads, an input that was written to, and with --guard any access
    outside an array. A failure is made smaller and printed with the command that repeats it. The table says how often
    each option was drawn.

    \b
    Examples:
      dcn-check fuzz
      dcn-check fuzz --op deform_conv2d --backend cpu --seconds 600 --seed 7
      dcn-check fuzz --guard --values finite --count 10000 --output fuzz.md
    """
    from dcn_kernels.check import fuzz as fuzzing
    from dcn_kernels.check import guard as guarding

    if recipe is not None and (ops or seconds or count):
        console.fail("--call is one call: expected no --op, --seconds or --count beside it")
    chosen = _checked(ops, backends, output)
    chosen = chosen if backends else tuple(name for name in chosen if name != "reference")
    if guard:
        if "cuda" in chosen:
            console.fail("--guard is about the memory of the CPU: expected no --backend cuda beside it")
        if guarding.why_not():
            console.fail(f"--guard: {guarding.why_not()}", console.UNAVAILABLE)
    settings: dict[str, Any] = {"backends": chosen, "seed": seed, "values": values, "guard": guard}
    summary, interrupted = fuzzing.Summary(), False
    with console.progress("fuzz") as report:
        try:
            if recipe is not None:
                _repeat(summary, recipe, chosen, guard)
            else:
                fuzzing.fuzz(
                    summary, ops=ops, backends=chosen, seconds=60.0 if seconds is None and count is None else seconds,
                    calls=count, seed=seed, values=values, guarded=guard, progress=report,
                )  # fmt: skip
        except KeyboardInterrupt:
            interrupted = True
    _finish_fuzz(summary, settings, as_json, wide, output, interrupted)


def _repeat(summary: Any, text: str, backends: tuple[str, ...], guard: bool) -> None:
    """One call again, on each backend."""
    import json

    from dcn_kernels.check import fuzz as fuzzing
    from dcn_kernels.check.drawn_calls import repeated

    try:
        call = repeated(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        console.fail(f"--call: expected the JSON that a failure printed, got {text!r}: {error}")
    for backend in backends:
        found = fuzzing.repeat(call.recipe, backend, guarded=guard)
        summary.count(call)
        if found:
            line = fuzzing.command(call.recipe, backend, guard)
            summary.failures.append(
                fuzzing.Failure(call.op.name, backend, found[0], found[1], call.recipe, line, found[2])
            )


def _finish_fuzz(
    summary: Any, settings: dict[str, Any], as_json: bool, wide: bool, output: str | None, interrupted: bool
) -> None:
    """Show and save what was drawn and what failed, and leave with the exit code."""
    columns = ["operator", "drawn", "option", "how often"]
    shown = []
    for (op, option), counter in sorted(summary.options.items(), key=lambda item: item[0]):
        shown.append([op, str(summary.operators[op]), option, _counted(counter)])
    numbers = {
        "calls": summary.calls, "drawn": summary.drawn, "seconds": summary.seconds, "failures": len(summary.failures),
    }  # fmt: skip
    rows = [dict(zip(columns, row, strict=True)) for row in shown]
    failures = [asdict(failure) for failure in summary.failures]
    text = console.as_json(
        {"summary": numbers, "settings": settings, "failures": failures, "skipped": summary.skipped, "options": rows}
    )
    if output:
        console.write(output, _formatted(Path(output).suffix, text, columns, shown))
    if as_json:
        console.say(text)
    else:
        console.table("", columns, shown, ["drawn"], first=["operator", "option", "how often"], folded=["how often"],
                      wide=wide)  # fmt: skip
        for failure in summary.failures:
            console.say(f"FAIL {failure.op} {failure.backend}: {failure.kind}: {failure.reason}")
        console.say(
            f"{summary.calls} calls of {summary.drawn} drawn in {summary.seconds:.0f} s, "
            f"{len(summary.failures)} failures"
        )
    for what, why in summary.skipped.items():
        console.note(f"left out: {what}: {why}")
    for failure in summary.failures:
        console.note(f"failed: {failure.command}", command=True)
    if interrupted:
        console.warn("interrupted: this is what was drawn until then")
        raise SystemExit(console.INTERRUPTED)
    if summary.failures:
        raise SystemExit(console.FAILED)
    if not summary.drawn:
        console.fail("nothing was called", console.FAILED)


def _counted(counter: Counter[Any]) -> str:
    """Each value and how often it was drawn; of many whole numbers, from where to where."""
    if len(counter) > 8 and all(type(value) is int for value in counter):
        return f"{min(counter)}..{max(counter)} x{counter.total()}"
    return ", ".join(f"{_plain(value)} x{number}" for value, number in sorted(counter.items(), key=lambda i: str(i[0])))


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
