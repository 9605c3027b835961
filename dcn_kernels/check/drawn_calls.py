"""Calls drawn at random, over every row and all that a caller may choose: options, sizes, dtypes, values, memory.

A call is a seed and named choices (`ops.samples.draw.Choices`): a row says which (`Op.drawn`), those that all
operators share are here. The same seed and choices give the same call, so a failure is repeated by writing them down
and made smaller by replacing one choice at a time by a simpler one.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from dcn_kernels.check.calls import output_shape
from dcn_kernels.dispatch.row import Op, Sample
from dcn_kernels.dtypes import DTYPES, HALVES, accumulator
from dcn_kernels.ops.registry import OPS
from dcn_kernels.ops.samples.draw import Choices

FINITE = ("zero", "denormal", "huge")
SPECIAL = (*FINITE, "infinite", "nan")
VALUES = ("finite", "all")
LAYOUTS = ("contiguous", "contiguous", "transposed", "negative", "stepped", "broadcast", "unaligned", "any")
_ROOM = 0xFF  # what lies between the elements of an array: NaN


@dataclass(frozen=True)
class DrawnCall:
    """One call, both directions, and what it was made of."""

    op: Op
    seed: tuple[int, ...]
    choices: dict[str, Any]
    options: dict[str, Any]  # choice -> what it was chosen from, the simplest first
    sample: Sample  # values of the arrays' dtypes in C order, parameters
    grad_output: np.ndarray
    sizes: dict[str, int]
    dtype: str
    wrt: tuple[str, ...] | None

    @property
    def recipe(self) -> dict[str, Any]:
        """What `repeated` makes it from again: operator, seed, and the choices that are not the simplest."""
        chosen = {name: value for name, value in self.choices.items() if value != self.options[name][0]}
        return {"op": self.op.name, "seed": list(self.seed), **chosen}

    @property
    def exact(self) -> Sample:
        """The same numbers in the type in which coordinates are computed: what the reference is given."""
        wide = accumulator(DTYPES[self.dtype])
        return dataclasses.replace(
            self.sample, arrays={name: array.astype(wide) for name, array in self.sample.arrays.items()}
        )


def drawn(op: Op, seed: tuple[int, ...], values: str = "all") -> DrawnCall:
    """The call of this seed; `values` "finite" leaves out infinities and NaN."""
    return _call(op, seed, None, FINITE if values == "finite" else SPECIAL)


def repeated(recipe: dict[str, Any]) -> DrawnCall:
    """The call of a `DrawnCall.recipe`, which JSON may have been between."""
    chosen = {name: value for name, value in recipe.items() if name not in ("op", "seed")}
    return _call(OPS[recipe["op"]], tuple(recipe["seed"]), chosen, SPECIAL)


@lru_cache(maxsize=64)
def _samples(op: Op, seed: int) -> list[Sample]:
    return [*op.samples(seed), *(op.kinks(seed) if op.kinks else [])]


def _of_samples(op: Op, choose: Choices) -> Sample:
    """For a row that draws nothing itself: its cases, with other values of its flags."""
    samples = _samples(op, choose.size("samples", 0, 3))
    sample = samples[choose.size("sample", 0, len(samples) - 1)]
    flags = {
        name: choose.of(name, (False, True))
        for name, value in sample.params.items()
        if isinstance(value, (bool, np.bool_))
    }
    return Sample(dict(sample.arrays), {**sample.params, **flags})


def _call(op: Op, seed: tuple[int, ...], chosen: dict[str, Any] | None, special: tuple[str, ...]) -> DrawnCall:
    choose = Choices(seed, chosen)
    sample = op.drawn(choose) if op.drawn else _of_samples(op, choose)
    sizes, shape = output_shape(op, sample)
    dtype = choose.of("dtype", ("float32", "float64", "float16", "bfloat16"))
    storage, half = DTYPES[dtype], DTYPES[dtype] in HALVES
    values = {**sample.arrays, "grad_output": choose.rng.integers(-64, 65, shape) / 32}
    arrays, huge = {}, False
    for name, array in values.items():
        wide = name in op.coordinates and half and choose.of(f"dtype.{name}", (False, True))
        plain = array.astype(accumulator(storage) if wide else storage)
        kind = choose.of(f"values.{name}", ("drawn",) * 12 + special)
        if kind == "huge" and name not in op.coordinates:
            # one array alone: the products of two overflow, where rounding decides between infinity and a number
            kind, huge = ("drawn" if huge else kind), True
        arrays[name] = _with_special(plain, kind, choose.rng)
        if kind != "drawn" and op.check_values and name in op.arrays and not _accepted(op, {**arrays}, values, sizes):
            arrays[name] = plain
        if choose.of(f"layout.{name}", LAYOUTS) == "broadcast":  # the same numbers along an axis
            arrays[name] = laid(arrays[name], "broadcast", seed).array.copy("C")
    grad_output = arrays.pop("grad_output")
    present = [name for name in op.differentiable if name in arrays]
    subsets = [c for count in range(1, len(present)) for c in itertools.combinations(present, count)]
    wrt = choose.of("wrt", ("all", *("+".join(names) for names in subsets)))
    choose.of("out", ("fresh", "given"))
    choose.of("threads", (2, 3, 7))  # on the CPU, compared with one
    for name in op.saved:
        choose.of(f"return_{name}", (False, True) if _returns(op, sample, name) else (False,))
    return DrawnCall(
        op, seed, choose.made, choose.options, dataclasses.replace(sample, arrays=arrays), grad_output, sizes, dtype,
        None if wrt == "all" else tuple(wrt.split("+")),
    )  # fmt: skip


def _accepted(op: Op, arrays: dict[str, Any], values: dict[str, Any], sizes: dict[str, int]) -> bool:
    """The row's own check of values takes these; arrays that are not made yet are taken as drawn."""
    try:
        op.check_values(op.name, {**values, **arrays}, sizes)  # type: ignore[misc]
    except ValueError:
        return False
    return True


