// Copies between layouts: an array of four axes by strides to another, cast and, with SPLIT, in two parts.
#include "common.cuh"

#define TILE 32
#define ROWS 8

struct copy_t {
  index_t A, B, R, C;                      // sizes; the source is read along C
  index_t from_a, from_b, from_r, from_c;  // strides, in elements
  index_t to_a, to_b, to_r, to_c;
  index_t along_r;                         // 1: the target is written along R, 0: along C
};

// target[a, b, r, c] = source[a, b, r, c]. A block owns a TILE x TILE part of (r, c) at a time, through shared memory,
// so that reads run along the source's rows and writes along the target's. No two blocks write the same element.
KERNEL(copy, TILE * ROWS)
(const source_t* __restrict__ source,  // [A, B, R, C] by strides; a stride may be 0
 target_t* __restrict__ target,        // [A, B, R, C] by strides
 target_t* __restrict__ target_low,    // SPLIT: what the TF32 numbers of `target` leave; else null
 const copy_t s) {
  SHARED(source_t, tile, [TILE][TILE + 1]);  // one column more: threads of a warp read different banks both ways
  const int lane = threadIdx.x % TILE, row = threadIdx.x / TILE;
  const index_t across = (s.C + TILE - 1) / TILE, down = (s.R + TILE - 1) / TILE;
  for (index_t part = blockIdx.x; part < s.A * s.B * down * across; part += gridDim.x) {
    const index_t a = part / (s.B * down * across), b = part / (down * across) % s.B;
    const index_t r0 = part / across % down * TILE, c0 = part % across * TILE;
    for (int i = row; i < TILE; i += ROWS)
      if (r0 + i < s.R && c0 + lane < s.C)
        tile[i][lane] = source[a * s.from_a + b * s.from_b + (r0 + i) * s.from_r + (c0 + lane) * s.from_c];
    __syncthreads();  // the tile is there
    for (int i = row; i < TILE; i += ROWS) {
      const int r = s.along_r ? lane : i, c = s.along_r ? i : lane;
      if (r0 + r >= s.R || c0 + c >= s.C) continue;
      const index_t to = a * s.to_a + b * s.to_b + (r0 + r) * s.to_r + (c0 + c) * s.to_c;
#if SPLIT
      tf32_split(tile[r][c], target[to], target_low[to]);
#else
      target[to] = target_t(tile[r][c]);
#endif
    }
    __syncthreads();  // the tile is used up
  }
}
