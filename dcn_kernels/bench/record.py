"""Records of `dcn-bench`: written, read and checked, shown as tables, compared."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dcn_kernels import environment

SCHEMA = 1
KIND = "dcn-bench profile"
Record = dict[str, Any]

# The record and a row of it: field -> (type, what it is). bench_results/README.md shows this table.
FIELDS: dict[str, tuple[Any, str]] = {
    "schema": (int, f"version of this description: {SCHEMA}"),
    "kind": (str, f'"{KIND}"'),
    "created": (str, "UTC, ISO 8601"),
    "device": (dict, "cpu, cores, vectors, system; gpu, compute_capability, cuda_driver where there is one"),
    "versions": (dict, "package -> version; peers by name"),
    "commit": (str, "of the source tree; empty outside a checkout"),
    "dirty": (bool, "the source tree differed from that commit"),
    "settings": (
        dict,
        "directions, dtypes, backends, offsets, threads, seed, budget (seconds a row), "
        "reuse (as --reuse; absent is no), blas, load (before the run)",
    ),
    "rows": (list, "one per layer, offsets, direction, dtype and backend"),
}
NUMBER = (int, float)
MAYBE = (int, float, type(None))
ROW_FIELDS: dict[str, tuple[Any, str]] = {
    "op": (str, "operator"),
    "layer": (str, "name of the layer"),
    "shape": (str, "its sizes, as --shape takes them"),
    "spread": (NUMBER, "standard deviation of an offset, in pixels; of a RoI offset, in its own unit"),
    "direction": (str, "forward or backward (all gradients; the forward is not in it)"),
    "backend": (str, "reference, cpu or cuda"),
    "dtype": (str, "of input, weight and offsets"),
    "offsets": (str, "zero, smooth, random; none where the operator has no offsets"),
    "threads": (int, "threads of the CPU backend, and of the peers"),
    "median_ms": (NUMBER, "milliseconds of a call; a backward is given the forward's arguments and computes all anew"),
    "quartiles_ms": (list, "lower and upper quartile of the samples"),
    "samples_ms": (list, "all samples after the warm-up"),
    "cold_ms": (MAYBE, "the same, the second-level cache emptied before each sample; null on a CPU"),
    "start_ms": (
        MAYBE,
        "the CPU's share of a call on a GPU, not in median_ms: checks, starting kernels; null on a CPU",
    ),
    "spread_of_samples": (NUMBER, "interquartile range over median; above 0.25 the row is called noisy"),
    "compile_ms": (
        NUMBER,
        "the first call in the process less the median: compiling, or loading what was compiled (in the first records "
        "a backward had been run by its check, and shows none)",
    ),
    "temp_bytes": (MAYBE, "peak temporary memory of a call besides its results"),
    "gflops": (NUMBER, "1e9 floating-point operations a second; of the matrix product alone where there is one"),
    "gbytes_s": (NUMBER, "1e9 bytes a second, each array counted once"),
    "ceiling": (
        dict,
        "this machine's own rates, the best seen in the run: gflops of a matrix product (NumPy's or CuPy's; for halves "
        "on a CPU in float32, for bfloat16 on a GPU in float16), gbytes_s of a copy",
    ),
    "ceiling_share": (NUMBER, "time at the ceiling over median_ms"),
    "bound": (str, "which ceiling is nearer: arithmetic or memory; neither where the share is below a tenth"),
    "plain_ms": (
        MAYBE,
        "the matrix product of a plain convolution of the same shape in NumPy's BLAS (on a GPU CuPy's), copies left "
        "out: the least time of the run (in the first records measured once for a layer)",
    ),
    "plain_ratio": (MAYBE, "median_ms over plain_ms"),
    "small_check": (NUMBER, "worst error over tolerance on the same options with sizes cut, against the reference"),
    "spot_check": (MAYBE, "the same at full size on some elements of the output or of each gradient"),
    "against": (dict, "peer -> see below"),
}
AGAINST_FIELDS: dict[str, tuple[Any, str]] = {
    "median_ms": (NUMBER, "the peer's milliseconds of a call; of a backward without the forward that it needs first"),
    "samples_ms": (list, "all its samples, taken in rounds between ours"),
    "ratio": (NUMBER, "its median over ours: above 1 we are faster"),
    "max_error": (MAYBE, "largest difference over our largest element; null: it computes something else"),
    "what": (str, "what was called"),
}


MOST_SAMPLES = 2000  # of a row; its bootstrap takes memory for 2000 times as many
_MOST_BYTES = 32 << 20  # of a file
LATER = ("cold_ms", "start_ms")  # fields that the first records lack


class BadRecord(ValueError):
    """A file that is no record, or a damaged one."""


def make(rows: list[dict[str, Any]], settings: dict[str, Any], peers: dict[str, str]) -> Record:
    """A checked record of rows measured now on this machine."""
    commit, dirty = environment.commit()
    made = {
        "schema": SCHEMA,
        "kind": KIND,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": environment.device(),
        "versions": {**environment.versions(), **peers},
        "commit": commit,
        "dirty": dirty,
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "rows": rows,
    }
    return check(made, "the record of this run")


def check(record: Any, name: str = "record") -> Record:
    """The record itself; BadRecord naming the field where it does not fit the schema."""
    _check_text(record, name)
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise BadRecord(f"{name}: not a record of {KIND}")
    if record.get("schema") != SCHEMA:
        raise BadRecord(f"{name}: schema {record.get('schema')!r}, expected {SCHEMA}")
    _check_fields(record, FIELDS, name)
    _check_fields(record["device"], {"cpu": (str, ""), "cores": (int, "")}, f"{name}: device")
    if any(isinstance(row, dict) and row.get("backend") == "cuda" for row in record["rows"]):
        _check_fields(record["device"], {"gpu": (str, ""), "compute_capability": (str, "")}, f"{name}: device")
    _check_fields(record["settings"], {"backends": (list, "")}, f"{name}: settings")
    if not all(isinstance(word, str) for word in record["settings"]["backends"]):
        raise BadRecord(f"{name}: settings: backends: expected names")
    for number, row in enumerate(record["rows"]):
        where = f"{name}: rows[{number}]"
        if not isinstance(row, dict):
            raise BadRecord(f"{where}: expected an object")
        _check_fields(row, ROW_FIELDS, where)
        _check_times(row, where)
        if len(row["quartiles_ms"]) != 2 or not all(map(_positive, row["quartiles_ms"])):
            raise BadRecord(f"{where}: quartiles_ms: expected two positive numbers")
        for peer, theirs in row["against"].items():
            if not isinstance(theirs, dict):
                raise BadRecord(f"{where}: against {peer}: expected an object")
            _check_fields(theirs, AGAINST_FIELDS, f"{where}: against {peer}")
            _check_times(theirs, f"{where}: against {peer}")
    return record


def _check_fields(found: dict[str, Any], fields: dict[str, tuple[Any, str]], where: str) -> None:
    for field, (kind, _) in fields.items():
        if field in LATER and field not in found:
            continue
        if field not in found:
            raise BadRecord(f"{where}: {field} is missing")
        value = found[field]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadRecord(f"{where}: {field}: unexpected {type(value).__name__}")
        if isinstance(value, NUMBER) and not abs(value) < 1e300:
            raise BadRecord(f"{where}: {field}: expected a finite number")


def _check_text(record: Any, name: str) -> None:
    """Every word can be written to a file and shown in a terminal without steering it."""
    left = [record]
    while left:  # deeper than Python may recurse
        found = left.pop()
        if isinstance(found, str) and not found.isprintable():
            raise BadRecord(f"{name}: expected text without control characters, got {found[:40]!a}")
        if isinstance(found, (dict, list)):
            left.extend(found)
        if isinstance(found, dict):
            left.extend(found.values())


def _check_times(found: dict[str, Any], where: str) -> None:
    if not _positive(found["median_ms"]):
        raise BadRecord(f"{where}: median_ms: expected a positive number")
    if len(found["samples_ms"]) > MOST_SAMPLES:
        raise BadRecord(f"{where}: samples_ms: expected at most {MOST_SAMPLES}")
    if not found["samples_ms"] or not all(map(_positive, found["samples_ms"])):
        raise BadRecord(f"{where}: samples_ms: expected positive numbers")


def _positive(value: Any) -> bool:
    return isinstance(value, NUMBER) and not isinstance(value, bool) and 0 < value < 1e300


def read(path: str | Path) -> Record:
    """A checked record; BadRecord with one line that says what is wrong with the file."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise BadRecord(f"{path}: larger than {_MOST_BYTES >> 20} MiB")
        text = content.decode()
    except OSError as error:
        raise BadRecord(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BadRecord(f"{path}: not a text file") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: not JSON: {error}") from None
    return check(found, str(path))


# ---------------------------------------------------------------- shown

COLUMNS = (
    "layer", "operator", "direction", "offsets", "dtype", "backend", "threads", "median ms", "quartiles", "GFLOP/s",
    "GB/s", "of ceiling", "bound", "x conv GEMM", "temp MB", "compile s",
)  # fmt: skip
RIGHT = (
    "median ms", "quartiles", "GFLOP/s", "GB/s", "of ceiling", "x conv GEMM", "temp MB", "compile s", "cold ms",
    "start ms",
)  # fmt: skip


def cells(record: Record) -> tuple[list[str], list[list[str]], list[str]]:
    """(columns, rows, columns to be aligned to the right) of a record as a table."""
    peers = list(dict.fromkeys(name for row in record["rows"] for name in row["against"]))
    constant = [c for c in ("dtype", "backend", "threads") if len({row[c] for row in record["rows"]}) == 1]
    on_gpu = any(row.get("cold_ms") is not None for row in record["rows"])
    titles = [f"{PLAIN.get(peer, peer)}, ms (x ours)" for peer in peers]
    columns = [*COLUMNS, *(("cold ms", "start ms") if on_gpu else ()), *titles]
    rows = []
    for row in record["rows"]:
        low, high = row["quartiles_ms"]
        temporary = "" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 1e6:.1f}"
        shown = [
            row["layer"], row["op"], row["direction"], row["offsets"], row["dtype"], row["backend"],
            str(row["threads"]), _number(row["median_ms"]), f"{_number(low)}-{_number(high)}", _number(row["gflops"]),
            _number(row["gbytes_s"]), f"{100 * row['ceiling_share']:.0f}%", row["bound"],
            "" if row["plain_ratio"] is None else f"{row['plain_ratio']:.2f}", temporary,
            f"{row['compile_ms'] / 1e3:.1f}",
        ]  # fmt: skip
        if on_gpu:
            times = (row.get(field) for field in ("cold_ms", "start_ms"))
            shown += ["" if time is None else _number(time) for time in times]
        for peer in peers:
            theirs = row["against"].get(peer)
            shown.append(_against(peer, theirs) if theirs else "")
        rows.append(shown)
    kept = [i for i, column in enumerate(columns) if column not in constant]  # the caption has those
    names = [columns[i] for i in kept]
    return names, [[row[i] for i in kept] for row in rows], [*RIGHT, *titles]


