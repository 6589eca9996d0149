// Declarations of all compiled operators for the CPU: the builds of each, and its signature.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "capability.h"

using Tensor = const at::Tensor&;
using OptionalTensor = const std::optional<at::Tensor>&;
using Tensors2 = std::tuple<at::Tensor, at::Tensor>;
using Tensors3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors7 =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

DSPNET_CPU_BUILDS(
    void, adamw_ema_step, Tensor params, Tensor grads, Tensor momenta, Tensor variances, Tensor targets, Tensor steps,
    at::IntArrayRef starts, at::IntArrayRef sizes, Tensor lr, Tensor weight_decay, Tensor tau, double beta1,
    double beta2, double eps, OptionalTensor apply)
DSPNET_CPU_BUILDS(
    Tensors3, conv_moments, Tensor x, OptionalTensor scale, OptionalTensor shift, std::string_view act,
    OptionalTensor gate, Tensor weight, int64_t out_channels, int64_t stride, int64_t padding, int64_t groups,
    int64_t views)
DSPNET_CPU_BUILDS(
    Tensors5, conv_moments_backward, Tensor grad_y, Tensor grad_mean, Tensor grad_variance, Tensor x,
    OptionalTensor scale, OptionalTensor shift, std::string_view act, OptionalTensor gate, Tensor weight,
    OptionalTensor main_grad, Tensor y, Tensor mean, int64_t stride, int64_t padding, int64_t groups,
    bool input_gradient, bool weight_gradient, OptionalTensor pooled_grad, OptionalTensor pooled_scale,
    OptionalTensor pooled_shift, std::string_view pooled_act)

DSPNET_CPU_BUILDS(void, ema_update, at::TensorList targets, at::TensorList onlines, double tau)
DSPNET_CPU_BUILDS(
    void, lars_ema_step, Tensor params, Tensor grads, Tensor momenta, Tensor targets, at::IntArrayRef starts,
    at::IntArrayRef sizes, Tensor lr, Tensor tau, double weight_decay, double momentum, double eta,
    OptionalTensor apply)
DSPNET_CPU_BUILDS(
    at::Tensor, norm_act, Tensor x, OptionalTensor scale, OptionalTensor shift, std::string_view act,
    OptionalTensor gate, OptionalTensor residual, OptionalTensor residual_scale, OptionalTensor residual_shift)
DSPNET_CPU_BUILDS(
    Tensors7, norm_act_backward, Tensor grad, Tensor x, OptionalTensor scale, OptionalTensor shift,
    std::string_view act, OptionalTensor gate, OptionalTensor residual, OptionalTensor residual_scale,
    OptionalTensor residual_shift, bool residual_gradient)
DSPNET_CPU_BUILDS(
    Tensors3, norm_act_pool, Tensor x, OptionalTensor scale, OptionalTensor shift, std::string_view act,
    bool gradient_means)
DSPNET_CPU_BUILDS(
    Tensors3, norm_act_pool_backward, Tensor grad, Tensor x, OptionalTensor scale, OptionalTensor shift,
    std::string_view act, Tensor gradient_mean, Tensor gradient_x_mean, bool input_gradient)
DSPNET_CPU_BUILDS(at::Tensor, normalized_mse, Tensor p, Tensor z)
DSPNET_CPU_BUILDS(
    Tensors2, normalized_mse_backward, Tensor grad, Tensor p, Tensor z, bool p_gradient, bool z_gradient)
DSPNET_CPU_BUILDS(
    Tensors2, scale_shift, Tensor mean, Tensor variance, OptionalTensor weight, OptionalTensor bias, double eps)
DSPNET_CPU_BUILDS(
    Tensors4, scale_shift_backward, Tensor grad_scale, Tensor grad_shift, Tensor mean, Tensor variance,
    OptionalTensor weight, OptionalTensor weight_main_grad, OptionalTensor bias, OptionalTensor bias_main_grad,
    double eps)
DSPNET_CPU_BUILDS(
    Tensors3, slim_batch_norm, Tensor x, OptionalTensor weight, OptionalTensor bias, double eps, int64_t views)
DSPNET_CPU_BUILDS(
    Tensors3, slim_batch_norm_backward, Tensor grad_y, Tensor grad_mean, Tensor grad_variance, Tensor x,
    OptionalTensor weight, Tensor mean, Tensor variance, double eps)
DSPNET_CPU_BUILDS(
    at::Tensor, slim_linear, Tensor x, Tensor weight, OptionalTensor bias, int64_t out_features)
DSPNET_CPU_BUILDS(
    Tensors3, slim_linear_backward, Tensor grad, Tensor x, Tensor weight, OptionalTensor main_grad, bool input_gradient,
    bool weight_gradient, bool bias_gradient)
