"""Means over a grid of lines for 16 channels at once: the loops over a bin's pixels as LLVM vectors.

A slab of 16 channels is staged channels-last; pixel (y, x) is at base + (y*W + x)*16 elements. Rows and columns of a
bin come as lists of indices, weights and slopes (see bins.py). Addresses are in bytes, indices are int64.

    grid_mean    to     = scale * sum_ij wy_i wx_j x_ij
    grid_spread  x_ij  += wy_i wx_j g                      its transpose
    grid_dots    part  += sum over lanes of g times (sum wy wx x, sum sy wx x, sum wy sx x)
    grid_max     to     = the maximum; grid_argmax also its flat index

The first four come for one slab and for four.

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

    def apart(self, base: ir.Value, step: ir.Value, count: int) -> list[ir.Value]:
        """`count` addresses, `step` bytes apart."""
        return [self.builder.add(base, self.builder.mul(step, ir.Constant(_I64, k))) for k in range(count)]

    @property
    def zeros(self) -> ir.Constant:
        return ir.Constant(self.run, [0.0] * self.lanes)

    def add_product(self, place: ir.Value, a: ir.Value, b: ir.Value) -> None:
        self.builder.store(self.fma(a, b, self.builder.load(place)), place)


def _grid_mean(slabs: int) -> Any:
    @_intrinsic
    def grid_mean(typingctx, to, to_step, x, x_step, width, rows, wy, nrows, columns, wx, ncolumns, scale):
        def codegen(context, builder, signature, args):
            to, to_step, x, x_step, width, rows, wy, nrows, columns, wx, ncolumns, scale = args
            e = _Grid(builder, signature.args[-1], LANES)
            maps = e.apart(x, x_step, slabs)
            totals = [e.held(e.zeros) for _ in maps]
            parts = [e.held(e.zeros) for _ in maps]
            with cgutils.for_range(builder, nrows) as i:
                row = builder.mul(e.line(rows, i.index), width)
                for part in parts:
                    builder.store(e.zeros, part)
                with cgutils.for_range(builder, ncolumns) as j:
                    weight, pixel = e.weight(wx, j.index), builder.add(row, e.line(columns, j.index))
                    for base, part in zip(maps, parts, strict=True):
                        e.add_product(part, weight, e.load(e.pointer(base, pixel)))
                weight = e.weight(wy, i.index)
                for total, part in zip(totals, parts, strict=True):
                    e.add_product(total, weight, builder.load(part))
            share = e.everywhere(scale)
            for place, total in zip(e.apart(to, to_step, slabs), totals, strict=True):
                e.store(builder.fmul(builder.load(total), share), e.pointer(place))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11, scale), codegen

    return grid_mean


def _grid_spread(slabs: int) -> Any:
    @_intrinsic
    def grid_spread(typingctx, g, g_step, x, x_step, width, rows, wy, nrows, columns, wx, ncolumns, scale):
        def codegen(context, builder, signature, args):
            g, g_step, x, x_step, width, rows, wy, nrows, columns, wx, ncolumns, scale = args
            e = _Grid(builder, signature.args[-1], LANES)
            share, maps = e.everywhere(scale), e.apart(x, x_step, slabs)
            runs = [builder.fmul(e.load(e.pointer(place)), share) for place in e.apart(g, g_step, slabs)]
            with cgutils.for_range(builder, nrows) as i:
                row, weight = builder.mul(e.line(rows, i.index), width), e.weight(wy, i.index)
                weighed = [builder.fmul(run, weight) for run in runs]
                with cgutils.for_range(builder, ncolumns) as j:
                    weight, pixel = e.weight(wx, j.index), builder.add(row, e.line(columns, j.index))
                    for base, run in zip(maps, weighed, strict=True):
                        place = e.pointer(base, pixel)
                        e.store(e.fma(run, weight, e.load(place)), place)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11, scale), codegen

    return grid_spread


def _grid_dots(slabs: int) -> Any:
    @_intrinsic
    def grid_dots(typingctx, like, part, g, g_step, x, x_step, width, rows, wy, sy, nrows, columns, wx, sx, ncolumns):
        def codegen(context, builder, signature, args):
            _, part, g, g_step, x, x_step, width, rows, wy, sy, nrows, columns, wx, sx, ncolumns = args
            e = _Grid(builder, signature.args[0], LANES)
            maps = e.apart(x, x_step, slabs)
            values, slopes_y, slopes_x, alongs, acrosses = ([e.held(e.zeros) for _ in maps] for _ in range(5))
            with cgutils.for_range(builder, nrows) as i:
                row = builder.mul(e.line(rows, i.index), width)
                for place in (*alongs, *acrosses):
                    builder.store(e.zeros, place)
                with cgutils.for_range(builder, ncolumns) as j:
                    weight, slope = e.weight(wx, j.index), e.weight(sx, j.index)
                    at = builder.add(row, e.line(columns, j.index))
                    for base, along, across in zip(maps, alongs, acrosses, strict=True):
                        pixel = e.load(e.pointer(base, at))
                        e.add_product(along, weight, pixel)
                        e.add_product(across, slope, pixel)
                weight, slope = e.weight(wy, i.index), e.weight(sy, i.index)
                for k in range(slabs):
                    e.add_product(values[k], weight, builder.load(alongs[k]))
                    e.add_product(slopes_y[k], slope, builder.load(alongs[k]))
                    e.add_product(slopes_x[k], weight, builder.load(acrosses[k]))
            sums = [e.held(e.zeros) for _ in range(3)]
            for k, place in enumerate(e.apart(g, g_step, slabs)):
                run = e.load(e.pointer(place))
                for total, each in zip(sums, (values, slopes_y, slopes_x), strict=True):
                    e.add_product(total, run, builder.load(each[k]))
            place = e.pointer(part, kind=ir.VectorType(e.element, 4))
            four = e.four_sums([*(builder.load(total) for total in sums), e.zeros])
            e.store(builder.fadd(e.load(place), four), place)
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 14), codegen

    return grid_dots


def _grid_max(slabs: int) -> Any:
    @_intrinsic
    def grid_max(typingctx, like, to, to_step, x, x_step, width, top, bottom, left, right):
        """The maxima over a bin that is not empty; a NaN stays."""

        def codegen(context, builder, signature, args):
            _, to, to_step, x, x_step, width, top, bottom, left, right = args
            e = _Grid(builder, signature.args[0], LANES)
            corner, maps = builder.add(builder.mul(top, width), left), e.apart(x, x_step, slabs)
            bests = [e.held(e.load(e.pointer(base, corner))) for base in maps]
            nans = [e.held(ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES)) for _ in maps]
            step = ir.Constant(_I64, 1)
            with cgutils.for_range_slice(builder, top, bottom, step) as (i, _):
                row = builder.mul(i, width)
                with cgutils.for_range_slice(builder, left, right, step) as (j, _):
                    at = builder.add(row, j)
                    for base, best, nan in zip(maps, bests, nans, strict=True):
                        pixel, now = e.load(e.pointer(base, at)), builder.load(best)
                        builder.store(builder.select(builder.fcmp_ordered(">", pixel, now), pixel, now), best)
                        is_nan = builder.fcmp_unordered("uno", pixel, pixel)
                        builder.store(builder.or_(builder.load(nan), is_nan), nan)
            not_a_number = ir.Constant(e.run, [float("nan")] * LANES)
            for place, best, nan in zip(e.apart(to, to_step, slabs), bests, nans, strict=True):
                e.store(builder.select(builder.load(nan), not_a_number, builder.load(best)), e.pointer(place))
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 9), codegen

    return grid_max


@_intrinsic
def grid_argmax(typingctx, like, to, argmax, x, width, top, bottom, left, right):
    """The first maximum in row-major order over a bin that is not empty; a NaN stays."""

    def codegen(context, builder, signature, args):
        _, to, argmax, x, width, top, bottom, left, right = args
        e, i32 = _Grid(builder, signature.args[0], LANES), ir.IntType(32)
        index = ir.VectorType(i32, LANES)
        corner = builder.add(builder.mul(top, width), left)
        best = e.held(e.load(e.pointer(x, corner)))
        nan = e.held(builder.fcmp_unordered("uno", builder.load(best), e.zeros))
        where = e.held(_everywhere(builder, builder.trunc(corner, i32), index))
        with cgutils.for_range_slice(builder, top, bottom, ir.Constant(_I64, 1)) as (i, _):
            row = builder.mul(i, width)
            with cgutils.for_range_slice(builder, left, right, ir.Constant(_I64, 1)) as (j, _):
                at = builder.add(row, j)
                pixel, now = e.load(e.pointer(x, at)), builder.load(best)
                is_nan = builder.fcmp_unordered("uno", pixel, e.zeros)
                more = builder.or_(builder.fcmp_ordered(">", pixel, now), is_nan)
                more = builder.and_(more, builder.not_(builder.load(nan)))
                here = _everywhere(builder, builder.trunc(at, i32), index)
                builder.store(builder.select(more, here, builder.load(where)), where)
                builder.store(builder.or_(builder.load(nan), is_nan), nan)
                builder.store(builder.select(more, pixel, now), best)
        e.store(builder.load(best), e.pointer(to))
        wide = builder.sext(builder.load(where), ir.VectorType(_I64, LANES))
        builder.store(wide, builder.inttoptr(argmax, wide.type.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 8), codegen


def _everywhere(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    nowhere = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nowhere, value, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, nowhere, order)


SLABS = 4  # worked on at once: their lists are read and their loops run once, and their sums do not wait for each other
grid_mean, grid_means = _grid_mean(1), _grid_mean(SLABS)
grid_spread, grid_spreads = _grid_spread(1), _grid_spread(SLABS)
grid_dots, grid_dots_of_all = _grid_dots(1), _grid_dots(SLABS)
grid_max, grid_maxima = _grid_max(1), _grid_max(SLABS)


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
def rect_sum(typingctx, like, first, width, rows, columns):
    """The sum of `rows` x `columns` pixels from address `first` on; rows are `width` pixels apart."""

    def codegen(context, builder, signature, args):
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
def rect_add(typingctx, value, first, width, rows, columns):
    """Add `value` to `rows` x `columns` pixels from address `first` on."""

    def codegen(context, builder, signature, args):
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
