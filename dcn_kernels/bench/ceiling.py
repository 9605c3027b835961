"""How fast this machine multiplies matrices and copies memory: a process of its own, so that it may choose its BLAS.

Run as a script with a JSON request as the only argument; the answer is JSON on stdout. OpenBLAS reads its number of
threads and its kernels from the environment when it is loaded, hence the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

Shape = tuple[int, int, int, int]  # (how many, m, k, n): `how many` products of (m, k) and (k, n)


def measure(threads: int, dtype: str, shapes: tuple[Shape, ...] = ()) -> dict[str, Any]:
    """This machine's rates with so many threads, now.

    Parameters
    ----------
    threads : int
    dtype : {"float32", "float64"}
    shapes : tuple of (how many, m, k, n)
        Matrix products to time besides.

    Returns
    -------
    dict
        ``gflops`` of a square matrix product, ``gbytes_s`` of a copy (bytes read and written), ``products_ms`` of the
        shapes.
    """
    answers = _ask(threads, {"dtype": dtype, "shapes": shapes})
    return {
        "gflops": max(answer["gflops"] for answer in answers),
        "gbytes_s": max(answer["gbytes_s"] for answer in answers),
        "products_ms": [min(times) for times in zip(*(a["products_ms"] for a in answers), strict=True)],
    }


def product_memory(threads: int, dtype: str, shape: tuple[int, int, int]) -> int | None:
    """Bytes by which a fresh process grows in a product of (m, k) and (k, n), operands and result left out.

    None where the system does not tell how much a process held at most.
    """
    return _ask(threads, {"dtype": dtype, "memory": shape}, [{}])[0]["memory"]


def _ask(threads: int, request: dict[str, Any], tried: list[dict[str, str]] | None = None) -> list[dict[str, Any]]:
    # A BLAS's own threads wait for each other, which on a busy machine takes ten times as long as the work. So each
    # product is cut into one for each thread, of a BLAS that uses one.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    answers = []
    for kernels in _kernels(environment) if tried is None else tried:
        run = subprocess.run(
            [sys.executable, "-I", __file__, json.dumps({"threads": threads, **request})],
            env={**environment, **kernels},
            capture_output=True,
            text=True,
        )
        if run.returncode == 0:
            answers.append(json.loads(run.stdout))
    if not answers:
        raise RuntimeError(f"could not measure this machine's rates: {run.stderr.strip()}")
    return answers


def _kernels(environment: dict[str, str]) -> list[dict[str, str]]:
    """The environments to try: OpenBLAS does not always choose the kernels that are fastest."""
    from dcn_kernels.environment import blas, device

    chosen = blas().get("kernel")
    if device()["vectors"] == "avx512f" and "OPENBLAS_CORETYPE" not in environment and chosen != "SkylakeX":
        return [{}, {"OPENBLAS_CORETYPE": "SkylakeX"}]
    return [{}]


def main() -> None:
    """Measure what the request asks for."""
    from concurrent.futures import ThreadPoolExecutor
    from time import perf_counter

    import numpy as np

    request = json.loads(sys.argv[1])
    rng = np.random.default_rng(0)

    def best(run: Any, seconds: float) -> float:
        run()
        times: list[float] = []
        end = perf_counter() + seconds
        while len(times) < 3 or perf_counter() < end:
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        return min(times)

    def product(m: int, k: int, n: int) -> Any:
        a, b = (rng.standard_normal(shape, np.float32).astype(request["dtype"]) for shape in ((m, k), (k, n)))
        c = np.ones((m, n), request["dtype"])
        longest = 0 if m >= n else 1
        parts = [
            (a[rows], b[:, columns], c[rows, columns])
            for piece in np.array_split(np.arange((m, n)[longest]), threads)
            for part in [slice(int(piece[0]), int(piece[-1]) + 1)]
            for rows, columns in [(part, slice(None)) if longest == 0 else (slice(None), part)]
        ]
        return lambda: list(pool.map(lambda p: np.matmul(p[0], p[1], out=p[2]), parts))

    def copy() -> float:
        source = np.ones(1 << 24, np.float32)
        target = np.empty_like(source)
        parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
        seconds = best(lambda: list(pool.map(lambda part: np.copyto(*part), parts)), 0.1)
        return 2 * source.nbytes / seconds / 1e9

    def growth(run: Any) -> int | None:
        try:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")  # the peak starts again at what is held now
            before = held("VmRSS")
            run()
            return held("VmHWM") - before
        except OSError:
            return None

    def held(field: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    threads = request["threads"]
    pool = ThreadPoolExecutor(threads)
    if "memory" in request:
        sys.stdout.write(json.dumps({"memory": growth(product(*request["memory"]))}))
        return
    size = 1024
    answer = {
        "gflops": 2 * size**3 / best(product(size, size, size), 0.15) / 1e9,
        "gbytes_s": copy(),
        "products_ms": [1e3 * many * best(product(m, k, n), 0.1) for many, m, k, n in request["shapes"]],
    }
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
