// One LARS step and the following EMA update of the target, in place on flat buffers:
//
//   adapted segments: g' = g + wd p, q = eta |p| / |g'| (1 if either is 0); every other element: g' = g, q = 1
//   m = mu m + q g'        p = p - lr m        xi = tau xi + (1 - tau) p        g = 0
//
// If `apply` is false, only g = 0.
//
// Bound by memory, fp32: pass 1 reads p and g, 8 bytes per element, for the norms; pass 2 reads p, g, m, xi and writes
// them, 32 bytes. q depends on the whole segment, so one pass is possible only if a segment fits into the cache.
//
// Pass 1 splits every segment into blocks of kBlock elements, distributes whole blocks over the threads, and adds up
// the blocks' sums in order, so the result does not depend on the number of threads. Sums are double, since squares of
// small fp32 gradients would underflow. Pass 2 splits all elements evenly over the threads, independent of segments.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "flat_ranges.h"
#include "flat_step.h"
#include "target_update.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

constexpr int64_t kLarsGrain = 32768; // elements per thread at least
constexpr int64_t kBlock = 4096;
constexpr int64_t kLanes = 16;

struct Scalars {
  double lr, tau, weight_decay, momentum, eta;
};

struct Squares {
  double p = 0;
  double g = 0; // of g'
};

// Sums in lanes, which the compiler vectorises: at::vec has no conversion from float to double in registers.
template <typename scalar_t>
Squares squares(const scalar_t* p, const scalar_t* g, int64_t count, scalar_t weight_decay) {
  std::array<double, kLanes> p_squares{}, g_squares{};
  const auto add = [&](int64_t lane, int64_t i) {
    const double weight = p[i];
    const double update = g[i] + weight_decay * p[i];
    p_squares[lane] += weight * weight;
    g_squares[lane] += update * update;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      add(lane, i + lane);
    }
  }
  for (int64_t lane = 0; i + lane < count; ++lane) {
    add(lane, i + lane);
  }
  Squares sum;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum.p += p_squares[lane];
    sum.g += g_squares[lane];
  }
  return sum;
}

// Pass 1: q of every segment.
template <typename scalar_t>
std::vector<double> trust_ratios(
    const FlatBuffers<scalar_t>& buffers, at::IntArrayRef starts, at::IntArrayRef sizes, const Scalars& scalars) {
  std::vector<int64_t> first_block{0}; // of every segment; last, the number of blocks
  for (const int64_t size : sizes) {
    first_block.push_back(first_block.back() + at::divup(size, kBlock));
  }
  std::vector<Squares> sums(first_block.back());
  at::parallel_for(0, first_block.back(), kLarsGrain / kBlock, [&](int64_t block, int64_t end) {
    size_t segment = std::upper_bound(first_block.begin(), first_block.end(), block) - first_block.begin() - 1;
    for (; block < end; ++block) {
      while (block >= first_block[segment + 1]) {
        ++segment;
      }
      const int64_t offset = (block - first_block[segment]) * kBlock;
      const int64_t begin = starts[segment] + offset;
      sums[block] = squares(
          buffers.p + begin,
          buffers.g + begin,
          std::min(kBlock, sizes[segment] - offset),
          static_cast<scalar_t>(scalars.weight_decay));
    }
  });

  std::vector<double> trust(starts.size(), 1);
  for (size_t segment = 0; segment < starts.size(); ++segment) {
    Squares total;
    for (int64_t block = first_block[segment]; block < first_block[segment + 1]; ++block) {
      total.p += sums[block].p;
      total.g += sums[block].g;
    }
    if (total.p != 0 && total.g != 0) {
      trust[segment] = scalars.eta * std::sqrt(total.p) / std::sqrt(total.g);
    }
  }
  return trust;
}

// Pass 2, for a range of `for_ranges`; trust: q.
template <typename scalar_t, bool adapted, bool has_target>
void update(const FlatBuffers<scalar_t>& buffers, int64_t begin, int64_t end, double trust, const Scalars& scalars) {
  using Vec = at::vec::Vectorized<scalar_t>;
  const auto all = [](double value) { return Vec(static_cast<scalar_t>(value)); };
  const Vec zero = all(0), q = all(trust), weight_decay = all(scalars.weight_decay), momentum = all(scalars.momentum);
  const Vec minus_lr = all(-scalars.lr);
  const TargetUpdate<scalar_t> update_target(scalars.tau);
  for (int64_t i = begin; i < end; i += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), end - i);
    Vec p = Vec::loadu(buffers.p + i, count);
    Vec g = Vec::loadu(buffers.g + i, count);
    Vec m = Vec::loadu(buffers.m + i, count);
    if constexpr (adapted) {
      g = q * at::vec::fmadd(weight_decay, p, g);
    }
    m = at::vec::fmadd(momentum, m, g);
    p = at::vec::fmadd(minus_lr, m, p);
    m.store(buffers.m + i, count);
    p.store(buffers.p + i, count);
    zero.store(buffers.g + i, count);
    if constexpr (has_target) {
      update_target(Vec::loadu(buffers.xi + i, count), p).store(buffers.xi + i, count);
    }
  }
}

} // namespace

void lars_ema_step(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& momenta,
    const at::Tensor& targets,
    at::IntArrayRef starts,
    at::IntArrayRef sizes,
    const at::Tensor& lr,
    const at::Tensor& tau,
    double weight_decay,
    double momentum,
    double eta,
    const std::optional<at::Tensor>& apply) {
  const at::NoGradGuard no_grad;
  check_flat_step(
      "lars_ema_step", {{"params", &params}, {"grads", &grads}, {"momenta", &momenta}, {"targets", &targets}}, starts,
      sizes, {{"lr", &lr}, {"tau", &tau}}, apply, at::kCPU);
  if (apply && !apply->item<bool>()) {
    grads.zero_();
    return;
  }
  const Scalars scalars{lr.item<double>(), tau.item<double>(), weight_decay, momentum, eta};
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "lars_ema_step", [&] {
    const FlatBuffers<scalar_t> buffers{
        params.mutable_data_ptr<scalar_t>(), grads.mutable_data_ptr<scalar_t>(), momenta.mutable_data_ptr<scalar_t>(),
        nullptr, targets.mutable_data_ptr<scalar_t>()};
    const std::vector<double> trust = trust_ratios(buffers, starts, sizes, scalars);
    for_ranges(
        params.numel(), targets.numel(), starts, sizes, kLarsGrain,
        [&](int64_t begin, int64_t end, int64_t segment, auto adapted, auto has_target) {
          const double q = adapted() ? trust[segment] : 1;
          update<scalar_t, adapted(), has_target()>(buffers, begin, end, q, scalars);
        });
  });
}

} // namespace dspnet::CPU_CAPABILITY
