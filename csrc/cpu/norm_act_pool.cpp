// norm_act_pool, the mean over all positions of act(z), z = scale x + shift, and its gradient:
//
//   dz = d act'(z) / positions    dx = scale dz    dscale = sum(dz x)    dshift = sum(dz)
//
// Bound by memory: forward reads x; backward reads x and writes dx. Without deferred normalisation and with the
// identity, backward only writes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "activations.h"
#include "check.h"
#include "panels.h"
#include "thread_sums.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

struct PoolProblem {
  int64_t images, positions, channels;
  Deferred deferred;
};

template <Act act, typename P, typename scalar_t>
void sum_panel(
    const P& panel,
    const PoolProblem& problem,
    int64_t n,
    const scalar_t* x,
    int64_t begin,
    int64_t rows,
    float* sums) {
  const int64_t channels = problem.channels;
  Vec scale[P::vectors], shift[P::vectors], sum[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(problem.deferred.scale_of(n, problem.images, channels), v, 1);
    shift[v] = panel.get_or(problem.deferred.shift_of(n, problem.images, channels), v, 0);
    sum[v] = Vec(0);
  }
  for (int64_t at = begin * channels; at < (begin + rows) * channels; at += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      sum[v] = sum[v] + activate<act>(at::vec::fmadd(panel.get(x + at, v), scale[v], shift[v]));
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(sums, v, sum[v]);
  }
}

// grad: the gradient of the image's mean, [C]. dz_sum, dz_x_sum: [C] each.
template <Act act, typename P, typename scalar_t>
void backward_panel(
    const P& panel,
    const PoolProblem& problem,
    int64_t n,
    const float* grad,
    const scalar_t* x,
    scalar_t* grad_x,
    int64_t begin,
    int64_t rows,
    float* dz_sum,
    float* dz_x_sum) {
  const int64_t channels = problem.channels;
  const Vec part(1.f / static_cast<float>(problem.positions));
  Vec scale[P::vectors], shift[P::vectors], grad_h[P::vectors], dz_total[P::vectors], dz_x_total[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(problem.deferred.scale_of(n, problem.images, channels), v, 1);
    shift[v] = panel.get_or(problem.deferred.shift_of(n, problem.images, channels), v, 0);
    grad_h[v] = panel.get(grad, v) * part;
    dz_total[v] = dz_x_total[v] = Vec(0);
  }
  for (int64_t at = begin * channels; at < (begin + rows) * channels; at += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec value = panel.get(x + at, v);
      const Vec dz = grad_h[v] * activation_gradient<act>(at::vec::fmadd(value, scale[v], shift[v]));
      dz_total[v] = dz_total[v] + dz;
      dz_x_total[v] = at::vec::fmadd(dz, value, dz_x_total[v]);
      panel.put(grad_x + at, v, dz * scale[v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(dz_sum, v, dz_total[v]);
    panel.add(dz_x_sum, v, dz_x_total[v]);
  }
}

template <typename scalar_t>
void forward(const PoolProblem& problem, const scalar_t* x, float* out) {
  const int64_t channels = problem.channels;
  const Parts parts(problem.images, problem.positions, at::get_num_threads());
  std::vector<float> part_sums(parts.per_image > 1 ? parts.size() * channels : 0);
  float* sums = part_sums.empty() ? out : part_sums.data();
  const float positions = static_cast<float>(problem.positions);
  with_act(problem.deferred.act, [&](auto act) {
    at::parallel_for(0, parts.size(), parts.grain(channels), [&](int64_t part, int64_t end) {
      for (; part < end; ++part) {
        float* sum = sums + part * channels;
        std::fill_n(sum, channels, 0.f);
        const int64_t n = parts.image(part);
        for_blocks(parts.begin(part), parts.end(part), channels, [&](const auto& panel, int64_t row, int64_t rows) {
          sum_panel<act()>(panel, problem, n, x, row, rows, sum);
        });
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] /= positions;
        }
      }
    });
  });
  if (!part_sums.empty()) {
    add_parts(sums, parts, channels, out);
  }
}

