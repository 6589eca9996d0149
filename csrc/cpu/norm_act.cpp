// norm_act, out = act(z) * gate with z = scale x + shift + (residual_scale residual + residual_shift), and its
// gradient:
//
//   dz = d gate act'(z)    dx = scale dz    dscale = sum(dz x)    dshift = sum(dz)    dgate = sum(d act(z))
//
// with d the gradient of out; the residual's gradients are analogous. Bound by memory: forward reads x (and the
// residual) and writes the output; backward reads d, x (and the residual) and writes dx (and dresidual). For the
// identity without a gate, z is not computed: x is read only for dscale, and the residual only for dresidual_scale.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "activations.h"
#include "check.h"
#include "panels.h"
#include "thread_sums.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace {

// Activations are dense and channels-last, [images * positions, channels].
template <typename scalar_t>
struct Tensors {
  const scalar_t* x;
  const scalar_t* residual;
  const scalar_t* grad;
  scalar_t* out;
  scalar_t* grad_x;
  scalar_t* grad_residual;
};

// One image's coefficients, [C] each. Null: scales and gates of 1, shifts of 0.
struct Coefficients {
  const float* scale;
  const float* shift;
  const float* residual_scale;
  const float* residual_shift;
  const float* gate;
};

// Sums over positions of dz, dz x, dz residual and d act(z), [C] each. dz_residual is null without a residual.
struct Sums {
  float* dz;
  float* dz_x;
  float* dz_residual;
  float* gate;
};

struct Problem {
  int64_t images, positions, channels;
  Deferred deferred;
  Deferred residual_deferred; // rows = 0 also without a residual

  Coefficients coefficients(int64_t n) const {
    return {
        deferred.scale_of(n, images, channels), deferred.shift_of(n, images, channels),
        residual_deferred.scale_of(n, images, channels), residual_deferred.shift_of(n, images, channels),
        deferred.gate_of(n, channels)};
  }
};

template <Act act, bool gated, bool residual, typename P, typename scalar_t>
void forward_panel(
    const P& panel,
    const Coefficients& coefficients,
    const Tensors<scalar_t>& t,
    int64_t channels,
    int64_t begin,
    int64_t rows) {
  Vec scale[P::vectors], shift[P::vectors], residual_scale[P::vectors], gate[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(coefficients.scale, v, 1);
    shift[v] = panel.get_or(coefficients.shift, v, 0) + panel.get_or(coefficients.residual_shift, v, 0);
    residual_scale[v] = panel.get_or(coefficients.residual_scale, v, 1);
    gate[v] = panel.get_or(coefficients.gate, v, 1);
  }
  for (int64_t at = begin * channels; at < (begin + rows) * channels; at += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      Vec z = at::vec::fmadd(panel.get(t.x + at, v), scale[v], shift[v]);
      if constexpr (residual) {
        z = at::vec::fmadd(panel.get(t.residual + at, v), residual_scale[v], z);
      }
      Vec value = activate<act>(z);
      if constexpr (gated) {
        value = value * gate[v];
      }
      panel.put(t.out + at, v, value);
    }
  }
}