def told_first(columns: list[str]) -> list[str]:
    """The columns of `cells` that tell most, where there is no room for all: which row, how long, beside the peers."""
    which = ("layer", "direction", "offsets", "dtype", "backend", "threads", "median ms")
    peers = (column for column in columns if column.endswith("(x ours)"))
    return [*which, *peers, "of ceiling", "GFLOP/s", "operator", "quartiles"]


PLAIN = {"torch": "plain conv2d by torch"}  # not the same operator: what deforming costs
AGREES = 1e-3  # of the largest element: other libraries round coordinates in other orders


def _against(peer: str, theirs: dict[str, Any]) -> str:
    """A peer's time and ratio, and its error where it computes something else than we do."""
    error, remark = theirs["max_error"], ""
    if error is None and peer not in PLAIN:
        remark = ", another convention"
    elif error is not None and error > AGREES:
        remark = f", differs by {error:.1g}"
    return f"{_number(theirs['median_ms'])} ({theirs['ratio']:.2f}x{remark})"


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine(record: Record) -> str:
    """The GPU of a record that ran on one, else the processor."""
    device = record["device"]
    return str(device.get("gpu") or device["cpu"] if "cuda" in record["settings"]["backends"] else device["cpu"])


def load(record: Record) -> float | None:
    """What ran on the machine before the record, where that was more than half a core for each core."""
    found = record["settings"].get("load")
    return found if isinstance(found, NUMBER) and found > 0.5 * record["device"]["cores"] else None


