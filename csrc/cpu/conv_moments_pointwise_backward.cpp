// conv_moments, pointwise, backward, in one pass: e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt and h
// (pointwise.h) of a block are computed once. Then dW += e^T h and dh = e W, whose epilogue computes dx and the sums
// for dscale, dshift and dgate. Per row with K input and N output channels: 4 K N flops, 2 N + 2 K values read or
// written; without dx, or without dW, half the flops.
//
// Distributing columns of dW and dx over the threads instead would make the merge of the threads' dW unnecessary. It
// was slower on all maps from 12x12 to 3x3, since every panel then reads e and h from the outer caches.
#include <functional>
#include <type_traits>
#include <utility>

#include "pointwise.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace pointwise {
namespace {

constexpr int64_t kBackwardBytes = 96 << 10; // of e and h in a block
constexpr int64_t kBackwardRows = 480; // rows summed in fp32

struct PartialWeight;
struct PartialGate;
struct FormedOutput;
struct RowImages;

// dy and the factors that e is computed from.
template <typename scalar_t>
struct OutputGradient {
  const scalar_t* grad_y;
  const scalar_t* y;
  int64_t channels, stride, views; // stride: between rows of e in scratch
  std::vector<float> mean, constant, factor; // e = dy + constant + factor (y - mean), [views, stride]

  OutputGradient(const ConvShape& shape, const Backward<scalar_t>& args)
      : grad_y(args.grad_y),
        y(args.y),
        channels(shape.out_channels),
        stride(round_up(channels, kVec)),
        views(shape.views),
        mean(padded_rows(args.mean, views, channels)),
        constant(padded_rows(args.grad_mean, views, channels)),
        factor(padded_rows(args.grad_variance, views, channels)) {
    const float count = static_cast<float>(shape.images / std::max<int64_t>(views, 1) * shape.positions());
    for (size_t i = 0; i < constant.size(); ++i) {
      constant[i] /= count;
      factor[i] = 2 * factor[i] / count;
    }
  }

  // Computes e for rows of one segment, and prefetches as many rows after them.
  template <typename Layout>
  void form(int64_t segment, int64_t begin, int64_t rows, const Layout& to) const {
    for_row_groups(rows, [&](auto count, int64_t r) { form_group<count>(segment, begin + r, r, rows * channels, to); });
  }

