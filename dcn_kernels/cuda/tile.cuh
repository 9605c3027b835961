// What a launch works on: conv_t, the sizes and strides of one tile.
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

// Where channel c of tap k stands in a row of columns [groups, KH*KW, C/groups].
__device__ __forceinline__ index_t column_at(const conv_t& s, int tile_pixel, int k, int c) {
  const int width = s.C / s.groups;
  return ((index_t(tile_pixel) * s.groups + c / width) * (s.KH * s.KW) + k) * width + c % width;
}
