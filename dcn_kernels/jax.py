"""Every operator as a JAX function that jit, grad and vmap transform: `import dcn_kernels.jax`.

The functions are made from the registry and take what the plain functions take, but for `out` and `backend`. XLA calls
`_handler` through its foreign function interface with the addresses of its own buffers, so no argument is copied on the
CPU, and a forward writes where XLA wants the result; a gradient is copied there once. `vmap` makes one call per
element. The handler for CUDA is written, and **has not run on a GPU yet**.

Examples
--------
>>> import jax, jax.numpy as jnp
>>> from dcn_kernels.jax import deform_conv2d
>>> image, offset = jnp.ones((1, 3, 8, 8)), jnp.zeros((1, 18, 8, 8))
>>> weight = jnp.ones((4, 3, 3, 3))
>>> jax.jit(lambda *arrays: deform_conv2d(*arrays, padding=1))(image, offset, weight).shape
(1, 4, 8, 8)
>>> jax.grad(lambda offset: deform_conv2d(image, offset, weight, padding=1).sum())(offset).shape
(1, 18, 8, 8)
"""

from __future__ import annotations

import ctypes
import inspect
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dcn_kernels
from dcn_kernels import dtypes
from dcn_kernels.dispatch import shapes
from dcn_kernels.dispatch.call import check_values, parameters_for, public
from dcn_kernels.dispatch.call import function as backend_function
from dcn_kernels.dispatch.row import Op
from dcn_kernels.ops.recording import Array, Recording

if not hasattr(jax, "ffi"):
    raise ImportError(f"dcn_kernels.jax: expected a JAX with jax.ffi (0.5 or newer), got JAX {jax.__version__}")

TARGET = "dcn_kernels"

# ---------------------------------------------------------------- XLA's interface, of xla/ffi/api/c_api.h

POINTER = ctypes.c_void_p
HEAD: list[Any] = [("struct_size", ctypes.c_size_t), ("extension", POINTER)]
EXECUTE = 3  # the stage at which the arrays are there
METADATA, INTERNAL_ERROR = 1, 13
DTYPES = {
    10: dtypes.DTYPES["float16"],
    11: dtypes.DTYPES["float32"],
    12: dtypes.DTYPES["float64"],
    16: dtypes.DTYPES["bfloat16"],
}


class _Version(ctypes.Structure):
    _fields_ = [*HEAD, ("major", ctypes.c_int), ("minor", ctypes.c_int)]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", _Version)]