def caption(record: Record) -> str:
    """One line: where, with what, when, and whether other work was running."""
    settings, busy = record["settings"], load(record)
    commit = record["commit"][:8] + ("+changes" if record["dirty"] else "") or "no commit"
    used = {row["dtype"] for row in record["rows"]}
    threads = ", ".join(map(str, sorted({row["threads"] for row in record["rows"]})))
    return (
        f"{machine(record)}, {threads} threads, {', '.join(sorted(used))}, "
        f"{', '.join(settings['backends'])}{', arrays reused' if settings.get('reuse') else ''}; "
        f"{commit}, {record['created'][:10]}{f'; load {busy:.1f} in the minute before' if busy else ''}"
    )


def markdown(record: Record) -> str:
    """The record's table in Markdown."""
    columns, rows, right = cells(record)
    marks = ["---:" if column in right else "---" for column in columns]
    cells_of = [[cell.replace("|", "\\|") for cell in row] for row in [columns, marks, *rows]]
    lines = ["| " + " | ".join(line) + " |" for line in cells_of]
    return f"{caption(record)}\n\n" + "\n".join(lines) + "\n"


def to_csv(record: Record) -> str:
    """The rows without their samples; a peer's numbers in columns of their own."""
    peers = list(dict.fromkeys(name for row in record["rows"] for name in row["against"]))
    plain = [field for field in ROW_FIELDS if field not in ("samples_ms", "quartiles_ms", "ceiling", "against")]
    fields = [*plain, "lower_quartile_ms", "upper_quartile_ms"]
    fields += [f"{peer}_{field}" for peer in peers for field in ("median_ms", "ratio", "max_error")]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields)
    writer.writeheader()
    for row in record["rows"]:
        flat = {field: row[field] for field in plain}
        flat["lower_quartile_ms"], flat["upper_quartile_ms"] = row["quartiles_ms"]
        for peer, theirs in row["against"].items():
            flat |= {f"{peer}_{field}": theirs[field] for field in ("median_ms", "ratio", "max_error")}
        writer.writerow(flat)
    return buffer.getvalue()


