// norm_act_pool, the means over all positions of act(z), act'(z) and act'(z) x, z = scale x + shift, and its gradient:
//
//   dx = d scale act'(z) / positions    dscale = sum(d mean(act'(z) x))    dshift = sum(d mean(act'(z)))
//
// Bound by memory: forward reads x; backward reads x and writes dx, or neither if dx is not wanted. Without deferred
// normalisation and with the identity, backward only writes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "activations.h"
#include "check.h"
#include "panels.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

struct PoolProblem {
  int64_t images, positions, channels;
  Deferred deferred;
};

using Means = std::array<float*, 3>; // of act(z), act'(z) and act'(z) x, [images, channels] each

// Adds the sums over `rows` rows to `sums`, the first one only without `gradients`.
template <Act act, bool gradients, typename P, typename scalar_t>
void sum_panel(
    const P& panel,
    const PoolProblem& problem,
    int64_t n,
    const scalar_t* x,
    int64_t begin,
    int64_t rows,
    const Means& sums) {
  const int64_t channels = problem.channels;
  Vec scale[P::vectors], shift[P::vectors], sum[P::vectors], gradient_sum[P::vectors], gradient_x_sum[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(problem.deferred.scale_of(n, problem.images, channels), v, 1);
    shift[v] = panel.get_or(problem.deferred.shift_of(n, problem.images, channels), v, 0);
    sum[v] = gradient_sum[v] = gradient_x_sum[v] = Vec(0);
  }
  for (int64_t at = begin * channels; at < (begin + rows) * channels; at += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec value = panel.read(x + at, v), z = at::vec::fmadd(value, scale[v], shift[v]);
      sum[v] = sum[v] + activate<act>(z);
      if constexpr (gradients) {
        const Vec gradient = activation_gradient<act>(z);
        gradient_sum[v] = gradient_sum[v] + gradient;
        gradient_x_sum[v] = at::vec::fmadd(gradient, value, gradient_x_sum[v]);
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(sums[0], v, sum[v]);
    if constexpr (gradients) {
      panel.add(sums[1], v, gradient_sum[v]);
      panel.add(sums[2], v, gradient_x_sum[v]);
    }
  }
}

// grad: the gradient of the image's mean, [C].
template <Act act, typename P, typename scalar_t>
void backward_panel(
    const P& panel,
    const PoolProblem& problem,
    int64_t n,
    const float* grad,
    const scalar_t* x,
    scalar_t* grad_x,
    int64_t begin,
    int64_t rows) {
  const int64_t channels = problem.channels;
  const Vec part(1.f / static_cast<float>(problem.positions));
  Vec scale[P::vectors], shift[P::vectors], factor[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(problem.deferred.scale_of(n, problem.images, channels), v, 1);
    shift[v] = panel.get_or(problem.deferred.shift_of(n, problem.images, channels), v, 0);
    factor[v] = panel.get(grad, v) * part * scale[v];
  }
  for (int64_t at = begin * channels; at < (begin + rows) * channels; at += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec z = at::vec::fmadd(panel.read(x + at, v), scale[v], shift[v]);
      panel.write(grad_x + at, v, factor[v] * activation_gradient<act>(z));
    }
  }
}

// The last two means are null if not wanted.
template <typename scalar_t>
void forward(const PoolProblem& problem, const scalar_t* x, const Means& means) {
  const int64_t channels = problem.channels;
  const Parts parts(problem.images, problem.positions, at::get_num_threads());
  const size_t count = means[1] ? 3 : 1;
  std::vector<float> part_sums(parts.per_image > 1 ? count * parts.size() * channels : 0);
  Means sums = means;
  for (size_t i = 0; i < count && !part_sums.empty(); ++i) {
    sums[i] = part_sums.data() + i * parts.size() * channels;
  }
  const float positions = static_cast<float>(problem.positions);
  const auto run = [&](auto act, auto gradients) {
    at::parallel_for(0, parts.size(), parts.grain(channels), [&](int64_t part, int64_t end) {
      for (; part < end; ++part) {
        Means sum{};
        for (size_t i = 0; i < count; ++i) {
          sum[i] = sums[i] + part * channels;
          std::fill_n(sum[i], channels, 0.f);
        }
        const int64_t n = parts.image(part);
        for_blocks(parts.begin(part), parts.end(part), channels, [&](const auto& panel, int64_t row, int64_t rows) {
          sum_panel<act(), gradients()>(panel, problem, n, x, row, rows, sum);
        });
        for (size_t i = 0; i < count; ++i) {
          std::transform(sum[i], sum[i] + channels, sum[i], [&](float value) { return value / positions; });
        }
      }
    });
  };
  with_act(problem.deferred.act, [&](auto act) {
    if (count > 1) {
      run(act, std::true_type{});
    } else {
      run(act, std::false_type{});
    }
  });
  for (size_t i = 0; i < count && !part_sums.empty(); ++i) {
    add_parts(sums[i], parts, channels, means[i]);
  }
}

