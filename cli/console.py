"""What a terminal sees: tables on stdout, progress and warnings on stderr, files that are whole or not written.

The only module that imports rich, and only where something is shown. rich honours NO_COLOR.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

PASS, FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130


def fail(message: str, code: int = USAGE) -> NoReturn:
    """One clear line on stderr, and out."""
    note(f"error: {message}")
    raise SystemExit(code)


def warn(message: str) -> None:
    """A line on stderr."""
    note(f"warning: {message}")


def note(message: str, *, command: bool = False) -> None:
    """A line on stderr that is no warning; a terminal gets as many as it needs, but for a command, which is copied."""
    lines = [printable(message)]
    if sys.stderr.isatty() and not command:
        lines = _folded(lines[0], shutil.get_terminal_size().columns)
    print("\n".join(lines), file=sys.stderr)


def say(text: str) -> None:
    """A result on stdout."""
    print(text)


def as_json(value: Any) -> str:
    """A result as JSON; numbers that are infinite or undefined, which JSON has not, as null."""
    import json
    import math

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=1, allow_nan=False)


def say_json(value: Any) -> None:
    """A result on stdout as JSON."""
    say(as_json(value))


def until_interrupted(source: Iterable[Any], kept: list[Any]) -> bool:
    """Append all that comes to a list, until Ctrl-C at the latest; whether that is what ended it."""
    try:
        for item in source:
            kept.append(item)
    except KeyboardInterrupt:
        return True
    return False


class Command(click.Command):
    """A command that refuses options which another one, later on the line, would make it ignore."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The options, none of which may be given twice that has one value."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            given: dict[str, str] = {}
            for option in order:
                if not isinstance(option, click.Option) or option.multiple or option.is_eager:
                    continue
                name, before = str(option.name), given.get(str(option.name))
                if before is not None:
                    both = f"{before} and {option.opts[0]}: expected one of them"
                    twice = f"{before} is given twice"
                    raise click.UsageError(twice if before == option.opts[0] else both, ctx)
                given[name] = option.opts[0]
            silent = given.get("as_json") or given.get("shape_of_output")
            if silent and "wide" in given:
                raise click.UsageError(f"--wide is about the table, which {silent} does not print", ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """Commands whose wrong usage is one line and exit code 2, and whose interruption anywhere is exit code 130."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and leave with an exit code."""
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        quiet: dict[str, Any] = {**kwargs, "standalone_mode": False}
        try:
            code = super().main(*args, **quiet)
        except click.UsageError as error:
            if not args and error.ctx is not None and error.message == error.ctx.get_help():  # no command at all
                print(error.message, file=sys.stderr)  # its help, of many lines
                raise SystemExit(USAGE) from None
            path = error.ctx.command_path if error.ctx else self.name
            fail(f"{path}: {error.format_message().rstrip('.')}; see {path} --help")
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except click.Abort:  # what click makes of Ctrl-C
            warn("interrupted")
            raise SystemExit(INTERRUPTED) from None
        raise SystemExit(code if isinstance(code, int) else PASS)


_COLOURS = {
    "PASS": "green",
    "FAIL": "bold red",
    "SKIP": "yellow",
    "slower": "red",
    "faster": "green",
    "unsure": "yellow",
}


WIDE = click.option("--wide", is_flag=True, help="All columns, also where the terminal is too narrow for them.")


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    *,
    first: Sequence[str] = (),
    folded: Sequence[str] = (),
    wide: bool = False,
) -> None:
    """A table on stdout: to a pipe, or with `wide`, all columns and a line a row; in a terminal what its width holds.

    Columns named in `right` are aligned to the right. Where not all fit, those in `first` are chosen before the others,
    in their order, and stderr tells which are left out. Cells of columns in `folded` may take several lines, broken at
    spaces and after commas; no other cell is broken.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    title, *columns = (printable(text) for text in (title, *columns))
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    by_column: list[list[str]] = [list(column) for column in zip(columns, *cells, strict=True)]
    widths = [max(map(_width, column)) for column in by_column]
    kept = list(range(len(columns)))
    if not wide and sys.stdout.isatty():
        limit = console.width
        title = "\n".join(_folded(title, limit))
        if sum(widths) + _GAP * (len(widths) - 1) > limit:
            rank = [columns.index(name) for name in first if name in columns]
            rank += [i for i in kept if i not in rank]
            kept, widths = _fitted(by_column, [columns.index(name) for name in folded], rank, limit)
    ruled = "\u2500" if (sys.stdout.encoding or "").lower().startswith("utf") else "-"
    if title:
        console.print(Text(title, style="italic"))
    for number, row in enumerate([columns, *cells]):
        lines = {i: _folded(row[i], widths[i]) if widths[i] < _width(row[i]) else [row[i]] for i in kept}
        for depth in range(max(map(len, lines.values()), default=0)):
            line = Text()
            for i in kept:
                part = lines[i][depth] if depth < len(lines[i]) else ""
                space = " " * max(0, widths[i] - _width(part))
                line.append(" " * _GAP if i != kept[0] else "")
                line.append(space if columns[i] in right else "")
                line.append(part, style="bold" if not number else _COLOURS.get(row[i], ""))
                line.append("" if columns[i] in right else space)
            line.rstrip()
            console.print(line)
        if not number:
            console.print(Text(ruled * (sum(widths[i] for i in kept) + _GAP * (len(kept) - 1))))
    if len(kept) < len(columns):
        left_out = ", ".join(columns[i] for i in range(len(columns)) if i not in kept)
        note(f"left out here: {left_out}; --wide shows all columns")


_GAP = 2
_NARROWEST = 20  # of a folded column whose cells are longer


def _fitted(
    by_column: list[list[str]], folded: Sequence[int], rank: Sequence[int], limit: int
) -> tuple[list[int], list[int]]:
    """(columns that fit into the limit, in their order; the width of every column), headers broken at spaces."""
    most = [max(_width(max(column[0].split(), key=_width, default="")), *map(_width, column[1:]), 0)
            for column in by_column]  # fmt: skip
    widths = list(most)
    for i in folded:
        parts = [part.rstrip() for cell in by_column[i] for part in _PARTS.findall(cell)]
        widths[i] = min(most[i], max(_NARROWEST, *map(_width, parts)))
    kept: list[int] = []
    room = limit + _GAP
    for i in rank:
        if not kept or widths[i] + _GAP <= room:
            kept.append(i)
            room -= widths[i] + _GAP
    for i in (i for i in rank if i in folded and i in kept):
        more = min(max(room, 0), most[i] - widths[i])
        widths[i] += more
        room -= more
    return sorted(kept), widths


_PARTS = re.compile(r"\s*[^\s,]*,*\s*")  # a text is their sum; a line may end after each


def _folded(text: str, width: int) -> list[str]:
    """Lines of at most so many cells, broken at spaces and after commas; a longer word sticks out."""
    lines = [""]
    for part in _PARTS.findall(text):
        if lines[-1] and _width(lines[-1] + part.rstrip()) > width:
            lines.append(part.lstrip())
        else:
            lines[-1] += part
    return [line.rstrip() for line in lines]


def _width(text: str) -> int:
    """Cells of a terminal that the text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def printable(text: str) -> str:
    """A line of text from anywhere as a terminal may have it: what would steer the terminal is spelled out."""
    text = " ".join(text.splitlines())
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def prose(text: str) -> None:
    """A paragraph on stdout, in lines that fit a terminal."""
    say("\n".join(_folded(text, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else text)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with an estimate on a terminal's stderr; nothing elsewhere. Yields report(what, done, total)."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.fields[name]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None, name=title)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report


def write(path: str, text: str) -> None:
    """Write a text file as a whole."""
    write_bytes(path, text.encode())


def write_bytes(path: str, content: bytes) -> None:
    """Write a file as a whole: what was there stays until the new content is complete."""
    target = Path(path).resolve()  # what a link points to, not the link
    try:
        if target.is_dir():
            raise IsADirectoryError(21, "is a directory")
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, mode)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}")


def check_writable(path: str) -> None:
    """Refuse a path that could not be written in the end, before the work."""
    target = Path(path).resolve()
    if target.is_dir():
        fail(f"cannot write {path}: is a directory")
    if not target.parent.is_dir():
        fail(f"cannot write {path}: no folder {target.parent}")
    try:  # permissions alone do not tell
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}")
    if target.exists() and not os.access(target, os.W_OK):
        fail(f"cannot write {path}: permission denied")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def number(value: Any, digits: int = 3) -> str:
    """A number for a table; an absent one is empty."""
    if value is None:
        return ""
    return f"{value:.{digits}g}"
