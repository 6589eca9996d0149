// slim_linear, y = x W^T + bias with a prefix W of a weight, and its gradient:
//
//   dx = dy W    dW += dy^T x    dbias = sum(dy)
//
// Products of a few dozen rows: every element of the weight is used only that often, so it is read once, in pieces that
// stay in the L2 cache. A thread computes some columns of y or of dx, or some rows of dW.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <functional>
#include <tuple>

#include "activations.h"
#include "check.h"
#include "dense.h"
#include "gemm.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace linear {
namespace {

constexpr int64_t kDepth = 1024; // of a packed piece of the weight or of x, for y
constexpr int64_t kInputDepth = 128; // likewise for dx
constexpr int64_t kOuterRows = 256; // rows summed in fp32, for dW
constexpr int64_t kOuterBytes = 256 << 10; // of x in a block of columns, for dW
constexpr int64_t kGrain = 1 << 19; // multiplications per thread at least

struct PackedPiece;
struct PackedInput;
struct TransposedOutput;
struct PaddedInput;
struct ColumnTile;

// A prefix of a weight or of its gradient, [outputs, features]; consecutive features are adjacent.
struct Weight {
  float* data;
  int64_t outputs, features, stride;
};

// Epilogue: adds a tile to rows of the result, or to the bias, or only stores it.
struct AddToRows {
  float* to;
  int64_t columns;
  const float* bias; // [columns], or null
  bool begins; // overwrites the result

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t c = column + v * kVec;
      with_lanes(v + 1 < V, columns - c, [&](auto... count) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          float* at = to + (row + r) * columns + c;
          Vec value = sums[r][v];
          if (!begins) {
            value = value + load(at, count...);
          } else if (bias) {
            value = value + load(bias + c, count...);
          }
          store(at, value, count...);
        }
      });
    }
  }
};

// Epilogue: adds a tile to the rows [row, row + R) of the weight's gradient; the tile's own rows begin at 0.
struct AddToWeight {
  Weight to;
  int64_t row;

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t c = column + v * kVec;
      with_lanes(v + 1 < V, to.features - c, [&](auto... count) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          float* at = to.data + (row + r) * to.stride + c;
          prefetch(at + V * kVec); // the next tile
          store(at, load(at, count...) + sums[r][v], count...);
        }
      });
    }
  }
};

// Multiplies all rows of x by the panels [first, last) of a matrix with `depth` rows, which `pack(panel, begin, depth,
// to)` packs piece by piece.
template <typename Pack>
void multiply_pieces(
    const float* x,
    int64_t rows,
    int64_t depth,
    int64_t piece,
    const Panels& panels,
    int64_t first,
    int64_t last,
    AddToRows epilogue,
    const Pack& pack) {
  float* packed = scratch<PackedPiece>((panels.offset(last, 1) - panels.offset(first, 1)) * std::min(piece, depth));
  for (int64_t begin = 0; begin < depth; begin += piece) {
    const int64_t some = std::min(piece, depth - begin);
    const auto at = [&](int64_t p) { return packed + panels.offset(p, some) - panels.offset(first, some); };
    for (int64_t p = first; p < last; ++p) {
      pack(p, begin, some, at(p));
    }
    epilogue.begins = begin == 0;
    for (int64_t p = first; p < last; ++p) {
      with_vectors(panels.width(p), [&](auto v) {
        dense::multiply_evenly<v>(Rows{x + begin, depth, some}, rows, at(p), panels.column(p), epilogue);
      });
    }
  }
}

// Adds the products of R outputs of the weight, from `o` on, with the inputs [begin, end) of a panel of x^T to rows of
// y^T. Rows of the weight are read in place, once, and the next tile's are prefetched.
template <int V, int R>
void output_tile(const Weight& weight, int64_t o, int64_t begin, int64_t end, const float* panel, float* y) {
  constexpr int64_t kLine = 16; // floats
  const float* from = weight.data + o * weight.stride;
  for (int64_t k = begin; k < end;) {
    const bool begins = k == 0;
    const int64_t chain = std::min(k + kChain, end);
    Vec sums[R][V];
    clear(sums);
    while (k < chain) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        prefetch(from + (R + r) * weight.stride + k);
      }
      for (const int64_t line = std::min(k + kLine, chain); k < line; ++k, panel += V * kVec) {
        add_product<Fp32>(sums, from + k, weight.stride, panel);
      }
    }
    if (!begins) {
      add_parked(sums, y + o * V * kVec);
    }
    park(sums, y + o * V * kVec);
  }
}

template <int V, int R = kTileRows<V>>
void output_tiles(const Weight& weight, int64_t o, int64_t begin, int64_t end, const float* panel, float* y) {
  for (; o + R <= weight.outputs; o += R) {
    output_tile<V, R>(weight, o, begin, end, panel, y);
  }
  if constexpr (R > 1) {
    if (o < weight.outputs) {
      output_tiles<V, R / 2>(weight, o, begin, end, panel, y);
    }
  }
}