template <Act act, bool gated, bool residual, typename P, typename scalar_t>
void backward_panel(
    const P& panel,
    const Coefficients& coefficients,
    const Sums& sums,
    const Tensors<scalar_t>& t,
    int64_t channels,
    int64_t begin,
    int64_t rows) {
  constexpr bool needs_z = act != Act::identity || gated;
  Vec scale[P::vectors], shift[P::vectors], residual_scale[P::vectors], gate[P::vectors];
  Vec dz_sum[P::vectors], dz_x_sum[P::vectors], dz_residual_sum[P::vectors], gate_sum[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(coefficients.scale, v, 1);
    shift[v] = panel.get_or(coefficients.shift, v, 0) + panel.get_or(coefficients.residual_shift, v, 0);
    residual_scale[v] = panel.get_or(coefficients.residual_scale, v, 1);
    gate[v] = panel.get_or(coefficients.gate, v, 1);
    dz_sum[v] = dz_x_sum[v] = dz_residual_sum[v] = gate_sum[v] = Vec(0);
  }
  const bool stores_residual = residual && t.grad_residual;
  for (int64_t at = begin * channels; at < (begin + rows) * channels; at += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec x = panel.get(t.x + at, v);
      Vec from_residual(0);
      if constexpr (residual) {
        from_residual = panel.get(t.residual + at, v);
      }
      Vec dz = panel.get(t.grad + at, v);
      if constexpr (needs_z) {
        Vec z = at::vec::fmadd(x, scale[v], shift[v]);
        if constexpr (residual) {
          z = at::vec::fmadd(from_residual, residual_scale[v], z);
        }
        if constexpr (gated) {
          gate_sum[v] = at::vec::fmadd(dz, activate<act>(z), gate_sum[v]);
          dz = dz * gate[v];
        }
        if constexpr (act != Act::identity) {
          dz = dz * activation_gradient<act>(z);
        }
      }
      dz_sum[v] = dz_sum[v] + dz;
      dz_x_sum[v] = at::vec::fmadd(dz, x, dz_x_sum[v]);
      panel.put(t.grad_x + at, v, dz * scale[v]);
      if constexpr (residual) {
        dz_residual_sum[v] = at::vec::fmadd(dz, from_residual, dz_residual_sum[v]);
        if (stores_residual) {
          panel.put(t.grad_residual + at, v, dz * residual_scale[v]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(sums.dz, v, dz_sum[v]);
    panel.add(sums.dz_x, v, dz_x_sum[v]);
    if constexpr (residual) {
      panel.add(sums.dz_residual, v, dz_residual_sum[v]);
    }
    if constexpr (gated) {
      panel.add(sums.gate, v, gate_sum[v]);
    }
  }
}

// Calls run(act, gated, residual) with integral constants.
template <typename Run>
void with_variant(Act act, bool gated, bool residual, const Run& run) {
  const auto with_bool = [](bool value, const auto& then) {
    if (value) {
      then(std::true_type{});
    } else {
      then(std::false_type{});
    }
  };
  with_act(act, [&](auto a) {
    with_bool(gated, [&](auto g) { with_bool(residual, [&](auto r) { run(a, g, r); }); });
  });
}

template <typename scalar_t>
void forward(const Problem& problem, const Tensors<scalar_t>& tensors) {
  const int64_t channels = problem.channels, positions = problem.positions;
  with_variant(problem.deferred.act, problem.deferred.gate, tensors.residual, [&](auto act, auto gated, auto residual) {
    at::parallel_for(0, problem.images * positions, kGrainElements / channels + 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t n = begin / positions, stop = std::min(end, (n + 1) * positions);
        const Coefficients coefficients = problem.coefficients(n);
        for_blocks(begin, stop, channels, [&](const auto& panel, int64_t first, int64_t rows) {
          forward_panel<act(), gated(), residual()>(panel, coefficients, tensors, channels, first, rows);
        });
        begin = stop;
      }
    });
  });
}

struct SmallGradients { // null if not wanted
  float* scale;
  float* shift;
  float* gate;
  float* residual_scale;
  float* residual_shift;
};

template <typename scalar_t>
void backward(const Problem& problem, const Tensors<scalar_t>& tensors, const SmallGradients& small) {
  const int64_t channels = problem.channels;
  const Parts parts(problem.images, problem.positions, at::get_num_threads());
  ThreadSums dz(problem.deferred.rows, channels), dz_x(problem.deferred.rows, channels);
  ThreadSums residual_dz(problem.residual_deferred.rows, channels);
  ThreadSums dz_residual(problem.residual_deferred.rows, channels);
  std::vector<float> gate_parts(small.gate && parts.per_image > 1 ? parts.size() * channels : 0);
  float* gate_sums = gate_parts.empty() ? small.gate : gate_parts.data();
  with_variant(problem.deferred.act, problem.deferred.gate, tensors.residual, [&](auto act, auto gated, auto residual) {
    at::parallel_for(0, parts.size(), parts.grain(channels), [&](int64_t part, int64_t end) {
      const auto first_rows = std::make_pair(int64_t{0}, int64_t{0});
      auto buffered = buffered_sums<3>(channels, first_rows, [&](auto rows, const auto& sums) {
        dz.add(rows.first, sums[0]);
        dz_x.add(rows.first, sums[1]);
        residual_dz.add(rows.second, sums[0]);
        dz_residual.add(rows.second, sums[2]);
      });
      for (; part < end; ++part) {
        float* gate = gate_sums ? gate_sums + part * channels : nullptr;
        if (gate) {
          std::fill_n(gate, channels, 0.f);
        }
        const int64_t n = parts.image(part), first = parts.begin(part), stop = parts.end(part);
        const auto rows_of_n = std::make_pair(
            problem.deferred.row(n, problem.images), problem.residual_deferred.row(n, problem.images));
        const auto& [dz_sum, dz_x_sum, dz_residual_sum] = buffered.reserve(stop - first, rows_of_n);
        const Sums sums{dz_sum, dz_x_sum, dz_residual_sum, gate};
        const Coefficients coefficients = problem.coefficients(n);
        for_blocks(first, stop, channels, [&](const auto& panel, int64_t row, int64_t rows) {
          backward_panel<act(), gated(), residual()>(panel, coefficients, sums, tensors, channels, row, rows);
        });
      }
      buffered.flush();
    });
  });
  dz.write(small.shift);
  dz_x.write(small.scale);
  residual_dz.write(small.residual_shift);
  dz_residual.write(small.residual_scale);
  if (!gate_parts.empty()) {
    add_parts(gate_sums, parts, channels, small.gate);
  }
}

struct Checked {
  CheckedDeferred deferred, residual_deferred;
  Problem problem;
};

Checked check(
    const char* op,
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act,
    const OptionalTensor& gate,
    const OptionalTensor& residual,
    const OptionalTensor& residual_scale,
    const OptionalTensor& residual_shift) {
  check_activation(op, "x", x);
  Checked checked{check_deferred(op, x, scale, shift, act, gate, 0), {}, {}};
  if (residual) {
    check_like(op, "residual", *residual, x);
    checked.residual_deferred = check_deferred(op, *residual, residual_scale, residual_shift, act, std::nullopt, 0);
  } else {
    TORCH_CHECK(!residual_scale && !residual_shift, op, ": residual_scale and residual_shift without a residual");
  }
  checked.problem = {
      x.size(0), x.size(2) * x.size(3), x.size(1), checked.deferred.deferred, checked.residual_deferred.deferred};
  return checked;
}

} // namespace

