"""`dcn-bench`: time the operators, compare records, show what there is to compute with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from dcn_kernels.cli import console
from dcn_kernels.cli.capture import capture
from dcn_kernels.cli.cost import cost
from dcn_kernels.cli.sampling import sampling

BACKENDS = ("reference", "cpu", "cuda")
DTYPES = ("float16", "bfloat16", "float32", "float64")
RESULTS = "bench_results"  # of published records; one's own are in its folder "local", which git ignores


@click.group(cls=console.Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dcn-kernels")
def main() -> None:
    """Time the operators on the layer shapes of published networks. Results go to stdout, progress to stderr.

    Exit codes: 0 done, 1 a result was wrong or too slow, 2 wrong usage, 3 a backend or peer that was asked for
    could not run (the rest was measured and kept), 130 interrupted (what was measured is kept).

    \b
    Examples:
      dcn-bench profile
      dcn-bench profile --layer A --against torchvision=/path/to/python --output a.json
      dcn-bench compare old.json new.json
      dcn-bench plot a.json -o a.png
      dcn-bench report a.json -o a.html
      eval "$(_DCN_BENCH_COMPLETE=bash_source dcn-bench)"   # completion (also zsh_source, fish_source)
    """


@main.command()
@click.option("--layer", "names", multiple=True, metavar="NAME", help="Named layer; repeatable (see dcn-bench layers).")
@click.option("--list", "only_list", is_flag=True, help="List what would be run, and stop.")
@click.option("--filter", "pattern", metavar="REGEX", help="Only layers whose name matches.")
@click.option("--shape", "shapes", multiple=True, metavar="SIZES", help="A layer of your own: N=1,C=64,H=56,W=56,O=64,"
              "kernel=3x3 or NxCxHxW:O:KHxKW, as in 1x64x56x56:64:3x3,padding=1; repeatable.")  # fmt: skip
@click.option("--shapes", "toml", metavar="FILE", help="Layers of a TOML file, tables [layers.NAME] with op and its "
              "sizes, or with sizes as --shape takes them: all, or those named by --layer.")  # fmt: skip
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Only this operator; repeatable. Of --shape: its.")
@click.option("--direction", "directions", multiple=True, type=click.Choice(["forward", "backward"]),
              help="Default: both.")  # fmt: skip
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help="Default: cuda if any, else cpu."
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Default: float32.")
@click.option("--threads", type=click.IntRange(1), multiple=True, help="Of the CPU backend and peers; repeatable.")
@click.option(
    "--offsets",
    multiple=True,
    type=click.Choice(["zero", "smooth", "random"]),
    help="How sampling points wander; repeatable. Default: smooth and random.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the arrays.")
@click.option(
    "--budget", default=0.2, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds a row."
)
@click.option(
    "--reuse", is_flag=True, help="Forward into one array (out=), backward with what a forward kept (argmax=)."
)
@click.option("--against", "peers", multiple=True, metavar="NAME[=PYTHON]", help="A peer library; repeatable.")
@click.option("--json", "shape_of_output", flag_value="json", help="Print only the record.")
@click.option("--csv", "shape_of_output", flag_value="csv", help="Print only CSV.")
@click.option("--markdown", "shape_of_output", flag_value="md", help="Print only Markdown.")
@click.option("--output", metavar="FILE", help="Save to FILE (.json, .csv or .md) in place of bench_results/local/.")
@click.option("--publish", is_flag=True, help="Save the record among the published ones, in bench_results/.")
@console.WIDE
@click.option("--no-save", is_flag=True, help="Save no record where there is no --output.")
def profile(
    names: tuple[str, ...],
    only_list: bool,
    pattern: str | None,
    shapes: tuple[str, ...],
    toml: str | None,
    ops: tuple[str, ...],
    directions: tuple[str, ...],
    backends: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    offsets: tuple[str, ...],
    seed: int,
    budget: float,
    reuse: bool,
    peers: tuple[str, ...],
    shape_of_output: str | None,
    output: str | None,
    publish: bool,
    wide: bool,
    no_save: bool,
) -> None:
    """Check and time operators on layer shapes; the record goes to bench_results/local/ or to --output.

    Every result is compared with the reference before it is timed. A peer runs in a process of its own, in the
    interpreter given, on the same arrays and device, in rounds between ours; peers: torchvision, torch (its plain
    conv2d), onnxruntime, openvino, paddle, mxnet; mmcv and tvdcn are written for but were not tried.

    Two columns tell what deforming costs. "x conv GEMM": our time over that of the matrix product alone of a plain
    convolution of the same shape, in this machine's fastest BLAS. "plain conv2d by torch" (--against torch): the time
    of a whole plain convolution, and in brackets as a multiple of ours, as for every peer: above 1 we are faster.

    \b
    Examples:
      dcn-bench profile
      dcn-bench profile --layer A --layer D --direction forward --threads 1 --threads 2
      dcn-bench profile --shape N=1,C=64,H=56,W=56,O=64,kernel=3x3,padding=1 --offsets zero
      dcn-bench profile --against torchvision=/path/to/venv/bin/python --against torch=/path/to/venv/bin/python
      dcn-bench profile --filter '^resnet' --csv --no-save > rows.csv
    """
    from dcn_kernels.bench import inputs, profiling, record, spot_checks
    from dcn_kernels.environment import available, blas, why_not
    from dcn_kernels.ops.registry import OPS

    chosen = _chosen_layers(names, pattern, shapes, toml, ops)
    if only_list:
        _alone("--list", "names", "only_list", "pattern", "shapes", "toml", "ops", "wide")
        _list_layers(chosen, wide)
        return
    if (bool(output), publish, no_save).count(True) > 1:
        console.fail("--output, --publish and --no-save: expected one of them")
    for option, values in (("layer", names), ("op", ops), ("direction", directions), ("backend", backends),
                           ("dtype", dtypes), ("threads", threads), ("offsets", offsets)):  # fmt: skip
        for value in values:
            if values.count(value) > 1:
                console.fail(f"--{option}: {value} is named twice")
    if offsets and not any(OPS[layer["op"]].has_offsets for layer in chosen.values()):
        console.fail("--offsets: none of the operators has offsets")
    if output and Path(output).suffix not in record.FORMATS:
        console.fail(f"--output: expected a name that ends in {', '.join(record.FORMATS)}, got {output!r}")
    if output:
        console.check_writable(output)
    elif not no_save:
        _results_folder(publish)
    backends = backends or (("cuda",) if "cuda" in available() else ("cpu",))
    for backend in backends:
        reason = why_not(backend)
        if reason:
            console.fail(f"backend {backend} is not available: {reason}", console.UNAVAILABLE)
    if threads and "cpu" not in backends and not peers:
        console.fail("--threads: expected the CPU backend or a peer")
    _refuse_what_memory_does_not_hold(chosen, dtypes)
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    interrupted = False
    failure = ""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    warned: set[str] = set()

    def warn(message: str) -> None:
        if message not in warned:  # that a peer has no backward is said once, not for every row
            warned.add(message)
            console.warn(message)

    settings = profiling.Settings(
        directions or inputs.DIRECTIONS, dtypes or ("float32",), backends, offsets or ("smooth", "random"),
        None, seed, budget, reuse,
    )  # fmt: skip

    def measured() -> Iterator[dict[str, Any]]:
        for count in threads or (None,):
            with console.progress("profile") as report, _running(peers, count, versions) as running:
                yield from profiling.profile(chosen, replace(settings, threads=count), running, report, warn)

    try:
        interrupted = console.until_interrupted(measured(), rows)
    except spot_checks.Mismatch as error:
        failure = f"wrong result, not timed: {error}"
    except MemoryError as error:
        failure = f"a layer does not fit into memory: {error}"
    except Exception as error:  # of an operator or of the machine: what was measured is kept
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
    stated = {**asdict(settings), "threads": list(threads) or [row["threads"] for row in rows[:1]], "blas": blas(),
              "load": load}  # fmt: skip
    if rows:
        profiling.best_ceilings(rows)
        _finish_profile(record.make(rows, stated, versions), shape_of_output, output, publish, no_save, wide)
    if interrupted:
        console.warn("interrupted: what was measured until then is kept")
        raise SystemExit(console.INTERRUPTED)
    if failure:
        console.fail(failure, console.FAILED)
    if not rows:
        console.fail("nothing was measured", console.FAILED)
    ran = {name for row in rows for name in row["against"]}
    if idle := [name for name in dict.fromkeys(spec.partition("=")[0] for spec in peers) if name not in ran]:
        console.fail(f"--against: not measured: {', '.join(idle)}", console.UNAVAILABLE)


def _alone(option: str, *beside: str) -> None:
    """Refuse options that this one would have ignored."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
        if given and parameter.name not in beside:
            console.fail(f"{option} runs nothing: {parameter.opts[0]} would be ignored")


