"""Every operator of the registry as a `torch.library` operator, made from its row: fake, autograd, autocast and vmap.

An operator `name` becomes `torch.ops.dcn_kernels.name` and its gradient `torch.ops.dcn_kernels.name_backward`. What the
caller gets is a function with the plain function's own signature, less `out` and `backend`. Where something watches
torch's operators (torch.compile, export, tracing, a profiler, a dispatch mode) it calls the operator. Elsewhere it
calls the same code through a `torch.autograd.Function`, as torch's way to an operator in Python takes longer than a
small layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

import dcn_kernels
from dcn_kernels import dtypes
from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.call import call, public
from dcn_kernels.dispatch.row import Op, Params
from dcn_kernels.torch import onnx

DTYPES = {
    torch.float16: dtypes.DTYPES["float16"],
    torch.bfloat16: dtypes.DTYPES["bfloat16"],
    torch.float32: dtypes.DTYPES["float32"],
    torch.float64: dtypes.DTYPES["float64"],
}
HALVES = (torch.float16, torch.bfloat16)
PLAIN = (torch.Tensor, torch.nn.Parameter)
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

    def wanted(self, needed: Sequence[bool]) -> list[bool]:
        """Which differentiable arguments need a gradient, from a flag for each array."""
        flags = dict(zip(self.arrays, needed, strict=False))
        return [flags[name] for name in self.op.differentiable]

    def for_each_array(self, grads: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
        """The wanted gradients as one for each array, None for the others."""
        names = [name for name, flag in zip(self.op.differentiable, wanted, strict=True) if flag]
        found = dict(zip(names, grads, strict=True))
        return [found.get(name) for name in self.arrays]


def arguments_of(op: Op) -> Arguments:
    """Read the plain function's signature."""
    signature = inspect.signature(public(op))
    kept = [parameter for name, parameter in signature.parameters.items() if name not in op.plain_only]
    for place, parameter in enumerate(kept):
        if parameter.kind == parameter.KEYWORD_ONLY:
            if parameter.name not in _BY_POSITION:
                break
            kept[place] = parameter.replace(kind=parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in kept]
    params = tuple(name for name in names if name not in op.arrays)
    pairs = frozenset(name for name in params if "tuple" in str(signature.parameters[name].annotation))
    return Arguments(op, signature.replace(parameters=kept), tuple(n for n in names if n in op.arrays), params, pairs)


def _describe(op: Op, arrays: dict[str, torch.Tensor | None]) -> dict[str, Described]:
    known = {}
    for name, tensor in arrays.items():
        if tensor is not None:
            if tensor.dtype not in DTYPES:
                raise TypeError(f"{op.name}: {name}: expected dtype {', '.join(dtypes.DTYPES)}, got {tensor.dtype}")
            known[name] = Described(tuple(tensor.shape), DTYPES[tensor.dtype])
    return known


def _output_shape(op: Op, arrays: dict[str, torch.Tensor | None], params: Params) -> tuple[Any, ...]:
    described = _describe(op, arrays)
    shapes.check_dtypes(op, described)
    return shapes.evaluate(op.output, shapes.bind_symbols(op, described, op.parameters(params)))


def _gradients(op: Op, arrays: dict[str, Any], params: Params, wanted: Sequence[bool]) -> list[torch.Tensor]:
    """Those of the differentiable arguments that are wanted; `arrays` has grad_output too."""
    names = [name for name, flag in zip(op.differentiable, wanted, strict=True) if flag]
    grads = call(op, "backward", arrays, params, wrt=names)
    return [grads[name] for name in names]


