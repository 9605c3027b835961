"""Named shapes: every check of an argument's shape, dtype or value, and every word of its error, is here.

A named shape is a string such as ``"N 2*OG*KH*KW OH OW"``: one expression per dimension, a product of letters
and numbers, or ``"C/groups"`` where the divisor is what the shape tells. `bind` reads the sizes off the arrays,
left to right, and compares what it already knows.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from dcn_kernels.dispatch.row import Op, Params, Sizes
from dcn_kernels.dtypes import DTYPES, HALVES

LARGEST_NUMBER = 3.4028234663852886e38  # of float32, the type in which kernels may use a parameter
MOST_SAMPLES = 4096  # of a bin along an axis: far more than a mean needs, and a call with more might never end
LARGEST_STEP = 2**31 - 1  # of a stride, padding or dilation: products with a size then fit 64 bits


# ---------------------------------------------------------------- parameters


def integer(op: str, name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int of at least `minimum`, and at most `maximum`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name}: expected an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{op}: {name}: expected an integer of at least {minimum}, got {number}")
    if maximum is not None and number > maximum:
        raise ValueError(f"{op}: {name}: expected an integer of at most {maximum}, got {number}")
    return number


def pair(op: str, name: str, value: Any, minimum: int) -> tuple[int, int]:
    """An int or (h, w) as a pair of ints of at least `minimum`."""
    if type(value) is int and minimum <= value <= LARGEST_STEP:  # the usual case, quickly
        return value, value
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{op}: {name}: expected an int or a pair (h, w), got {value!r}")
        numbers = integer(op, name, value[0], minimum), integer(op, name, value[1], minimum)
        if max(numbers) > LARGEST_STEP:
            raise ValueError(f"{op}: {name}: expected at most {LARGEST_STEP}, got {value!r}")
        return numbers
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name}: expected an int or a pair (h, w), got {value!r}") from None
    return pair(op, name, (value, value), minimum)


def number(op: str, name: str, value: Any, *, positive: bool = False) -> float:
    """`value` as a finite float."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name}: expected a number, got {value!r}") from None
    except OverflowError:
        result = np.inf
    if not abs(result) <= LARGEST_NUMBER or (positive and result <= 0):
        kind = "a positive finite number" if positive else "a finite number"
        raise ValueError(f"{op}: {name}: expected {kind}, got {value!r}")
    return result


def choice(op: str, name: str, value: Any, options: Iterable[str]) -> str:
    """`value` if it is one of `options`."""
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def flag(op: str, name: str, value: Any) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{op}: {name}: expected True or False, got {value!r}")
    return bool(value)


# ---------------------------------------------------------------- which arguments


def check_present(op: Op, arrays: dict[str, Any], direction: str) -> None:
    """Every argument that is not optional was given."""
    required = [name for name in op.arrays if name not in op.optional]
    if direction == "backward":
        required.insert(0, "grad_output")
    for name in required:
        if arrays.get(name) is None:
            raise TypeError(f"{op.name}: {name}: expected an array, got None")


def wanted(op: Op, arrays: dict[str, Any], wrt: Iterable[str] | str | None) -> tuple[str, ...]:
    """The gradients asked for, in the operator's own order."""
    present = tuple(name for name in op.differentiable if arrays.get(name) is not None)
    if wrt is None:
        return present
    names = {wrt} if isinstance(wrt, str) else set(wrt)
    for name in sorted(names, key=str):
        if name not in op.arrays and name not in op.saved:
            why = "no such argument"
        elif name not in op.differentiable:
            why = f"{name} is not differentiable by definition"
        elif name not in present:
            why = f"{name} was not given"
        else:
            continue
        raise ValueError(f"{op.name}_backward: wrt: expected names among {present}, got {name!r}: {why}")
    return tuple(name for name in present if name in names)


# ---------------------------------------------------------------- dtypes


