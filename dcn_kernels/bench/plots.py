"""Pictures of records (`dcn-bench plot`); needs matplotlib."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from dcn_kernels.bench.record import PLAIN, Record, key, machine

# Okabe and Ito's colours: told apart also by the colour-blind
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#999999")


def draw(records: dict[str, Record], what: str, kind: str, *, ink: str = "#000000", tips: bool = False) -> bytes:
    """A picture of records by name.

    Parameters
    ----------
    records : dict of name -> record
    what : {"speed", "memory", "scaling", "cost"}
        Time by layer and backend beside the peers; temporary memory by layer; speed-up by number of threads; time
        against arithmetic, where what costs in proportion lies on a line.
    kind : {"png", "svg", "pdf"}
    ink : str
        Colour of text and lines.
    tips : bool
        Of an SVG: the id of each mark that was measured is "tip:" and a line that tells its numbers.

    Raises
    ------
    ValueError
        The records hold nothing to draw.
    """
    if not any(record["rows"] for record in records.values()):
        raise ValueError("the records hold no rows to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look: dict[str, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    if tips:  # for a page: its own type, nothing beneath, and the same file for the same records
        look |= {"svg.fonttype": "none", "svg.hashsalt": "dcn-kernels", "font.family": "sans-serif"}
        look |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    with plt.style.context(look):
        figure = {"speed": _speed, "memory": _memory, "scaling": _scaling, "cost": _cost}[what](plt, records)
        if not tips:
            _forget_tips(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=130, bbox_inches="tight", transparent=tips)
        plt.close(figure)
    return buffer.getvalue()


def _forget_tips(figure: Any) -> None:
    for artist in figure.findobj(lambda artist: str(artist.get_gid() or "").startswith("tip:")):
        artist.set_gid(None)


def told(series: str, place: str, found: dict[str, Any]) -> str:
    """One line of a row of ours or of a peer: whose, of what, its median and quartiles."""
    low, high = np.percentile(found["samples_ms"], [25, 75])
    return (
        f"{series}, {' '.join(place.split())}: median {found['median_ms']:.4g} ms, quartiles {low:.4g} to {high:.4g}, "
        f"{len(found['samples_ms'])} samples"
    )


def _suffix(records: dict[str, Record], name: str) -> str:
    """The record's name, where two records hold the same row."""
    keys = [{key(row) for row in record["rows"]} for record in records.values()]
    return f" ({name})" if len(set().union(*keys)) < sum(map(len, keys)) else ""


def _series(records: dict[str, Record], row: dict[str, Any], name: str) -> str:
    """What a bar of ours is called: the backend, and whatever else tells rows apart."""
    rows = [r for record in records.values() for r in record["rows"]]
    words = ["dcn-kernels", row["backend"]]
    if len({r["dtype"] for r in rows}) > 1:
        words.append(row["dtype"])
    if len({r["threads"] for r in rows}) > 1:
        words.append(f"{row['threads']} thread" + "s" * (row["threads"] > 1))
    return " ".join(words) + _suffix(records, name)


def _place(row: dict[str, Any]) -> str:
    """The label of a row's group of bars."""
    return f"{row['layer']}  {row['op']}" + ("" if row["offsets"] == "none" else f"\n{row['offsets']} offsets")


Panels = dict[str, dict[str, dict[str, tuple[float, str]]]]  # panel -> place -> series -> (value, what it tells)


def _bars(plt: Any, panels: Panels, unit: str, title: str, log: bool) -> Any:
    """Horizontal bars."""
    from matplotlib import ticker
    from matplotlib.patches import Patch

    series = list(dict.fromkeys(name for places in panels.values() for bars in places.values() for name in bars))
    places = list(dict.fromkeys(place for panel in panels.values() for place in panel))
    most = max(len(bars) for panel in panels.values() for bars in panel.values())
    height = 1.6 + len(places) * max(0.5, 0.2 + 0.17 * most)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.2 * len(panels), height), sharey=True, squeeze=False, layout="constrained"
    )
    thick = 0.8 / most
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(series)}
    for axis, (panel, groups) in zip(axes[0], sorted(panels.items(), reverse=True), strict=True):
        values = [value for bars in groups.values() for value, _ in bars.values()]
        for place, bars in groups.items():
            present = [name for name in series if name in bars]
            long = [bars[name][0] for name in present]
            first = places.index(place) - (len(present) - 1) / 2 * thick  # bars side by side, whichever are missing
            at = [first + number * thick for number in range(len(present))]
            drawn = axis.barh(at, long, thick * 0.92, color=[colours[name] for name in present])
            for bar, name in zip(drawn, present, strict=True):
                bar.set_gid(f"tip:{bars[name][1]}")
            labels = [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in long]
            axis.bar_label(drawn, labels, padding=2, fontsize=8)
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,)))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_xlim(min(values) / 2, max(values) * 2.5)
        else:
            axis.set_xlim(0, max(values) * 1.15)
        axis.set_title(panel, loc="left", fontweight="bold")
        axis.set_xlabel(unit)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(places)), places)
    axes[0][0].set_ylim(len(places) - 0.4, -0.6)
    columns = min(3, len(series))
    figure.legend(
        [Patch(color=colours[name]) for name in series],
        series,
        title=title,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=9,
        alignment="left",
    )
    return figure