template <typename scalar_t>
void backward(const PoolProblem& problem, const float* grad, const scalar_t* x, scalar_t* grad_x) {
  const int64_t channels = problem.channels;
  const Parts parts(problem.images, problem.positions, at::get_num_threads());
  with_act(problem.deferred.act, [&](auto act) {
    at::parallel_for(0, parts.size(), parts.grain(channels), [&](int64_t part, int64_t end) {
      for (; part < end; ++part) {
        const int64_t n = parts.image(part);
        for_blocks(parts.begin(part), parts.end(part), channels, [&](const auto& panel, int64_t row, int64_t rows) {
          backward_panel<act()>(panel, problem, n, grad + n * channels, x, grad_x, row, rows);
        });
      }
    });
  });
}

// to[row, c] = the sum of grad[n, c] mean[n, c] over the images of each row of scale and shift.
void sum_rows(const PoolProblem& problem, const float* grad, const float* mean, float* to) {
  const int64_t channels = problem.channels, images = problem.images / problem.deferred.rows;
  std::vector<double> sums(channels);
  for (int64_t row = 0; row < problem.deferred.rows; ++row) {
    std::fill(sums.begin(), sums.end(), 0);
    for (int64_t at = row * images * channels; at < (row + 1) * images * channels; at += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        sums[c] += static_cast<double>(grad[at + c]) * mean[at + c];
      }
    }
    std::copy(sums.begin(), sums.end(), to + row * channels);
  }
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_act_pool(
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act,
    bool gradient_means) {
  const at::NoGradGuard no_grad;
  const char* op = "norm_act_pool";
  check_activation(op, "x", x);
  check_positions(op, x);
  const CheckedDeferred checked = check_deferred(op, x, scale, shift, act, std::nullopt, 0);
  const at::IntArrayRef sizes = x.sizes().slice(0, 2);
  const at::Tensor mean = empty_fp32(x, true, sizes), gradient_mean = empty_fp32(x, gradient_means, sizes);
  const at::Tensor gradient_x_mean = at::empty_like(gradient_mean);
  if (x.numel() > 0) {
    const at::Tensor input = channels_last(x);
    with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
      forward(
          problem_of(x, checked.deferred), input.const_data_ptr<scalar_t>(),
          {mean.mutable_data_ptr<float>(), data_or_null(gradient_mean), data_or_null(gradient_x_mean)});
    });
  }
  return {mean, gradient_mean, gradient_x_mean};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_act_pool_backward(
    const at::Tensor& grad,
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act,
    const at::Tensor& gradient_mean,
    const at::Tensor& gradient_x_mean,
    bool input_gradient) {
  const at::NoGradGuard no_grad;
  const char* op = "norm_act_pool_backward";
  check_activation(op, "x", x);
  check_positions(op, x);
  const CheckedDeferred checked = check_deferred(op, x, scale, shift, act, std::nullopt, 0);
  const at::Tensor grads = check_matrix(op, "grad", grad, x.size(0), x.size(1));
  const PoolProblem problem = problem_of(x, checked.deferred);
  const int64_t rows = checked.deferred.rows;
  const at::Tensor grad_scale = empty_fp32(x, rows > 0, {rows, x.size(1)}), grad_shift = at::empty_like(grad_scale);
  if (rows > 0) {
    const at::Tensor means = check_matrix(op, "gradient_mean", gradient_mean, x.size(0), x.size(1));
    const at::Tensor x_means = check_matrix(op, "gradient_x_mean", gradient_x_mean, x.size(0), x.size(1));
    const float* from = grads.const_data_ptr<float>();
    sum_rows(problem, from, x_means.const_data_ptr<float>(), grad_scale.mutable_data_ptr<float>());
    sum_rows(problem, from, means.const_data_ptr<float>(), grad_shift.mutable_data_ptr<float>());
  }
  const at::Tensor grad_x = input_gradient ? empty_channels_last(x) : at::empty({0}, x.options());
  if (grad_x.numel() > 0) {
    with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
      scalar_t* to = grad_x.mutable_data_ptr<scalar_t>();
      const float* from = grads.const_data_ptr<float>();
      if (rows == 0 && checked.deferred.act == Act::identity) {
        broadcast_gradient(problem, from, to);
      } else {
        backward(problem, from, channels_last(x).const_data_ptr<scalar_t>(), to);
      }
    });
  }
  return {grad_x, grad_scale, grad_shift};
}

} // namespace dspnet::CPU_CAPABILITY
