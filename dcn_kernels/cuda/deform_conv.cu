// Deformable convolution around two matrix products: sampled columns before (forward, grad_weight), and what is done
// with the gradient of the columns after (grad_input, grad_offset, grad_mask). VEC channels lie side by side in
// memory and share an offset group and a convolution group.
#include "common.cuh"
#include "taps.cuh"

#define THREADS 256
#define PIXELS 32            // a block's samples at a time: PIXELS pixels ...
#define SLOTS 8              // ... by SLOTS pairs of tap and offset group
#define SAMPLES (PIXELS * SLOTS)

// The first corner's element of every sample, before the channel is added.
__device__ __forceinline__ index_t cell_at(const corners_t& at, index_t image, index_t stride_n, index_t stride_y,
                                           index_t stride_x) {
  return image * stride_n + at.y * stride_y + at.x * stride_x;
}

__device__ __forceinline__ void load_corners(vec<scalar_t, VEC> (&pixel)[4], const scalar_t* input, index_t cell,
                                             unsigned inside, const conv_t& s) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    pixel[q] = vec<scalar_t, VEC>{};  // a corner outside counts as 0
    if (inside >> q & 1) pixel[q] = load<VEC>(input + (cell + q / 2 * s.input_y + q % 2 * s.input_x));
  }
}

// column[p0, c, k] = m_k(p0) x_c(p0 + p_n + dp_n): what Eq. 2 multiplies by the weight.
// First each thread finds the corners of one sample, then `lanes` neighbouring threads own a sample and its channels.
// No two threads write the same element.
KERNEL(columns, THREADS)
(const scalar_t* __restrict__ input,   // [images, C, H, W] by strides
 const offset_t* __restrict__ offset,  // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,      // [images, OG*KH*KW, OH, OW] by strides, or null: all ones
 scalar_t* __restrict__ column,        // [images*pixels, groups, KH*KW, C/groups]
 scalar_t* __restrict__ column_low,    // SPLIT: what the TF32 numbers of `column` leave; else null
 const conv_t s) {
  SHARED(index_t, cell, [SAMPLES]);
  SHARED(unsigned, inside, [SAMPLES]);
  SHARED(acc_t, weight, [4][SAMPLES]);
  SHARED(acc_t, modulation, [SAMPLES]);
  const int tile_pixels = s.images * s.pixels, slots = s.KH * s.KW * s.OG, vectors = s.C / s.OG / VEC;
  const int across = (slots + SLOTS - 1) / SLOTS, down = (tile_pixels + PIXELS - 1) / PIXELS;
  for (index_t part = blockIdx.x; part < index_t(across) * down; part += gridDim.x) {
    const int first_pixel = int(part / across) * PIXELS, first_slot = int(part % across) * SLOTS;
    {
      const int i = threadIdx.x, pixel = first_pixel + i % PIXELS, slot = first_slot + i / PIXELS;
      if (pixel < tile_pixels && slot < slots) {
        const sample_t sample = sample_of(s, pixel, slot);
        const corners_t at = corners_of(s, offset, sample);
        cell[i] = cell_at(at, sample.image, s.input_n, s.input_y, s.input_x);
        inside[i] = at.value ? at.inside() : 0;
        for (int q = 0; q < 4; q++) weight[q][i] = corner_weight(at.ly, at.lx, q);
        modulation[i] = at.nan ? acc_t(NOT_A_NUMBER) : modulation_of(s, mask, sample);
      }
    }
    __syncthreads();  // the corners of all samples are known
    for (int first = 0; first < SAMPLES; first += THREADS / s.lanes) {
      const int nth = first + threadIdx.x / s.lanes, slot = first_slot + nth % SLOTS, pixel = first_pixel + nth / SLOTS;
      if (pixel >= tile_pixels || slot >= slots) continue;
      const int i = nth % SLOTS * PIXELS + nth / SLOTS, og = slot % s.OG, k = slot / s.OG;
      const unsigned corners_inside = inside[i];
      for (int vector = threadIdx.x % s.lanes; vector < vectors; vector += s.lanes) {
        const int c = og * (s.C / s.OG) + vector * VEC;
        vec<scalar_t, VEC> corner[4], high, low;
        load_corners(corner, input, cell[i] + c * s.input_c, corners_inside, s);
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          acc_t sum = 0;
#pragma unroll
          for (int q = 0; q < 4; q++)
            if (corners_inside >> q & 1) sum += weight[q][i] * acc_t(corner[q].v[v]);
          sum *= modulation[i];
#if SPLIT
          tf32_split(sum, high.v[v], low.v[v]);
#else
          high.v[v] = scalar_t(sum);
#endif
        }
        const index_t to = column_at(s, pixel, k, c);
        store(column + to, high);
#if SPLIT
        store(column_low + to, low);
#endif
      }
    }
    __syncthreads();  // the corners are used up
  }
}

