// xi <- tau xi + (1 - tau) theta, in place, over a whole list of tensors.
//
// Bound by memory: 3 x the element size per element (read xi and theta, write xi; fp32: 12 bytes) for 3 operations. A
// network's tensors have from a few to millions of elements. One parallel region therefore splits the concatenation of
// all tensors: every thread moves the same number of bytes, and a list of 300 tensors costs one fork and join. A thread
// finds its first tensor by binary search.
//
// 16-bit tensors are computed in fp32 and rounded once.
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <vector>

#include "ema_update.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 32768; // elements per thread at least

// A pair of dense tensors with the same strides.
struct Run {
  char* target;
  const char* online;
  int64_t begin; // index of its first element in the concatenation of all tensors
  at::ScalarType dtype;
};

template <typename scalar_t>
void update(const Run& run, int64_t from, int64_t count, double tau) {
  using compute_t = at::opmath_type<scalar_t>;
  using Vec = at::vec::Vectorized<compute_t>;
  auto* xi = reinterpret_cast<scalar_t*>(run.target) + from;
  const auto* theta = reinterpret_cast<const scalar_t*>(run.online) + from;
  // Interpolating from the nearer end keeps rounding errors small, and tau = 0 and tau = 1 exact.
  if (tau > 0.5) {
    const Vec weight(static_cast<compute_t>(1 - tau));
    at::vec::map2<scalar_t>([=](Vec x, Vec t) { return at::vec::fmadd(weight, t - x, x); }, xi, xi, theta, count);
  } else {
    const Vec weight(static_cast<compute_t>(tau));
    at::vec::map2<scalar_t>([=](Vec x, Vec t) { return at::vec::fmadd(weight, x - t, t); }, xi, xi, theta, count);
  }
}

void update(const Run& run, int64_t from, int64_t count, double tau) {
  switch (run.dtype) {
    case at::kFloat:
      return update<float>(run, from, count, tau);
    case at::kDouble:
      return update<double>(run, from, count, tau);
    case at::kHalf:
      return update<at::Half>(run, from, count, tau);
    default:
      return update<at::BFloat16>(run, from, count, tau);
  }
}

} // namespace

void ema_update(at::TensorList targets, at::TensorList onlines, double tau) {
  const at::NoGradGuard no_grad;
  check_ema(targets, onlines, tau, at::kCPU);

  std::vector<Run> runs;
  int64_t total = 0;
  for (const size_t i : update_all_but_runs(targets, onlines, tau)) {
    runs.push_back(
        {static_cast<char*>(targets[i].mutable_data_ptr()),
         static_cast<const char*>(onlines[i].const_data_ptr()),
         total,
         targets[i].scalar_type()});
    total += targets[i].numel();
  }

  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    auto run = std::upper_bound(
        runs.begin(), runs.end(), begin, [](int64_t at, const Run& r) { return at < r.begin; });
    for (--run; begin < end; ++run) {
      const int64_t stop = run + 1 == runs.end() ? end : std::min(end, (run + 1)->begin);
      update(*run, begin - run->begin, stop - begin, tau);
      begin = stop;
    }
  });
}

} // namespace dspnet::CPU_CAPABILITY
