// The CUDA implementations of dspnet_cpp's operators: checks arguments, allocates results and workspaces, and calls the
// launchers on torch's current stream. csrc/registration.cpp has the schemas. The kernels do not depend on torch, and
// this file does not depend on CUDA's headers, so it builds with any torch, and the library loads without a driver.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <limits>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cuda_launchers.h"
#include "ema_update.h"
#include "flat_step.h"
#include "normalized_mse.h"

namespace dspnet {
namespace {

void check_cuda(const char* op, const char* error) {
  TORCH_CHECK(!error, op, ": CUDA reports: ", error);
}

// Sets the current device, of torch and of the launchers, to a tensor's device; restores torch's on destruction.
class OnDevice {
 public:
  OnDevice(const char* op, const at::Tensor& tensor) : guard_(tensor.device()) {
    check_cuda(op, cuda::use_device(tensor.device().index()));
    const c10::impl::VirtualGuardImpl guard_impl(tensor.device().type());
    stream = static_cast<cudaStream_t>(guard_impl.getStream(tensor.device()).native_handle());
  }

  cudaStream_t stream; // torch's current stream

 private:
  c10::DeviceGuard guard_;
};

cuda::DType dtype_of(const char* op, at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return cuda::DType::f64;
    case at::kFloat:
      return cuda::DType::f32;
    case at::kHalf:
      return cuda::DType::f16;
    case at::kBFloat16:
      return cuda::DType::bf16;
    default:
      TORCH_CHECK(false, op, ": ", dtype, " is not fp64, fp32, fp16 or bf16");
  }
}

cuda::DeviceScalar scalar_of(const char* op, const at::Tensor& scalar) {
  return {scalar.const_data_ptr(), dtype_of(op, scalar.scalar_type())};
}

cuda::FlatSegments segments_of(at::IntArrayRef starts, at::IntArrayRef sizes) {
  return {starts.data(), sizes.data(), static_cast<int64_t>(starts.size())};
}

at::Tensor bytes_on(const at::Tensor& like, int64_t bytes) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

void ema_update(at::TensorList targets, at::TensorList onlines, double tau) {
  const char* op = "ema_update";
  const at::NoGradGuard no_grad;
  check_ema(targets, onlines, tau, at::kCUDA);
  struct Group {
    at::Tensor first;
    std::vector<cuda::EmaPair> pairs;
  };
  std::unordered_map<int, Group> groups; // by device and dtype
  for (const size_t i : update_all_but_runs(targets, onlines, tau)) {
    const at::Tensor& target = targets[i];
    Group& group = groups[target.device().index() * 4 + static_cast<int>(dtype_of(op, target.scalar_type()))];
    if (group.pairs.empty()) {
      group.first = target;
    }
    group.pairs.push_back({target.mutable_data_ptr(), onlines[i].const_data_ptr(), target.numel()});
  }
  for (const auto& [key, group] : groups) {
    const OnDevice on(op, group.first);
    const auto count = static_cast<int64_t>(group.pairs.size());
    const cuda::DType dtype = dtype_of(op, group.first.scalar_type());
    check_cuda(op, cuda::ema_update(dtype, group.pairs.data(), count, tau, on.stream));
  }
}

void lars_ema_step(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& momenta,
    const at::Tensor& targets,
    at::IntArrayRef starts,
    at::IntArrayRef sizes,
    const at::Tensor& lr,
    const at::Tensor& tau,
    double weight_decay,
    double momentum,
    double eta,
    const std::optional<at::Tensor>& apply) {
  const char* op = "lars_ema_step";
  const at::NoGradGuard no_grad;
  check_flat_step(
      op, {{"params", &params}, {"grads", &grads}, {"momenta", &momenta}, {"targets", &targets}}, starts, sizes,
      {{"lr", &lr}, {"tau", &tau}}, apply, at::kCUDA);
  const cuda::LarsOptions options{
      scalar_of(op, lr),
      scalar_of(op, tau),
      weight_decay,
      momentum,
      eta,
      apply ? apply->const_data_ptr<bool>() : nullptr};
  if (params.numel() == 0) {
    return;
  }
  const OnDevice on(op, params);
  const cuda::FlatBuffers buffers{
      params.mutable_data_ptr(),
      grads.mutable_data_ptr(),
      momenta.mutable_data_ptr(),
      nullptr,
      targets.mutable_data_ptr(),
      params.numel(),
      targets.numel()};
  const at::Tensor workspace = bytes_on(params, cuda::lars_ema_step_workspace(params.numel()));
  check_cuda(
      op,
      cuda::lars_ema_step(
          dtype_of(op, params.scalar_type()), buffers, segments_of(starts, sizes), options,
          workspace.mutable_data_ptr(), on.stream));
}

void adamw_ema_step(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& momenta,
    const at::Tensor& variances,
    const at::Tensor& targets,
    const at::Tensor& steps,
    at::IntArrayRef starts,
    at::IntArrayRef sizes,
    const at::Tensor& lr,
    const at::Tensor& weight_decay,
    const at::Tensor& tau,
    double beta1,
    double beta2,
    double eps,
    const std::optional<at::Tensor>& apply) {
  const char* op = "adamw_ema_step";
  const at::NoGradGuard no_grad;
  check_flat_step(
      op,
      {{"params", &params}, {"grads", &grads}, {"momenta", &momenta}, {"variances", &variances}, {"targets", &targets}},
      starts, sizes, {{"steps", &steps}, {"lr", &lr}, {"weight_decay", &weight_decay}, {"tau", &tau}}, apply,
      at::kCUDA);
  const cuda::AdamwOptions options{
      scalar_of(op, lr),
      scalar_of(op, weight_decay),
      scalar_of(op, tau),
      beta1,
      beta2,
      eps,
      apply ? apply->const_data_ptr<bool>() : nullptr};
  const OnDevice on(op, params);
  const cuda::FlatBuffers buffers{
      params.mutable_data_ptr(),
      grads.mutable_data_ptr(),
      momenta.mutable_data_ptr(),
      variances.mutable_data_ptr(),
      targets.mutable_data_ptr(),
      params.numel(),
      targets.numel()};
  const at::Tensor workspace = bytes_on(params, cuda::adamw_ema_step_workspace());
  check_cuda(
      op,
      cuda::adamw_ema_step(
          dtype_of(op, params.scalar_type()), buffers, segments_of(starts, sizes), options, steps.mutable_data_ptr(),
          dtype_of(op, steps.scalar_type()), workspace.mutable_data_ptr(), on.stream));
}

// The kernels require p and z of one dtype.
void check_matrices(const char* op, const at::Tensor& p, const at::Tensor& z) {
  check_rows(op, p, z, at::kCUDA);
  TORCH_CHECK(
      p.scalar_type() == z.scalar_type(), op, ": p and z must be of one dtype, got ", p.scalar_type(), " and ",
      z.scalar_type());
}

at::Tensor normalized_mse(const at::Tensor& p, const at::Tensor& z) {
  const char* op = "normalized_mse";
  const at::NoGradGuard no_grad;
  check_matrices(op, p, z);
  const OnDevice on(op, p);
  const auto options = p.options().dtype(loss_dtype(p, z));
  if (p.size(0) == 0) {
    return at::full({}, std::numeric_limits<double>::quiet_NaN(), options);
  }
  const at::Tensor dense_p = p.contiguous(), dense_z = z.contiguous(), loss = at::empty({}, options);
  const cuda::Matrices matrices{dense_p.const_data_ptr(), dense_z.const_data_ptr(), p.size(0), p.size(1)};
  const at::Tensor workspace = bytes_on(p, cuda::normalized_mse_workspace(p.size(0)));
  check_cuda(
      op,
      cuda::normalized_mse(
          dtype_of(op, p.scalar_type()), matrices, loss.mutable_data_ptr(), workspace.mutable_data_ptr(), on.stream));
  return loss;
}

std::tuple<at::Tensor, at::Tensor> normalized_mse_backward(
    const at::Tensor& grad, const at::Tensor& p, const at::Tensor& z, bool p_gradient, bool z_gradient) {
  const char* op = "normalized_mse_backward";
  const at::NoGradGuard no_grad;
  check_matrices(op, p, z);
  check_grad(op, grad, p, z);
  const OnDevice on(op, p);
  const at::Tensor dense_p = p.contiguous(), dense_z = z.contiguous();
  const at::Tensor grad_p = p_gradient ? at::empty_like(dense_p) : at::empty({0}, p.options());
  const at::Tensor grad_z = z_gradient ? at::empty_like(dense_z) : at::empty({0}, z.options());
  if (p.numel() > 0 && (p_gradient || z_gradient)) {
    const cuda::Matrices matrices{dense_p.const_data_ptr(), dense_z.const_data_ptr(), p.size(0), p.size(1)};
    check_cuda(
        op,
        cuda::normalized_mse_backward(
            dtype_of(op, p.scalar_type()),
            matrices,
            grad.const_data_ptr(),
            p_gradient ? grad_p.mutable_data_ptr() : nullptr,
            z_gradient ? grad_z.mutable_data_ptr() : nullptr,
            on.stream));
  }
  return {grad_p, grad_z};
}

std::string cuda_problem(int64_t device) {
  const char* problem = cuda::problem(static_cast<int>(device));
  return problem ? problem : "";
}

} // namespace
} // namespace dspnet

TORCH_LIBRARY_IMPL(dspnet_cpp, CUDA, library) {
  library.impl("adamw_ema_step", &dspnet::adamw_ema_step);
  library.impl("ema_update", &dspnet::ema_update);
  library.impl("lars_ema_step", &dspnet::lars_ema_step);
  library.impl("normalized_mse", &dspnet::normalized_mse);
  library.impl("normalized_mse_backward", &dspnet::normalized_mse_backward);
}

// cuda_problem has no tensor argument to dispatch on.
TORCH_LIBRARY_IMPL(dspnet_cpp, CompositeExplicitAutograd, library) {
  library.impl("cuda_problem", &dspnet::cuda_problem);
}
