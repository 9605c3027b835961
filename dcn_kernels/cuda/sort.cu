// A stable radix sort of (key, value) pairs: BITS bits a pass from the lowest, each pass counts, scans and places.
// Stable and free of races in its result, so what is summed in its order is bitwise repeatable.
#include "common.cuh"

#define THREADS 256
#define BITS 8
#define DIGITS 256  // one a thread
#define WARPS (THREADS / 32)

__device__ __forceinline__ int digit_of(index_t key, int shift) { return int(key >> shift) & (DIGITS - 1); }

// counts[block, digit]: how many keys of the block's own stretch have the digit.
KERNEL(sort_count, THREADS)
(const index_t* __restrict__ keys,  // [count]
 index_t* __restrict__ counts,      // [gridDim.x, DIGITS]
 const index_t count, const int shift, const index_t stretch) {
  SHARED(int, histogram, [DIGITS]);
  histogram[threadIdx.x] = 0;
  __syncthreads();  // all zero
  const index_t start = blockIdx.x * stretch, end = start + stretch < count ? start + stretch : count;
  for (index_t i = start + threadIdx.x; i < end; i += THREADS)
    atomicAdd(&histogram[digit_of(keys[i], shift)], 1);  // atomic: other threads of the block have the same digit
  __syncthreads();  // all counted
  counts[blockIdx.x * index_t(DIGITS) + threadIdx.x] = histogram[threadIdx.x];
}

// counts[block, digit] becomes where the block's first key of the digit goes. One block; a thread owns a digit.
KERNEL(sort_scan, THREADS)
(index_t* __restrict__ counts,  // [blocks, DIGITS]
 const int blocks) {
  SHARED(index_t, totals, [DIGITS]);
  index_t total = 0;
  for (int block = 0; block < blocks; block++) total += counts[block * index_t(DIGITS) + threadIdx.x];
  totals[threadIdx.x] = total;
  __syncthreads();  // all totals are there
  index_t before = 0;
  for (int digit = 0; digit < int(threadIdx.x); digit++) before += totals[digit];
  for (int block = 0; block < blocks; block++) {
    const index_t own = counts[block * index_t(DIGITS) + threadIdx.x];
    counts[block * index_t(DIGITS) + threadIdx.x] = before;
    before += own;
  }
}

// Each key and value goes to its place: after the smaller digits, and after its digit's earlier keys.
KERNEL(sort_place, THREADS)
(const index_t* __restrict__ keys,    // [count]
 const int* __restrict__ values,      // [count], or null: 0, 1, 2, ...
 index_t* __restrict__ sorted_keys,   // [count]
 int* __restrict__ sorted_values,     // [count]
 const index_t* __restrict__ places,  // [gridDim.x, DIGITS] from sort_scan
 const index_t count, const int shift, const index_t stretch) {
  SHARED(index_t, next, [DIGITS]);         // the place of the digit's next key
  SHARED(int, held, [WARPS][DIGITS]);      // how many keys of the digit each warp holds in this round
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  next[threadIdx.x] = places[blockIdx.x * index_t(DIGITS) + threadIdx.x];
  const index_t start = blockIdx.x * stretch, end = start + stretch < count ? start + stretch : count;
  for (index_t round = start; round < end; round += THREADS) {
    for (int w = 0; w < WARPS; w++) held[w][threadIdx.x] = 0;
    __syncthreads();  // all zero
    const index_t i = round + threadIdx.x;
    const bool mine = i < end;
    const index_t key = mine ? keys[i] : 0;
    const int digit = digit_of(key, shift);
    unsigned same = __ballot_sync(0xffffffffu, mine);  // lanes with this thread's digit
    for (int bit = 0; bit < BITS; bit++) {
      const unsigned set = __ballot_sync(0xffffffffu, digit >> bit & 1);
      same &= digit >> bit & 1 ? set : ~set;
    }
    const int rank = __popc(same & ((1u << lane) - 1));  // earlier ones in the warp
    if (mine && rank == 0) held[warp][digit] = __popc(same);
    __syncthreads();  // all warps' counts are there
    index_t place = next[digit] + rank;
    for (int w = 0; w < warp; w++) place += held[w][digit];
    if (mine) {
      sorted_keys[place] = key;
      sorted_values[place] = values == nullptr ? int(i) : values[i];
    }
    __syncthreads();  // the counts and the places were read
    for (int w = 0; w < WARPS; w++) next[threadIdx.x] += held[w][threadIdx.x];
  }
}
