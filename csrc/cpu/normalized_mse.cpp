// mean_n (2 - 2 cos(p_n, z_n)) and its gradients:
//
//   dp = -2 d / (N |p|) (z / |z| - cos p / |p|), and for z likewise; a length below kShortest is a constant, kShortest
//
// Bound by memory: forward reads p and z, backward reads them and writes one gradient or both. A row is a few hundred
// numbers, which stay in the cache between its two uses in the backward, so the lengths are formed again there and not
// kept. Sums are double, in lanes that the compiler vectorises: products are exact and no length overflows. The mean is
// the sum over rows in their order: it does not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include <array>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "normalized_mse.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {
namespace {

constexpr double kShortest = 1e-6; // dspnet_fast/ops/normalized_mse.py: EPS
constexpr int64_t kGrain = 16384; // elements: less than this is not worth waking a thread
constexpr int64_t kLanes = 16;

template <typename P, typename Z>
using wide_t = std::conditional_t<std::is_same_v<P, double> || std::is_same_v<Z, double>, double, float>;

struct Row {
  double length_p, length_z, cosine; // lengths are at least kShortest
  bool short_p, short_z; // whether that is why
};

// Not std::max, which may turn NaN into kShortest.
double at_least_shortest(double length) {
  return length < kShortest ? kShortest : length;
}

template <typename P, typename Z>
Row measure(const P* p, const Z* z, int64_t columns) {
  std::array<double, kLanes> pp{}, zz{}, pz{};
  const auto add = [&](int64_t lane, int64_t i) {
    const double of_p = static_cast<wide_t<P, P>>(p[i]);
    const double of_z = static_cast<wide_t<Z, Z>>(z[i]);
    pp[lane] += of_p * of_p;
    zz[lane] += of_z * of_z;
    pz[lane] += of_p * of_z;
  };
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      add(lane, i + lane);
    }
  }
  for (int64_t lane = 0; i + lane < columns; ++lane) {
    add(lane, i + lane);
  }
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    pp[0] += pp[lane];
    zz[0] += zz[lane];
    pz[0] += pz[lane];
  }
  const double length_p = std::sqrt(pp[0]), length_z = std::sqrt(zz[0]);
  Row row;
  row.length_p = at_least_shortest(length_p);
  row.length_z = at_least_shortest(length_z);
  row.short_p = !(length_p > kShortest);
  row.short_z = !(length_z > kShortest);
  row.cosine = pz[0] / (row.length_p * row.length_z);
  return row;
}

// The gradient of one row: scale (other / |other| - along own / |own|).
template <typename Own, typename Other>
void gradient(
    const Own* own,
    const Other* other,
    int64_t columns,
    double own_length,
    double other_length,
    double along,
    double scale,
    Own* to) {
  using wide = wide_t<Own, Other>;
  const wide own_by = static_cast<wide>(own_length), other_by = static_cast<wide>(other_length);
  const wide part = static_cast<wide>(along), factor = static_cast<wide>(scale);
  for (int64_t i = 0; i < columns; ++i) {
    const wide unit = static_cast<wide>(own[i]) / own_by, other_unit = static_cast<wide>(other[i]) / other_by;
    to[i] = static_cast<Own>(factor * (other_unit - part * unit));
  }
}

template <typename Run>
auto with_dtype(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kDouble:
      return run(double{});
    case at::kHalf:
      return run(at::Half{});
    case at::kBFloat16:
      return run(at::BFloat16{});
    default:
      return run(float{});
  }
}

template <typename Run>
auto with_dtypes(const at::Tensor& p, const at::Tensor& z, const Run& run) {
  return with_dtype(p.scalar_type(), [&]<typename P>(P) {
    return with_dtype(z.scalar_type(), [&]<typename Z>(Z) { return run(P{}, Z{}); });
  });
}

int64_t grain(int64_t columns) {
  return kGrain / (columns + 1) + 1;
}

} // namespace

at::Tensor normalized_mse(const at::Tensor& p, const at::Tensor& z) {
  const at::NoGradGuard no_grad;
  check_rows("normalized_mse", p, z, at::kCPU);
  const at::Tensor of_p = p.contiguous(), of_z = z.contiguous();
  const int64_t rows = p.size(0), columns = p.size(1);
  std::vector<double> losses(rows);
  with_dtypes(p, z, [&]<typename P, typename Z>(P, Z) {
    const P* from_p = of_p.const_data_ptr<P>();
    const Z* from_z = of_z.const_data_ptr<Z>();
    at::parallel_for(0, rows, grain(columns), [&](int64_t n, int64_t end) {
      for (; n < end; ++n) {
        losses[n] = 2 - 2 * measure(from_p + n * columns, from_z + n * columns, columns).cosine;
      }
    });
  });
  double sum = 0;
  for (const double loss : losses) {
    sum += loss;
  }
  return at::scalar_tensor(sum / static_cast<double>(rows), p.options().dtype(loss_dtype(p, z)));
}

std::tuple<at::Tensor, at::Tensor> normalized_mse_backward(
    const at::Tensor& grad, const at::Tensor& p, const at::Tensor& z, bool p_gradient, bool z_gradient) {
  const at::NoGradGuard no_grad;
  const char* op = "normalized_mse_backward";
  check_rows(op, p, z, at::kCPU);
  check_grad(op, grad, p, z);
  const at::Tensor of_p = p.contiguous(), of_z = z.contiguous();
  const at::Tensor grad_p = p_gradient ? at::empty_like(of_p) : at::empty({0}, p.options());
  const at::Tensor grad_z = z_gradient ? at::empty_like(of_z) : at::empty({0}, z.options());
  const int64_t rows = p.size(0), columns = p.size(1);
  const double each = -2 * grad.item<double>() / static_cast<double>(rows);
  with_dtypes(p, z, [&]<typename P, typename Z>(P, Z) {
    const P* from_p = of_p.const_data_ptr<P>();
    const Z* from_z = of_z.const_data_ptr<Z>();
    P* to_p = grad_p.mutable_data_ptr<P>();
    Z* to_z = grad_z.mutable_data_ptr<Z>();
    at::parallel_for(0, rows, grain(columns), [&](int64_t n, int64_t end) {
      for (; n < end; ++n) {
        const P* row_p = from_p + n * columns;
        const Z* row_z = from_z + n * columns;
        const Row row = measure(row_p, row_z, columns);
        if (p_gradient) {
          gradient(
              row_p, row_z, columns, row.length_p, row.length_z, row.short_p ? 0 : row.cosine, each / row.length_p,
              to_p + n * columns);
        }
        if (z_gradient) {
          gradient(
              row_z, row_p, columns, row.length_z, row.length_p, row.short_z ? 0 : row.cosine, each / row.length_z,
              to_z + n * columns);
        }
      }
    });
  });
  return {grad_p, grad_z};
}

} // namespace CPU_CAPABILITY
} // namespace dspnet
