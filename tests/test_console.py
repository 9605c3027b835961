"""Tables in terminals of any width, and in pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest
from conftest import ROOT
from dcn_kernels.cli import console

# The commands whose tables are the same each time, and the table of a run by its published record
COMMANDS = """
import sys
from dcn_kernels.bench import record
from dcn_kernels.cli import bench, check, console
published = {published!r}
wide = {wide!r}
for main, *arguments in (
    (bench.main, "layers"),
    (bench.main, "compare", published, published),
    (bench.main, "cost", "--no-time", "--network", "R-FCN"),
    (bench.main, "sampling", "--offset", "offset.npy"),
    (check.main, "gradients", "--op", "offset_sample2d", "--backend", "reference", "--dtype", "float64"),
    (check.main, "gradients", "--self-test", "--op", "roi_align", "--backend", "reference", "--dtype", "float64"),
):
    try:
        main([*arguments, *wide])
    except SystemExit as done:
        assert not done.code, arguments
found = record.read(published)
columns, rows, right = record.cells(found)
console.table(record.caption(found), columns, rows, right, first=record.told_first(columns), wide=bool(wide))
"""
PUBLISHED = str(ROOT / "bench_results" / "cpu-2026-11-21-spread2-forward.json")


def shown(tmp_path: Any, columns: int | None, *wide: str) -> list[str]:
    """The lines of all commands' stdout: in a terminal of so many columns, or in a pipe."""
    import numpy as np

    np.save(tmp_path / "offset.npy", np.zeros((1, 18, 5, 5)))
    command = [sys.executable, "-c", COMMANDS.format(published=PUBLISHED, wide=wide)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    environment |= {"NO_COLOR": "1", "TERM": "xterm", "PYTHONUTF8": "1"}
    if columns is None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        content = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # what Linux says at a terminal's end
                break
            if not part:
                break
            content += part
    os.close(ours)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", content.decode()).splitlines()


def words(lines: list[str]) -> set[str]:
    """What no line may break: text without a space and without a comma inside."""
    return {word.rstrip(",") for line in lines for word in re.split(r"\s+|(?<=,)", line) if word and word[0].isalnum()}


def test_a_terminal_gets_whole_words_within_its_width_and_a_pipe_gets_all(tmp_path: Any) -> None:
    pipe = shown(tmp_path, None)
    everything = words(pipe)
    assert not any("\x1b" in line for line in pipe)
    of_tables = [line for line in pipe if "  " in line.strip()]  # paragraphs are folded all the same
    assert [line for line in shown(tmp_path, 80, "--wide") if "  " in line.strip()] == of_tables
    for columns in (60, 80, 200):
        lines = shown(tmp_path, columns)
        assert max(map(len, lines)) <= columns
        assert words(lines) <= everything, words(lines) - everything
    assert words(shown(tmp_path, 300)) == everything


class Terminal:
    """A stdout that is one."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> Terminal:
    """Where stdout goes from now on, without colours."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    return terminal


def table_at(monkeypatch: pytest.MonkeyPatch, width: int, **options: Any) -> list[str]:
    terminal = a_terminal(monkeypatch, width)
    rows = [["first", "1.25", "one, two and three", "x" * 12], ["second", "10.5", "four", "y"]]
    console.table("", ["name", "time in ms", "remark", "long"], rows, ["time in ms"], **options)
    return re.sub(r"\x1b\[[\d;]*m", "", terminal.text).splitlines()


def test_columns_go_and_fold_as_the_width_shrinks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = table_at(monkeypatch, 52)
    assert lines[0] == "name    time in ms  remark              long" and len(lines) == 4
    assert lines[3] == "second        10.5  four                y"
    lines = table_at(monkeypatch, 40, first=["long", "name"])
    assert [line.split() for line in lines[:3]] == [["name", "time", "long"], ["in"], ["ms"]]
    assert "left out here: remark; --wide shows all columns" in capsys.readouterr().err
    assert table_at(monkeypatch, 40, wide=True) == table_at(monkeypatch, 52)
    monkeypatch.setattr(console, "_NARROWEST", 8)
    lines = table_at(monkeypatch, 36, folded=["remark"], first=["name", "remark"])
    assert [line.split() for line in lines[4:7]] == [["first", "1.25", "one,", "two", "x" * 12], ["and"], ["three"]]
    assert table_at(monkeypatch, 3)[0] == "name"  # one column stays at any width


def test_what_would_steer_the_terminal_is_spelled_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = a_terminal(monkeypatch, 80)
    console.table("a\x1b[31mtitle", ["\x07"], [["one\ntwo"], ["\udc80\x9b2J"]])
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.text).splitlines() == [
        "a\\x1b[31mtitle", "\\x07", "\u2500" * 12, "one two", "\\udc80\\x9b2J",
    ]  # fmt: skip
    console.warn("bell \x07")
    assert capsys.readouterr().err == "warning: bell \\x07\n"
