"""One operator is one row (`Op`): all that the dispatcher, the checks, the benchmark and the tests know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Sizes = dict[str, int]
Params = dict[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call: arrays by name (an absent optional one is left out) and parameters by name."""

    arrays: dict[str, Any]
    params: Params
    label: str = ""
    steps: dict[str, float] = field(default_factory=dict)  # how far an argument may move without meeting a kink
    expected: dict[str, Any] = field(default_factory=dict)  # on the kinks alone: the gradients where grad_output is 1


@dataclass(frozen=True, eq=False)  # compared by identity: a row can be the key of a dict
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
    layer_sizes: dict[str, Any]  # size of a benchmark's layer -> its usual value; None: every layer tells it
    layer_call: Callable[[dict[str, Any]], tuple[dict[str, Shape], Params]]  # layer -> arrays' shapes, and parameters
    layer_sample: Callable[..., Sample]  # (layer, *, offsets, spread, seed) -> arrays of these shapes
    flops: Callable[[Sizes, str], float]  # (sizes, direction) -> floating-point operations
    bytes: Callable[[Sizes, str, int], float]  # (sizes, direction, itemsize) -> bytes of all arrays, each moved once
    scatters: bool = True  # the backward adds into shared elements, so `deterministic` matters
    sums_lines: bool = False  # a bin's samples are summed along each axis first: see check/wrong_calls.py
    zero_sizes: tuple[str, ...] = field(default=("N", "R"))  # sizes that may be 0
    saved: dict[str, str] = field(default_factory=dict)  # int64 arrays that the forward gives with return_<name>=True
    gpu: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what only a GPU takes -> directions that take it
    check_values: Callable[[str, dict[str, Any], Sizes], None] | None = None  # on a GPU only where validate=True

    layer_params: Params = field(default_factory=dict)  # what a layer's call takes besides arrays and sizes
    layer_spread: float | None = None  # of a layer's offsets, in their unit; None: in pixels, as trained filters have
    package: str = "dcn_kernels"  # holds the public functions, and a folder `<backend>/` with `module` for each backend
    axes: tuple[str, ...] = ("H", "W")  # the sizes that its coordinates run along
    product: Callable[[Sizes], tuple[int, int, int, int]] | None = None  # the plain operator's (how many, m, k, n)

    kinks: Callable[[int], list[Sample]] | None = None  # seed -> cases on the kinks, with the documented gradients
    # the choices of a random call -> the call in float64; without it the fuzzer takes the shapes of `samples`
    drawn: Callable[[Any], Sample] | None = None
    part: Callable[[Sample, int, int], tuple[Sample, dict[str, Any]]] | None = None  # (layer, count, seed) -> a part

    def __repr__(self) -> str:
        return f"Op({self.name!r})"

    @property
    def has_offsets(self) -> bool:
        """Some argument with a gradient is a coordinate: the benchmark times it with several kinds of offsets."""
        return any(name in self.coordinates for name in self.differentiable)

    @property
    def plain_only(self) -> tuple[str, ...]:
        """Arguments that the adapters do not have: they allocate the results, and know the device by the arrays."""
        return ("out", "backend", *(f"return_{name}" for name in self.saved))
