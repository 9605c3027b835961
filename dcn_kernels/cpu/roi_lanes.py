"""Means over a grid of lines for 16 channels at once: the loops over a bin's pixels as LLVM vectors.

A slab of 16 channels is staged channels-last; pixel (y, x) is at base + (y*W + x)*16 elements. Rows and columns of a
bin come as lists of indices, weights and slopes (see bins.py). Addresses are in bytes, indices are int64.

    grid_mean    to     = scale * sum_ij wy_i wx_j x_ij
    grid_spread  x_ij  += wy_i wx_j g                      its transpose
    grid_dots    part  += sum over lanes of g times (sum wy wx x, sum sy wx x, sum wy sx x)
    grid_max     to     = the maximum, and its flat index

For one channel, read in place: rect_sum and rect_add, over the pixels of a bin, eight of a row at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from dcn_kernels.cpu.jit import intrinsic
from dcn_kernels.cpu.lanes import _I64, _Emit

LANES = 16
_intrinsic: Any = intrinsic  # to a type checker a call of one lacks its first argument


class _Grid(_Emit):
    """The loops: `lists` are addresses."""

    def scalar(self, base: ir.Value, at: ir.Value, kind: ir.Type, size: int) -> ir.Value:
        address = self.builder.add(base, self.builder.mul(at, ir.Constant(_I64, size)))
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=size)

    def line(self, base: ir.Value, at: ir.Value) -> ir.Value:
        return self.scalar(base, at, _I64, 8)

    def weight(self, base: ir.Value, at: ir.Value) -> ir.Value:
        return self.everywhere(self.scalar(base, at, self.element, self.itemsize))

    def held(self, value: ir.Value) -> ir.Value:
        """A variable that stays in a register."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place

    @property
    def zeros(self) -> ir.Constant:
        return ir.Constant(self.run, [0.0] * self.lanes)

    def add_product(self, place: ir.Value, a: ir.Value, b: ir.Value) -> None:
        self.builder.store(self.fma(a, b, self.builder.load(place)), place)


@_intrinsic
def grid_mean(typingctx, to, x, width, rows, wy, nrows, columns, wx, ncolumns, scale):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        to, x, width, rows, wy, nrows, columns, wx, ncolumns, scale = args
        e = _Grid(builder, signature.args[-1], LANES)
        total = e.held(e.zeros)
        with cgutils.for_range(builder, nrows) as i:
            row = builder.mul(e.line(rows, i.index), width)
            part = e.held(e.zeros)
            with cgutils.for_range(builder, ncolumns) as j:
                pixel = e.load(e.pointer(x, builder.add(row, e.line(columns, j.index))))
                e.add_product(part, e.weight(wx, j.index), pixel)
            e.add_product(total, e.weight(wy, i.index), builder.load(part))
        e.store(builder.fmul(builder.load(total), e.everywhere(scale)), e.pointer(to))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9, scale), codegen


@_intrinsic
def grid_spread(typingctx, g, x, width, rows, wy, nrows, columns, wx, ncolumns, scale):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        g, x, width, rows, wy, nrows, columns, wx, ncolumns, scale = args
        e = _Grid(builder, signature.args[-1], LANES)
        run = builder.fmul(e.load(e.pointer(g)), e.everywhere(scale))
        with cgutils.for_range(builder, nrows) as i:
            row = builder.mul(e.line(rows, i.index), width)
            weighed = builder.fmul(run, e.weight(wy, i.index))
            with cgutils.for_range(builder, ncolumns) as j:
                place = e.pointer(x, builder.add(row, e.line(columns, j.index)))
                e.store(e.fma(weighed, e.weight(wx, j.index), e.load(place)), place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9, scale), codegen


@_intrinsic
def grid_dots(typingctx, like, part, g, x, width, rows, wy, sy, nrows, columns, wx, sx, ncolumns):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, part, g, x, width, rows, wy, sy, nrows, columns, wx, sx, ncolumns = args
        e = _Grid(builder, signature.args[0], LANES)
        value, slope_y, slope_x = (e.held(e.zeros) for _ in range(3))
        with cgutils.for_range(builder, nrows) as i:
            row = builder.mul(e.line(rows, i.index), width)
            along, across = e.held(e.zeros), e.held(e.zeros)
            with cgutils.for_range(builder, ncolumns) as j:
                pixel = e.load(e.pointer(x, builder.add(row, e.line(columns, j.index))))
                e.add_product(along, e.weight(wx, j.index), pixel)
                e.add_product(across, e.weight(sx, j.index), pixel)
            weight = e.weight(wy, i.index)
            e.add_product(value, weight, builder.load(along))
            e.add_product(slope_y, e.weight(sy, i.index), builder.load(along))
            e.add_product(slope_x, weight, builder.load(across))
        run = e.load(e.pointer(g))
        products = [builder.fmul(run, builder.load(place)) for place in (value, slope_y, slope_x)]
        place = e.pointer(part, kind=ir.VectorType(e.element, 4))
        e.store(builder.fadd(e.load(place), e.four_sums([*products, e.zeros])), place)
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 12), codegen