// y of as many rows as a panel has columns, as (W x^T)^T: x and y are transposed instead of the weight, which is larger.
void forward_of_panel(const float* x, int64_t rows, const Weight& weight, const float* bias, float* y) {
  constexpr int64_t kSide = 16;
  const Panels panel(rows);
  const int64_t width = panel.padded();
  float* packed = scratch<PackedInput>(width * weight.features);
  pack_panel(packed, panel, 0, x, 1, weight.features, weight.features);
  const int64_t grain = kGrain / std::max<int64_t>(rows * weight.features, 1) + 1;
  at::parallel_for(0, weight.outputs, grain, [&](int64_t first, int64_t last) {
    const Weight part{weight.data + first * weight.stride, last - first, weight.features, weight.stride};
    float* transposed = scratch<TransposedOutput>(part.outputs * width);
    with_vectors(width, [&](auto v) {
      for (int64_t begin = 0; begin < part.features; begin += kDepth) {
        const int64_t end = std::min(begin + kDepth, part.features);
        output_tiles<v>(part, 0, begin, end, packed + begin * width, transposed);
      }
    });
    for (int64_t o = 0; bias && o < part.outputs; ++o) {
      for (int64_t row = 0; row < width; ++row) {
        transposed[o * width + row] += bias[first + o];
      }
    }
    for (int64_t o = 0; o < part.outputs; o += kSide) {
      for (int64_t row = 0; row < rows; row += kSide) {
        at::vec::transpose_mxn<float>(
            transposed + o * width + row, width, y + row * weight.outputs + first + o, weight.outputs,
            static_cast<int>(std::min(kSide, part.outputs - o)), static_cast<int>(std::min(kSide, rows - row)));
      }
    }
  });
}

void forward(const float* x, int64_t rows, const Weight& weight, const float* bias, float* y) {
  constexpr int64_t kWidest = kPanelVectors * kVec;
  if (4 * rows >= 3 * kWidest && rows <= kWidest && rows <= weight.outputs) {
    return forward_of_panel(x, rows, weight, bias, y);
  }
  const Panels panels(weight.outputs);
  const int64_t grain = kGrain / std::max<int64_t>(rows * weight.features * kPanelVectors * kVec, 1) + 1;
  at::parallel_for(0, panels.count, grain, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      multiply_pieces(
          x, rows, weight.features, kDepth, panels, p, p + 1, {y, weight.outputs, bias, true},
          [&](int64_t panel, int64_t begin, int64_t depth, float* to) {
            pack_panel(to, panels, panel, weight.data + begin, 1, weight.stride, depth);
          });
    }
  });
}

void input_gradient(const float* grad, int64_t rows, const Weight& weight, float* grad_x) {
  const Panels panels(weight.features);
  const int64_t grain = kGrain / std::max<int64_t>(rows * weight.outputs * kPanelVectors * kVec, 1) + 1;
  at::parallel_for(0, panels.count, grain, [&](int64_t first, int64_t last) {
    multiply_pieces(
        grad, rows, weight.outputs, kInputDepth, panels, first, last, {grad_x, weight.features, nullptr, true},
        [&](int64_t panel, int64_t begin, int64_t depth, float* to) {
          pack_panel(to, panels, panel, weight.data + begin * weight.stride, weight.stride, 1, depth);
        });
  });
}

// Adds the products of R columns of grad from column `i` on with the panels [first, last) of x.
template <int V, int R>
void outer_tiles(
    const Matrix& grad, const Matrix& x, int64_t rows, int64_t i, const Panels& panels, int64_t first, int64_t last,
    const Weight& to) {
  float* tile = scratch<ColumnTile>(kOuterRows * R); // adjacent: rows of grad would share cache sets
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(grad.data + row * grad.stride + i, R, tile + row * R);
  }
  for (int64_t p = first; p < last; ++p) {
    const auto run = [&](auto v) {
      multiply_outer_tile<v, R>(Matrix{tile, R}, x, rows, 0, panels.column(p), AddToWeight{to, i});
    };
    if (panels.width(p) == V * kVec) {
      run(std::integral_constant<int, V>{});
    } else if constexpr (V > 1) {
      run(std::integral_constant<int, V - 1>{}); // widths of panels differ by one vector at most
    }
  }
}

template <int V, int R = kTileRows<V>>
void outer_rows(
    const Matrix& grad, const Matrix& x, int64_t rows, int64_t i, int64_t end, const Panels& panels, int64_t first,
    int64_t last, const Weight& to) {
  for (; i + R <= end; i += R) {
    outer_tiles<V, R>(grad, x, rows, i, panels, first, last, to);
  }
  if constexpr (R > 1) {
    if (i < end) {
      outer_rows<V, R / 2>(grad, x, rows, i, end, panels, first, last, to);
    }
  }
}