def _returns(op: Op, sample: Sample, name: str) -> bool:
    """The parameters allow `return_<name>`."""
    try:
        op.parameters({**sample.params, f"return_{name}": True})
    except ValueError:
        return False
    return True


def _with_special(array: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Some elements, or all denormal ones, replaced by numbers of a kind."""
    if kind == "drawn" or array.size == 0:
        return array
    info, changed = ml_dtypes.finfo(array.dtype), array.copy()
    flat, count = changed.reshape(-1), int(rng.integers(1, 4))
    at = np.arange(flat.size) if kind == "denormal" and rng.integers(2) else rng.integers(0, flat.size, count)
    sign = rng.choice([-1.0, 1.0], at.size)
    with np.errstate(all="ignore"):
        if kind == "denormal":
            number = sign * rng.integers(0, 8, at.size) * float(info.smallest_subnormal)
        elif kind == "huge":  # far beyond every map; a sum of products with the other arrays does not overflow
            number = sign * np.exp2(np.floor(np.log2(float(info.max)) * 0.78))
        else:
            number = sign * {"zero": 0.0, "infinite": np.inf, "nan": np.nan}[kind]
        flat[at] = number.astype(array.dtype)
    return changed


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class Laid:
    """An array in its own memory, which holds nothing before its first and after its last element."""

    array: np.ndarray
    memory: np.ndarray  # bytes, those between the elements too


def laid(values: np.ndarray, layout: str, seed: tuple[int, ...]) -> Laid:
    """The values in a memory layout; "broadcast" repeats those of one index along an axis."""
    if values.size == 0:
        return Laid(values, np.empty(0, np.uint8))
    rng = np.random.default_rng([*seed, values.size])
    shape, itemsize, axes = values.shape, values.itemsize, values.ndim
    everything = layout == "any"
    order = rng.permutation(axes) if layout == "transposed" or everything else np.arange(axes)
    step = int(rng.integers(2, 4)) if layout == "stepped" or (everything and rng.integers(2)) else 1
    signs = rng.choice([-1, 1], axes) if layout == "negative" or everything else np.ones(axes, int)
    still = int(rng.integers(axes)) if layout == "broadcast" else -1
    shift = int(rng.integers(1, itemsize)) if layout == "unaligned" else 0
    strides, extent = [0] * axes, step  # in elements
    for axis in reversed(order):
        if axis == still:
            values = np.broadcast_to(values.take([0], axis), shape)
        else:
            strides[axis] = extent * int(signs[axis])
            extent *= shape[axis]
        if shape[axis] == 1 and layout != "contiguous":
            strides[axis] = int(rng.choice([0, 1, -7, 1 << 40]))  # never walked
    steps = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size > 1]
    before = -sum(step for step in steps if step < 0)
    length = (before + sum(step for step in steps if step > 0) + 1) * itemsize
    memory = np.full(shift + length, _ROOM, np.uint8)
    array = np.ndarray(shape, values.dtype, memory, shift + before * itemsize, [s * itemsize for s in strides])
    one = (slice(None),) * max(still, 0) + (slice(0, 1),) if still >= 0 else ...
    array[one] = values[one]
    return Laid(array, memory)