class _Extension(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", POINTER), ("metadata", POINTER)]


class _Api(ctypes.Structure):  # its first members
    _fields_ = [
        *HEAD,
        ("version", _Version),
        *((name, POINTER) for name in ("internal", "error_create", "error_message", "error_destroy", "register")),
        ("stream_get", POINTER),
    ]


class _ErrorCreate(ctypes.Structure):
    _fields_ = [*HEAD, ("message", ctypes.c_char_p), ("code", ctypes.c_int)]


class _StreamGet(ctypes.Structure):
    _fields_ = [*HEAD, ("context", POINTER), ("stream", POINTER)]


class _Buffers(ctypes.Structure):
    _fields_ = [
        *HEAD,
        ("size", ctypes.c_int64),
        ("types", POINTER),
        ("buffers", POINTER),  # to an address of each _BUFFER
    ]


class _Span(ctypes.Structure):
    _fields_ = [("data", POINTER), ("size", ctypes.c_size_t)]


class _Attributes(ctypes.Structure):
    _fields_ = [
        *HEAD,
        ("size", ctypes.c_int64),
        ("types", POINTER),
        ("names", POINTER),
        ("values", ctypes.POINTER(ctypes.POINTER(_Span))),
    ]


class _Frame(ctypes.Structure):
    _fields_ = [
        *HEAD,
        ("api", ctypes.POINTER(_Api)),
        ("context", POINTER),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


# XLA_FFI_Buffer: struct_size, extension, dtype, data, rank, dims. Read by struct, as attributes of ctypes structures
# take longer and several buffers are read in every call.
_BUFFER = struct.Struct("@NPiPqP")
_RAW = ctypes.c_char * _BUFFER.size
_SIZES = [(struct.Struct(f"@{rank}q"), ctypes.c_char * (8 * rank)) for rank in range(5)]  # by rank, of our arrays


def _arrays(buffers: _Buffers, array: Callable[..., Any]) -> list[Any]:
    """XLA's buffers as arrays, without a copy."""
    found = []
    for each in (POINTER * buffers.size).from_address(buffers.buffers):
        _, _, dtype, address, rank, dims = _BUFFER.unpack_from(_RAW.from_address(each))
        sizes, raw = _SIZES[rank]
        found.append(array(address, sizes.unpack_from(raw.from_address(dims)), DTYPES[dtype]))
    return found


def _numpy_array(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = prod(shape) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)
    memory: Any = (ctypes.c_byte * size).from_address(address)
    return np.ndarray(shape, dtype, memory)


def _cupy_array(address: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    import cupy

    size = prod(shape) * dtype.itemsize
    if size == 0:
        return cupy.empty(shape, dtype)
    memory = cupy.cuda.UnownedMemory(address, size, None)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


@contextmanager
def _xla_stream(frame: _Frame) -> Iterator[None]:
    """CuPy on the GPU and the stream that XLA runs this call on."""
    import cupy

    arguments = _StreamGet(ctypes.sizeof(_StreamGet), None, frame.context, None)
    stream_get = ctypes.CFUNCTYPE(POINTER, POINTER)(frame.api.contents.stream_get)
    if stream_get(ctypes.addressof(arguments)):
        raise RuntimeError("XLA gave no CUDA stream")
    addresses = [address for address in _arrays(frame.arguments, lambda address, shape, dtype: address) if address]
    device = cupy.cuda.runtime.pointerGetAttributes(addresses[0]).device if addresses else 0
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(arguments.stream or 0, device):
        yield


def _run(frame: _Frame, backend: str) -> None:
    """One call: what to do is in the only attribute, as JSON. Shapes and dtypes were checked when it was traced."""
    array = _numpy_array if backend == "cpu" else _cupy_array
    span = frame.attributes.values[0].contents
    op, names, params, wrt = _parsed(ctypes.string_at(span.data, span.size))
    arrays: dict[str, Any] = dict.fromkeys(op.arrays)
    arrays.update(zip(names, _arrays(frame.arguments, array), strict=True))
    results = _arrays(frame.results, array)
    check_values(op, backend, arrays, {"N": arrays["input"].shape[0]}, params)
    params = parameters_for(op, "forward" if wrt is None else "backward", backend, params)
    if wrt is None:
        backend_function(op, "forward", backend)(**arrays, **params, out=results[0])
        return
    grads = backend_function(op, "backward", backend)(**arrays, **params, wrt=wrt)
    for name, result in zip(wrt, results, strict=True):
        result[...] = grads[name]


@lru_cache(maxsize=1024)
def _parsed(text: bytes) -> tuple[Op, list[str], dict[str, Any], tuple[str, ...] | None]:
    """What `_call` wrote: the operator, the arrays given, the parameters as a backend takes them, which gradients."""
    what = json.loads(text)
    op = dcn_kernels.OPS[what["op"]]
    wrt = None if what["wrt"] is None else tuple(what["wrt"])
    return op, what["arrays"], op.parameters(what["params"]), wrt


def _handler(backend: str) -> Any:
    """A C function that XLA can call. Kept by the caller, or Python would free it."""

    @ctypes.CFUNCTYPE(POINTER, ctypes.POINTER(_Frame))
    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        if frame.extension:
            extension = _Extension.from_address(frame.extension)
            if extension.type == METADATA:  # the first call: which version of the interface is this?
                version, known = _Metadata.from_address(extension.metadata).version, frame.api.contents.version
                version.major, version.minor = known.major, known.minor
                return None
        if frame.stage != EXECUTE:
            return None
        try:
            if backend == "cpu":
                _run(frame, backend)
            else:
                with _xla_stream(frame):
                    _run(frame, backend)
        except BaseException as error:  # nothing may pass through C
            message = f"{type(error).__name__}: {error}".encode()
            arguments = _ErrorCreate(ctypes.sizeof(_ErrorCreate), None, message, INTERNAL_ERROR)
            create = ctypes.CFUNCTYPE(POINTER, POINTER)(frame.api.contents.error_create)
            return create(ctypes.addressof(arguments))
        return None

    return handle


_HANDLERS = {"cpu": _handler("cpu"), "CUDA": _handler("cuda")}
for _platform, _function in _HANDLERS.items():
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_function), platform=_platform)

# ---------------------------------------------------------------- functions


@dataclass(frozen=True)
class Described:
    """Shape and dtype of an argument, as the checks in `shapes` read them."""

    shape: tuple[Any, ...]
    dtype: np.dtype


def _varying(array: Any) -> frozenset[str]:
    """The axes of shard_map's mesh along which an array differs; none in a JAX that does not keep them."""
    kind: Any = jax.typeof(array) if hasattr(jax, "typeof") else None
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())  # its name before JAX 0.10


