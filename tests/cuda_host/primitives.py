"""What the stand-in for a GPU emulates, each used once by one kernel, and what must come of it bit for bit.

The tests run it on the stand-in, and those marked cuda on a GPU: both must give `expected()`, so the instructions that
all other results of the stand-in rest on are known to be those of the hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dcn_kernels.cuda import compile

THREADS, BLOCKS, LANES = 256, 3, (1, 2, 4, 8, 16, 32)

KERNEL = r"""
#define THREADS 256

// One block's results are out[block, ...]; `sums` are added to by all.
KERNEL(primitives, THREADS)
(const float* __restrict__ x,           // [THREADS]
 const double* __restrict__ absent,     // null
 float* __restrict__ lane_sums,         // [blocks, 6, THREADS]
 unsigned* __restrict__ votes,          // [blocks, THREADS]: of x > 0 in the warp
 int* __restrict__ counted,             // [blocks, THREADS]: set bits of the vote
 float* __restrict__ high,              // [blocks, THREADS]
 float* __restrict__ low,               // [blocks, THREADS]
 __half* __restrict__ half,             // [blocks, THREADS]
 __nv_bfloat16* __restrict__ brain,     // [blocks, THREADS]
 float* __restrict__ floors,            // [blocks, THREADS]
 float* __restrict__ ceilings,          // [blocks, THREADS]
 float* __restrict__ rounded,           // [blocks, THREADS]: halves away from 0
 float* __restrict__ apart,             // [blocks, THREADS]: 3.1 x - x, each rounded to float
 double* __restrict__ double_apart,     // [blocks, THREADS]: and to double
 float* __restrict__ neighbours,        // [blocks, THREADS]: the next lane's x + 1, through shared memory
 int* __restrict__ compared,            // [blocks, THREADS]: bits of what comparisons say
 float* __restrict__ turned,            // [blocks, THREADS]: the block's x from the other end, through shared memory
 float* __restrict__ sums,              // [8]
 double* __restrict__ double_sums,      // [2]
 int* __restrict__ histogram) {         // [blocks, 8]
  SHARED(float, tile, [THREADS]);
  SHARED(int, bins, [8]);
  const int i = threadIdx.x, at = blockIdx.x * THREADS + i;
  tile[i] = x[i];
  if (i < 8) bins[i] = 0;
  __syncthreads();
  turned[at] = tile[THREADS - 1 - i];
  for (int level = 0; level < 6; level++)
    lane_sums[(blockIdx.x * 6 + level) * THREADS + i] = sum_over_lanes(float(i % 7), 1 << level);
  const unsigned vote = __ballot_sync(0xffffffffu, x[i] > 0);
  votes[at] = vote;
  counted[at] = __popc(vote);
  tf32_split(x[i], high[at], low[at]);
  half[at] = __half(x[i]);
  brain[at] = __nv_bfloat16(x[i]);
  floors[at] = floor(x[i]);
  ceilings[at] = ceil(x[i]);
  rounded[at] = round(x[i]);
  apart[at] = __fadd_rn(__fmul_rn(x[i], 3.1f), -x[i]);
  double_apart[at] = __dadd_rn(__dmul_rn(double(x[i]), 3.1), -double(x[i]));
  __syncthreads();
  tile[i] = x[i] + 1;
  __syncwarp();
  neighbours[at] = tile[i / 32 * 32 + (i + 1) % 32];
  const float nothing = NOT_A_NUMBER;
  compared[at] = (x[i] == x[i]) | (x[i] > -1) << 1 | (x[i] < 8) << 2 | (nothing != nothing) << 3 |
                 (absent == nullptr) << 4 | (float(__half(x[i])) == x[i]) << 5 |
                 (float(__nv_bfloat16(x[i])) == x[i]) << 6;
  float whole[8];
  for (int v = 0; v < 8; v++) whole[v] = i % 5 + v;  // whole numbers: their sum is exact in any order
  atomic_add<8>(sums, whole);
  const double more[2] = {double(i), 0.5};
  atomic_add<2>(double_sums, more);
  atomicAdd(&bins[i % 8], 1 + i % 3);
  __syncthreads();
  if (i < 8) histogram[blockIdx.x * 8 + i] = bins[i];
}
"""


def source() -> str:
    """The kernel behind the headers that all kernels have."""
    common = (compile.FOLDER / "common.cuh").read_text()
    return f"{common}\n{KERNEL}"


def inputs() -> np.ndarray:
    """Numbers of all sizes, whole ones, halves between them, and what is not finite. None is denormal."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(THREADS) * 10.0 ** rng.integers(-4, 5, THREADS)).astype(np.float32)
    x[:16] = [0, -0.0, 1, -1, 0.5, -0.5, 2.5, 65504, 65520, 1e30, -1e30, np.inf, -np.inf, np.nan, 3.4e38, 2048.5]
    return x