def _where(records: dict[str, Record]) -> str:
    machines = {machine(record) for record in records.values()}
    threads = sorted({row["threads"] for record in records.values() for row in record["rows"]})
    return ", ".join(sorted(machines)) + f", {', '.join(map(str, threads))} threads"


def _most_threads(records: dict[str, Record]) -> dict[str, Record]:
    """The rows at each record's largest number of threads: the others are for the picture of scaling."""
    kept = {}
    for name, record in records.items():
        most = max((row["threads"] for row in record["rows"]), default=1)
        kept[name] = {**record, "rows": [row for row in record["rows"] if row["threads"] == most]}
    return kept


def _speed(plt: Any, records: dict[str, Record]) -> Any:
    panels: Panels = {}
    records = _most_threads(records)
    for name, record in records.items():
        for row in record["rows"]:
            bars = panels.setdefault(row["direction"], {}).setdefault(_place(row), {})
            ours = _series(records, row, name)
            bars[ours] = row["median_ms"], told(ours, _place(row), row)
            for peer, theirs in row["against"].items():
                series = PLAIN.get(peer, peer) + _suffix(records, name)
                bars[series] = theirs["median_ms"], told(series, _place(row), theirs)
    return _bars(plt, panels, "milliseconds, median (log scale; shorter is better)", _where(records), log=True)


def table(records: dict[str, Record]) -> str:
    """The numbers of the picture of speed as Markdown: each layer, and how many times as long each peer takes.

    Raises
    ------
    ValueError
        The records hold no row with a peer beside it.
    """
    records = _most_threads(records)
    rows = [row for record in records.values() for row in record["rows"] if row["against"]]
    if not rows:
        raise ValueError("the records hold no row with a peer beside it")
    directions = [word for word in ("forward", "backward") if any(row["direction"] == word for row in rows)]
    peers = {word: list(dict.fromkeys(p for row in rows if row["direction"] == word for p in row["against"]))
             for word in directions}  # fmt: skip
    columns = ["layer"]
    for word in directions:
        columns += [f"{word}, ms", *(PLAIN.get(peer, peer) for peer in peers[word])]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for place in dict.fromkeys(_place(row) for row in rows):
        line = [" ".join(place.split())]
        for word in directions:
            found = next((row for row in rows if _place(row) == place and row["direction"] == word), None)
            line.append("" if found is None else f"{found['median_ms']:.3g}")
            for peer in peers[word]:
                theirs = found and found["against"].get(peer)
                line.append(f"{theirs['ratio']:.2f}x" if theirs else "")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _memory(plt: Any, records: dict[str, Record]) -> Any:
    panels: Panels = {}
    for name, record in records.items():
        for row in record["rows"]:
            if row["temp_bytes"] is not None:
                bars = panels.setdefault(row["direction"], {}).setdefault(_place(row), {})
                series, size = _series(records, row, name), row["temp_bytes"] / 1e6
                bars[series] = size, f"{series}, {' '.join(_place(row).split())}: {size:.1f} MB"
    if not panels:
        raise ValueError("the records hold no temporary memory to draw")
    return _bars(plt, panels, "temporary memory of a call, MB", _where(records), log=False)


