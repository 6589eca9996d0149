// One LARS step and the following EMA update of the target, in place on flat buffers:
//
//   adapted segments: g' = g + wd p, q = eta |p| / |g'| (1 if either is 0); every other element: g' = g, q = 1
//   m = mu m + q g'        p = p - lr m        xi = tau xi + (1 - tau) p        g = 0
//
// If `apply` is false, only g = 0.
//
// Bound by memory, fp32: pass 1 reads p and g, 8 bytes per element, for the norms; pass 2 reads p, g, m, xi and writes
// them, 32 bytes.
//
// A block processes one tile (cuda_flat_step.h), whose elements share one q.
//
// Sums are double, since squares of small fp32 gradients would underflow. One block per region adds up the tiles' sums
// in a fixed order, so results are reproducible.
#include "cuda_flat_step.h"
#include "cuda_launch.h"

namespace dspnet::cuda {
inline namespace lars_ema_step_kernels { // named: NVRTC drops kernels in anonymous namespaces

struct Squares {
  double p;
  double g; // of g'
};

// Pass 1. width: elements per load. aligned: the first index at which all buffers are aligned to 16 bytes.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads) squares_kernel(
    const __grid_constant__ Regions regions,
    const scalar_t* __restrict__ params,
    const scalar_t* __restrict__ grads,
    int aligned,
    scalar_t weight_decay,
    Squares* __restrict__ sums) { // per block
  const Tile tile = tile_of(regions, blockIdx.x);
  if (!regions.in_segment[tile.region]) {
    return;
  }
  double p_squares = 0, g_squares = 0;
  for_range<width>(tile.begin, tile.end, aligned, [&](auto constant, int64_t i) {
    constexpr int loaded = decltype(constant)::width;
    const Pack<scalar_t, loaded> p = load<loaded>(params + i), g = load<loaded>(grads + i);
#pragma unroll
    for (int j = 0; j < loaded; ++j) {
      const double weight = p.at[j];
      const double update = multiply_add(weight_decay, p.at[j], g.at[j]);
      p_squares += weight * weight;
      g_squares += update * update;
    }
  });
  __shared__ double parts_p[kThreads / kWarp];
  __shared__ double parts_g[kThreads / kWarp];
  p_squares = block_sum(p_squares, parts_p);
  g_squares = block_sum(g_squares, parts_g);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = {p_squares, g_squares};
  }
}

// Computes q of every region, one block per region.
__global__ void __launch_bounds__(kThreads) trust_kernel(
    const __grid_constant__ Regions regions, const Squares* __restrict__ sums, double eta, double* __restrict__ trust) {
  const int region = static_cast<int>(blockIdx.x);
  if (!regions.in_segment[region]) {
    return;
  }
  double p_squares = 0, g_squares = 0;
  for (int64_t i = regions.first_block[region] + threadIdx.x; i < regions.first_block[region + 1]; i += kThreads) {
    p_squares += sums[i].p;
    g_squares += sums[i].g;
  }
  __shared__ double parts_p[kThreads / kWarp];
  __shared__ double parts_g[kThreads / kWarp];
  p_squares = block_sum(p_squares, parts_p);
  g_squares = block_sum(g_squares, parts_g);
  if (threadIdx.x == 0) {
    const bool either_is_zero = p_squares == 0 || g_squares == 0;
    trust[region] = either_is_zero ? 1 : eta * sqrt(p_squares) / sqrt(g_squares);
  }
}

// Pass 2.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads) update_kernel(
    const __grid_constant__ Regions regions,
    Buffers<scalar_t> buffers,
    int aligned,
    DeviceScalar lr,
    DeviceScalar tau,
    const bool* __restrict__ apply, // null means true
    const double* __restrict__ trust,
    scalar_t weight_decay,
    scalar_t momentum) {
  // In reverse order: the tiles that pass 1 read last are still in the L2 cache.
  const Tile tile = tile_of(regions, gridDim.x - 1 - blockIdx.x);
  if (apply && !*apply) {
    zero_gradients<width>(buffers.g, tile, aligned);
    return;
  }
  const bool adapted = regions.in_segment[tile.region];
  const scalar_t q = adapted ? static_cast<scalar_t>(trust[tile.region]) : scalar_t(1);
  const scalar_t decay = adapted ? weight_decay : scalar_t(0);
  const scalar_t minus_lr = static_cast<scalar_t>(-read(lr));
  const TargetUpdate<scalar_t> update_target(read(tau));

  // The buffers do not overlap.
  scalar_t* __restrict__ const p = buffers.p;
  scalar_t* __restrict__ const g = buffers.g;
  scalar_t* __restrict__ const m = buffers.m;
  scalar_t* __restrict__ const xi = buffers.xi;
  for_tile<width>(tile, aligned, buffers.target_size, [&](auto constant, int64_t i, auto has_target) {
    constexpr int loaded = decltype(constant)::width;
    constexpr bool with_target = decltype(has_target)::width != 0;
    Pack<scalar_t, loaded> weights = load<loaded>(p + i), grads = load<loaded>(g + i), momenta = load<loaded>(m + i);
    Pack<scalar_t, loaded> targets;
    if constexpr (with_target) {
      targets = load<loaded>(xi + i);
    }
#pragma unroll
    for (int j = 0; j < loaded; ++j) {
      scalar_t step = grads.at[j];
      if (adapted) { // a branch instead of decay = 0 and q = 1: 0 times a weight that is NaN is NaN
        step = q * multiply_add(decay, weights.at[j], step);
      }
      momenta.at[j] = multiply_add(momentum, momenta.at[j], step);
      weights.at[j] = multiply_add(minus_lr, momenta.at[j], weights.at[j]);
      grads.at[j] = 0;
      if constexpr (with_target) {
        targets.at[j] = update_target(targets.at[j], weights.at[j]);
      }
    }
    store(p + i, weights);
    store(g + i, grads);
    store(m + i, momenta);
    if constexpr (with_target) {
      store(xi + i, targets);
    }
  });
}

