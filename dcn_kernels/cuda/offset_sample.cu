// The feature map resampled at each pixel plus its offset. Threads run along the pixels of a plane, so that writes,
// and with smooth offsets reads, are of neighbouring elements in the planes as the caller holds them.
#include "common.cuh"
#include "taps.cuh"  // a 1 x 1 tap: H = OH, W = OW

#define THREADS 256

// Blocks are `lanes` channel slices of THREADS / lanes pixels; a slice takes every lanes-th channel of its offset
// group, and finds the sample's corners once for all of them.
struct place_t {
  int slice, n, og, pixel;
  bool mine;
};

__device__ __forceinline__ place_t place_of(const conv_t& s, index_t part, int across) {
  const int width = THREADS / s.lanes, pixel = int(part % across) * width + threadIdx.x % width;
  const index_t plane = part / across;
  return {int(threadIdx.x) / width, int(plane / s.OG), int(plane % s.OG), pixel, pixel < s.pixels};
}

__device__ __forceinline__ void load_corners(acc_t (&x)[4], const scalar_t* input, index_t cell, unsigned inside,
                                             const conv_t& s) {
#pragma unroll
  for (int q = 0; q < 4; q++)
    x[q] = inside >> q & 1 ? acc_t(input[cell + q / 2 * s.input_y + q % 2 * s.input_x]) : acc_t(0);
}

// output_c(p) = x_c(p + dp_g(p)). No two threads write the same element.
KERNEL(resample, THREADS)
(const scalar_t* __restrict__ input,   // [images, C, H, W] by strides
 const offset_t* __restrict__ offset,  // [images, 2*OG, H, W] by strides
 scalar_t* __restrict__ output,        // [images, C, H, W]
 const conv_t s) {
  const int across = (s.pixels + THREADS / s.lanes - 1) / (THREADS / s.lanes), channels = s.C / s.OG;
  for (index_t part = blockIdx.x; part < index_t(s.images) * s.OG * across; part += gridDim.x) {
    const place_t place = place_of(s, part, across);
    if (!place.mine) continue;
    const corners_t at = corners_of(s, offset, {place.n, place.pixel, 0, place.og});
    const unsigned inside = at.value ? at.inside() : 0;
    for (int c = place.og * channels + place.slice; c < (place.og + 1) * channels; c += s.lanes) {
      acc_t x[4], sum = at.nan ? acc_t(NOT_A_NUMBER) : acc_t(0);
      load_corners(x, input, place.n * s.input_n + c * s.input_c + at.y * s.input_y + at.x * s.input_x, inside, s);
#pragma unroll
      for (int q = 0; q < 4; q++)
        if (inside >> q & 1) sum += corner_weight(at.ly, at.lx, q) * x[q];
      output[(index_t(place.n) * s.C + c) * s.pixels + place.pixel] = scalar_t(sum);
    }
  }
}

// grad_input[q] += G(q, p) g,   grad_offset = sum_c g_c dx_c(p)/dp.
// The `lanes` slices of a pixel add up their sums through shared memory; the first writes grad_offset.
KERNEL(resample_gradients, THREADS)
(const scalar_t* __restrict__ grad_output,  // [images, C, H, W] by strides
 const scalar_t* __restrict__ input,        // [images, C, H, W] by strides; not read if only grad_input is wanted
 const offset_t* __restrict__ offset,       // [images, 2*OG, H, W] by strides
 acc_t* __restrict__ grad_input,            // [images, C, H, W] by strides, holding sums so far; null: not wanted
 offset_t* __restrict__ grad_offset,        // [images, 2*OG, H, W]; null: not wanted
 const index_t grad_output_n, const index_t grad_output_c, const index_t grad_output_y, const index_t grad_output_x,
 const conv_t s) {
  SHARED(acc_t, slices_y, [THREADS]);
  SHARED(acc_t, slices_x, [THREADS]);
  const int width = THREADS / s.lanes, across = (s.pixels + width - 1) / width, channels = s.C / s.OG;
  for (index_t part = blockIdx.x; part < index_t(s.images) * s.OG * across; part += gridDim.x) {
    const place_t place = place_of(s, part, across);
    acc_t sum_y = 0, sum_x = 0;
    if (place.mine) {
      const corners_t at = corners_of(s, offset, {place.n, place.pixel, 0, place.og});
      const unsigned inside = at.inside();
      if (at.nan) sum_y = sum_x = acc_t(NOT_A_NUMBER);
      for (int c = place.og * channels + place.slice; c < (place.og + 1) * channels; c += s.lanes) {
        const acc_t g = acc_t(grad_output[place.n * grad_output_n + c * grad_output_c +
                                          place.pixel / s.W * grad_output_y + place.pixel % s.W * grad_output_x]);
        if (grad_offset != nullptr) {
          acc_t x[4];
          load_corners(x, input, place.n * s.input_n + c * s.input_c + at.y * s.input_y + at.x * s.input_x, inside, s);
          // 0 times a g that is not finite is NaN; a pixel that the rule does not read is not multiplied
          sum_y += g * (at.moves_y ? (1 - at.lx) * (x[2] - x[0]) + at.lx * (x[3] - x[1]) : acc_t(0));
          sum_x += g * (at.moves_x ? (1 - at.ly) * (x[1] - x[0]) + at.ly * (x[3] - x[2]) : acc_t(0));
        }
        if (grad_input != nullptr) {
          acc_t* const to = grad_input + (place.n * s.grad_n + c * s.grad_c + at.y * s.grad_y + at.x * s.grad_x);
#pragma unroll
          for (int q = 0; q < 4; q++)  // atomic: the cells of other pixels touch this one
            if (inside >> q & 1) atomicAdd(to + (q / 2 * s.grad_y + q % 2 * s.grad_x), corner_weight(at.ly, at.lx, q) * g);
        }
      }
    }
    slices_y[threadIdx.x] = sum_y;
    slices_x[threadIdx.x] = sum_x;
    __syncthreads();  // the sums of all slices are there
    if (place.mine && place.slice == 0 && grad_offset != nullptr) {
      for (int slice = 1; slice < s.lanes; slice++) {
        sum_y += slices_y[slice * width + threadIdx.x];
        sum_x += slices_x[slice * width + threadIdx.x];
      }
      const index_t to = (index_t(place.n) * 2 * s.OG + 2 * place.og) * s.pixels + place.pixel;
      grad_offset[to] = offset_t(sum_y);
      grad_offset[to + s.pixels] = offset_t(sum_x);
    }
    __syncthreads();  // the sums are used up
  }
}
