"""`dcn-bench report`: a page that holds what the records say, needs nothing else, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from dcn_kernels.cli.bench import main

from dcn_kernels.bench import record, report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PEERS = ROOT / "bench_results" / "cpu-2026-11-21-spread2-forward.json"
SCALING = ROOT / "bench_results" / "cpu-2026-11-21-scaling-forward.json"


class Page(HTMLParser):
    """Its tags with their attributes, and its tables as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)
        if tag == "table":
            self.table = str(dict(attrs)["id"])
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.tables[self.table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[self.table][-1][-1] += data


def changed(found: record.Record, factor: float) -> record.Record:
    """The record as a run would have given it in which all took so many times as long."""
    rows = [
        {**row, "median_ms": row["median_ms"] * factor, "quartiles_ms": [q * factor for q in row["quartiles_ms"]],
         "samples_ms": [s * factor for s in row["samples_ms"]]}
        for row in found["rows"]
    ]  # fmt: skip
    return {**found, "rows": rows}


@pytest.fixture(scope="module")
def text() -> str:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    old = record.read(PEERS)
    return report.page({"before": old, "after": changed(old, 0.5)})


def test_the_page_asks_for_nothing_from_elsewhere(text: str) -> None:
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), f"{tag} {attributes}"
        assert tag not in ("iframe", "object", "embed", "base")
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)


def test_the_page_is_well_formed_and_no_id_is_there_twice(text: str) -> None:
    page = Page(text)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and all(name and " " not in name for name in ids)
    known = {f"#{name}" for name in ids}
    used = {str(attributes["href"]) for tag, attributes in page.tags if tag == "use"}
    used |= set(re.findall(r"url\((#[^)]*)\)", text))
    assert used and used <= known


def test_the_page_has_each_row_with_its_numbers_and_quartiles(text: str) -> None:
    page, found = Page(text), record.read(PEERS)
    columns, rows, _ = record.cells(found)
    assert page.tables["rows-0"] == [columns, *rows]
    tips = [attributes["data-tip"] for tag, attributes in page.tags if tag == "td" and "data-tip" in attributes]
    bars = [attributes["data-tip"] for tag, attributes in page.tags if tag == "g" and "data-tip" in attributes]
    for row in found["rows"]:
        for samples in (row["samples_ms"], *(theirs["samples_ms"] for theirs in row["against"].values())):
            low, high = np.percentile(samples, [25, 75])
            said = f"quartiles {low:.4g} to {high:.4g}, {len(samples)} samples"
            assert any(said in str(tip) for tip in tips) and any(said in str(bar) for bar in bars), said


def test_two_records_have_the_verdicts_that_compare_gives(text: str) -> None:
    old = record.read(PEERS)
    rows, _ = record.compare(old, changed(old, 0.5))
    shown = Page(text).tables["verdicts"]
    assert [line[-1] for line in shown[1:]] == [row["verdict"] for row in rows]
    assert "faster" in {row["verdict"] for row in rows}
    assert [line[9] for line in shown[1:]] == [f"{row['ratio']:.3f}" for row in rows]


def test_records_with_nothing_in_common_say_so() -> None:
    text = report.page({"peers": record.read(PEERS), "threads": record.read(SCALING)})
    assert "no row in common" in text and "Scaling by threads" in text and "verdicts" not in Page(text).tables


def test_what_a_record_says_is_text_and_not_markup() -> None:
    found = record.read(PEERS)
    found["rows"][0]["layer"] = '<img src="x">&"'
    found["device"]["cpu"] = "<script>alert(1)</script>"
    text = report.page({"<b>": found})
    assert "<img" not in text and "<b>" not in text and text.count("<script>") == 1
    assert Page(text).tables["rows-0"][1][0] == '<img src="x">&"'


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    output = tmp_path / "r.html"
    result = CliRunner().invoke(main, ["report", str(PEERS), "-o", str(output)])
    assert result.exit_code == 0 and f"saved {output}" in result.stderr and "<!DOCTYPE html>" in output.read_text()
    for arguments, said in (([str(PEERS), "-o", "r.txt"], "ends in .html"),
                            ([str(PEERS), str(PEERS), "-o", str(output)], "given twice")):  # fmt: skip
        result = CliRunner().invoke(main, ["report", *arguments])
        assert result.exit_code == 2 and said in result.stderr and result.stdout == ""


