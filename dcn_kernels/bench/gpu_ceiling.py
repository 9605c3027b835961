"""How fast a GPU multiplies matrices and copies memory, through CuPy: as `ceiling.measure` tells it of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dcn_kernels.bench.ceiling import Shape
from dcn_kernels.bench.clocks import CudaClock


def measure(dtype: str, products: Iterable[Shape] = ()) -> dict[str, Any]:
    """Of a dtype: gflops, gbytes_s and products_ms, the times of matrix products (how many, m, k, n)."""
    import cupy

    size, source = 4096, cupy.ones(1 << 28, cupy.uint8)
    return {
        "gflops": 2 * size**3 / _product_ms(dtype, size, size, size) / 1e6,
        "gbytes_s": 2 * source.nbytes / _least_ms(source.copy) / 1e6,
        "products_ms": products_ms(dtype, products),
    }


def products_ms(dtype: str, products: Iterable[Shape]) -> list[float]:
    """Milliseconds of matrix products (how many, m, k, n)."""
    return [many * _product_ms(dtype, m, k, n) for many, m, k, n in products]


def _product_ms(dtype: str, m: int, k: int, n: int) -> float:
    import cupy

    kind = "float16" if dtype == "bfloat16" else dtype  # CuPy's matmul has no bfloat16; GPUs do both at one rate
    a, b, c = cupy.ones((m, k), kind), cupy.ones((k, n), kind), cupy.empty((m, n), kind)
    return _least_ms(lambda: cupy.matmul(a, b, c))


def _least_ms(run: Callable[[], Any]) -> float:
    ticks = CudaClock()
    ticks.milliseconds(run)
    return min(ticks.milliseconds(run) for _ in range(10))
