"""Runs of elements of any dtype and stride, in and out of the kernels' own float32 or float64.

Numba has no float16 or bfloat16 on CPUs: such arrays come as addresses, and elements are converted as they are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from dcn_kernels.cpu.jit import assembly, inner, intrinsic, spliced, stay_apart
from dcn_kernels.dtypes import BFLOAT16

FETCHED = 1 << 16  # bytes at most: an axis of length 1 may have any stride, and more would not stay in a cache
F16, BF16, F32, F64, I64 = 0, 1, 2, 3, 4
# by dtype.char; integers are indices, which nothing here converts
_KINDS = {"e": F16, BFLOAT16.char: BF16, "f": F32, "d": F64, np.dtype(np.int64).char: I64}


def strides(array: np.ndarray) -> tuple[int, ...]:
    """An array's strides in bytes; those of axes of length 1, which may be anything, as in a C-contiguous array."""
    if 1 not in array.shape:
        return array.strides
    steps, step = [], array.itemsize
    for length, stride in zip(reversed(array.shape), reversed(array.strides), strict=True):
        steps.append(step if length == 1 else stride)
        step = length * steps[-1]
    return tuple(reversed(steps))


def kind(array: np.ndarray) -> int:
    """The code of an array's dtype."""
    return _KINDS[array.dtype.char]


def _reader(code: int) -> Any:
    @intrinsic
    def read(typingctx, address, i, like):
        """Element i of those at `address`, in the type of `like`."""

        def codegen(context, builder, signature, args):
            f32 = ir.FloatType()
            if code == BF16:
                start = builder.inttoptr(args[0], ir.IntType(16).as_pointer())
                bits = builder.load(builder.gep(start, [args[1]]), align=2)
                wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
                value = builder.bitcast(wide, f32)
            else:
                stored = {F16: ir.IntType(16), F32: f32, F64: ir.DoubleType()}[code]
                size = {F16: 2, F32: 4, F64: 8}[code]
                start = builder.inttoptr(args[0], stored.as_pointer())
                value = builder.load(builder.gep(start, [args[1]]), align=size)
                if code == F16:
                    value = _from_half(builder, value)
            return _cast(builder, value, context.get_value_type(signature.return_type))

        return like(types.intp, types.intp, like), codegen

    return read


def _writer(code: int) -> Any:
    @intrinsic
    def write(typingctx, address, i, value):
        """Store `value` as element i of those at `address`, rounded to nearest even."""

        def codegen(context, builder, signature, args):
            f32, i32 = ir.FloatType(), ir.IntType(32)
            if code == BF16:
                number = _cast(builder, args[2], f32)
                bits = builder.bitcast(number, i32)
                odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
                rounded = builder.add(builder.add(bits, ir.Constant(i32, 0x7FFF)), odd)
                quiet = builder.or_(bits, ir.Constant(i32, 0x400000))  # a NaN stays one
                chosen = builder.select(builder.fcmp_unordered("uno", number, number), quiet, rounded)
                value = builder.trunc(builder.lshr(chosen, ir.Constant(i32, 16)), ir.IntType(16))
                size = 2
            else:
                size = {F16: 2, F32: 4, F64: 8}[code]
                if code == F16:  # from float64 in two steps, which only the compiler sees: halves are summed in float32
                    value = _to_half(builder, _cast(builder, args[2], f32))
                else:
                    value = _cast(builder, args[2], f32 if code == F32 else ir.DoubleType())
            start = builder.inttoptr(args[0], value.type.as_pointer())
            builder.store(value, builder.gep(start, [args[1]]), align=size)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, value), codegen

    return write


_BITS = {ir.FloatType: 32, ir.DoubleType: 64}
# Without instructions for halves the compiler calls functions that the process may lack.
HALF_INSTRUCTIONS = "call" not in assembly("""
    define void @f(half* %p, float* %q) {
      %a = load half, half* %p
      %b = fpext half %a to float
      %c = load float, float* %q
      store float %b, float* %q
      %d = fptrunc float %c to half
      store half %d, half* %p
      ret void
    }""")


def _from_half(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The float32 of a half's bits."""
    f32, i32 = ir.FloatType(), ir.IntType(32)
    if HALF_INSTRUCTIONS:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), f32)
    wide = builder.zext(bits, i32)
    shifted = builder.shl(builder.and_(wide, ir.Constant(i32, 0x7FFF)), ir.Constant(i32, 13))
    finite = builder.fmul(builder.bitcast(shifted, f32), ir.Constant(f32, 2.0**112))  # of the other bias; exact
    large = builder.icmp_unsigned(">=", shifted, ir.Constant(i32, 0x0F800000))  # infinite, or not a number
    quiet = builder.select(
        builder.icmp_unsigned(">", shifted, ir.Constant(i32, 0x0F800000)),
        ir.Constant(i32, 0x7FC00000),
        ir.Constant(i32, 0x7F800000),
    )
    magnitude = builder.select(large, builder.or_(shifted, quiet), builder.bitcast(finite, i32))
    sign = builder.shl(builder.and_(wide, ir.Constant(i32, 0x8000)), ir.Constant(i32, 16))
    return builder.bitcast(builder.or_(magnitude, sign), f32)


