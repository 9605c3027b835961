// Deformable convolution as one product: rows are pixels, columns output channels, the summed axis channels by taps.
// Samples go straight into the product's tile in shared memory; they are nowhere in global memory.
#include "common.cuh"
#include "taps.cuh"

#include "matrix_units.cuh"
#include "product_tiles.cuh"
#include "sampled_tiles.cuh"

#define PLACES (WIDE ? TAPS * BM : 0)              // kept at a time
// bytes of a row of the output tile [BN][BM]: with 16 or 32 more, what a warp stores lies in all banks
#define OUT_ROW (BM * int(sizeof(scalar_t)) + (sizeof(scalar_t) == 8 ? 32 : 16))
#define TILE_BYTES (2 * A_BYTES + STAGES * B_BYTES)
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
static_assert(LARGER(TILE_BYTES, BN * OUT_ROW) + PLACES * int(sizeof(place_t)) == SHARED_BYTES, "as the launcher says");

// y[n, o, p] = bias[o] + sum over k, c of weight[o, k, c] m_k(p) x_c(p + p_k + dp_k): Eq. 2.
//
// A block owns BM pixels of BN output channels of a convolution group at a time; every element of y is written once.
// A chunk of the sum is BK channels of one tap. While chunk i is multiplied, the corners of chunk i+1 are loaded and
// blended into the other A tile, and the weights of chunk i+STAGES-1 are copied. Places are computed for a run of TAPS
// taps and one offset group at once.
KERNEL(deform_conv_forward, THREADS)
(const scalar_t* __restrict__ input,   // [images, C, H, W] by strides; VEC > 1: channels last, aligned
 const offset_t* __restrict__ offset,  // [images, 2*OG*KH*KW, OH, OW] by strides
 const mask_t* __restrict__ mask,      // [images, OG*KH*KW, OH, OW] by strides, or null: all ones
 const scalar_t* __restrict__ weight,  // [PARTS, O, KH*KW, padded], zeros from C/groups on
 const scalar_t* __restrict__ bias,    // [O] by stride, or null: all zeros
 scalar_t* __restrict__ y,             // [images, O, OH, OW] by strides
 const conv_t s, const product_t f) {
  DYNAMIC_SHARED(memory, SHARED_BYTES);
  unsigned char* const A = memory;
  unsigned char* const B = memory + 2 * A_BYTES;
  place_t* const places = reinterpret_cast<place_t*>(memory + SHARED_BYTES - PLACES * int(sizeof(place_t)));
  const samples_t samples = {input, offset, mask, s, f};
  const int taps = s.KH * s.KW, chunks = taps * ((f.width + BK - 1) / BK), per_og = s.C / s.OG;
  const int of_group = f.O / s.groups, across = (of_group + BN - 1) / BN, columns = across * s.groups;
  const index_t tiles = index_t((f.total + BM - 1) / BM) * columns;

  for (index_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int column = int(tile % columns), group = column / across, o0 = column % across * BN;
    const int m0 = int(tile / columns) * BM, valid_o = of_group - o0 < BN ? of_group - o0 : BN;
    const int first_o = group * of_group + o0;
    const index_t weight_row = index_t(taps) * f.padded;

    auto copy_weights = [&](const chunk_t& at, int stage) {
      const index_t from = first_o * weight_row + index_t(at.k) * f.padded + at.c;
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        copy_tile<BN>(B + stage * B_BYTES + part * BN * ROW_BYTES, weight + (from + part * f.O * weight_row), weight_row,
                      valid_o, f.padded - at.c);
    };
    auto find_places = [&](const chunk_t& at) {
#if WIDE
      const int run = taps - at.k0 < TAPS ? taps - at.k0 : TAPS, og = (group * f.width + at.c) / per_og;
      for (int i = threadIdx.x; i < BM * run; i += THREADS) {
        const place_t place = place_of(samples, m0 + i % BM, at.k0 + i / BM, og);
        shared_store(&places[i].weight, place.weight);
        shared_store(&places[i].cell, place.cell);
      }
      __syncthreads();  // the places are there
#endif
    };

    sums_t sums;
    sums.clear();
    using sampler_type = sampler_t<BM, 1, false>;
    sampler_type sampler;
    const lane_t lane = lane_rows();
    chunk_t next{}, loaded{};  // chunks i+1 and i+STAGES-1
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
      if (stage < chunks) copy_weights(loaded, stage);
      loaded.advance(taps, f.width, per_og);
      cp_async_commit();
    }
    find_places(next);
#pragma unroll
    for (int i = 0; i < sampler_type::COUNT; i++) {
      sampler.load(i, samples, places, 0, m0, group, next);
      sampler.blend(i, A, samples, places, 0, m0, group, next);
    }
    int stage = 0;
    for (int chunk = 0; chunk < chunks; chunk++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // this chunk's tiles are there; those of the last are used up
      if (chunk + STAGES - 1 < chunks) copy_weights(loaded, stage == 0 ? STAGES - 1 : stage - 1);
      cp_async_commit();
      loaded.advance(taps, f.width, per_og);
      next.advance(taps, f.width, per_og);
      if (chunk + 1 < chunks && next.begins()) find_places(next);
      const place_t* const run = places + (next.k - next.k0) * BM;
      const unsigned char* const a = A + chunk % 2 * A_BYTES;
      const unsigned char* const b = B + stage * B_BYTES;
      unsigned char* const ahead = A + (chunk + 1) % 2 * A_BYTES;
      // With places in shared memory the last chunk samples once more, into the tile that nobody reads: so loads,
      // products and blending are one run of instructions for the compiler to interleave.
      const bool more = (WIDE && VEC > 1) || chunk + 1 < chunks;
#if SPLIT
      sums_t part;  // of this chunk alone: the matrix units round towards zero, the additions below to nearest
      part.clear();
#else
      sums_t& part = sums;
#endif
#pragma unroll
      for (int step = 0; step < 4; step++) {
        const int first = step * sampler_type::AT_ONCE, last = first + sampler_type::AT_ONCE;
        if (more) {
#pragma unroll
          for (int i = first; i < last && i < sampler_type::COUNT; i++)
            sampler.load(i, samples, run, 0, m0, group, next);
        }
        multiply_step(part, a, b, lane, step);
        if (more) {
#pragma unroll
          for (int i = first; i < last && i < sampler_type::COUNT; i++)
            sampler.blend(i, ahead, samples, run, 0, m0, group, next);
        }
      }
#if SPLIT
      sums.add(part);
#endif
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();  // the tiles are used up: their memory takes the output, [BN][BM]

    each_sum(sums, [&](int row, int o, acc_t sum) {
      const acc_t b = bias != nullptr && o < valid_o ? acc_t(bias[(first_o + o) * f.bias_o]) : acc_t(0);
      shared_store(reinterpret_cast<scalar_t*>(memory + o * OUT_ROW) + row, scalar_t(sum + b));
    });
    __syncthreads();  // the output tile is there
    auto write = [&](int row, int o) {
      const int m = m0 + row, p = m % s.pixels;
      if (m >= f.total || o >= valid_o) return;
      y[m / s.pixels * f.y_n + (first_o + o) * f.y_o + p / s.OW * f.y_y + p % s.OW * f.y_x] =
          shared_load<scalar_t>(reinterpret_cast<const scalar_t*>(memory + o * OUT_ROW) + row);
    };
    if (f.y_o == 1)  // neighbouring threads write neighbouring elements
      for (int i = threadIdx.x; i < BM * BN; i += THREADS) write(i / BN, i % BN);
    else
      for (int i = threadIdx.x; i < BM * BN; i += THREADS) write(i % BM, i / BM);
    __syncthreads();  // the output tile is used up
  }
}