def check_dtypes(op: Op, arrays: dict[str, Any]) -> None:
    """All arrays share the first argument's dtype; coordinates may be float32 beside half precision."""
    _check_dtypes(op, tuple([(name, array.dtype) for name, array in arrays.items()]))


@lru_cache(maxsize=1024)
def _check_dtypes(op: Op, dtypes: tuple[tuple[str, Any], ...]) -> None:
    dtype_of = dict(dtypes)
    first = next(iter(op.arrays))
    dtype = dtype_of[first]
    for name in (first, *dtype_of):
        got = dtype_of[name]
        if name in op.saved:
            if got != np.int64:
                raise TypeError(f"{op.name}: {name}: expected dtype int64, got {got}")
            continue
        if got not in DTYPES.values():
            raise TypeError(f"{op.name}: {name}: expected dtype {', '.join(DTYPES)}, got {got}")
        allowed = [dtype]
        if name in op.coordinates and dtype in HALVES:
            allowed.append(DTYPES["float32"])
        if got not in allowed:
            expected = " or ".join(str(d) for d in allowed)
            raise TypeError(f"{op.name}: {name}: expected dtype {expected} (that of {first}: {dtype}), got {got}")


# ---------------------------------------------------------------- shapes


def _factors(expression: str) -> tuple[list[str], str | None]:
    numerator, _, divisor = expression.partition("/")
    return numerator.split("*"), divisor or None


def _known(expression: str, sizes: Sizes) -> int | None:
    """The value of one dimension's expression, or None while a letter of it is unknown."""
    factors, divisor = _factors(expression)
    letters = [f for f in [*factors, divisor] if f and not f.isdigit()]
    if any(letter not in sizes for letter in letters):
        return None
    value = prod(int(f) if f.isdigit() else sizes[f] for f in factors)
    return value // sizes[divisor] if divisor else value


def evaluate(named: str, sizes: Sizes) -> tuple[int, ...]:
    """The numbers of a named shape."""
    values = [_known(expression, sizes) for expression in named.split()]
    if any(value is None for value in values):
        raise KeyError(f"unbound letter in {named!r}: have {sizes}")
    return tuple(value for value in values if value is not None)


def result_bytes(op: Op, direction: str, arrays: dict[str, Any], sizes: Sizes, params: Params, names: Any) -> int:
    """How much memory the results of a call take."""
    if direction == "backward":
        return sum(arrays[name].nbytes for name in names)
    elements = _elements(op.output, tuple(sizes.items()))
    saved = sum(8 for name in op.saved if params.get(f"return_{name}"))
    return elements * (int(arrays[next(iter(op.arrays))].dtype.itemsize) + saved)


@lru_cache(maxsize=1024)
def _elements(named: str, sizes: tuple[tuple[str, int], ...]) -> int:
    return prod(evaluate(named, dict(sizes)))


def _describe(named: str, sizes: Sizes) -> str:
    """``(N, 2*OG*KH*KW, OH, OW) = (2, 18*OG, 8, 8)``: by letter, then by number as far as known."""
    letters = named.split()
    numbers = []
    for expression in letters:
        value = _known(expression, sizes)
        if value is not None:
            numbers.append(str(value))
            continue
        factors, divisor = _factors(expression)
        known = prod(int(f) if f.isdigit() else sizes[f] for f in factors if f.isdigit() or f in sizes)
        unknown = [f for f in factors if not f.isdigit() and f not in sizes]
        text = "*".join(([str(known)] if known != 1 or not unknown else []) + unknown)
        numbers.append(f"{text}/{sizes.get(divisor, divisor)}" if divisor else text)
    comma = "," if len(letters) == 1 else ""
    by_letter, by_number = f"({', '.join(letters)}{comma})", f"({', '.join(numbers)}{comma})"
    return by_letter if by_letter == by_number else f"{by_letter} = {by_number}"


