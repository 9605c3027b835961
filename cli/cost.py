"""`dcn-bench cost`: what deforming costs in whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click
from dcn_kernels.cli import console

NETWORKS = ("DeepLab", "class-aware RPN", "Faster R-CNN", "R-FCN")
VARIANTS = {"plain": ("plain",), "deformable": ("deformable", "offsets")}  # the parts that only they have


@click.command(cls=console.Command)
@click.option("--network", "names", multiple=True, type=click.Choice(NETWORKS, case_sensitive=False),
              help="Only this one; repeatable.")  # fmt: skip
@click.option("--offset-groups", default="1", show_default=True, type=click.Choice(["1", "2", "4", "8"]),
              help="Of the deformable convolutions; 4 in the detectors that the paper's authors released.")  # fmt: skip
@click.option("--no-time", is_flag=True, help="Parameters and arithmetic only.")
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of the CPU.")
@click.option("--budget", default=0.3, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Seconds for each operator's call.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@console.WIDE
def cost(
    names: tuple[str, ...],
    offset_groups: str,
    no_time: bool,
    backend: str,
    threads: int | None,
    budget: float,
    as_json: bool,
    wide: bool,
) -> None:
    """Plain against deformable networks, layer by layer (Table 4 of the paper).

    Parameters that the offset branches add, and each layer's share; arithmetic added; time and memory of the layers'
    forwards on this machine, and the ratio of deformable to plain. What cannot be held beside the paper is said.

    \b
    Examples:
      dcn-bench cost --no-time
      dcn-bench cost --network R-FCN --threads 2
      dcn-bench cost --json > cost.json
    """
    from dcn_kernels.bench import network_cost
    from dcn_kernels.environment import why_not

    if not no_time and why_not(backend):
        console.fail(f"backend {backend} is not available: {why_not(backend)}", console.UNAVAILABLE)
    known = network_cost.networks(int(offset_groups))
    chosen = [known[name] for name in dict.fromkeys(names or NETWORKS)]
    layers = [layer for network in chosen for layer in network.layers]
    measured: list[Any] = [None] * len(layers)
    interrupted = False
    if not no_time:
        with console.progress("cost") as report:
            try:
                measured = network_cost.measure(
                    layers, backend=backend, threads=threads, budget=budget, progress=report
                )
            except KeyboardInterrupt:
                interrupted = True
    of_layer = iter(measured)
    found = {network.name: _summary(network, [next(of_layer) for _ in network.layers]) for network in chosen}
    if as_json:
        console.say_json({"networks": found, "not_comparable": network_cost.NOT_COMPARABLE})
    else:
        for name, summary in found.items():
            _show(name, summary, wide)
        for remark in network_cost.NOT_COMPARABLE:
            console.prose(f"- {remark}")
    if interrupted:
        console.warn("interrupted: time and memory are left out")
        raise SystemExit(console.INTERRUPTED)


def _summary(network: Any, measured: list[Any]) -> dict[str, Any]:
    """One network: its layers (the shared ones as one row), sums by variant, and the paper's figures."""
    rows: dict[Any, dict[str, Any]] = {}
    for number, (layer, found) in enumerate(zip(network.layers, measured, strict=True)):
        key, name = ("shared", "layers that both have") if layer.part == "shared" else (number, layer.name)
        row = rows.setdefault(key, {"layer": name, "part": layer.part, "parameters": 0, "gflop": 0.0})
        row["parameters"] += layer.parameters
        row["gflop"] += layer.gflop()
        if found:
            row["ms"] = row.get("ms", 0.0) + found.milliseconds
            row["how"] = found.how
            row["result_bytes"] = row.get("result_bytes", 0) + found.result_bytes
            row["temporary_bytes"] = _largest([row.get("temporary_bytes", 0), found.temporary_bytes])
    added = network.parameters("offsets")
    for row in rows.values():
        if row["part"] == "offsets":
            row["share_of_added"] = row["parameters"] / added
    return {
        "map_size": network.map_size,
        "layers": list(rows.values()),
        "whole": _sums(rows.values(), "shared"),
        "differing": _sums(rows.values()),
        "paper": {
            "parameters_m": dict(zip(VARIANTS, network.paper_parameters, strict=True)),
            "net_forward_s": dict(zip(VARIANTS, network.paper_seconds, strict=True)),
        },
        "added_beyond_rounding_m": network.beyond_rounding(),
        "remark": network.remark,
    }


