// slim_batch_norm: y = (x - mean) rsqrt(variance + eps) weight + bias with the moments of each view, and its gradient
//
//   dx = weight r dy + (dmean - weight r dbias) / cnt + 2 (x - mean) (dvariance - weight r^2 dweight / 2) / cnt
//
// with r = rsqrt(variance + eps), dbias = sum(dy), dweight = r sum(dy (x - mean)). x is [rows, C]: [N, C], or
// channels-last [N, C, H, W]. Bound by memory: forward reads x twice, for the moments and to normalise, and writes y;
// backward reads dy and x twice and writes dx. The moments depend on the whole view, so one pass is not possible.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "activations.h"
#include "check.h"
#include "moments.h"
#include "panels.h"
#include "thread_sums.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

// Splits rows into blocks; no block contains rows of two views.
struct Batch {
  static constexpr int64_t kRows = 128; // rows of a block, summed in fp32

  int64_t views, view_rows, channels;

  int64_t blocks_per_view() const {
    return (view_rows + kRows - 1) / kRows;
  }
  int64_t blocks() const {
    return views * blocks_per_view();
  }
  int64_t view(int64_t block) const {
    return block / blocks_per_view();
  }
  int64_t begin(int64_t block) const {
    return view(block) * view_rows + block % blocks_per_view() * kRows;
  }
  int64_t end(int64_t block) const {
    return std::min(begin(block) + kRows, (view(block) + 1) * view_rows);
  }
  int64_t grain() const {
    return kGrainElements / (kRows * channels) + 1;
  }
};

// Adds x - pivot to sum and, if `squared`, its square to square, [C] each.
template <bool squared, typename P, typename scalar_t>
void add_differences(
    const P& panel, const scalar_t* x, int64_t rows, int64_t channels, const float* pivot, float* sum, float* square) {
  Vec from[P::vectors], total[P::vectors], squares[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    from[v] = panel.get_or(pivot, v, 0);
    total[v] = squares[v] = Vec(0);
  }
  for (int64_t row = 0; row < rows; ++row, x += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec difference = panel.get(x, v) - from[v];
      total[v] = total[v] + difference;
      squares[v] = at::vec::fmadd(difference, difference, squares[v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(sum, v, total[v]);
    if constexpr (squared) {
      panel.add(square, v, squares[v]);
    }
  }
}

// The first pivot: the mean of a few rows.
template <typename scalar_t>
void first_pivot(const scalar_t* x, int64_t rows, int64_t channels, float* pivot) {
  std::fill_n(pivot, channels, 0.f);
  for_panels(channels, [&](const auto& panel) {
    add_differences<false>(panel, x, rows, channels, nullptr, pivot, nullptr);
  });
  for (int64_t c = 0; c < channels; ++c) {
    pivot[c] /= static_cast<float>(rows);
  }
}

template <typename scalar_t>
void moments(const Batch& batch, const scalar_t* x, float* mean, float* variance) {
  const int64_t channels = batch.channels;
  std::vector<ChannelMoments> partial(at::get_num_threads() * batch.views); // [thread, view]
  at::parallel_for(0, batch.blocks(), batch.grain(), [&](int64_t block, int64_t last) {
    std::vector<float> memory(3 * channels);
    float *pivot = memory.data(), *sum = pivot + channels, *square = sum + channels;
    for (; block < last; ++block) {
      ChannelMoments& moments_of_thread = partial[at::get_thread_num() * batch.views + batch.view(block)];
      const int64_t begin = batch.begin(block), end = batch.end(block);
      if (!moments_of_thread.to_pivot(pivot)) {
        first_pivot(x + begin * channels, std::min<int64_t>(16, end - begin), channels, pivot);
      }
      std::fill_n(sum, 2 * channels, 0.f);
      for_blocks(begin, end, channels, [&](const auto& panel, int64_t row, int64_t rows) {
        add_differences<true>(panel, x + row * channels, rows, channels, pivot, sum, square);
      });
      moments_of_thread.merge(end - begin, channels, pivot, sum, square);
    }
  });
  write_moments(partial, batch.views, channels, mean, variance);
}

// means, scales, shifts: [C]; shifts may be null, for 0.
template <typename P, typename scalar_t>
void normalize_panel(
    const P& panel,
    const scalar_t* x,
    scalar_t* y,
    int64_t rows,
    int64_t channels,
    const float* means,
    const float* scales,
    const float* shifts) {
  Vec mean[P::vectors], scale[P::vectors], shift[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    mean[v] = panel.get(means, v);
    scale[v] = panel.get(scales, v);
    shift[v] = panel.get_or(shifts, v, 0);
  }
  for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      panel.put(y, v, at::vec::fmadd(panel.get(x, v) - mean[v], scale[v], shift[v]));
    }
  }
}

