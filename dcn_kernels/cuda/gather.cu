// grad_input without atomics: samples are sorted by the cell they lie in, then each pixel sums over its four cells.
// The order of every sum is that of the samples' numbers, so the result is bitwise repeatable. The samples come from
// cells.cu, sorted by sort.cu. Needs acc_t and grad_t.
#include "common.cuh"
#include "tile.cuh"

#define THREADS 256

// starts[cell]: how many sorted keys are smaller, so that the cell's samples are [starts[cell], starts[cell + 1]).
KERNEL(cell_starts, THREADS)
(const index_t* __restrict__ keys,  // [count], sorted
 index_t* __restrict__ starts,      // [cells + 1]
 const index_t count, const index_t cells) {
  for (index_t cell = index_t(blockIdx.x) * THREADS + threadIdx.x; cell <= cells;
       cell += index_t(gridDim.x) * THREADS) {
    index_t low = 0, high = count;  // the first key that is not smaller lies in [low, high]
    while (low < high) {
      const index_t middle = (low + high) / 2;
      if (keys[middle] < cell)
        low = middle + 1;
      else
        high = middle;
    }
    starts[cell] = low;
  }
}

// grad_input[q] += sum over the samples p of q's four cells of m G(q, p) dL/dx(p).
// `lanes` threads own one pixel of one offset group and all its channels: nobody else writes them.
KERNEL(gather, THREADS)
(const index_t* __restrict__ starts,   // [images*OG*(H+1)*(W+1) + 1]
 const int* __restrict__ samples,      // [images*pixels*KH*KW*OG], sorted by cell
 const acc_t* __restrict__ placed,     // [images*pixels, KH*KW, OG, 3]: ly, lx and m of each sample
 const grad_t* __restrict__ grad,      // dL/dx(p): columns [images*pixels, groups, KH*KW, C/groups], or, with
                                       // PLANES, one tap's [images, C, pixels]
 acc_t* __restrict__ grad_input,       // [images, C, H, W] by strides, holding sums so far
 const conv_t s) {
  const int slots = s.KH * s.KW * s.OG, vectors = s.C / s.OG / VEC, lane = threadIdx.x % s.lanes;
  const index_t owned = index_t(s.images) * s.OG * s.H * s.W, teams = index_t(gridDim.x) * (THREADS / s.lanes);
  for (index_t i = (index_t(blockIdx.x) * THREADS + threadIdx.x) / s.lanes; i < owned; i += teams) {
    const int plane = int(i / (index_t(s.H) * s.W)), pixel = int(i % (index_t(s.H) * s.W));
    const int image = plane / s.OG, og = plane % s.OG, y = pixel / s.W, x = pixel % s.W;
    for (int vector = lane; vector < vectors; vector += s.lanes) {
      const int c = og * (s.C / s.OG) + vector * VEC;
      acc_t sum[VEC];
      for (int v = 0; v < VEC; v++) sum[v] = 0;
      for (int q = 0; q < 4; q++) {  // the pixel is corner q of the cell at (y - q/2, x - q%2)
        const index_t cell = (index_t(plane) * (s.H + 1) + y - q / 2 + 1) * (s.W + 1) + x - q % 2 + 1;
        const index_t end = starts[cell + 1];
        for (index_t j = starts[cell]; j < end; j++) {
          const int sample = samples[j], tile_pixel = sample / slots, slot = sample % slots;
          const acc_t* const at = placed + 3 * index_t(sample);
          const acc_t ly = at[0], lx = at[1], m = at[2];
          const acc_t weight = (q / 2 ? ly : 1 - ly) * (q % 2 ? lx : 1 - lx);
#if PLANES
          sum[0] += weight * (m * acc_t(grad[(index_t(image) * s.C + c) * s.pixels + tile_pixel % s.pixels]));
#else
          acc_t g[VEC];
          load_accumulators<VEC>(grad + column_at(s, tile_pixel, slot / s.OG, c), g);
          for (int v = 0; v < VEC; v++) sum[v] += weight * (m * g[v]);
#endif
        }
      }
      acc_t* const to = grad_input + (image * s.grad_n + y * s.grad_y + x * s.grad_x + c * s.grad_c);
      for (int v = 0; v < VEC; v++) to[v] += sum[v];  // VEC > 1: channels are adjacent
    }
  }
}
