// The gradient of the map without atomics, for all RoI operators: what `scatter` of roi_mean.cu and `maximum_gradient` of
// roi_pool.cu add in no fixed order.
#include "common.cuh"
#include "bins.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define TALL 4      // a block's pixels: one a lane
#define WIDE 8
#define DEEP 4      // channels of a thread
#define HITS 16     // bins at a time

// grad_input[q] += sum over the bins that touch q of wy wx g m / n, or, with argmax, of g where that is q.
// A block owns TALL x WIDE pixels of DEEP * WARPS channels and looks for the bins that touch them. The order of every
// sum is that of the bins' numbers, so the result is bitwise repeatable.
KERNEL(collect, THREADS)
(const scalar_t* __restrict__ grad_output,  // [R, C, PH, PW] by strides
 const void* __restrict__ rois,             // [R, 5] by strides
 const void* __restrict__ offset,           // [R, 2*classes, part_h, part_w] by strides, or null
 const void* __restrict__ mask,             // [R, PH, PW] by strides, or null
 const index_t* __restrict__ argmax,        // [R, C, PH, PW] by strides, or null: means
 acc_t* __restrict__ grad_input,            // [images, C, maps, H, W] by strides, holding sums so far
 const roi_t s) {
  SHARED(int, found, [WARPS]);                          // how many bins each warp has found
  SHARED(bin_t, hits, [THREADS]);                       // their bins, in the order of their numbers
  SHARED(acc_t, weight, [HITS][TALL + WIDE]);           // of the block's rows and columns; -1: not touched
  SHARED(acc_t, in_all, [HITS][TALL + WIDE]);           // what the mean is taken over, along the line's axis
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = s.C / s.classes, maps = s.maps_h * s.maps_w;
  const int down = (s.H + TALL - 1) / TALL, across = (s.W + WIDE - 1) / WIDE;
  const int slices = (each + DEEP * WARPS - 1) / (DEEP * WARPS);
  const index_t bins = index_t(s.PH) * s.PW, candidates = s.R * bins;
  const index_t parts = index_t(s.images) * maps * s.classes * slices * down * across;
  for (index_t part = blockIdx.x; part < parts; part += gridDim.x) {
    const int x0 = int(part % across) * WIDE, y0 = int(part / across % down) * TALL;
    const index_t plane = part / across / down;
    const int c0 = int(plane % slices) * DEEP * WARPS + warp, cls = int(plane / slices % s.classes);
    const int map = int(plane / slices / s.classes % maps), image = int(plane / slices / s.classes / maps);
    const int y = y0 + lane / WIDE, x = x0 + lane % WIDE;
    acc_t sum[DEEP] = {};
    for (index_t first = 0; first < candidates; first += THREADS) {
      const index_t candidate = first + threadIdx.x, r = candidate / bins;
      const bin_t b = {r, cls, int((candidate - r * bins) / s.PW), int((candidate - r * bins) % s.PW)};
      bool hit = candidate < candidates && map_of(s, b) == map && image_of(s, rois, r) == s.first_image + image;
#pragma unroll 1
      for (int axis = ROWS; hit && axis <= COLUMNS; axis++) {
        const side_t a = side_of(s, rois, offset, b, axis);
        hit = axis == ROWS ? a.first < y0 + TALL && a.last > y0 : a.first < x0 + WIDE && a.last > x0;
      }
      const unsigned hitting = __ballot_sync(0xffffffffu, hit);
      if (lane == 0) found[warp] = __popc(hitting);
      __syncthreads();  // all warps have counted
      int total = 0, before = __popc(hitting & ((1u << lane) - 1));
      for (int w = 0; w < WARPS; w++) {
        before += w < warp ? found[w] : 0;
        total += found[w];
      }
      if (hit) hits[before] = b;
      __syncthreads();  // all bins are listed
      for (int some = 0; some < total; some += HITS) {
        const int nth = threadIdx.x / (THREADS / HITS), line = threadIdx.x % (THREADS / HITS);
        if (some + nth < total && line < TALL + WIDE) {
          const int axis = line < TALL ? ROWS : COLUMNS, at = axis == ROWS ? y0 + line : x0 + line - TALL;
          const side_t a = side_of(s, rois, offset, hits[some + nth], axis);
          const line_t taken = line_of(s, a, at, axis == ROWS ? s.H : s.W, in_all[nth][line]);
          weight[nth][line] = taken.counts ? taken.weight : acc_t(-1);
        }
        __syncthreads();  // all weights are there
        for (int k = 0; k < HITS && some + k < total; k++) {
          const acc_t wy = weight[k][lane / WIDE], wx = weight[k][TALL + lane % WIDE];
          if (wy < 0 || wx < 0 || y >= s.H || x >= s.W) continue;
          const bin_t own = hits[some + k];
          const acc_t number = argmax == nullptr ? divisor(in_all[k][0], in_all[k][TALL]) : acc_t(1);
          const acc_t m = modulation_of(s, mask, own);
          const index_t from = pooled_at(s, own);
          for (int i = 0; i < DEEP; i++) {
            const index_t c = c0 + i * WARPS;
            if (c >= each) break;
            if (argmax != nullptr && argmax[own.r * s.argmax_r + c * s.argmax_c + own.ph * s.argmax_y +
                                            own.pw * s.argmax_x] != index_t(y) * s.W + x)
              continue;
            sum[i] += wy * wx * (acc_t(grad_output[from + c * s.pooled_c]) / number * m);
          }
        }
        __syncthreads();  // the weights are used up
      }
    }
    for (int i = 0; i < DEEP; i++) {
      const index_t c = c0 + i * WARPS;
      if (c < each && y < s.H && x < s.W)
        grad_input[image * s.grad_n + (index_t(cls) * each + c) * s.grad_c + map * s.grad_m + y * s.grad_y +
                   x * s.grad_x] += sum[i];
    }
  }
}