template <typename scalar_t>
void backward(
    const PoolProblem& problem,
    const float* grad,
    const scalar_t* x,
    scalar_t* grad_x,
    float* grad_scale,
    float* grad_shift) {
  const int64_t channels = problem.channels;
  const Parts parts(problem.images, problem.positions, at::get_num_threads());
  ThreadSums dz(problem.deferred.rows, channels), dz_x(problem.deferred.rows, channels);
  with_act(problem.deferred.act, [&](auto act) {
    at::parallel_for(0, parts.size(), parts.grain(channels), [&](int64_t part, int64_t end) {
      auto buffered = buffered_sums<2>(channels, int64_t{0}, [&](int64_t row, const auto& sums) {
        dz.add(row, sums[0]);
        dz_x.add(row, sums[1]);
      });
      for (; part < end; ++part) {
        const int64_t n = parts.image(part), first = parts.begin(part), stop = parts.end(part);
        const auto [dz_sum, dz_x_sum] = buffered.reserve(stop - first, problem.deferred.row(n, problem.images));
        for_blocks(first, stop, channels, [&](const auto& panel, int64_t row, int64_t rows) {
          backward_panel<act()>(panel, problem, n, grad + n * channels, x, grad_x, row, rows, dz_sum, dz_x_sum);
        });
      }
      buffered.flush();
    });
  });
  dz.write(grad_shift);
  dz_x.write(grad_scale);
}

// Without deferred normalisation and with the identity, all positions of an image have the same gradient.
template <typename scalar_t>
void broadcast_gradient(const PoolProblem& problem, const float* grad, scalar_t* grad_x) {
  const int64_t channels = problem.channels;
  const Vec part(1.f / static_cast<float>(problem.positions));
  const int64_t rows_in_all = problem.images * problem.positions;
  at::parallel_for(0, rows_in_all, kGrainElements / channels + 1, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      for_panels(channels, [&]<typename P>(const P& panel) {
        for (int v = 0; v < P::vectors; ++v) {
          panel.put(grad_x + row * channels, v, panel.get(grad + row / problem.positions * channels, v) * part);
        }
      });
    }
  });
}

PoolProblem problem_of(const at::Tensor& x, const Deferred& deferred) {
  return {x.size(0), x.size(2) * x.size(3), x.size(1), deferred};
}

void check_positions(const char* op, const at::Tensor& x) {
  TORCH_CHECK(x.size(2) * x.size(3) > 0, op, ": no positions in ", x.sizes());
}

} // namespace

at::Tensor norm_act_pool(
    const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, std::string_view act) {
  const at::NoGradGuard no_grad;
  const char* op = "norm_act_pool";
  check_activation(op, "x", x);
  check_positions(op, x);
  const CheckedDeferred checked = check_deferred(op, x, scale, shift, act, std::nullopt, 0);
  const at::Tensor out = empty_fp32(x, true, {x.size(0), x.size(1)});
  if (x.numel() == 0) {
    return out;
  }
  const at::Tensor input = channels_last(x);
  with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
    forward(problem_of(x, checked.deferred), input.const_data_ptr<scalar_t>(), out.mutable_data_ptr<float>());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_act_pool_backward(
    const at::Tensor& grad,
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act) {
  const at::NoGradGuard no_grad;
  const char* op = "norm_act_pool_backward";
  check_activation(op, "x", x);
  check_positions(op, x);
  const CheckedDeferred checked = check_deferred(op, x, scale, shift, act, std::nullopt, 0);
  const at::Tensor grads = check_matrix(op, "grad", grad, x.size(0), x.size(1));
  const int64_t rows = checked.deferred.rows;
  const at::Tensor grad_x = empty_channels_last(x);
  const at::Tensor grad_scale = empty_fp32(x, rows > 0, {rows, x.size(1)}), grad_shift = at::empty_like(grad_scale);
  if (x.numel() == 0) {
    grad_scale.zero_();
    grad_shift.zero_();
    return {grad_x, grad_scale, grad_shift};
  }
  const PoolProblem problem = problem_of(x, checked.deferred);
  with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
    scalar_t* to = grad_x.mutable_data_ptr<scalar_t>();
    const float* from = grads.const_data_ptr<float>();
    if (rows == 0 && checked.deferred.act == Act::identity) {
      broadcast_gradient(problem, from, to);
    } else {
      const at::Tensor input = channels_last(x);
      backward(problem, from, input.const_data_ptr<scalar_t>(), to, data_or_null(grad_scale), data_or_null(grad_shift));
    }
  });
  return {grad_x, grad_scale, grad_shift};
}

} // namespace dspnet::CPU_CAPABILITY