template <typename scalar_t>
void forward(
    const Batch& batch,
    const scalar_t* x,
    const float* weight,
    const float* bias,
    float eps,
    scalar_t* y,
    float* mean,
    float* variance) {
  const int64_t channels = batch.channels;
  moments(batch, x, mean, variance);
  std::vector<float> scale(batch.views * channels);
  for (int64_t i = 0; i < batch.views * channels; ++i) {
    scale[i] = (weight ? weight[i % channels] : 1.f) / std::sqrt(variance[i] + eps);
  }
  at::parallel_for(0, batch.blocks(), batch.grain(), [&](int64_t block, int64_t last) {
    for (; block < last; ++block) {
      const float* means = mean + batch.view(block) * channels;
      const float* scales = scale.data() + batch.view(block) * channels;
      for_blocks(batch.begin(block), batch.end(block), channels, [&](const auto& panel, int64_t row, int64_t rows) {
        normalize_panel(panel, x + row * channels, y + row * channels, rows, channels, means, scales, bias);
      });
    }
  });
}

// Adds dy to sum and dy (x - mean) to sum_centred, [C] each.
template <typename P, typename scalar_t>
void sum_panel(
    const P& panel,
    const scalar_t* dy,
    const scalar_t* x,
    int64_t rows,
    int64_t channels,
    const float* means,
    float* sum,
    float* sum_centred) {
  Vec mean[P::vectors], total[P::vectors], centred[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    mean[v] = panel.get(means, v);
    total[v] = centred[v] = Vec(0);
  }
  for (int64_t row = 0; row < rows; ++row, dy += channels, x += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec grad = panel.get(dy, v);
      total[v] = total[v] + grad;
      centred[v] = at::vec::fmadd(grad, panel.get(x, v) - mean[v], centred[v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(sum, v, total[v]);
    panel.add(sum_centred, v, centred[v]);
  }
}

// One view's factors, [C] each: dx = grad_factor dy + constant + centred_factor (x - mean).
struct Factors {
  const float* mean;
  const float* grad_factor;
  const float* constant;
  const float* centred_factor;
};

template <typename P, typename scalar_t>
void gradient_panel(
    const P& panel,
    const scalar_t* dy,
    const scalar_t* x,
    scalar_t* dx,
    int64_t rows,
    int64_t channels,
    const Factors& factors) {
  Vec mean[P::vectors], grad_factor[P::vectors], constant[P::vectors], centred_factor[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    mean[v] = panel.get(factors.mean, v);
    grad_factor[v] = panel.get(factors.grad_factor, v);
    constant[v] = panel.get(factors.constant, v);
    centred_factor[v] = panel.get(factors.centred_factor, v);
  }
  for (int64_t row = 0; row < rows; ++row, dy += channels, x += channels, dx += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec from_moments = at::vec::fmadd(panel.get(x, v) - mean[v], centred_factor[v], constant[v]);
      panel.put(dx, v, at::vec::fmadd(panel.get(dy, v), grad_factor[v], from_moments));
    }
  }
}

struct Vectors { // [views, C]; weight: [C] or null
  const float* grad_mean;
  const float* grad_variance;
  const float* weight;
  const float* mean;
  const float* variance;
};

// grad_weight, grad_bias: [C].
template <typename scalar_t>
void backward(
    const Batch& batch,
    const scalar_t* dy,
    const scalar_t* x,
    const Vectors& vectors,
    float eps,
    scalar_t* dx,
    float* grad_weight,
    float* grad_bias) {
  const int64_t channels = batch.channels, size = batch.views * channels;
  ThreadSums sums(batch.views, channels), sums_centred(batch.views, channels);
  at::parallel_for(0, batch.blocks(), batch.grain(), [&](int64_t block, int64_t last) {
    auto buffered = buffered_sums<2>(channels, int64_t{0}, [&](int64_t view, const auto& sums_of_view) {
      sums.add(view, sums_of_view[0]);
      sums_centred.add(view, sums_of_view[1]);
    });
    for (; block < last; ++block) {
      const int64_t begin = batch.begin(block), end = batch.end(block);
      const float* mean = vectors.mean + batch.view(block) * channels;
      const auto& [sum, sum_centred] = buffered.reserve(end - begin, batch.view(block));
      for_blocks(begin, end, channels, [&](const auto& panel, int64_t row, int64_t rows) {
        sum_panel(panel, dy + row * channels, x + row * channels, rows, channels, mean, sum, sum_centred);
      });
    }
    buffered.flush();
  });

  std::vector<float> view_grad_bias(size), view_grad_weight(size);
  std::vector<float> grad_factor(size), constant(size), centred_factor(size);
  sums.write(view_grad_bias.data());
  sums_centred.write(view_grad_weight.data());
  std::fill_n(grad_bias, channels, 0.f);
  std::fill_n(grad_weight, channels, 0.f);
  const float count = static_cast<float>(batch.view_rows);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = i % channels;
    const float rsqrt = 1.f / std::sqrt(vectors.variance[i] + eps);
    view_grad_weight[i] *= rsqrt;
    grad_factor[i] = vectors.weight ? vectors.weight[c] * rsqrt : rsqrt;
    constant[i] = (vectors.grad_mean[i] - grad_factor[i] * view_grad_bias[i]) / count;
    centred_factor[i] = 2 * (vectors.grad_variance[i] - grad_factor[i] * rsqrt * view_grad_weight[i] / 2) / count;
    grad_bias[c] += view_grad_bias[i];
    grad_weight[c] += view_grad_weight[i];
  }

  at::parallel_for(0, batch.blocks(), batch.grain(), [&](int64_t block, int64_t last) {
    for (; block < last; ++block) {
      const int64_t view_offset = batch.view(block) * channels;
      const Factors factors{
          vectors.mean + view_offset, grad_factor.data() + view_offset, constant.data() + view_offset,
          centred_factor.data() + view_offset};
      for_blocks(batch.begin(block), batch.end(block), channels, [&](const auto& panel, int64_t row, int64_t rows) {
        const int64_t at = row * channels;
        gradient_panel(panel, dy + at, x + at, dx + at, rows, channels, factors);
      });
    }
  });
}

