// Means over the bins of regions of interest, and the gradient of the map: every RoI operator but the maximum.
//
//   y[r, c, ph, pw] = m sum_ij wy_i wx_j x[image, map, c, row_i, column_j] / n          (Eq. 5, 6; see bins.cuh)
//
// A warp owns a bin of a RoI (of a class) and takes its channels 32 * VEC at a time, so a bin's rows, columns and
// weights are found once. Maps are read channels-last, copied so beforehand, which the bins of some RoIs together repay:
// lanes then load neighbouring elements. Position-sensitive maps are copied as [y, x, map, channel], for the same reason:
// in the planes neighbours of a bin's map stand maps_h * maps_w planes apart. Where there is no memory for the copy, VEC
// is 1 and lanes read from the caller's planes, each walking along its own rows. The pooled values stand bins * elements
// apart, so WARPS neighbouring bins are turned in shared memory and written by runs of WARPS.
#include "common.cuh"
#include "bins.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define TILE (32 * VEC)  // channels at a time
#define NOWHERE (index_t(1) << 63)

// Copies a tile between pooled[warp][channel] and the elements of the block's units. No two units share an element.
template <typename Copy>
__device__ __forceinline__ void over_tile(const index_t* place, int channels, Copy copy) {
  for (int i = threadIdx.x; i < WARPS * TILE; i += THREADS) {
    const int warp = i % WARPS, c = i / WARPS;
    if (place[warp] != NOWHERE && c < channels) copy(warp, c, place[warp]);
  }
}