  template <int R, typename Layout>
  void form_group(int64_t segment, int64_t begin, int64_t row, int64_t ahead, const Layout& to) const {
    const int64_t view = (views > 1 ? segment : 0) * stride;
    const auto vector = [&](int64_t c, auto... count) {
      const Vec a = Vec::loadu(constant.data() + view + c), b = Vec::loadu(factor.data() + view + c);
      const Vec center = Vec::loadu(mean.data() + view + c);
      Vec e[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const int64_t at = (begin + r) * channels + c;
        prefetch(grad_y + at + ahead);
        e[r] = load(grad_y + at, count...);
        if (views > 0) {
          prefetch(y + at + ahead);
          e[r] = e[r] + at::vec::fmadd(b, load(y + at, count...) - center, a);
        }
      }
      to.store(row, c, e);
    };
    int64_t c = 0;
    for (; c + kVec <= channels; c += kVec) {
      vector(c);
    }
    if (c < channels) {
      vector(c, channels - c);
    }
  }
};

DSPNET_INLINE void add_to(float* to, const Vec& value) {
  (Vec::loadu(to) + value).store(to);
}
DSPNET_INLINE void add_to(float* to, const Vec& value, int64_t count) {
  store(to, load(to, count) + value, count);
}

// Epilogue: computes dx from a block's dh, the block's sums of dz x and dz for dscale and dshift, and adds dh act(z) to
// dgate.
template <typename scalar_t, Act act, bool deferred>
struct StoreInputGradient {
  const scalar_t* x; // at the block's first row
  scalar_t* grad_x;
  int64_t channels;
  int64_t ahead; // prefetch distance, in elements of x
  const float* scale; // of the block's segment
  const float* shift;
  float* grad_scale; // sums of the block
  float* grad_shift;
  const float* gate; // [images, channels], or null
  float* grad_gate; // accumulated into
  const int32_t* image; // the image of each row in the block

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t c = column + v * kVec;
      Vec grad_h[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        grad_h[r] = sums[r][v];
      }
      with_lanes(v + 1 < V, channels - c, [&](auto... count) __attribute__((always_inline)) {
        finish(row, c, grad_h, count...);
      });
    }
  }

  template <int R, typename... Count>
  DSPNET_INLINE void finish(int64_t row, int64_t c, const Vec (&grad_h)[R], Count... count) const {
    scalar_t* to = grad_x + row * channels + c;
    if constexpr (!deferred) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        prefetch(to + r * channels + ahead);
        store(to + r * channels, grad_h[r], count...);
      }
    } else if (gate) {
      finish_deferred<true>(row, c, grad_h, count...);
    } else {
      finish_deferred<false>(row, c, grad_h, count...);
    }
  }

  template <bool gated, int R, typename... Count>
  DSPNET_INLINE void finish_deferred(int64_t row, int64_t c, const Vec (&grad_h)[R], Count... count) const {
    const scalar_t* from = x + row * channels + c;
    scalar_t* to = grad_x + row * channels + c;
    const Vec a = Vec::loadu(scale + c), b = Vec::loadu(shift + c);
    const bool one_image = gated && image[row] == image[row + R - 1];
    Vec scale_sum(0), shift_sum(0), gate_sum(0);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec value = load(from + r * channels, count...);
      const Vec z = at::vec::fmadd(value, a, b);
      Vec grad = grad_h[r];
      if constexpr (gated) {
        const int64_t at = image[row + r] * channels + c;
        const Vec part = grad * activate<act>(z);
        if (one_image) {
          gate_sum = gate_sum + part;
        } else {
          add_to(grad_gate + at, part, count...);
        }
        grad = grad * load(gate + at, count...);
      }
      grad = grad * activation_gradient<act>(z);
      prefetch(to + r * channels + ahead);
      store(to + r * channels, grad * a, count...);
      scale_sum = at::vec::fmadd(grad, value, scale_sum);
      shift_sum = shift_sum + grad;
    }
    if (one_image) {
      add_to(grad_gate + image[row] * channels + c, gate_sum, count...);
    }
    if (row > 0) {
      scale_sum = scale_sum + Vec::loadu(grad_scale + c);
      shift_sum = shift_sum + Vec::loadu(grad_shift + c);
    }
    scale_sum.store(grad_scale + c);
    shift_sum.store(grad_shift + c);
  }
};

template <typename Arithmetic, typename scalar_t>
struct BackwardPass {
  static constexpr bool kFp32 = std::is_same_v<Arithmetic, Fp32>;

  const ConvShape& shape;
  const Backward<scalar_t>& args;
  Input<scalar_t> input;
  OutputGradient<scalar_t> output;
  Blocks blocks;
  Panels in, out;
  bool h_in_columns; // the columns of the weight gradient are input channels, otherwise output channels
  const float* weight; // packed for dh = e W

  BackwardPass(const ConvShape& shape, const Backward<scalar_t>& args)
      : shape(shape),
        args(args),
        input(shape, args.x, args.deferred),
        output(shape, args),
        blocks(
            shape,
            args.deferred,
            std::min<int64_t>(
                kBackwardRows, kBackwardBytes / ((input.stride + output.stride) * sizeof(float)))),
        in(shape.channels),
        out(shape.out_channels),
        h_in_columns(in.waste() <= out.waste()),
        weight(
            args.grad_x ? pack<Arithmetic>(in, args.weight.data, args.weight.out, args.weight.in, shape.out_channels)
                        : nullptr) {}

  const Panels& weight_panels() const {
    return h_in_columns ? in : out;
  }
  // Rows of the weight gradient in the layout that h_in_columns selects.
  int64_t weight_height() const {
    return h_in_columns ? shape.out_channels : shape.channels;
  }

  // e or h of a block as an operand of multiply() and of multiply_outer(), if wanted.
  struct Operand {
    Rows rows;
    Matrix outer;
  };

  // Floats of scratch for an operand in which rows have this stride.
  int64_t scratch_floats(int64_t stride) const {
    return (blocks.rows + 1) * stride;
  }

