// Argument checks of normalized_mse and its gradient, the same on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include "memory.h"

namespace dspnet::inline CPU_CAPABILITY {

inline bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

// The dtype of the loss.
inline at::ScalarType loss_dtype(const at::Tensor& p, const at::Tensor& z) {
  return p.scalar_type() == at::kDouble || z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_rows(const char* op, const at::Tensor& p, const at::Tensor& z, at::DeviceType device) {
  for (const at::Tensor& tensor : {p, z}) {
    TORCH_CHECK(
        tensor.defined() && tensor.device().type() == device && tensor.device() == p.device() &&
            tensor.layout() == at::kStrided && has_memory(tensor),
        op, ": p and z must be dense tensors with memory, on one device of type ", device);
  }
  TORCH_CHECK(
      p.dim() == 2 && p.sizes() == z.sizes() && is_supported(p.scalar_type()) && is_supported(z.scalar_type()), op,
      ": p and z must be fp32, fp64, fp16 or bf16 and both [N, D], got ", p.sizes(), " ", p.scalar_type(), " and ",
      z.sizes(), " ", z.scalar_type());
}

inline void check_grad(const char* op, const at::Tensor& grad, const at::Tensor& p, const at::Tensor& z) {
  TORCH_CHECK(
      grad.defined() && grad.device() == p.device() && grad.layout() == at::kStrided && has_memory(grad) &&
          grad.dim() == 0 && grad.scalar_type() == loss_dtype(p, z),
      op, ": grad must be a scalar of ", loss_dtype(p, z), " on ", p.device(), ", got ", grad.sizes(), " ",
      grad.scalar_type(), " on ", grad.device());
}

} // namespace dspnet::CPU_CAPABILITY