// The mean of every bin. No two threads write the same element.
KERNEL(mean, THREADS)
(const scalar_t* __restrict__ input,  // [images, C, maps, H, W] by strides
 const void* __restrict__ rois,       // [R, 5] by strides
 const void* __restrict__ offset,     // [R, 2*classes, part_h, part_w] by strides, or null: no shift
 const void* __restrict__ mask,       // [R, PH, PW] by strides, or null: all ones
 scalar_t* __restrict__ output,       // [R, C, PH, PW]
 const roi_t s) {
  SHARED(warp_bin_t, warp_bins, [WARPS]);
  SHARED(acc_t, pooled, [WARPS][TILE + 1]);
  SHARED(index_t, place, [WARPS]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = s.C / s.classes;
  const index_t bins = index_t(s.PH) * s.PW, units = s.R * s.classes * bins;
  for (index_t first = index_t(blockIdx.x) * WARPS; first < units; first += index_t(gridDim.x) * WARPS) {
    const bool mine = first + warp < units;
    const bin_t b = bin_of(s, mine ? first + warp : first);
    const int image = image_of(s, rois, b.r);
    const bool reads = mine && in_chunk(s, image), writes = reads || (mine && image < 0 && s.first_image == 0);
    const index_t at = index_t(image - s.first_image) * s.input_n + map_of(s, b) * s.input_m +
                       index_t(b.cls) * each * s.input_c;
    const acc_t m = modulation_of(s, mask, b);
    warp_bin_t& own = warp_bins[warp];
    const lists_t &rows = own.lists[ROWS], &columns = own.lists[COLUMNS];
    if (reads) find_sides(s, rois, offset, b, own);
    const bool nan = image < 0 || (reads && (own.sides[ROWS].nan || own.sides[COLUMNS].nan));
    if (lane == 0) place[warp] = writes ? (b.r * s.C + index_t(b.cls) * each) * bins + b.ph * s.PW + b.pw : NOWHERE;
    window_t window = {0, 0, 1, 1};
    for (int c0 = 0; c0 < each; c0 += TILE) {
      const int c = c0 + lane * VEC;
      acc_t sum[VEC] = {};
      if (reads) {
        over_windows(s, false, c0 == 0, own, window, [&] {
          for (int i = 0; c < each && i < window.rows; i++) {
            acc_t row[VEC] = {};
            for (int j = 0; j < window.columns; j++) {
              const vec<scalar_t, VEC> x = load<VEC>(input + (at + rows.line[i] * s.input_y +
                                                              columns.line[j] * s.input_x + c * s.input_c));
              for (int v = 0; v < VEC; v++) row[v] += columns.weight[j] * acc_t(x.v[v]);
            }
            for (int v = 0; v < VEC; v++) sum[v] += rows.weight[i] * row[v];
          }
        });
      }
      const acc_t number = divisor(window.rows_in_all, window.columns_in_all);
      for (int v = 0; v < VEC; v++)
        pooled[warp][lane * VEC + v] = nan ? acc_t(NOT_A_NUMBER) : sum[v] / number * m;
      __syncthreads();  // the tile is there
      over_tile(place, each - c0, [&](int from, int channel, index_t to) {
        output[to + (c0 + channel) * bins] = scalar_t(pooled[from][channel]);
      });
      __syncthreads();  // the tile is used up
    }
  }
}

// grad_input[q] += wy wx g m / n for the pixels of every bin: the transpose of `mean`.
KERNEL(scatter, THREADS)
(const scalar_t* __restrict__ grad_output,  // [R, C, PH, PW] by strides
 const void* __restrict__ rois,             // [R, 5] by strides
 const void* __restrict__ offset,           // [R, 2*classes, part_h, part_w] by strides, or null
 const void* __restrict__ mask,             // [R, PH, PW] by strides, or null
 acc_t* __restrict__ grad_input,            // [images, C, maps, H, W] by strides, holding sums so far
 const roi_t s) {
  SHARED(warp_bin_t, warp_bins, [WARPS]);
  SHARED(acc_t, pooled, [WARPS][TILE + 1]);
  SHARED(index_t, place, [WARPS]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = s.C / s.classes;
  const index_t units = s.R * s.classes * s.PH * s.PW;
  for (index_t first = index_t(blockIdx.x) * WARPS; first < units; first += index_t(gridDim.x) * WARPS) {
    const bool mine = first + warp < units;
    const bin_t b = bin_of(s, mine ? first + warp : first);
    const int image = image_of(s, rois, b.r);
    const bool adds = mine && in_chunk(s, image);
    const index_t at = index_t(image - s.first_image) * s.grad_n + map_of(s, b) * s.grad_m +
                       index_t(b.cls) * each * s.grad_c;
    const acc_t m = modulation_of(s, mask, b);
    warp_bin_t& own = warp_bins[warp];
    const lists_t &rows = own.lists[ROWS], &columns = own.lists[COLUMNS];
    if (adds) find_sides(s, rois, offset, b, own);
    if (lane == 0) place[warp] = adds ? pooled_at(s, b) : NOWHERE;
    window_t window = {0, 0, 1, 1};
    for (int c0 = 0; c0 < each; c0 += TILE) {
      __syncthreads();  // the places are there, the last tile is used up
      over_tile(place, each - c0, [&](int to, int channel, index_t from) {
        pooled[to][channel] = acc_t(grad_output[from + (c0 + channel) * s.pooled_c]);
      });
      __syncthreads();  // the tile is there
      const int c = c0 + lane * VEC;
      if (!adds) continue;
      over_windows(s, false, c0 == 0, own, window, [&] {
        const acc_t number = divisor(window.rows_in_all, window.columns_in_all);
        acc_t g[VEC];
        for (int v = 0; v < VEC; v++) g[v] = c < each ? pooled[warp][lane * VEC + v] / number * m : acc_t(0);
        for (int i = 0; c < each && i < window.rows; i++)
          for (int j = 0; j < window.columns; j++) {
            const acc_t weight = rows.weight[i] * columns.weight[j];
            acc_t added[VEC];
            for (int v = 0; v < VEC; v++) added[v] = weight * g[v];
            // atomic: bins overlap, of one RoI and of others
            atomic_add<VEC>(grad_input + (at + rows.line[i] * s.grad_y + columns.line[j] * s.grad_x +
                                          c * s.grad_c), added);
          }
      });
    }
    __syncthreads();  // the places are used up
  }
}
