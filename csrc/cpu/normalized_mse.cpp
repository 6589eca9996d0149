// mean_n (2 - 2 cos(p_n, z_n)) and its gradients:
//
//   dp = -2 d / (N |p|) (z / |z| - cos p / |p|), and for z likewise
//
// with lengths below kEps replaced by the constant kEps.
//
// Bound by memory: forward reads p and z; backward reads them and writes one gradient or both. Backward recomputes the
// lengths: a row has a few hundred elements, which stay in the cache between their two uses. Sums are double, in lanes
// that the compiler vectorises: products are exact and no length overflows. The mean is summed in the order of rows, so
// it does not depend on the number of threads.
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

namespace dspnet::inline CPU_CAPABILITY {
namespace {

constexpr double kEps = 1e-6; // dspnet_fast/ops/normalized_mse.py: EPS
constexpr int64_t kMseGrain = 16384; // elements per thread at least
constexpr int64_t kMseLanes = 16;

template <typename P, typename Z>
using compute_t = std::conditional_t<std::is_same_v<P, double> || std::is_same_v<Z, double>, double, float>;

struct Row {
  double length_p, length_z, cosine; // lengths are clamped to at least kEps
  bool clamped_p, clamped_z; // whether kEps replaces the length
};

// Not std::max, which may return kEps for NaN.
double at_least_eps(double length) {
  return length < kEps ? kEps : length;
}

template <typename P, typename Z>
Row measure(const P* p, const Z* z, int64_t columns) {
  std::array<double, kMseLanes> pp{}, zz{}, pz{};
  const auto add = [&](int64_t lane, int64_t i) {
    const double p_i = static_cast<compute_t<P, P>>(p[i]);
    const double z_i = static_cast<compute_t<Z, Z>>(z[i]);
    pp[lane] += p_i * p_i;
    zz[lane] += z_i * z_i;
    pz[lane] += p_i * z_i;
  };
  int64_t i = 0;
  for (; i + kMseLanes <= columns; i += kMseLanes) {
    for (int64_t lane = 0; lane < kMseLanes; ++lane) {
      add(lane, i + lane);
    }
  }
  for (int64_t lane = 0; i + lane < columns; ++lane) {
    add(lane, i + lane);
  }
  for (int64_t lane = 1; lane < kMseLanes; ++lane) {
    pp[0] += pp[lane];
    zz[0] += zz[lane];
    pz[0] += pz[lane];
  }
  const double length_p = std::sqrt(pp[0]), length_z = std::sqrt(zz[0]);
  Row row;
  row.length_p = at_least_eps(length_p);
  row.length_z = at_least_eps(length_z);
  row.clamped_p = !(length_p > kEps);
  row.clamped_z = !(length_z > kEps);
  row.cosine = pz[0] / (row.length_p * row.length_z);
  return row;
}

// The gradient of one row: scale (other / |other| - cosine own / |own|). cosine: 0 if the length of own is clamped.
template <typename Own, typename Other>
void gradient(
    const Own* own,
    const Other* other,
    int64_t columns,
    double own_length,
    double other_length,
    double cosine,
    double scale,
    Own* to) {
  using compute = compute_t<Own, Other>;
  const compute own_norm = static_cast<compute>(own_length), other_norm = static_cast<compute>(other_length);
  const compute projection = static_cast<compute>(cosine), factor = static_cast<compute>(scale);
  for (int64_t i = 0; i < columns; ++i) {
    const compute unit = static_cast<compute>(own[i]) / own_norm;
    const compute other_unit = static_cast<compute>(other[i]) / other_norm;
    to[i] = static_cast<Own>(factor * (other_unit - projection * unit));
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
  return kMseGrain / (columns + 1) + 1;
}

} // namespace

at::Tensor normalized_mse(const at::Tensor& p, const at::Tensor& z) {
  const at::NoGradGuard no_grad;
  check_rows("normalized_mse", p, z, at::kCPU);
  const at::Tensor dense_p = p.contiguous(), dense_z = z.contiguous();
  const int64_t rows = p.size(0), columns = p.size(1);
  std::vector<double> losses(rows);
  with_dtypes(p, z, [&]<typename P, typename Z>(P, Z) {
    const P* from_p = dense_p.const_data_ptr<P>();
    const Z* from_z = dense_z.const_data_ptr<Z>();
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
  const at::Tensor dense_p = p.contiguous(), dense_z = z.contiguous();
  const at::Tensor grad_p = p_gradient ? at::empty_like(dense_p) : at::empty({0}, p.options());
  const at::Tensor grad_z = z_gradient ? at::empty_like(dense_z) : at::empty({0}, z.options());
  const int64_t rows = p.size(0), columns = p.size(1);
  const double factor = -2 * grad.item<double>() / static_cast<double>(rows);
  with_dtypes(p, z, [&]<typename P, typename Z>(P, Z) {
    const P* from_p = dense_p.const_data_ptr<P>();
    const Z* from_z = dense_z.const_data_ptr<Z>();
    P* to_p = grad_p.mutable_data_ptr<P>();
    Z* to_z = grad_z.mutable_data_ptr<Z>();
    at::parallel_for(0, rows, grain(columns), [&](int64_t n, int64_t end) {
      for (; n < end; ++n) {
        const P* row_p = from_p + n * columns;
        const Z* row_z = from_z + n * columns;
        const Row row = measure(row_p, row_z, columns);
        if (p_gradient) {
          gradient(
              row_p, row_z, columns, row.length_p, row.length_z, row.clamped_p ? 0 : row.cosine, factor / row.length_p,
              to_p + n * columns);
        }
        if (z_gradient) {
          gradient(
              row_z, row_p, columns, row.length_z, row.length_p, row.clamped_z ? 0 : row.cosine, factor / row.length_z,
              to_z + n * columns);
        }
      }
    });
  });
  return {grad_p, grad_z};
}

} // namespace dspnet::CPU_CAPABILITY
