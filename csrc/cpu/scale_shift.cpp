// scale = weight r and shift = bias - mean scale with r = rsqrt(variance + eps), and their gradients. With
// g = dscale - mean dshift,
//
//   dmean = -dshift weight r        dvariance = -g weight r^3 / 2        dweight = sum(g r)        dbias = sum(dshift)
//
// The tensors have a few thousand elements, so call overhead dominates: one call replaces a dozen, on one thread.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <tuple>

#include "check.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

void check_prefix(const char* op, const char* name, const at::Tensor& vector, int64_t channels) {
  check_cpu(op, name, vector);
  TORCH_CHECK(
      vector.dim() == 1 && vector.size(0) >= channels && vector.scalar_type() == at::kFloat, op, ": ", name,
      " must be a float32 vector of ", channels, " or more, got ", vector.sizes(), " ", vector.scalar_type());
}

// A prefix of a vector, or a constant if there is no vector.
class Affine {
 public:
  Affine(const char* op, const char* name, const OptionalTensor& vector, int64_t channels, float constant)
      : constant_(constant) {
    if (vector) {
      check_prefix(op, name, *vector, channels);
      vector_ = vector->contiguous();
      data_ = vector_.const_data_ptr<float>();
    }
  }
  float operator[](int64_t channel) const {
    return data_ ? data_[channel] : constant_;
  }

 private:
  at::Tensor vector_;
  const float* data_ = nullptr;
  float constant_;
};

// The buffer for the gradient of a vector: its main_grad, or a new full-size tensor, or none without a vector.
class Gradient {
 public:
  Gradient(
      const char* op, const char* name, const OptionalTensor& vector, const OptionalTensor& main_grad,
      const at::Tensor& like) {
    TORCH_CHECK(!main_grad || vector, op, ": ", name, " given without its vector");
    if (main_grad) {
      check_main_grad(op, name, *main_grad, *vector);
    }
    returned = vector && !main_grad ? at::zeros_like(*vector) : at::empty({0}, like.options());
    if (vector) {
      const at::Tensor& to = main_grad ? *main_grad : returned;
      data_ = to.mutable_data_ptr<float>();
      stride_ = to.stride(0);
    }
  }
  void add(int64_t channel, float value) const {
    if (data_) {
      data_[channel * stride_] += value;
    }
  }

  at::Tensor returned;

 private:
  float* data_ = nullptr;
  int64_t stride_ = 1;
};

} // namespace

std::tuple<at::Tensor, at::Tensor> scale_shift(
    const at::Tensor& mean,
    const at::Tensor& variance,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    double eps) {
  const at::NoGradGuard no_grad;
  const char* op = "scale_shift";
  check_cpu(op, "mean", mean);
  TORCH_CHECK(mean.dim() == 2, op, ": mean must be [V, C], got ", mean.sizes());
  const int64_t views = mean.size(0), channels = mean.size(1);
  const at::Tensor means = check_matrix(op, "mean", mean, views, channels);
  const at::Tensor variances = check_matrix(op, "variance", variance, views, channels);
  const Affine weights(op, "weight", weight, channels, 1), biases(op, "bias", bias, channels, 0);
  const at::Tensor scale = at::empty_like(means), shift = at::empty_like(means);

  const float *m = means.const_data_ptr<float>(), *v = variances.const_data_ptr<float>();
  float *to_scale = scale.mutable_data_ptr<float>(), *to_shift = shift.mutable_data_ptr<float>();
  for (int64_t i = 0; i < views * channels;) { // not a loop over views: they may be any number if channels = 0
    for (int64_t channel = 0; channel < channels; ++channel, ++i) {
      to_scale[i] = weights[channel] / std::sqrt(v[i] + static_cast<float>(eps));
      to_shift[i] = biases[channel] - m[i] * to_scale[i];
    }
  }
  return {scale, shift};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> scale_shift_backward(
    const at::Tensor& grad_scale,
    const at::Tensor& grad_shift,
    const at::Tensor& mean,
    const at::Tensor& variance,
    const OptionalTensor& weight,
    const OptionalTensor& weight_main_grad,
    const OptionalTensor& bias,
    const OptionalTensor& bias_main_grad,
    double eps) {
  const at::NoGradGuard no_grad;
  const char* op = "scale_shift_backward";
  check_cpu(op, "mean", mean);
  TORCH_CHECK(mean.dim() == 2, op, ": mean must be [V, C], got ", mean.sizes());
  const int64_t views = mean.size(0), channels = mean.size(1);
  const auto matrix = [&](const char* name, const at::Tensor& tensor) {
    return check_matrix(op, name, tensor, views, channels);
  };
  const at::Tensor means = matrix("mean", mean), variances = matrix("variance", variance);
  const at::Tensor grad_scales = matrix("grad_scale", grad_scale), grad_shifts = matrix("grad_shift", grad_shift);
  const Affine weights(op, "weight", weight, channels, 1), biases(op, "bias", bias, channels, 0);
  const Gradient grad_weight(op, "weight_main_grad", weight, weight_main_grad, mean);
  const Gradient grad_bias(op, "bias_main_grad", bias, bias_main_grad, mean);
  const at::Tensor grad_mean = at::empty_like(means), grad_variance = at::empty_like(means);

  const float *m = means.const_data_ptr<float>(), *v = variances.const_data_ptr<float>();
  const float *dscale = grad_scales.const_data_ptr<float>(), *dshift = grad_shifts.const_data_ptr<float>();
  float *dmean = grad_mean.mutable_data_ptr<float>(), *dvariance = grad_variance.mutable_data_ptr<float>();
  for (int64_t channel = 0; channel < channels; ++channel) {
    float weight_sum = 0, bias_sum = 0;
    for (int64_t i = channel; i < views * channels; i += channels) {
      const float rsqrt = 1 / std::sqrt(v[i] + static_cast<float>(eps));
      const float scale = weights[channel] * rsqrt, grad = dscale[i] - m[i] * dshift[i];
      dmean[i] = -dshift[i] * scale;
      dvariance[i] = -grad * scale * rsqrt * rsqrt / 2;
      weight_sum += grad * rsqrt;
      bias_sum += dshift[i];
    }
    grad_weight.add(channel, weight_sum);
    grad_bias.add(channel, bias_sum);
  }
  return {grad_mean, grad_variance, grad_weight.returned, grad_bias.returned};
}

} // namespace dspnet::CPU_CAPABILITY
