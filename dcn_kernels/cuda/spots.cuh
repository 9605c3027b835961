// What becomes of g = dL/dcolumn at a sample: its parts of grad_input, grad_offset and grad_mask, for both bodies of
// the backward. Needs VEC, after sampled_tiles.cuh.
#define V (VEC < 4 ? VEC : 4)  // channels at once

enum { VALUE = 16, MOVES_Y = 32, MOVES_X = 64, NAN_AT = 128 };  // above the four corners' bits

// What the gradients of a sample need of it, for all channels of an offset group.
struct alignas(16) spot_t {
  index_t cell, grad_cell;  // the first corner's element of the input and of grad_input, before the channel is added
  acc_t ly, lx, modulation;
  unsigned flags;
};

__device__ __forceinline__ spot_t spot_of(const samples_t& from, int m, int k, int og) {
  spot_t to{};
  if (m >= from.f.total) return to;
  const conv_t& s = from.s;
  const sample_t sample = {m / s.pixels, s.first_pixel + m % s.pixels, k, og};
  const corners_t at = corners_of(s, from.offset, sample);
  to.cell = sample.image * s.input_n + at.y * s.input_y + at.x * s.input_x;
  to.grad_cell = sample.image * s.grad_n + at.y * s.grad_y + at.x * s.grad_x;
  to.ly = at.ly;
  to.lx = at.lx;
  to.modulation = modulation_of(s, from.mask, sample);
  to.flags = at.inside() | (at.value ? VALUE : 0) | (at.moves_y ? MOVES_Y : 0) | (at.moves_x ? MOVES_X : 0) |
             (at.nan ? NAN_AT : 0);
  return to;
}

// V numbers of one corner; a corner outside counts as 0.
__device__ __forceinline__ void load_corner(acc_t (&x)[V], const scalar_t* from, bool there SITE) {
  TRACED(GLOBAL_LOAD, from, there ? sizeof(vec<scalar_t, V>) : 0);
  vec<scalar_t, V> corner{};
  if (there) corner = load<V>(from);
#pragma unroll
  for (int v = 0; v < V; v++) x[v] = acc_t(corner.v[v]);
}

// Sums over a sample's channels: of g times its derivative in y and in x, and times its value.
struct spot_sums_t {
  acc_t y = 0, x = 0, value = 0;

  // The V channels from c on, with corners x0 x1 / x2 x3.
  __device__ __forceinline__ void add(const spot_t& at, const acc_t (&g)[V], const samples_t& from, int c) {
    const conv_t& s = from.s;
    const acc_t ly = at.ly, lx = at.lx;
    acc_t corner[4][V];
#pragma unroll
    for (int q = 0; q < 4; q++)
      load_corner(corner[q], from.input + (at.cell + c * s.input_c + q / 2 * s.input_y + q % 2 * s.input_x),
                  at.flags >> q & 1);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const acc_t x0 = corner[0][v], x1 = corner[1][v], x2 = corner[2][v], x3 = corner[3][v];
      const acc_t slope_y = (1 - lx) * (x2 - x0) + lx * (x3 - x1), slope_x = (1 - ly) * (x1 - x0) + ly * (x3 - x2);
      const acc_t sample = (1 - ly) * ((1 - lx) * x0 + lx * x1) + ly * ((1 - lx) * x2 + lx * x3);
      // 0 times a g that is not finite is NaN; a pixel that the rule does not read is not multiplied
      y += g[v] * (at.flags & MOVES_Y ? slope_y : acc_t(0));
      x += g[v] * (at.flags & MOVES_X ? slope_x : acc_t(0));
      value += g[v] * (at.flags & VALUE ? sample : acc_t(0));
    }
  }

  // Over the lanes that share the sample; each of them gets it.
  __device__ __forceinline__ spot_sums_t over_lanes(int lanes) const {
    return {sum_over_lanes(y, lanes), sum_over_lanes(x, lanes), sum_over_lanes(value, lanes)};
  }
};

// grad_input += m G(q, p) g at the four corners, for the V channels from c on.
__device__ __forceinline__ void scatter(acc_t* grad_input, const spot_t& at, const acc_t (&g)[V], const conv_t& s,
                                        int c) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    if (!(at.flags >> q & 1)) continue;
    const acc_t share = corner_weight(at.ly, at.lx, q) * at.modulation;
    acc_t scattered[V];
#pragma unroll
    for (int v = 0; v < V; v++) scattered[v] = share * g[v];
    // atomic: other samples, of this block and of others, have a cell that touches this pixel
    atomic_add<V>(grad_input + (at.grad_cell + c * s.grad_c + q / 2 * s.grad_y + q % 2 * s.grad_x), scattered);
  }
}

// The sample's grad_offset and grad_mask, where they are wanted.
__device__ __forceinline__ void write_gradients(offset_t* grad_offset, mask_t* grad_mask, const spot_t& at,
                                                const spot_sums_t& sums, const conv_t& s, int m, int k, int og) {
  const int pixel = s.first_pixel + m % s.pixels, taps = s.KH * s.KW;
  const index_t area = index_t(s.OH) * s.OW, to = (index_t(m / s.pixels * s.OG + og) * taps + k) * area;
  const acc_t undefined = at.flags & NAN_AT ? acc_t(NOT_A_NUMBER) : acc_t(0);
  if (grad_offset != nullptr) {
    grad_offset[2 * to + pixel] = offset_t(sums.y * at.modulation + undefined);
    grad_offset[2 * to + area + pixel] = offset_t(sums.x * at.modulation + undefined);
  }
  if (grad_mask != nullptr) grad_mask[to + pixel] = mask_t(sums.value + undefined);
}
