// The gradients of a deformable convolution as products. Neither columns nor their gradient are in global memory, but
// for a deterministic grad_input. Rows of grad_output are staged: [pixels, groups, padded_o], zeros from O/groups on.
#include "common.cuh"
#include "taps.cuh"

#define TAPS 1  // a block works on one
#include "matrix_units.cuh"
#include "product_tiles.cuh"
#include "sampled_tiles.cuh"
#include "spots.cuh"

// Numbers of a row of the columns' gradient [BM][BN] in shared memory: some more, against bank conflicts.
#define G_ROW (BN + (MATRIX_UNITS ? 8 : 16 / int(sizeof(acc_t))))
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define DATA_MAIN LARGER(STAGES * (A_BYTES + B_BYTES), BM * G_ROW * int(sizeof(acc_t)))
#define CARRY_BYTES (2 * BM * 4 * int(sizeof(acc_t)))
#define PANELS (BN / BK)  // a tile of sampled pixels is so many tiles of BK rows by BK channels
#define O_PANELS (BM / BK)
#define CHUNK_PLACES (BK * (WIDE ? PANELS : 0))
static_assert(DATA_MAIN + CARRY_BYTES + BM * int(sizeof(spot_t)) == DATA_BYTES, "as the launcher says");
static_assert(STAGES * A_BYTES + 2 * B_BYTES + 2 * CHUNK_PLACES * int(sizeof(place_t)) == WEIGHT_BYTES,
              "as the launcher says");
static_assert(BM % BK == 0 && BN % BK == 0, "whole panels");