def _to_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The bits of the half nearest to a float32, ties to even."""
    f32, i32 = ir.FloatType(), ir.IntType(32)
    if HALF_INSTRUCTIONS:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))

    def number(n: int) -> ir.Constant:
        return ir.Constant(i32, n)

    bits = builder.bitcast(value, i32)
    size = builder.and_(bits, number(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, number(13)), number(1))
    normal = builder.lshr(
        builder.sub(builder.add(builder.add(size, number(0xFFF)), odd), number(112 << 23)), number(13)
    )
    # beside 0.5 a float32 resolves 2^-24, the step of the halves below 2^-14
    beside = builder.fadd(builder.bitcast(size, f32), ir.Constant(f32, 0.5))
    small = builder.sub(builder.bitcast(beside, i32), number(126 << 23))
    half = builder.select(builder.icmp_unsigned("<", size, number(113 << 23)), small, normal)
    half = builder.select(builder.icmp_unsigned(">=", size, number(0x477FF000)), number(0x7C00), half)
    payload = builder.and_(builder.lshr(size, number(13)), number(0x3FF))
    nan = builder.or_(payload, number(0x7E00))
    half = builder.select(builder.icmp_unsigned(">", size, number(0x7F800000)), nan, half)
    sign = builder.and_(builder.lshr(bits, number(16)), number(0x8000))
    return builder.trunc(builder.or_(half, sign), ir.IntType(16))


def _cast(builder: ir.IRBuilder, value: ir.Value, to: ir.Type) -> ir.Value:
    have, want = _BITS[type(value.type)], _BITS[type(to)]
    if have == want:
        return value
    return builder.fpext(value, to) if have < want else builder.fptrunc(value, to)


_read_f16, _read_bf16, _read_f32, _read_f64 = (_reader(code) for code in (F16, BF16, F32, F64))
_write_f16, _write_bf16, _write_f32, _write_f64 = (_writer(code) for code in (F16, BF16, F32, F64))


@intrinsic
def address_of(typingctx, array, i, j):
    """The address of array[i, j, 0, ...], or of array[i] where there is one axis; a slice would compile far slower."""

    def codegen(context, builder, signature, args):
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        at = builder.ptrtoint(struct.data, ir.IntType(64))
        for axis, step in enumerate(args[1 : 1 + min(2, array.ndim)]):
            stride = builder.extract_value(struct.strides, axis)
            at = builder.add(at, builder.mul(step, stride))
        return at

    return types.intp(array, types.intp, types.intp), codegen


@intrinsic
def _fetch(typingctx, address):
    """Prefetch the cache line at `address`; an address that is not valid does no harm."""

    def codegen(context, builder, signature, args):
        i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)]  # to read, all caches, data
        builder.call(prefetch, [builder.inttoptr(args[0], byte), *flags])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def clear(typingctx, address, length):
    """Set `length` bytes from `address` on to 0."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, ir.IntType(8), ir.IntType(64), ir.IntType(1)])
        memset = cgutils.get_or_insert_function(builder.module, kind, "llvm.memset.p0.i64")
        target = builder.inttoptr(args[0], byte)
        builder.call(memset, [target, ir.Constant(ir.IntType(8), 0), args[1], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@spliced
def fetch_run(address, length):
    """Prefetch `length` bytes that will be read soon and lie where the processor does not foresee it."""
    for at in range(address, address + min(length, FETCHED), 64):
        _fetch(at)


@inner
def load_run(to, start, address, stride, count, code):
    """to[start : start + count] = the elements at address, address + stride, ... (bytes), of dtype `code`."""
    stay_apart()
    like = to[0]
    run = to[start : start + count]  # a view: a loop over it has plain indices, of which LLVM makes vectors
    if code == F32 and stride == 4:
        for i in range(count):
            run[i] = _read_f32(address, i, like)
    elif code == F64 and stride == 8:
        for i in range(count):
            run[i] = _read_f64(address, i, like)
    elif code == F16 and stride == 2:
        for i in range(count):
            run[i] = _read_f16(address, i, like)
    elif code == BF16 and stride == 2:
        for i in range(count):
            run[i] = _read_bf16(address, i, like)
    else:
        for i in range(count):
            at = address + i * stride
            if code == F32:
                run[i] = _read_f32(at, 0, like)
            elif code == F64:
                run[i] = _read_f64(at, 0, like)
            elif code == F16:
                run[i] = _read_f16(at, 0, like)
            else:
                run[i] = _read_bf16(at, 0, like)


@inner
def store_run(values, start, count, address, code):
    """Write values[start : start + count] to consecutive elements of dtype `code` at address."""
    stay_apart()
    run = values[start : start + count]
    if code == F32:
        for i in range(count):
            _write_f32(address, i, run[i])
    elif code == F64:
        for i in range(count):
            _write_f64(address, i, run[i])
    elif code == F16:
        for i in range(count):
            _write_f16(address, i, run[i])
    else:
        for i in range(count):
            _write_bf16(address, i, run[i])
