// Samples of the input, blended straight into a tile of a product: its rows are pixels, a row's 128 bytes are channels
// of one tap.
//
// VEC: the channels of one load. EL: 16 bytes, EL / 2: 8 bytes (the input is channels last and aligned for it); 1: of
// any strides, for widths that are odd. WIDE 1: the channels of a chunk share an offset group, so the places of a tile's
// pixels are kept in shared memory; 0: each thread computes the places of its own pieces.
// Needs scalar_t, offset_t, mask_t, VEC, WIDE and TAPS, after taps.cuh and product_tiles.cuh.

// What the launcher says of the product, beside conv_t.
struct product_t {
  int O, width;         // width: C/groups, input channels of a convolution group
  int total;            // pixels: images * OH * OW
  int padded;           // of a tap of the weight matrix, `width` rounded up to EL
  index_t right, down;  // VEC > 1: bytes from a pixel of the input to the next one, to the next row
  index_t y_n, y_o, y_y, y_x, bias_o;   // strides of the output [images, O, OH, OW] and of the bias, in elements
  int splits, padded_o;                 // of the backward
};

// Where the samples come from.
struct samples_t {
  const scalar_t* input;
  const offset_t* offset;
  const mask_t* mask;
  const conv_t& s;
  const product_t& f;
};

// The sample of a pixel at a tap, for all channels of an offset group: scale times the sum of weight[q] x_q.
struct alignas(16) cell_t {
  index_t first;    // the first corner, before the channel is added: its element; VEC > 1: its byte
  acc_t scale;      // the mask; NaN where the position is not a number
  unsigned inside;  // bit q: corner q is of the image
};
struct place_t {
  vec<acc_t, 4> weight;  // G(q, p) of corner q
  cell_t cell;
};

struct alignas(16) words_t {  // a piece's EL numbers. Words, since the compiler takes arrays of halves apart
  unsigned w[4];
};

__device__ __forceinline__ void widen(const words_t& from, acc_t (&to)[8], const __half*) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(from.w[i]));
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ void widen(const words_t& from, acc_t (&to)[8], const __nv_bfloat16*) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = __uint_as_float(from.w[i] << 16);
    to[2 * i + 1] = __uint_as_float(from.w[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void widen(const words_t& from, acc_t (&to)[4], const float*) {
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = __uint_as_float(from.w[i]);
}
__device__ __forceinline__ void widen(const words_t& from, acc_t (&to)[2], const double*) {
#pragma unroll
  for (int i = 0; i < 2; i++) to[i] = reinterpret_cast<const vec<double, 2>&>(from).v[i];
}

// The sample of pixel m (of all images) at tap k in an offset group. A pixel past the last counts as 0.
__device__ __forceinline__ place_t place_of(const samples_t& from, int m, int k, int og) {
  place_t to{};
  if (m >= from.f.total) return to;
  const conv_t& s = from.s;
  const sample_t sample = {m / s.pixels, s.first_pixel + m % s.pixels, k, og};
  const corners_t at = corners_of(s, from.offset, sample);
  to.cell.inside = at.value ? at.inside() : 0;
  to.cell.scale = at.nan ? acc_t(NOT_A_NUMBER) : modulation_of(s, from.mask, sample);
  to.cell.first = sample.image * s.input_n + at.y * s.input_y + at.x * s.input_x;
  if (VEC > 1) to.cell.first *= sizeof(scalar_t);
#pragma unroll
  for (int q = 0; q < 4; q++) to.weight.v[q] = corner_weight(at.ly, at.lx, q);
  return to;
}

// COUNT words (2 or 4) of a piece from `nth` on, where `there`; no access else.
template <int COUNT>
__device__ __forceinline__ void load_words(words_t& to, int nth, const unsigned char* from, bool there SITE) {
#ifdef CUDA_HOST
  using words = vec<unsigned, COUNT>;
  if (there) reinterpret_cast<words&>(to.w[nth]) = global_load<words>(from, site);
  if (!there) host::trace(host::GLOBAL_LOAD, nullptr, 0, site);  // a lane that takes no part
#else  // by a predicate: the compiler would branch around the load
  if (COUNT == 4)
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "+r"(to.w[0]), "+r"(to.w[1]), "+r"(to.w[2]), "+r"(to.w[3])
        : "l"(from), "r"(unsigned(there)));
  else
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0,%1}, [%2];}"
        : "+r"(to.w[nth]), "+r"(to.w[nth + 1])
        : "l"(from), "r"(unsigned(there)));
#endif
}

// A piece of samples on its way: channels of one pixel and one tap, in runs of VEC that share an offset group.
struct piece_t {
#if VEC > 1
  static constexpr int RUNS = EL / VEC;
  words_t corner[4];
#if WIDE
  acc_t scale;
#else
  place_t place[RUNS];
#endif
#endif
};