// From g = dL/dcolumn, Eq. 7 and the transposes of Eq. 2:
//   grad_input[q] += m G(q, p) g,   grad_offset = m sum_c g_c dx_c(p)/dp,   grad_mask = sum_c g_c x_c(p)
// `lanes` threads own one sample and all its channels: they alone write its grad_offset and grad_mask. grad_input is
// shared with every sample whose cell touches the pixel.
KERNEL(gradients, THREADS)
(const scalar_t* __restrict__ input,      // [images, C, H, W] by strides; not read if only grad_input is wanted
 const offset_t* __restrict__ offset,     // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,         // [images, OG*KH*KW, OH, OW] by strides, or null
 const acc_t* __restrict__ grad_column,   // [images*pixels, groups, KH*KW, C/groups]
 acc_t* __restrict__ grad_input,          // [images, C, H, W] by strides, holding sums so far; null: not wanted
 offset_t* __restrict__ grad_offset,      // [images, 2*OG*KH*KW, OH, OW]; null: not wanted
 mask_t* __restrict__ grad_mask,          // [images, OG*KH*KW, OH, OW]; null: not wanted
 const conv_t s) {
  SHARED(index_t, cell, [SAMPLES]);
  SHARED(index_t, grad_cell, [SAMPLES]);
  SHARED(unsigned, inside, [SAMPLES]);  // and, above the four corners' bits, VALUE, MOVES_Y, MOVES_X, NAN
  SHARED(acc_t, part_y, [SAMPLES]);     // ly
  SHARED(acc_t, part_x, [SAMPLES]);     // lx
  SHARED(acc_t, modulation, [SAMPLES]);
  const unsigned VALUE = 16, MOVES_Y = 32, MOVES_X = 64, NAN_AT = 128;
  const int tile_pixels = s.images * s.pixels, slots = s.KH * s.KW * s.OG, vectors = s.C / s.OG / VEC;
  const int across = (slots + SLOTS - 1) / SLOTS, down = (tile_pixels + PIXELS - 1) / PIXELS;
  const bool samples = grad_offset != nullptr || grad_mask != nullptr;
  for (index_t part = blockIdx.x; part < index_t(across) * down; part += gridDim.x) {
    const int first_pixel = int(part / across) * PIXELS, first_slot = int(part % across) * SLOTS;
    {
      const int i = threadIdx.x, pixel = first_pixel + i % PIXELS, slot = first_slot + i / PIXELS;
      if (pixel < tile_pixels && slot < slots) {
        const sample_t sample = sample_of(s, pixel, slot);
        const corners_t at = corners_of(s, offset, sample);
        cell[i] = cell_at(at, sample.image, s.input_n, s.input_y, s.input_x);
        grad_cell[i] = cell_at(at, sample.image, s.grad_n, s.grad_y, s.grad_x);
        inside[i] = at.inside() | (at.value ? VALUE : 0) | (at.moves_y ? MOVES_Y : 0) | (at.moves_x ? MOVES_X : 0) |
                    (at.nan ? NAN_AT : 0);
        part_y[i] = at.ly;
        part_x[i] = at.lx;
        modulation[i] = modulation_of(s, mask, sample);
      }
    }
    __syncthreads();  // the corners of all samples are known
    for (int first = 0; first < SAMPLES; first += THREADS / s.lanes) {
      const int nth = first + threadIdx.x / s.lanes, lane = threadIdx.x % s.lanes;
      const int slot = first_slot + nth % SLOTS, pixel = first_pixel + nth / SLOTS;
      const int i = nth % SLOTS * PIXELS + nth / SLOTS, og = slot % s.OG, k = slot / s.OG;
      const bool mine = pixel < tile_pixels && slot < slots;
      acc_t sum_y = 0, sum_x = 0, sum_value = 0;
      for (int vector = lane; mine && vector < vectors; vector += s.lanes) {
        const int c = og * (s.C / s.OG) + vector * VEC;
        const unsigned flags = inside[i];
        const acc_t ly = part_y[i], lx = part_x[i];
        acc_t g[VEC];
        load_accumulators<VEC>(grad_column + column_at(s, pixel, k, c), g);
        if (samples) {
          vec<scalar_t, VEC> corner[4];
          load_corners(corner, input, cell[i] + c * s.input_c, flags, s);
#pragma unroll
          for (int v = 0; v < VEC; v++) {
            const acc_t x00 = acc_t(corner[0].v[v]), x01 = acc_t(corner[1].v[v]);
            const acc_t x10 = acc_t(corner[2].v[v]), x11 = acc_t(corner[3].v[v]);
            const acc_t slope_y = (1 - lx) * (x10 - x00) + lx * (x11 - x01);
            const acc_t slope_x = (1 - ly) * (x01 - x00) + ly * (x11 - x10);
            const acc_t value = (1 - ly) * ((1 - lx) * x00 + lx * x01) + ly * ((1 - lx) * x10 + lx * x11);
            // 0 times a g that is not finite is NaN; a pixel that the rule does not read is not multiplied
            sum_y += g[v] * ((flags & MOVES_Y) ? slope_y : acc_t(0));
            sum_x += g[v] * ((flags & MOVES_X) ? slope_x : acc_t(0));
            sum_value += g[v] * ((flags & VALUE) ? value : acc_t(0));
          }
        }
        if (grad_input != nullptr) {
#pragma unroll
          for (int q = 0; q < 4; q++) {
            if (!(flags >> q & 1)) continue;
            acc_t scattered[VEC];
#pragma unroll
            for (int v = 0; v < VEC; v++) scattered[v] = corner_weight(ly, lx, q) * (modulation[i] * g[v]);
            // atomic: other samples, of this block and of others, have a cell that touches this pixel
            atomic_add<VEC>(grad_input + (grad_cell[i] + c * s.grad_c + q / 2 * s.grad_y + q % 2 * s.grad_x), scattered);
          }
        }
      }
      sum_y = sum_over_lanes(sum_y, s.lanes);
      sum_x = sum_over_lanes(sum_x, s.lanes);
      sum_value = sum_over_lanes(sum_value, s.lanes);
      if (mine && lane == 0) {
        const sample_t sample = sample_of(s, pixel, slot);
        const index_t area = index_t(s.OH) * s.OW;
        const index_t to = (index_t(sample.image) * s.OG * s.KH * s.KW + og * s.KH * s.KW + k) * area;  // of grad_mask
        const acc_t undefined = (inside[i] & NAN_AT) ? acc_t(NOT_A_NUMBER) : acc_t(0);
        if (grad_offset != nullptr) {
          grad_offset[2 * to + sample.pixel] = offset_t(sum_y * modulation[i] + undefined);
          grad_offset[2 * to + area + sample.pixel] = offset_t(sum_x * modulation[i] + undefined);
        }
        if (grad_mask != nullptr) grad_mask[to + sample.pixel] = mask_t(sum_value + undefined);
      }
    }
    __syncthreads();  // the corners are used up
  }
}

// grad_bias[o] = sum over images and pixels of grad_output. A block owns an output channel.
KERNEL(bias_gradient, THREADS)
(const scalar_t* __restrict__ grad_output,  // [images, O, OH, OW] by strides
 scalar_t* __restrict__ grad_bias,          // [O]
 const int O, const int images, const int OH, const int OW, const index_t stride_n, const index_t stride_o,
 const index_t stride_y, const index_t stride_x) {
  SHARED(acc_t, sums, [THREADS / 32]);
  for (index_t o = blockIdx.x; o < O; o += gridDim.x) {
    acc_t sum = 0;
    for (int n = 0; n < images; n++)
      for (int p = threadIdx.x; p < OH * OW; p += THREADS)
        sum += acc_t(grad_output[n * stride_n + o * stride_o + p / OW * stride_y + p % OW * stride_x]);
    sum = sum_over_lanes(sum, 32);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();  // every warp's sum is there
    if (threadIdx.x == 0) {
      acc_t total = 0;
      for (int warp = 0; warp < THREADS / 32; warp++) total += sums[warp];
      grad_bias[o] = scalar_t(total);
    }
    __syncthreads();  // the sums are used up
  }
}
