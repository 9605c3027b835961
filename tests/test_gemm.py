"""The matrix product's inner loops on their own, against NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcn_kernels.cpu import gemm, workspace
from dcn_kernels.cpu.jit import kernel

REALS = (np.float32, np.float64)


@kernel
def rows_by_panels(a, rows, depth, b, columns, c):
    gemm.rows_by_panels(
        a[0, 0], a.itemsize, a.ctypes.data, rows, depth, b.ctypes.data, columns, c.ctypes.data, c.shape[1]
    )


@kernel
def columns_by_rows(a, rows, depth, b, columns, c):
    gemm.columns_by_rows(
        a[0, 0], a.itemsize, a.ctypes.data, rows, depth, b.ctypes.data, columns, c.ctypes.data, c.shape[1]
    )


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def buffers(real, **shapes):
    """Aligned buffers full of NaN, so that whatever is read and should not be shows."""
    made = workspace.allocate({name: (shape, real) for name, shape in shapes.items()})
    for buffer in made.values():
        buffer[...] = np.nan
    return made.values()


def in_panels(b: np.ndarray, itemsize: int) -> np.ndarray:
    """[columns / NR][depth][NR], the last panel perhaps one vector wide."""
    width, parts, j = gemm.panel(itemsize), [], 0
    while j < b.shape[1]:
        step = width if b.shape[1] - j >= width else gemm.vector(itemsize)
        parts.append(b[:, j : j + step].ravel())
        j += step
    return np.concatenate(parts)


def close(got, expected, depth, real):
    return np.abs(got - expected).max() <= 4 * np.finfo(real).eps * np.sqrt(depth) * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("real", REALS)
@given(rows=st.integers(1, 40), depth=st.integers(1, gemm.DEPTH), columns=st.integers(1, 90), seed=st.integers(0, 99))
def test_rows_by_panels_is_a_product_added_to_c(real, rows, depth, columns, seed):
    rng, itemsize = np.random.default_rng(seed), np.dtype(real).itemsize
    padded = up(columns, gemm.vector(itemsize))
    a, c, packed = buffers(
        real, a=(up(rows, gemm.MR), gemm.LDA), c=(up(rows, gemm.MR), padded + 5), packed=(depth * padded,)
    )
    a[:rows, :depth] = rng.standard_normal((rows, depth))
    b = np.zeros((depth, padded), real)
    b[:, :columns] = rng.standard_normal((depth, columns))
    packed[:] = in_panels(b, itemsize)
    before = rng.standard_normal((rows, padded)).astype(real)
    c[:rows, :padded] = before
    rows_by_panels(a, rows, depth, packed, padded, c)
    expected = before.astype(np.float64) + a[:rows, :depth].astype(np.float64) @ b
    assert close(c[:rows, :padded], expected, depth, real)
    assert np.isnan(c[:, padded:]).all()  # nothing beyond the columns is written


@pytest.mark.parametrize("real", REALS)
@given(rows=st.integers(1, 40), depth=st.integers(1, 130), columns=st.integers(1, 90), seed=st.integers(0, 99))
def test_columns_by_rows_is_a_transposed_product_added_to_c(real, rows, depth, columns, seed):
    rng, itemsize = np.random.default_rng(seed), np.dtype(real).itemsize
    padded = up(columns, gemm.vector(itemsize))
    a, b, c = buffers(real, a=(depth, gemm.LDA), b=(depth, gemm.LDA), c=(up(rows, gemm.MR), padded + 5))
    a[:, :rows] = rng.standard_normal((depth, rows))
    b[:, :columns] = rng.standard_normal((depth, columns))
    before = rng.standard_normal((rows, columns)).astype(real)
    c[:rows, :columns] = before
    columns_by_rows(a, rows, depth, b, padded, c)
    expected = before.astype(np.float64) + a[:, :rows].astype(np.float64).T @ b[:, :columns]
    assert close(c[:rows, :columns], expected, depth, real)
    assert np.isnan(c[:, padded:]).all()


def test_tile_fits_the_registers_and_divides_a_pass():
    assert gemm.DEPTH % gemm.MR == 0
    assert gemm.DEPTH % 16 == 0  # whole units of slabs
    assert gemm.LDA >= gemm.DEPTH + gemm.MR  # rows rounded up to MR read no further than a row's end
    for itemsize in (4, 8):
        assert gemm.panel(itemsize) == gemm.COLUMN_VECTORS * gemm.vector(itemsize)
