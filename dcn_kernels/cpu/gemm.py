"""The matrix product's inner loops, on LLVM vectors, for a tile that fits the host's registers.

A tile of C, MR rows by NR columns, stays in registers while one loop runs over the depth: each step loads NR columns
of B and multiplies them by MR values of A, each spread over a vector.

Two products are needed, which differ in how A and B lie in memory:

    rows_by_panels      C[i, j] += sum_k A[i, k] B[k, j]    A in rows LDA apart; B packed in panels [k][NR]
    columns_by_rows     C[i, j] += sum_k A[k, i] B[k, j]    A and B both in rows LDA apart

The constant row length LDA turns the MR addresses of A into one register plus constants. C may be any row length.
Rows of A and C are padded to MR and columns of B and C to VECTOR; what lies in the padding is computed and ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from dcn_kernels.cpu.jit import assembly, inner, intrinsic, stay_apart

_machine = llvm.get_default_triple().split("-")[0]
# Asked of the compiler, as its target may be another than this machine.
_fused = assembly("""
    declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
    define void @f(<16 x float>* %p, <16 x float> %a) {
      %b = load <16 x float>, <16 x float>* %p
      %c = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %a, <16 x float> %b)
      store <16 x float> %c, <16 x float>* %p
      ret void
    }""")

if "zmm" in _fused:
    VECTOR_BYTES, MR = 64, 12  # 24 sums, 2 of B and 1 of A in 32 registers
elif "ymm" in _fused and "vfmadd" in _fused:
    VECTOR_BYTES, MR = 32, 6  # 12 sums, 2 of B and 1 of A in 16 registers
elif _machine in ("aarch64", "arm64"):
    VECTOR_BYTES, MR = 16, 12
else:
    VECTOR_BYTES, MR = 16, 6


def _second_level_cache() -> int:
    """Bytes of a core's second-level cache, where Linux tells; else a common size."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.rstrip("KM")) << {"K": 10, "M": 20}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 1 << 20


CACHE_BYTES = _second_level_cache()
COLUMN_VECTORS = 2  # NR = 2 vectors
DEPTH = 240  # of one pass: a multiple of 16 and of every MR; A's tile and B's panel then stay in L1 and L2
LDA = DEPTH + 32  # not a multiple of a power of two that would crowd one cache set


def vector(itemsize: int) -> int:
    """Elements in one register: what columns are padded to."""
    return VECTOR_BYTES // itemsize


def panel(itemsize: int) -> int:
    """NR: columns of a whole panel."""
    return COLUMN_VECTORS * vector(itemsize)


def _element(real: types.Float) -> tuple[ir.Type, int]:
    return (ir.DoubleType(), 8) if real == types.float64 else (ir.FloatType(), 4)