def to_json(record: Record) -> str:
    """The record itself, a row a line: short, and differences can be read."""
    head = {field: value for field, value in record.items() if field != "rows"}
    rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in record["rows"])
    text = json.dumps(head, indent=1, allow_nan=False)
    return f'{text[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n' if rows else f'{text[:-2]},\n "rows": []\n}}\n'


FORMATS = {".json": to_json, ".csv": to_csv, ".md": markdown}


# ---------------------------------------------------------------- compared


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows measurements of the same thing."""
    fields = ("op", "layer", "shape", "spread", "direction", "backend", "dtype", "offsets", "threads")
    return tuple(row[field] for field in fields)


SAME = 0.03  # ratios within this of 1 are called the same
_FEWEST = 5  # samples that a verdict needs


def verdict(old: Iterable[float], new: Iterable[float], seed: int = 0) -> tuple[str, float, tuple[float, float]]:
    """faster, slower, same or unsure; the ratio of the medians (new over old) and its 95 % interval.

    The interval is a bootstrap of both samples: "same" where all of it lies within 3 % of 1, "faster" and "slower"
    where none of it does on that side, else "unsure". So are fewer than five samples, whose interval is no 95 %: two
    sets of three are apart by chance in 10 % of cases.
    """
    rng = np.random.default_rng(seed)
    medians, counts = [], []
    for samples in (old, new):
        values = np.asarray(list(samples), float)
        counts.append(len(values))
        medians.append(np.median(values[rng.integers(0, len(values), (2000, len(values)))], axis=1))
        medians[-1][0] = np.median(values)
    ratios = medians[1] / medians[0]
    low, high = (float(limit) for limit in np.percentile(ratios, [2.5, 97.5]))
    ratio = float(ratios[0])
    if min(counts) < _FEWEST:
        return "unsure", ratio, (low, high)
    if low > 1 + SAME:
        return "slower", ratio, (low, high)
    if high < 1 - SAME:
        return "faster", ratio, (low, high)
    if low >= 1 - SAME and high <= 1 + SAME:
        return "same", ratio, (low, high)
    return "unsure", ratio, (low, high)


def compare(old: Record, new: Record) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of both records with a verdict, warnings)."""
    warnings = []
    if old["device"] != new["device"]:
        different = [k for k in {**old["device"], **new["device"]} if old["device"].get(k) != new["device"].get(k)]
        warnings.append(f"the machines differ ({', '.join(different)}): a ratio says little about the code")
    ours = {"dcn-kernels"}
    changed = [
        f"{name} {old['versions'].get(name, 'absent')} -> {new['versions'].get(name, 'absent')}"
        for name in sorted({*old["versions"], *new["versions"]} - ours)
        if old["versions"].get(name) != new["versions"].get(name)
    ]
    if changed:
        warnings.append("the versions differ: " + ", ".join(changed))
    settings = [{"reuse": bool(r["settings"].get("reuse")), "seed": r["settings"].get("seed")} for r in (old, new)]
    if settings[0] != settings[1]:
        changed = [f"{k} {settings[0][k]} -> {settings[1][k]}" for k in settings[0] if settings[0][k] != settings[1][k]]
        warnings.append("the settings differ: " + ", ".join(changed))
    for name, record in (("old", old), ("new", new)):
        busy = load(record)
        if busy:
            warnings.append(f"other work was running before the {name} record (load {busy:.1f})")
    before, after = ({key(row): row for row in record["rows"]} for record in (old, new))
    for name, left, right in (("old", before, after), ("new", after, before)):
        alone = [k for k in left if k not in right]
        if alone:
            warnings.append(f"{len(alone)} rows are in the {name} record only")
    rows = []
    for found, row in after.items():
        if found in before:
            word, ratio, interval = verdict(before[found]["samples_ms"], row["samples_ms"])
            same = ("layer", "op", "direction", "offsets", "dtype", "backend", "threads")
            rows.append({**{field: row[field] for field in same}, "old_ms": before[found]["median_ms"],
                         "new_ms": row["median_ms"], "ratio": ratio, "interval": list(interval),
                         "verdict": word})  # fmt: skip
    return rows, warnings


