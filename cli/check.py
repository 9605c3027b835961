"""`dcn-check`: are the gradients right, do the backends agree, do the CUDA kernels compile."""

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