// With g = dL/dcolumn = sum over o of weight[o, c, k] grad_output[o, p], Eq. 7 and the transposes of Eq. 2:
//   grad_input[q] += m G(q, p) g,   grad_offset = m sum_c g dx_c(p)/dp,   grad_mask = sum_c g x_c(p)
//
// A block owns BM pixels of one tap, and goes through the channels BN at a time: first g of those channels as a product
// over the output channels, [BM][BN] in shared memory; then `lanes` threads to a pixel and offset group scatter its part
// of grad_input and sum up grad_offset and grad_mask. Sums of an offset group that goes on in the next channels are
// carried there, so the block alone writes its grad_offset and grad_mask, once. grad_input is shared with every sample
// whose cell touches the pixel: atomics, or (deterministic) the rows of g in memory, for gather.cu.
KERNEL(data_gradients, THREADS)
(const scalar_t* __restrict__ input,            // [images, C, H, W] by strides; VEC > 1: channels last, aligned
 const offset_t* __restrict__ offset,           // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,               // [images, OG*KH*KW, OH, OW] by strides, or null: all ones
 const scalar_t* __restrict__ grad_output,      // [images*pixels, groups, padded_o]
 const scalar_t* __restrict__ grad_output_low,  // SPLIT: what its TF32 numbers leave; else null
 const scalar_t* __restrict__ weight,           // [groups, KH*KW, C/groups, padded_o], zeros from O/groups on
 const scalar_t* __restrict__ weight_low,       // SPLIT; else null
 acc_t* __restrict__ grad_input,                // [images, C, H, W] by strides, holding sums so far; null: not wanted
 offset_t* __restrict__ grad_offset,            // [images, 2*OG*KH*KW, OH, OW]; null: not wanted
 mask_t* __restrict__ grad_mask,                // [images, OG*KH*KW, OH, OW]; null: not wanted
 acc_t* __restrict__ grad_column,               // g [images*pixels, groups, KH*KW, C/groups]; null: not wanted
 const conv_t s, const product_t f,
 const int wide) {  // 1: the BN channels lie in one offset group, whose spots are kept in shared memory
  DYNAMIC_SHARED(memory, DATA_BYTES);
  acc_t* const grads = reinterpret_cast<acc_t*>(memory);
  acc_t* const carry = reinterpret_cast<acc_t*>(memory + DATA_MAIN);  // [2][BM][4]
  spot_t* const spots = reinterpret_cast<spot_t*>(memory + DATA_MAIN + CARRY_BYTES);
  const samples_t samples = {input, offset, mask, s, f};
  const int taps = s.KH * s.KW, chunks = (f.padded_o + BK - 1) / BK, per_og = s.C / s.OG;
  const index_t tiles = index_t((f.total + BM - 1) / BM) * taps, row_stride = index_t(s.groups) * f.padded_o;
  const bool sums_up = grad_offset != nullptr || grad_mask != nullptr;
  const lane_t rows = lane_rows();

  for (index_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {  // taps innermost: they share grad_output
    const int k = int(tile % taps), m0 = int(tile / taps) * BM, valid_m = f.total - m0 < BM ? f.total - m0 : BM;
    int spots_of = -1, turn = 0;  // which half of `carry` these channels write
    for (int channel = 0; channel < s.C;) {
      const int group = channel / f.width, c0 = channel % f.width, count = f.width - c0 < BN ? f.width - c0 : BN;
      const index_t of_weight = ((index_t(group) * taps + k) * f.width + c0) * f.padded_o;
      const index_t of_output = m0 * row_stride + index_t(group) * f.padded_o;
      auto copy = [&](int chunk, int stage) {
        unsigned char* const to = memory + stage * (A_BYTES + B_BYTES);
        const int o = chunk * BK, left = f.padded_o - o;
        copy_tile<BM>(to, grad_output + of_output + o, row_stride, valid_m, left);
        copy_tile<BN>(to + A_BYTES, weight + of_weight + o, f.padded_o, count, left);
        if (SPLIT) {
          copy_tile<BM>(to + BM * ROW_BYTES, grad_output_low + of_output + o, row_stride, valid_m, left);
          copy_tile<BN>(to + A_BYTES + BN * ROW_BYTES, weight_low + of_weight + o, f.padded_o, count, left);
        }
      };
      sums_t sums;
      sums.clear();
#pragma unroll
      for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < chunks) copy(stage, stage);
        cp_async_commit();
      }
      int stage = 0;
      for (int chunk = 0; chunk < chunks; chunk++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this chunk's tiles are there; those of the last are used up
        if (chunk + STAGES - 1 < chunks) copy(chunk + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
        cp_async_commit();
        const unsigned char* const a = memory + stage * (A_BYTES + B_BYTES);
#if SPLIT
        sums_t part;  // of this chunk alone: the matrix units round towards zero, the additions below to nearest
        part.clear();
#else
        sums_t& part = sums;
#endif
#pragma unroll
        for (int step = 0; step < 4; step++) multiply_step(part, a, a + A_BYTES, rows, step);
#if SPLIT
        sums.add(part);
#endif
        stage = stage + 1 == STAGES ? 0 : stage + 1;
      }
      cp_async_wait<0>();
      __syncthreads();  // the tiles are used up: their memory takes the columns' gradient
      each_pair(sums, [&](int row, int c, acc_t one, acc_t next) {
        shared_store(grads + row * G_ROW + c, vec<acc_t, 2>{{one, next}});
      });
      const int first_og = channel / per_og, last_og = (channel + count - 1) / per_og;
      if (wide && spots_of != first_og)
        for (int i = threadIdx.x; i < BM; i += THREADS) spots[i] = spot_of(samples, m0 + i, k, first_og);
      spots_of = first_og;
      __syncthreads();  // the columns' gradient and the spots are there

      if (grad_column != nullptr)
        for (int i = threadIdx.x; i < BM * BN; i += THREADS) {
          const int row = i / BN, c = i % BN;
          if (row < valid_m && c < count) grad_column[column_at(s, m0 + row, k, channel + c)] = grads[row * G_ROW + c];
        }
      const int items = sums_up || grad_input != nullptr ? BM * (last_og - first_og + 1) : 0;
      for (int item = threadIdx.x / s.lanes; item < items; item += THREADS / s.lanes) {
        const int row = item % BM, og = first_og + item / BM, lane = threadIdx.x % s.lanes;
        const int begin = og * per_og < channel ? channel : og * per_og;
        const int end = (og + 1) * per_og < channel + count ? (og + 1) * per_og : channel + count;
        const spot_t at = wide ? spots[row] : spot_of(samples, m0 + row, k, og);
        spot_sums_t sums;
        for (int c = begin + lane * V; c < end && row < valid_m; c += s.lanes * V) {
          const vec<acc_t, V> g = shared_load<vec<acc_t, V>>(grads + row * G_ROW + (c - channel));
          if (sums_up) sums.add(at, g.v, samples, c);
          if (grad_input != nullptr) scatter(grad_input, at, g.v, s, c);
        }
        if (!sums_up) continue;
        spot_sums_t own = sums.over_lanes(s.lanes);
        if (lane || row >= valid_m) continue;
        if (og * per_og < channel) {  // the offset group began before these channels
          const acc_t* const before = carry + ((turn ^ 1) * BM + row) * 4;
          own.y += before[0];
          own.x += before[1];
          own.value += before[2];
        }
        if ((og + 1) * per_og > channel + count) {  // and goes on after them
          acc_t* const after = carry + (turn * BM + row) * 4;
          after[0] = own.y;
          after[1] = own.x;
          after[2] = own.value;
        } else {
          write_gradients(grad_offset, grad_mask, at, own, s, m0 + row, k, og);
        }
      }
      __syncthreads();  // the columns' gradient is used up
      channel += count;
      turn ^= 1;
    }
  }
}