def _refuse_what_memory_does_not_hold(chosen: dict[str, Any], dtypes: tuple[str, ...]) -> None:
    """Before anything is allocated."""
    from dcn_kernels import environment
    from dcn_kernels.bench import layers
    from dcn_kernels.dtypes import DTYPES as STORAGE

    held = environment.memory()
    itemsize = max(STORAGE[dtype].itemsize for dtype in dtypes or ("float32",))
    for name, layer in chosen.items():
        needed = layers.memory(layer, itemsize)
        if held is not None and needed > held:
            console.fail(
                f"layer {name}: timing it takes at least {_gigabytes(needed)} of memory, there are {_gigabytes(held)}"
            )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e18 else f"{size / 1e9:.1e} GB"


def _chosen_layers(
    names: tuple[str, ...], pattern: str | None, shapes: tuple[str, ...], toml: str | None, ops: tuple[str, ...]
) -> dict[str, Any]:
    from dcn_kernels.bench import layers
    from dcn_kernels.ops.registry import OPS

    for op in ops:
        if op not in OPS:
            console.fail(f"--op: no operator {op!r}; there are: {', '.join(OPS)}")
    chosen: dict[str, Any] = {}
    known = dict(layers.LAYERS)
    try:
        if toml:
            known = layers.read_toml(toml)
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        console.fail(f"--shapes {toml}: {why}")
    if shapes and len(ops) > 1:
        console.fail("--op: expected one operator for --shape")
    for text in shapes:
        try:
            layer = layers.parse(ops[0] if ops else "deform_conv2d", text)
        except ValueError as error:
            console.fail(f"--shape {text}: {error}")
        if layers.named(layer) in chosen:
            console.fail(f"--shape {text}: the same sizes are given twice")
        chosen[layers.named(layer)] = layer
    for name in names:
        if name not in known:
            console.fail(f"--layer: no layer {name!r}; there are: {', '.join(known)}")
        chosen[name] = known[name]
    if toml and not names:
        chosen |= known
    if not chosen:
        names = tuple(known) if pattern or ops else layers.DEFAULT_SET
        chosen = {name: known[name] for name in names if known[name]["op"] in OPS}
    for op in ops:
        if op not in (layer["op"] for layer in chosen.values()):
            console.fail(f"--op: no layer of {op} was chosen")
    try:
        matches = re.compile(pattern or "")
    except re.error as error:
        console.fail(f"--filter: not a regular expression: {error}")
    kept = {n: layer for n, layer in chosen.items() if matches.search(n) and (not ops or layer["op"] in ops)}
    if not kept:
        console.fail("no layer is left to run")
    return kept


