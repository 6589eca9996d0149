// One AdamW step and the following EMA update of the target, in place on flat buffers:
//
//   t = t + 1        p = (1 - lr wd) p, in decayed segments only
//   m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
//   p = p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)        xi = tau xi + (1 - tau) p        g = 0
//
// If `apply` is false, only g = 0.
//
// Bound by memory, fp32: one pass reads p, g, m, v, xi and writes them, 40 bytes per element. No element depends on
// another one.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "flat_ranges.h"
#include "flat_step.h"
#include "target_update.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

constexpr int64_t kAdamwGrain = 16384; // elements per thread at least

struct AdamwScalars {
  double keep; // 1 - lr wd
  double to_gradient; // 1 - b1
  double beta2, to_square; // b2, 1 - b2
  double correction; // 1 / sqrt(1 - b2^t)
  double eps;
  double step; // lr / (1 - b1^t)
  double tau;
};

// Updates a range of `for_ranges`.
template <typename scalar_t, bool decayed, bool has_target>
void adamw_update(const FlatBuffers<scalar_t>& buffers, int64_t begin, int64_t end, const AdamwScalars& scalars) {
  using Vec = at::vec::Vectorized<scalar_t>;
  const auto all = [](double value) { return Vec(static_cast<scalar_t>(value)); };
  const Vec zero = all(0), keep = all(scalars.keep), to_gradient = all(scalars.to_gradient);
  const Vec beta2 = all(scalars.beta2), to_square = all(scalars.to_square), correction = all(scalars.correction);
  const Vec eps = all(scalars.eps), minus_step = all(-scalars.step);
  const TargetUpdate<scalar_t> update_target(scalars.tau);
  for (int64_t i = begin; i < end; i += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), end - i);
    Vec p = Vec::loadu(buffers.p + i, count);
    const Vec g = Vec::loadu(buffers.g + i, count);
    Vec m = Vec::loadu(buffers.m + i, count);
    Vec v = Vec::loadu(buffers.v + i, count);
    if constexpr (decayed) {
      p = p * keep;
    }
    m = at::vec::fmadd(to_gradient, g - m, m);
    v = at::vec::fmadd(to_square * g, g, beta2 * v);
    p = at::vec::fmadd(minus_step, m / at::vec::fmadd(v.sqrt(), correction, eps), p);
    m.store(buffers.m + i, count);
    v.store(buffers.v + i, count);
    p.store(buffers.p + i, count);
    zero.store(buffers.g + i, count);
    if constexpr (has_target) {
      update_target(Vec::loadu(buffers.xi + i, count), p).store(buffers.xi + i, count);
    }
  }
}

} // namespace

void adamw_ema_step(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& momenta,
    const at::Tensor& variances,
    const at::Tensor& targets,
    const at::Tensor& steps,
    at::IntArrayRef starts,
    at::IntArrayRef sizes,
    const at::Tensor& lr,
    const at::Tensor& weight_decay,
    const at::Tensor& tau,
    double beta1,
    double beta2,
    double eps,
    const std::optional<at::Tensor>& apply) {
  const at::NoGradGuard no_grad;
  check_flat_step(
      "adamw_ema_step",
      {{"params", &params}, {"grads", &grads}, {"momenta", &momenta}, {"variances", &variances}, {"targets", &targets}},
      starts, sizes, {{"steps", &steps}, {"lr", &lr}, {"weight_decay", &weight_decay}, {"tau", &tau}}, apply, at::kCPU);
  if (apply && !apply->item<bool>()) {
    grads.zero_();
    return;
  }
  const double done = steps.item<double>() + 1, rate = lr.item<double>(), decay = weight_decay.item<double>();
  const AdamwScalars scalars{
      1 - rate * decay, 1 - beta1,
      beta2,            1 - beta2,
      1 / std::sqrt(1 - std::pow(beta2, done)),
      eps,
      rate / (1 - std::pow(beta1, done)),
      tau.item<double>()};
  steps.add_(1);
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "adamw_ema_step", [&] {
    const FlatBuffers<scalar_t> buffers{
        params.mutable_data_ptr<scalar_t>(), grads.mutable_data_ptr<scalar_t>(), momenta.mutable_data_ptr<scalar_t>(),
        variances.mutable_data_ptr<scalar_t>(), targets.mutable_data_ptr<scalar_t>()};
    for_ranges(
        params.numel(), targets.numel(), starts, sizes, kAdamwGrain,
        [&](int64_t begin, int64_t end, int64_t, auto decayed, auto has_target) {
          adamw_update<scalar_t, decayed(), has_target()>(buffers, begin, end, scalars);
        });
  });
}

} // namespace dspnet::CPU_CAPABILITY
