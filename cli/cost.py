"""`dcn-bench cost`: what deforming costs in whole networks."""

from __future__ import annotations

import json
from typing import Any

import click
from dcn_kernels.cli import console

NETWORKS = ("DeepLab", "Faster R-CNN", "R-FCN")


@click.command()
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
def cost(
    names: tuple[str, ...],
    offset_groups: str,
    no_time: bool,
    backend: str,
    threads: int | None,
    budget: float,
    as_json: bool,
) -> None:
    """Plain against deformable networks, layer by layer (Table 4 of the paper).

    Parameters that the offset branches add, and each layer's share; arithmetic added; forward time and memory of the
    layers on this machine, and the ratio of deformable to plain. What cannot be held beside the paper is said.

    \b
    Examples:
      dcn-bench cost --no-time
      dcn-bench cost --network R-FCN --threads 2
      dcn-bench cost --json > cost.json
    """
    from dcn_kernels import network_cost
    from dcn_kernels.environment import why_not

    if not no_time and why_not(backend):
        console.fail(f"backend {backend} is not available: {why_not(backend)}", console.UNAVAILABLE)
    known = network_cost.networks(int(offset_groups))
    found: dict[str, Any] = {}
    for name in names or NETWORKS:
        network = known[name]
        times: list[Any] = [None] * len(network.layers)
        if not no_time:
            with console.progress(name) as report:
                times = network_cost.measure(
                    network.layers, backend=backend, threads=threads, budget=budget, progress=report
                )
        found[name] = _summary(network, times)
    if as_json:
        console.say(json.dumps({"networks": found, "not_comparable": network_cost.NOT_COMPARABLE}, indent=1))
        return
    for name, summary in found.items():
        _show(name, summary)
    for remark in network_cost.NOT_COMPARABLE:
        console.say(f"- {remark}")


def _summary(network: Any, times: list[Any]) -> dict[str, Any]:
    """One network: its layers (the shared ones as one row), sums by variant, and the paper's figures."""
    rows: list[dict[str, Any]] = []
    shared: dict[str, Any] = {"layer": "layers that both have", "part": "shared", "parameters": 0, "gflop": 0.0}
    for layer, measured in zip(network.layers, times, strict=True):
        if layer.part == "shared":
            row = shared
        else:
            row = {"layer": layer.name, "part": layer.part, "parameters": 0, "gflop": 0.0}
            rows.append(row)
        row["parameters"] += layer.parameters
        row["gflop"] += layer.gflop()
        if measured:
            row["ms"] = row.get("ms", 0.0) + measured.milliseconds
            row["how"] = measured.how
            row["temporary_bytes"], row["offset_bytes"] = measured.temporary_bytes, measured.offset_bytes
    rows.insert(0, shared)
    added = network.parameters("offsets")
    for row in rows:
        if row["part"] == "offsets":
            row["share_of_added"] = row["parameters"] / added
    sums = {}
    for variant, parts in (("plain", ("shared", "plain")), ("deformable", ("shared", "deformable", "offsets"))):
        mine = [row for row in rows if row["part"] in parts]
        sums[variant] = {key: sum(row[key] for row in mine) for key in ("parameters", "gflop")}
        if times[0]:
            sums[variant]["ms"] = sum(row["ms"] for row in mine)
    paper = [{"parameters_m": network.paper_parameters[i], "seconds": network.paper_seconds[i]} for i in range(2)]
    return {
        "map_size": network.map_size,
        "layers": rows,
        **sums,
        "paper": dict(zip(sums, paper, strict=True)),
        "added_beyond_rounding_m": network.beyond_rounding(),
    }


def _show(name: str, summary: dict[str, Any]) -> None:
    timed = "ms" in summary["plain"]
    columns = ["layer", "part", "parameters", "of those added", "GFLOP"]
    columns += ["ms", "timed as", "temporary MB", "offsets MB"] if timed else []
    cells = []
    for row in summary["layers"]:
        share = f"{100 * row['share_of_added']:.1f} %" if row.get("parameters") and "share_of_added" in row else ""
        cell = [row["layer"], row["part"], f"{row['parameters']:,}", share, f"{row['gflop']:.2f}"]
        if timed:
            memory = [row["temporary_bytes"], row["offset_bytes"]] if row["how"] != "matrix product" else [None, None]
            cell += [f"{row['ms']:.2f}", row["how"], *("" if m is None else f"{m / 1e6:.2f}" for m in memory)]
        cells.append(cell)
    height, width = summary["map_size"]
    console.table(
        f"{name}, one image, maps of {height}x{width}",
        columns,
        cells,
        right=[c for c in columns[2:] if c != "timed as"],
    )
    plain, deformable, paper = summary["plain"], summary["deformable"], summary["paper"]
    columns = ["", "plain", "deformable", "added", "ratio"]
    rows = [
        _line("parameters, M", plain["parameters"] / 1e6, deformable["parameters"] / 1e6),
        _line("  the paper's", paper["plain"]["parameters_m"], paper["deformable"]["parameters_m"], 1),
        _line("GFLOP", plain["gflop"], deformable["gflop"], 1),
    ]
    if timed:
        rows.append(_line("ms on this machine", plain["ms"], deformable["ms"], 1))
    rows.append(_line("  the paper's ms", 1e3 * paper["plain"]["seconds"], 1e3 * paper["deformable"]["seconds"], 0))
    console.table("", columns, rows, right=columns[1:])
    beyond = summary["added_beyond_rounding_m"]
    if beyond:
        where = "more" if beyond > 0 else "fewer"
        console.say(f"{name}: the offset layers have {abs(beyond):.2f} M {where} parameters than the paper's figures, "
                    "rounded to 0.1 M, admit; its text does not tell why.\n")  # fmt: skip
    else:
        console.say(f"{name}: the parameters of the offset layers agree with the paper's figures, rounded to 0.1 M.\n")


def _line(name: str, plain: float, deformable: float, digits: int = 3) -> list[str]:
    return [name, f"{plain:.{digits}f}", f"{deformable:.{digits}f}", f"{deformable - plain:.{digits}f}",
            f"{deformable / plain:.3f}"]  # fmt: skip
