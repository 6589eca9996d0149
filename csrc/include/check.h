// Argument checks of the CPU operators, made before any memory access: no argument may crash the process.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>
#include <string_view>
#include <utility>

#include "memory.h"
#include "deferred.h"

namespace dspnet::inline CPU_CAPABILITY {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_cpu(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.defined() && tensor.device().is_cpu() && tensor.layout() == at::kStrided && has_memory(tensor), op, ": ",
      name, " must be a dense tensor on the CPU with memory for all its elements");
}

inline void check_activation(const char* op, const char* name, const at::Tensor& tensor) {
  check_cpu(op, name, tensor);
  TORCH_CHECK(
      tensor.dim() == 4 && (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16), op, ": ",
      name, " must be [N, C, H, W] of float32 or bfloat16, got ", tensor.sizes(), " ", tensor.scalar_type());
}

inline void check_like(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& other) {
  check_cpu(op, name, tensor);
  TORCH_CHECK(
      tensor.sizes() == other.sizes() && tensor.scalar_type() == other.scalar_type(), op, ": ", name, " must be ",
      other.sizes(), " ", other.scalar_type(), ", got ", tensor.sizes(), " ", tensor.scalar_type());
}

// main_grad is accumulated into, so its elements must not share addresses.
inline void check_main_grad(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& other) {
  check_like(op, name, tensor, other);
  at::assert_no_internal_overlap(tensor);
}

// Checks for a float32 matrix of this shape; returns a contiguous version.
inline at::Tensor check_matrix(
    const char* op, const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns) {
  check_cpu(op, name, tensor);
  TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
          tensor.scalar_type() == at::kFloat,
      op, ": ", name, " must be [", rows, ", ", columns, "] of float32, got ", tensor.sizes(), " ",
      tensor.scalar_type());
  return tensor.contiguous();
}

inline Act check_act(const char* op, std::string_view act) {
  constexpr std::pair<std::string_view, Act> acts[] = {
      {"identity", Act::identity}, {"relu", Act::relu}, {"relu6", Act::relu6}, {"hardswish", Act::hardswish},
      {"silu", Act::silu}, {"gelu", Act::gelu}, {"gelu_tanh", Act::gelu_tanh}};
  for (const auto& [name, value] : acts) {
    if (act == name) {
      return value;
    }
  }
  TORCH_CHECK(
      false, op, ": act must be one of identity, relu, relu6, hardswish, silu, gelu, gelu_tanh, not ",
      std::string(act));
}

// The deferred normalisation and the tensors that own its memory.
struct CheckedDeferred {
  at::Tensor scale, shift, gate;
  Deferred deferred;
};

// views: rows of moments that the operator computes; 0 if it computes none.
inline CheckedDeferred check_deferred(
    const char* op,
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act,
    const OptionalTensor& gate,
    int64_t views) {
  CheckedDeferred checked;
  checked.deferred.act = check_act(op, act);
  TORCH_CHECK(views >= 0 && (views == 0 || x.size(0) % views == 0), op, ": ", x.size(0), " images are not ", views,
              " views of equal size");
  TORCH_CHECK(scale.has_value() == shift.has_value(), op, ": give both scale and shift, or neither");
  if (scale) {
    const int64_t rows = scale->dim() == 2 ? scale->size(0) : 0;
    TORCH_CHECK(
        rows > 0 && x.size(0) % rows == 0 && (views == 0 || rows == 1 || rows == views), op,
        ": scale and shift must have 1 row or one per view, got ", rows, " rows for ", x.size(0), " images and ", views,
        " views");
    checked.scale = check_matrix(op, "scale", *scale, rows, x.size(1));
    checked.shift = check_matrix(op, "shift", *shift, rows, x.size(1));
    checked.deferred.scale = checked.scale.const_data_ptr<float>();
    checked.deferred.shift = checked.shift.const_data_ptr<float>();
    checked.deferred.rows = rows;
  }
  if (gate) {
    checked.gate = check_matrix(op, "gate", *gate, x.size(0), x.size(1));
    checked.deferred.gate = checked.gate.const_data_ptr<float>();
  }
  return checked;
}

} // namespace dspnet::CPU_CAPABILITY
