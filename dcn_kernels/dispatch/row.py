"""One operator is one row (`Op`); `call` is the only dispatcher.

The way of a call: public function -> `call` -> `dcn_kernels.<backend>.<op.module>.<op.name>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from dcn_kernels import arrays as _arrays
from dcn_kernels import shapes

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
    zero_sizes: tuple[str, ...] = field(default=("N", "R"))  # sizes that may be 0
    saved: dict[str, str] = field(default_factory=dict)  # int64 arrays of the forward that the backward may take

    kinks: Callable[[int], list[Sample]] | None = None  # seed -> cases on the kinks, with the documented gradients
    part: Callable[[Sample, int, int], tuple[Sample, dict[str, Any]]] | None = None  # some elements of a layer, alone

    def __repr__(self) -> str:
        return f"Op({self.name!r})"


def function(op: Op, direction: str, backend: str) -> Callable[..., Any]:
    """The function of one cell of the table: looked up at each call, so a replaced one is the one that runs."""
    name = op.name if direction == "forward" else f"{op.name}_backward"
    return getattr(import_module(f"dcn_kernels.{backend}.{op.module}"), name)


def call(
    op: Op,
    direction: str,
    arrays: dict[str, Any],
    params: Params,
    *,
    backend: str | None = None,
    out: Any = None,
    wrt: Iterable[str] | str | None = None,
) -> Any:
    """Check the arguments, pick the backend, take the arrays in, run, and give the results back.

    Parameters
    ----------
    op : Op
        The operator's row.
    direction : {"forward", "backward"}
    arrays : dict
        Argument name -> array of any DLPack framework, or None; for "backward" with `grad_output` first.
    params : dict
        Everything else that the public function takes.
    backend : {None, "reference", "cpu", "cuda"}
        None: the one that belongs to the arrays' device.
    out : array, optional
        Forward only: where the result is written.
    wrt : names, optional
        Backward only: which gradients; None means all differentiable arguments that were given.

    Returns
    -------
    The forward's array (or tuple of arrays), or the backward's dict from argument name to gradient,
    in the caller's own kind of array.
    """
    params = op.parameters(params)
    shapes.check_present(op, arrays, direction)
    names = shapes.wanted(op, arrays, wrt) if direction == "backward" else ()
    given = {name: array for name, array in arrays.items() if array is not None}
    with _arrays.taken_in(op.name, given, out, backend) as taken:
        shapes.check_dtypes(op, taken.arrays)
        sizes = shapes.bind(op, taken.arrays, params)
        if "rois" in op.arrays and (taken.backend != "cuda" or params["validate"]):  # on a GPU reading them would wait
            shapes.check_rois(op.name, taken.arrays["rois"], sizes["N"])
        target = shapes.check_out(op, taken.out, taken.arrays, sizes) if direction == "forward" else None
        run = function(op, direction, taken.backend)
        inputs = {name: taken.arrays.get(name) for name in arrays}
        if direction == "forward":
            return taken.give(run(**inputs, **params, out=target), out)
        return taken.give(run(**inputs, **params, wrt=names)) if names else {}
