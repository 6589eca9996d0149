// One AdamW step and the following EMA update of the target, in place on flat buffers:
//
//   t = t + 1        p = (1 - lr wd) p, in decayed segments only
//   m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
//   p = p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)        xi = tau xi + (1 - tau) p        g = 0
//
// If `apply` is false, only g = 0.
//
// Bound by memory, fp32: one pass reads p, g, m, v, xi and writes them, 40 bytes per element. A block processes one
// tile (cuda_flat_step.h). The factors that depend on t are computed once, by a kernel of one thread before the pass:
// they need transcendental functions in double, of which a GPU computes few per second.
#ifndef __CUDACC_RTC__
#include <cmath>
#endif

#include "cuda_flat_step.h"
#include "cuda_launch.h"

namespace dspnet::cuda {
inline namespace adamw_ema_step_kernels { // named: NVRTC drops kernels in anonymous namespaces

struct Factors {
  double keep; // 1 - lr wd
  double step; // lr / (1 - b1^t)
  double correction; // 1 / sqrt(1 - b2^t)
  double tau;
};

// Computes the factors and increases t. 1 - b^t = -expm1(t log b), which is also accurate for b near 1.
__global__ void __launch_bounds__(kThreads) factors_kernel(
    void* steps,
    DType steps_dtype,
    DeviceScalar lr,
    DeviceScalar weight_decay,
    DeviceScalar tau,
    double log_beta1,
    double log_beta2,
    const bool* __restrict__ apply, // null means true
    Factors* __restrict__ factors) {
  if (threadIdx.x != 0 || (apply && !*apply)) {
    return;
  }
  const double done = read(DeviceScalar{steps, steps_dtype}) + 1, rate = read(lr);
  *factors = {
      1 - rate * read(weight_decay), rate / -expm1(done * log_beta1), 1 / sqrt(-expm1(done * log_beta2)), read(tau)};
  switch (steps_dtype) {
    case DType::f64:
      *static_cast<double*>(steps) = done;
      break;
    case DType::f32:
      *static_cast<float*>(steps) = static_cast<float>(done);
      break;
    case DType::f16:
      downcast(static_cast<float>(done), *static_cast<__half*>(steps));
      break;
    default:
      downcast(static_cast<float>(done), *static_cast<__nv_bfloat16*>(steps));
  }
}

// width: elements per load. aligned: the first index at which all buffers are aligned to 16 bytes. 3 blocks per
// multiprocessor: by itself the compiler takes so few registers that it spills around square root and division.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads, 3) update_kernel(
    const __grid_constant__ Regions regions,
    Buffers<scalar_t> buffers,
    int aligned,
    const Factors* __restrict__ factors,
    const bool* __restrict__ apply,
    scalar_t to_gradient, // 1 - b1
    scalar_t beta2,
    scalar_t to_square, // 1 - b2
    scalar_t eps) {
  const Tile tile = tile_of(regions, blockIdx.x);
  if (apply && !*apply) {
    zero_gradients<width>(buffers.g, tile, aligned);
    return;
  }
  const scalar_t keep = static_cast<scalar_t>(regions.in_segment[tile.region] ? factors->keep : 1);
  const scalar_t minus_step = static_cast<scalar_t>(-factors->step);
  const scalar_t correction = static_cast<scalar_t>(factors->correction);
  const TargetUpdate<scalar_t> update_target(factors->tau);

  // The buffers do not overlap.
  scalar_t* __restrict__ const p = buffers.p;
  scalar_t* __restrict__ const g = buffers.g;
  scalar_t* __restrict__ const m = buffers.m;
  scalar_t* __restrict__ const v = buffers.v;
  scalar_t* __restrict__ const xi = buffers.xi;
  for_tile<width>(tile, aligned, buffers.target_size, [&](auto constant, int64_t i, auto has_target) {
    constexpr int loaded = decltype(constant)::width;
    constexpr bool with_target = decltype(has_target)::width != 0;
    Pack<scalar_t, loaded> weights = load<loaded>(p + i), momenta = load<loaded>(m + i);
    Pack<scalar_t, loaded> variances = load<loaded>(v + i);
    const Pack<scalar_t, loaded> grads = load<loaded>(g + i);
    Pack<scalar_t, loaded> targets;
    if constexpr (with_target) {
      targets = load<loaded>(xi + i);
    }
#pragma unroll
    for (int j = 0; j < loaded; ++j) {
      const scalar_t gradient = grads.at[j];
      momenta.at[j] = multiply_add(to_gradient, gradient - momenta.at[j], momenta.at[j]);
      variances.at[j] = multiply_add(to_square * gradient, gradient, beta2 * variances.at[j]);
      const scalar_t denominator = multiply_add(sqrt(variances.at[j]), correction, eps);
      weights.at[j] = multiply_add(minus_step, momenta.at[j] / denominator, weights.at[j] * keep);
      if constexpr (with_target) {
        targets.at[j] = update_target(targets.at[j], weights.at[j]);
      }
    }
    store(p + i, weights);
    store(g + i, Pack<scalar_t, loaded>{});
    store(m + i, momenta);
    store(v + i, variances);
    if constexpr (with_target) {
      store(xi + i, targets);
    }
  });
}

#ifndef __CUDACC_RTC__

template <typename scalar_t>
struct Step {
  Buffers<scalar_t> buffers;
  int aligned; // of common_alignment
  AdamwOptions options;
  Factors* factors;
  cudaStream_t stream;

