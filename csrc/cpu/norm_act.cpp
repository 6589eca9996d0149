// norm_act, out = act(z) * gate with z = scale x + shift + (residual_scale residual + residual_shift), and its gradient:
//
//   dz = d gate act'(z)    dx = scale dz    dscale = sum(dz x)    dshift = sum(dz)    dgate = sum(d act(z))
//
// and for the residual as for x. Bound by memory: forward reads x (and the residual) and writes the output; backward
// reads d, x (and the residual) and writes dx (and dresidual). With the identity and no gate z is not needed, so x is
// read for dscale alone and the residual for its own scale alone.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "activations.h"
#include "check.h"
#include "panels.h"
#include "thread_sums.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {
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

// Pointers to one image's [C] coefficients; null stands for scales and gates of 1, shifts of 0.
struct Coefficients {
  const float* scale = nullptr;
  const float* shift = nullptr;
  const float* residual_scale = nullptr;
  const float* residual_shift = nullptr;
  const float* gate = nullptr;
};

// One image's sums, [C] each. residual: of dz residual, null if there is none.
struct Sums {
  float* z;
  float* x;
  float* residual;
  float* gate;
};

struct Problem {
  int64_t images, positions, channels;
  Deferred deferred;
  Deferred residual_deferred; // rows = 0 without one, too

  Coefficients of(int64_t n) const {
    Coefficients c;
    if (deferred.rows) {
      c.scale = deferred.scale + deferred.row(n, images) * channels;
      c.shift = deferred.shift + deferred.row(n, images) * channels;
    }
    if (residual_deferred.rows) {
      c.residual_scale = residual_deferred.scale + residual_deferred.row(n, images) * channels;
      c.residual_shift = residual_deferred.shift + residual_deferred.row(n, images) * channels;
    }
    c.gate = deferred.gate ? deferred.gate + n * channels : nullptr;
    return c;
  }
};

template <Act act, bool gated, bool residual, typename P, typename scalar_t>
void forward_panel(
    const P& panel,
    const Coefficients& of,
    const Tensors<scalar_t>& t,
    int64_t channels,
    int64_t begin,
    int64_t rows) {
  Vec scale[P::vectors], shift[P::vectors], residual_scale[P::vectors], gate[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(of.scale, v, 1);
    shift[v] = panel.get_or(of.shift, v, 0) + panel.get_or(of.residual_shift, v, 0);
    residual_scale[v] = panel.get_or(of.residual_scale, v, 1);
    gate[v] = panel.get_or(of.gate, v, 1);
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
    const Coefficients& of,
    const Sums& sums,
    const Tensors<scalar_t>& t,
    int64_t channels,
    int64_t begin,
    int64_t rows) {
  constexpr bool needs_z = act != Act::identity || gated;
  Vec scale[P::vectors], shift[P::vectors], residual_scale[P::vectors], gate[P::vectors];
  Vec sum_z[P::vectors], sum_x[P::vectors], sum_residual[P::vectors], sum_gate[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(of.scale, v, 1);
    shift[v] = panel.get_or(of.shift, v, 0) + panel.get_or(of.residual_shift, v, 0);
    residual_scale[v] = panel.get_or(of.residual_scale, v, 1);
    gate[v] = panel.get_or(of.gate, v, 1);
    sum_z[v] = sum_x[v] = sum_residual[v] = sum_gate[v] = Vec(0);
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
          sum_gate[v] = at::vec::fmadd(dz, activate<act>(z), sum_gate[v]);
          dz = dz * gate[v];
        }
        if constexpr (act != Act::identity) {
          dz = dz * activation_gradient<act>(z);
        }
      }
      sum_z[v] = sum_z[v] + dz;
      sum_x[v] = at::vec::fmadd(dz, x, sum_x[v]);
      panel.put(t.grad_x + at, v, dz * scale[v]);
      if constexpr (residual) {
        sum_residual[v] = at::vec::fmadd(dz, from_residual, sum_residual[v]);
        if (stores_residual) {
          panel.put(t.grad_residual + at, v, dz * residual_scale[v]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(sums.z, v, sum_z[v]);
    panel.add(sums.x, v, sum_x[v]);
    if constexpr (residual) {
      panel.add(sums.residual, v, sum_residual[v]);
    }
    if constexpr (gated) {
      panel.add(sums.gate, v, sum_gate[v]);
    }
  }
}

// Calls run(act, gated, residual), all of them integral constants.
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
        const Coefficients of = problem.of(n);
        for_blocks(begin, stop, channels, [&](const auto& panel, int64_t first, int64_t rows) {
          forward_panel<act(), gated(), residual()>(panel, of, tensors, channels, first, rows);
        });
        begin = stop;
      }
    });
  });
}

