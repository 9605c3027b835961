// The gradients of offsets (or translations) and masks of deformable RoI pooling. The pooling itself and the gradient of
// the map: roi_mean.cu.
//
//   grad_offset = sum over the bins of its part, over c:  d shift / d offset  m g / n  sum_ij sy_i wx_j x_ij
//   grad_mask   = sum over c:  g / n  sum_ij wy_i wx_j x_ij          (s: slope, the right-hand derivative of a weight)
//
// A warp owns a part of a RoI (of a class), which is one bin or several, and shares out its channels: it alone writes
// its gradients, in a fixed order.
#include "common.cuh"
#include "bins.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)

__device__ __forceinline__ void write(void* array, index_t at, acc_t value, int wide) {
  if (wide)
    static_cast<acc_t*>(array)[at] = value;
  else
    static_cast<scalar_t*>(array)[at] = scalar_t(value);
}

KERNEL(offset_gradients, THREADS)
(const scalar_t* __restrict__ grad_output,  // [R, C, PH, PW] by strides
 const scalar_t* __restrict__ input,        // [images, C, maps, H, W] by strides
 const void* __restrict__ rois,             // [R, 5] by strides
 const void* __restrict__ offset,           // [R, 2*classes, part_h, part_w] by strides, or null
 const void* __restrict__ mask,             // [R, PH, PW] by strides, or null; given: the parts are the bins
 void* __restrict__ grad_offset,            // [R, 2*classes, part_h, part_w]; null: not wanted
 void* __restrict__ grad_mask,              // [R, PH, PW]; null: not wanted
 const roi_t s) {
  SHARED(warp_bin_t, warp_bins, [WARPS]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = s.C / s.classes;
  const index_t parts = index_t(s.part_h) * s.part_w, units = s.R * s.classes * parts;
  warp_bin_t& own = warp_bins[warp];
  const lists_t &rows = own.lists[ROWS], &columns = own.lists[COLUMNS];
  for (index_t unit = index_t(blockIdx.x) * WARPS + warp; unit < units; unit += index_t(gridDim.x) * WARPS) {
    const index_t row = unit / parts, part_y = (unit - row * parts) / s.part_w, part_x = (unit - row * parts) % s.part_w;
    bin_t b = {row / s.classes, int(row % s.classes), 0, 0};
    const int image = image_of(s, rois, b.r);
    if (image < 0 ? s.first_image != 0 : !in_chunk(s, image)) continue;
    acc_t grad_y = 0, grad_x = 0, grad_m = 0;
    // the bins whose floor(ph * part_h / PH) is part_y
    const int ph0 = int((part_y * s.PH + s.part_h - 1) / s.part_h), pw0 = int((part_x * s.PW + s.part_w - 1) / s.part_w);
    for (b.ph = ph0; image >= 0 && b.ph < s.PH && index_t(b.ph) * s.part_h / s.PH == part_y; b.ph++)
      for (b.pw = pw0; b.pw < s.PW && index_t(b.pw) * s.part_w / s.PW == part_x; b.pw++) {
        find_sides(s, rois, offset, b, own);
        if (own.sides[ROWS].nan || own.sides[COLUMNS].nan) grad_y = grad_x = grad_m = acc_t(NOT_A_NUMBER);
        const index_t to = pooled_at(s, b), at = index_t(image - s.first_image) * s.input_n + map_of(s, b) * s.input_m +
                                                 index_t(b.cls) * each * s.input_c;
        acc_t sum_y = 0, sum_x = 0, sum_value = 0;
        window_t window = {0, 0, 1, 1};
        over_windows(s, true, true, own, window, [&] {
          for (int c = lane * VEC; c < each; c += 32 * VEC) {
            acc_t g[VEC];
            for (int v = 0; v < VEC; v++) g[v] = acc_t(grad_output[to + (c + v) * s.pooled_c]);
            for (int i = 0; i < window.rows; i++) {
              acc_t value = 0, slope = 0;  // of the row, by its columns' weights and slopes
              for (int j = 0; j < window.columns; j++) {
                const vec<scalar_t, VEC> x =
                    load<VEC>(input + (at + rows.line[i] * s.input_y + columns.line[j] * s.input_x + c * s.input_c));
                acc_t dot = 0;
                for (int v = 0; v < VEC; v++) dot += g[v] * acc_t(x.v[v]);
                value += columns.weight[j] * dot;
                slope += columns.slope[j] * dot;
              }
              sum_value += rows.weight[i] * value;
              sum_y += rows.slope[i] * value;
              sum_x += rows.weight[i] * slope;
            }
          }
        });
        const acc_t number = divisor(window.rows_in_all, window.columns_in_all), m = modulation_of(s, mask, b);
        grad_y += sum_y / number * m * own.sides[ROWS].reach;
        grad_x += sum_x / number * m * own.sides[COLUMNS].reach;
        grad_m += sum_value / number;
      }
    grad_y = sum_over_lanes(grad_y, 32);
    grad_x = sum_over_lanes(grad_x, 32);
    grad_m = sum_over_lanes(grad_m, 32);
    if (lane == 0 && grad_offset != nullptr) {
      const index_t x_at = (b.r * 2 * s.classes + 2 * b.cls) * parts + part_y * s.part_w + part_x;
      write(grad_offset, x_at, grad_x, s.wide_offset);
      write(grad_offset, x_at + parts, grad_y, s.wide_offset);
    }
    if (lane == 0 && grad_mask != nullptr) write(grad_mask, unit, grad_m, s.wide_mask);
  }
}
