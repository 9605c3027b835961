// Copies between layouts: arrays of up to five axes by strides to others, cast and, with SPLIT, in two parts.
#include "common.cuh"

#define TILE 32
#define ROWS 8
#define COPIES 3  // of a launch

struct copy_t {
  index_t Z, A, B, R, C;                   // sizes of the target; the source is read along C
  index_t rows, columns;                   // of the source along R and C: the target is 0 beyond
  index_t from_z, from_a, from_b, from_r, from_c;  // strides, in elements; 0 repeats
  index_t to_z, to_a, to_b, to_r, to_c;
  index_t along_r;                         // 1: the target is written along R, 0: along C
  index_t parts;                           // tiles of TILE x TILE; 0: there is no such copy
};
struct copies_t {
  copy_t of[COPIES];
};

// target[z, a, b, r, c] = source[z, a, b, r, c]. A block owns a TILE x TILE part of (r, c) at a time, through shared memory,
// so that reads run along the source's rows and writes along the target's. No two blocks write the same element.
// A low target takes what the TF32 numbers of its target leave; null: the copy is in one part.
KERNEL(copy, TILE * ROWS)
(const source_t* __restrict__ source_0, target_t* __restrict__ target_0, target_t* __restrict__ low_0,
 const source_t* __restrict__ source_1, target_t* __restrict__ target_1, target_t* __restrict__ low_1,
 const source_t* __restrict__ source_2, target_t* __restrict__ target_2, target_t* __restrict__ low_2,
 const copies_t copies) {
  SHARED(source_t, tile, [TILE][TILE + 1]);  // one column more: threads of a warp read different banks both ways
  const int lane = threadIdx.x % TILE, row = threadIdx.x / TILE;
  const index_t first_1 = copies.of[0].parts, first_2 = first_1 + copies.of[1].parts;
  for (index_t nth = blockIdx.x; nth < first_2 + copies.of[2].parts; nth += gridDim.x) {
    const int job = nth < first_1 ? 0 : nth < first_2 ? 1 : 2;
    const copy_t& s = copies.of[job];
    const source_t* const source = job == 0 ? source_0 : job == 1 ? source_1 : source_2;
    target_t* const target = job == 0 ? target_0 : job == 1 ? target_1 : target_2;
    target_t* const low = job == 0 ? low_0 : job == 1 ? low_1 : low_2;
    const index_t part = nth - (job == 0 ? 0 : job == 1 ? first_1 : first_2);
    const index_t across = (s.C + TILE - 1) / TILE, down = (s.R + TILE - 1) / TILE;
    const index_t plane = part / (down * across), in_plane = part - plane * (down * across);
    const index_t rest = plane / s.B, b = plane - rest * s.B, z = rest / s.A, a = rest - z * s.A;
    const index_t tile_r = in_plane / across;
    const index_t r0 = tile_r * TILE, c0 = (in_plane - tile_r * across) * TILE;
    const index_t from = z * s.from_z + a * s.from_a + b * s.from_b + r0 * s.from_r + (c0 + lane) * s.from_c;
    for (int i = row; i < TILE; i += ROWS) {
      if (r0 + i >= s.R || c0 + lane >= s.C) continue;
      const bool there = r0 + i < s.rows && c0 + lane < s.columns;
      tile[i][lane] = there ? source[from + i * s.from_r] : source_t(0.0f);
    }
    __syncthreads();  // the tile is there
    for (int i = row; i < TILE; i += ROWS) {
      const int r = s.along_r ? lane : i, c = s.along_r ? i : lane;
      if (r0 + r >= s.R || c0 + c >= s.C) continue;
      const index_t to = z * s.to_z + a * s.to_a + b * s.to_b + (r0 + r) * s.to_r + (c0 + c) * s.to_c;
#if SPLIT
      if (low != nullptr) {
        tf32_split(tile[r][c], target[to], low[to]);
        continue;
      }
#endif
      target[to] = target_t(tile[r][c]);
    }
    __syncthreads();  // the tile is used up
  }
}
