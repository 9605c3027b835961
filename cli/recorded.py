"""Run a program and note its layers: ``python -m dcn_kernels.cli.recorded torch OUT train.py ...``, for `capture`."""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path


def run(framework: str, out: str, program: list[str]) -> None:
    """Run a file, or `-m module`, as `python` would, and write its layers to `out`, also where it ends by an error."""
    with import_module(f"dcn_kernels.{framework}").record_layers(out):
        if program[0] == "-m":
            sys.argv, sys.path[0] = program[1:], str(Path.cwd())
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = program, str(Path(program[0]).resolve().parent)
            runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
