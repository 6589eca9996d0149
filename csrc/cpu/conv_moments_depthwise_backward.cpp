// conv_moments, depthwise, backward, in one pass:
//
//   e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt        h = act(z) gate, z = scale x + shift, recomputed
//   dW[ky, kx] = sum(h[q] e[o])  and  dh[q] = sum(W[ky, kx] e[o])  over the pairs q = o stride + k, q padded positions
//   dz = dh gate act'(z)    dx = scale dz    dscale = sum(dz x)    dshift = sum(dz)    dgate = sum(dh act(z))
//
// It reads dy, y and x and writes dx, 8 bytes per pixel of x and of y in fp32, for 4 k^2 flops. Rows of x are processed
// in order. The rows of e that a row of x reaches are in a ring buffer, and every loaded e contributes to dW and to dh.
// With a stride, positions are split into phases by their remainder modulo the stride. In a phase, the taps form a
// convolution without a stride, so no products with zeros are computed.
#include "depthwise.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace depthwise {
namespace {

constexpr int64_t kAdds = 256; // additions of tile sums in fp32 before the sum is added to one in double
constexpr int64_t kGateAdds = 64; // fewer for the gate, whose sums are over one image: rounding errors average out less

struct BackwardSums {
  std::vector<double> scale, shift; // [rows][channels of the group]
  std::vector<double> weight; // [vector][tap][kVec]

