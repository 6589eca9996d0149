// Wraps the launchers in C functions for ctypes.
#include <vector>

#include "cuda_launchers.h"

using namespace dspnet::cuda;

extern "C" {

void emulated_ema_update(
    int dtype, int64_t count, void** targets, const void** onlines, const int64_t* sizes, double tau) {
  std::vector<EmaPair> pairs;
  for (int64_t i = 0; i < count; ++i) {
    pairs.push_back({targets[i], onlines[i], sizes[i]});
  }
  ema_update(static_cast<DType>(dtype), pairs.data(), count, tau, nullptr);
}

int64_t emulated_lars_ema_step_workspace(int64_t size) {
  return lars_ema_step_workspace(size);
}

void emulated_lars_ema_step(
    int dtype, void* params, void* grads, void* momenta, void* targets, int64_t size, int64_t target_size,
    const int64_t* starts, const int64_t* sizes, int64_t count, const void* lr, int lr_dtype, const void* tau,
    int tau_dtype, double weight_decay, double momentum, double eta, const bool* apply,
    void* workspace) {
  lars_ema_step(
      static_cast<DType>(dtype),
      {params, grads, momenta, nullptr, targets, size, target_size},
      {starts, sizes, count},
      {{lr, static_cast<DType>(lr_dtype)}, {tau, static_cast<DType>(tau_dtype)}, weight_decay, momentum, eta, apply},
      workspace,
      nullptr);
}

int64_t emulated_adamw_ema_step_workspace(int64_t) {
  return adamw_ema_step_workspace();
}

void emulated_adamw_ema_step(
    int dtype, void* params, void* grads, void* momenta, void* variances, void* targets, int64_t size,
    int64_t target_size, const int64_t* starts, const int64_t* sizes, int64_t count, const void* lr, int lr_dtype,
    const void* weight_decay, int weight_decay_dtype, const void* tau, int tau_dtype, double beta1, double beta2,
    double eps, const bool* apply, void* steps, int steps_dtype, void* workspace) {
  adamw_ema_step(
      static_cast<DType>(dtype),
      {params, grads, momenta, variances, targets, size, target_size},
      {starts, sizes, count},
      {{lr, static_cast<DType>(lr_dtype)},
       {weight_decay, static_cast<DType>(weight_decay_dtype)},
       {tau, static_cast<DType>(tau_dtype)},
       beta1,
       beta2,
       eps,
       apply},
      steps,
      static_cast<DType>(steps_dtype),
      workspace,
      nullptr);
}

int64_t emulated_normalized_mse_workspace(int64_t rows) {
  return normalized_mse_workspace(rows);
}

void emulated_normalized_mse(
    int dtype, const void* p, const void* z, int64_t rows, int64_t columns, void* loss, void* workspace) {
  normalized_mse(static_cast<DType>(dtype), {p, z, rows, columns}, loss, workspace, nullptr);
}

void emulated_normalized_mse_backward(
    int dtype, const void* p, const void* z, int64_t rows, int64_t columns, const void* grad, void* grad_p,
    void* grad_z) {
  normalized_mse_backward(static_cast<DType>(dtype), {p, z, rows, columns}, grad, grad_p, grad_z, nullptr);
}

} // extern "C"