def outputs() -> dict[str, np.ndarray]:
    """The kernel's results before it runs, by argument."""
    each = (BLOCKS, THREADS)
    return {
        "lane_sums": np.zeros((BLOCKS, 6, THREADS), np.float32),
        "votes": np.zeros(each, np.uint32),
        "counted": np.zeros(each, np.int32),
        "high": np.zeros(each, np.float32),
        "low": np.zeros(each, np.float32),
        "half": np.zeros(each, np.float16),
        "brain": np.zeros(each, ml_dtypes.bfloat16),
        "floors": np.zeros(each, np.float32),
        "ceilings": np.zeros(each, np.float32),
        "rounded": np.zeros(each, np.float32),
        "apart": np.zeros(each, np.float32),
        "double_apart": np.zeros(each, np.float64),
        "neighbours": np.zeros(each, np.float32),
        "compared": np.zeros(each, np.int32),
        "turned": np.zeros(each, np.float32),
        "sums": np.zeros(8, np.float32),
        "double_sums": np.zeros(2, np.float64),
        "histogram": np.zeros((BLOCKS, 8), np.int32),
    }


def expected() -> dict[str, np.ndarray]:
    """The same by NumPy, from what CUDA's manual says of each."""
    x, i = inputs(), np.arange(THREADS)
    with np.errstate(all="ignore"):
        half, brain = x.astype(np.float16), x.astype(ml_dtypes.bfloat16)
        finite = np.isfinite(x)
        wide = x.astype(np.float64)
        product, double_product = x * np.float32(3.1) - x, wide * 3.1 - wide
        rounded = np.copysign(np.trunc(np.abs(wide) + 0.5), wide)
        high = np.where(finite, _tf32(x), np.copysign(np.float32(1), x))
        low = np.where(finite, _tf32(np.where(finite, x - high, 0)), x)
        same = [x == x, x > -1, x < 8, True, True, half.astype(np.float32) == x, brain.astype(np.float32) == x]
    warps = np.repeat(np.arange(THREADS // 32) * 32, 32)
    bits = np.left_shift(np.uint64(1), (i % 32).astype(np.uint64)) * (x > 0)
    votes = np.array([bits[first : first + 32].sum() for first in warps]).astype(np.uint32)
    sums = [(i % 7).reshape(-1, lanes).sum(1).repeat(lanes) for lanes in LANES]
    found = {
        "lane_sums": np.stack(sums).astype(np.float32),
        "votes": votes,
        "counted": np.array([int(vote).bit_count() for vote in votes], np.int32),
        "high": high,
        "low": low,
        "half": half,
        "brain": brain,
        "floors": np.floor(x),
        "ceilings": np.ceil(x),
        "rounded": rounded.astype(np.float32),
        "apart": product,
        "double_apart": double_product,
        "neighbours": (x + 1).reshape(-1, 32)[:, (np.arange(32) + 1) % 32].ravel(),
        "compared": sum(np.asarray(bit).astype(np.int32) << n for n, bit in enumerate(same)),
        "turned": x[::-1],
        "histogram": np.bincount(i % 8, 1 + i % 3, 8).astype(np.int32),
    }
    found = {name: np.broadcast_to(array, (BLOCKS, *array.shape)) for name, array in found.items()}
    found["sums"] = (BLOCKS * ((i % 5).sum() + THREADS * np.arange(8))).astype(np.float32)
    found["double_sums"] = BLOCKS * np.array([i.sum(), THREADS / 2])
    return found


def _tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to 11 significant bits, halves away from 0; not beyond the largest number."""
    significand, exponent = np.frexp(x.astype(np.float64))
    rounded = np.ldexp(np.copysign(np.floor(np.abs(significand) * 2048 + 0.5), significand), exponent - 11)
    return np.where(np.abs(rounded) < 2.0**128, rounded, np.ldexp(np.trunc(significand * 2048), exponent - 11)).astype(
        np.float32
    )


def compare(got: dict[str, np.ndarray]) -> None:
    """Equal, NaN where NaN is expected, and zeros of the same sign."""
    for name, want in expected().items():
        one, two = got[name].astype(np.float64), want.astype(np.float64)
        wrong = ~((one == two) | (np.isnan(one) & np.isnan(two)))
        wrong |= (one == 0) & (np.signbit(one) != np.signbit(two)) & (name != "low")
        assert not wrong.any(), f"{name}: {got[name][wrong][:5]} for {want[wrong][:5]} at {np.argwhere(wrong)[:5]}"


def run(
    launch: Callable[[dict[str, Any], tuple[Any, ...]], None], place: Callable[[np.ndarray], Any]
) -> dict[str, Any]:
    """The arrays of one launch: `place` puts an array where kernels reach it, `launch` takes flags and arguments."""
    results = {name: place(array) for name, array in outputs().items()}
    launch({"VECTOR_ATOMICS": True}, (place(inputs()), None, *results.values()))
    return results
