"""`call` is the only dispatcher.

The way of a call: public function -> `call` -> `dcn_kernels.<backend>.<op.module>.<op.name>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from dcn_kernels.dispatch import arrays as _arrays
from dcn_kernels.dispatch import memory, shapes
from dcn_kernels.dispatch.row import Op, Params, Sizes


def module_of(op: Op, backend: str) -> str:
    """The module with a backend's functions of an operator: the backend's name is that of its folder."""
    return f"{op.package}.{backend}.{op.module}"


def function(op: Op, direction: str, backend: str) -> Callable[..., Any]:
    """A backend's function of an operator. Looked up at each call, so that one that a test has replaced is run."""
    name = op.name if direction == "forward" else f"{op.name}_backward"
    return getattr(import_module(module_of(op, backend)), name)


def public(op: Op, direction: str = "forward") -> Callable[..., Any]:
    """The public function of a row."""
    return getattr(import_module(op.package), op.name if direction == "forward" else f"{op.name}_backward")


def parameters_for(op: Op, direction: str, backend: str, params: Params) -> Params:
    """The parameters that a backend's function takes: what concerns a GPU alone is left out for the others."""
    gpu = backend not in ("reference", "cpu")
    return {name: v for name, v in params.items() if name not in op.gpu or (gpu and direction in op.gpu[name])}


def check_values(op: Op, backend: str, arrays: dict[str, Any], sizes: Sizes, params: Params) -> None:
    """The row's checks of values. On a GPU only where asked for: reading an array back waits for the GPU."""
    if op.check_values is not None and (backend != "cuda" or params.get("validate")):
        op.check_values(op.name, arrays, sizes)


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
        host = taken.backend != "cuda"
        try:
            if host and out is None:
                size = shapes.result_bytes(op, direction, taken.arrays, sizes, params, names)
                if taken.backend == "reference":  # works on float64 copies
                    size += 8 * sum(array.size for array in taken.arrays.values())
                memory.check(size, "results" if taken.backend == "cpu" else "results and float64 copies")
            check_values(op, taken.backend, taken.arrays, sizes, params)
            target = shapes.check_out(op, taken.out, taken.arrays, sizes) if direction == "forward" else None
            run = function(op, direction, taken.backend)
            params = parameters_for(op, direction, taken.backend, params)
            inputs = {name: taken.arrays.get(name) for name in arrays}
            if direction == "forward":
                return taken.give(run(**inputs, **params, out=target), out)
            return taken.give(run(**inputs, **params, wrt=names)) if names else {}
        except MemoryError as error:
            if host:  # CuPy's says what it is about
                raise memory.said(op.name, error, sizes) from None
            raise
