// conv_moments and its gradient: checks the arguments, allocates the results, and calls the pointwise, depthwise or
// dense implementation.
#include "conv_moments.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "activations.h"
#include "check.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

ConvShape check_shape(
    const char* op,
    const at::Tensor& x,
    const at::Tensor& weight,
    int64_t out_channels,
    int64_t stride,
    int64_t padding,
    int64_t groups,
    int64_t views) {
  check_activation(op, "x", x);
  check_cpu(op, "weight", weight);
  TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == at::kFloat && weight.size(2) == weight.size(3), op,
      ": weight must be [O, I, k, k] of float32, got ", weight.sizes(), " ", weight.scalar_type());
  const int64_t channels = x.size(1), kernel = weight.size(2);
  TORCH_CHECK(
      groups == 1 || (groups > 0 && groups == channels && groups == out_channels), op, ": ", groups, " groups for ",
      channels, " channels in and ", out_channels, " out: use 1, or as many as channels for a depthwise convolution");
  TORCH_CHECK(
      out_channels > 0 && out_channels <= weight.size(0) && channels > 0 && channels / groups <= weight.size(1) &&
          (groups == 1 || weight.size(1) == 1),
      op, ": a weight of ", weight.sizes(), " has no prefix of ", out_channels, " x ", channels / groups);
  constexpr int64_t limit = 1 << 20; // larger than any real value, small enough not to overflow
  TORCH_CHECK(
      stride > 0 && stride < limit && padding >= 0 && padding < limit && kernel > 0 && x.numel() > 0 &&
          x.size(2) + 2 * padding >= kernel && x.size(3) + 2 * padding >= kernel,
      op, ": no output for ", x.sizes(), " by kernel ", kernel, ", stride ", stride, ", padding ", padding);
  return {
      x.size(0),
      channels,
      x.size(2),
      x.size(3),
      out_channels,
      (x.size(2) + 2 * padding - kernel) / stride + 1,
      (x.size(3) + 2 * padding - kernel) / stride + 1,
      kernel,
      stride,
      padding,
      views};
}

Prefix strided_prefix(const at::Tensor& weight) {
  return {weight.mutable_data_ptr<float>(), weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
}

// For groups = 1. Groups > 1 are depthwise.
bool is_pointwise(const ConvShape& shape) {
  return shape.kernel == 1 && shape.stride == 1 && shape.padding == 0;
}

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_moments(
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act,
    const OptionalTensor& gate,
    const at::Tensor& weight,
    int64_t out_channels,
    int64_t stride,
    int64_t padding,
    int64_t groups,
    int64_t views) {
  const at::NoGradGuard no_grad;
  const char* op = "conv_moments";
  const ConvShape shape = check_shape(op, x, weight, out_channels, stride, padding, groups, views);
  const CheckedDeferred checked = check_deferred(op, x, scale, shift, act, gate, views);
  const at::Tensor input = channels_last(x);
  const at::Tensor y = at::empty(
      {shape.images, shape.out_channels, shape.out_height, shape.out_width},
      x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const at::Tensor mean = at::empty({views, out_channels}, x.options().dtype(at::kFloat));
  const at::Tensor variance = at::empty_like(mean);
  with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
    const Forward<scalar_t> args{
        input.const_data_ptr<scalar_t>(), checked.deferred, strided_prefix(weight), y.mutable_data_ptr<scalar_t>(),
        mean.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>()};
    if (groups > 1) {
      depthwise_forward(shape, args);
    } else if (is_pointwise(shape)) {
      pointwise_forward(shape, args);
    } else {
      dense_forward(shape, args);
    }
  });
  return {y, mean, variance};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> conv_moments_backward(
    const at::Tensor& grad_y,
    const at::Tensor& grad_mean,
    const at::Tensor& grad_variance,
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act,
    const OptionalTensor& gate,
    const at::Tensor& weight,
    const OptionalTensor& main_grad,
    const at::Tensor& y,
    const at::Tensor& mean,
    int64_t stride,
    int64_t padding,
    int64_t groups,
    bool input_gradient,
    bool weight_gradient) {
  const at::NoGradGuard no_grad;
  const char* op = "conv_moments_backward";
  check_activation(op, "y", y);
  check_cpu(op, "mean", mean);
  TORCH_CHECK(mean.dim() == 2, op, ": mean must be [views, ", y.size(1), "], got ", mean.sizes());
  const int64_t views = mean.size(0);
  const ConvShape shape = check_shape(op, x, weight, y.size(1), stride, padding, groups, views);
  const CheckedDeferred checked = check_deferred(op, x, scale, shift, act, gate, views);
  check_like(op, "grad_y", grad_y, y);
  TORCH_CHECK(
      y.scalar_type() == x.scalar_type() && y.size(0) == shape.images && y.size(2) == shape.out_height &&
          y.size(3) == shape.out_width,
      op, ": y must be the output for x, got ", y.sizes(), " ", y.scalar_type());
  const at::Tensor means = check_matrix(op, "mean", mean, views, y.size(1));
  const at::Tensor grad_means = check_matrix(op, "grad_mean", grad_mean, views, y.size(1));
  const at::Tensor grad_variances = check_matrix(op, "grad_variance", grad_variance, views, y.size(1));
  if (main_grad) {
    check_main_grad(op, "main_grad", *main_grad, weight);
  }

  const at::Tensor input = channels_last(x), output = channels_last(y), grad_output = channels_last(grad_y);
  const at::Tensor grad_x = input_gradient ? empty_channels_last(x) : at::empty({0}, x.options());
  const int64_t rows = checked.deferred.rows;
  const at::Tensor grad_scale = empty_fp32(x, input_gradient && rows > 0, {rows, shape.channels});
  const at::Tensor grad_shift = empty_fp32(x, input_gradient && rows > 0, {rows, shape.channels});
  const at::Tensor grad_gate = empty_fp32(x, input_gradient && gate, {shape.images, shape.channels});
  const bool returned = weight_gradient && !main_grad;
  const at::Tensor grad_weight = returned ? at::zeros_like(weight) : empty_fp32(x, false, {});

  with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
    const Backward<scalar_t> args{
        grad_output.const_data_ptr<scalar_t>(), grad_means.const_data_ptr<float>(),
        grad_variances.const_data_ptr<float>(), input.const_data_ptr<scalar_t>(), checked.deferred,
        strided_prefix(weight), output.const_data_ptr<scalar_t>(), means.const_data_ptr<float>(),
        input_gradient ? grad_x.mutable_data_ptr<scalar_t>() : nullptr, data_or_null(grad_scale),
        data_or_null(grad_shift), data_or_null(grad_gate),
        weight_gradient ? strided_prefix(main_grad ? *main_grad : grad_weight) : Prefix{nullptr, 0, 0, 0, 0}};
    if (groups > 1) {
      depthwise_backward(shape, args);
    } else if (is_pointwise(shape)) {
      pointwise_backward(shape, args);
    } else {
      dense_backward(shape, args);
    }
  });
  return {grad_x, grad_scale, grad_shift, grad_gate, grad_weight};
}

} // namespace dspnet::CPU_CAPABILITY
