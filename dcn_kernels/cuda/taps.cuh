// Which sample a thread works on, and where it lies: p0 + p_n + dp_n of Eq. 2. Needs scalar_t, offset_t and mask_t.
using acc_t = accumulator_of<scalar_t>::type;  // coordinates, weights and sums
#include "sampling.cuh"
#include "tile.cuh"

struct sample_t {
  int image, pixel;  // pixel = oy * OW + ox
  int k, og;         // tap and offset group
};

// Samples of a tile are numbered pixel by pixel, then tap by tap, then offset group by offset group.
__device__ __forceinline__ sample_t sample_of(const conv_t& s, int tile_pixel, int slot) {
  return {tile_pixel / s.pixels, s.first_pixel + tile_pixel % s.pixels, slot / s.OG, slot % s.OG};
}

__device__ __forceinline__ corners_t corners_of(const conv_t& s, const offset_t* offset, const sample_t& at) {
  const int oy = at.pixel / s.OW, ox = at.pixel % s.OW, i = at.k / s.KW, j = at.k % s.KW;
  const index_t dy = at.image * s.offset_n + 2 * (at.og * s.KH * s.KW + at.k) * s.offset_c + oy * s.offset_y +
                     ox * s.offset_x;
  const acc_t y = acc_t(oy * s.stride_h - s.padding_h + i * s.dilation_h) + acc_t(offset[dy]);
  const acc_t x = acc_t(ox * s.stride_w - s.padding_w + j * s.dilation_w) + acc_t(offset[dy + s.offset_c]);
  return corners(y, x, s.H, s.W, s.border);
}

__device__ __forceinline__ acc_t modulation_of(const conv_t& s, const mask_t* mask, const sample_t& at) {
  if (mask == nullptr) return acc_t(1);
  const int oy = at.pixel / s.OW, ox = at.pixel % s.OW;
  return acc_t(mask[at.image * s.mask_n + (at.og * s.KH * s.KW + at.k) * s.mask_c + oy * s.mask_y + ox * s.mask_x]);
}