  void merge(const BackwardSums& other) {
    const auto add = [](std::vector<double>& to, const std::vector<double>& from) {
      for (size_t i = 0; i < to.size(); ++i) {
        to[i] += from[i];
      }
    };
    add(scale, other.scale);
    add(shift, other.shift);
    add(weight, other.weight);
  }
};

// One row of x in one group: the inputs and outputs of the convolution.
struct InputRow {
  Channels channels;
  const float* const* e; // rows of e that this row of x reaches, at column 0
  int64_t rows;
  int64_t first_tap; // kernel row for e[0]; e[r] has first_tap + r stride
  int64_t kernel, stride;
  int64_t e_vector_stride, vector_stride, phase_stride; // of scratch
  const float* weight;
  float* grad_weight;
  const float* h; // padded rows
  float* grad_h;
};

// Computes dh at `tile` positions of one phase from `first` on, and their contribution to dW. taps: kernel columns in
// the phase; -1: any number.
template <int taps, int stride, int tile>
DSPNET_INLINE void input_tile(const InputRow& row, int64_t v, int64_t phase, int64_t first) {
  const int64_t at = v * row.vector_stride + phase * row.phase_stride + first * kVec;
  const int64_t step = (stride > 0 ? stride : row.stride) * kVec; // between taps of a phase
  std::array<Vec, tile> h, grad;
#pragma GCC unroll 8
  for (int t = 0; t < tile; ++t) {
    h[t] = Vec::loadu(row.h + at + t * kVec);
    grad[t] = Vec(0);
  }
  for (int64_t r = 0; r < row.rows; ++r) {
    const float* e = row.e[r] + v * row.e_vector_stride + first * kVec;
    const int64_t tap = ((v * row.kernel + row.first_tap + r * row.stride) * row.kernel + phase) * kVec;
    const float* weight = row.weight + tap;
    float* grad_weight = row.grad_weight + tap;
    if constexpr (taps >= 0) {
      std::array<Vec, taps> w, grad_w;
#pragma GCC unroll 8
      for (int m = 0; m < taps; ++m) {
        w[m] = Vec::loadu(weight + m * step);
        grad_w[m] = Vec(0);
      }
#pragma GCC unroll 16
      for (int j = 1 - taps; j < tile; ++j) {
        const Vec in = Vec::loadu(e + j * kVec);
#pragma GCC unroll 8
        for (int m = 0; m < taps; ++m) {
          if (const int t = j + m; t >= 0 && t < tile) {
            grad[t] = at::vec::fmadd(w[m], in, grad[t]);
            grad_w[m] = at::vec::fmadd(h[t], in, grad_w[m]);
          }
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < taps; ++m) {
        add_to(grad_weight + m * step, grad_w[m]);
      }
    } else {
      for (int64_t m = 0; phase + m * row.stride < row.kernel; ++m) {
        const Vec w = Vec::loadu(weight + m * step);
        Vec grad_w(0);
#pragma GCC unroll 8
        for (int t = 0; t < tile; ++t) {
          const Vec in = Vec::loadu(e + (t - m) * kVec);
          grad[t] = at::vec::fmadd(w, in, grad[t]);
          grad_w = at::vec::fmadd(h[t], in, grad_w);
        }
        add_to(grad_weight + m * step, grad_w);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tile; ++t) {
    grad[t].store(row.grad_h + at + t * kVec);
  }
}

// Computes `tiles` tiles of one phase of a row of x from `first` on.
template <int taps, int stride, int tile>
void input_tiles(const InputRow& shared, int64_t phase, int64_t first, int64_t tiles) {
  const InputRow row = shared; // a copy: see form_h_row
  for (int64_t v = 0; v < row.channels.vectors; ++v) {
    for (int64_t i = 0; i < tiles; ++i) {
      input_tile<taps, stride, tile>(row, v, phase, first + i * tile);
    }
  }
}

using InputKernel = void (*)(const InputRow&, int64_t phase, int64_t first, int64_t tiles);

InputKernel input_kernel(int64_t kernel, int64_t stride, int64_t phase, int64_t tile) {
  InputKernel chosen = nullptr;
  const int64_t taps = at::divup(std::max<int64_t>(kernel - phase, 0), stride);
  with_size(std::max<int64_t>(tile, 1), [&](auto size) {
    chosen = stride == 1 && taps == 3 ? input_tiles<3, 1, size>
        : stride == 1 && taps == 5    ? input_tiles<5, 1, size>
        : stride == 2 && taps == 1    ? input_tiles<1, 2, size>
        : stride == 2 && taps == 2    ? input_tiles<2, 2, size>
        : stride == 2 && taps == 3    ? input_tiles<3, 2, size>
                                      : input_tiles<-1, 0, size>;
  });
  return chosen;
}

// The positions of x in one phase of a padded row.
struct Phase {
  int64_t first; // first position
  Tiles tiles;
  InputKernel larger, smaller;
};

template <typename scalar_t>
struct BackwardCall {
  const ConvShape& shape;
  const Backward<scalar_t>& args;
  PaddedRow padded; // of h and dh
  int64_t ring; // rows of e
  int64_t e_before, e_columns; // zeros before column 0; columns of a row in the ring
  Groups groups;
  std::vector<Phase> phases;
  std::vector<int64_t> column, e_column; // offsets of the columns of x and y in scratch

  BackwardCall(const ConvShape& shape, const Backward<scalar_t>& args)
      : shape(shape),
        args(args),
        padded(shape.stride, shape.padding + shape.width),
        ring((shape.kernel - 1) / shape.stride + 1),
        e_before(ring - 1),
        e_columns(e_before + std::max(shape.out_width, padded.columns)),
        groups(shape.channels, shape.images, row_scratch(), weight_scratch()),
        column(shape.width),
        e_column(shape.out_width) {
    for (const auto i : c10::irange(shape.width)) {
      column[i] = padded.at(i + shape.padding);
    }
    for (const auto i : c10::irange(shape.out_width)) {
      e_column[i] = (e_before + i) * kVec;
    }
    for (const auto phase : c10::irange(shape.stride)) {
      const int64_t first = at::divup(std::max<int64_t>(shape.padding - phase, 0), shape.stride);
      const int64_t last = at::divup(std::max<int64_t>(shape.padding + shape.width - phase, 0), shape.stride);
      const Tiles tiles(last - first);
      phases.push_back(
          {first, tiles, input_kernel(shape.kernel, shape.stride, phase, tiles.size + 1),
           input_kernel(shape.kernel, shape.stride, phase, tiles.size)});
    }
  }

  int64_t taps_of(int64_t phase) const { // in one dimension
    return at::divup(std::max<int64_t>(shape.kernel - phase, 0), shape.stride);
  }

  int64_t taps() const {
    return shape.kernel * shape.kernel;
  }

  int64_t row_scratch() const { // floats per vector, for e, h and dh
    return ring * e_columns * kVec + 2 * padded.vector_stride();
  }

  int64_t weight_scratch() const { // floats per vector, for the weight and its gradient
    return 2 * taps() * kVec;
  }

  void finish(int64_t group, const BackwardSums& sums) const {
    const Channels channels(groups, group);
    const auto rows = [&](const std::vector<double>& from, float* to) {
      for (int64_t row = 0; row < args.deferred.rows; ++row) {
        const double* row_sums = from.data() + row * channels.vectors * kVec;
        std::copy_n(row_sums, channels.count, to + row * shape.channels + channels.first);
      }
    };
    if (args.grad_scale) {
      rows(sums.scale, args.grad_scale);
      rows(sums.shift, args.grad_shift);
    }
    if (args.grad_weight.data) {
      add_weight(channels, sums.weight);
    }
  }

  void add_weight(const Channels& channels, const std::vector<double>& sums) const {
    for (int64_t c = 0; c < channels.count; ++c) {
      const double* from = sums.data() + c / kVec * taps() * kVec + c % kVec;
      for (int64_t ky = 0; ky < shape.kernel; ++ky) {
        for (int64_t kx = 0; kx < shape.kernel; ++kx) {
          float& to = args.grad_weight.at(channels.first + c, 0, ky, kx);
          to = static_cast<float>(to + from[(ky * shape.kernel + kx) * kVec]);
        }
      }
    }
  }
};

template <typename scalar_t>
class BackwardWorker {
 public:
  using Sums = BackwardSums;

  explicit BackwardWorker(const BackwardCall<scalar_t>& call)
      : call_(call),
        shape_(call.shape),
        args_(call.args),
        size_(call.groups.size * kVec),
        scratch_(
            DeferredChannels::floats(call.groups.size) + 6 * size_ +
            call.groups.size * (call.row_scratch() + call.weight_scratch())),
        deferred_(scratch_, call.groups.size),
        mean_(scratch_.take(size_)),
        constant_(scratch_.take(size_)),
        factor_(scratch_.take(size_)),
        grad_scale_(scratch_.take(size_)),
        grad_shift_(scratch_.take(size_)),
        grad_gate_(scratch_.take(size_)),
        weight_(scratch_.take(size_ * call.taps())),
        grad_weight_(scratch_.take(size_ * call.taps())),
        h_(scratch_.take(call.groups.size * call.padded.vector_stride())),
        grad_h_(scratch_.take(call.groups.size * call.padded.vector_stride())),
        ring_(scratch_.take(call.ring * ring_row_floats())),
        gate_sums_(size_),
        e_(call.ring) {}

  void start(int64_t group) {
    channels_ = Channels(call_.groups, group);
    pack_weight(args_.weight, shape_.kernel, channels_, weight_);
    const int64_t rows = std::max<int64_t>(args_.deferred.rows, 1);
    sums_.scale.assign(rows * channels_.vectors * kVec, 0);
    sums_.shift.assign(rows * channels_.vectors * kVec, 0);
    sums_.weight.assign(channels_.vectors * kVec * call_.taps(), 0);
  }

  void image(int64_t n) {
    const int64_t row = args_.deferred.row(n, shape_.images);
    if (row != row_) {
      flush_sums();
      row_ = row;
    }
    deferred_.read(shape_, args_.deferred, channels_, n);
    if (shape_.views > 0) {
      read_moments(n / (shape_.images / shape_.views));
    }
    next_row_ = 0;
    for (int64_t iy = 0; iy < shape_.height; ++iy) {
      input_row(n, iy);
      const int64_t adds = at::divup(shape_.width, kTile);
      unflushed_ += adds;
      gate_unflushed_ += adds;
      if (unflushed_ >= kAdds) {
        flush_sums();
      } else if (args_.grad_gate && gate_unflushed_ >= kGateAdds) {
        flush_gate();
      }
    }
    if (args_.grad_gate) {
      flush_gate();
      std::copy_n(gate_sums_.data(), channels_.count, args_.grad_gate + n * shape_.channels + channels_.first);
      std::fill(gate_sums_.begin(), gate_sums_.end(), 0);
    }
  }

  Sums stop() {
    flush_sums();
    return std::move(sums_);
  }

 private:
  const BackwardCall<scalar_t>& call_;
  const ConvShape& shape_;
  const Backward<scalar_t>& args_;
  int64_t size_; // lanes of a group
  Scratch scratch_;
  DeferredChannels deferred_;
  float *mean_, *constant_, *factor_; // e = dy + constant + factor (y - mean)
  float *grad_scale_, *grad_shift_, *grad_gate_;
  float *weight_, *grad_weight_;
  float *h_, *grad_h_;
  float* ring_;
  std::vector<double> gate_sums_; // over an image
  std::vector<const float*> e_;
  Channels channels_;
  Sums sums_;
  int64_t row_ = 0; // row of scale and shift of the unflushed sums
  int64_t unflushed_ = 0, gate_unflushed_ = 0; // additions to the fp32 sums
  int64_t next_row_ = 0; // next row of e to compute

  int64_t ring_row_floats() const {
    return call_.groups.size * call_.e_columns * kVec;
  }

  float* ring_row(int64_t oy) {
    return ring_ + oy % call_.ring * ring_row_floats();
  }

  void flush_sums() {
    if (unflushed_ == 0) {
      return;
    }
    const int64_t lanes = channels_.vectors * kVec;
    flush(grad_scale_, lanes, sums_.scale.data() + row_ * lanes);
    flush(grad_shift_, lanes, sums_.shift.data() + row_ * lanes);
    flush(grad_weight_, lanes * call_.taps(), sums_.weight.data());
    flush_gate();
    unflushed_ = 0;
  }

  void flush_gate() {
    flush(grad_gate_, channels_.vectors * kVec, gate_sums_.data());
    gate_unflushed_ = 0;
  }

  void read_moments(int64_t view) {
    const int64_t at = view * shape_.channels + channels_.first;
    const float part = 1.f / static_cast<float>(shape_.images / shape_.views * shape_.positions());
    for (int64_t c = 0; c < channels_.count; ++c) {
      mean_[c] = args_.mean[at + c];
      constant_[c] = args_.grad_mean[at + c] * part;
      factor_[c] = 2 * args_.grad_variance[at + c] * part;
    }
    for (float* values : {mean_, constant_, factor_}) {
      std::fill(values + channels_.count, values + size_, 0.f);
    }
  }

  void input_row(int64_t n, int64_t iy) {
    const int64_t q = iy + shape_.padding, nearest = q / shape_.stride;
    const int64_t last = std::min(nearest, shape_.out_height - 1);
    const int64_t first = std::max<int64_t>(nearest + 1 - call_.taps_of(q % shape_.stride), 0);
    next_row_ = std::max(next_row_, first);
    for (; next_row_ <= last; ++next_row_) {
      form_e_row(n, next_row_);
    }
    for (int64_t oy = last; oy >= first; --oy) {
      e_[last - oy] = ring_row(oy) + call_.e_before * kVec;
    }
    const int64_t at = (n * shape_.height + iy) * shape_.width * shape_.channels + channels_.first;
    const InputRow row{
        channels_, e_.data(), std::max<int64_t>(last - first + 1, 0), q - last * shape_.stride, shape_.kernel,
        shape_.stride, call_.e_columns * kVec, call_.padded.vector_stride(), call_.padded.phase_stride(), weight_,
        grad_weight_, h_, grad_h_};
    with_act(args_.deferred.act, [&](auto act) {
      form_h_row<act>(
          args_.x + at, shape_.channels, shape_.width, channels_, deferred_, call_.column.data(),
          call_.padded.vector_stride(), h_, shape_.width * shape_.channels);
      convolve_row(row);
      if (args_.grad_x) {
        finish_row<act>(args_.x + at, args_.grad_x + at);
      }
    });
  }

  void convolve_row(const InputRow& row) const {
    for (const auto i : c10::irange(shape_.stride)) {
      const Phase& phase = call_.phases[i];
      if (phase.tiles.larger > 0) {
        phase.larger(row, i, phase.first, phase.tiles.larger);
      }
      if (phase.tiles.smaller > 0) {
        phase.smaller(row, i, phase.first + phase.tiles.larger * (phase.tiles.size + 1), phase.tiles.smaller);
      }
    }
  }

  void form_e_row(int64_t n, int64_t oy) {
    const int64_t at = (n * shape_.out_height + oy) * shape_.out_width * shape_.channels + channels_.first;
    if (shape_.views > 0) {
      form_e_row<true>(args_.grad_y + at, args_.y + at, ring_row(oy));
    } else {
      form_e_row<false>(args_.grad_y + at, args_.y + at, ring_row(oy));
    }
  }

  template <bool moments>
  void form_e_row(const scalar_t* grad_y, const scalar_t* y, float* e) const {
    const Channels channels = channels_;
    const float *means = mean_, *constants = constant_, *factors = factor_;
    const int64_t pixel = shape_.channels, ahead = shape_.out_width * pixel, vector_stride = call_.e_columns * kVec;
    e += call_.e_before * kVec;
    for_pixels(shape_.out_width, [&](auto pixels, int64_t first) __attribute__((always_inline)) {
      constexpr int count = pixels;
      for_vectors(channels, [&](int64_t v, auto lanes) __attribute__((always_inline)) {
        const Vec mean = Vec::loadu(means + v * kVec), constant = Vec::loadu(constants + v * kVec);
        const Vec factor = Vec::loadu(factors + v * kVec);
        const scalar_t *from_grad = grad_y + first * pixel + v * kVec, *from = y + first * pixel + v * kVec;
        float* to = e + v * vector_stride + first * kVec;
#pragma GCC unroll 4
        for (int p = 0; p < count; ++p) {
          prefetch(from_grad + ahead);
          Vec value = load_lanes(from_grad, lanes);
          if constexpr (moments) {
            prefetch(from + ahead);
            value = at::vec::fmadd(load_lanes(from, lanes) - mean, factor, value + constant);
          }
          value.store(to + p * kVec);
          from_grad += pixel;
          from += pixel;
        }
      });
    });
  }

  // Computes dx from dh for a row, and adds up the sums for dscale, dshift and dgate.
  template <Act act>
  void finish_row(const scalar_t* x, scalar_t* grad_x) const {
    const Channels channels = channels_;
    const DeferredChannels deferred = deferred_;
    float *grad_scales = grad_scale_, *grad_shifts = grad_shift_, *grad_gates = grad_gate_;
    const float* grad_h = grad_h_;
    const int64_t* column = call_.column.data();
    const int64_t pixel = shape_.channels, ahead = shape_.width * pixel, vector_stride = call_.padded.vector_stride();
    for_pixels(shape_.width, [&](auto pixels, int64_t first) __attribute__((always_inline)) {
      constexpr int count = pixels;
      std::array<const float*, count> from;
      for (int p = 0; p < count; ++p) {
        from[p] = grad_h + column[first + p];
      }
      for_vectors(channels, [&](int64_t v, auto lanes) __attribute__((always_inline)) {
        const Vec scale = Vec::loadu(deferred.scale + v * kVec), shift = Vec::loadu(deferred.shift + v * kVec);
        const Vec gate = Vec::loadu(deferred.gate + v * kVec);
        Vec grad_scale(0), grad_shift(0), grad_gate(0);
#pragma GCC unroll 4
        for (int p = 0; p < count; ++p) {
          const int64_t at = (first + p) * pixel + v * kVec;
          prefetch(grad_x + at + ahead);
          const Vec raw = load_lanes(x + at, lanes), grad = Vec::loadu(from[p] + v * vector_stride);
          const Vec z = at::vec::fmadd(raw, scale, shift);
          grad_gate = at::vec::fmadd(grad, activate<act>(z), grad_gate);
          const Vec grad_z = grad * gate * activation_gradient<act>(z);
          grad_scale = at::vec::fmadd(grad_z, raw, grad_scale);
          grad_shift = grad_shift + grad_z;
          store_lanes(grad_x + at, grad_z * scale, lanes);
        }
        add_to(grad_scales + v * kVec, grad_scale);
        add_to(grad_shifts + v * kVec, grad_shift);
        add_to(grad_gates + v * kVec, grad_gate);
      });
    });
  }
};

} // namespace
} // namespace depthwise

template <typename scalar_t>
void depthwise_backward(const ConvShape& shape, const Backward<scalar_t>& args) {
  const depthwise::BackwardCall<scalar_t> call(shape, args);
  depthwise::run_groups<depthwise::BackwardWorker<scalar_t>>(
      call, call.groups, shape.images, shape.height * shape.width * call.groups.size * kVec);
}

template void depthwise_backward(const ConvShape&, const Backward<float>&);
template void depthwise_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace dspnet::CPU_CAPABILITY
