// xi <- tau xi + (1 - tau) theta, in place, over a whole list of tensors.
//
// Bound by memory: 3 x the element size per element (read xi and theta, write xi; fp32: 12 bytes) for 3 operations. A
// network's tensors have from a few to millions of elements. One parallel region therefore splits the concatenation of
// all tensors: every thread moves the same number of bytes, and a list of 300 tensors costs one fork and join. A thread
// finds its first tensor by binary search.
//
// 16-bit tensors are computed in fp32 and rounded once.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <vector>

#include "ema_update.h"
#include "target_update.h"

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
  const TargetUpdate<compute_t> update_target(tau);
  at::vec::map2<scalar_t>([&](Vec x, Vec t) { return update_target(x, t); }, xi, xi, theta, count);
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
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, run->dtype, "ema_update", [&] {
        update<scalar_t>(*run, begin - run->begin, stop - begin, tau);
      });
      begin = stop;
    }
  });
}

} // namespace dspnet::CPU_CAPABILITY