struct SmallGradients { // null: not wanted
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
  ThreadSums z(problem.deferred.rows, channels), x(problem.deferred.rows, channels);
  ThreadSums residual_z(problem.residual_deferred.rows, channels), residual_x(problem.residual_deferred.rows, channels);
  std::vector<float> gate_parts(small.gate && parts.parts > 1 ? parts.size() * channels : 0);
  float* gates = gate_parts.empty() ? small.gate : gate_parts.data();
  with_variant(problem.deferred.act, problem.deferred.gate, tensors.residual, [&](auto act, auto gated, auto residual) {
    at::parallel_for(0, parts.size(), parts.grain(channels), [&](int64_t part, int64_t end) {
      auto pending = pending_sums<3>(channels, std::make_pair(int64_t{0}, int64_t{0}), [&](auto rows, const auto& sums) {
        z.add(rows.first, sums[0]);
        x.add(rows.first, sums[1]);
        residual_z.add(rows.second, sums[0]);
        residual_x.add(rows.second, sums[2]);
      });
      for (; part < end; ++part) {
        float* gate = gates ? gates + part * channels : nullptr;
        if (gate) {
          std::fill_n(gate, channels, 0.f);
        }
        const int64_t n = parts.image(part), first = parts.begin(part), stop = parts.end(part);
        const auto rows_of_n = std::make_pair(
            problem.deferred.row(n, problem.images), problem.residual_deferred.row(n, problem.images));
        const auto& [sum_z, sum_x, sum_residual] = pending.next(stop - first, rows_of_n);
        const Sums sums{sum_z, sum_x, sum_residual, gate};
        const Coefficients of = problem.of(n);
        for_blocks(first, stop, channels, [&](const auto& panel, int64_t row, int64_t rows) {
          backward_panel<act(), gated(), residual()>(panel, of, sums, tensors, channels, row, rows);
        });
      }
      pending.flush();
    });
  });
  z.write(small.shift);
  x.write(small.scale);
  residual_z.write(small.residual_shift);
  residual_x.write(small.residual_scale);
  if (!gate_parts.empty()) {
    add_parts(gates, parts, channels, small.gate);
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
  checked.problem = {x.size(0), x.size(2) * x.size(3), x.size(1), checked.deferred.deferred, checked.residual_deferred.deferred};
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
  const int64_t channels = problem.channels, rows = problem.deferred.rows, residual_rows = problem.residual_deferred.rows;
  const bool of_residual = residual && residual_gradient;
  const at::Tensor grad_x = empty_channels_last(x);
  const at::Tensor grad_residual = of_residual ? empty_channels_last(x) : at::empty({0}, x.options());
  const at::Tensor grad_scale = empty_small(x, rows > 0, {rows, channels}), grad_shift = at::empty_like(grad_scale);
  const at::Tensor grad_gate = empty_small(x, gate.has_value(), {x.size(0), channels});
  const at::Tensor grad_residual_scale =
      empty_small(x, of_residual && residual_rows > 0, {residual_rows, channels});
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
  const bool reads_residual = residual && (needs_z || (of_residual && residual_rows > 0));
  if (!reads_residual) {
    problem.residual_deferred = {};
    if (of_residual) {
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
      tensors.grad_residual = of_residual ? grad_residual.mutable_data_ptr<scalar_t>() : nullptr;
    }
    backward(
        problem, tensors,
        {pointer_of(grad_scale), pointer_of(grad_shift), pointer_of(grad_gate), pointer_of(grad_residual_scale),
         pointer_of(grad_residual_shift)});
  });
  return results();
}

} // namespace CPU_CAPABILITY
} // namespace dspnet