class _running:
    """Start the peers that there are; name the missing ones; end all of them."""

    def __init__(self, specs: Iterable[str], threads: int | None, versions: dict[str, str]) -> None:
        self.specs, self.threads, self.versions = specs, threads, versions
        self.peers: list[Any] = []

    def __enter__(self) -> list[Any]:
        from dcn_kernels.bench.peers import Peer, PeerError
        from dcn_kernels.environment import threads

        for spec in self.specs:
            try:
                peer = Peer(spec)
            except ValueError as error:
                console.fail(f"--against: {error}")
            if any(peer.name == other.name for other in self.peers):
                console.fail(f"--against: {peer.name} is named twice")
            try:
                peer.start(self.threads or threads())
            except PeerError as error:
                console.warn(f"{peer.name} is left out: {error}")
                continue
            if not peer.tested:
                console.warn(f"{peer.name}: written for, but never tried by this project")
            self.versions[peer.name] = peer.version
            self.peers.append(peer)
        return self.peers

    def __exit__(self, *_: object) -> None:
        for peer in self.peers:
            peer.close()


def _finish_profile(
    found: dict[str, Any],
    shape_of_output: str | None,
    output: str | None,
    publish: bool,
    no_save: bool,
    wide: bool,
) -> None:
    from dcn_kernels.bench import record

    path = output
    if not output and not no_save:
        where = "gpu" if "cuda" in found["settings"]["backends"] else "cpu"
        path = str(_results_folder(publish) / f"{found['created'][:19].replace(':', '')}-{where}.json")
    if path:  # before anything is shown: whoever reads stdout may have gone
        console.write(path, record.FORMATS[Path(path).suffix](found))
    if shape_of_output:
        console.say(record.FORMATS[f".{shape_of_output}"](found).rstrip("\n"))
    else:
        columns, rows, right = record.cells(found)
        console.table(record.caption(found), columns, rows, right, first=record.told_first(columns), wide=wide)
    if path:
        console.note(f"saved {path}")