Batch check(const char* op, const at::Tensor& x, int64_t views) {
  check_cpu(op, "x", x);
  TORCH_CHECK(
      (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) && x.numel() > 0 &&
          ((x.dim() == 2 && x.is_contiguous()) ||
           (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast))),
      op, ": x must be [N, C], contiguous, or [N, C, H, W], channels-last, of float32 or bfloat16, not empty, got ",
      x.sizes(), " ", x.scalar_type());
  TORCH_CHECK(views > 0 && x.size(0) % views == 0, op, ": ", x.size(0), " images are not ", views, " views");
  return {views, x.numel() / x.size(1) / views, x.size(1)};
}

// A float32 vector of the channels, contiguous, or an undefined tensor.
at::Tensor check_vector(const char* op, const char* name, const OptionalTensor& vector, int64_t channels) {
  if (!vector) {
    return {};
  }
  TORCH_CHECK(vector->dim() == 1, op, ": ", name, " must be [", channels, "], got ", vector->sizes());
  return check_matrix(op, name, vector->unsqueeze(0), 1, channels);
}

const float* pointer_or_null(const at::Tensor& vector) {
  return vector.defined() ? vector.const_data_ptr<float>() : nullptr;
}

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_batch_norm(
    const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t views) {
  const at::NoGradGuard no_grad;
  const char* op = "slim_batch_norm";
  const Batch batch = check(op, x, views);
  const at::Tensor weights = check_vector(op, "weight", weight, batch.channels);
  const at::Tensor biases = check_vector(op, "bias", bias, batch.channels);
  const at::Tensor y = at::empty_like(x);
  const at::Tensor mean = empty_fp32(x, true, {views, batch.channels}), variance = at::empty_like(mean);
  with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
    forward(
        batch, x.const_data_ptr<scalar_t>(), pointer_or_null(weights), pointer_or_null(biases),
        static_cast<float>(eps), y.mutable_data_ptr<scalar_t>(), mean.mutable_data_ptr<float>(),
        variance.mutable_data_ptr<float>());
  });
  return {y, mean, variance};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_batch_norm_backward(
    const at::Tensor& grad_y,
    const at::Tensor& grad_mean,
    const at::Tensor& grad_variance,
    const at::Tensor& x,
    const OptionalTensor& weight,
    const at::Tensor& mean,
    const at::Tensor& variance,
    double eps) {
  const at::NoGradGuard no_grad;
  const char* op = "slim_batch_norm_backward";
  check_cpu(op, "mean", mean);
  TORCH_CHECK(mean.dim() == 2, op, ": mean must be [views, C], got ", mean.sizes());
  const int64_t views = mean.size(0);
  const Batch batch = check(op, x, views);
  check_like(op, "grad_y", grad_y, x);
  const auto matrix = [&](const char* name, const at::Tensor& tensor) {
    return check_matrix(op, name, tensor, views, batch.channels);
  };
  const at::Tensor means = matrix("mean", mean), variances = matrix("variance", variance);
  const at::Tensor grad_means = matrix("grad_mean", grad_mean), grad_variances = matrix("grad_variance", grad_variance);
  const at::Tensor weights = check_vector(op, "weight", weight, batch.channels);
  const at::Tensor grads = x.dim() == 4 ? channels_last(grad_y) : grad_y.contiguous();
  const at::Tensor grad_x = at::empty_like(x);
  const at::Tensor grad_weight = empty_fp32(x, true, {batch.channels}), grad_bias = at::empty_like(grad_weight);
  const Vectors vectors{
      grad_means.const_data_ptr<float>(), grad_variances.const_data_ptr<float>(), pointer_or_null(weights),
      means.const_data_ptr<float>(), variances.const_data_ptr<float>()};
  with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
    backward(
        batch, grads.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), vectors, static_cast<float>(eps),
        grad_x.mutable_data_ptr<scalar_t>(), grad_weight.mutable_data_ptr<float>(),
        grad_bias.mutable_data_ptr<float>());
  });
  return {grad_x, grad_weight, grad_bias};
}

} // namespace dspnet::CPU_CAPABILITY
