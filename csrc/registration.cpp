// The schemas of all compiled operators, torch.ops.dspnet_cpp.<operator> in Python. The public operators are
// dspnet::<operator>, defined in dspnet_fast/ops; they dispatch to these and to other providers.
#include <torch/library.h>

#include <string>

#include "operators.h"

TORCH_LIBRARY(dspnet_cpp, library) {
  library.def("cpu_capability() -> str", [] { // of the builds registered below, empty if there are none
    constexpr const char* names[] = {"", "DEFAULT", "AVX2", "AVX512"};
    return std::string(names[static_cast<int>(dspnet::build_capability())]);
  });
  library.def("cuda_problem(int device) -> str"); // the error message, empty if the device is usable
  library.def(
      "adamw_ema_step(Tensor(a!) params, Tensor(b!) grads, Tensor(c!) momenta, Tensor(d!) variances, "
      "Tensor(e!) targets, Tensor(f!) steps, int[] starts, int[] sizes, Tensor lr, Tensor weight_decay, Tensor tau, "
      "float beta1, float beta2, float eps, Tensor? apply=None) -> ()");
  library.def(
      "conv_moments(Tensor x, Tensor? scale, Tensor? shift, str act, Tensor? gate, Tensor weight, int out_channels, "
      "int stride, int padding, int groups, int views) -> (Tensor, Tensor, Tensor)");
  library.def(
      "conv_moments_backward(Tensor grad_y, Tensor grad_mean, Tensor grad_variance, Tensor x, Tensor? scale, "
      "Tensor? shift, str act, Tensor? gate, Tensor weight, Tensor(a!)? main_grad, Tensor y, Tensor mean, int stride, "
      "int padding, int groups, bool input_gradient, bool weight_gradient, Tensor? pooled_grad, "
      "Tensor? pooled_scale, Tensor? pooled_shift, str pooled_act) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("ema_update(Tensor(a!)[] targets, Tensor[] onlines, float tau) -> ()");
  library.def(
      "lars_ema_step(Tensor(a!) params, Tensor(b!) grads, Tensor(c!) momenta, Tensor(d!) targets, int[] starts, "
      "int[] sizes, Tensor lr, Tensor tau, float weight_decay, float momentum, float eta, Tensor? apply=None) -> ()");
  library.def(
      "norm_act(Tensor x, Tensor? scale, Tensor? shift, str act, Tensor? gate, Tensor? residual, "
      "Tensor? residual_scale, Tensor? residual_shift) -> Tensor");
  library.def(
      "norm_act_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? shift, str act, Tensor? gate, "
      "Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, bool residual_gradient) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "norm_act_pool(Tensor x, Tensor? scale, Tensor? shift, str act, bool gradient_means) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "norm_act_pool_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? shift, str act, Tensor gradient_mean, "
      "Tensor gradient_x_mean, bool input_gradient) -> (Tensor, Tensor, Tensor)");
  library.def("normalized_mse(Tensor p, Tensor z) -> Tensor");
  library.def(
      "normalized_mse_backward(Tensor grad, Tensor p, Tensor z, bool p_gradient, bool z_gradient) -> "
      "(Tensor, Tensor)");
  library.def(
      "scale_shift(Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  library.def(
      "scale_shift_backward(Tensor grad_scale, Tensor grad_shift, Tensor mean, Tensor variance, Tensor? weight, "
      "Tensor(a!)? weight_main_grad, Tensor? bias, Tensor(b!)? bias_main_grad, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "slim_batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, int views) -> (Tensor, Tensor, Tensor)");
  library.def(
      "slim_batch_norm_backward(Tensor grad_y, Tensor grad_mean, Tensor grad_variance, Tensor x, Tensor? weight, "
      "Tensor mean, Tensor variance, float eps) -> (Tensor, Tensor, Tensor)");
  library.def("slim_linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  library.def(
      "slim_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? main_grad, bool input_gradient, "
      "bool weight_gradient, bool bias_gradient) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dspnet_cpp, CPU, library) {
  if (dspnet::build_capability() == dspnet::Capability::none) {
    return;
  }
  library.impl("adamw_ema_step", DSPNET_CPU_BUILD(adamw_ema_step));
  library.impl("conv_moments", DSPNET_CPU_BUILD(conv_moments));
  library.impl("conv_moments_backward", DSPNET_CPU_BUILD(conv_moments_backward));
  library.impl("ema_update", DSPNET_CPU_BUILD(ema_update));
  library.impl("lars_ema_step", DSPNET_CPU_BUILD(lars_ema_step));
  library.impl("norm_act", DSPNET_CPU_BUILD(norm_act));
  library.impl("norm_act_backward", DSPNET_CPU_BUILD(norm_act_backward));
  library.impl("norm_act_pool", DSPNET_CPU_BUILD(norm_act_pool));
  library.impl("norm_act_pool_backward", DSPNET_CPU_BUILD(norm_act_pool_backward));
  library.impl("normalized_mse", DSPNET_CPU_BUILD(normalized_mse));
  library.impl("normalized_mse_backward", DSPNET_CPU_BUILD(normalized_mse_backward));
  library.impl("scale_shift", DSPNET_CPU_BUILD(scale_shift));
  library.impl("scale_shift_backward", DSPNET_CPU_BUILD(scale_shift_backward));
  library.impl("slim_batch_norm", DSPNET_CPU_BUILD(slim_batch_norm));
  library.impl("slim_batch_norm_backward", DSPNET_CPU_BUILD(slim_batch_norm_backward));
  library.impl("slim_linear", DSPNET_CPU_BUILD(slim_linear));
  library.impl("slim_linear_backward", DSPNET_CPU_BUILD(slim_linear_backward));
}