# What a person does with the page, and what is seen of it. `found` is written into the page, which the browser prints.
ACTIONS = """
const found = {errors: window.seenErrors};
const table = document.getElementById("rows-0");
const heads = [...table.tHead.rows[0].cells];
const place = heads.findIndex((head) => head.textContent === "median ms");
const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[place].textContent));
found.before = column();
heads[place].querySelector("button").click();
found.ascending = column();
heads[place].querySelector("button").click();
found.descending = column();
found.marked = heads.map((head) => head.getAttribute("aria-sort"));
const controls = document.querySelector('.controls[data-table="rows-0"]');
const words = controls.querySelector("input");
const shown = () => [...table.tBodies[0].rows].filter((row) => row.offsetParent).map((row) => row.cells[0].textContent);
words.value = "C2 random";
words.dispatchEvent(new Event("input"));
found.filtered = shown();
found.counted = controls.querySelector("output").textContent;
words.value = "";
words.dispatchEvent(new Event("input"));
found.all = shown().length;
const tip = document.getElementById("tip");
found.hiddenBefore = tip.offsetParent === null;
const bar = document.querySelector("svg g[data-tip]");
bar.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
found.tip = tip.offsetParent === null ? null : tip.textContent;
found.wanted = bar.dataset.tip;
const colours = () => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
found.colours = [colours()];
document.getElementById("theme").click();
found.colours.push(colours());
found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const frame = document.createElement("iframe");
frame.style.width = "360px";
frame.srcdoc = window.wholePage;
frame.onload = () => {
  const root = frame.contentDocument.documentElement;
  found.narrow = root.scrollWidth - root.clientWidth;
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
};
document.body.append(frame);
"""


@pytest.fixture(scope="module")
def seen(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if BROWSER is None:
        pytest.skip("no Chromium: neither chromium, chromium-browser nor google-chrome is on PATH")
    whole = json.dumps(text).replace("</", "<\\/").replace("<!--", "<\\!--")
    listen = "window.seenErrors = []; addEventListener('error', (event) => window.seenErrors.push(event.message));"
    page = text.replace("<title>", f"<script>{listen}</script><title>", 1)
    page = page.replace(
        "</body>", f"<script>window.wholePage = {whole};</script><script>{{ {ACTIONS} }}</script></body>"
    )
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={folder / 'profile'}", "--window-size=1200,900", "--virtual-time-budget=10000",
               "--enable-logging=stderr", "--dump-dom", (folder / "page.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    written = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert written, f"the actions did not end:\n{done.stderr[-2000:]}"
    return {**json.loads(unescape(written[1])), "console": re.findall(r".*:CONSOLE.*", done.stderr)}


def test_a_browser_opens_the_page_without_an_error_and_without_a_request(seen: dict[str, Any]) -> None:
    assert seen["errors"] == [] and seen["console"] == [] and seen["requests"] == []


def test_tables_sort_in_a_browser(seen: dict[str, Any]) -> None:
    assert seen["ascending"] == sorted(seen["before"]) != seen["before"]
    assert seen["descending"] == sorted(seen["before"], reverse=True)
    assert [mark for mark in seen["marked"] if mark] == ["descending"]


def test_tables_filter_in_a_browser(seen: dict[str, Any]) -> None:
    rows = len(record.read(PEERS)["rows"])
    assert seen["filtered"] == ["C2"] and seen["counted"] == f"1 of {rows} rows" and seen["all"] == rows


def test_hovering_tells_the_quartiles_in_a_browser(seen: dict[str, Any]) -> None:
    assert seen["hiddenBefore"] and seen["tip"] == seen["wanted"] and "quartiles" in seen["tip"]


def test_light_and_dark_differ_and_nothing_is_wider_than_a_phone(seen: dict[str, Any]) -> None:
    (page, ink), (other_page, other_ink) = seen["colours"]
    assert page != other_page and ink != other_ink
    assert seen["wide"] <= 0 and seen["narrow"] <= 0
