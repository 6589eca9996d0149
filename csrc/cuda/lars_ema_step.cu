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
// The buffers are split into regions, each a segment or the gap between two, and regions into tiles of 4096 elements. A
// block processes one tile, whose elements share one q, and finds its region by binary search. Up to 220 regions are
// kernel parameters, limited to 4 KB, so no table is copied to the device, and a CUDA graph stores them.
//
// Sums are double, since squares of small fp32 gradients would underflow. One block per region adds up the tiles' sums
// in a fixed order, so results are reproducible.
#include "cuda_kernel.h"
#include "cuda_launch.h"

namespace dspnet::cuda {
inline namespace lars_ema_step_kernels { // named: NVRTC drops kernels in anonymous namespaces

constexpr int kRegions = 220;
constexpr int64_t kTile = 4096;

struct Regions {
  int64_t begin[kRegions + 1]; // a region ends where the next one begins
  int64_t first_block[kRegions + 1];
  bool adapted[kRegions];
  int count;
};
static_assert(sizeof(Regions) <= 4096 - 128, "exceeds the size of kernel parameters");

struct Tile {
  int region;
  int64_t begin, end;
};

__device__ inline Tile tile_of(const Regions& regions, int64_t block) {
  const int region = last_at_most(regions.first_block, regions.count, block);
  const int64_t begin = regions.begin[region] + (block - regions.first_block[region]) * kTile;
  const int64_t end = regions.begin[region + 1];
  return {region, begin, end - begin < kTile ? end : begin + kTile};
}

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
  if (!regions.adapted[tile.region]) {
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
  if (!regions.adapted[region]) {
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

template <typename scalar_t>
struct Buffers {
  scalar_t* p;
  scalar_t* g;
  scalar_t* m;
  scalar_t* xi;
  int64_t target_size; // elements of xi
};

// Pass 2.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads) update_kernel(
    const __grid_constant__ Regions regions,
    Buffers<scalar_t> buffers,
    int aligned,
    DeviceScalar lr,
    DeviceScalar tau_on_device,
    const bool* __restrict__ apply, // null means true
    const double* __restrict__ trust,
    scalar_t weight_decay,
    scalar_t momentum) {
  // In reverse order: the tiles that pass 1 read last are still in the L2 cache.
  const Tile tile = tile_of(regions, gridDim.x - 1 - blockIdx.x);
  if (apply && !*apply) {
    for_range<width>(tile.begin, tile.end, aligned, [&](auto constant, int64_t i) {
      constexpr int stored = decltype(constant)::width;
      store(buffers.g + i, Pack<scalar_t, stored>{});
    });
    return;
  }
  const bool adapted = regions.adapted[tile.region];
  const scalar_t q = adapted ? static_cast<scalar_t>(trust[tile.region]) : scalar_t(1);
  const scalar_t decay = adapted ? weight_decay : scalar_t(0);
  const scalar_t minus_lr = static_cast<scalar_t>(-read(lr));
  const double tau = read(tau_on_device);
  // Interpolating from the nearer end keeps rounding errors small, and tau = 0 and tau = 1 exact.
  const bool from_target = tau > 0.5;
  const scalar_t weight = static_cast<scalar_t>(from_target ? 1 - tau : tau);

  // The buffers do not overlap.
  scalar_t* __restrict__ const p = buffers.p;
  scalar_t* __restrict__ const g = buffers.g;
  scalar_t* __restrict__ const m = buffers.m;
  scalar_t* __restrict__ const xi = buffers.xi;
  const auto update = [&](int64_t begin, int64_t end, auto has_target) {
    for_range<width>(begin, end, aligned, [&](auto constant, int64_t i) {
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
          const scalar_t x = targets.at[j], t = weights.at[j];
          targets.at[j] = from_target ? multiply_add(weight, t - x, x) : multiply_add(weight, x - t, t);
        }
      }
      store(p + i, weights);
      store(g + i, grads);
      store(m + i, momenta);
      if constexpr (with_target) {
        store(xi + i, targets);
      }
    });
  };
  const int64_t targets_end = buffers.target_size;
  const int64_t split = targets_end < tile.begin ? tile.begin : targets_end < tile.end ? targets_end : tile.end;
  if (split > tile.begin) {
    update(tile.begin, split, Constant<1>{});
  }
  if (split < tile.end) {
    update(split, tile.end, Constant<0>{});
  }
}

#ifndef __CUDACC_RTC__

constexpr int64_t kTrustBytes = (kRegions * sizeof(double) + 15) / 16 * 16;

template <typename scalar_t>
struct Step {
  Buffers<scalar_t> buffers;
  int aligned; // first aligned index if the same for all buffers, else -1
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
      any = any || regions.adapted[r];
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

// Calls run(regions) for all regions in order, up to kRegions at a time. Together they cover [0, size).
template <typename Run>
const char* for_regions(int64_t size, const LarsSegments& segments, const Run& run) {
  Regions regions;
  regions.count = 0;
  regions.begin[0] = regions.first_block[0] = 0;
  const auto flush = [&]() -> const char* {
    const char* error = regions.count ? run(regions) : nullptr;
    regions.begin[0] = regions.begin[regions.count];
    regions.count = 0;
    return error;
  };
  const auto add = [&](int64_t end, bool adapted) -> const char* {
    const int at = regions.count;
    const int64_t elements = end - regions.begin[at];
    if (elements == 0) {
      return nullptr;
    }
    regions.adapted[at] = adapted;
    regions.begin[at + 1] = end;
    regions.first_block[at + 1] = regions.first_block[at] + (elements + kTile - 1) / kTile;
    return ++regions.count == kRegions ? flush() : nullptr;
  };
  for (int64_t s = 0; s < segments.count; ++s) {
    const char* error = nullptr;
    if (segments.sizes[s] == 0) {
      continue;
    }
    if ((error = add(segments.starts[s], false)) || (error = add(segments.starts[s] + segments.sizes[s], true))) {
      return error;
    }
  }
  if (const char* error = add(size, false)) {
    return error;
  }
  return flush();
}

template <typename scalar_t>
const char* step(
    const LarsBuffers& buffers,
    const LarsSegments& segments,
    const LarsOptions& options,
    void* workspace,
    cudaStream_t stream) {
  const Buffers<scalar_t> typed{
      static_cast<scalar_t*>(buffers.params),
      static_cast<scalar_t*>(buffers.grads),
      static_cast<scalar_t*>(buffers.momenta),
      static_cast<scalar_t*>(buffers.targets),
      buffers.target_size};
  int aligned = first_aligned(typed.p);
  if (first_aligned(typed.g) != aligned || first_aligned(typed.m) != aligned ||
      (typed.target_size > 0 && first_aligned(typed.xi) != aligned)) {
    aligned = -1;
  }
  auto* trust = static_cast<double*>(workspace);
  auto* sums = reinterpret_cast<Squares*>(static_cast<char*>(workspace) + kTrustBytes);
  return for_regions(buffers.size, segments, Step<scalar_t>{typed, aligned, options, trust, sums, stream});
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
    const LarsBuffers& buffers,
    const LarsSegments& segments,
    const LarsOptions& options,
    void* workspace,
    cudaStream_t stream) {
  return dtype == DType::f64 ? step<double>(buffers, segments, options, workspace, stream)
                           : step<float>(buffers, segments, options, workspace, stream);
}

#endif

} // namespace dspnet::cuda
