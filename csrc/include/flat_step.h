// Argument checks of the operators that update flat buffers, the same on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "memory.h"

namespace dspnet::inline CPU_CAPABILITY {

using NamedTensor = std::pair<const char*, const at::Tensor*>;

// flats: buffers of one length, the first of which is params; last, targets, which may be shorter.
inline void check_flat_step(
    const char* op,
    std::vector<NamedTensor> flats,
    at::IntArrayRef starts,
    at::IntArrayRef sizes,
    const std::vector<NamedTensor>& scalars,
    const std::optional<at::Tensor>& apply,
    at::DeviceType device) {
  const at::Tensor& params = *flats.front().second;
  for (const auto& [name, flat] : flats) {
    TORCH_CHECK(
        flat->device().type() == device && flat->device() == params.device() && flat->layout() == at::kStrided &&
            flat->dim() == 1 && flat->is_contiguous() && has_memory(*flat),
        op, ": ", name, " must be a contiguous vector with memory, all on one device of type ", device);
    TORCH_CHECK(
        (flat->scalar_type() == at::kFloat || flat->scalar_type() == at::kDouble) &&
            flat->scalar_type() == params.scalar_type(),
        op, ": all must be float32 or all float64: ", name, " is ", flat->scalar_type(), ", params is ",
        params.scalar_type());
  }
  for (const auto& [name, flat] : flats) {
    const bool is_targets = flat == flats.back().second;
    TORCH_CHECK(
        is_targets ? flat->numel() <= params.numel() : flat->numel() == params.numel(), op, ": ", name, " has ",
        flat->numel(), " elements and params ", params.numel(),
        ": targets must be no longer than params, and all others as long");
  }
  const auto address = [](const NamedTensor& flat) {
    return static_cast<const char*>(flat.second->const_data_ptr());
  };
  std::sort(flats.begin(), flats.end(), [&](const NamedTensor& a, const NamedTensor& b) {
    return std::less<>()(address(a), address(b));
  });
  const NamedTensor* before = nullptr;
  for (const NamedTensor& flat : flats) {
    if (flat.second->numel() == 0) {
      continue;
    }
    TORCH_CHECK(
        !before || address(*before) + before->second->nbytes() <= address(flat), op, ": ", before->first, " and ",
        flat.first, " share memory");
    before = &flat;
  }
  TORCH_CHECK(starts.size() == sizes.size(), op, ": ", starts.size(), " starts but ", sizes.size(), " sizes");
  int64_t end = 0;
  for (size_t s = 0; s < starts.size(); ++s) {
    TORCH_CHECK(
        starts[s] >= end && starts[s] <= params.numel() && sizes[s] >= 0 && sizes[s] <= params.numel() - starts[s], op,
        ": segment ", s, ", ", sizes[s], " elements from ", starts[s], ", must start at ", end,
        " or later and end at ", params.numel(), " or earlier");
    end = starts[s] + sizes[s];
  }
  for (const auto& [name, scalar] : scalars) {
    TORCH_CHECK(
        scalar->device() == params.device() && scalar->layout() == at::kStrided && scalar->dim() == 0 &&
            at::isFloatingType(scalar->scalar_type()) && has_memory(*scalar),
        op, ": ", name, " must be a floating-point scalar on ", params.device());
  }
  TORCH_CHECK(
      !apply || (apply->device() == params.device() && apply->layout() == at::kStrided && apply->dim() == 0 &&
                 apply->scalar_type() == at::kBool && has_memory(*apply)),
      op, ": apply must be a bool scalar on ", params.device());
}

} // namespace dspnet::CPU_CAPABILITY