# ---------------------------------------------------------------- bench_results/README.md


def readme(records: dict[str, Record]) -> str:
    """bench_results/README.md from its records, by file name."""
    lines = [
        "# Records of `dcn-bench profile`",
        "",
        "Written by `dcn-bench readme`; not edited by hand. One JSON file a run, with every sample;",
        "`dcn-bench compare OLD NEW` compares two, `dcn-bench plot` draws them.",
        "",
        "How to read the tables:",
        "",
        "- A peer's column, `NAME, ms (x ours)`: its median, and in brackets that median over ours, in rounds",
        "  interleaved in one run on the same arrays. Above 1 we are faster. `plain conv2d by torch` is a whole plain",
        "  convolution of the same shape, without offsets and mask: below 1 is what deforming costs.",
        "- A backward is all gradients. The forward that a peer's needs first runs outside the clock, and may leave",
        "  it results; ours is given the forward's arguments alone and samples again, inside the clock.",
        "- `arrays reused`: our forward writes into one array (`out=`), and our backward of roi_pool is given the",
        "  places of the maxima, as those of torchvision, paddle and mxnet are. Without it each of our results is new,",
        "  and the maxima are searched again. A peer's results are allocated as it does by itself.",
        "- ONNX Runtime's threads do not spin between calls, so that they take no time from ours.",
        "- `x conv GEMM`: our median over the time of the matrix product alone of a plain convolution of the same",
        "  shape, twice that product for a backward, in the fastest kernels of NumPy's BLAS: above 1 we are slower.",
        "  Nobody runs it as a convolution: sampling, or im2col, is left out.",
        "- `of ceiling`: the time that this machine's own measured matrix product or copy rate would allow, over our",
        "  median; `bound` says which of the two.",
        "- `compile s`: the first call in the process less the median.",
        "",
    ]
    for name, record in sorted(records.items(), key=lambda item: item[1]["created"], reverse=True):
        lines += [f"## {name}", "", markdown(record)]
    lines += ["## The record", "", "| field | what it is |", "| --- | --- |"]
    lines += [f"| `{field}` | {text} |" for field, (_, text) in FIELDS.items()]
    lines += ["", "A row:", "", "| field | what it is |", "| --- | --- |"]
    lines += [f"| `{field}` | {text} |" for field, (_, text) in ROW_FIELDS.items()]
    lines += ["", "A peer in `against`:", "", "| field | what it is |", "| --- | --- |"]
    lines += [f"| `{field}` | {text} |" for field, (_, text) in AGAINST_FIELDS.items()]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- README.md

_GPUS = re.compile(r"(<!-- gpus -->).*?(<!-- /gpus -->)", re.DOTALL)


def gpus(records: dict[str, Record]) -> str:
    """On which GPUs the CUDA kernels have run: "on no GPU yet", or "on NVIDIA H200 (9.0; 2026-12-01)"."""
    latest: dict[str, str] = {}
    for record in sorted(records.values(), key=lambda record: record["created"]):
        if any(row["backend"] == "cuda" for row in record["rows"]):
            device = record["device"]
            latest[f"{device['gpu']} ({device['compute_capability']}"] = record["created"][:10]
    return "on " + ", ".join(f"{name}; {day})" for name, day in latest.items()) if latest else "on no GPU yet"


def with_gpus(text: str, records: dict[str, Record]) -> str:
    """The project's README.md with `gpus` between its marks."""
    return _GPUS.sub(lambda marks: f"{marks[1]}{gpus(records)}{marks[2]}", text)
