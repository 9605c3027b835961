"""Every operator of the registry as a `torch.library` operator, made from its row: fake, autograd, autocast and vmap.

An operator `name` becomes `torch.ops.dcn_kernels.name` and its gradient `torch.ops.dcn_kernels.name_backward`. What the
caller gets is a function with the plain function's own signature, less `out` and `backend`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import dcn_kernels
from dcn_kernels import shapes
from dcn_kernels.op import Op, Params, call

NAMESPACE = "dcn_kernels"
# What only the plain functions take: results are made by the operator, and torch knows the device.
PLAIN_ONLY = ("out", "backend", "return_argmax")
DTYPES = {
    torch.float16: shapes.DTYPES["float16"],
    torch.bfloat16: shapes.DTYPES["bfloat16"],
    torch.float32: shapes.DTYPES["float32"],
    torch.float64: shapes.DTYPES["float64"],
}
HALVES = (torch.float16, torch.bfloat16)
# The plain functions' annotations as types of a torch schema.
SCHEMA_TYPES = {
    "int": "int",
    "int | None": "int?",
    "int | tuple[int, int]": "int[]",
    "float": "float",
    "str": "str",
    "bool": "bool",
}


@dataclass(frozen=True)
class Described:
    """Shape and dtype of a tensor, as the checks in `shapes` read them."""

    shape: tuple[Any, ...]
    dtype: Any


@dataclass(frozen=True)
class Arguments:
    """The arguments of one operator, in the plain function's order."""

    op: Op
    signature: inspect.Signature
    arrays: tuple[str, ...]
    params: tuple[str, ...]
    pairs: frozenset[str]  # parameters that are an int or (h, w): a schema knows only lists

    def schema(self) -> str:
        """The forward's arguments in torch's schema language."""
        parts = [f"Tensor{'?' if name in self.op.optional else ''} {name}" for name in self.arrays]
        for name in self.params:
            parts.append(f"{SCHEMA_TYPES[str(self.signature.parameters[name].annotation)]} {name}")
        return ", ".join(parts)

    def split(self, values: Sequence[Any]) -> tuple[dict[str, Any], Params]:
        """An operator's positional values as arrays and parameters by name."""
        arrays = dict(zip(self.arrays, values[: len(self.arrays)], strict=True))
        return arrays, dict(zip(self.params, values[len(self.arrays) :], strict=True))


def arguments_of(op: Op) -> Arguments:
    """Read the plain function's signature."""
    signature = inspect.signature(getattr(dcn_kernels, op.name))
    kept = [parameter for name, parameter in signature.parameters.items() if name not in PLAIN_ONLY]
    names = [parameter.name for parameter in kept]
    params = tuple(name for name in names if name not in op.arrays)
    pairs = frozenset(name for name in params if "tuple" in str(signature.parameters[name].annotation))
    return Arguments(op, signature.replace(parameters=kept), tuple(n for n in names if n in op.arrays), params, pairs)


def _describe(op: Op, arrays: dict[str, torch.Tensor | None]) -> dict[str, Described]:
    known = {}
    for name, tensor in arrays.items():
        if tensor is not None:
            if tensor.dtype not in DTYPES:
                raise TypeError(f"{op.name}: {name}: expected dtype {', '.join(shapes.DTYPES)}, got {tensor.dtype}")
            known[name] = Described(tuple(tensor.shape), DTYPES[tensor.dtype])
    return known


