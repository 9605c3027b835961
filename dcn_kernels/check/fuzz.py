"""Drawn calls on a backend, one after the other: `dcn-check fuzz`.

drawn_calls.py draws them and wrong_calls.py says what is wrong with one. With guard pages (guard.py) they are made in
a child process, whose end is a failure of the call that it was at. A wrong call is made smaller, choice by choice, as
long as it is wrong in the same way.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shlex
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from dcn_kernels.check import guard
from dcn_kernels.check.drawn_calls import DrawnCall, drawn, repeated
from dcn_kernels.check.gradients import not_written
from dcn_kernels.check.wrong_calls import Problem, every_thread, wrong
from dcn_kernels.ops.registry import OPS

MOST_FAILURES = 10
SHRINKING_S = 30.0  # a failure is made smaller for as long


@dataclass
class Failure:
    """A wrong call, as small as it was made."""

    op: str
    backend: str
    kind: str
    what: str  # the result or argument, and how it is wrong
    recipe: dict[str, Any]
    command: str  # that repeats it
    reason: str  # in full


@dataclass
class Summary:
    """What was called so far; grows while `fuzz` runs."""

    drawn: int = 0  # arguments of a forward and a backward
    calls: int = 0  # of the backends' public functions, the reference's for comparison not among them
    seconds: float = 0.0
    operators: Counter = field(default_factory=Counter)  # drawn, of each
    options: dict[tuple[str, str], Counter] = field(default_factory=dict)  # (operator, option) -> drawn, of each value
    failures: list[Failure] = field(default_factory=list)
    repeated: Counter = field(default_factory=Counter)  # (operator, backend, kind, what) -> how often it was seen
    skipped: dict[str, str] = field(default_factory=dict)  # operator and backend -> why

    def count(self, call: DrawnCall) -> None:
        """One more drawn call. Choices of a kind that each array has are counted together."""
        self.drawn += 1
        self.operators[call.op.name] += 1
        for name, value in call.choices.items():
            key = call.op.name, name.partition(".")[0] if name.startswith(("values.", "layout.", "dtype.")) else name
            if name.startswith("dtype."):
                key = call.op.name, "coordinates"
                value = "float32" if value else "the input's"
            counter = self.options.get(key)
            if counter is None:
                counter = self.options[key] = Counter()
            counter[value] += 1


# ---------------------------------------------------------------- many calls


def fuzz(
    summary: Summary,
    *,
    ops: tuple[str, ...] = (),
    backends: tuple[str, ...] = ("cpu",),
    seconds: float | None = 60.0,
    calls: int | None = None,
    seed: int = 0,
    values: str = "all",
    guarded: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> None:
    """Draw calls and compare them until the time is over or so many calls are made; `summary` holds what was seen.

    Parameters
    ----------
    summary : Summary
        Filled while it runs, so that it is there also after an interrupt.
    ops, backends : names
        Empty `ops`: all.
    seconds, calls : numbers or None
        Where to stop: whichever is reached first.
    seed : int
    values : {"all", "finite"}
        Whether arrays hold infinities and NaN now and then, as they do denormal and huge numbers.
    guarded : bool
        Whether all arrays and buffers of the CPU backend lie against unreadable pages; in a child process.
    progress : function of (what, done, total), optional
    """
    start = time.monotonic()

    def over() -> bool:
        summary.seconds = time.monotonic() - start
        enough = calls is not None and summary.calls >= calls
        return enough or (seconds is not None and summary.seconds >= seconds) or len(summary.failures) >= MOST_FAILURES

    table = _table(summary, ops or tuple(OPS), backends)
    if not table:
        return
    number = 0
    while not over():
        events = _apart(table, seed, values, number) if guarded else _here(table, seed, values, number)
        try:
            for at, (call, backend, made, found) in events:
                number = at
                summary.count(call)
                summary.calls += made
                if found:
                    progress(f"{call.op.name}: making a failure smaller", *_done(summary, seconds, calls))
                    _keep_failure(summary, call, backend, found, guarded)
                if over():
                    break
                if summary.drawn % 20 == 0:
                    progress(_spoken(summary), *_done(summary, seconds, calls))
        finally:
            events.close()
        number += 1
    progress("", 1, 1)


Event = tuple[int, tuple[DrawnCall, str, int, Any]]


def _table(summary: Summary, ops: tuple[str, ...], backends: tuple[str, ...]) -> list[tuple[str, str]]:
    table = []
    for name in ops:
        for backend in backends:
            missing = not_written(OPS[name], backend)
            if missing:
                summary.skipped[f"{name} {backend}"] = missing
            else:
                table.append((name, backend))
    return table


def _done(summary: Summary, seconds: float | None, calls: int | None) -> tuple[int, int]:
    if calls is not None:
        return summary.calls, calls
    return int(summary.seconds), int(seconds or 0)


def _spoken(summary: Summary) -> str:
    return f"{summary.calls} calls, {len(summary.failures)} failures"


def _here(
    table: list[tuple[str, str]], seed: int, values: str, start: int, sides: tuple[str, ...] = ()
) -> Generator[Event, None, None]:
    """Calls in this process, from number `start` on."""
    with every_thread():
        for number in itertools.count(start):
            name, backend = table[number % len(table)]
            call = drawn(OPS[name], (seed, number), values)
            count: list[int] = []
            threads = (1, call.choices["threads"]) if backend == "cpu" else ()
            found = wrong(call, backend, threads=threads, sides=sides, made=count.append)
            yield number, (call, backend, sum(count), found)


def _apart(table: list[tuple[str, str]], seed: int, values: str, start: int) -> Generator[Event, None, None]:
    """The same in a child process with guard pages; ends after a call that ended the child."""
    shared = mmap.mmap(-1, 8)  # the number of the call that runs
    shared[:] = struct.pack("q", start)

    def work(send: Callable[[str], None]) -> None:
        events = _here(table, seed, values, start, guard.SIDES)
        for number, (_, backend, made, found) in events:
            send(json.dumps([number, backend, made, found]))
            shared[:] = struct.pack("q", number + 1)

    for line in (lines := in_child(work)):
        if isinstance(line, int):
            (number,) = struct.unpack("q", shared[:])
            name, backend = table[number % len(table)]
            yield number, (drawn(OPS[name], (seed, number), values), backend, 0, ("fault", _ended(line), _ended(line)))
            break
        number, backend, made, found = json.loads(line)
        name, _ = table[number % len(table)]
        yield number, (drawn(OPS[name], (seed, number), values), backend, made, tuple(found) if found else None)
    lines.close()


def _ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"the process ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the process ended with {os.waitstatus_to_exitcode(status)}"


def in_child(work: Callable[[Callable[[str], None]], None]) -> Generator[str | int, None, None]:
    """The lines that `work` sends from a forked child, and last, if it was ended, its status."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                work(lambda line: print(line, file=pipe, flush=True))
            status = 0
        except BrokenPipeError:
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    ended = False
    try:
        with os.fdopen(reading) as pipe:
            for line in pipe:
                if line.endswith("\n"):
                    yield line
        status, ended = os.waitpid(child, 0)[1], True
        if status:
            yield status
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ---------------------------------------------------------------- a failure


