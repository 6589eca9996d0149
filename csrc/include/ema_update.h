// The parts of ema_update that are the same on every device: argument checks, and pairs that the kernels cannot update.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "memory.h"

namespace dspnet::inline CPU_CAPABILITY {

inline void check_ema(at::TensorList targets, at::TensorList onlines, double tau, at::DeviceType device) {
  TORCH_CHECK(tau >= 0 && tau <= 1, "ema_update: tau must lie in [0, 1], got ", tau);
  TORCH_CHECK(
      targets.size() == onlines.size(),
      "ema_update: ", targets.size(), " targets but ", onlines.size(), " onlines");
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor& target = targets[i];
    const at::Tensor& online = onlines[i];
    TORCH_CHECK(target.defined() && online.defined(), "ema_update: tensor ", i, " is undefined");
    for (const at::Tensor& tensor : {target, online}) {
      TORCH_CHECK(
          tensor.device().type() == device && tensor.device() == target.device() &&
              tensor.layout() == at::kStrided && has_memory(tensor),
          "ema_update: target and online ", i, " must be dense tensors with memory on one device of type ", device);
    }
    TORCH_CHECK(
        target.sizes() == online.sizes(),
        "ema_update: target ", i, " has shape ", target.sizes(), ", online has ", online.sizes());
    TORCH_CHECK(
        target.scalar_type() == online.scalar_type(),
        "ema_update: target ", i, " is ", target.scalar_type(), ", online is ", online.scalar_type());
    switch (target.scalar_type()) {
      case at::kFloat:
      case at::kDouble:
      case at::kHalf:
      case at::kBFloat16:
        break;
      default:
        TORCH_CHECK(false, "ema_update: tensor ", i, " is ", target.scalar_type(), ", not fp32, fp64, fp16 or bf16");
    }
    at::assert_no_internal_overlap(target);
    at::assert_no_partial_overlap(target, online);
  }
}

// Whether a target may share memory with a tensor other than its online tensor. If so, updates must be made in the
// list's order.
inline bool may_share_memory(std::vector<Span> written, std::vector<Span> read) {
  const auto by_address = [](const Span& a, const Span& b) { return std::less<>()(a.first, b.first); };
  std::sort(written.begin(), written.end(), by_address);
  std::sort(read.begin(), read.end(), by_address);
  for (size_t i = 1; i < written.size(); ++i) {
    if (written[i].first < written[i - 1].last) {
      return true;
    }
  }
  auto target = written.begin();
  for (const Span& online : read) {
    while (target != written.end() && target->last <= online.first) {
      ++target;
    }
    if (target != written.end() && target->first < online.last) {
      return true;
    }
  }
  return false;
}

// Returns the pairs that the kernels can update: both tensors dense, with the same strides, and no memory shared
// between pairs. ATen updates the other pairs here, since it supports any strides; if any memory is shared, it updates
// all pairs, in the list's order.
inline std::vector<size_t> update_all_but_runs(at::TensorList targets, at::TensorList onlines, double tau) {
  std::vector<size_t> runs, others;
  std::vector<Span> written, read;
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor& target = targets[i];
    const at::Tensor& online = onlines[i];
    if (target.numel() == 0) {
      continue;
    }
    written.push_back(span(target));
    if (online.const_data_ptr() != target.const_data_ptr()) {
      read.push_back(span(online));
    }
    const bool is_run = target.is_non_overlapping_and_dense() && target.strides() == online.strides();
    (is_run ? runs : others).push_back(i);
  }
  if (may_share_memory(std::move(written), std::move(read))) {
    for (size_t i = 0; i < targets.size(); ++i) {
      targets[i].lerp_(onlines[i], 1 - tau);
    }
    return {};
  }
  for (const size_t i : others) {
    targets[i].lerp_(onlines[i], 1 - tau);
  }
  return runs;
}

} // namespace dspnet::CPU_CAPABILITY