def _sums(rows: Iterable[dict[str, Any]], *more: str) -> dict[str, dict[str, Any]]:
    """Of the plain and of the deformable variant; `more` are parts that belong to both."""
    sums = {}
    for variant, parts in VARIANTS.items():
        mine = [row for row in rows if row["part"] in (*parts, *more)]
        sums[variant] = {key: sum(row[key] for row in mine) for key in ("parameters", "gflop")}
        if any("ms" in row for row in mine):
            memory = {
                "weights": 4 * sums[variant]["parameters"],
                "results": sum(row["result_bytes"] for row in mine),
                "largest_temporary": _largest([row["temporary_bytes"] for row in mine]),
            }
            whole = None if None in memory.values() else sum(memory.values())
            sums[variant] |= {"ms": sum(row["ms"] for row in mine), "memory_bytes": memory | {"together": whole}}
    return sums


def _largest(temporary: list[int | None]) -> int | None:
    """Not known where one is not."""
    known = [size for size in temporary if size is not None]
    return max(known) if len(known) == len(temporary) else None


def _show(name: str, summary: dict[str, Any], wide: bool) -> None:
    timed = "ms" in summary["whole"]["plain"]
    columns = ["layer", "part", "parameters", "of those added", "GFLOP"]
    columns += ["ms", "timed as", "result MB", "temporary MB"] if timed else []
    cells = []
    for row in summary["layers"]:
        share = f"{100 * row['share_of_added']:.1f} %" if row.get("parameters") and "share_of_added" in row else ""
        cell = [row["layer"], row["part"], f"{row['parameters']:,}", share, f"{row['gflop']:.2f}"]
        if timed:
            cell += [f"{row['ms']:.2f}", row["how"], _mb(row["result_bytes"]), _mb(row["temporary_bytes"])]
        cells.append(cell)
    height, width = summary["map_size"]
    console.table(
        f"{name}, one image, maps of {height}x{width}",
        columns,
        cells,
        right=[c for c in columns[2:] if c != "timed as"],
        first=["layer", "part", "parameters", "GFLOP", "ms"],
        wide=wide,
    )
    whole, differing, paper = summary["whole"], summary["differing"], summary["paper"]
    rows = [
        _line("parameters, M", whole, lambda v: v["parameters"] / 1e6, 3),
        _line("  the paper's", paper["parameters_m"], float, 1),
        _line("GFLOP", whole, lambda v: v["gflop"], 1),
    ]
    if timed:
        rows += [
            _line("ms on this machine", whole, lambda v: v["ms"], 1),
            _line("  of the layers that differ", differing, lambda v: v["ms"], 1),
        ]
    rows.append(_line("  the paper's net forward, ms", paper["net_forward_s"], lambda v: 1e3 * v, 0))
    if timed:
        for label, kind, sums in (
            ("MB on this machine", "together", whole),
            ("  of the layers that differ", "together", differing),
            ("  weights", "weights", whole),
            ("  results", "results", whole),
            ("  largest temporary", "largest_temporary", whole),
        ):
            held = {variant: found["memory_bytes"][kind] for variant, found in sums.items()}
            rows.append(_line(label, held, lambda size: None if size is None else size / 1e6, 2))
    columns = ["", "plain", "deformable", "added", "ratio"]
    console.table("", columns, rows, right=columns[1:], wide=wide)
    beyond = summary["added_beyond_rounding_m"]
    if beyond:
        where = "more" if beyond > 0 else "fewer"
        told = (f"the offset layers have {abs(beyond):.2f} M {where} parameters than the paper's figures, rounded to "
                "0.1 M, admit; its text does not tell why.")  # fmt: skip
    else:
        told = "the parameters of the offset layers agree with the paper's figures, rounded to 0.1 M."
    console.prose(" ".join(filter(None, [f"{name}: {told}", summary["remark"]])))
    console.say("")


def _mb(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 1e6:.2f}"


def _line(name: str, variants: dict[str, Any], of: Callable[[Any], Any], digits: int) -> list[str]:
    plain, deformable = (of(variants[variant]) for variant in VARIANTS)
    cells = ["not measured" if value is None else f"{value:.{digits}f}" for value in (plain, deformable)]
    if None in (plain, deformable):
        return [name, *cells, "", ""]
    return [name, *cells, f"{deformable - plain:.{digits}f}", f"{deformable / plain:.3f}" if plain else ""]