// Starts the copy of BK pixels by BM output channels into O_PANELS tiles whose rows are pixels; zeros beyond.
__device__ __forceinline__ void copy_pixels(unsigned char* tile, const scalar_t* source, index_t stride, int pixels,
                                            int outputs) {
  const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES, pixel = pixel_of_row<true>(row);
#pragma unroll
  for (int panel = 0; panel < O_PANELS; panel++)
#pragma unroll
    for (int i = 0; i < BK * PIECES / THREADS; i++) {
      const int o = panel * BK + piece * EL, nth = i * (THREADS / PIECES);
      cp_async(tile + panel * (BK * ROW_BYTES * PARTS) + piece_at(row, piece) + nth * ROW_BYTES,
               source + (pixel + nth) * stride + o, pixel + nth < pixels && o < outputs);
    }
}

#if MATRIX_UNITS
// The fragments of 16 x K of A (16 columns from `column` on) or of two times K x 8 of B, transposed as they are read.
// Rows of a tile are the summed axis. IS_A: r[1] is the second eight columns of the first half of K, else r[2] is.
template <bool IS_A>
__device__ __forceinline__ void load_transposed(unsigned (&r)[4], const unsigned char* tile, int column, int step) {
  const int lane = threadIdx.x % 32;
  if (sizeof(scalar_t) == 2) {
    const int high = IS_A ? lane / 16 : lane / 8 % 2, next = IS_A ? lane / 8 % 2 : lane / 16;
    ldmatrix<true>(r, tile + piece_at(step * 16 + lane % 8 + high * 8, column / EL + next));
  } else {  // no ldmatrix transposes 32-bit numbers; see pixel_of_row
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int high = IS_A ? i / 2 : i % 2, c = column + (IS_A ? i % 2 : i / 2) * 8 + lane / 4;
      r[i] = shared_load<unsigned>(tile + piece_at(step * 8 + lane % 4 * 2 + high, c / EL) + c % EL * 4);
    }
  }
}
#endif

// sums += A^T B over one step; A is O_PANELS tiles, B is PANELS, whose rows are the summed axis: pixels.
__device__ __forceinline__ void multiply_pixels(sums_t& sums, const unsigned char* A, const unsigned char* B,
                                                int step) {
  constexpr int PANEL = BK * ROW_BYTES * PARTS;
#if MATRIX_UNITS
  unsigned a[PARTS][MT][4];
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const int o = warp_row() + m * 16;
      load_transposed<true>(a[part][m], A + o / BK * PANEL + part * (BK * ROW_BYTES), o % BK, step);
    }
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    const int c = warp_column() + n * 8;
    unsigned b[PARTS][4];
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      load_transposed<false>(b[part], B + c / BK * PANEL + part * (BK * ROW_BYTES), c % BK, step);
#pragma unroll
    for (int product = SPLIT ? 0 : 2; product < 3; product++) {
      const int low_a = product == 0, low_b = product == 1;  // low high, high low, high high
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const unsigned pair[2] = {b[low_b * (PARTS - 1)][2 * half], b[low_b * (PARTS - 1)][2 * half + 1]};
#pragma unroll
        for (int m = 0; m < MT; m++)
          mma(sums.of[m][n + half], a[low_a * (PARTS - 1)][m], pair, static_cast<const scalar_t*>(nullptr));
      }
    }
  }