def _scaling(plt: Any, records: dict[str, Record]) -> Any:
    lines: dict[str, dict[str, dict[int, float]]] = {}
    dtypes = {row["dtype"] for record in records.values() for row in record["rows"]}
    for name, record in records.items():
        for row in record["rows"]:
            label = f"{row['layer']} {row['backend']}" + ("" if row["offsets"] == "none" else f", {row['offsets']}")
            label += (f", {row['dtype']}" if len(dtypes) > 1 else "") + _suffix(records, name)
            lines.setdefault(row["direction"], {}).setdefault(label, {})[row["threads"]] = row["median_ms"]
    several = {word: {label: at for label, at in panel.items() if len(at) > 1} for word, panel in lines.items()}
    lines = {word: panel for word, panel in several.items() if panel}  # a single point is no line
    if not lines:
        raise ValueError("scaling needs rows at two numbers of threads: --threads 1 --threads 2")
    height = max(4.6, 1 + 0.19 * max(map(len, lines.values())))  # of the legend
    figure, axes = plt.subplots(1, len(lines), figsize=(5.6 * len(lines), height), squeeze=False)
    for axis, (panel, found) in zip(axes[0], lines.items(), strict=True):
        most = 1
        for number, (label, points) in enumerate(found.items()):
            threads = sorted(points)
            most = max(most, threads[-1])
            speedup = [points[threads[0]] / points[count] * threads[0] for count in threads]
            dashes, colour = "-" if number < len(_COLOURS) else "--", _COLOURS[number % len(_COLOURS)]
            axis.plot(threads, speedup, linestyle=dashes, marker="o", markersize=4, label=label, color=colour)
        axis.plot([1, most], [1, most], ":", color="0.5", label="linear")
        axis.set_title(panel, loc="left", fontweight="bold")
        axis.set_xlabel("threads")
        axis.set_xticks(sorted({count for points in found.values() for count in points}))
        axis.set_ylabel("speed-up")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(", ".join(sorted({r["device"]["cpu"] for r in records.values()})), x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    return figure


def _cost(plt: Any, records: dict[str, Record]) -> Any:
    panels: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    for name, record in records.items():
        for row in record["rows"]:
            gflop = row["gflops"] * row["median_ms"] / 1e3
            series = panels.setdefault(row["direction"], {}).setdefault(_series(records, row, name), [])
            series.append((gflop, row["median_ms"], row["layer"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 5.2), squeeze=False)
    for axis, (panel, found) in zip(axes[0], sorted(panels.items(), reverse=True), strict=True):
        for number, (label, points) in enumerate(found.items()):
            gflop, ms, _ = zip(*sorted(points), strict=True)
            colour = _COLOURS[number % len(_COLOURS)]
            axis.plot(gflop, ms, "os^Dv"[number % 5], markersize=5, label=label, color=colour, alpha=0.8)
            rate = sorted(m / g for m, g in zip(ms, gflop, strict=True))[len(ms) // 2]
            axis.plot(gflop, [rate * g for g in gflop], ":", color=colour, linewidth=1)
        axis.plot([], [], ":", color="0.5", label="in proportion (the median rate)")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(panel, loc="left", fontweight="bold")
        axis.set_xlabel("arithmetic of a call, GFLOP")
        axis.set_ylabel("milliseconds, median")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, frameon=False, loc="upper left")
    figure.suptitle(_where(records), x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    for axis, (_, found) in zip(axes[0], sorted(panels.items(), reverse=True), strict=True):  # the layout is final
        _name_points(
            figure, axis, next(iter(found.values())), [(x, y) for every in found.values() for x, y, _ in every]
        )
    return figure


def _name_points(
    figure: Any, axis: Any, named: list[tuple[float, float, str]], marks: list[tuple[float, float]]
) -> None:
    """Write the names of points beside them, each where it covers no mark, no other name and no legend.

    Nor is a name nearer to another named point than to its own.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer, point = figure.canvas.get_renderer(), figure.dpi / 72
    taken = [Bbox.from_bounds(x - 4 * point, y - 4 * point, 8 * point, 8 * point)
             for x, y in axis.transData.transform(marks)]  # fmt: skip
    taken.append(axis.get_legend().get_window_extent(renderer))
    at = axis.transData.transform([(x, y) for x, y, _ in named])
    for own, (x, y, name) in sorted(zip(at, named, strict=True), key=lambda pair: pair[1]):
        text = axis.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=7, va="center")
        best, least = (0.0, 0.0, "left"), np.inf
        for far in (6, 12, 20, 30):
            for dx, dy in ((-1, 0.7), (1, -0.7), (-1, 0), (1, 0), (-1, -0.7), (1, 0.7), (0, 1.4), (0, -1.4)):
                place = (far * dx, far * dy, {-1: "right", 0: "center", 1: "left"}[dx])
                text.set(position=place[:2], ha=place[2])
                box = text.get_window_extent(renderer)
                covered = sum(_shared(box, other) for other in taken)
                covered += box.width * box.height - _shared(box, axis.bbox)
                covered += _distance(box, own) > min(_distance(box, other) for other in at)
                if covered < least:
                    best, least = place, covered
            if least == 0:
                break
        text.set(position=best[:2], ha=best[2])
        if max(map(abs, best[:2])) > 12:  # which point it names is no longer plain
            text.remove()
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkB": 3}
            text = axis.annotate(name, (x, y), best[:2], textcoords="offset points", fontsize=7, va="center",
                                 ha=best[2], arrowprops=line)  # fmt: skip
        taken.append(Text.get_window_extent(text, renderer))  # without the line


def _distance(box: Any, mark: Any) -> float:
    """From a box to a point outside it."""
    return float(np.hypot(*(mark - np.clip(mark, box.min, box.max))))


def _shared(a: Any, b: Any) -> float:
    """The area that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
