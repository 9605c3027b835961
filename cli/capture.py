"""`dcn-bench capture`: the layers of a program, for `dcn-bench profile --shapes`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from dcn_kernels.cli import console


@click.command()
@click.option("-o", "--output", required=True, metavar="FILE.toml", help="Where the layers are written.")
@click.option(
    "--framework",
    type=click.Choice(["torch", "jax"]),
    default="torch",
    show_default=True,
    help="torch: calls of dcn_kernels.torch and of torchvision.ops. jax: of dcn_kernels.jax, when they are traced.",
)
@click.argument("command", nargs=-1, required=True, metavar="-- python FILE ARGUMENTS...")
def capture(output: str, framework: str, command: tuple[str, ...]) -> None:
    """Run a Python program and note the deformable and RoI layers that it calls, once for each of their sizes.

    Written are the operator, sizes, options, dtype, how the input lies in memory, how often it was called, and how far
    its offsets reach; nothing else of the arrays. The exit code is the program's. The interpreter must have
    dcn-kernels installed, and takes no options of its own (PYTHONUNBUFFERED=1 instead of -u); to note a part of a
    program, use dcn_kernels.torch.record_layers in it.

    \b
    Examples:
      dcn-bench capture -o layers.toml -- python train.py --epochs 1
      dcn-bench profile --shapes layers.toml
    """
    python, *program = command
    if not Path(python).name.startswith("python") or not program or (program[0].startswith("-") and program[0] != "-m"):
        console.fail(f"expected -- python FILE ..., or -- python -m MODULE ..., got {' '.join(command)!r}")
    if program == ["-m"]:
        console.fail("expected a module after -m")
    console.check_writable(output)
    target = str(Path(output).resolve())
    before = _written(output)
    try:
        child = subprocess.Popen([python, "-m", "dcn_kernels.cli.recorded", framework, target, *program])
    except FileNotFoundError:
        console.fail(f"no interpreter {python!r}")
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            continue  # the program got it too, and its layers are written when it ends
    if _written(output) != before:
        console.note(f"saved {output}")
    else:
        console.warn(f"nothing is saved: no call of a layer of {framework} was seen, or the program was killed")
    sys.exit(code if code >= 0 else 128 - code)


def _written(path: str) -> int | None:
    return Path(path).stat().st_mtime_ns if Path(path).is_file() else None
