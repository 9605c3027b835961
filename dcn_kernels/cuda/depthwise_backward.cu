// The gradients of a deformable convolution with an input channel to each group (groups = C): no matrix product.
// grad_output is staged as [pixels, M, padded], M = O / C, padded >= C: its element [p, j, c] is that of output c M + j.
#include "common.cuh"
#include "taps.cuh"

// The sampler's tile, as depthwise.cu has it: a piece of one pixel to each of 256 threads.
#define MATRIX_UNITS 0
#define SPLIT 0
#define BM 32
#define BN 64
#define WARPS_M 2
#define WARPS_N 4
#define TAPS 1
#include "matrix_units.cuh"
#include "product_tiles.cuh"
#include "sampled_tiles.cuh"
#include "spots.cuh"

#define SLOTS 8  // a block's samples at a time: BM pixels by SLOTS pairs of tap and offset group
#define SAMPLES (BM * SLOTS)
static_assert(SAMPLES == THREADS && THREADS == BM * PIECES, "a thread finds one sample, and has one piece");

// With g = dL/dcolumn = sum over j of weight[j, k, c] grad_output[p, j, c], Eq. 7 and the transposes of Eq. 2:
//   grad_input[q] += m G(q, p) g,   grad_offset = m sum_c g dx_c(p)/dp,   grad_mask = sum_c g x_c(p)
// First each thread finds one sample, then `lanes` threads own a sample and its channels: they alone write its
// grad_offset and grad_mask. grad_input is shared with every sample whose cell touches the pixel: atomics, or
// (deterministic) g in memory, for gather.cu.
KERNEL(depthwise_data_gradients, THREADS)
(const scalar_t* __restrict__ input,        // [images, C, H, W] by strides; VEC > 1: channels last, aligned
 const offset_t* __restrict__ offset,       // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,           // [images, OG*KH*KW, OH, OW] by strides, or null: all ones
 const scalar_t* __restrict__ grad_output,  // [images*pixels, M, padded]
 const scalar_t* __restrict__ weight,       // [M, KH*KW, padded]
 acc_t* __restrict__ grad_input,            // [images, C, H, W] by strides, holding sums so far; null: not wanted
 offset_t* __restrict__ grad_offset,        // [images, 2*OG*KH*KW, OH, OW]; null: not wanted
 mask_t* __restrict__ grad_mask,            // [images, OG*KH*KW, OH, OW]; null: not wanted
 acc_t* __restrict__ grad_column,           // g [images*pixels, C, KH*KW]; null: not wanted
 const conv_t s, const product_t f) {
  SHARED(spot_t, spots, [SAMPLES]);
  const samples_t samples = {input, offset, mask, s, f};
  const int taps = s.KH * s.KW, slots = taps * s.OG, per_og = s.C / s.OG, multiple = f.O / s.C;
  const int across = (slots + SLOTS - 1) / SLOTS, down = (f.total + BM - 1) / BM;
  const bool sums_up = grad_offset != nullptr || grad_mask != nullptr;
  for (index_t part = blockIdx.x; part < index_t(across) * down; part += gridDim.x) {
    const int m0 = int(part / across) * BM, first_slot = int(part % across) * SLOTS;
    {
      const int slot = first_slot + threadIdx.x / BM;
      spots[threadIdx.x] =
          slot < slots ? spot_of(samples, m0 + threadIdx.x % BM, slot / s.OG, slot % s.OG) : spot_t{};
    }
    __syncthreads();  // the spots are there
    for (int first = 0; first < SAMPLES; first += THREADS / s.lanes) {
      const int nth = first + threadIdx.x / s.lanes, lane = threadIdx.x % s.lanes;
      const int slot = first_slot + nth % SLOTS, row = nth / SLOTS, m = m0 + row, og = slot % s.OG, k = slot / s.OG;
      const bool mine = m < f.total && slot < slots;
      const spot_t at = spots[nth % SLOTS * BM + row];
      spot_sums_t sums;
      for (int c = og * per_og + lane * V; mine && c < (og + 1) * per_og; c += s.lanes * V) {
        acc_t g[V] = {};
        for (int j = 0; j < multiple; j++) {
          const vec<scalar_t, V> w = load<V>(weight + ((index_t(j) * taps + k) * f.padded + c));
          const vec<scalar_t, V> y = load<V>(grad_output + ((index_t(m) * multiple + j) * f.padded + c));
#pragma unroll
          for (int v = 0; v < V; v++) g[v] += acc_t(w.v[v]) * acc_t(y.v[v]);
        }
        if (grad_column != nullptr)
          for (int v = 0; v < V; v++) grad_column[column_at(s, m, k, c + v)] = g[v];
        if (sums_up) sums.add(at, g, samples, c);
        if (grad_input != nullptr) scatter(grad_input, at, g, s, c);
      }
      if (!sums_up) continue;
      const spot_sums_t own = sums.over_lanes(s.lanes);
      if (mine && lane == 0) write_gradients(grad_offset, grad_mask, at, own, s, m, k, og);
    }
    __syncthreads();  // the spots are used up
  }
}

