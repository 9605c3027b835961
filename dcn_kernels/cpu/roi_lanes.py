"""Means over a grid of lines for 16 channels at once: the loops over a bin's pixels as LLVM vectors.

A slab of 16 channels is staged channels-last; pixel (y, x) is at base + (y*W + x)*16 elements. Rows and columns of a
bin come as lists of indices, weights and slopes (see bins.py). Addresses are in bytes, indices are int64.

    grid_mean    to     = scale * sum_ij wy_i wx_j x_ij
    grid_spread  x_ij  += wy_i wx_j g                      its transpose
    grid_dots    part  += sum over lanes of g times (sum wy wx x, sum sy wx x, sum wy sx x)
    grid_max     to     = the maximum, and its flat index
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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
