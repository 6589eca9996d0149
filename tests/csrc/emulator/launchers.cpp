// The launchers, as ctypes calls them.
#include <vector>

#include "cuda_launchers.h"

using namespace dspnet::cuda;

extern "C" {

void emulated_ema_update(
    int kind, int64_t count, void** targets, const void** onlines, const int64_t* sizes, double tau) {
  std::vector<EmaPair> pairs;
  for (int64_t i = 0; i < count; ++i) {
    pairs.push_back({targets[i], onlines[i], sizes[i]});
  }
  ema_update(static_cast<Kind>(kind), pairs.data(), count, tau, nullptr);
}

int64_t emulated_lars_ema_step_workspace(int64_t size) {
  return lars_ema_step_workspace(size);
}

void emulated_lars_ema_step(
    int kind, void* params, void* grads, void* momenta, void* targets, int64_t size, int64_t with_target,
    const int64_t* starts, const int64_t* sizes, int64_t count, const void* lr, int kind_of_lr, const void* tau,
    int kind_of_tau, double weight_decay, double momentum, double eta, const bool* apply,
    void* workspace) {
  lars_ema_step(
      static_cast<Kind>(kind),
      {params, grads, momenta, targets, size, with_target},
      {starts, sizes, count},
      {{lr, static_cast<Kind>(kind_of_lr)}, {tau, static_cast<Kind>(kind_of_tau)}, weight_decay, momentum, eta, apply},
      workspace,
      nullptr);
}

int64_t emulated_normalized_mse_workspace(int64_t rows) {
  return normalized_mse_workspace(rows);
}

void emulated_normalized_mse(
    int kind, const void* p, const void* z, int64_t rows, int64_t columns, void* loss, void* workspace) {
  normalized_mse(static_cast<Kind>(kind), {p, z, rows, columns}, loss, workspace, nullptr);
}

void emulated_normalized_mse_backward(
    int kind, const void* p, const void* z, int64_t rows, int64_t columns, const void* grad, void* grad_p,
    void* grad_z) {
  normalized_mse_backward(static_cast<Kind>(kind), {p, z, rows, columns}, grad, grad_p, grad_z, nullptr);
}

} // extern "C"
