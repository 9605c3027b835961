// Deformable convolution with an input channel to each group (groups = C): no matrix product.
#include "common.cuh"
#include "taps.cuh"

// The sampler's tile: 32 pixels by 128 bytes of channels, a piece of one pixel to each of 256 threads. There is no
// product, so BN, WARPS_M and WARPS_N only make those threads.
#define MATRIX_UNITS 0
#define SPLIT 0
#define BM 32
#define BN 64
#define WARPS_M 2
#define WARPS_N 4
#include "matrix_units.cuh"
#include "product_tiles.cuh"
#include "sampled_tiles.cuh"

#define OUT_ROW (BM + EL)  // of the output tile [BK][BM]; 16 bytes more against bank conflicts
static_assert(THREADS == BM * PIECES, "a thread has one piece");

// y[n, c M + j, p] = bias[c M + j] + sum over k of weight[j, k, c] m_k(p) x_c(p + p_k + dp_k), j < M = O / C.
//
// A block owns BM pixels of BK channels at a time, a thread EL channels of one pixel; every element of y is written
// once. The corners of tap k+1 are loaded before tap k is blended.
KERNEL(depthwise_forward, THREADS)
(const scalar_t* __restrict__ input,   // [images, C, H, W] by strides; VEC > 1: channels last, aligned
 const offset_t* __restrict__ offset,  // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,      // [images, OG*KH*KW, OH, OW] by strides, or null: all ones
 const scalar_t* __restrict__ weight,  // [M, KH*KW, padded]
 const scalar_t* __restrict__ bias,    // [O] by stride, or null: all zeros
 scalar_t* __restrict__ y,             // [images, O, OH, OW] by strides
 const conv_t s, const product_t f) {  // f.width is C: to the sampler all channels are one group
  SHARED(place_t, places, [WIDE ? TAPS * BM : 1]);
  SHARED(scalar_t, outputs, [BK * OUT_ROW]);
  const samples_t samples = {input, offset, mask, s, f};
  const int taps = s.KH * s.KW, columns = (s.C + BK - 1) / BK, multiple = f.O / s.C;
  const index_t tiles = index_t((f.total + BM - 1) / BM) * columns * multiple;
  const int row = threadIdx.x / PIECES, channel = threadIdx.x % PIECES * EL;

  for (index_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int j = int(tile % multiple), c0 = int(tile / multiple % columns) * BK, c = c0 + channel;
    const int m0 = int(tile / multiple / columns) * BM;
    acc_t sum[EL] = {};
    piece_t piece;
    for (int k0 = 0; k0 < taps; k0 += TAPS) {
      const int run = taps - k0 < TAPS ? taps - k0 : TAPS;
#if WIDE
      for (int i = threadIdx.x; i < BM * run; i += THREADS)
        places[i] = place_of(samples, m0 + i % BM, k0 + i / BM, c0 / (s.C / s.OG));
      __syncthreads();  // the places are there
#endif
      load_piece(piece, samples, places + (WIDE ? row : 0), m0 + row, k0, 0, c);
      for (int k = 0; k < run; k++) {
        const piece_t now = piece;
        if (k + 1 < run)
          load_piece(piece, samples, places + (WIDE ? (k + 1) * BM + row : 0), m0 + row, k0 + k + 1, 0, c);
        acc_t value[EL];
        blend_piece(value, now, samples, places + (WIDE ? k * BM + row : 0), m0 + row, k0 + k, 0, c);
        if (c < f.padded) {
          const words_t words = global_load<words_t>(weight + ((index_t(j) * taps + k0 + k) * f.padded + c));
          acc_t w[EL];
          widen(words, w, static_cast<const scalar_t*>(nullptr));
#pragma unroll
          for (int e = 0; e < EL; e++) sum[e] += w[e] * value[e];
        }
      }
#if WIDE
      __syncthreads();  // the places are used up
#endif
    }
#pragma unroll
    for (int e = 0; e < EL; e++) {
      const int o = (c + e) * multiple + j;
      const acc_t b = bias != nullptr && c + e < s.C ? acc_t(bias[o * f.bias_o]) : acc_t(0);
      shared_store(outputs + (channel + e) * OUT_ROW + row, scalar_t(sum[e] + b));
    }
    __syncthreads();  // the output tile is there
    for (int i = threadIdx.x; i < BM * BK; i += THREADS) {
      const int m = m0 + i % BM, p = m % s.pixels, of_tile = i / BM;
      if (m >= f.total || c0 + of_tile >= s.C) continue;
      y[m / s.pixels * f.y_n + ((c0 + of_tile) * multiple + j) * f.y_o + p / s.OW * f.y_y + p % s.OW * f.y_x] =
          shared_load<scalar_t>(outputs + of_tile * OUT_ROW + i % BM);
    }
    __syncthreads();  // the output tile is used up
  }
}
