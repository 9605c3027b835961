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
  SHARED(held_t, helds, [WARPS]);
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
    held_t& held = helds[warp];
    const lists_t &rows = held.lists[ROWS], &columns = held.lists[COLUMNS];
    if (reads) find_sides(s, rois, offset, b, held);
    const bool nan = image < 0 || (reads && (held.sides[ROWS].nan || held.sides[COLUMNS].nan));
    if (lane == 0) place[warp] = writes ? (b.r * s.C + index_t(b.cls) * each) * bins + b.ph * s.PW + b.pw : NOWHERE;
    listed_t listed = {0, 0, 1, 1};
    for (int c0 = 0; c0 < each; c0 += TILE) {
      const int c = c0 + lane * VEC;
      acc_t sum[VEC] = {};
      if (reads) {
        over_windows(s, false, c0 == 0, held, listed, [&] {
          for (int i = 0; c < each && i < listed.rows; i++) {
            acc_t row[VEC] = {};
            for (int j = 0; j < listed.columns; j++) {
              const vec<scalar_t, VEC> x = load<VEC>(input + (at + rows.line[i] * s.input_y +
                                                              columns.line[j] * s.input_x + c * s.input_c));
              for (int v = 0; v < VEC; v++) row[v] += columns.weight[j] * acc_t(x.v[v]);
            }
            for (int v = 0; v < VEC; v++) sum[v] += rows.weight[i] * row[v];
          }
        });
      }
      const acc_t number = divisor(listed.rows_in_all, listed.columns_in_all);
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
KERNEL(spread, THREADS)
(const scalar_t* __restrict__ grad_output,  // [R, C, PH, PW] by strides
 const void* __restrict__ rois,             // [R, 5] by strides
 const void* __restrict__ offset,           // [R, 2*classes, part_h, part_w] by strides, or null
 const void* __restrict__ mask,             // [R, PH, PW] by strides, or null
 acc_t* __restrict__ grad_input,            // [images, C, maps, H, W] by strides, holding sums so far
 const roi_t s) {
  SHARED(held_t, helds, [WARPS]);
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
    held_t& held = helds[warp];
    const lists_t &rows = held.lists[ROWS], &columns = held.lists[COLUMNS];
    if (adds) find_sides(s, rois, offset, b, held);
    if (lane == 0) place[warp] = adds ? pooled_at(s, b) : NOWHERE;
    listed_t listed = {0, 0, 1, 1};
    for (int c0 = 0; c0 < each; c0 += TILE) {
      __syncthreads();  // the places are there, the last tile is used up
      over_tile(place, each - c0, [&](int to, int channel, index_t from) {
        pooled[to][channel] = acc_t(grad_output[from + (c0 + channel) * s.pooled_c]);
      });
      __syncthreads();  // the tile is there
      const int c = c0 + lane * VEC;
      if (!adds) continue;
      over_windows(s, false, c0 == 0, held, listed, [&] {
        const acc_t number = divisor(listed.rows_in_all, listed.columns_in_all);
        acc_t g[VEC];
        for (int v = 0; v < VEC; v++) g[v] = c < each ? pooled[warp][lane * VEC + v] / number * m : acc_t(0);
        for (int i = 0; c < each && i < listed.rows; i++)
          for (int j = 0; j < listed.columns; j++) {
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

#define TALL 4      // a block's pixels: one a lane
#define WIDE 8
#define DEEP 4      // channels of a thread
#define HITS 16     // bins at a time

// The same sums without atomics, also of the gradient of a maximum (then `argmax` is given, and a bin adds to that pixel
// alone): a block owns TALL x WIDE pixels of some channels and looks for the bins that touch them. The order of every sum
// is that of the bins' numbers, so the result is bitwise repeatable.
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