def _results_folder(publish: bool) -> Path:
    """Where records go that are given no name."""
    folder = Path(RESULTS) if publish else Path(RESULTS, "local")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        console.fail(f"cannot make the folder {folder}: {error.strerror}; --output names a file, --no-save saves none")
    console.check_writable(str(folder / "record.json"))
    return folder


def _list_layers(chosen: dict[str, Any], wide: bool) -> None:
    from dcn_kernels.bench import layers

    rows = [
        [name, layer["op"], layers.shown(layer), f"{layer['spread']:g}", layer["source"]]
        for name, layer in chosen.items()
    ]
    columns = ["layer", "operator", "sizes", "spread", "source"]
    console.table("", columns, rows, right=["spread"], folded=["sizes", "source"], wide=wide)


@main.command("layers")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@console.WIDE
def layers_command(as_json: bool, wide: bool) -> None:
    """List the named layers with their sizes and how far their offsets reach.

    \b
    Examples:
      dcn-bench layers
      dcn-bench layers --json
    """
    from dcn_kernels.bench import layers
    from dcn_kernels.ops.registry import OPS

    known = {name: layer for name, layer in layers.LAYERS.items() if layer["op"] in OPS}
    if as_json:
        shown = {name: {k: v for k, v in layer.items() if k != "given"} for name, layer in known.items()}
        console.say_json(shown)
    else:
        _list_layers(known, wide)


@main.command("env")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@console.WIDE
def env_command(as_json: bool, wide: bool) -> None:
    """Show what is installed, which backends work and why not, threads, the BLAS, and what could be faster.

    \b
    Examples:
      dcn-bench env
      dcn-bench env --json
    """
    from dcn_kernels import environment
    from dcn_kernels.bench import peers

    commit, dirty = environment.commit()
    found: dict[str, Any] = {
        "device": environment.device(),
        "versions": environment.versions(),
        "commit": commit,
        "dirty": dirty,
        "backends": {backend: environment.why_not(backend) or "available" for backend in BACKENDS},
        "threads": environment.threads(),
        "cores": environment.cores(),
        "blas": environment.blas(),
        "peers": {name: hint + ("" if tried else "  (never tried)") for name, (hint, tried) in peers.PEERS.items()},
        "hints": environment.hints(),
    }
    if as_json:
        console.say_json(found)
        return
    if not commit:  # installed, not a checkout
        del found["commit"], found["dirty"]
    rows = []
    for section, value in found.items():
        if isinstance(value, dict):
            rows += [[section, name, str(entry)] for name, entry in value.items()]
        elif isinstance(value, list):
            rows += [[section, "", str(entry)] for entry in value]
        else:
            rows.append([section, "", str(value)])
    console.table("", ["", "what", "found"], rows, folded=["found"], wide=wide)


@main.command()
@click.argument("old")
@click.argument("new")
@click.option("--fail-above", type=click.FloatRange(0, min_open=True), metavar="RATIO", help="Exit 1 above new/old.")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@console.WIDE
def compare(old: str, new: str, fail_above: float | None, as_json: bool, wide: bool) -> None:
    """Compare two records row by row: faster, slower, same or unsure, from how the samples vary.

    The interval is a 95 % bootstrap interval of the ratio of medians; "same" lies within 3 % of 1, and fewer than five
    samples are "unsure". What the machine did besides in all of one run does not show in the samples. With
    --fail-above a row fails where it is slower and its ratio is above RATIO.

    \b
    Examples:
      dcn-bench compare old.json new.json
      dcn-bench compare old.json new.json --fail-above 1.1
    """
    from dcn_kernels.bench import record

    before, after = _read(old), _read(new)
    rows, warnings = record.compare(before, after)
    for message in warnings:
        console.warn(message)
    if not rows:
        console.fail("the records have no row in common", console.FAILED)
    failed = [row for row in rows if fail_above and row["verdict"] == "slower" and row["ratio"] > fail_above]
    if as_json:
        console.say_json({"rows": rows, "warnings": warnings, "failed": len(failed)})
    else:
        columns = [
            "layer",
            "op",
            "direction",
            "offsets",
            "dtype",
            "backend",
            "threads",
            "old ms",
            "new ms",
            "ratio",
            "95 %",
            "verdict",
        ]
        cells = [
            [*(str(row[field]) for field in columns[:7]), console.number(row["old_ms"]), console.number(row["new_ms"]),
             f"{row['ratio']:.3f}", "{:.3f}-{:.3f}".format(*row["interval"]), row["verdict"]]
            for row in rows
        ]  # fmt: skip
        differ = [c for i, c in enumerate(columns[:7]) if c != "op" and len({row[i] for row in cells}) > 1]
        first = [*differ, "verdict", "ratio", "old ms", "new ms", "95 %"]
        right = ["threads", "old ms", "new ms", "ratio", "95 %"]
        console.table("", columns, cells, right, first=first, wide=wide)
    if failed:
        console.fail(f"{len(failed)} rows are slower by more than {fail_above:g}", console.FAILED)


