"""Runs of channels as LLVM vectors: the loops over channels of a sample, each for a fixed number of lanes.

An image is staged channels-last, so the channels of a pixel are one run of memory. For the four corner pixels q of a
position p, with weights w_q = m G(q, p):

    blend    column  = sum_q w_q x_q              the sample
    dots     part_q += sum over lanes g x_q       of which grad_offset and grad_mask are linear combinations
    spread   y_q    += w_q g                      the transpose of blend

and `transpose` between channels-last runs and rows of pixels.

Addresses are in bytes; a pixel's run starts at base + pixel * lanes elements. Corners may be the same pixel.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from dcn_kernels.cpu.jit import intrinsic

_I64, _I32 = ir.IntType(64), ir.IntType(32)


class _Emit:
    """Vector instructions for runs of `lanes` elements of a Numba float type."""

    def __init__(self, builder: ir.IRBuilder, real: types.Float, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes
        self.element, self.itemsize = (ir.DoubleType(), 8) if real == types.float64 else (ir.FloatType(), 4)
        self.run = ir.VectorType(self.element, lanes)

    def pointer(self, base: ir.Value, pixel: ir.Value | None = None, kind: ir.Type | None = None) -> ir.Value:
        address = base
        if pixel is not None:
            address = self.builder.add(base, self.builder.mul(pixel, ir.Constant(_I64, self.lanes * self.itemsize)))
        return self.builder.inttoptr(address, (kind or self.run).as_pointer())

    def load(self, pointer: ir.Value) -> ir.Value:
        return self.builder.load(pointer, align=self.itemsize)

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        self.builder.store(value, pointer, align=self.itemsize)

    def everywhere(self, scalar: ir.Value) -> ir.Value:
        nowhere = ir.Constant(self.run, ir.Undefined)
        first = self.builder.insert_element(nowhere, scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(
            first, nowhere, ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        )

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.itemsize}"
        kind = ir.FunctionType(self.run, [self.run] * 3)
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def pick(self, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), order))

    def four_sums(self, vectors: list[ir.Value]) -> ir.Value:
        """The sums over the lanes of four vectors, as one vector of four."""
        half, lanes = self.lanes // 2, self.lanes
        add, pick = self.builder.fadd, self.pick

        def fold(a: ir.Value, b: ir.Value, pieces: int) -> ir.Value:
            """Halve each of the `pieces` equal pieces of a and of b, and set the halves side by side."""
            length = lanes // pieces
            low = [s * lanes + p * length + l for s in (0, 1) for p in range(pieces) for l in range(length // 2)]
            return add(pick(a, b, low), pick(a, b, [l + length // 2 for l in low]))

        one, two = fold(vectors[0], vectors[1], 1), fold(vectors[2], vectors[3], 1)
        total = fold(one, two, 2)  # four pieces of lanes/4
        length = half // 2
        while length > 1:
            length //= 2
            low = [p * 2 * length + l for p in range(4) for l in range(length)]
            total = add(pick(total, total, low), pick(total, total, [l + length for l in low]))
        return total


def _blend(lanes: int) -> Any:
    @intrinsic
    def blend(typingctx, to, x, i00, i01, i10, i11, w00, w01, w10, w11):
        real = w00
        signature = types.void(*[types.intp] * 6, *[real] * 4)

        def codegen(context, builder, signature, args):
            e = _Emit(builder, real, lanes)
            total = None
            for pixel, weight in zip(args[2:6], args[6:10], strict=True):
                run, w = e.load(e.pointer(args[1], pixel)), e.everywhere(weight)
                total = builder.fmul(run, w) if total is None else e.fma(run, w, total)
            e.store(total, e.pointer(args[0]))
            return context.get_dummy_value()

        return signature, codegen

    return blend


def _dots(lanes: int) -> Any:
    @intrinsic
    def dots(typingctx, like, part, g, x, i00, i01, i10, i11):
        real = like
        signature = types.void(real, *[types.intp] * 7)

        def codegen(context, builder, signature, args):
            e = _Emit(builder, real, lanes)
            run = e.load(e.pointer(args[2]))
            products = [builder.fmul(run, e.load(e.pointer(args[3], pixel))) for pixel in args[4:8]]
            place = e.pointer(args[1], kind=ir.VectorType(e.element, 4))
            e.store(builder.fadd(e.load(place), e.four_sums(products)), place)
            return context.get_dummy_value()

        return signature, codegen

    return dots


def _spread(lanes: int) -> Any:
    @intrinsic
    def spread(typingctx, g, y, i00, i01, i10, i11, w00, w01, w10, w11):
        real = w00
        signature = types.void(*[types.intp] * 6, *[real] * 4)

        def codegen(context, builder, signature, args):
            e = _Emit(builder, real, lanes)
            run = e.load(e.pointer(args[0]))
            for pixel, weight in zip(args[2:6], args[6:10], strict=True):  # in order: corners may coincide
                place = e.pointer(args[1], pixel)
                e.store(e.fma(run, e.everywhere(weight), e.load(place)), place)
            return context.get_dummy_value()

        return signature, codegen

    return spread


def _transpose(lanes: int) -> Any:
    @intrinsic
    def transpose(typingctx, like, source, source_row, target, target_row):
        """target[j, i] = source[i, j] for lanes x lanes elements; rows are so many elements apart."""
        signature = types.void(like, *[types.intp] * 4)

        def codegen(context, builder, signature, args):
            e = _Emit(builder, like, lanes)

            def place(base, row, i):
                step = builder.mul(row, ir.Constant(_I64, i * e.itemsize))
                return e.pointer(builder.add(base, step))

            rows = [e.load(place(args[1], args[2], i)) for i in range(lanes)]
            span = lanes // 2
            while span:  # swap the off-diagonal blocks of span x span
                low = [j if not j & span else lanes + j - span for j in range(lanes)]
                high = [j + span if not j & span else lanes + j for j in range(lanes)]
                for i in range(lanes):
                    if not i & span:
                        a, b = rows[i], rows[i + span]
                        rows[i], rows[i + span] = e.pick(a, b, low), e.pick(a, b, high)
                span //= 2
            for i, row in enumerate(rows):
                e.store(row, place(args[3], args[4], i))
            return context.get_dummy_value()

        return signature, codegen

    return transpose


blend8, blend16 = _blend(8), _blend(16)
dots8, dots16 = _dots(8), _dots(16)
spread8, spread16 = _spread(8), _spread(16)
transpose8, transpose16 = _transpose(8), _transpose(16)
