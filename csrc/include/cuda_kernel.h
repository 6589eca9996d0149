// Device code shared by the kernels: dtype conversion, 16-byte loads, range loops, block sums. NVRTC compiles it too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef __CUDACC_RTC__
typedef long int64_t;
typedef unsigned long uintptr_t;
#else
#include <cstdint>
#endif

#include "cuda_dtype.h"

namespace dspnet::cuda {

constexpr int kThreads = 256; // of every block
constexpr int kWarp = 32;

// --- Dtype conversion: 16-bit elements are computed in fp32 and rounded once -----------------------------------------
template <typename scalar_t>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename scalar_t>
using compute_t = typename ComputeType<scalar_t>::type;

__device__ inline float upcast(float value) {
  return value;
}
__device__ inline double upcast(double value) {
  return value;
}
__device__ inline float upcast(__half value) {
  return __half2float(value);
}
__device__ inline float upcast(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

__device__ inline void downcast(float value, float& to) {
  to = value;
}
__device__ inline void downcast(double value, double& to) {
  to = value;
}
__device__ inline void downcast(float value, __half& to) {
  to = __float2half_rn(value);
}
__device__ inline void downcast(float value, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(value);
}

__device__ inline double read(const DeviceScalar& scalar) {
  switch (scalar.dtype) {
    case DType::f64:
      return *static_cast<const double*>(scalar.data);
    case DType::f32:
      return *static_cast<const float*>(scalar.data);
    case DType::f16:
      return upcast(*static_cast<const __half*>(scalar.data));
    default:
      return upcast(*static_cast<const __nv_bfloat16*>(scalar.data));
  }
}

__device__ inline float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ inline double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// --- Vectorised loads and stores -------------------------------------------------------------------------------------
template <typename scalar_t>
constexpr int kPackWidth = 16 / sizeof(scalar_t); // elements in a 16-byte load

template <typename scalar_t, int width>
struct alignas(sizeof(scalar_t) * width) Pack {
  scalar_t at[width];
};

template <int width, typename scalar_t>
__device__ inline Pack<scalar_t, width> load(const scalar_t* from) {
  return *reinterpret_cast<const Pack<scalar_t, width>*>(from);
}
template <int width, typename scalar_t>
__device__ inline void store(scalar_t* to, const Pack<scalar_t, width>& pack) {
  *reinterpret_cast<Pack<scalar_t, width>*>(to) = pack;
}

// The index of the first element at or after a pointer that is aligned to 16 bytes.
template <typename scalar_t>
__host__ __device__ inline int first_aligned(const scalar_t* pointer) {
  constexpr int width = kPackWidth<scalar_t>;
  return (width - static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(scalar_t) % width)) % width;
}

template <int value>
struct Constant {
  static constexpr int width = value;
};

// Distributes the indices [begin, end) over the threads of a block: calls run(Constant<width>, i) for i .. i + width -
// 1, with i equal to `aligned` plus a multiple of width, and run(Constant<1>, i) for the remaining indices at either
// end.
template <int width, typename Run>
__device__ inline void for_range(int64_t begin, int64_t end, int aligned, const Run& run) {
  const int64_t skipped = begin + ((aligned - begin) & (width - 1));
  const int64_t head = skipped < end ? skipped : end;
  const int64_t tail = head + (end - head) / width * width;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t i = head + thread * width; i < tail; i += kThreads * width) {
    run(Constant<width>{}, i);
  }
  if constexpr (width > 1) {
    if (thread < width) {
      if (begin + thread < head) {
        run(Constant<1>{}, begin + thread);
      }
    } else if (thread < 2 * width && tail + thread - width < end) {
      run(Constant<1>{}, tail + thread - width);
    }
  }
}

// The index of the last of `count` ascending values that is <= value; values[0] must be.
__device__ inline int last_at_most(const int64_t* values, int count, int64_t value) {
  int low = 0, high = count; // values[low] <= value < values[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (values[middle] <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// --- Sums in a fixed order: results are reproducible -----------------------------------------------------------------
// The sum over a warp, in every lane.
__device__ inline double warp_sum(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The sum over a block, in thread 0. All threads must call it. `parts` is shared memory that no other call uses.
__device__ inline double block_sum(double value, double (&parts)[kThreads / kWarp]) {
  const int lane = threadIdx.x % kWarp;
  value = warp_sum(value);
  if (lane == 0) {
    parts[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      value += parts[warp];
    }
  }
  return value;
}

} // namespace dspnet::cuda