def _read(path: str) -> dict[str, Any]:
    from dcn_kernels.bench import record

    try:
        found = record.read(path)
    except record.BadRecord as error:
        console.fail(str(error))
    return found


@main.command()
@click.argument("records", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="FILE.png", help="Picture to write (.png, .svg, .pdf); of "
              "speed also .md, a table of its numbers.")  # fmt: skip
@click.option(
    "--what",
    type=click.Choice(["speed", "memory", "scaling", "cost"]),
    default="speed",
    show_default=True,
    help="Time by layer beside the peers, temporary memory by layer, speed-up by threads, or time against arithmetic.",
)
def plot(records: tuple[str, ...], output: str, what: str) -> None:
    """Draw records (needs matplotlib: pip install 'dcn-kernels[plot]').

    \b
    Examples:
      dcn-bench plot run.json -o speed.png
      dcn-bench plot run.json -o speed.md
      dcn-bench plot run.json -o memory.png --what memory
      dcn-bench plot one.json two.json -o scaling.svg --what scaling
    """
    kinds = (".png", ".svg", ".pdf", ".md")
    if Path(output).suffix not in kinds:
        console.fail(f"--output: expected a name that ends in {', '.join(kinds)}, got {output!r}")
    in_words = Path(output).suffix == ".md"
    if in_words and what != "speed":
        console.fail(f"--output: a table is made of --what speed alone, got --what {what}")
    console.check_writable(output)
    read = _read_all(records)
    if not in_words:
        _require_matplotlib("plot")
    from dcn_kernels.bench import plots

    try:
        picture = plots.table(read).encode() if in_words else plots.draw(read, what, Path(output).suffix[1:])
    except ValueError as error:
        console.fail(str(error))
    console.write_bytes(output, picture)
    console.note(f"saved {output}")


@main.command()
@click.argument("records", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="FILE.html", help="Page to write.")
def report(records: tuple[str, ...], output: str) -> None:
    """Write a page of records: one HTML file with tables and charts, which needs no network.

    It has what was measured where, every row in a table that sorts and filters, speed beside the peers, memory and
    scaling, and the quartiles on hover. Of two records it has the verdicts, the second over the first. Needs matplotlib
    for the charts: pip install 'dcn-kernels[plot]'.

    \b
    Examples:
      dcn-bench report run.json -o report.html
      dcn-bench report before.json after.json -o report.html
    """
    if Path(output).suffix not in (".html", ".htm"):
        console.fail(f"--output: expected a name that ends in .html, got {output!r}")
    console.check_writable(output)
    read = _read_all(records)
    _require_matplotlib("report")
    from dcn_kernels.bench import report as pages

    try:
        page = pages.page(read)
    except ValueError as error:
        console.fail(str(error))
    console.write(output, page)
    console.note(f"saved {output}")


def _read_all(paths: tuple[str, ...]) -> dict[str, Any]:
    """Records by their files' stems, or by their paths where two stems are the same."""
    if len(set(paths)) < len(paths):
        console.fail(f"{next(path for path in paths if paths.count(path) > 1)} is given twice")
    stems = [Path(path).stem for path in paths]
    return {stem if stems.count(stem) == 1 else path: _read(path) for stem, path in zip(stems, paths, strict=True)}


def _require_matplotlib(command: str) -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        console.fail(f"{command} needs matplotlib: pip install 'dcn-kernels[plot]'")


@main.command()
@click.option("--folder", default=RESULTS, show_default=True)
def readme(folder: str) -> None:
    """Write README.md of a folder of records from the records in it.

    In the README.md beside the folder it writes on which GPUs the kernels have run.

    \b
    Example:
      dcn-bench readme
    """
    from dcn_kernels.bench import record

    records = {path.name: _read(str(path)) for path in sorted(Path(folder).glob("*.json"))}
    if not records:
        console.fail(f"no records in {folder}")
    path = str(Path(folder) / "README.md")
    console.write(path, record.readme(records))
    console.note(f"saved {path}")
    beside = Path(folder).resolve().parent / "README.md"
    if beside.is_file():
        console.write(str(beside), record.with_gpus(beside.read_text(encoding="utf-8"), records))


main.add_command(capture)
main.add_command(cost)
main.add_command(sampling)
