// grad_input without atomics: samples are sorted by the cell they lie in, then each pixel sums over its four cells.
// The order of every sum is that of the samples' numbers, so the result is bitwise repeatable.
#include "common.cuh"
#include "taps.cuh"

#define THREADS 256

__device__ __forceinline__ index_t cells_of(const conv_t& s) {
  return index_t(s.images) * s.OG * (s.H + 1) * (s.W + 1);
}

// keys[sample]: the cell it lies in, numbered [image, og, y + 1, x + 1] (a cell may begin at -1); past the last cell
// if it reads no pixel.
KERNEL(cells, THREADS)
(const offset_t* __restrict__ offset,  // [images, 2*OG*KH*KW, OH, OW] by strides
 index_t* __restrict__ keys,           // [images*pixels, KH*KW, OG]
 const conv_t s) {
  const int slots = s.KH * s.KW * s.OG;
  const index_t samples = index_t(s.images) * s.pixels * slots;
  for (index_t i = index_t(blockIdx.x) * THREADS + threadIdx.x; i < samples; i += index_t(gridDim.x) * THREADS) {
    const sample_t sample = sample_of(s, int(i / slots), int(i % slots));
    const corners_t at = corners_of(s, offset, sample);
    const index_t cell =
        ((index_t(sample.image) * s.OG + sample.og) * (s.H + 1) + at.y + 1) * (s.W + 1) + at.x + 1;
    keys[i] = at.value ? cell : cells_of(s);
  }
}

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
(const offset_t* __restrict__ offset,   // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,       // [images, OG*KH*KW, OH, OW] by strides, or null
 const index_t* __restrict__ starts,    // [images*OG*(H+1)*(W+1) + 1]
 const index_t* __restrict__ samples,   // sorted by cell
 const grad_t* __restrict__ grad,       // dL/dx(p): columns [images*pixels, groups, KH*KW, C/groups], or, with
                                        // PLANES, one tap's [images, C, pixels]
 acc_t* __restrict__ grad_input,        // [images, C, H, W] by strides, holding sums so far
 const conv_t s) {
  const int slots = s.KH * s.KW * s.OG, vectors = s.C / s.OG / VEC, lane = threadIdx.x % s.lanes;
  const index_t pixels = index_t(s.images) * s.OG * s.H * s.W, teams = index_t(gridDim.x) * (THREADS / s.lanes);
  for (index_t i = (index_t(blockIdx.x) * THREADS + threadIdx.x) / s.lanes; i < pixels; i += teams) {
    const int x = int(i % s.W), y = int(i / s.W % s.H), og = int(i / s.W / s.H % s.OG);
    const int image = int(i / s.W / s.H / s.OG);
    for (int vector = lane; vector < vectors; vector += s.lanes) {
      const int c = og * (s.C / s.OG) + vector * VEC;
      acc_t sum[VEC];
      for (int v = 0; v < VEC; v++) sum[v] = 0;
      for (int q = 0; q < 4; q++) {  // the pixel is corner q of the cell at (y - q/2, x - q%2)
        const index_t cell =
            ((index_t(image) * s.OG + og) * (s.H + 1) + y - q / 2 + 1) * (s.W + 1) + x - q % 2 + 1;
        for (index_t j = starts[cell]; j < starts[cell + 1]; j++) {
          const int tile_pixel = int(samples[j] / slots);
          const sample_t sample = sample_of(s, tile_pixel, int(samples[j] % slots));
          const corners_t at = corners_of(s, offset, sample);
          const acc_t m = modulation_of(s, mask, sample), weight = corner_weight(at.ly, at.lx, q);
#if PLANES
          sum[0] += weight * (m * acc_t(grad[(index_t(image) * s.C + c) * s.pixels + sample.pixel - s.first_pixel]));
#else
          acc_t g[VEC];
          load_accumulators<VEC>(grad + column_at(s, tile_pixel, sample.k, c), g);
          for (int v = 0; v < VEC; v++) sum[v] += weight * (m * g[v]);
#endif
        }
      }
      acc_t* const to = grad_input + (image * s.grad_n + y * s.grad_y + x * s.grad_x + c * s.grad_c);
      for (int v = 0; v < VEC; v++) to[v] += sum[v];  // VEC > 1: channels are adjacent
    }
  }
}
