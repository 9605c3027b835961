// In place of CuPy's complex.cuh, which g++ does not take: what its other headers and kernels use of CUDA.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>

#undef __shared__
#define __shared__ static  // blocks run one after another
#define __popcll __builtin_popcountll
#undef __shfl_xor_sync
#define __shfl_xor_sync(mask, value, distance, ...) host::shuffle_xor(mask, value, distance, __LINE__)
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
template <typename T>
struct complex {};