def _register(arguments: Arguments) -> Any:
    """Define the forward and its gradient as operators, and tie them together."""
    op = arguments.op
    schema = arguments.schema()

    def forward(*values: Any) -> torch.Tensor:
        with torch.no_grad():
            return call(op, "forward", *arguments.split(values))

    def forward_fake(*values: Any) -> torch.Tensor:
        arrays, params = arguments.split(values)
        return arrays[next(iter(op.arrays))].new_empty(_output_shape(op, arrays, params))

    def backward(grad_output: torch.Tensor, *values: Any) -> list[torch.Tensor]:
        arrays, params = arguments.split(values[:-1])
        with torch.no_grad():
            return _gradients(op, {"grad_output": grad_output, **arrays}, params, values[-1])

    def backward_fake(grad_output: torch.Tensor, *values: Any) -> list[torch.Tensor]:
        arrays, _ = arguments.split(values[:-1])
        wanted = [name for name, flag in zip(op.differentiable, values[-1], strict=True) if flag]
        return [torch.empty_like(arrays[name], memory_format=torch.contiguous_format) for name in wanted]

    forward_op = torch.library.custom_op(
        f"{onnx.NAMESPACE}::{op.name}", forward, mutates_args=(), schema=f"({schema}) -> Tensor"
    )
    forward_op.register_fake(forward_fake)
    backward_op = torch.library.custom_op(
        f"{onnx.NAMESPACE}::{op.name}_backward",
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
        wanted = arguments.wanted(ctx.needs_input_grad)
        grads = backward_op(grad_output, *ctx.saved_tensors, *ctx.params, wanted)
        return (*arguments.for_each_array(grads, wanted), *(None for _ in arguments.params))

    forward_op.register_autograd(gradients, setup_context=setup)
    forward_op.register_vmap(_one_by_one(forward_op))
    backward_op.register_vmap(_one_by_one(backward_op))
    return forward_op


def _autograd_function(arguments: Arguments) -> Callable[..., torch.Tensor]:
    """The operator as a function of its arrays and a dict of parameters, for autograd and for torch.func."""
    op, names = arguments.op, arguments.arrays

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(params: Params, wanted: list[bool], grad_output: Any, *tensors: Any) -> Any:  # type: ignore[override]
            arrays = {"grad_output": grad_output, **dict(zip(names, tensors, strict=True))}
            return tuple(_gradients(op, arrays, params, wanted))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"{op.name}: expected a first derivative, got a second one, for which there is no formula"
            )

        @staticmethod
        def vmap(*args: Any) -> Any:
            grads, dims = _one_by_one(Gradient.apply)(*args)
            return tuple(grads), tuple(dims)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(params: Params, *tensors: Any) -> Any:  # type: ignore[override]
            return call(op, "forward", dict(zip(names, tensors, strict=True)), params)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.params = inputs[0]
            ctx.save_for_backward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # type: ignore[override]
            wanted = arguments.wanted(ctx.needs_input_grad[1:])
            # recorded in autograd only where this gradient may itself be differentiated or transformed
            recorded = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
            run = Gradient.apply if recorded else Gradient.forward
            return (None, *arguments.for_each_array(run(ctx.params, wanted, grad_output, *ctx.saved_tensors), wanted))

        @staticmethod
        def vmap(*args: Any) -> Any:
            return _one_by_one(Forward.apply)(*args)

    Forward.__name__ = Forward.__qualname__ = op.name  # shown as a result's grad_fn
    # Function.apply binds its arguments by inspect.signature, which takes longer than all else here. Where no transform
    # of torch.func is active, the method that it then calls can be called directly.
    direct = super(torch.autograd.Function, Forward).apply

    def apply(arrays: dict[str, Any], params: Params) -> torch.Tensor:
        if torch._C._are_functorch_transforms_active():
            return Forward.apply(params, *arrays.values())
        if torch.is_grad_enabled() and any(array is not None and array.requires_grad for array in arrays.values()):
            return direct(params, *arrays.values())
        return call(op, "forward", arrays, params)

    return apply


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
    if not torch._C._is_any_autocast_enabled():
        return
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


def _watched(arrays: dict[str, Any]) -> bool:
    """A mode, profiler or tracer must see a torch operator called, or a tensor is a subclass or elsewhere."""
    for array in arrays.values():
        if array is not None and (type(array) not in PLAIN or not (array.is_cpu or array.is_cuda)):
            return True
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
    )


def _refuse_tangents(op: Op, arrays: dict[str, Any]) -> None:
    """Refuse tensors of forward-mode differentiation: torch would ignore the tangent silently."""
    for name, array in arrays.items():
        if isinstance(array, torch.Tensor) and forward_ad.unpack_dual(array).tangent is not None:
            raise RuntimeError(f"{op.name}: {name}: expected a tensor without a tangent, as there is no forward mode")


def not_scripted(name: str) -> str:
    """What torch.jit.script of a function or layer is told."""
    return f"{name}: torch.jit.script cannot read it: use torch.export, torch.compile or torch.jit.trace instead"


def rois_of(rois: Any) -> Any:
    """(R, 5) with the batch index first, also from one (R_n, 4) tensor per image."""
    if not isinstance(rois, (list, tuple)):
        return rois
    rows = [torch.cat((boxes.new_full((len(boxes), 1), n), boxes), dim=1) for n, boxes in enumerate(rois)]
    return torch.cat(rows)