def shape_error(op: str, name: str, named: str, sizes: Sizes, got: tuple[int, ...], why: str = "") -> ValueError:
    """The error for a wrong shape, in the same words everywhere."""
    tail = f": {why}" if why else ""
    return ValueError(f"{op}: {name}: expected shape {_describe(named, sizes)}, got {tuple(got)}{tail}")


def _bind_dimension(op: Op, expression: str, got: int, sizes: Sizes) -> str | None:
    """Learn the one unknown letter of a dimension, or compare; returns what is wrong, or None."""
    factors, divisor = _factors(expression)
    unknown = [f for f in [*factors, divisor] if f and not f.isdigit() and f not in sizes]
    if not unknown:
        return None if _known(expression, sizes) == got else ""
    letter = unknown[0]
    product = prod(int(f) if f.isdigit() else sizes[f] for f in factors if f != letter)
    if letter == divisor:  # C/groups: C is known, so the array tells groups
        if got < 1 or product % got:
            return f"{got} does not divide {'*'.join(factors)} = {product}"
        sizes[letter] = product // got
        return None
    if divisor:
        product, got = 1, got * sizes[divisor]
    if got % product:
        return f"{got} is not a multiple of {product}"
    sizes[letter] = got // product
    if sizes[letter] < 1 and letter not in op.zero_sizes:
        return f"{letter} must be at least 1"
    return None


def bind(op: Op, arrays: dict[str, Any], params: Params) -> Sizes:
    """Read all sizes off the arrays' shapes, checking each array on the way.

    Raises
    ------
    ValueError
        Naming operator, argument, the expected shape by letter and by number, and what came.
    """
    return dict(_bind(op, tuple((name, tuple(array.shape)) for name, array in arrays.items()), tuple(params.items())))


def bind_symbols(op: Op, arrays: dict[str, Any], params: Params) -> Sizes:
    """`bind` without its cache, for sizes that may be the symbols of a tracer: these cannot be hashed."""
    shape_of = tuple((name, tuple(array.shape)) for name, array in arrays.items())
    return _bind.__wrapped__(op, shape_of, tuple(params.items()))


@lru_cache(maxsize=1024)  # a layer is called again and again with the same shapes
def _bind(op: Op, shapes: tuple[tuple[str, tuple[int, ...]], ...], params_items: tuple[tuple[str, Any], ...]) -> Sizes:
    shape_of, params = dict(shapes), dict(params_items)
    try:
        return _sizes(op, shape_of, params)
    except ValueError as error:
        hint = _layout_hint(op, shape_of, params)
        raise (ValueError(f"{error}: {hint}") if hint else error) from None


def _layout_hint(op: Op, shape_of: dict[str, tuple[int, ...]], params: Params) -> str:
    """What may be wrong where the shapes fit as soon as channels move from last to second place, or ""."""
    maps = [name for name, named in op.arrays.items() if named.startswith("N ") and name in shape_of]
    for names in (maps[:1], maps, [*maps, "grad_output"], *([name] for name in maps[1:])):
        moved = {name: (s[0], s[3], s[1], s[2]) if name in names and len(s) == 4 else s for name, s in shape_of.items()}
        with contextlib.suppress(ValueError):
            _sizes(op, moved, params)
            return f"the shapes fit if {', '.join(names)} came with channels last, (N, H, W, C); here they are second"
    return ""


def _sizes(op: Op, shape_of: dict[str, tuple[int, ...]], params: Params) -> Sizes:
    sizes: Sizes = {}
    _derive(op, sizes, params)  # the sizes that follow from parameters alone
    for name, named in {**op.arrays, "grad_output": op.output, **op.saved}.items():
        if name not in shape_of:
            continue
        got, expressions = shape_of[name], named.split()
        if len(got) != len(expressions):
            raise shape_error(op.name, name, named, sizes, got, f"{len(expressions)} dimensions are needed")
        known = dict(sizes)
        for expression, size in zip(expressions, got, strict=True):
            why = _bind_dimension(op, expression, size, known)
            if why is not None:
                raise shape_error(op.name, name, named, sizes, got, why)
        sizes = known
        _derive(op, sizes, params)
        for divisor, size_name in op.divides:
            if divisor in sizes and size_name in sizes and sizes[size_name] % sizes[divisor]:
                why = f"{divisor} = {sizes[divisor]} does not divide {size_name} = {sizes[size_name]}"
                raise shape_error(op.name, name, named, sizes, got, why)
    return sizes