def repeat(recipe: dict[str, Any], backend: str, *, guarded: bool = False) -> Problem | None:
    """What is wrong with the call of a recipe, at every number of threads; None: nothing."""
    call = repeated(recipe)

    def found() -> Problem | None:
        with every_thread():
            threads = (1, 2, 3, 7) if backend == "cpu" else ()
            return wrong(call, backend, threads=threads, sides=guard.SIDES if guarded else ())

    if not guarded:
        return found()
    for line in in_child(lambda send: send(json.dumps(found()))):
        if isinstance(line, int):
            return "fault", _ended(line), _ended(line)
        problem = json.loads(line)
        if problem:
            return tuple(problem)
    return None


def _keep_failure(summary: Summary, call: DrawnCall, backend: str, found: Problem, guarded: bool) -> None:
    key = call.op.name, backend, *found[:2]
    summary.repeated[key] += 1
    if summary.repeated[key] == 1:  # another with the same is taken for the same fault
        small, reason = smaller(call, backend, found, guarded)
        line = command(small, backend, guarded)
        summary.failures.append(Failure(call.op.name, backend, *found[:2], small, line, reason))


def command(recipe: dict[str, Any], backend: str, guarded: bool) -> str:
    """What repeats a call."""
    text = f"dcn-check fuzz --backend {backend} --call {shlex.quote(json.dumps(recipe))}"
    return f"{text} --guard" if guarded else text


def smaller(call: DrawnCall, backend: str, found: Problem, guarded: bool) -> tuple[dict[str, Any], str]:
    """The recipe of a call that is wrong in the same way and of simpler choices, and what is wrong with it."""
    recipe, reason, until = call.recipe, found[2], time.monotonic() + SHRINKING_S
    progress = True
    while progress and time.monotonic() < until:
        progress = False
        current = repeated(recipe)
        for name, value in list(recipe.items()):
            if name in ("op", "seed"):
                continue
            for simpler in _simpler(value, current.options.get(name, ())):
                if time.monotonic() > until:
                    break
                try:
                    candidate = repeated({**recipe, name: simpler}).recipe
                except Exception:  # no such call
                    continue
                if candidate == recipe:
                    continue
                problem = repeat(candidate, backend, guarded=guarded)
                if problem and problem[:2] == found[:2]:
                    recipe, reason, progress = candidate, problem[2], True
                    break
            if progress:
                break
    return recipe, reason


def _simpler(value: Any, options: Any) -> list[Any]:
    """Options before the value, the simplest first."""
    before = list(dict.fromkeys(options))
    before = before[: before.index(value)] if value in before else before[:1]
    if len(before) > 4:
        return [before[0], before[len(before) // 2], before[-1]]
    return before