void weight_gradient(const float* grad, const float* x, int64_t rows, const Weight& to) {
  const Panels panels(to.features);
  const int64_t stride = panels.padded();
  float* padded = scratch<PaddedInput>(rows * stride);
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(x + row * to.features, to.features, padded + row * stride);
    std::fill_n(padded + row * stride + to.features, stride - to.features, 0.f);
  }
  const int64_t grain = kGrain / std::max<int64_t>(rows * to.features, 1) + 1;
  at::parallel_for(0, to.outputs, grain, [&](int64_t i, int64_t end) {
    for (int64_t row = 0; row < rows; row += kOuterRows) {
      const int64_t some = std::min(kOuterRows, rows - row);
      const int64_t panel_bytes = some * kPanelVectors * kVec * static_cast<int64_t>(sizeof(float));
      const int64_t block = std::max<int64_t>(kOuterBytes / panel_bytes, 1);
      for (int64_t p = 0; p < panels.count; p += block) {
        with_vectors(panels.width(0), [&](auto v) {
          outer_rows<v>(
              Matrix{grad + row * to.outputs, to.outputs}, Matrix{padded + row * stride, stride}, some, i, end, panels,
              p, std::min(p + block, panels.count), to);
        });
      }
    }
  });
}

Weight prefix(const char* op, const char* name, const at::Tensor& weight, int64_t outputs, int64_t features) {
  check_cpu(op, name, weight);
  const bool is_matrix = weight.dim() == 2 || (weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1);
  TORCH_CHECK(
      is_matrix && weight.scalar_type() == at::kFloat && (weight.stride(1) == 1 || weight.size(1) == 1), op, ": ", name,
      " must be [O, I] or [O, I, 1, 1] of float32 with adjacent inputs, got ", weight.sizes(), " ",
      weight.scalar_type(), " with strides ", weight.strides());
  TORCH_CHECK(
      outputs > 0 && outputs <= weight.size(0) && features > 0 && features <= weight.size(1), op, ": a weight of ",
      weight.sizes(), " has no prefix of ", outputs, " x ", features);
  return {weight.mutable_data_ptr<float>(), outputs, features, weight.stride(0)};
}

// Checks a float32 tensor [..., columns]; returns a contiguous version.
at::Tensor check_rows(const char* op, const char* name, const at::Tensor& tensor) {
  check_cpu(op, name, tensor);
  TORCH_CHECK(
      tensor.dim() > 0 && tensor.scalar_type() == at::kFloat && tensor.size(-1) > 0, op, ": ", name,
      " must be [..., features] of float32, got ", tensor.sizes(), " ", tensor.scalar_type());
  return tensor.contiguous();
}

} // namespace
} // namespace linear

at::Tensor slim_linear(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t out_features) {
  const at::NoGradGuard no_grad;
  const char* op = "slim_linear";
  const at::Tensor input = linear::check_rows(op, "x", x);
  const linear::Weight used = linear::prefix(op, "weight", weight, out_features, x.size(-1));
  const at::Tensor added = bias ? check_matrix(op, "bias", bias->unsqueeze(0), 1, out_features) : at::Tensor();
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  const at::Tensor y = at::empty(sizes, x.options());
  linear::forward(
      input.const_data_ptr<float>(), x.numel() / x.size(-1), used, bias ? added.const_data_ptr<float>() : nullptr,
      y.mutable_data_ptr<float>());
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_linear_backward(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& weight,
    const OptionalTensor& main_grad,
    bool input_gradient,
    bool weight_gradient,
    bool bias_gradient) {
  const at::NoGradGuard no_grad;
  const char* op = "slim_linear_backward";
  const at::Tensor input = linear::check_rows(op, "x", x), grads = linear::check_rows(op, "grad", grad);
  const int64_t features = x.size(-1), outputs = grad.size(-1), rows = x.numel() / features;
  const linear::Weight used = linear::prefix(op, "weight", weight, outputs, features);
  TORCH_CHECK(
      grad.sizes().slice(0, grad.dim() - 1) == x.sizes().slice(0, x.dim() - 1), op, ": grad must have the rows of x, ",
      "got ", grad.sizes(), " and ", x.sizes());
  if (main_grad) {
    check_main_grad(op, "main_grad", *main_grad, weight);
  }
  const float* from = grads.const_data_ptr<float>();
  const at::Tensor grad_x = input_gradient ? at::empty(x.sizes(), x.options()) : empty_fp32(x, false, {});
  if (input_gradient) {
    linear::input_gradient(from, rows, used, grad_x.mutable_data_ptr<float>());
  }
  const at::Tensor grad_weight = weight_gradient && !main_grad ? at::zeros_like(weight) : empty_fp32(x, false, {});
  if (weight_gradient) {
    const at::Tensor& to = main_grad ? *main_grad : grad_weight;
    linear::weight_gradient(
        from, input.const_data_ptr<float>(), rows, linear::prefix(op, "main_grad", to, outputs, features));
  }
  const at::Tensor grad_bias = empty_fp32(x, bias_gradient, {outputs});
  if (bias_gradient) {
    float* sum = grad_bias.mutable_data_ptr<float>();
    std::fill_n(sum, outputs, 0.f);
    for (int64_t row = 0; row < rows; ++row) {
      std::transform(sum, sum + outputs, from + row * outputs, sum, std::plus<float>());
    }
  }
  return {grad_x, grad_weight, grad_bias};
}

} // namespace dspnet::CPU_CAPABILITY
