"""Calls noted while a program runs, as layers that `dcn-bench profile --shapes` times.

Of a call these are kept: the operator, the sizes and options, the dtype, how the input lies in memory, how many such
calls there were, and of its offsets how many there are, their standard deviation (a layer's `spread`) and how many of
them lie within `LIMITS`. Nothing else of the arrays' contents is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from math import sqrt
from pathlib import Path
from typing import Any

from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.call import public
from dcn_kernels.dispatch.row import Op, Params, Shape
from dcn_kernels.ops.registry import OPS

LIMITS = (1, 4, 16)  # a layer's `source` tells the share of offsets within each of these, in the offsets' unit
LEAST_SPREAD = 0.01  # what is written where offsets are all alike: a layer's spread must be above 0
# Options left out of a layer's `source`: they change no result, or are no property of a layer.
_UNTOLD = ("deterministic", "validate", "workspace_bytes")


@dataclass(frozen=True)
class Array:
    """Shape, dtype and strides (in elements; None: not known) of an argument."""

    shape: Shape
    dtype: Any
    strides: Shape | None = None

    @property
    def lies(self) -> str:
        """How it lies in memory, in words; empty if that is not known."""
        if self.strides is None:
            return ""

        def runs(order: Sequence[int]) -> bool:
            step = 1
            for axis in reversed(order):
                if self.shape[axis] > 1:
                    if self.strides[axis] != step:  # type: ignore[index]
                        return False
                    step *= self.shape[axis]
            return True

        axes = range(len(self.shape))
        if runs(axes):
            return "contiguous"
        return "channels last" if runs([0, *axes[2:], 1]) else "other strides"


@dataclass
class Reach:
    """How far offsets reach: summed up over calls."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * len(LIMITS))

    def add(self, other: Reach) -> None:
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.within = [a + b for a, b in zip(self.within, other.within, strict=True)]

    @property
    def spread(self) -> float:
        """Their standard deviation."""
        mean = self.total / self.count
        return sqrt(max(0.0, self.squares / self.count - mean * mean))


@dataclass
class Call:
    """Calls of the same operator with the same sizes, options, dtype and layout."""

    op: Op
    sizes: dict[str, Any]
    told: tuple[str, ...]
    count: int = 0
    reach: Reach = field(default_factory=Reach)


class Recording:
    """The calls of a program, by their sizes.

    Examples
    --------
    >>> import numpy as np
    >>> from dcn_kernels.ops.recording import Array, Recording
    >>> recording = Recording()
    >>> arrays = {"input": Array((1, 4, 9, 9), "float32"), "rois": Array((20, 5), "float32")}
    >>> recording.add("roi_align", arrays, {"output_size": 7, "spatial_scale": 0.25})
    >>> print(recording.toml())
    # 1 call
    <BLANKLINE>
    [layers."roi_align 1"]
    op = "roi_align"
    N = 1
    C = 4
    H = 9
    W = 9
    R = 20
    output_size = [7, 7]
    spatial_scale = 0.25
    source = "1 call, float32"
    <BLANKLINE>
    """

    def __init__(self) -> None:
        self.calls: dict[Any, Call] = {}

    def add(self, name: str, arrays: dict[str, Array], params: Params, reach: Reach | None = None) -> None:
        """Note a forward call; arguments that no call takes are refused as the operator would, by an error."""
        op = OPS[name]
        defaults = {p.name: p.default for p in signature(public(op)).parameters.values() if p.name not in op.arrays}
        usual = {**{p: value for p, value in defaults.items() if p not in op.plain_only}, **op.layer_params}
        checked = op.parameters({**usual, **params})
        bound = shapes.bind_symbols(op, arrays, checked)
        if not all(isinstance(size, int) and size for size in bound.values()):
            return  # a symbol of a tracer: the sizes are open; or nothing to compute, as of no regions
        sizes = {size: _size(op, size, bound, checked) for size in op.layer_sizes}
        first = arrays[next(iter(op.arrays))]
        plain = op.parameters({**usual, **{size: checked[size] for size in op.layer_sizes if size in checked}})
        options = [
            f"{option}={value}"
            for option, value in checked.items()
            if option not in op.layer_sizes and option not in _UNTOLD and plain.get(option, value) != value
        ]
        absent = [f"no {each}" for each in op.optional if each not in arrays]
        told = (str(first.dtype), *([f"input {first.lies}"] if first.lies else []), *options, *absent)
        key = (name, tuple(sizes.values()), told)
        call = self.calls.setdefault(key, Call(op, sizes, told))
        call.count += 1
        if reach is not None and reach.count:
            call.reach.add(reach)

    def toml(self) -> str:
        """The layers, those with the most calls first, as `dcn-bench profile --shapes` reads them."""
        total = sum(call.count for call in self.calls.values())
        parts = [f"# {_calls(total)}\n"]
        numbers: dict[str, int] = {}
        for call in sorted(self.calls.values(), key=lambda each: -each.count):
            numbers[call.op.name] = numbers.get(call.op.name, 0) + 1
            lines = [f"[layers.{json.dumps(f'{call.op.name} {numbers[call.op.name]}')}]", f'op = "{call.op.name}"']
            for name, value in call.sizes.items():
                lines.append(f"{name} = {list(value) if isinstance(value, tuple) else value}")
            told = [_calls(call.count), *call.told]
            if call.reach.count:
                lines.append(f"spread = {max(LEAST_SPREAD, round(call.reach.spread, 3))}")
                shares = zip(LIMITS, call.reach.within, strict=True)
                told.append(
                    "offsets " + ", ".join(f"{100 * n / call.reach.count:.0f} % within {limit}" for limit, n in shares)
                )
            lines.append(f"source = {json.dumps(', '.join(told), ensure_ascii=False)}")
            parts.append("\n".join(lines) + "\n")
        return "\n".join(parts)

    def write(self, path: str | Path) -> None:
        """Write `toml()` to a file, which is whole or as it was."""
        target = Path(path)
        draft = target.with_name(f".{target.name}.writing")
        try:
            draft.write_text(self.toml(), encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


def offsets_of(op: Op, arrays: dict[str, Any]) -> Any:
    """The argument whose values say how far samples wander; None if the call has none."""
    names = [name for name in op.differentiable if name in op.coordinates and name != "mask"]
    return next((arrays[name] for name in names if arrays.get(name) is not None), None)


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


def _size(op: Op, name: str, bound: dict[str, int], params: Params) -> Any:
    """A layer's size from the letters of the shapes and the parameters."""
    if name in params:
        return params[name]
    if name == "kernel":
        return tuple(bound[f"K{axis}"] for axis in op.axes)
    return bound[{"offset_groups": "OG"}.get(name, name)]
