// Which sample a thread works on, and where it lies: p0 + p_n + dp_n of Eq. 2. Needs scalar_t, offset_t and mask_t.
using acc_t = accumulator_of<scalar_t>::type;  // coordinates, weights and sums
#include "sampling.cuh"

// One tile of a deformable convolution: `pixels` output pixels from `first_pixel` of each of `images` images. The
// launcher fills it (CONV in taps.py); sizes are below 2^31 (checked there), products of them are index_t.
struct conv_t {
  int C, H, W, OH, OW, KH, KW, OG, groups;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int border, images, first_pixel, pixels;
  int lanes;  // threads that share one sample's channels: a power of two, at most a warp
  index_t input_n, input_c, input_y, input_x;      // strides of input [images, C, H, W], in elements
  index_t offset_n, offset_c, offset_y, offset_x;  // of offset [images, 2*OG*KH*KW, OH, OW]
  index_t mask_n, mask_c, mask_y, mask_x;          // of mask [images, OG*KH*KW, OH, OW]
  index_t grad_n, grad_c, grad_y, grad_x;          // of grad_input [images, C, H, W]
};

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

// Where channel c of tap k stands in a row of columns [groups, KH*KW, C/groups].
__device__ __forceinline__ index_t column_at(const conv_t& s, int tile_pixel, int k, int c) {
  const int width = s.C / s.groups;
  return ((index_t(tile_pixel) * s.groups + c / width) * (s.KH * s.KW) + k) * width + c % width;
}
