"""Each instruction of matrix_units.cuh by one warp on the stand-in for a GPU, against NumPy; and what must not pass."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_host.host import SCHEDULES, Library, call, missing

from dcn_kernels.cuda import compile

pytestmark = pytest.mark.cuda_host

KERNEL = r"""
// d = a b + c: a [16, K] and b as [8, K] (or, TRANS, [K, 8]) in scalar_t; K numbers are 32 bytes.
KERNEL(product, 32)
(const scalar_t* a, const scalar_t* b, const float* c, float* d, unsigned char* first, int valid_rows) {
  DYNAMIC_SHARED(memory, 200 * 1024);
  constexpr int K = 32 / sizeof(scalar_t);
  const int lane = threadIdx.x;
  unsigned char *A = memory + 150 * 1024, *B = A + 16 * 32;
  for (int i = lane; i < 32; i += 32) cp_async(A + i * 16, a + i * (16 / sizeof(scalar_t)), i / 2 < valid_rows);
  cp_async_commit();
  if (lane < 16) cp_async(B + lane * 16, b + lane * (16 / sizeof(scalar_t)), true);
  cp_async_commit();
#if PLANTED == 1  // waits for the first group alone
  cp_async_wait<1>();
#elif PLANTED == 0  // 2: does not wait
  cp_async_wait<0>();
#endif
  __syncthreads();
  unsigned ra[4], rb[4], both[2];
  ldmatrix<false>(ra, A + (lane % 16) * 32 + lane / 16 * 16);
#if TRANS
  ldmatrix<true>(rb, B + (lane % 16) * 16);  // matrices 0 and 1: k of 0..7 and of 8..15
#else
  ldmatrix<false>(rb, B + (lane % 8) * 32 + lane / 8 % 2 * 16);
#endif
  both[0] = rb[0], both[1] = rb[1];
  float sum[4];
  for (int i = 0; i < 4; i++) sum[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  mma(sum, ra, both, static_cast<const scalar_t*>(nullptr));
  for (int i = 0; i < 4; i++) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
  first[lane] = memory[150 * 1024 + lane];
  cp_async_wait<0>();
}
"""
TYPES = {"__half": np.float16, "__nv_bfloat16": ml_dtypes.bfloat16, "float": np.float32}


def source() -> str:
    """The kernel with the headers that it needs."""
    return "\n".join(compile._paste(compile.FOLDER / name) for name in ("common.cuh", "matrix_units.cuh")) + KERNEL


def flags(ctype: str, *, trans: bool = False, planted: int = 0) -> compile.Flags:
    """The kernel's macros."""
    return {"scalar_t": ctype, "TRANS": trans, "PLANTED": planted}


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Library:
    """Compiled kernels, kept from run to run."""
    if missing():
        pytest.skip(missing())
    return Library(Path(pytestconfig.cache.mkdir("cuda_host")))


def product(
    library: Library, ctype: str, *, rows: int = 16, schedule: str = "forward", c: float | None = None,
    trans: bool = False, planted: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The warp's result, and NumPy's: small whole numbers, whose sums are exact unless `c` is not."""
    dtype = np.dtype(TYPES[ctype])
    K = 32 // dtype.itemsize
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (16, K)).astype(dtype), rng.integers(-8, 9, (K, 8)).astype(dtype)
    start = rng.integers(-99, 99, (16, 8)).astype(np.float32) if c is None else np.full((16, 8), c, np.float32)
    d, first = np.full((16, 8), np.nan, np.float32), np.zeros(32, np.uint8)
    entry = library.entry(source(), flags(ctype, trans=trans, planted=planted), "product")
    library.runtime.host_set_schedule(SCHEDULES[schedule], 0)
    call(entry, 1, 32, (a, np.ascontiguousarray(b if trans else b.T), start, d, first, np.int32(rows)))
    assert np.array_equal(first, a.view(np.uint8).reshape(-1)[:32]) or planted
    a[rows:] = 0  # not read: zeros in their place
    return d, a.astype(np.float64) @ b.astype(np.float64) + start


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows", [16, 11])
@pytest.mark.parametrize(
    ("ctype", "trans"),
    [("__half", False), ("__half", True), ("__nv_bfloat16", False), ("__nv_bfloat16", True), ("float", False)],
)
def test_product_is_exact(library: Library, ctype: str, trans: bool, rows: int, schedule: str) -> None:
    d, want = product(library, ctype, trans=trans, rows=rows, schedule=schedule)
    assert np.array_equal(d, want)


@pytest.mark.parametrize("c", [2.0**24, -(2.0**24), 2.0**25 + 4])
def test_sums_are_rounded_towards_zero(library: Library, c: float) -> None:
    d, exact = product(library, "__half", c=c)
    nearest = exact.astype(np.float32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(exact)
    assert away.any(), "else this test would tell nothing"
    assert np.array_equal(d, np.where(away, np.nextafter(nearest, np.float32(0)), nearest))


@pytest.mark.parametrize("planted", [1, 2], ids=["one group too few", "no wait"])
def test_data_not_waited_for_is_not_a_number(library: Library, planted: int) -> None:
    d, want = product(library, "__half", planted=planted)
    assert not np.array_equal(d, want)
    assert np.isnan(d).any()


@pytest.mark.parametrize("ctype", TYPES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_instructions_compile(arch: str, ctype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        nvrtc = compile.NVRTC()
    except compile.CompilerNotFound as error:
        pytest.skip(str(error))
    monkeypatch.setattr(compile, "source", lambda stem: source().replace("200 * 1024", "0"))
    ptx = nvrtc.compile("product", flags(ctype), arch).ptx
    shape = "m16n8k8" if ctype == "float" else "m16n8k16"
    for instruction in (
        f"mma.sync.aligned.{shape}.row.col",
        "ldmatrix.sync.aligned.m8n8.x4",
        "cp.async.cg.shared.global",
    ):
        assert instruction in ptx, instruction
