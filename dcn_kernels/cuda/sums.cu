// Sums over pixels in parts, and of the parts in order: repeatable, without atomics.
#include "common.cuh"

#define THREADS 256
using acc_t = accumulator_of<scalar_t>::type;

// sums[split, o] = sum of grad_output[o, p] over the split's pixels p. A block owns one element.
KERNEL(bias_gradient, THREADS)
(const scalar_t* __restrict__ grad_output,  // [images, O, OH, OW] by strides
 acc_t* __restrict__ sums,                  // [splits, O]
 const int O, const int total, const int OH, const int OW, const int splits, const index_t stride_n,
 const index_t stride_o, const index_t stride_y, const index_t stride_x) {  // total: images * OH * OW
  SHARED(acc_t, of_warp, [THREADS / 32]);
  const int per_split = (total + splits - 1) / splits;
  for (index_t part = blockIdx.x; part < index_t(O) * splits; part += gridDim.x) {
    const int o = int(part % O), split = int(part / O);
    const int begin = split * per_split, end = total - begin < per_split ? total : begin + per_split;
    acc_t sum = 0;
    for (int m = begin + int(threadIdx.x); m < end; m += THREADS) {
      const int n = m / (OH * OW), p = m - n * (OH * OW), y = p / OW;
      sum += acc_t(grad_output[n * stride_n + o * stride_o + y * stride_y + (p - y * OW) * stride_x]);
    }
    sum = sum_over_lanes(sum, 32);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();  // every warp's sum is there
    if (threadIdx.x == 0) {
      acc_t all = 0;
      for (int warp = 0; warp < THREADS / 32; warp++) all += of_warp[warp];
      sums[part] = all;
    }
    __syncthreads();  // the sums are used up
  }
}

// grad_weight[o, c, k] and grad_bias[o]: the sums of their splits, in order. A thread owns an element.
KERNEL(ordered_sums, THREADS)
(const acc_t* __restrict__ weight_sums,  // [weight_splits, O, taps, width]
 scalar_t* __restrict__ grad_weight,     // [O, width, taps]; null: not wanted
 const acc_t* __restrict__ bias_sums,    // [bias_splits, O]
 scalar_t* __restrict__ grad_bias,       // [O]; null: not wanted
 const int O, const int taps, const int width, const int weight_splits, const int bias_splits) {
  const index_t of_weight = grad_weight != nullptr ? index_t(O) * taps * width : 0;
  const index_t count = of_weight + (grad_bias != nullptr ? O : 0);
  for (index_t i = index_t(blockIdx.x) * THREADS + threadIdx.x; i < count; i += index_t(gridDim.x) * THREADS) {
    acc_t sum = 0;
    if (i < of_weight) {
      for (int split = 0; split < weight_splits; split++) sum += weight_sums[split * of_weight + i];
      const index_t o = i / (taps * width);
      const int in_filter = int(i - o * (taps * width)), k = in_filter / width, c = in_filter - k * width;
      grad_weight[(o * width + c) * taps + k] = scalar_t(sum);
    } else {
      const int o = int(i - of_weight);
      for (int split = 0; split < bias_splits; split++) sum += bias_sums[index_t(split) * O + o];
      grad_bias[o] = scalar_t(sum);
    }
  }
}
