// Makes g++ compile the kernels: included before each of them. What it defines is what they use; a kernel that needs
// more of CUDA (another intrinsic, another atomic) adds it here.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.hpp"

#define CUDA_HOST 1
// NVIDIA's own types: pip's nvidia-cuda-runtime and nvidia-cuda-crt
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

#define KERNEL(name, threads) static void name
#define SHARED(type, name, dims) auto& name = host::shared_array<__COUNTER__, type dims>()
#define CHECK_ALIGNED(pointer, bytes) host::check_aligned(pointer, bytes, __LINE__)
#define NOT_A_NUMBER std::numeric_limits<float>::quiet_NaN()

#define threadIdx (host::thread_index())
#define blockIdx (host::block_index())
#define blockDim (host::block_size())
#define gridDim (host::grid_size())
#define __syncthreads() host::sync_block(__LINE__)
#define __syncwarp() host::sync_warp(__LINE__)
#define __shfl_xor_sync(mask, value, distance) host::shuffle_xor(mask, value, distance, __LINE__)
#define __ballot_sync(mask, predicate) host::ballot(mask, predicate, __LINE__)

using std::ceil;
using std::floor;
using std::round;

// -ffp-contract=off: each is rounded
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename To, typename From>
inline To bits_as(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }

namespace host {
inline void check_aligned(const void* pointer, size_t bytes, int line) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("a vector access is not aligned", line);
}

template <int ID, typename T>
T& shared_array() {
  return *static_cast<T*>(shared(ID, sizeof(T)));
}

inline void sync_warp(int line) {
  meet(0xffffffffu, nullptr, line, [](void**) {}, true);
}

template <typename T>
T shuffle_xor(unsigned mask, T value, int distance, int line) {
  struct Payload {
    T value, result;
    int distance, line;
  } mine{value, value, distance, line};
  meet(
      mask, &mine, line,
      [](void** all) {
        for (int lane = 0; lane < 32; lane++) {
          auto* me = static_cast<Payload*>(all[lane]);
          if (me == nullptr) continue;
          auto* other = static_cast<Payload*>(all[lane ^ me->distance]);
          if (other == nullptr) fail("a shuffle reads a lane outside the mask", me->line);
          me->result = other->value;
        }
      },
      false);
  return mine.result;
}

inline unsigned ballot(unsigned mask, bool predicate, int line) {
  struct Payload {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  meet(
      mask, &mine, line,
      [](void** all) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; lane++)
          if (all[lane] && static_cast<Payload*>(all[lane])->predicate) votes |= 1u << lane;
        for (int lane = 0; lane < 32; lane++)
          if (all[lane]) static_cast<Payload*>(all[lane])->result = votes;
      },
      false);
  return mine.result;
}

template <typename T>
T add_atomically(T* to, T value) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits* at = reinterpret_cast<Bits*>(to);
  Bits old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &old, bits_as<Bits>(bits_as<T>(old) + value), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return bits_as<T>(old);
}

// Calls a kernel with arguments as cuLaunchKernel takes them: one pointer to each. `sizes` are the caller's, checked;
// null where the caller knows no more than cuLaunchKernel does.
template <typename... P, size_t... I>
void launch(const char* name, void (*kernel)(P...), unsigned blocks, unsigned threads, void** arguments,
            const size_t* sizes, size_t count, std::index_sequence<I...>) {
  constexpr size_t expected[] = {sizeof(P)...};
  if (sizes && count != sizeof...(P)) fail("a launch with the wrong number of arguments", int(count));
  for (size_t i = 0; sizes && i < count; i++)
    if (sizes[i] != expected[i]) fail("a launch with an argument of the wrong size", int(i));
  auto bound = std::make_tuple(kernel, *static_cast<std::remove_const_t<P>*>(arguments[I])...);
  run(
      name,
      [](void* all) {
        std::apply([](auto f, auto... values) { f(values...); }, *static_cast<decltype(bound)*>(all));
      },
      &bound, {blocks, 1, 1}, {threads, 1, 1});
}
}  // namespace host

#include "matrix_host.hpp"

template <typename T>
inline T atomicAdd(T* to, T value, int site = __builtin_LINE()) {
  host::trace(host::ATOMIC, to, sizeof(T), site);
  return host::add_atomically(to, value);
}
inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline void atomicAdd(float4* to, float4 value, int site = __builtin_LINE()) {
  host::trace(host::ATOMIC, to, sizeof(float4), site);  // one access; each of the four is atomic, together they are not
  float* at = reinterpret_cast<float*>(to);
  host::add_atomically(at, value.x);
  host::add_atomically(at + 1, value.y);
  host::add_atomically(at + 2, value.z);
  host::add_atomically(at + 3, value.w);
}

template <typename... P>
void host_launch(const char* name, void (*kernel)(P...), unsigned blocks, unsigned threads, void** arguments,
                 const size_t* sizes, size_t count) {
  host::launch(name, kernel, blocks, threads, arguments, sizes, count, std::index_sequence_for<P...>{});
  host::check_that_all_copies_are_done();
}

// The entry that Python calls; the build appends one for each kernel of a file.
#define EXPORT(kernel)                                                                                              \
  extern "C" void host_##kernel(unsigned blocks, unsigned threads, void** arguments, const size_t* sizes,           \
                                size_t count) {                                                                     \
    host_launch(#kernel, kernel, blocks, threads, arguments, sizes, count);                                         \
  }