def _vary(array: Any, axes: frozenset[str]) -> Any:
    more = tuple(sorted(axes - _varying(array)))
    return jax.lax.pcast(array, more, to="varying") if more else array


def _vary_alike(arrays: dict[str, Any]) -> dict[str, Any]:
    """All arrays marked as differing along the axes of any: JAX then sums a shared one's gradient over these."""
    axes = frozenset().union(*map(_varying, arrays.values()))
    return {name: _vary(array, axes) for name, array in arrays.items()}


def _call(
    op: Op, arrays: dict[str, Any], params: dict[str, Any], results: list[Any], wrt: list[str] | None
) -> list[Any]:
    what = {"op": op.name, "arrays": list(arrays), "params": params, "wrt": wrt}
    text = json.dumps(what, default=lambda value: value.item())  # a NumPy number
    function = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")
    axes = frozenset().union(*map(_varying, arrays.values()))
    return [_vary(result, axes) for result in function(*arrays.values(), call=text)]  # ffi_call's results lack the mark


@lru_cache(maxsize=1024)
def _differentiable(op: Op, names: tuple[str, ...], params_text: str) -> Callable[..., Any]:
    """The operator on the arrays `names`, with these parameters; the same object again, so that jit finds its trace."""
    params = json.loads(params_text)

    @jax.custom_vjp
    def function(*values: Any) -> Any:
        arrays = dict(zip(names, values, strict=True))
        described = {name: Described(tuple(array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}
        shapes.check_dtypes(op, described)
        sizes = shapes.bind_symbols(op, described, op.parameters(params))
        result = jax.ShapeDtypeStruct(shapes.evaluate(op.output, sizes), described[next(iter(op.arrays))].dtype)
        return _call(op, arrays, params, [result], None)[0]

    def forward(*primals: Any) -> Any:
        values = [primal.value for primal in primals]
        # Only here is it known which gradients are needed. Names cannot be residuals, but can be the keys of one.
        needed = {name: () for name, p in zip(names, primals, strict=True) if p.perturbed and name in op.differentiable}
        return function(*values), (values, needed)

    def backward(kept: Any, grad_output: Any) -> tuple[Any, ...]:
        values, needed = kept
        wrt = [name for name in op.differentiable if name in needed]
        if not wrt or isinstance(grad_output, jax.custom_derivatives.SymbolicZero):
            return (None,) * len(names)
        arrays = dict(zip(names, values, strict=True))
        results = [jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in wrt]
        backward_params = {name: value for name, value in params.items() if name not in op.plain_only}
        grads = dict(
            zip(wrt, _call(op, {"grad_output": grad_output, **arrays}, backward_params, results, wrt), strict=True)
        )
        return tuple(grads.get(name) for name in names)

    function.defvjp(forward, backward, symbolic_zeros=True)
    return function


def _rois_of(op: Op, boxes: Any) -> jax.Array:
    """(R, 5) of a list of (R_n, 4), one for each image, as dcn_kernels.torch takes it."""
    rows = []
    for n, each in enumerate(boxes):
        if not isinstance(each, (jax.Array, np.ndarray)) or each.ndim != 2 or each.shape[1] != 4:
            got = each.shape if hasattr(each, "shape") else type(each).__name__
            raise TypeError(f"{op.name}: rois: expected (R, 5), or a list of (R_n, 4) for each image, got {got} in it")
        rows.append(jax.numpy.concatenate([jax.numpy.full((len(each), 1), n, each.dtype), each], axis=1))
    if not rows:
        raise TypeError(f"{op.name}: rois: expected (R, 5), or a list of (R_n, 4) for each image, got an empty list")
    return jax.numpy.concatenate(rows)


def _function_of(op: Op) -> Callable[..., Any]:
    plain = inspect.signature(public(op))
    signature = plain.replace(parameters=[p for name, p in plain.parameters.items() if name not in op.plain_only])

    def function(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{op.name}: {error}") from None
        bound.apply_defaults()
        arrays = {}
        for name in (name for name in bound.arguments if name in op.arrays):
            array = bound.arguments[name]
            if array is None and name in op.optional:
                continue
            if name == "rois" and isinstance(array, (list, tuple)):
                array = _rois_of(op, array)
            if not isinstance(array, (jax.Array, np.ndarray)):
                raise TypeError(f"{op.name}: {name}: expected a JAX or NumPy array, got {type(array).__name__}")
            arrays[name] = jax.numpy.asarray(array)
        arrays = _vary_alike(arrays)
        params = {name: value for name, value in bound.arguments.items() if name not in op.arrays}
        op.parameters(params)
        for recording in _RECORDINGS:
            recording.add(op.name, {n: Array(tuple(a.shape), str(a.dtype)) for n, a in arrays.items()}, params)
        text = json.dumps(params, default=lambda value: value.item())
        return _differentiable(op, tuple(arrays), text)(*arrays.values())

    function.__name__ = function.__qualname__ = op.name
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__doc__ = (
        f"`dcn_kernels.{op.name}` as a JAX function; see there for the arguments.\n\n"
        f"    Gradients: {', '.join(op.differentiable)}, each computed only where it is needed. `jax.vmap` makes one "
        "call per element.\n    "
    )
    return function


def disabled_checks() -> list[Any]:
    """What `jax.export.export` is told as `disabled_checks`, as it refuses all custom calls that are not JAX's own.

    Whoever loads what was exported must import this module first: XLA finds the operators by name.

    Examples
    --------
    >>> import jax
    >>> from jax import export
    >>> from dcn_kernels.jax import disabled_checks, offset_sample2d
    >>> image, offset = jax.numpy.ones((1, 1, 3, 3)), jax.numpy.zeros((1, 2, 3, 3))
    >>> exported = export.export(jax.jit(offset_sample2d), disabled_checks=disabled_checks())(image, offset)
    >>> float(exported.call(image, offset).sum())
    9.0
    """
    from jax import export  # not loaded by `import jax`

    return [export.DisabledSafetyCheck.custom_call(TARGET)]


_RECORDINGS: list[Recording] = []


@contextmanager
def record_layers(path: str | Path | None = None) -> Iterator[Recording]:
    """Note every call of these functions, within: a function under `jax.jit` once each time that it is traced.

    Of each: the operator, its sizes, dtype and options, and how often it was called. How far offsets reach is not known
    while a function is traced, so the layers have no `spread`.

    Parameters
    ----------
    path : str or Path, optional
        Where the layers are written at the end, also after an exception, for ``dcn-bench profile --shapes``. Nothing is
        written where there was no call.

    Yields
    ------
    Recording
        `toml()` is what is written, `calls` what was seen so far.

    Examples
    --------
    >>> import jax
    >>> from dcn_kernels.jax import offset_sample2d, record_layers
    >>> with record_layers() as recording:
    ...     _ = jax.jit(offset_sample2d)(jax.numpy.ones((1, 2, 3, 3)), jax.numpy.zeros((1, 2, 3, 3)))
    >>> print(recording.toml().splitlines()[2])
    [layers."offset_sample2d 1"]
    """
    recording = Recording()
    _RECORDINGS.append(recording)
    try:
        yield recording
    finally:
        _RECORDINGS.remove(recording)
        if path is not None and recording.calls:
            recording.write(path)


_FUNCTIONS = {name: _function_of(op) for name, op in dcn_kernels.OPS.items()}
globals().update(_FUNCTIONS)
__all__ = ["disabled_checks", "record_layers", *_FUNCTIONS]


def __getattr__(name: str) -> Callable[..., Any]:
    """The function of a row that was registered after this module was imported."""
    op = dcn_kernels.OPS.get(name)
    if op is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _FUNCTIONS:
        _FUNCTIONS[name] = _function_of(op)
    return _FUNCTIONS[name]