#ifndef __CUDACC_RTC__

constexpr int64_t kTrustBytes = (kRegions * sizeof(double) + 15) / 16 * 16;

template <typename scalar_t>
struct Step {
  Buffers<scalar_t> buffers;
  int aligned; // of common_alignment
  LarsOptions options;
  double* trust;
  Squares* sums;
  cudaStream_t stream;

  template <int width>
  const char* run(const Regions& regions) const {
    const int64_t blocks = regions.first_block[regions.count];
    const auto decay = static_cast<scalar_t>(options.weight_decay);
    bool any = false;
    for (int r = 0; r < regions.count; ++r) {
      any = any || regions.in_segment[r];
    }
    const char* error = nullptr;
    if (any) {
      error = launch(
          &squares_kernel<scalar_t, width>, blocks, stream, regions, buffers.p, buffers.g, aligned, decay, sums);
      if (!error) {
        error = launch(&trust_kernel, regions.count, stream, regions, sums, options.eta, trust);
      }
    }
    if (!error) {
      error = launch(
          &update_kernel<scalar_t, width>, blocks, stream, regions, buffers, aligned, options.lr, options.tau,
          options.apply, trust, decay, static_cast<scalar_t>(options.momentum));
    }
    return error;
  }

  const char* operator()(const Regions& regions) const {
    return aligned < 0 ? run<1>(regions) : run<kPackWidth<scalar_t>>(regions);
  }
};

template <typename scalar_t>
const char* step(
    const FlatBuffers& buffers,
    const FlatSegments& segments,
    const LarsOptions& options,
    void* workspace,
    cudaStream_t stream) {
  const Buffers<scalar_t> own = typed<scalar_t>(buffers);
  auto* trust = static_cast<double*>(workspace);
  auto* sums = reinterpret_cast<Squares*>(static_cast<char*>(workspace) + kTrustBytes);
  const Step<scalar_t> step{own, common_alignment(own), options, trust, sums, stream};
  return for_regions(buffers.size, segments, step);
}

#else

// NVRTC compiles instantiated templates only.
#define DSPNET_KERNELS_OF(scalar_t, width)                                                                   \
  template __global__ void squares_kernel<scalar_t, width>(                                                  \
      const __grid_constant__ Regions, const scalar_t*, const scalar_t*, int, scalar_t, Squares*);           \
  template __global__ void update_kernel<scalar_t, width>(                                                   \
      const __grid_constant__ Regions, Buffers<scalar_t>, int, DeviceScalar, DeviceScalar, const bool*,      \
      const double*, scalar_t, scalar_t);
DSPNET_KERNELS_OF(float, 1)
DSPNET_KERNELS_OF(float, 4)
DSPNET_KERNELS_OF(double, 1)
DSPNET_KERNELS_OF(double, 2)

#endif

} // namespace lars_ema_step_kernels

#ifndef __CUDACC_RTC__

int64_t lars_ema_step_workspace(int64_t size) {
  return kTrustBytes + (size / kTile + kRegions) * static_cast<int64_t>(sizeof(Squares));
}

const char* lars_ema_step(
    DType dtype,
    const FlatBuffers& buffers,
    const FlatSegments& segments,
    const LarsOptions& options,
    void* workspace,
    cudaStream_t stream) {
  return dtype == DType::f64 ? step<double>(buffers, segments, options, workspace, stream)
                           : step<float>(buffers, segments, options, workspace, stream);
}

#endif

} // namespace dspnet::cuda
