"""A page of records (`dcn-bench report`): one HTML file that needs nothing else, not even a network.

Charts are matplotlib's SVG, put inline: the package draws with it already, and twenty charts are a few hundred
kilobytes of text that a browser scales, prints and colours. plotly's script alone is over 3 MB and vega's near 1 MB in
every page, for zooming that bars do not need. What is needed, hovering, sorting and filtering, is in report.js.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from dcn_kernels.bench import plots
from dcn_kernels.bench.record import PLAIN, Record, caption, cells, compare, load

_INK = "#010203"  # in a chart: the page's colour of text, whatever it is


def page(records: dict[str, Record]) -> str:
    """The page as HTML.

    Parameters
    ----------
    records : dict of name -> record
        As read by `dcn_kernels.bench.record.read`. Of exactly two the page has the verdicts, new over old, in the order
        given.

    Raises
    ------
    ValueError
        The records hold no rows.
    """
    if not any(record["rows"] for record in records.values()):
        raise ValueError("the records hold no rows to show")
    parts = [_head(records)]
    if len(records) == 2:
        parts.append(_verdicts(records))
    parts += [_charts(records, what) for what in ("speed", "memory", "scaling")]
    parts += [_table(number, name, record) for number, (name, record) in enumerate(records.items())]
    style, script = (
        files(__package__).joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    title = escape("dcn-kernels: " + ", ".join(records))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + f'\n<div id="tip" role="tooltip" hidden></div>\n<script>\n{script}</script>\n</body>\n</html>\n'
    )


def _head(records: dict[str, Record]) -> str:
    """What was measured where."""
    rows = []
    for name, record in records.items():
        device, settings = record["device"], record["settings"]
        busy, found = load(record), settings.get("blas")
        blas = " ".join(map(str, found.values())) if isinstance(found, dict) else str(found or "")
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        rows.append(
            [name, str(device.get("gpu") or device["cpu"]), f"{device['cores']} cores", record["created"][:16],
             (record["commit"][:8] or "none") + (" and changes" if record["dirty"] else ""),
             ", ".join(settings["backends"]), blas, f"{busy:.1f}" if busy else "quiet", versions]
        )  # fmt: skip
    columns = ["record", "machine", "cores", "measured, UTC", "commit", "backends", "BLAS", "load before", "versions"]
    return (
        '<header><h1>Measured with dcn-bench</h1><button id="theme" type="button">light / dark</button></header>\n'
        "<p>Times are medians in milliseconds; hover or tab to one for its quartiles. A peer was measured in rounds "
        "between ours, on the same arrays: above 1x we are faster.</p>\n" + _html_table("records", columns, rows, ())
    )


def _verdicts(records: dict[str, Record]) -> str:
    """Both records side by side."""
    (old_name, old), (new_name, new) = records.items()
    rows, warnings = compare(old, new)
    said = "".join(f"<p>{escape(warning)}</p>\n" for warning in warnings)
    heading = f"<h2>{escape(new_name)} over {escape(old_name)}</h2>\n"
    if not rows:
        return f"{heading}<p>The two records have no row in common, so there is nothing to compare.</p>\n"
    columns = ["layer", "operator", "direction", "offsets", "dtype", "backend", "threads", "old ms", "new ms",
               "new / old", "95 %", "verdict"]  # fmt: skip
    shown = [
        [row["layer"], row["op"], row["direction"], row["offsets"], row["dtype"], row["backend"], str(row["threads"]),
         f"{row['old_ms']:.4g}", f"{row['new_ms']:.4g}", f"{row['ratio']:.3f}",
         "{:.3f}-{:.3f}".format(*row["interval"]), row["verdict"]]
        for row in rows
    ]  # fmt: skip
    right = ("threads", "old ms", "new ms", "new / old", "95 %")
    return heading + said + _html_table("verdicts", columns, shown, right)


def _charts(records: dict[str, Record], what: str) -> str:
    """One chart for each direction."""
    titles = {"speed": "Speed beside the peers", "memory": "Temporary memory", "scaling": "Scaling by threads"}
    drawn = []
    for direction in ("forward", "backward"):
        chosen = {
            name: {**record, "rows": [row for row in record["rows"] if row["direction"] == direction]}
            for name, record in records.items()
        }
        chosen = {name: record for name, record in chosen.items() if record["rows"]}
        try:
            picture = plots.draw(chosen, what, "svg", ink=_INK, tips=True).decode()
        except ValueError:  # nothing of this kind was measured
            continue
        drawn.append(f"<figure>{_inline(picture, f'{what}-{direction}-')}</figure>")
    if not drawn:
        return ""
    return f'<h2>{titles[what]}</h2>\n<div class="charts">\n' + "\n".join(drawn) + "\n</div>"


def _inline(svg: str, prefix: str) -> str:
    """matplotlib's SVG as part of a page: ids of its own, the page's colours and type, and what hovering tells."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="tip:([^"]*)">', r'<g data-tip="\1" tabindex="0" role="img" aria-label="\1">', svg)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg).replace("xlink:href=", "href=")
    return svg.replace(_INK, "currentColor").replace("#000000", "currentColor")


def _table(number: int, name: str, record: Record) -> str:
    """All rows of a record, to be sorted and filtered."""
    columns, rows, right = cells(record)
    tips: list[dict[str, str]] = []
    for row in record["rows"]:
        place = f"{row['layer']} {row['direction']}"
        tips.append({"median ms": plots.told("dcn-kernels", place, row)})
        for peer, theirs in row["against"].items():
            tips[-1][f"{PLAIN.get(peer, peer)}, ms (x ours)"] = plots.told(theirs["what"], place, theirs)
    return (
        f"<h2>{escape(name)}</h2>\n<p>{escape(caption(record))}</p>\n"
        + _controls(f"rows-{number}", columns, rows)
        + _html_table(f"rows-{number}", columns, rows, right, tips)
    )


def _controls(table: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A field for words, and a choice for each column of few values."""
    parts = [f'<div class="controls" data-table="{table}"><input type="search" placeholder="filter: words of a row" '
             'aria-label="filter rows">']  # fmt: skip
    for place, column in enumerate(columns):
        values = list(dict.fromkeys(row[place] for row in rows))
        if column in ("operator", "direction", "offsets", "dtype", "backend", "threads") and len(values) > 1:
            options = "".join(f"<option>{escape(value)}</option>" for value in values)
            parts.append(f'<select data-column="{place}" aria-label="{column}"><option value="">{column}: all</option>'
                         f"{options}</select>")  # fmt: skip
    return "".join([*parts, '<output class="faint"></output></div>\n'])


def _html_table(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str],
    tips: Sequence[dict[str, str]] = (),
) -> str:
    """A table whose columns sort by their numbers, where they begin with one."""
    number: Callable[[str], Any] = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?").match
    heads = "".join(
        f'<th scope="col"{" class=number" if column in right else ""}>'
        f'<button type="button">{escape(column)}</button></th>'
        for column in columns
    )
    lines = []
    for place, row in enumerate(rows):
        of_row = []
        for column, cell in zip(columns, row, strict=True):
            found = number(cell) if column in right else None
            parts = [' class="number"' if column in right else ""]
            parts.append(f' data-value="{found[0]}"' if found else "")
            tip = tips[place].get(column) if tips else None
            parts.append(f' data-tip="{escape(tip)}" tabindex="0"' if tip else "")
            parts.append(f' class="{cell}"' if column == "verdict" else "")
            of_row.append(f"<td{''.join(parts)}>{escape(cell)}</td>")
        lines.append(f'<tr data-row="{place}">{"".join(of_row)}</tr>')
    return (f'<div class="wide"><table id="{name}" class="sorts"><thead><tr>{heads}</tr></thead>\n<tbody>\n'
            + "\n".join(lines) + "\n</tbody></table></div>\n")  # fmt: skip