def _with_signature(arguments: Arguments, route: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the plain function's own parameters that calls `route` with two dicts, arrays and the rest.

    Compiled from text: binding by inspect.Signature takes longer than the rest of a call, and torch.compile cannot
    trace it.
    """
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in arguments.signature.parameters.values()]
    arrays, params = (", ".join(f"{n!r}: {n}" for n in names) for names in (arguments.arrays, arguments.params))
    text = f"def function{inspect.Signature(bare)}: return route({{{arrays}}}, {{{params}}})"
    namespace: dict[str, Any] = {"route": route}
    exec(compile(text, __file__, "exec"), namespace)
    return namespace["function"]


# torchvision's functions take these by position.
_BY_POSITION = ("sampling_ratio", "aligned")
# What other libraries' functions take, and what to write here.
_ELSEWHERE = {
    "groups": "it follows from the shapes of input and weight: leave it out",
    "deform_groups": "it follows from the shape of offset: leave it out",
    "deformable_groups": "it follows from the shape of offset: leave it out",
    "im2col_step": "the chunk is chosen here: leave it out",
    "dilate": "write dilation=",
    "pad": "write padding=",
    "pooled_size": "write output_size=",
    "sample_num": "write sampling_ratio=",
    "sample_ratio": "write sampling_ratio=",
    "trans_std": "write gamma=, or take deform_ps_roi_pool",
    "pool_mode": "mean pooling is roi_align, pooling of maxima roi_pool",
}
# Where torchvision's function of the name computes something else than the default here, and what only ours takes.
_DIFFERS = {"ps_roi_pool": ("convention", "group_size")}


def no_guess(name: str) -> TypeError:
    """The error for a call that reads as torchvision's and does not say whose numbers it wants."""
    return TypeError(
        f'{name}: convention: expected "torchvision" (what torchvision.ops.{name} computes) or "rfcn", got None: '
        "their numbers differ"
    )


def _ported(op: Op, function: Callable[..., torch.Tensor], names: Sequence[str]) -> Callable[..., torch.Tensor]:
    """The function with `boxes` for `rois`, and an answer to what other libraries call its arguments."""
    hints = {name: text for name, text in _ELSEWHERE.items() if name not in names}
    special = {*hints, *(["boxes"] if "rois" in names else [])}
    tells = _DIFFERS.get(op.name, ())

    def ported(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = (*args, *kwargs.values())
        if any(isinstance(each, torch.fx.Proxy) for each in given):  # the call is a leaf of a traced graph
            return torch.overrides.handle_torch_function(ported, given, *args, **kwargs)
        if kwargs and not special.isdisjoint(kwargs):
            if "boxes" in kwargs and "rois" in names:
                if "rois" in kwargs:
                    raise TypeError(f"{op.name}: boxes: expected rois or boxes, got both")
                kwargs["rois"] = kwargs.pop("boxes")
            for name in hints.keys() & kwargs.keys():
                raise TypeError(f"{op.name}: {name}: no such argument here: {hints[name]}")
        if tells and not any(name in kwargs for name in tells):
            raise no_guess(op.name)
        return function(*args, **kwargs)

    return ported


def function_of(op: Op) -> Callable[..., torch.Tensor]:
    """The operator as a function on tensors, with the plain function's signature."""
    arguments = arguments_of(op)
    operator, apply = _register(arguments), _autograd_function(arguments)
    first = next(iter(op.arrays))

    def route(arrays: dict[str, Any], params: Params) -> torch.Tensor:
        if "rois" in arrays:
            arrays["rois"] = rois_of(arrays["rois"])
        if "deterministic" in params and torch.are_deterministic_algorithms_enabled():
            params["deterministic"] = True
        compiling = torch.compiler.is_compiling()
        if not compiling and forward_ad._current_level >= 0:
            _refuse_tangents(op, arrays)
        if not compiling and not _watched(arrays):
            _autocast(op, arrays)
            return apply(arrays, params)
        for name, array in arrays.items():
            if not isinstance(array, torch.Tensor) and not (array is None and name in op.optional):
                raise TypeError(f"{op.name}: {name}: expected a torch.Tensor, got {type(array).__name__}")
            if array is not None and array.device != arrays[first].device:
                raise TypeError(
                    f"{op.name}: {name}: expected a tensor on {arrays[first].device} as {first} is, "
                    f"got one on {array.device}"
                )
        _autocast(op, arrays)
        if not compiling:
            op.parameters(params)  # raises our own error for a wrong one; the schema's says less
        for name in arguments.pairs:
            value = params[name]
            params[name] = list(value) if isinstance(value, (tuple, list)) else [int(value)] * 2
        if onnx.exporting() and onnx.writes(op.name, params):
            return onnx.write(op.name, arrays, params, _output_shape(op, arrays, params))
        return operator(*arrays.values(), *params.values())

    bare = _with_signature(arguments, route)
    bare.__name__ = bare.__qualname__ = op.name  # the name in Python's own errors
    function = _ported(op, bare, list(arguments.signature.parameters))
    function.__name__ = function.__qualname__ = op.name
    function.__module__ = "dcn_kernels.torch"
    setattr(function, "__script_unsupported", not_scripted(op.name))  # torch.jit.script raises RuntimeError of it
    function.__signature__ = arguments.signature  # type: ignore[attr-defined]
    function.__doc__ = (
        f"`dcn_kernels.{op.name}` as a differentiable torch operator; see there for the arguments.\n\n"
        f"    Gradients: {', '.join(op.differentiable)}, each computed only where it is needed. Under autocast "
        "input and\n    weights are half precision, and coordinates stay as they are. `torch.vmap` makes one call "
        "per element.\n    `torch.use_deterministic_algorithms(True)` means deterministic=True.\n    "
        + ("`rois`, or `boxes`, may also be a list of (R_n, 4), one an image.\n    " if "rois" in op.arrays else "")
        + (
            f"{' or '.join(_DIFFERS[op.name])} must be given, as torchvision's numbers are others.\n    "
            if op.name in _DIFFERS
            else ""
        )
    )
    return function


FUNCTIONS = {name: function_of(op) for name, op in dcn_kernels.OPS.items()}