def _register(arguments: Arguments) -> Any:
    """Define the forward and its gradient as operators, and tie them together."""
    op = arguments.op
    schema = arguments.schema()

    def forward(*values: Any) -> torch.Tensor:
        arrays, params = arguments.split(values)
        with torch.no_grad():
            return call(op, "forward", arrays, params)

    def forward_fake(*values: Any) -> torch.Tensor:
        arrays, params = arguments.split(values)
        described = _describe(op, arrays)
        shapes.check_dtypes(op, described)
        sizes = shapes.bind_symbols(op, described, op.parameters(params))
        return arrays[next(iter(op.arrays))].new_empty(shapes.evaluate(op.output, sizes))

    def backward(grad_output: torch.Tensor, *values: Any) -> list[torch.Tensor]:
        arrays, params = arguments.split(values[:-1])
        wanted = [name for name, flag in zip(op.differentiable, values[-1], strict=True) if flag]
        with torch.no_grad():
            grads = call(op, "backward", {"grad_output": grad_output, **arrays}, params, wrt=wanted)
        return [grads[name] for name in wanted]

    def backward_fake(grad_output: torch.Tensor, *values: Any) -> list[torch.Tensor]:
        arrays, _ = arguments.split(values[:-1])
        wanted = [name for name, flag in zip(op.differentiable, values[-1], strict=True) if flag]
        return [torch.empty_like(arrays[name], memory_format=torch.contiguous_format) for name in wanted]

    forward_op = torch.library.custom_op(
        f"{NAMESPACE}::{op.name}", forward, mutates_args=(), schema=f"({schema}) -> Tensor"
    )
    forward_op.register_fake(forward_fake)
    backward_op = torch.library.custom_op(
        f"{NAMESPACE}::{op.name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor grad_output, {schema}, bool[] wanted) -> Tensor[]",
    )
    backward_op.register_fake(backward_fake)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        count = len(arguments.arrays)
        ctx.save_for_backward(*inputs[:count])
        ctx.params = inputs[count:]

    def gradients(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        needed = dict(zip(arguments.arrays, ctx.needs_input_grad, strict=False))
        wanted = [needed[name] for name in op.differentiable]
        names = [name for name in op.differentiable if needed[name]]
        grads = dict(zip(names, backward_op(grad_output, *ctx.saved_tensors, *ctx.params, wanted), strict=True))
        return (*(grads.get(name) for name in arguments.arrays), *(None for _ in arguments.params))

    forward_op.register_autograd(gradients, setup_context=setup)
    forward_op.register_vmap(_one_by_one(forward_op))
    backward_op.register_vmap(_one_by_one(backward_op))
    return forward_op


def _one_by_one(operator: Any) -> Callable[..., Any]:
    """vmap by one call per element: any argument may be batched, weights and RoIs too."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *values: Any) -> tuple[Any, Any]:
        def element(value: Any, dim: Any, i: int) -> Any:
            return value.select(dim, i) if isinstance(value, torch.Tensor) and dim is not None else value

        results = [
            operator(*(element(value, dim, i) for value, dim in zip(values, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(results[0])

    return rule


def _autocast(op: Op, arrays: dict[str, torch.Tensor | None]) -> None:
    """Under autocast, input and weights in its half precision; coordinates stay float32 where they are."""
    first = arrays[next(iter(op.arrays))]
    device = first.device.type  # type: ignore[union-attr]
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return
    half = torch.get_autocast_dtype(device)
    for name, tensor in arrays.items():
        if tensor is None or tensor.dtype not in (*HALVES, torch.float32):
            continue
        if name not in op.coordinates or tensor.dtype in HALVES:
            arrays[name] = tensor.to(half)


def _nothing_to_record(arrays: dict[str, Any]) -> bool:
    """No gradient, cast, trace, transform or mode asks for the operator: the plain call does, in half the time."""
    grad = torch.is_grad_enabled()
    for array in arrays.values():
        if array is not None and (
            type(array) not in (torch.Tensor, torch.nn.Parameter)
            or (grad and array.requires_grad)
            or not (array.is_cpu or array.is_cuda)
        ):
            return False
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
    )


def function_of(op: Op) -> Callable[..., torch.Tensor]:
    """The operator as a function on tensors, with the plain function's signature."""
    arguments = arguments_of(op)
    operator = _register(arguments)
    parameters = list(arguments.signature.parameters.values())
    missing = object()
    template = {p.name: missing if p.default is p.empty else p.default for p in parameters}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    first = next(iter(op.arrays))

    def function(*args: Any, **kwargs: Any) -> torch.Tensor:
        # By hand, as torch.compile does not trace inspect.Signature.bind.
        if len(args) > len(positional):
            raise TypeError(f"{op.name}: expected at most {len(positional)} positional arguments, got {len(args)}")
        values = {**template, **dict(zip(positional, args, strict=False))}
        for name, value in kwargs.items():
            if name not in values or name in positional[: len(args)]:
                why = "it twice" if name in values else "an unknown argument"
                raise TypeError(f"{op.name}: {name}: expected one of {', '.join(template)}, each once, got {why}")
            values[name] = value
        arrays = {name: values[name] for name in arguments.arrays}
        params = {name: values[name] for name in arguments.params}
        if torch.are_deterministic_algorithms_enabled() and "deterministic" in params:
            params["deterministic"] = True
        if not torch.compiler.is_compiling() and _nothing_to_record(arrays):
            plain = {n: a.detach() if type(a) is torch.nn.Parameter else a for n, a in arrays.items()}
            return call(op, "forward", plain, params)
        for name, array in arrays.items():
            if not isinstance(array, torch.Tensor) and not (array is None and name in op.optional):
                got = "none" if array is missing else type(array).__name__
                raise TypeError(f"{op.name}: {name}: expected a torch.Tensor, got {got}")
            if array is not None and array.device != arrays[first].device:
                raise TypeError(
                    f"{op.name}: {name}: expected a tensor on {arrays[first].device} as {first} is, "
                    f"got one on {array.device}"
                )
        for name, value in params.items():
            if value is missing:
                raise TypeError(f"{op.name}: {name}: expected a value, got none")
        _autocast(op, arrays)
        if not torch.compiler.is_compiling():
            op.parameters(params)  # our own words for a wrong one, before the schema's
        for name in arguments.pairs:
            value = params[name]
            params[name] = [value, value] if isinstance(value, int) else list(value)
        return operator(*arrays.values(), *params.values())

    function.__name__ = function.__qualname__ = op.name
    function.__module__ = "dcn_kernels.torch"
    function.__signature__ = arguments.signature  # type: ignore[attr-defined]
    function.__doc__ = (
        f"`dcn_kernels.{op.name}` as a differentiable torch operator; see there for the arguments.\n\n"
        f"    Gradients: {', '.join(op.differentiable)}, each computed only where it is needed. Under autocast "
        "input and\n    weights are half precision, and coordinates stay as they are. `torch.vmap` makes one call "
        "per element.\n    `torch.use_deterministic_algorithms(True)` means deterministic=True.\n    "
    )
    return function


FUNCTIONS = {name: function_of(op) for name, op in dcn_kernels.OPS.items()}
