"""Runs of elements of any dtype and stride, in and out of the kernels' own float32 or float64.

Numba has no float16 or bfloat16 on CPUs: such arrays come as addresses, and elements are converted as they are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from dcn_kernels.cpu.jit import inner, intrinsic, spliced, stay_apart
from dcn_kernels.dtypes import BFLOAT16

F16, BF16, F32, F64 = 0, 1, 2, 3
_KINDS = {"e": F16, BFLOAT16.char: BF16, "f": F32, "d": F64}  # by dtype.char


def kind(array: np.ndarray) -> int:
    """The code of an array's dtype."""
    return _KINDS[array.dtype.char]


def _reader(code: int) -> Any:
    @intrinsic
    def read(typingctx, address, i, like):  # type: ignore[no-untyped-def]
        """Element i of those at `address`, in the type of `like`."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            f32 = ir.FloatType()
            if code == BF16:
                start = builder.inttoptr(args[0], ir.IntType(16).as_pointer())
                bits = builder.load(builder.gep(start, [args[1]]), align=2)
                wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
                value = builder.bitcast(wide, f32)
            else:
                stored = {F16: ir.HalfType(), F32: f32, F64: ir.DoubleType()}[code]
                size = {F16: 2, F32: 4, F64: 8}[code]
                start = builder.inttoptr(args[0], stored.as_pointer())
                value = builder.load(builder.gep(start, [args[1]]), align=size)
            return _cast(builder, value, context.get_value_type(signature.return_type))

        return like(types.intp, types.intp, like), codegen

    return read


def _writer(code: int) -> Any:
    @intrinsic
    def write(typingctx, address, i, value):  # type: ignore[no-untyped-def]
        """Store `value` as element i of those at `address`, rounded to nearest even."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
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
                stored = {F16: ir.HalfType(), F32: f32, F64: ir.DoubleType()}[code]
                size = {F16: 2, F32: 4, F64: 8}[code]
                value = args[2]
                if code == F16:  # from float64 in two steps, which only the compiler sees: halves are summed in float32
                    value = _cast(builder, value, f32)
                value = _cast(builder, value, stored)
            start = builder.inttoptr(args[0], value.type.as_pointer())
            builder.store(value, builder.gep(start, [args[1]]), align=size)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, value), codegen

    return write


_BITS = {ir.HalfType: 16, ir.FloatType: 32, ir.DoubleType: 64}


def _cast(builder: ir.IRBuilder, value: ir.Value, to: ir.Type) -> ir.Value:
    have, want = _BITS[type(value.type)], _BITS[type(to)]
    if have == want:
        return value
    return builder.fpext(value, to) if have < want else builder.fptrunc(value, to)


_read_f16, _read_bf16, _read_f32, _read_f64 = (_reader(code) for code in (F16, BF16, F32, F64))
_write_f16, _write_bf16, _write_f32, _write_f64 = (_writer(code) for code in (F16, BF16, F32, F64))


@intrinsic
def address_of(typingctx, array, i, j):  # type: ignore[no-untyped-def]
    """The address of array[i, j, 0, ...], or of array[i] where there is one axis; a slice would compile far slower."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        at = builder.ptrtoint(struct.data, ir.IntType(64))
        for axis, step in enumerate(args[1 : 1 + min(2, array.ndim)]):
            stride = builder.extract_value(struct.strides, axis)
            at = builder.add(at, builder.mul(step, stride))
        return at

    return types.intp(array, types.intp, types.intp), codegen


@intrinsic
def _fetch(typingctx, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line at `address`; any address will do."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)]  # to read, all caches, data
        builder.call(prefetch, [builder.inttoptr(args[0], byte), *flags])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def clear(typingctx, address, length):  # type: ignore[no-untyped-def]
    """Set `length` bytes from `address` on to 0."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, ir.IntType(8), ir.IntType(64), ir.IntType(1)])
        memset = cgutils.get_or_insert_function(builder.module, kind, "llvm.memset.p0.i64")
        target = builder.inttoptr(args[0], byte)
        builder.call(memset, [target, ir.Constant(ir.IntType(8), 0), args[1], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@spliced
def fetch_run(address, length):  # type: ignore[no-untyped-def]
    """Ask for `length` bytes that will be read soon and lie far from the last ones, where no machine guesses them."""
    for at in range(address, address + length, 64):
        _fetch(at)


@inner
def load_run(to, start, address, stride, count, code):  # type: ignore[no-untyped-def]
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
def store_run(values, start, count, address, code):  # type: ignore[no-untyped-def]
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
