"""Each instruction of matrix_units.cuh by one warp on the stand-in for a GPU, against NumPy; and what must not pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_host import accesses
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


def test_copies_that_a_launch_never_waits_for_are_refused(library: Library) -> None:
    """In its last block too, behind which no other block comes upon them."""
    code = "import sys; from pathlib import Path; import test_matrix_units as t; t.product_without_waiting(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", NO_CORE + code, str(library.cache)],
        capture_output=True, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert "copies it never waited for" in result.stderr, result.stdout + result.stderr


NO_CORE = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"  # an abort is what the test waits for


def product_without_waiting(cache: str) -> None:
    """The kernel without its last wait, in the child process of the test above."""
    text = source().replace("  cp_async_wait<0>();\n}\n", "}\n")
    assert text != source()
    library = Library(Path(cache))
    arrays = (np.zeros((16, 16), np.float16), np.zeros((8, 16), np.float16), np.zeros((16, 8), np.float32))
    entry = library.entry(text, flags("__half", planted=2), "product")
    call(entry, 1, 32, (*arrays, np.zeros((16, 8), np.float32), np.zeros(32, np.uint8), np.int32(16)))


TRACED = r"""
// Each lane reads a word of `from` by a step, and stores it in shared memory `stride` words apart, or not at all.
KERNEL(strided, 32)(const float* from, float* to, int step, int stride, int lanes) {
  DYNAMIC_SHARED(memory, 32 * 33 * 4);
  float* const words = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x;
  if (lane < lanes) shared_store(words + lane * stride, global_load<float>(from + lane * step));
  __syncthreads();
  if (lane < lanes) global_store(to + lane, shared_load<float>(words + lane * stride));
  vec<float, 4> four = shared_load<vec<float, 4>>(words + lane * 4);  // 8 lanes at once: no conflict
  if (lane == 99) to[0] = four.v[0];
}
"""


@pytest.mark.parametrize(
    ("step", "stride", "lanes", "passes", "sectors"),
    [(1, 1, 32, 1, 4), (2, 2, 32, 2, 8), (8, 32, 32, 32, 32), (1, 33, 32, 1, 4), (1, 8, 8, 2, 1), (0, 0, 32, 1, 1)],
)
def test_bank_conflicts_and_sectors_are_counted(
    library: Library, step: int, stride: int, lanes: int, passes: int, sectors: int
) -> None:
    traced = Library(library.cache, trace=True)
    headers = [compile._paste(compile.FOLDER / name) for name in ("common.cuh", "matrix_units.cuh")]
    entry = traced.entry("\n".join([*headers, TRACED]), {}, "strided")
    to, numbers = np.zeros(32, np.float32), aligned(np.arange(32.0 * max(step, 1), dtype=np.float32))
    call(entry, 2, 32, (numbers, aligned(to), *(np.int32(n) for n in (step, stride, lanes))))
    found = {kind: row for (kind, _), row in accesses.read(traced).items() if kind != "shared load"}
    assert found["shared store"] == accesses.Row(1, passes, 1), "of block 0 alone"
    assert found["global load"].passes == sectors
    assert not accesses.read(traced), "the log is read once"


def test_swizzled_rows_are_read_without_conflicts_and_plain_ones_are_not(library: Library) -> None:
    """Eight rows of 128 bytes by ldmatrix: one bank for all of a column of pieces, unless pieces are exchanged."""
    kernel = r"""
KERNEL(rows, 32)(float* to, int swizzled) {
  DYNAMIC_SHARED(memory, 32 * 128);
  const int row = threadIdx.x;
  for (int piece = 0; piece < 8; piece++) shared_store(memory + row * 128 + piece * 16, vec<float, 4>{});
  __syncthreads();
  unsigned r[4];
  ldmatrix<false>(r, memory + row * 128 + (swizzled ? row % 8 * 16 : 0));
  to[row] = r[0];
}
"""
    traced = Library(library.cache, trace=True)
    headers = [compile._paste(compile.FOLDER / name) for name in ("common.cuh", "matrix_units.cuh")]
    entry = traced.entry("\n".join([*headers, kernel]), {}, "rows")
    passes = {}
    for swizzled in (False, True):
        call(entry, 1, 32, (np.zeros(32, np.float32), np.int32(swizzled)))
        table = accesses.read(traced)
        passes[swizzled] = next(row.passes for (kind, _), row in table.items() if kind == "ldmatrix")
    assert passes == {False: 32, True: 4}


def aligned(array: np.ndarray) -> np.ndarray:
    """The same numbers on a boundary of 128 bytes, as memory of a GPU is."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 128
    out = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out