#else
  auto at = [](int row, int column) {
    return column / BK * PANEL + piece_at(row, column % BK / EL) + column % EL * int(sizeof(scalar_t));
  };
#pragma unroll 1  // unrolled, it takes a minute to compile
  for (int pixel = 0; pixel < BK / 4; pixel++) {
    const int row = step * (BK / 4) + pixel;
    acc_t a[2 * MT];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) a[i] = acc_t(shared_load<scalar_t>(A + at(row, warp_row() + i * 8 + row_lane())));
#pragma unroll
    for (int n = 0; n < NT; n++) {
      using pair_t = vec<scalar_t, 2>;
      const pair_t b = shared_load<pair_t>(B + at(row, warp_column() + n * 8 + column_lane() * 2));
#pragma unroll
      for (int i = 0; i < 4 * MT; i++) sums.of[i / 4][n][i % 4] += a[i / 2] * acc_t(b.v[i % 2]);
    }
  }
#endif
}

// sums[split, o, k, c] (+)= sum over the split's pixels of grad_output[o, p] m_k(p) x_c(p + p_k + dp_k).
//
// A block owns BM output channels by BN input channels of a tap in one split; ordered_sums adds the splits up. While
// chunk i of BK pixels is multiplied, chunk i+1 is sampled into the other B tile, and the places of chunk i+2 are found.
KERNEL(weight_gradient, THREADS)
(const scalar_t* __restrict__ input,            // [images, C, H, W] by strides; VEC > 1: channels last, aligned
 const offset_t* __restrict__ offset,           // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,               // [images, OG*KH*KW, OH, OW] by strides, or null: all ones
 const scalar_t* __restrict__ grad_output,      // [images*pixels, groups, padded_o]
 const scalar_t* __restrict__ grad_output_low,  // SPLIT: what its TF32 numbers leave; else null
 acc_t* __restrict__ result,                    // [splits, O, KH*KW, C/groups]
 const conv_t s, const product_t f,
 const int adds) {  // 1: to the sums of other images
  DYNAMIC_SHARED(memory, WEIGHT_BYTES);
  unsigned char* const B = memory + STAGES * A_BYTES;
  place_t* const places = reinterpret_cast<place_t*>(B + 2 * B_BYTES);  // [2][PANELS][BK]
  const samples_t samples = {input, offset, mask, s, f};
  const int taps = s.KH * s.KW, of_group = f.O / s.groups, per_og = s.C / s.OG;
  const int down = (of_group + BM - 1) / BM, across = (f.width + BN - 1) / BN;
  const int all_chunks = (f.total + BK - 1) / BK, per_split = (all_chunks + f.splits - 1) / f.splits;
  const index_t tiles = index_t(f.splits) * s.groups * taps * across * down;
  const index_t row_stride = index_t(s.groups) * f.padded_o;

  for (index_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {  // output channels innermost: they share samples
    const int o0 = int(tile % down) * BM, c0 = int(tile / down % across) * BN, k = int(tile / down / across % taps);
    const int group = int(tile / down / across / taps % s.groups), split = int(tile / down / across / taps / s.groups);
    const int first_chunk = split * per_split, rest = all_chunks - first_chunk;
    const int chunks = rest < per_split ? rest : per_split, valid_o = of_group - o0 < BM ? of_group - o0 : BM;
    const int last_c = c0 + BN < f.width ? c0 + BN - 1 : f.width - 1;
    const bool one_og = (group * f.width + c0) / per_og == (group * f.width + last_c) / per_og;
    const int skip = WIDE && !one_og ? BK : 0;  // panels of different offset groups have places of their own
    const chunk_t at{k, c0, k, 0};

    auto copy = [&](int chunk, int stage) {
      const int p = (first_chunk + chunk) * BK, left = f.padded_o - o0;
      const index_t from = p * row_stride + index_t(group) * f.padded_o + o0;
      unsigned char* const to = memory + stage * A_BYTES;
      copy_pixels(to, grad_output + from, row_stride, f.total - p, left);
      if (SPLIT) copy_pixels(to + BK * ROW_BYTES, grad_output_low + from, row_stride, f.total - p, left);
    };
    auto find_places = [&](int chunk) {
#if WIDE
      for (int i = threadIdx.x; i < (one_og ? BK : BK * PANELS); i += THREADS) {
        const int c = c0 + i / BK * BK < f.width ? c0 + i / BK * BK : c0;
        const int m = (first_chunk + chunk) * BK + pixel_of_row<true>(i % BK);
        const place_t place = place_of(samples, m, k, (group * f.width + c) / per_og);
        place_t* const to = places + (chunk % 2 * CHUNK_PLACES + i);
        shared_store(&to->weight, place.weight);
        shared_store(&to->cell, place.cell);
      }
#endif
    };
    using sampler_type = sampler_t<BK, PANELS, true>;
    sampler_type sampler;
    constexpr int UNROLLED = VEC > 1 ? sampler_type::COUNT : 1;  // channel by channel that takes a minute to compile
    auto load = [&](int i, int chunk) {
      sampler.load(i, samples, places + chunk % 2 * CHUNK_PLACES, skip, (first_chunk + chunk) * BK, group, at);
    };
    auto blend = [&](int i, int chunk) {
      sampler.blend(i, B + chunk % 2 * B_BYTES, samples, places + chunk % 2 * CHUNK_PLACES, skip,
                    (first_chunk + chunk) * BK, group, at);
    };
    sums_t sums;
    sums.clear();
    if (chunks > 0) find_places(0);
    if (chunks > 1) find_places(1);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
      if (stage < chunks) copy(stage, stage);
      cp_async_commit();
    }
    __syncthreads();  // the places of the first chunks are there
    if (chunks > 0) {
#pragma unroll UNROLLED
      for (int i = 0; i < sampler_type::COUNT; i++) {
        load(i, 0);
        blend(i, 0);
      }
    }
    int stage = 0;
    for (int chunk = 0; chunk < chunks; chunk++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // this chunk's tiles and the next one's places are there; those of the last are used up
      if (chunk + STAGES - 1 < chunks) copy(chunk + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
      cp_async_commit();
      if (chunk + 2 < chunks) find_places(chunk + 2);
#if SPLIT
      sums_t part;  // of this chunk alone, as above
      part.clear();
#else
      sums_t& part = sums;
#endif
#pragma unroll
      for (int step = 0; step < 4; step++) {
        const int first = step * sampler_type::AT_ONCE, last = first + sampler_type::AT_ONCE;
        if (VEC > 1 && chunk + 1 < chunks) {
#pragma unroll
          for (int i = first; i < last && i < sampler_type::COUNT; i++) load(i, chunk + 1);
        }
        multiply_pixels(part, memory + stage * A_BYTES, B + chunk % 2 * B_BYTES, step);
        if (VEC > 1 && chunk + 1 < chunks) {
#pragma unroll
          for (int i = first; i < last && i < sampler_type::COUNT; i++) blend(i, chunk + 1);
        }
      }
      if (VEC == 1 && chunk + 1 < chunks) {
#pragma unroll UNROLLED
        for (int i = 0; i < sampler_type::COUNT; i++) blend(i, chunk + 1);
      }
#if SPLIT
      sums.add(part);
#endif
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    acc_t* const to = result + ((index_t(split) * f.O + group * of_group + o0) * taps + k) * f.width + c0;
    each_sum(sums, [&](int o, int c, acc_t sum) {
      if (o >= valid_o || c0 + c >= f.width) return;
      acc_t& total = to[index_t(o) * taps * f.width + c];
      total = adds ? total + sum : sum;
    });
    __syncthreads();  // the tiles and places are used up
  }
}
