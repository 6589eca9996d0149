// Argument checks of lars_ema_step, the same on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <utility>

#include "memory.h"

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
  using Named = std::pair<const char*, const at::Tensor*>;
  std::array<Named, 4> flats{{{"params", &params}, {"grads", &grads}, {"momenta", &momenta}, {"targets", &targets}}};
  for (const auto& [name, flat] : flats) {
    TORCH_CHECK(
        flat->device().type() == device && flat->device() == params.device() && flat->layout() == at::kStrided &&
            flat->dim() == 1 && flat->is_contiguous() && has_memory(*flat),
        "lars_ema_step: ", name, " must be a contiguous vector with memory, all on one device of type ", device);
    TORCH_CHECK(
        (flat->scalar_type() == at::kFloat || flat->scalar_type() == at::kDouble) &&
            flat->scalar_type() == params.scalar_type(),
        "lars_ema_step: all must be float32 or all float64: ", name, " is ", flat->scalar_type(), ", params is ",
        params.scalar_type());
  }
  TORCH_CHECK(
      grads.numel() == params.numel() && momenta.numel() == params.numel() && targets.numel() <= params.numel(),
      "lars_ema_step: grads and momenta must be as long as params and targets no longer, got ", params.numel(),
      " params, ", grads.numel(), " grads, ", momenta.numel(), " momenta, ", targets.numel(), " targets");
  const auto address = [](const Named& flat) { return static_cast<const char*>(flat.second->const_data_ptr()); };
  std::sort(flats.begin(), flats.end(), [&](const Named& a, const Named& b) {
    return std::less<>()(address(a), address(b));
  });
  const Named* before = nullptr;
  for (const Named& flat : flats) {
    if (flat.second->numel() == 0) {
      continue;
    }
    TORCH_CHECK(
        !before || address(*before) + before->second->nbytes() <= address(flat),
        "lars_ema_step: ", before->first, " and ", flat.first, " share memory");
    before = &flat;
  }
  TORCH_CHECK(
      starts.size() == sizes.size(), "lars_ema_step: ", starts.size(), " starts but ", sizes.size(), " sizes");
  int64_t end = 0;
  for (size_t s = 0; s < starts.size(); ++s) {
    TORCH_CHECK(
        starts[s] >= end && starts[s] <= params.numel() && sizes[s] >= 0 && sizes[s] <= params.numel() - starts[s],
        "lars_ema_step: segment ", s, ", ", sizes[s], " elements from ", starts[s], ", must start at ", end,
        " or later and end at ", params.numel(), " or earlier");
    end = starts[s] + sizes[s];
  }
  for (const auto& [name, scalar] : {Named{"lr", &lr}, Named{"tau", &tau}}) {
    TORCH_CHECK(
        scalar->device() == params.device() && scalar->layout() == at::kStrided && scalar->dim() == 0 &&
            at::isFloatingType(scalar->scalar_type()) && has_memory(*scalar),
        "lars_ema_step: ", name, " must be a floating-point scalar on ", params.device());
  }
  TORCH_CHECK(
      !apply || (apply->device() == params.device() && apply->layout() == at::kStrided && apply->dim() == 0 &&
                 apply->scalar_type() == at::kBool && has_memory(*apply)),
      "lars_ema_step: apply must be a bool scalar on ", params.device());
}

} // namespace dspnet::CPU_CAPABILITY
