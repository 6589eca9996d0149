// Helpers for activations, the operators' inputs and outputs: [N, C, H, W], channels-last, float32 or bfloat16.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace dspnet::inline CPU_CAPABILITY {

inline at::Tensor channels_last(const at::Tensor& tensor) {
  return tensor.contiguous(at::MemoryFormat::ChannelsLast);
}

inline at::Tensor empty_channels_last(const at::Tensor& like) {
  return at::empty(like.sizes(), like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// Calls run(scalar_t{}), with scalar_t the C++ type of this dtype.
template <typename Run>
void with_scalar(at::ScalarType type, const Run& run) {
  if (type == at::kFloat) {
    run(float{});
  } else {
    run(at::BFloat16{});
  }
}

// A float32 tensor of these sizes; of size [0] if the result is not wanted.
inline at::Tensor empty_fp32(const at::Tensor& x, bool wanted, at::IntArrayRef sizes) {
  return at::empty(wanted ? sizes : at::IntArrayRef({0}), x.options().dtype(at::kFloat));
}

// The data of a tensor from empty_fp32; null if the result is not wanted.
inline float* data_or_null(const at::Tensor& result) {
  return result.numel() > 0 ? result.mutable_data_ptr<float>() : nullptr;
}

} // namespace dspnet::CPU_CAPABILITY
