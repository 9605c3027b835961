"""One operator is one row (`Op`): all that the dispatcher, the checks, the benchmark and the tests know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Sizes = dict[str, int]
Params = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call: arrays by name (an absent optional one is left out) and parameters by name."""

    arrays: dict[str, Any]
    params: Params
    label: str = ""
    steps: dict[str, float] = field(default_factory=dict)  # how far an argument may move without meeting a kink
    expected: dict[str, Any] = field(default_factory=dict)  # of a case on the kinks: gradients for a grad_output of 1


@dataclass(frozen=True, eq=False)  # a row is itself: it can be a key
class Op:
    """A row of the registry: all that the dispatcher, the checks, the benchmark and the tests know of an operator."""

    name: str  # public function; its gradient is `<name>_backward`
    module: str  # file stem in each backend's folder
    arrays: dict[str, str]  # argument -> named shape, in the order in which the sizes become known
    output: str  # named shape of the result
    optional: tuple[str, ...]  # arguments that may be None
    differentiable: tuple[str, ...]  # arguments that get a gradient
    coordinates: tuple[str, ...]  # arguments that may stay float32 beside half-precision inputs
    parameters: Callable[[Params], Params]  # checks and normalises the parameters
    derived: dict[str, Callable[[Sizes, Params], int]]  # sizes that follow from other sizes and the parameters
    divides: tuple[tuple[str, str], ...]  # (divisor, size) pairs that must divide exactly
    samples: Callable[[int], list[Sample]]  # seed -> small float64 cases over all options, off the kinks
    layer_sample: Callable[..., Sample]  # (sizes, *, offsets, seed) -> inputs of a named layer's shape
    flops: Callable[[Sizes, str], float]  # (sizes, direction) -> floating-point operations
    bytes: Callable[[Sizes, str, int], float]  # (sizes, direction, itemsize) -> compulsory traffic
    scatters: bool = True  # the backward adds into shared elements, so `deterministic` matters
    sums_lines: bool = False  # a bin's samples are summed along each axis first: see check/wrong_calls.py
    zero_sizes: tuple[str, ...] = field(default=("N", "R"))  # sizes that may be 0
    saved: dict[str, str] = field(default_factory=dict)  # int64 arrays that the forward gives with return_<name>=True
    gpu: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what only a GPU takes -> directions that take it
    check_values: Callable[[str, dict[str, Any], Sizes], None] | None = None  # on a GPU with validate=True alone

    package: str = "dcn_kernels"  # holds the public functions, and a folder `<backend>/` with `module` for each backend
    axes: tuple[str, ...] = ("H", "W")  # the sizes that its coordinates run along
    product: Callable[[Sizes], tuple[int, int, int, int]] | None = None  # (how many, m, k, n) of the plain operator's

    kinks: Callable[[int], list[Sample]] | None = None  # seed -> cases on the kinks, with the documented gradients
    # the choices of a random call -> the call in float64; without it the fuzzer takes the shapes of `samples`
    drawn: Callable[[Any], Sample] | None = None
    part: Callable[[Sample, int, int], tuple[Sample, dict[str, Any]]] | None = None  # some elements of a layer, alone

    def __repr__(self) -> str:
        return f"Op({self.name!r})"

    @property
    def plain_only(self) -> tuple[str, ...]:
        """What the adapters of frameworks leave out: they make the results, and know the device."""
        return ("out", "backend", *(f"return_{name}" for name in self.saved))