def _tile(vectors: int, across: bool) -> Any:
    """The inner loop for `vectors` vectors of columns; `across`: A[k, i] instead of A[i, k]."""
    a_row, a_step = (1, LDA) if across else (LDA, 1)

    @intrinsic
    def tile(typingctx, like, a, b, b_step, c, ldc, depth):
        """c[MR, columns] += a b; addresses in bytes, steps in elements; `like` is any value of the type."""
        signature = types.void(like, *[types.intp] * 6)

        def codegen(context, builder, signature, args):
            _, a, b, b_step, c, ldc, depth = args
            element, itemsize = _element(signature.args[0])
            width = VECTOR_BYTES // itemsize
            run = ir.VectorType(element, width)
            i64, i32 = ir.IntType(64), ir.IntType(32)
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(run, [run, run, run]), f"llvm.fmuladd.v{width}f{8 * itemsize}"
            )
            ap, bp, cp = (builder.inttoptr(address, element.as_pointer()) for address in (a, b, c))

            def at(pointer, *indices):
                for index in indices:
                    pointer = builder.gep(pointer, [ir.Constant(i64, index) if isinstance(index, int) else index])
                return pointer

            def load(pointer):
                return builder.load(builder.bitcast(pointer, run.as_pointer()), align=itemsize)

            def spread(pointer):
                one = builder.insert_element(ir.Constant(run, ir.Undefined), builder.load(pointer), ir.Constant(i32, 0))
                zeros = ir.Constant(ir.VectorType(i32, width), [0] * width)
                return builder.shuffle_vector(one, ir.Constant(run, ir.Undefined), zeros)

            entry = builder.block
            loop, end = builder.append_basic_block("depth"), builder.append_basic_block("end")
            builder.branch(loop)
            builder.position_at_end(loop)
            k, a_k, b_k = builder.phi(i64), builder.phi(ap.type), builder.phi(bp.type)
            k.add_incoming(ir.Constant(i64, 0), entry)
            a_k.add_incoming(ap, entry)
            b_k.add_incoming(bp, entry)
            sums = [[builder.phi(run) for _ in range(vectors)] for _ in range(MR)]
            columns = [load(at(b_k, j * width)) for j in range(vectors)]
            updated = []
            for i, row in enumerate(sums):
                value = spread(at(a_k, i * a_row))
                updated.append([builder.call(fma, [value, column, x]) for column, x in zip(columns, row, strict=True)])
            following = builder.add(k, ir.Constant(i64, 1))
            k.add_incoming(following, loop)
            a_k.add_incoming(at(a_k, a_step), loop)
            b_k.add_incoming(at(b_k, b_step), loop)
            for row, new in zip(sums, updated, strict=True):
                for x, y in zip(row, new, strict=True):
                    x.add_incoming(ir.Constant(run, [0.0] * width), entry)
                    x.add_incoming(y, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, end)
            builder.position_at_end(end)
            for i, row in enumerate(updated):
                c_row = at(cp, builder.mul(ir.Constant(i64, i), ldc))
                for j, x in enumerate(row):
                    place = builder.bitcast(at(c_row, j * width), run.as_pointer())
                    builder.store(builder.fadd(builder.load(place, align=itemsize), x), place, align=itemsize)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_rows_wide, _rows_narrow = _tile(COLUMN_VECTORS, False), _tile(1, False)
_across_wide, _across_narrow = _tile(COLUMN_VECTORS, True), _tile(1, True)


@inner
def rows_by_panels(like, itemsize, a, rows, depth, b, columns, c, ldc):
    """C[rows, columns] += A[rows, depth] B, with B in panels [columns/NR][depth][NR].

    a, b, c are addresses; rows is rounded up to MR; columns is a multiple of VECTOR, and the last panel is one VECTOR
    wide where they are no multiple of NR; depth is at least 1 and at most DEPTH.
    """
    stay_apart()
    width = VECTOR_BYTES // itemsize
    wide = COLUMN_VECTORS * width
    j = 0
    while j < columns:  # the panel of B stays in L1 while A's rows pass by
        panel_b = b + j * depth * itemsize
        if columns - j >= wide:
            for i in range(0, rows, MR):
                _rows_wide(like, a + i * LDA * itemsize, panel_b, wide, c + (i * ldc + j) * itemsize, ldc, depth)
            j += wide
        else:
            for i in range(0, rows, MR):
                _rows_narrow(like, a + i * LDA * itemsize, panel_b, width, c + (i * ldc + j) * itemsize, ldc, depth)
            j += width


@inner
def columns_by_rows(like, itemsize, a, rows, depth, b, columns, c, ldc):
    """C[rows, columns] += A[depth, rows]^T B[depth, columns], A and B in rows LDA long.

    a, b, c are addresses; rows is rounded up to MR, columns a multiple of VECTOR, depth at least 1.
    """
    stay_apart()
    width = VECTOR_BYTES // itemsize
    wide = COLUMN_VECTORS * width
    j = 0
    while j < columns:
        if columns - j >= wide:
            for i in range(0, rows, MR):
                _across_wide(like, a + i * itemsize, b + j * itemsize, LDA, c + (i * ldc + j) * itemsize, ldc, depth)
            j += wide
        else:
            for i in range(0, rows, MR):
                _across_narrow(like, a + i * itemsize, b + j * itemsize, LDA, c + (i * ldc + j) * itemsize, ldc, depth)
            j += width