// sums[split, c M + j, k] (+)= sum over the split's pixels of grad_output[p, j, c] m_k(p) x_c(p + p_k + dp_k).
//
// A block owns BK channels of one tap and one j in one split, a thread EL of them and every 32nd pixel.
KERNEL(depthwise_weight_gradient, THREADS)
(const scalar_t* __restrict__ input,        // [images, C, H, W] by strides; VEC > 1: channels last, aligned
 const offset_t* __restrict__ offset,       // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,           // [images, OG*KH*KW, OH, OW] by strides, or null: all ones
 const scalar_t* __restrict__ grad_output,  // [images*pixels, M, padded]
 acc_t* __restrict__ result,                // [splits, O, KH*KW]
 const conv_t s, const product_t f,         // f.width is C: to the sampler all channels are one group
 const int adds) {                          // 1: to the sums of other images
  SHARED(place_t, places, [WIDE ? THREADS : 1]);
  SHARED(acc_t, sums, [BM][BK]);
  const samples_t samples = {input, offset, mask, s, f};
  const int taps = s.KH * s.KW, columns = (s.C + BK - 1) / BK, multiple = f.O / s.C;
  const int per_split = (f.total + f.splits - 1) / f.splits, row = threadIdx.x / PIECES;
  const index_t tiles = index_t(f.splits) * taps * columns * multiple;
  for (index_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int j = int(tile % multiple), c0 = int(tile / multiple % columns) * BK;
    const int k = int(tile / multiple / columns % taps), split = int(tile / multiple / columns / taps);
    const int begin = split * per_split, end = f.total - begin < per_split ? f.total : begin + per_split;
    const int of_tile = threadIdx.x % PIECES * EL, c = c0 + of_tile;
    acc_t sum[EL] = {};
    for (int m0 = begin; m0 < end; m0 += THREADS) {
#if WIDE
      places[threadIdx.x] = place_of(samples, m0 + threadIdx.x, k, c0 / (s.C / s.OG));
      __syncthreads();  // the places are there
#endif
      for (int i = row; i < THREADS && m0 + i < end; i += BM) {
        piece_t piece;
        acc_t value[EL];
        load_piece(piece, samples, places + (WIDE ? i : 0), m0 + i, k, 0, c);
        blend_piece(value, piece, samples, places + (WIDE ? i : 0), m0 + i, k, 0, c);
        if (c >= f.padded) continue;
        const words_t words = global_load<words_t>(grad_output + ((index_t(m0 + i) * multiple + j) * f.padded + c));
        acc_t y[EL];
        widen(words, y, static_cast<const scalar_t*>(nullptr));
#pragma unroll
        for (int e = 0; e < EL; e++) sum[e] += y[e] * value[e];
      }
#if WIDE
      __syncthreads();  // the places are used up
#endif
    }
#pragma unroll
    for (int e = 0; e < EL; e++) sums[row][of_tile + e] = sum[e];
    __syncthreads();  // every pixel's part is there
    for (int i = threadIdx.x; i < BK && c0 + i < s.C; i += THREADS) {
      acc_t all = 0;
      for (int r = 0; r < BM; r++) all += sums[r][i];
      acc_t& total = result[(index_t(split) * f.O + (c0 + i) * multiple + j) * taps + k];
      total = adds ? total + all : all;
    }
    __syncthreads();  // the sums are used up
  }
}
