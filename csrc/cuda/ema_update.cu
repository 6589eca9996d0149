// xi <- tau xi + (1 - tau) theta, in place, over a whole list of tensors.
//
// Bound by memory: 3 x the element size per element (read xi and theta, write xi). For a list of a few hundred tensors,
// launches would cost more than memory traffic, so a launch updates 120 pairs of tensors of any size. Their addresses
// are kernel parameters, limited to 4 KB, so no table is copied to the device, and a CUDA graph stores them. A block
// finds its pair by binary search. Its tile is 4 packs of 16 bytes per thread: enough loads in flight, little waste on
// small tensors.
//
// 16-bit tensors are computed in fp32 and rounded once.
#include "cuda_kernel.h"
#include "cuda_launch.h"

namespace dspnet::cuda {
inline namespace ema_update_kernels { // named: NVRTC drops kernels in anonymous namespaces

constexpr int kPairs = 120;
template <typename scalar_t>
constexpr int64_t kTile = 4 * kThreads * kPackWidth<scalar_t>; // elements

struct Pairs {
  void* target[kPairs];
  const void* online[kPairs];
  int64_t size[kPairs]; // elements, more than 0
  int64_t first_block[kPairs + 1];
  int count;
};
static_assert(sizeof(Pairs) <= 4096 - 64, "exceeds the size of kernel parameters");

// from_target: interpolate from the target, with weight = 1 - tau; otherwise from online, with weight = tau.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    ema_update_kernel(const __grid_constant__ Pairs pairs, compute_t<scalar_t> weight, bool from_target) {
  using compute = compute_t<scalar_t>;
  constexpr int pack_width = kPackWidth<scalar_t>;
  const int pair = last_at_most(pairs.first_block, pairs.count, blockIdx.x);
  const int64_t size = pairs.size[pair];
  const int64_t begin = (blockIdx.x - pairs.first_block[pair]) * kTile<scalar_t>;
  const int64_t end = size - begin < kTile<scalar_t> ? size : begin + kTile<scalar_t>;
  scalar_t* target = static_cast<scalar_t*>(pairs.target[pair]);
  const scalar_t* online = static_cast<const scalar_t*>(pairs.online[pair]);

  const auto step = [&](auto constant, int64_t i) {
    constexpr int width = decltype(constant)::width;
    Pack<scalar_t, width> xi = load<width>(target + i);
    const Pack<scalar_t, width> theta = load<width>(online + i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const compute x = upcast(xi.at[j]), t = upcast(theta.at[j]);
      // Interpolating from the nearer end keeps rounding errors small, and tau = 0 and tau = 1 exact.
      downcast(from_target ? multiply_add(weight, t - x, x) : multiply_add(weight, x - t, t), xi.at[j]);
    }
    store(target + i, xi);
  };
  const int aligned = first_aligned(target);
  if (aligned == first_aligned(online)) {
    for_range<pack_width>(begin, end, aligned, step);
  } else {
    for_range<1>(begin, end, 0, step);
  }
}

#ifndef __CUDACC_RTC__

template <typename scalar_t>
const char* update(const EmaPair* pairs, int64_t count, double tau, cudaStream_t stream) {
  const bool from_target = tau > 0.5;
  const auto weight = static_cast<compute_t<scalar_t>>(from_target ? 1 - tau : tau);
  Pairs parameters;
  parameters.count = 0;
  parameters.first_block[0] = 0;
  const auto flush = [&]() -> const char* {
    const int64_t blocks = parameters.first_block[parameters.count];
    const char* error = launch(&ema_update_kernel<scalar_t>, blocks, stream, parameters, weight, from_target);
    parameters.count = 0;
    return error;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (pairs[i].size == 0) {
      continue;
    }
    const int at = parameters.count++;
    parameters.target[at] = pairs[i].target;
    parameters.online[at] = pairs[i].online;
    parameters.size[at] = pairs[i].size;
    parameters.first_block[at + 1] =
        parameters.first_block[at] + (pairs[i].size + kTile<scalar_t> - 1) / kTile<scalar_t>;
    if (parameters.count == kPairs) {
      if (const char* error = flush()) {
        return error;
      }
    }
  }
  return flush();
}

#else

// NVRTC compiles instantiated templates only.
template __global__ void ema_update_kernel<double>(const __grid_constant__ Pairs, double, bool);
template __global__ void ema_update_kernel<float>(const __grid_constant__ Pairs, float, bool);
template __global__ void ema_update_kernel<__half>(const __grid_constant__ Pairs, float, bool);
template __global__ void ema_update_kernel<__nv_bfloat16>(const __grid_constant__ Pairs, float, bool);

#endif

} // namespace ema_update_kernels

#ifndef __CUDACC_RTC__

const char* ema_update(DType dtype, const EmaPair* pairs, int64_t count, double tau, cudaStream_t stream) {
  switch (dtype) {
    case DType::f64:
      return update<double>(pairs, count, tau, stream);
    case DType::f32:
      return update<float>(pairs, count, tau, stream);
    case DType::f16:
      return update<__half>(pairs, count, tau, stream);
    default:
      return update<__nv_bfloat16>(pairs, count, tau, stream);
  }
}

#endif

} // namespace dspnet::cuda