def _derive(op: Op, sizes: Sizes, params: Params) -> None:
    """Compute the sizes that follow from those known so far."""
    for letter, derive in op.derived.items():
        if letter not in sizes:
            with contextlib.suppress(KeyError):  # needs a size that only a later array tells
                sizes[letter] = derive(sizes, params)


# ---------------------------------------------------------------- values


def check_rois(op: str, arrays: dict[str, Any], sizes: Sizes) -> None:
    """Every RoI is finite, and its batch index a whole number of an image."""
    rois, images = arrays["rois"], sizes["N"]
    rois = rois.get() if hasattr(rois, "get") else rois
    for first in range(0, len(rois), 1 << 18):  # a part at a time, as a copy of all of them may not fit
        values = rois[first : first + (1 << 18)].astype(np.float64)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            r = int(np.argmin(finite))
            raise ValueError(f"{op}: rois: expected finite numbers, got {values[r].tolist()} in row {first + r}")
        image = values[:, 0]
        known = (image >= 0) & (image < images) & (image == np.floor(image))
        if not known.all():
            r = int(np.argmin(known))
            raise ValueError(
                f"{op}: rois: expected batch indices among 0..N-1, N = {images}, got {image[r]} in row {first + r}"
            )


def check_argmax(op: str, argmax: Any, pixels: int) -> None:
    """Every index is a pixel's, or -1."""
    values = argmax.get() if hasattr(argmax, "get") else argmax
    wrong = values[(values < -1) | (values >= pixels)]
    if wrong.size:
        raise argmax_error(op, pixels, int(wrong[0]))


def argmax_error(op: str, pixels: int, got: int) -> ValueError:
    """The error for an argmax that is not the index of a pixel."""
    return ValueError(f"{op}: argmax: expected indices among -1..H*W-1, H*W = {pixels}, got {got}")


# ---------------------------------------------------------------- out=


def check_out(op: Op, out: Any, arrays: dict[str, Any], sizes: Sizes) -> Any:
    """`out` has the result's shape and dtype, is C-contiguous and writable, and overlaps no input.

    Returns a view of it with the strides of a fresh array: an axis of length 1 may have any stride and still count
    as contiguous, which a kernel must not meet.
    """
    if out is None:
        return None
    shape = evaluate(op.output, sizes)
    dtype = arrays[next(iter(op.arrays))].dtype
    if tuple(out.shape) != shape:
        raise ValueError(f"{op.name}: out: expected shape ({', '.join(op.output.split())}) = {shape}, got {out.shape}")
    if out.dtype != dtype:
        raise TypeError(f"{op.name}: out: expected dtype {dtype}, got {out.dtype}")
    if not out.flags.c_contiguous:
        raise ValueError(f"{op.name}: out: expected a C-contiguous array, got strides {out.strides} for {shape}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{op.name}: out: expected a writable array, got a read-only one")
    start, end = _extent(out)
    for name, array in arrays.items():
        first, last = _extent(array)
        if first < end and start < last:
            raise ValueError(f"{op.name}: out: expected memory of its own, got an array that overlaps {name}")
    return out.reshape(-1).reshape(shape)


def _extent(array: Any) -> tuple[int, int]:
    """The addresses [first, last) that an array spans."""
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    if array.size == 0:
        return address, address
    low = sum(min(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(array.shape, array.strides, strict=True))
    return address + low, address + high + array.dtype.itemsize
