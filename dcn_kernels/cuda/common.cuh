// Types and memory access shared by all kernels.
//
// NVRTC compiles these sources for GPUs; the tests compile the same text with g++ (CUDA_HOST) and run it on the CPU.
// Compile-time flags are types (scalar_t, offset_t, ...) and small numbers (VEC); sizes are arguments.
#ifndef CUDA_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// the 1 asks for no more than one block on a multiprocessor: without it the compiler spills registers to fit more
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads, 1) name
#define SHARED(type, name, dims) __shared__ type name dims
#define CHECK_ALIGNED(pointer, bytes)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)
#endif

using index_t = long long;  // of elements: tensors of more than 2^31 elements work

template <typename T>
struct accumulator_of {
  using type = float;
};
template <>
struct accumulator_of<double> {
  using type = double;
};

// N consecutive elements, loaded and stored by one instruction (of up to 16 bytes).
template <typename T, int N>
struct alignas(sizeof(T) * N) vec {
  T v[N];
};

template <int N, typename T>
__device__ __forceinline__ vec<T, N> load(const T* from) {
  CHECK_ALIGNED(from, sizeof(vec<T, N>));
  return *reinterpret_cast<const vec<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const vec<T, N>& values) {
  CHECK_ALIGNED(to, sizeof(vec<T, N>));
  *reinterpret_cast<vec<T, N>*>(to) = values;
}

// Loads or stores N elements in pieces of at most 16 bytes: a vector of halves has accumulators of 32 bytes.
template <int N, typename T>
__device__ __forceinline__ void load_accumulators(const T* from, T (&values)[N]) {
  constexpr int PIECE = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
  for (int i = 0; i < N; i += PIECE) {
    const vec<T, PIECE> piece = load<PIECE>(from + i);
    for (int j = 0; j < PIECE; j++) values[i + j] = piece.v[j];
  }
}

// A finite x in TF32's 11 significant bits, rounded to nearest.
__device__ __forceinline__ float tf32_round(float x) {
  const unsigned bits = __float_as_uint(x);
  const bool rounds_up = (bits & 0x7fffffffu) < 0x7f7ff000u;  // else it would reach infinity
  return __uint_as_float((bits + (rounds_up ? 0x1000u : 0u)) & 0xffffe000u);
}

// x = high + low to about 2^-22, both TF32 numbers. What is not finite stands in `low`, beside a `high` of 1 and its
// sign: the other way round infinity would meet the other factor's `low`, often 0, and their product is not a number.
__device__ __forceinline__ void tf32_split(float x, float& high, float& low) {
  const unsigned bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  high = finite ? tf32_round(x) : __uint_as_float((bits & 0x80000000u) | 0x3f800000u);
  low = finite ? tf32_round(x - high) : x + x;  // the sum: a NaN in bits that TF32 has
}

// Adds to N consecutive elements that other threads add to at the same time.
template <int N>
__device__ __forceinline__ void atomic_add(double* to, const double (&values)[N]) {
  for (int i = 0; i < N; i++) atomicAdd(to + i, values[i]);
}

template <int N>
__device__ __forceinline__ void atomic_add(float* to, const float (&values)[N]) {
#if defined(VECTOR_ATOMICS) && VECTOR_ATOMICS
  if (N % 4 == 0) {
    CHECK_ALIGNED(to, 16);
    for (int i = 0; i + 3 < N; i += 4)
      atomicAdd(reinterpret_cast<float4*>(to + i), make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    return;
  }
#endif
  for (int i = 0; i < N; i++) atomicAdd(to + i, values[i]);
}

// The sum over the `lanes` neighbouring threads of a warp (a power of two), in a fixed order, given to each of them.
template <typename T>
__device__ __forceinline__ T sum_over_lanes(T value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