  // Forms e or h in `to`.
  template <typename Formed>
  Operand form(const Formed& from, const Blocks::Block& block, bool for_rows, bool for_outer, float* to) const {
    const int64_t depth = Arithmetic::lanes(from.channels);
    if constexpr (kFp32) {
      from.form(block.segment, block.begin, block.rows, Fp32Rows{to, from.stride});
      return {{to, from.stride, depth}, {to, from.stride}};
    } else {
      float* adjacent_rows = to + (for_rows ? block.rows * from.stride / 2 : 0);
      const typename Arithmetic::Layout layout{
          for_rows ? to : nullptr, for_outer ? adjacent_rows : nullptr, from.stride};
      from.form(block.segment, block.begin, block.rows, layout);
      return {{to, from.stride / 2, depth}, {adjacent_rows, from.stride}};
    }
  }

  // e and h of a block: in `to`, or the tensors themselves if they are equal to e or h.
  Operand form_e(const Blocks::Block& block, bool for_outer, float* to) const {
    if constexpr (kFp32 && std::is_same_v<scalar_t, float>) {
      if (output.views == 0 && (h_in_columns || output.channels == output.stride)) {
        const float* e = args.grad_y + block.begin * output.channels;
        return {{e, output.channels, output.channels}, {e, output.channels}};
      }
    }
    return form(output, block, args.grad_x, for_outer, to);
  }
  Matrix form_h(const Blocks::Block& block, float* to) const {
    if constexpr (kFp32 && std::is_same_v<scalar_t, float>) {
      if (!input.is_deferred() && (!h_in_columns || input.channels == input.stride)) {
        input.prefetch_rows(block.begin + block.rows, block.rows);
        return {args.x + block.begin * input.channels, input.channels};
      }
    }
    return form(input, block, false, true, to).outer;
  }

  // Computes dx of a block, and its sums in `sums`, [2, input.stride], and `grad_gate`.
  void input_gradient(const Blocks::Block& block, const Rows& e, float* sums, float* grad_gate) const {
    int32_t* images = nullptr;
    if (args.deferred.gate) {
      images = reinterpret_cast<int32_t*>(scratch<RowImages>(block.rows));
      for (int64_t r = 0; r < block.rows; ++r) {
        images[r] = static_cast<int32_t>((block.begin + r) / input.positions);
      }
    }
    const auto run = [&](auto act, auto deferred) {
      const int64_t row = input.row(block.segment) * input.stride;
      const StoreInputGradient<scalar_t, act, deferred> epilogue{
          args.x + block.begin * input.channels, args.grad_x + block.begin * input.channels, input.channels,
          block.rows * input.channels, input.scale.data() + row, input.shift.data() + row, sums, sums + input.stride,
          args.deferred.gate, grad_gate, images};
      multiply<Arithmetic>(e, block.rows, weight, in, 0, in.count, epilogue);
    };
    if (input.is_deferred()) {
      with_act(args.deferred.act, [&](auto act) { run(act, std::true_type{}); });
    } else {
      run(std::integral_constant<Act, Act::identity>{}, std::false_type{});
    }
  }

  void weight_gradient(const Matrix& e, const Matrix& h, int64_t rows, const AddToMatrix& epilogue) const {
    const Panels& panels = weight_panels();
    const Matrix &values = h_in_columns ? e : h, &columns = h_in_columns ? h : e;
    multiply_outer<Arithmetic>(
        values, weight_height(), columns, panels, 0, panels.count, Arithmetic::lanes(rows), epilogue);
  }