// Starts the loads of the piece that begins at channel c of a convolution group: pixel m, tap k. WIDE: `place` is its
// place in shared memory.
__device__ __forceinline__ void load_piece(piece_t& to, const samples_t& from, const place_t* place, int m, int k,
                                           int group, int c) {
#if VEC > 1
  const int width = from.f.width, channel = group * width + c;
#pragma unroll
  for (int q = 0; q < 4; q++) to.corner[q] = words_t{};  // a corner outside counts as 0
#if WIDE
  const cell_t cell = shared_load<cell_t>(&place->cell);
  to.scale = c < width ? cell.scale : acc_t(0);
#endif
#pragma unroll
  for (int run = 0; run < piece_t::RUNS; run++) {
    const bool counts = c + run * VEC < width;
#if !WIDE
    to.place[run] = place_t{};
    if (counts) to.place[run] = place_of(from, m, k, (channel + run * VEC) / (from.s.C / from.s.OG));
    const cell_t cell = to.place[run].cell;
#endif
    const unsigned inside = counts ? cell.inside : 0;
    const unsigned char* const corner = reinterpret_cast<const unsigned char*>(from.input) +
                                        (cell.first + (channel + run * VEC) * int(sizeof(scalar_t)));
#pragma unroll
    for (int q = 0; q < 4; q++)
      load_words<4 / piece_t::RUNS>(to.corner[q], run * 4 / piece_t::RUNS,
                                    corner + (q / 2 ? from.f.down : 0) + (q % 2 ? from.f.right : 0), inside >> q & 1);
  }
#endif
}

// The piece's samples. VEC 1: loaded here, channel by channel.
__device__ __forceinline__ void blend_piece(acc_t (&value)[EL], const piece_t& piece, const samples_t& from,
                                            const place_t* place, int m, int k, int group, int c) {
#if VEC > 1
#pragma unroll
  for (int run = 0; run < piece_t::RUNS; run++) {
#if WIDE
    const vec<acc_t, 4> weight = shared_load<vec<acc_t, 4>>(&place->weight);
    const acc_t scale = piece.scale;
#else
    const vec<acc_t, 4> weight = piece.place[run].weight;
    const acc_t scale = piece.place[run].cell.scale;
#endif
#pragma unroll
    for (int q = 0; q < 4; q++) {
      acc_t x[EL];
      widen(piece.corner[q], x, static_cast<const scalar_t*>(nullptr));
#pragma unroll
      for (int e = run * VEC; e < (run + 1) * VEC; e++)
        value[e] = q == 0 ? weight.v[q] * x[e] : value[e] + weight.v[q] * x[e];
    }
#pragma unroll
    for (int e = run * VEC; e < (run + 1) * VEC; e++) value[e] *= scale;
  }
#else
  const conv_t& s = from.s;
  place_t own{};
  int own_og = -1;
#pragma unroll
  for (int e = 0; e < EL; e++) value[e] = 0;
#pragma unroll 1  // a compiler that unrolled it would take a minute
  for (int e = 0; e < EL; e++) {
    acc_t sum = 0;
    if (c + e < from.f.width) {
      const int channel = group * from.f.width + c + e, og = channel / (s.C / s.OG);
      if (og != own_og) own = WIDE ? *place : place_of(from, m, k, og);
      own_og = og;
#pragma unroll
      for (int q = 0; q < 4; q++)
        if (own.cell.inside >> q & 1)
          sum += own.weight.v[q] * acc_t(from.input[own.cell.first + channel * s.input_c + q / 2 * s.input_y +
                                                    q % 2 * s.input_x]);
      sum *= own.cell.scale;
    }
#pragma unroll
    for (int i = 1; i < EL; i++) value[i - 1] = value[i];  // an index that varies would put them into memory
    value[EL - 1] = sum;
  }
#endif
}

