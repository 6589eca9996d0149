// Operators that record their gradients: torch.ops.dspnet_cpp.<operator>_autograd computes what dspnet_cpp::<operator>
// computes, and autograd calls dspnet_cpp::<operator>_backward. The autograd functions of dspnet_fast/ops do the same
// in Python, in several times the time; registry.py chooses between the two. A main_grad is not saved for backward,
// because autograd rejects saved tensors that were changed in place.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "operators.h"

namespace {

namespace signatures = dspnet::signatures;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OwnedTensor = std::optional<at::Tensor>;

// dspnet_cpp::<name>, called below autograd, with the observers of calls from Python, such as the profiler.
template <typename Signature>
class Operator {
 public:
  explicit Operator(const char* name)
      : op_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>()) {}

  template <typename... Args>
  auto operator()(Args&&... args) const {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op_.call(std::forward<Args>(args)...);
  }

 private:
  c10::TypedOperatorHandle<Signature> op_;
};

#define DSPNET_OPERATOR(name)                                                 \
  const Operator<signatures::name>& name() {                                  \
    static const Operator<signatures::name> op("dspnet_cpp::" #name);         \
    return op;                                                                \
  }
DSPNET_OPERATOR(conv_moments)
DSPNET_OPERATOR(conv_moments_backward)
DSPNET_OPERATOR(norm_act)
DSPNET_OPERATOR(norm_act_backward)
DSPNET_OPERATOR(norm_act_pool)
DSPNET_OPERATOR(norm_act_pool_backward)
DSPNET_OPERATOR(scale_shift)
DSPNET_OPERATOR(scale_shift_backward)
DSPNET_OPERATOR(slim_linear)
DSPNET_OPERATOR(slim_linear_backward)

at::Tensor value(OptionalTensor tensor) {
  return tensor.value_or(at::Tensor());
}

OwnedTensor optional(Tensor tensor) {
  return tensor.defined() ? OwnedTensor(tensor) : std::nullopt;
}

OwnedTensor optional(const AutogradContext& ctx, const char* name) {
  const auto found = ctx.saved_data.find(name);
  return found != ctx.saved_data.end() && found->second.isTensor() ? OwnedTensor(found->second.toTensor())
                                                                   : std::nullopt;
}

bool requires_grad(OptionalTensor tensor) {
  return tensor && tensor->requires_grad();
}

// The backward checks the memory of a main_grad too (check_main_grad).
void check_like_weight(const char* op, const char* name, OptionalTensor main_grad, OptionalTensor weight) {
  TORCH_CHECK(
      !main_grad || (weight && main_grad->sizes() == weight->sizes() && main_grad->dtype() == weight->dtype()), op,
      ": ", name, " must have the shape and dtype of the weight");
}

// The gradients, as results of a function that has no derivative. Empty tensors stand for absent gradients.
variable_list gradients(std::initializer_list<at::Tensor> all) {
  variable_list given;
  for (Tensor gradient : all) {
    const bool absent = !gradient.defined() || (gradient.dim() == 1 && gradient.numel() == 0);
    given.push_back(absent ? at::Tensor() : gradient);
  }
  if (!at::GradMode::is_enabled()) {
    return given;
  }
  for (at::Tensor& gradient : given) {
    if (gradient.defined()) {
      gradient = gradient.detach().requires_grad_();
    }
  }
  torch::autograd::DelayedError error("the operators of dspnet_fast have no second derivative", 0);
  return error.apply(std::move(given));
}

// Without eps the results are y, mean and variance. With eps they are y, the scale and shift of the normalisation of y
// (scale_shift), and mean and variance, which have no gradients then.
struct ConvMoments : torch::autograd::Function<ConvMoments> {
  static variable_list forward(
      AutogradContext* ctx,
      Tensor x,
      OptionalTensor scale,
      OptionalTensor shift,
      std::string act,
      OptionalTensor gate,
      Tensor weight,
      OptionalTensor main_grad,
      int64_t out_channels,
      int64_t stride,
      int64_t padding,
      int64_t groups,
      int64_t views,
      OptionalTensor norm_weight,
      OptionalTensor norm_weight_main_grad,
      OptionalTensor norm_bias,
      OptionalTensor norm_bias_main_grad,
      std::optional<double> eps) {
    auto [y, mean, variance] =
        conv_moments()(x, scale, shift, act, gate, weight, out_channels, stride, padding, groups, views);
    variable_list results{y, mean, variance}, saved{x, value(scale), value(shift), value(gate), weight, y, mean};
    if (eps) {
      auto [next_scale, next_shift] = scale_shift()(mean, variance, norm_weight, norm_bias, *eps);
      results.insert(results.begin() + 1, {next_scale, next_shift});
      saved.insert(saved.end(), {variance, value(norm_weight), value(norm_bias)});
      ctx->mark_non_differentiable({mean, variance});
      ctx->set_materialize_grads(false); // of mean and variance
      ctx->saved_data["norm_weight_main_grad"] = requires_grad(norm_weight) ? norm_weight_main_grad : std::nullopt;
      ctx->saved_data["norm_bias_main_grad"] = requires_grad(norm_bias) ? norm_bias_main_grad : std::nullopt;
      ctx->saved_data["eps"] = *eps;
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["act"] = std::move(act);
    ctx->saved_data["geometry"] = std::vector<int64_t>{stride, padding, groups};
    ctx->saved_data["main_grad"] = main_grad;
    ctx->saved_data["input_gradient"] =
        x.requires_grad() || requires_grad(scale) || requires_grad(shift) || requires_grad(gate);
    ctx->saved_data["weight_gradient"] = weight.requires_grad();
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto geometry = ctx->saved_data["geometry"].toIntVector();
    const OwnedTensor main_grad = optional(*ctx, "main_grad");
    const PooledGradient pooled = PooledGradient::take(*ctx);
    at::Tensor grad_y = grads[0], grad_mean = grads[1], grad_variance = grads[2], grad_norm_weight, grad_norm_bias;
    if (saved.size() > 7) {
      const auto given = [](Tensor grad, Tensor like) { return grad.defined() ? grad : at::zeros_like(like); };
      grad_y = given(grads[0], saved[5]);
      std::tie(grad_mean, grad_variance, grad_norm_weight, grad_norm_bias) = scale_shift_backward()(
          given(grads[1], saved[6]), given(grads[2], saved[6]), saved[6], saved[7], optional(saved[8]),
          optional(*ctx, "norm_weight_main_grad"), optional(saved[9]), optional(*ctx, "norm_bias_main_grad"),
          ctx->saved_data["eps"].toDouble());
    }
    const auto [grad_x, grad_scale, grad_shift, grad_gate, grad_weight] = conv_moments_backward()(
        grad_y, grad_mean, grad_variance, saved[0], optional(saved[1]), optional(saved[2]),
        ctx->saved_data["act"].toStringRef(), optional(saved[3]), saved[4], main_grad, saved[5], saved[6], geometry[0],
        geometry[1], geometry[2], ctx->saved_data["input_gradient"].toBool(),
        ctx->saved_data["weight_gradient"].toBool(), pooled.grad, pooled.scale, pooled.shift, pooled.act);
    return gradients(
        {grad_x, grad_scale, grad_shift, {}, grad_gate, grad_weight, {}, {}, {}, {}, {}, {}, grad_norm_weight, {},
         grad_norm_bias, {}, {}});
  }

  // The gradient of a pooled output that the backward of the convolution computes (docs/formulation.md). It is valid
  // within the call of backward() that put it there.
  struct PooledGradient {
    OwnedTensor grad, scale, shift;
    std::string act = "identity";

    static PooledGradient take(AutogradContext& ctx) {
      const auto task = ctx.saved_data.find("pooled_task");
      if (task == ctx.saved_data.end()) {
        return {};
      }
      const bool valid = task->second.toInt() == torch::autograd::get_current_graph_task_id();
      PooledGradient taken;
      if (valid) {
        taken = {
            optional(ctx, "pooled_grad"), optional(ctx, "pooled_scale"), optional(ctx, "pooled_shift"),
            ctx.saved_data["pooled_act"].toStringRef()};
      }
      for (const char* name : {"pooled_task", "pooled_grad", "pooled_scale", "pooled_shift", "pooled_act"}) {
        ctx.saved_data.erase(name);
      }
      return taken;
    }

    void put(AutogradContext& ctx) const {
      ctx.saved_data["pooled_task"] = static_cast<int64_t>(torch::autograd::get_current_graph_task_id());
      ctx.saved_data["pooled_grad"] = grad;
      ctx.saved_data["pooled_scale"] = scale;
      ctx.saved_data["pooled_shift"] = shift;
      ctx.saved_data["pooled_act"] = act;
    }
  };
};

// The context of the depthwise convolution that computed x, or null.
AutogradContext* depthwise_of(Tensor x) {
  const auto node = x.grad_fn();
  auto* convolution = dynamic_cast<torch::autograd::CppNode<ConvMoments>*>(node.get());
  if (!convolution || x.output_nr() != 0 || convolution->ctx_.saved_data["geometry"].toIntVector()[2] == 1) {
    return nullptr;
  }
  return &convolution->ctx_;
}

struct NormActPool : torch::autograd::Function<NormActPool> {
  static variable_list forward(
      AutogradContext* ctx,
      Tensor x,
      OptionalTensor scale,
      OptionalTensor shift,
      std::string act,
      bool gradient_means,
      bool defers_input_gradient) {
    auto [mean, gradient_mean, gradient_x_mean] = norm_act_pool()(x, scale, shift, act, gradient_means);
    AutogradContext* convolution = defers_input_gradient ? depthwise_of(x) : nullptr;
    const bool linked = convolution && !convolution->saved_data.count("pooled");
    if (linked) { // one pooling of a convolution can pass its gradient in this way
      convolution->saved_data["pooled"] = true;
    }
    ctx->save_for_backward({x, value(scale), value(shift), gradient_mean, gradient_x_mean});
    ctx->mark_non_differentiable({gradient_mean, gradient_x_mean});
    ctx->saved_data["act"] = std::move(act);
    ctx->saved_data["linked"] = linked;
    ctx->saved_data["input_gradient"] = x.requires_grad();
    return {mean, gradient_mean, gradient_x_mean};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::string& act = ctx->saved_data["act"].toStringRef();
    const OwnedTensor scale = optional(saved[1]), shift = optional(saved[2]);
    const bool linked = ctx->saved_data["linked"].toBool();
    at::Tensor gradient_mean = saved[3], gradient_x_mean = saved[4];
    if (scale && gradient_mean.numel() == 0) {
      std::tie(std::ignore, gradient_mean, gradient_x_mean) =
          norm_act_pool()(saved[0], scale, shift, act, true);
    }
    const auto [grad_x, grad_scale, grad_shift] = norm_act_pool_backward()(
        grads[0], saved[0], scale, shift, act, gradient_mean, gradient_x_mean,
        !linked && ctx->saved_data["input_gradient"].toBool());
    if (linked) {
      ConvMoments::PooledGradient{grads[0], scale, shift, act}.put(*depthwise_of(saved[0]));
    }
    return gradients({grad_x, grad_scale, grad_shift, {}, {}, {}});
  }
};

struct NormAct : torch::autograd::Function<NormAct> {
  static at::Tensor forward(
      AutogradContext* ctx,
      Tensor x,
      OptionalTensor scale,
      OptionalTensor shift,
      std::string act,
      OptionalTensor gate,
      OptionalTensor residual,
      OptionalTensor residual_scale,
      OptionalTensor residual_shift) {
    at::Tensor out = norm_act()(x, scale, shift, act, gate, residual, residual_scale, residual_shift);
    variable_list saved{x};
    for (OptionalTensor tensor : {scale, shift, gate, residual, residual_scale, residual_shift}) {
      saved.push_back(value(tensor));
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["act"] = std::move(act);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::string& act = ctx->saved_data["act"].toStringRef();
    const OwnedTensor gate = optional(saved[3]), residual = optional(saved[4]), residual_scale = optional(saved[5]);
    // If the residual is only added, its gradient is the output's gradient: skip the copy.
    const bool passed_on = residual && !residual_scale && act == "identity" && !gate;
    const auto [grad_x, grad_scale, grad_shift, grad_gate, grad_residual, grad_residual_scale, grad_residual_shift] =
        norm_act_backward()(
            grads[0], saved[0], optional(saved[1]), optional(saved[2]), act, gate, residual, residual_scale,
            optional(saved[6]), residual && !passed_on);
    return gradients(
        {grad_x, grad_scale, grad_shift, {}, grad_gate, passed_on ? grads[0] : grad_residual, grad_residual_scale,
         grad_residual_shift});
  }
};

struct ScaleShift : torch::autograd::Function<ScaleShift> {
  static variable_list forward(
      AutogradContext* ctx,
      Tensor mean,
      Tensor variance,
      OptionalTensor weight,
      OptionalTensor weight_main_grad,
      OptionalTensor bias,
      OptionalTensor bias_main_grad,
      double eps) {
    auto [scale, shift] = scale_shift()(mean, variance, weight, bias, eps);
    ctx->save_for_backward({mean, variance, value(weight), value(bias)});
    // The main_grad of a frozen vector must not change.
    ctx->saved_data["weight_main_grad"] = requires_grad(weight) ? weight_main_grad : std::nullopt;
    ctx->saved_data["bias_main_grad"] = requires_grad(bias) ? bias_main_grad : std::nullopt;
    ctx->saved_data["eps"] = eps;
    return {scale, shift};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto [grad_mean, grad_variance, grad_weight, grad_bias] = scale_shift_backward()(
        grads[0], grads[1], saved[0], saved[1], optional(saved[2]), optional(*ctx, "weight_main_grad"),
        optional(saved[3]), optional(*ctx, "bias_main_grad"), ctx->saved_data["eps"].toDouble());
    return gradients({grad_mean, grad_variance, grad_weight, {}, grad_bias, {}, {}});
  }
};

struct SlimLinear : torch::autograd::Function<SlimLinear> {
  static at::Tensor forward(
      AutogradContext* ctx, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor main_grad,
      int64_t out_features) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["main_grad"] = main_grad;
    ctx->saved_data["wanted"] =
        std::vector<int64_t>{x.requires_grad(), weight.requires_grad(), requires_grad(bias)};
    return slim_linear()(x, weight, bias, out_features);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toIntVector();
    const auto [grad_x, grad_weight, grad_bias] = slim_linear_backward()(
        grads[0], saved[0], saved[1], optional(*ctx, "main_grad"), wanted[0] != 0, wanted[1] != 0, wanted[2] != 0);
    return gradients({grad_x, grad_weight, grad_bias, {}, {}});
  }
};

Tensors3 conv_moments_autograd(
    Tensor x,
    OptionalTensor scale,
    OptionalTensor shift,
    std::string_view act,
    OptionalTensor gate,
    Tensor weight,
    OptionalTensor main_grad,
    int64_t out_channels,
    int64_t stride,
    int64_t padding,
    int64_t groups,
    int64_t views) {
  check_like_weight("conv_moments", "main_grad", main_grad, weight);
  const OwnedTensor none;
  const variable_list results = ConvMoments::apply(
      x, scale, shift, std::string(act), gate, weight, main_grad, out_channels, stride, padding, groups, views, none,
      none, none, none, std::optional<double>());
  return {results[0], results[1], results[2]};
}

// conv_moments and scale_shift of its moments.
Tensors5 conv_norm_autograd(
    Tensor x,
    OptionalTensor scale,
    OptionalTensor shift,
    std::string_view act,
    OptionalTensor gate,
    Tensor weight,
    OptionalTensor main_grad,
    int64_t out_channels,
    int64_t stride,
    int64_t padding,
    int64_t groups,
    int64_t views,
    OptionalTensor norm_weight,
    OptionalTensor norm_weight_main_grad,
    OptionalTensor norm_bias,
    OptionalTensor norm_bias_main_grad,
    double eps) {
  check_like_weight("conv_norm", "main_grad", main_grad, weight);
  check_like_weight("conv_norm", "norm_weight_main_grad", norm_weight_main_grad, norm_weight);
  check_like_weight("conv_norm", "norm_bias_main_grad", norm_bias_main_grad, norm_bias);
  const variable_list results = ConvMoments::apply(
      x, scale, shift, std::string(act), gate, weight, main_grad, out_channels, stride, padding, groups, views,
      norm_weight, norm_weight_main_grad, norm_bias, norm_bias_main_grad, std::optional<double>(eps));
  return {results[0], results[1], results[2], results[3], results[4]};
}

Tensors3 norm_act_pool_autograd(
    Tensor x,
    OptionalTensor scale,
    OptionalTensor shift,
    std::string_view act,
    bool gradient_means,
    bool defers_input_gradient) {
  const variable_list results =
      NormActPool::apply(x, scale, shift, std::string(act), gradient_means, defers_input_gradient);
  return {results[0], results[1], results[2]};
}

at::Tensor norm_act_autograd(
    Tensor x,
    OptionalTensor scale,
    OptionalTensor shift,
    std::string_view act,
    OptionalTensor gate,
    OptionalTensor residual,
    OptionalTensor residual_scale,
    OptionalTensor residual_shift) {
  return NormAct::apply(x, scale, shift, std::string(act), gate, residual, residual_scale, residual_shift);
}

Tensors2 scale_shift_autograd(
    Tensor mean,
    Tensor variance,
    OptionalTensor weight,
    OptionalTensor weight_main_grad,
    OptionalTensor bias,
    OptionalTensor bias_main_grad,
    double eps) {
  check_like_weight("scale_shift", "weight_main_grad", weight_main_grad, weight);
  check_like_weight("scale_shift", "bias_main_grad", bias_main_grad, bias);
  const variable_list results =
      ScaleShift::apply(mean, variance, weight, weight_main_grad, bias, bias_main_grad, eps);
  return {results[0], results[1]};
}

at::Tensor slim_linear_autograd(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor main_grad, int64_t out_features) {
  check_like_weight("slim_linear", "main_grad", main_grad, weight);
  return SlimLinear::apply(x, weight, bias, main_grad, out_features);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(dspnet_cpp, library) {
  library.def(
      "conv_moments_autograd(Tensor x, Tensor? scale, Tensor? shift, str act, Tensor? gate, Tensor weight, "
      "Tensor? main_grad, int out_channels, int stride, int padding, int groups, int views) -> "
      "(Tensor, Tensor, Tensor)",
      conv_moments_autograd);
  library.def(
      "conv_norm_autograd(Tensor x, Tensor? scale, Tensor? shift, str act, Tensor? gate, Tensor weight, "
      "Tensor? main_grad, int out_channels, int stride, int padding, int groups, int views, Tensor? norm_weight, "
      "Tensor? norm_weight_main_grad, Tensor? norm_bias, Tensor? norm_bias_main_grad, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)",
      conv_norm_autograd);
  library.def(
      "norm_act_autograd(Tensor x, Tensor? scale, Tensor? shift, str act, Tensor? gate, Tensor? residual, "
      "Tensor? residual_scale, Tensor? residual_shift) -> Tensor",
      norm_act_autograd);
  library.def(
      "norm_act_pool_autograd(Tensor x, Tensor? scale, Tensor? shift, str act, bool gradient_means, "
      "bool defers_input_gradient=False) -> (Tensor, Tensor, Tensor)",
      norm_act_pool_autograd);
  library.def(
      "scale_shift_autograd(Tensor mean, Tensor variance, Tensor? weight, Tensor? weight_main_grad, Tensor? bias, "
      "Tensor? bias_main_grad, float eps) -> (Tensor, Tensor)",
      scale_shift_autograd);
  library.def(
      "slim_linear_autograd(Tensor x, Tensor weight, Tensor? bias, Tensor? main_grad, int out_features) -> Tensor",
      slim_linear_autograd);
}