  // Distributes blocks over the threads and merges their weight gradients and sums.
  void run() const {
    const int64_t threads = at::get_num_threads(), sum_rows = std::max<int64_t>(args.deferred.rows, 1);
    const int64_t weight_size = weight_height() * weight_panels().padded();
    const int64_t gate_size = shape.images * shape.channels;
    const bool has_gate = args.grad_x && args.deferred.gate;
    float* weights = args.grad_weight.data ? scratch<PartialWeight>(threads * weight_size) : nullptr;
    float* gates = has_gate && threads > 1 ? scratch<PartialGate>((threads - 1) * gate_size) : nullptr;
    std::vector<double> sums(args.grad_x ? threads * sum_rows * 2 * input.stride : 0);
    std::vector<char> used(threads, 0);

    at::parallel_for(0, blocks.count(), 1, [&](int64_t first, int64_t last) {
      const int64_t thread = at::get_thread_num();
      float* formed_e = scratch<FormedOutput>(scratch_floats(output.stride));
      float* formed_h = scratch<FormedInput>(scratch_floats(input.stride));
      float* block_sums = scratch<BlockSums>(2 * input.stride);
      float* gate = nullptr;
      if (has_gate) {
        gate = thread == 0 ? args.grad_gate : gates + (thread - 1) * gate_size;
        std::fill_n(gate, gate_size, 0.f);
      }
      used[thread] = 1;
      for (int64_t b = first; b < last; ++b) {
        const Blocks::Block block = blocks.at(b);
        const Operand e = form_e(block, weights, formed_e);
        if (weights) {
          const AddToMatrix epilogue{weights + thread * weight_size, weight_panels().padded(), b == first};
          weight_gradient(e.outer, form_h(block, formed_h), block.rows, epilogue);
        }
        if (args.grad_x) {
          input_gradient(block, e.rows, block_sums, gate);
          if (args.deferred.rows > 0) {
            double* to = sums.data() + (thread * sum_rows + input.row(block.segment)) * 2 * input.stride;
            std::transform(block_sums, block_sums + 2 * input.stride, to, to, std::plus<double>());
          }
        }
      }
    });

    if (weights) {
      merge_weights(weights, weight_size, used);
    }
    for (int64_t thread = 1; has_gate && thread < threads; ++thread) {
      const float* part = gates + (thread - 1) * gate_size;
      if (used[thread]) {
        std::transform(part, part + gate_size, args.grad_gate, args.grad_gate, std::plus<float>());
      }
    }
    for (int64_t row = 0; args.grad_x && row < args.deferred.rows; ++row) {
      for (int64_t thread = 1; thread < threads; ++thread) {
        const double* part = sums.data() + (thread * sum_rows + row) * 2 * input.stride;
        double* to = sums.data() + row * 2 * input.stride;
        std::transform(part, part + 2 * input.stride, to, to, std::plus<double>());
      }
      const double* scale_sums = sums.data() + row * 2 * input.stride;
      const double* shift_sums = scale_sums + input.stride;
      for (int64_t c = 0; c < shape.channels; ++c) {
        args.grad_scale[row * shape.channels + c] = static_cast<float>(scale_sums[c]);
        args.grad_shift[row * shape.channels + c] = static_cast<float>(shift_sums[c]);
      }
    }
  }

  void merge_weights(const float* weights, int64_t size, const std::vector<char>& used) const {
    const Prefix& gradient = args.grad_weight;
    const int64_t to_row = h_in_columns ? gradient.out : gradient.in;
    const int64_t to_column = h_in_columns ? gradient.in : gradient.out;
    const int64_t stride = weight_panels().padded(), columns = weight_panels().columns;
    constexpr int64_t kGrain = 1 << 15; // floats
    at::parallel_for(0, weight_height(), kGrain / stride + 1, [&](int64_t first, int64_t last) {
      float* sum = scratch<BlockSums>(stride);
      for (int64_t i = first; i < last; ++i) {
        std::copy_n(weights + i * stride, stride, sum);
        for (size_t thread = 1; thread < used.size(); ++thread) {
          const float* part = weights + thread * size + i * stride;
          if (used[thread]) {
            std::transform(part, part + stride, sum, sum, std::plus<float>());
          }
        }
        float* to = gradient.data + i * to_row;
        for (int64_t c = 0; c < columns; ++c) {
          to[c * to_column] += sum[c];
        }
      }
    });
  }
};

} // namespace
} // namespace pointwise

template <typename scalar_t>
void pointwise_backward(const ConvShape& shape, const Backward<scalar_t>& args) {
  with_arithmetic<scalar_t>([&]<typename Arithmetic>(Arithmetic) {
    pointwise::BackwardPass<Arithmetic, scalar_t>(shape, args).run();
  });
}

template void pointwise_backward(const ConvShape&, const Backward<float>&);
template void pointwise_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace dspnet::CPU_CAPABILITY
