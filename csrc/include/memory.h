// The memory of tensors, on any device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dspnet::inline CPU_CAPABILITY {

// Whether all elements lie inside the storage. They may not, since storages can be resized and strides set to any
// value.
inline bool has_memory(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {
    return true;
  }
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return static_cast<size_t>(last + 1) * tensor.element_size() <= tensor.storage().nbytes();
}

// The bytes from a tensor's first element to its last.
struct Span {
  const char* first;
  const char* last;
};

inline Span span(const at::Tensor& tensor) {
  int64_t elements = 1;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    elements += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const auto* first = static_cast<const char*>(tensor.const_data_ptr());
  return {first, first + elements * tensor.element_size()};
}

} // namespace dspnet::CPU_CAPABILITY