// A value in the high and the low part of TF32 numbers. `low` is not rounded: the matrix units drop its last bits.
__device__ __forceinline__ void split_piece(const float (&value)[4], vec<float, 4>& high, vec<float, 4>& low) {
  const float largest = fmaxf(fmaxf(fabsf(value[0]), fabsf(value[1])), fmaxf(fabsf(value[2]), fabsf(value[3])));
  const float sum = value[0] + value[1] + (value[2] + value[3]);
  if (largest < 3.4e38f && sum == sum) {  // the maximum leaves NaN out, the sum does not
#pragma unroll
    for (int e = 0; e < 4; e++) {
      high.v[e] = __uint_as_float((__float_as_uint(value[e]) + 0x1000u) & 0xffffe000u);
      low.v[e] = value[e] - high.v[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++) tf32_split(value[e], high.v[e], low.v[e]);
  }
}

__device__ __forceinline__ __half rounded(float x, const __half*) { return __half(x); }
__device__ __forceinline__ __nv_bfloat16 rounded(float x, const __nv_bfloat16*) { return __nv_bfloat16(x); }
__device__ __forceinline__ float rounded(float x, const float*) { return MATRIX_UNITS ? tf32_round(x) : x; }
__device__ __forceinline__ double rounded(double x, const double*) { return x; }

// Stores a piece into a tile of TILE_ROWS rows.
template <int TILE_ROWS>
__device__ __forceinline__ void store_piece(unsigned char* tile, int row, int piece, const acc_t (&value)[EL]) {
  vec<scalar_t, EL> high;
#if SPLIT
  vec<scalar_t, EL> low;
  split_piece(value, high, low);
  shared_store(tile + TILE_ROWS * ROW_BYTES + piece_at(row, piece), low);
#else
#pragma unroll
  for (int e = 0; e < EL; e++) high.v[e] = rounded(value[e], static_cast<const scalar_t*>(nullptr));
#endif
  shared_store(tile + piece_at(row, piece), high);
}

// Where the summed axis has come to: taps by runs of TAPS, in each of them channels by BK, in each of them the run's
// taps. So nine taps read the same pixels of 128 bytes one after the other, out of the first-level cache.
struct chunk_t {
  int k, c, k0, in_og;  // k0: the run's first tap; in_og: channels since the run or, within it, the offset group began
  __device__ __forceinline__ void advance(int taps, int width, int per_og) {
    if (++k != taps && k != k0 + TAPS) return;
    k = k0;
    c += BK;
    in_og += BK;
    if (c >= width) c = 0, in_og = 0, k = k0 += TAPS;
    if (in_og >= per_og) in_og = 0;
  }
  __device__ __forceinline__ bool begins() const { return k == k0 && in_og == 0; }  // needs places of its own
};

// Which pixel of a chunk a tile's row holds. Where pixels are summed over (SPREAD), TF32 fragments take rows 2t and
// 2t + 1 for the pixels t and t + 4 of eight: so four lanes read four rows whose pieces lie in different banks.
template <bool SPREAD>
__device__ __forceinline__ int pixel_of_row(int row) {
  return SPREAD && MATRIX_UNITS && sizeof(scalar_t) == 4 ? (row & ~7) | (row & 1) << 2 | (row >> 1 & 3) : row;
}

// One thread's share of sampling: pieces of a chunk in two halves, so that the loads are under way during products.
// A chunk is PANELS tiles of TILE_ROWS rows (pixels) by BK channels, one after the other. Piece i of COUNT is loaded and
// blended AT_ONCE at a time, a quarter of them in each of the product's four steps.
template <int TILE_ROWS, int PANELS, bool SPREAD>
struct sampler_t {
  static constexpr int OF_PANEL = TILE_ROWS * PIECES / THREADS, COUNT = OF_PANEL * PANELS, AT_ONCE = (COUNT + 3) / 4;
  static_assert(TILE_ROWS * PIECES % THREADS == 0, "every thread samples as many pieces");
  piece_t piece[AT_ONCE];

  static __device__ __forceinline__ int row_of(int i) {
    return i % OF_PANEL * (THREADS / PIECES) + threadIdx.x / PIECES;
  }
  static __device__ __forceinline__ int channel_of(int i, const chunk_t& at) {
    return at.c + i / OF_PANEL * BK + threadIdx.x % PIECES * EL;
  }

  // `places` holds TILE_ROWS of a panel after another, `skip` apart; `first` is the tile's first pixel.
  __device__ __forceinline__ void load(int i, const samples_t& from, const place_t* places, int skip, int first,
                                       int group, const chunk_t& at) {
    load_piece(piece[i % AT_ONCE], from, places + i / OF_PANEL * skip + row_of(i),
               first + pixel_of_row<SPREAD>(row_of(i)), at.k, group, channel_of(i, at));
  }
  __device__ __forceinline__ void blend(int i, unsigned char* tile, const samples_t& from, const place_t* places,
                                        int skip, int first, int group, const chunk_t& at) {
    acc_t value[EL];
    blend_piece(value, piece[i % AT_ONCE], from, places + i / OF_PANEL * skip + row_of(i),
                first + pixel_of_row<SPREAD>(row_of(i)), at.k, group, channel_of(i, at));
    store_piece<TILE_ROWS>(tile + i / OF_PANEL * (TILE_ROWS * ROW_BYTES * PARTS), row_of(i), threadIdx.x % PIECES,
                           value);
  }
};
