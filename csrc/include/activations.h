// Activations as the operators take and give them: [N, C, H, W], dense and channels-last, float32 or bfloat16.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

namespace dspnet {
inline namespace CPU_CAPABILITY {

inline at::Tensor channels_last(const at::Tensor& tensor) {
  return tensor.contiguous(at::MemoryFormat::ChannelsLast);
}

inline at::Tensor empty_channels_last(const at::Tensor& like) {
  return at::empty(like.sizes(), like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// Calls run with a value of the type that activations of this dtype are stored in.
template <typename Run>
void with_scalar(at::ScalarType type, const Run& run) {
  if (type == at::kFloat) {
    run(float{});
  } else {
    run(at::BFloat16{});
  }
}

// A float32 result of these sizes, [0] where it is not wanted.
inline at::Tensor empty_small(const at::Tensor& x, bool wanted, at::IntArrayRef sizes) {
  return at::empty(wanted ? sizes : at::IntArrayRef({0}), x.options().dtype(at::kFloat));
}

// Where such a result goes: null where it is not wanted.
inline float* pointer_of(const at::Tensor& small) {
  return small.numel() > 0 ? small.mutable_data_ptr<float>() : nullptr;
}

} // namespace CPU_CAPABILITY
} // namespace dspnet