def _grid_max(with_argmax: bool) -> Any:
    @_intrinsic
    def grid_max(typingctx, like, to, argmax, x, width, top, bottom, left, right):  # type: ignore[no-untyped-def]
        """The first maximum in row-major order over a bin that is not empty; a NaN stays."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, to, argmax, x, width, top, bottom, left, right = args
            e = _Grid(builder, signature.args[0], LANES)
            index = ir.VectorType(ir.IntType(32), LANES)
            corner = builder.add(builder.mul(top, width), left)
            best = e.held(e.load(e.pointer(x, corner)))
            nan = e.held(builder.fcmp_unordered("uno", builder.load(best), e.zeros))
            where = e.held(_everywhere(builder, builder.trunc(corner, ir.IntType(32)), index))
            with cgutils.for_range_slice(builder, top, bottom, ir.Constant(_I64, 1)) as (i, _):
                row = builder.mul(i, width)
                with cgutils.for_range_slice(builder, left, right, ir.Constant(_I64, 1)) as (j, _):
                    at = builder.add(row, j)
                    pixel, now = e.load(e.pointer(x, at)), builder.load(best)
                    is_nan = builder.fcmp_unordered("uno", pixel, e.zeros)
                    more = builder.fcmp_ordered(">", pixel, now)
                    if with_argmax:
                        more = builder.and_(builder.or_(more, is_nan), builder.not_(builder.load(nan)))
                        here = _everywhere(builder, builder.trunc(at, ir.IntType(32)), index)
                        builder.store(builder.select(more, here, builder.load(where)), where)
                    builder.store(builder.or_(builder.load(nan), is_nan), nan)
                    builder.store(builder.select(more, pixel, now), best)
            found = builder.load(best)
            if not with_argmax:
                not_a_number = ir.Constant(e.run, [float("nan")] * LANES)
                found = builder.select(builder.load(nan), not_a_number, found)
            e.store(found, e.pointer(to))
            if with_argmax:
                wide = builder.sext(builder.load(where), ir.VectorType(_I64, LANES))
                builder.store(wide, builder.inttoptr(argmax, wide.type.as_pointer()), align=8)
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 8), codegen

    return grid_max


def _everywhere(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    nowhere = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nowhere, value, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, nowhere, order)


grid_max, grid_argmax = _grid_max(False), _grid_max(True)


class _Rect(_Emit):
    """Rows of up to eight pixels, those beyond the bin left out."""

    def kind(self) -> str:
        return f"v{self.lanes}f{8 * self.itemsize}.p0"

    def inside(self, start: ir.Value, columns: ir.Value) -> ir.Value:
        index = ir.VectorType(_I64, self.lanes)
        left = _everywhere(self.builder, self.builder.sub(columns, start), index)
        return self.builder.icmp_signed("<", ir.Constant(index, list(range(self.lanes))), left)

    def load_some(self, pointer: ir.Value, inside: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.run, [pointer.type, ir.IntType(32), inside.type, self.run])
        load = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.masked.load.{self.kind()}")
        zeros = ir.Constant(self.run, [0.0] * self.lanes)
        return self.builder.call(load, [pointer, ir.Constant(ir.IntType(32), self.itemsize), inside, zeros])

    def store_some(self, value: ir.Value, pointer: ir.Value, inside: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [self.run, pointer.type, ir.IntType(32), inside.type])
        store = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.masked.store.{self.kind()}")
        self.builder.call(store, [value, pointer, ir.Constant(ir.IntType(32), self.itemsize), inside])

    def sum(self, run: ir.Value) -> ir.Value:
        length = self.lanes
        while length > 1:
            length //= 2
            low = list(range(length))
            run = self.builder.fadd(self.pick(run, run, low), self.pick(run, run, [i + length for i in low]))
        return self.builder.extract_element(run, ir.Constant(ir.IntType(32), 0))


RECT_LANES = 8


@_intrinsic
def rect_sum(typingctx, like, first, width, rows, columns):  # type: ignore[no-untyped-def]
    """The sum of `rows` x `columns` pixels from address `first` on; rows are `width` pixels apart."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, first, width, rows, columns = args
        e = _Rect(builder, signature.return_type, RECT_LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(e.run, [0.0] * e.lanes))
        zero, step = ir.Constant(_I64, 0), ir.Constant(_I64, RECT_LANES)
        with cgutils.for_range_slice(builder, zero, columns, step) as (j, _):
            inside = e.inside(j, columns)
            with cgutils.for_range(builder, rows) as i:
                pixel = builder.add(builder.mul(i.index, width), j)
                address = builder.add(first, builder.mul(pixel, ir.Constant(_I64, e.itemsize)))
                builder.store(builder.fadd(builder.load(total), e.load_some(e.pointer(address), inside)), total)
        return e.sum(builder.load(total))

    return like(like, *[types.intp] * 4), codegen


@_intrinsic
def rect_add(typingctx, value, first, width, rows, columns):  # type: ignore[no-untyped-def]
    """Add `value` to `rows` x `columns` pixels from address `first` on."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, first, width, rows, columns = args
        e = _Rect(builder, signature.args[0], RECT_LANES)
        run, zero, step = e.everywhere(value), ir.Constant(_I64, 0), ir.Constant(_I64, RECT_LANES)
        with cgutils.for_range_slice(builder, zero, columns, step) as (j, _):
            inside = e.inside(j, columns)
            with cgutils.for_range(builder, rows) as i:
                pixel = builder.add(builder.mul(i.index, width), j)
                place = e.pointer(builder.add(first, builder.mul(pixel, ir.Constant(_I64, e.itemsize))))
                e.store_some(builder.fadd(e.load_some(place, inside), run), place, inside)
        return context.get_dummy_value()

    return types.void(value, *[types.intp] * 4), codegen
