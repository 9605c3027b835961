"""What a terminal sees: tables on stdout, progress and warnings on stderr, files that are whole or not written.

The only module that imports rich, and only where something is shown. rich honours NO_COLOR.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

PASS, FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130


def fail(message: str, code: int = USAGE) -> NoReturn:
    """One clear line on stderr, and out."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def warn(message: str) -> None:
    """A line on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def note(message: str) -> None:
    """A line on stderr that is no warning."""
    print(message, file=sys.stderr)


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


class Group(click.Group):
    """Commands whose wrong usage is one line and exit code 2, and whose interruption anywhere is exit code 130."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and leave with an exit code."""
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        quiet: dict[str, Any] = {**kwargs, "standalone_mode": False}
        try:
            code = super().main(*args, **quiet)
        except click.UsageError as error:
            if not args and error.ctx is not None and error.message == error.ctx.get_help():  # no command at all
                note(error.message)
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


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table on stdout; columns named in `right` are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit
        widest = sum(max([len(column), *(len(str(row[i])) for row in rows)]) + 3 for i, column in enumerate(columns))
        console = Console(width=max(80, widest + 4))
    shown = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(str(cell), style=_COLOURS.get(str(cell), "")) for cell in row))
    console.print(shown)


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