at::Tensor norm_act(
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act,
    const OptionalTensor& gate,
    const OptionalTensor& residual,
    const OptionalTensor& residual_scale,
    const OptionalTensor& residual_shift) {
  const at::NoGradGuard no_grad;
  const Checked checked =
      check("norm_act", x, scale, shift, act, gate, residual, residual_scale, residual_shift);
  const at::Tensor out = empty_channels_last(x);
  if (x.numel() == 0) {
    return out;
  }
  const at::Tensor input = channels_last(x), added = residual ? channels_last(*residual) : at::Tensor();
  with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
    Tensors<scalar_t> tensors{};
    tensors.x = input.const_data_ptr<scalar_t>();
    tensors.residual = residual ? added.const_data_ptr<scalar_t>() : nullptr;
    tensors.out = out.mutable_data_ptr<scalar_t>();
    forward(checked.problem, tensors);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_backward(
    const at::Tensor& grad,
    const at::Tensor& x,
    const OptionalTensor& scale,
    const OptionalTensor& shift,
    std::string_view act,
    const OptionalTensor& gate,
    const OptionalTensor& residual,
    const OptionalTensor& residual_scale,
    const OptionalTensor& residual_shift,
    bool residual_gradient) {
  const at::NoGradGuard no_grad;
  const char* op = "norm_act_backward";
  Checked checked = check(op, x, scale, shift, act, gate, residual, residual_scale, residual_shift);
  check_like(op, "grad", grad, x);
  Problem& problem = checked.problem;
  const int64_t channels = problem.channels, rows = problem.deferred.rows;
  const int64_t residual_rows = problem.residual_deferred.rows;
  const bool residual_gradient_wanted = residual && residual_gradient;
  const at::Tensor grad_x = empty_channels_last(x);
  const at::Tensor grad_residual = residual_gradient_wanted ? empty_channels_last(x) : at::empty({0}, x.options());
  const at::Tensor grad_scale = empty_fp32(x, rows > 0, {rows, channels}), grad_shift = at::empty_like(grad_scale);
  const at::Tensor grad_gate = empty_fp32(x, gate.has_value(), {x.size(0), channels});
  const at::Tensor grad_residual_scale =
      empty_fp32(x, residual_gradient_wanted && residual_rows > 0, {residual_rows, channels});
  const at::Tensor grad_residual_shift = at::empty_like(grad_residual_scale);
  const auto results = [&] {
    return std::make_tuple(
        grad_x, grad_scale, grad_shift, grad_gate, grad_residual, grad_residual_scale, grad_residual_shift);
  };
  if (x.numel() == 0) {
    for (const auto& sums : {grad_scale, grad_shift, grad_gate, grad_residual_scale, grad_residual_shift}) {
      sums.zero_();
    }
    return results();
  }

  const bool needs_z = problem.deferred.act != Act::identity || gate;
  const bool reads_residual = residual && (needs_z || (residual_gradient_wanted && residual_rows > 0));
  if (!reads_residual) {
    problem.residual_deferred = {};
    if (residual_gradient_wanted) {
      grad_residual.copy_(grad);
    }
    if (!needs_z && rows == 0) {
      grad_x.copy_(grad);
      return results();
    }
  }
  const at::Tensor input = channels_last(x), grad_out = channels_last(grad);
  const at::Tensor added = reads_residual ? channels_last(*residual) : at::Tensor();
  with_scalar(x.scalar_type(), [&]<typename scalar_t>(scalar_t) {
    Tensors<scalar_t> tensors{};
    tensors.x = input.const_data_ptr<scalar_t>();
    tensors.grad = grad_out.const_data_ptr<scalar_t>();
    tensors.grad_x = grad_x.mutable_data_ptr<scalar_t>();
    if (reads_residual) {
      tensors.residual = added.const_data_ptr<scalar_t>();
      tensors.grad_residual = residual_gradient_wanted ? grad_residual.mutable_data_ptr<scalar_t>() : nullptr;
    }
    backward(
        problem, tensors,
        {data_or_null(grad_scale), data_or_null(grad_shift), data_or_null(grad_gate), data_or_null(grad_residual_scale),
         data_or_null(grad_residual_shift)});
  });
  return results();
}

} // namespace dspnet::CPU_CAPABILITY
