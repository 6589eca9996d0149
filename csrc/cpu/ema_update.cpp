// xi <- tau xi + (1 - tau) theta, in place, over a whole list of tensors.
//
// Bound by memory: 3 x the element size per element (read xi and theta, write xi; fp32: 12 bytes) for 3 operations.
// A network's list mixes tensors of a few and of millions of elements. So there is one parallel region, which splits
// the elements of all tensors laid end to end: every thread moves the same number of bytes, and a list of 300 tensors
// costs one fork and join. A thread finds its first tensor by binary search.
//
// 16-bit tensors are computed in fp32 and rounded once.
#include <ATen/MemoryOverlap.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

namespace dspnet {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 32768; // elements: less than this is not worth waking a thread

// A pair of tensors that are one run of memory each, in the same element order.
struct Run {
  char* target;
  const char* online;
  int64_t begin; // of its elements in the list laid end to end
  at::ScalarType dtype;
};

// The bytes from a tensor's first element to its last.
struct Span {
  const char* first;
  const char* last;
};

void check(at::TensorList targets, at::TensorList onlines, double tau) {
  TORCH_CHECK(tau >= 0 && tau <= 1, "ema_update: tau must lie in [0, 1], got ", tau);
  TORCH_CHECK(
      targets.size() == onlines.size(),
      "ema_update: ", targets.size(), " targets but ", onlines.size(), " onlines");
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor& target = targets[i];
    const at::Tensor& online = onlines[i];
    TORCH_CHECK(target.defined() && online.defined(), "ema_update: tensor ", i, " is undefined");
    TORCH_CHECK(
        target.device().is_cpu() && online.device().is_cpu() && target.layout() == at::kStrided &&
            online.layout() == at::kStrided,
        "ema_update: tensor ", i, " must be a dense tensor on the CPU");
    TORCH_CHECK(
        target.sizes() == online.sizes(),
        "ema_update: target ", i, " has shape ", target.sizes(), ", online has ", online.sizes());
    TORCH_CHECK(
        target.scalar_type() == online.scalar_type(),
        "ema_update: target ", i, " is ", target.scalar_type(), ", online is ", online.scalar_type());
    switch (target.scalar_type()) {
      case at::kFloat:
      case at::kDouble:
      case at::kHalf:
      case at::kBFloat16:
        break;
      default:
        TORCH_CHECK(false, "ema_update: tensor ", i, " is ", target.scalar_type(), ", not fp32, fp64, fp16 or bf16");
    }
    at::assert_no_internal_overlap(target);
    at::assert_no_partial_overlap(target, online);
  }
}

Span span(const at::Tensor& tensor) {
  int64_t elements = 1;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    elements += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const auto* first = static_cast<const char*>(tensor.const_data_ptr());
  return {first, first + elements * tensor.element_size()};
}

// Whether a target may share memory with any tensor but its own online: then updates must go in the list's order.
bool may_share_memory(std::vector<Span> written, std::vector<Span> read) {
  const auto by_address = [](const Span& a, const Span& b) { return std::less<>()(a.first, b.first); };
  std::sort(written.begin(), written.end(), by_address);
  std::sort(read.begin(), read.end(), by_address);
  for (size_t i = 1; i < written.size(); ++i) {
    if (written[i].first < written[i - 1].last) {
      return true;
    }
  }
  auto target = written.begin();
  for (const Span& online : read) {
    while (target != written.end() && target->last <= online.first) {
      ++target;
    }
    if (target != written.end() && target->first < online.last) {
      return true;
    }
  }
  return false;
}

template <typename scalar_t>
void update(const Run& run, int64_t from, int64_t count, double tau) {
  using compute_t = at::opmath_type<scalar_t>;
  using Vec = at::vec::Vectorized<compute_t>;
  auto* xi = reinterpret_cast<scalar_t*>(run.target) + from;
  const auto* theta = reinterpret_cast<const scalar_t*>(run.online) + from;
  // Stepping from the nearer end keeps the rounding error small, and tau of 0 and 1 exact.
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
  check(targets, onlines, tau);

  std::vector<Run> runs;
  std::vector<size_t> strided;
  std::vector<Span> written, read;
  int64_t total = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor& target = targets[i];
    const at::Tensor& online = onlines[i];
    if (target.numel() == 0) {
      continue;
    }
    written.push_back(span(target));
    if (online.const_data_ptr() != target.const_data_ptr()) {
      read.push_back(span(online));
    }
    if (target.is_non_overlapping_and_dense() && target.strides() == online.strides()) {
      runs.push_back(
          {static_cast<char*>(target.mutable_data_ptr()),
           static_cast<const char*>(online.const_data_ptr()),
           total,
           target.scalar_type()});
      total += target.numel();
    } else {
      strided.push_back(i);
    }
  }

  // ATen walks whatever strides there are.
  if (may_share_memory(std::move(written), std::move(read))) {
    for (size_t i = 0; i < targets.size(); ++i) {
      targets[i].lerp_(onlines[i], 1 - tau);
    }
    return;
  }
  for (const size_t i : strided) {
    targets[i].lerp_(onlines[i], 1 - tau);
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

} // namespace CPU_CAPABILITY
} // namespace dspnet
