// The maximum of every bin of regions of interest, where it is, and its gradient. Means: roi_mean.cu.
//
// A warp owns a bin of a RoI and takes its channels 32 * VEC at a time; maps are read and results written as there.
#include "common.cuh"
#include "bins.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define TILE (32 * VEC)  // channels at a time

// The first maximum in row-major order, a NaN before all else; 0 and -1 of an empty bin.
// No two threads write the same element.
KERNEL(maximum, THREADS)
(const scalar_t* __restrict__ input,  // [images, C, 1, H, W] by strides
 const void* __restrict__ rois,       // [R, 5] by strides
 scalar_t* __restrict__ output,       // [R, C, PH, PW]; null: not wanted
 index_t* __restrict__ argmax,        // [R, C, PH, PW]: y * W + x; null: not wanted
 const roi_t s) {
  SHARED(acc_t, pooled, [WARPS][TILE + 1]);
  SHARED(index_t, where, [WARPS][TILE + 1]);
  SHARED(index_t, place, [WARPS]);
  SHARED(side_t, sides, [WARPS][2]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const index_t bins = index_t(s.PH) * s.PW, units = s.R * bins;
  for (index_t first = index_t(blockIdx.x) * WARPS; first < units; first += index_t(gridDim.x) * WARPS) {
    const bool mine = first + warp < units;
    const bin_t b = bin_of(s, mine ? first + warp : first);
    const int image = image_of(s, rois, b.r);
    const bool reads = mine && in_chunk(s, image), writes = reads || (mine && image < 0 && s.first_image == 0);
    const index_t at = index_t(image - s.first_image) * s.input_n;
    const side_t &rows = sides[warp][ROWS], &columns = sides[warp][COLUMNS];
    __syncwarp();  // the last bin's sides are used up
    if (reads && lane < 2) sides[warp][lane] = side_of(s, rois, nullptr, b, lane);
    __syncwarp();  // they are there
    if (lane == 0) place[warp] = writes ? b.r * s.C * bins + b.ph * s.PW + b.pw : -1;
    for (int c0 = 0; c0 < s.C; c0 += TILE) {
      const int c = c0 + lane * VEC;
      acc_t most[VEC] = {};
      index_t found[VEC];
      for (int v = 0; v < VEC; v++) found[v] = -1;
      for (int y = rows.first; reads && c < s.C && y < rows.last; y++)
        for (int x = columns.first; x < columns.last; x++) {
          const vec<scalar_t, VEC> value = load<VEC>(input + (at + y * s.input_y + x * s.input_x + c * s.input_c));
          for (int v = 0; v < VEC; v++) {
            const acc_t a = acc_t(value.v[v]);
            if (found[v] < 0 || a > most[v] || (a != a && most[v] == most[v])) {
              most[v] = a;
              found[v] = index_t(y) * s.W + x;
            }
          }
        }
      for (int v = 0; v < VEC; v++) {
        pooled[warp][lane * VEC + v] = image < 0 ? acc_t(NOT_A_NUMBER) : most[v];
        where[warp][lane * VEC + v] = found[v];
      }
      __syncthreads();  // the tile is there
      for (int i = threadIdx.x; i < WARPS * TILE; i += THREADS) {
        const int from = i % WARPS, channel = i / WARPS;
        if (place[from] < 0 || c0 + channel >= s.C) continue;
        const index_t to = place[from] + (c0 + channel) * bins;
        if (output != nullptr) output[to] = scalar_t(pooled[from][channel]);
        if (argmax != nullptr) argmax[to] = where[from][channel];
      }
      __syncthreads();  // the tile is used up
    }
  }
}

// grad_input[argmax] += g. A thread owns an element of grad_output. An argmax that is no pixel's adds nothing.
KERNEL(maximum_gradient, THREADS)
(const scalar_t* __restrict__ grad_output,  // [R, C, PH, PW] by strides
 const void* __restrict__ rois,             // [R, 5] by strides
 const index_t* __restrict__ argmax,        // [R, C, PH, PW] by strides
 acc_t* __restrict__ grad_input,            // [images, C, 1, H, W] by strides, holding sums so far
 const roi_t s) {
  const index_t count = s.R * s.C * s.PH * s.PW;
  for (index_t i = index_t(blockIdx.x) * THREADS + threadIdx.x; i < count; i += index_t(gridDim.x) * THREADS) {
    const index_t pw = i % s.PW, ph = i / s.PW % s.PH, c = i / s.PW / s.PH % s.C, r = i / s.PW / s.PH / s.C;
    const int image = image_of(s, rois, r);
    const index_t pixel = argmax[r * s.argmax_r + c * s.argmax_c + ph * s.argmax_y + pw * s.argmax_x];
    if (!in_chunk(s, image) || pixel < 0 || pixel >= index_t(s.H) * s.W) continue;
    const acc_t g = acc_t(grad_output[r * s.pooled_r + c * s.pooled_c + ph * s.pooled_y + pw * s.pooled_x]);
    // atomic: bins overlap, and may have their maximum in common
    atomicAdd(grad_input + ((image - s.first_image) * s.grad_n + c * s.grad_c + pixel / s.W * s.grad_y + pixel % s.W * s.grad_x), g);
  }
}
