// Argument checks of lars_ema_step, the same on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "flat_step.h"

namespace dspnet::inline CPU_CAPABILITY {

inline void check_lars(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& momenta,
    const at::Tensor& targets,
    at::IntArrayRef starts,
    at::IntArrayRef sizes,
    const at::Tensor& lr,
    const at::Tensor& tau,
    const std::optional<at::Tensor>& apply,
    at::DeviceType device) {
  check_flat_step(
      "lars_ema_step", {{"params", &params}, {"grads", &grads}, {"momenta", &momenta}, {"targets", &targets}}, starts,
      sizes, {{"lr", &lr}, {"tau", &tau}}, apply, device);
}

} // namespace dspnet::CPU_CAPABILITY
