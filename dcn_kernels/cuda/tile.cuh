// What a launch works on: one tile of a deformable convolution, its sizes and strides.
//
// A tile is `pixels` output pixels from `first_pixel` on, of each of `images` images. The launcher fills conv_t (CONV in
// taps.py) and checks that each size is below 2^31; products of sizes are index_t.
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