  template <int width>
  const char* run(const Regions& regions) const {
    const auto constant = [](double value) { return static_cast<scalar_t>(value); };
    return launch(
        &update_kernel<scalar_t, width>, regions.first_block[regions.count], stream, regions, buffers, aligned, factors,
        options.apply, constant(1 - options.beta1), constant(options.beta2), constant(1 - options.beta2),
        constant(options.eps));
  }

  const char* operator()(const Regions& regions) const {
    return aligned < 0 ? run<1>(regions) : run<kPackWidth<scalar_t>>(regions);
  }
};

template <typename scalar_t>
const char* update(
    const FlatBuffers& buffers,
    const FlatSegments& segments,
    const AdamwOptions& options,
    Factors* factors,
    cudaStream_t stream) {
  const Buffers<scalar_t> own = typed<scalar_t>(buffers);
  return for_regions(buffers.size, segments, Step<scalar_t>{own, common_alignment(own), options, factors, stream});
}

#else

// NVRTC compiles instantiated templates only.
#define DSPNET_KERNELS_OF(scalar_t, width)                                                                  \
  template __global__ void update_kernel<scalar_t, width>(                                                  \
      const __grid_constant__ Regions, Buffers<scalar_t>, int, const Factors*, const bool*, scalar_t,       \
      scalar_t, scalar_t, scalar_t);
DSPNET_KERNELS_OF(float, 1)
DSPNET_KERNELS_OF(float, 4)
DSPNET_KERNELS_OF(double, 1)
DSPNET_KERNELS_OF(double, 2)

#endif

} // namespace adamw_ema_step_kernels

#ifndef __CUDACC_RTC__

int64_t adamw_ema_step_workspace() {
  return sizeof(Factors);
}

const char* adamw_ema_step(
    DType dtype,
    const FlatBuffers& buffers,
    const FlatSegments& segments,
    const AdamwOptions& options,
    void* steps,
    DType steps_dtype,
    void* workspace,
    cudaStream_t stream) {
  auto* factors = static_cast<Factors*>(workspace);
  const char* error = launch(
      &factors_kernel, 1, stream, steps, steps_dtype, options.lr, options.weight_decay, options.tau,
      std::log(options.beta1), std::log(options.beta2), options.apply, factors);
  if (error) {
    return error;
  }
  return dtype == DType::f64 ? update<double>(buffers, segments, options, factors, stream)
                             : update<float>(buffers, segments, options, factors, stream);
}

#endif

} // namespace dspnet::cuda
