// conv_moments, depthwise, forward: y = depthwise(act(scale x + shift) * gate) and its moments.
//
// Bound by memory for kernels of 3 and 5: it reads x and writes y once, 8 bytes per pixel in fp32, for 2 k^2 flops. A
// row of h is computed once, into a ring buffer of k rows that stays in the cache. Rows above and below the image are
// skipped; columns beside it are zeros in scratch.
#include "depthwise.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace depthwise {
namespace {

constexpr int64_t kRows = 16; // rows summed in fp32 before their sum is added to one in double

// Sums of y - pivot of one view. The pivot is near the mean: rounding errors grow with the square of their distance.
struct ShiftedSums {
  double count = 0;
  std::vector<float> pivot;
  std::vector<double> sum, square;

  void merge(const ShiftedSums& other) {
    if (count == 0) {
      *this = other;
      return;
    }
    for (size_t i = 0; i < pivot.size() && other.count > 0; ++i) {
      const double delta = static_cast<double>(other.pivot[i]) - pivot[i];
      sum[i] += other.sum[i] + other.count * delta;
      square[i] += other.square[i] + delta * (2 * other.sum[i] + other.count * delta);
    }
    count += other.count;
  }

  void move_pivot_to_mean() {
    for (size_t i = 0; i < pivot.size(); ++i) {
      const float mean = static_cast<float>(pivot[i] + sum[i] / count);
      const double delta = static_cast<double>(pivot[i]) - mean;
      square[i] += delta * (2 * sum[i] + count * delta);
      sum[i] += count * delta;
      pivot[i] = mean;
    }
  }
};

struct ForwardSums {
  std::vector<ShiftedSums> views;

  void merge(const ForwardSums& other) {
    for (size_t view = 0; view < views.size(); ++view) {
      views[view].merge(other.views[view]);
    }
  }
};

// One row of y in one group.
template <typename scalar_t>
struct OutputRow {
  Channels channels;
  const float* const* rows; // of h, by kernel row
  int64_t first_tap, last_tap; // kernel rows inside the image
  int64_t kernel, stride;
  int64_t vector_stride, phase_stride; // of h in scratch
  const float* weight;
  scalar_t* y;
  int64_t pixel; // stride between pixels of y
  float *pivot, *sum, *square;
  bool choose_pivot;
  int64_t ahead; // prefetch distance, in elements of y
};

// Adds the taps of one phase in one kernel row to sums[t].
template <int kernel, int stride, int tile, int phase>
DSPNET_INLINE void add_phase(std::array<Vec, tile>& sums, const float* h, const float* weight) {
  constexpr int taps = (kernel - phase + stride - 1) / stride;
  Vec w[taps];
#pragma GCC unroll 8
  for (int m = 0; m < taps; ++m) {
    w[m] = Vec::loadu(weight + (phase + m * stride) * kVec);
  }
#pragma GCC unroll 16
  for (int j = 0; j < tile + taps - 1; ++j) {
    const Vec in = Vec::loadu(h + j * kVec);
#pragma GCC unroll 8
    for (int m = 0; m < taps; ++m) {
      if (const int t = j - m; t >= 0 && t < tile) {
        sums[t] = at::vec::fmadd(w[m], in, sums[t]);
      }
    }
  }
}

// The convolution at `tile` outputs from column `first` on. kernel = 0: any kernel and stride.
template <int kernel, int stride, int tile, typename scalar_t>
DSPNET_INLINE std::array<Vec, tile> convolve(const OutputRow<scalar_t>& row, int64_t v, int64_t first) {
  std::array<Vec, tile> sums;
  sums.fill(Vec(0));
  const int64_t size = kernel > 0 ? kernel : row.kernel;
  for (int64_t ky = row.first_tap; ky < row.last_tap; ++ky) {
    const float* h = row.rows[ky] + v * row.vector_stride + first * kVec;
    const float* weight = row.weight + (v * size + ky) * size * kVec;
    if constexpr (kernel > 0) {
      add_phase<kernel, stride, tile, 0>(sums, h, weight);
      if constexpr (stride == 2) {
        add_phase<kernel, stride, tile, 1>(sums, h + row.phase_stride, weight);
      }
    } else {
      for (int64_t kx = 0; kx < size; ++kx) {
        const Vec w = Vec::loadu(weight + kx * kVec);
        const float* from = h + kx % row.stride * row.phase_stride + kx / row.stride * kVec;
#pragma GCC unroll 8
        for (int t = 0; t < tile; ++t) {
          sums[t] = at::vec::fmadd(w, Vec::loadu(from + t * kVec), sums[t]);
        }
      }
    }
  }
  return sums;
}

template <size_t count>
DSPNET_INLINE Vec mean_of(const std::array<Vec, count>& values) {
  Vec sum = values[0];
#pragma GCC unroll 8
  for (size_t i = 1; i < count; ++i) {
    sum = sum + values[i];
  }
  return sum * Vec(1.f / count);
}

// Computes `tiles` tiles of a row of y from column `first` on, with their moments.
template <int kernel, int stride, int tile, typename scalar_t>
void output_tiles(const OutputRow<scalar_t>& shared, int64_t first, int64_t tiles) {
  const OutputRow<scalar_t> row = shared; // a copy: see form_h_row
  for_vectors(row.channels, [&](int64_t v, auto lanes) __attribute__((always_inline)) {
    Vec sum[2] = {Vec(0), Vec(0)}, square[2] = {Vec(0), Vec(0)};
    for (int64_t column = first; column < first + tiles * tile; column += tile) {
      const std::array<Vec, tile> out = convolve<kernel, stride, tile>(row, v, column);
      if (row.choose_pivot && column == 0) {
        mean_of(out).store(row.pivot + v * kVec);
      }
      const Vec pivot = Vec::loadu(row.pivot + v * kVec);
      scalar_t* y = row.y + column * row.pixel + v * kVec;
#pragma GCC unroll 8
      for (int t = 0; t < tile; ++t) {
        prefetch(y + t * row.pixel + row.ahead);
        const Vec value = store_lanes(y + t * row.pixel, out[t], lanes);
        const Vec difference = value - pivot;
        sum[t % 2] = sum[t % 2] + difference;
        square[t % 2] = at::vec::fmadd(difference, difference, square[t % 2]);
      }
    }
    add_to(row.sum + v * kVec, sum[0] + sum[1]);
    add_to(row.square + v * kVec, square[0] + square[1]);
  });
}

template <typename scalar_t>
using OutputKernel = void (*)(const OutputRow<scalar_t>&, int64_t first, int64_t tiles);

template <typename scalar_t>
OutputKernel<scalar_t> output_kernel(int64_t kernel, int64_t stride, int64_t tile) {
  OutputKernel<scalar_t> chosen = nullptr;
  with_size(std::max<int64_t>(tile, 1), [&](auto size) {
    chosen = kernel == 3 && stride == 1 ? output_tiles<3, 1, size, scalar_t>
        : kernel == 3 && stride == 2    ? output_tiles<3, 2, size, scalar_t>
        : kernel == 5 && stride == 1    ? output_tiles<5, 1, size, scalar_t>
        : kernel == 5 && stride == 2    ? output_tiles<5, 2, size, scalar_t>
                                        : output_tiles<0, 0, size, scalar_t>;
  });
  return chosen;
}

// The state shared by all threads.
template <typename scalar_t>
struct ForwardCall {
  const ConvShape& shape;
  const Forward<scalar_t>& args;
  PaddedRow padded;
  int64_t width; // columns of x that reach an output
  int64_t ring; // rows
  Groups groups;
  Tiles tiles;
  std::vector<int64_t> column; // of x, in the padded row
  OutputKernel<scalar_t> larger, smaller;

  ForwardCall(const ConvShape& shape, const Forward<scalar_t>& args)
      : shape(shape),
        args(args),
        padded(shape.stride, (shape.out_width - 1) * shape.stride + shape.kernel),
        width(std::clamp<int64_t>(
            (shape.out_width - 1) * shape.stride + shape.kernel - shape.padding, 0, shape.width)),
        ring(std::min(shape.kernel, shape.height)),
        groups(
            shape.channels, shape.images, ring * padded.vector_stride(), shape.kernel * shape.kernel * kVec),
        tiles(shape.out_width),
        column(width),
        larger(output_kernel<scalar_t>(shape.kernel, shape.stride, tiles.size + 1)),
        smaller(output_kernel<scalar_t>(shape.kernel, shape.stride, tiles.size)) {
    for (const auto i : c10::irange(width)) {
      column[i] = padded.at(i + shape.padding);
    }
  }

  void finish(int64_t group, const ForwardSums& sums) const {
    const Channels channels(groups, group);
    for (const auto view : c10::irange(shape.views)) {
      const ShiftedSums& view_sums = sums.views[view];
      const double part = 1 / view_sums.count;
      float* mean = args.mean + view * shape.channels + channels.first;
      float* variance = args.variance + view * shape.channels + channels.first;
      for (const auto c : c10::irange(channels.count)) {
        const double shifted = view_sums.sum[c] * part;
        mean[c] = static_cast<float>(view_sums.pivot[c] + shifted);
        variance[c] = static_cast<float>(std::max(0., view_sums.square[c] * part - shifted * shifted));
      }
    }
  }
};

template <typename scalar_t>
class ForwardWorker {
 public:
  using Sums = ForwardSums;

  explicit ForwardWorker(const ForwardCall<scalar_t>& call)
      : call_(call),
        shape_(call.shape),
        scratch_(floats(call)),
        deferred_(scratch_, call.groups.size),
        weight_(scratch_.take(call.groups.size * taps() * kVec)),
        pivot_(scratch_.take(call.groups.size * kVec)),
        sum_(scratch_.take(2 * call.groups.size * kVec)),
        square_(sum_ + call.groups.size * kVec),
        ring_(scratch_.take(call.ring * row_floats())),
        rows_(shape_.kernel) {}

  void start(int64_t group) {
    channels_ = Channels(call_.groups, group);
    pack_weight(call_.args.weight, shape_.kernel, channels_, weight_);
    sums_.views.assign(std::max<int64_t>(shape_.views, 1), {});
    view_ = -1;
  }

  void image(int64_t n) {
    const int64_t view = shape_.views > 0 ? n / (shape_.images / shape_.views) : 0;
    if (view != view_) {
      start_view(view);
    }
    deferred_.read(shape_, call_.args.deferred, channels_, n);
    next_row_ = 0;
    for (int64_t oy = 0; oy < shape_.out_height; ++oy) {
      output_row(n, oy);
      if (++unflushed_ == kRows) {
        flush_sums();
      }
    }
  }

  Sums stop() {
    flush_sums();
    return std::move(sums_);
  }

 private:
  const ForwardCall<scalar_t>& call_;
  const ConvShape& shape_;
  Scratch scratch_;
  DeferredChannels deferred_;
  float *weight_, *pivot_, *sum_, *square_, *ring_;
  std::vector<const float*> rows_;
  Channels channels_;
  Sums sums_;
  int64_t view_ = -1; // view of the unflushed sums
  int64_t unflushed_ = 0; // rows in the fp32 sums
  int64_t next_row_ = 0; // next row of h to compute

  int64_t taps() const {
    return shape_.kernel * shape_.kernel;
  }

  int64_t row_floats() const {
    return call_.groups.size * call_.padded.vector_stride();
  }

  static int64_t floats(const ForwardCall<scalar_t>& call) {
    const int64_t vector_floats =
        (call.shape.kernel * call.shape.kernel + 3) * kVec + call.ring * call.padded.vector_stride();
    return DeferredChannels::floats(call.groups.size) + call.groups.size * vector_floats;
  }

  // Starts the sums of a view. The mean of its first outputs is the first pivot; flush_sums moves it to the mean of
  // more.
  void start_view(int64_t view) {
    flush_sums();
    view_ = view;
    ShiftedSums& sums = sums_.views[view];
    sums.pivot.resize(channels_.vectors * kVec);
    sums.sum.resize(channels_.vectors * kVec);
    sums.square.resize(channels_.vectors * kVec);
  }

  void flush_sums() {
    if (unflushed_ == 0) {
      return;
    }
    ShiftedSums& sums = sums_.views[view_];
    const bool first = sums.count == 0;
    flush(sum_, sums.sum.size(), sums.sum.data());
    flush(square_, sums.square.size(), sums.square.data());
    sums.count += static_cast<double>(std::exchange(unflushed_, 0) * shape_.out_width);
    if (first) {
      std::copy_n(pivot_, sums.pivot.size(), sums.pivot.begin());
      sums.move_pivot_to_mean();
      std::copy_n(sums.pivot.begin(), sums.pivot.size(), pivot_);
    }
  }

  void output_row(int64_t n, int64_t oy) {
    const int64_t top = oy * shape_.stride - shape_.padding;
    const int64_t first_tap = std::clamp<int64_t>(-top, 0, shape_.kernel);
    const int64_t last_tap = std::clamp<int64_t>(shape_.height - top, first_tap, shape_.kernel);
    for (int64_t ky = first_tap; ky < last_tap; ++ky) {
      rows_[ky] = ring_ + (top + ky) % call_.ring * row_floats();
    }
    next_row_ = std::max(next_row_, top + first_tap);
    for (; next_row_ < top + last_tap; ++next_row_) {
      materialize_row(n, next_row_);
    }
    const bool choose_pivot = oy == 0 && unflushed_ == 0 && sums_.views[view_].count == 0;
    const OutputRow<scalar_t> row{
        channels_, rows_.data(), first_tap, last_tap, shape_.kernel, shape_.stride, call_.padded.vector_stride(),
        call_.padded.phase_stride(), weight_,
        call_.args.y + (n * shape_.out_height + oy) * shape_.out_width * shape_.channels + channels_.first,
        shape_.channels, pivot_, sum_, square_, choose_pivot, shape_.out_width * shape_.channels};
    if (call_.tiles.larger > 0) {
      call_.larger(row, 0, call_.tiles.larger);
    }
    call_.smaller(row, call_.tiles.larger * (call_.tiles.size + 1), call_.tiles.smaller);
  }

  void materialize_row(int64_t n, int64_t iy) {
    const scalar_t* x = call_.args.x + (n * shape_.height + iy) * shape_.width * shape_.channels + channels_.first;
    float* h = ring_ + iy % call_.ring * row_floats();
    with_act(call_.args.deferred.act, [&](auto act) {
      form_h_row<act>(
          x, shape_.channels, call_.width, channels_, deferred_, call_.column.data(), call_.padded.vector_stride(), h,
          shape_.width * shape_.channels);
    });
  }
};

} // namespace
} // namespace depthwise

template <typename scalar_t>
void depthwise_forward(const ConvShape& shape, const Forward<scalar_t>& args) {
  const depthwise::ForwardCall<scalar_t> call(shape, args);
  depthwise::run_groups<depthwise::ForwardWorker<scalar_t>>(
      call, call.groups, shape.images, shape.height * shape.width * call.groups.size * kVec);
}

template void depthwise_forward(const ConvShape&, const Forward<float>&);
template void depthwise_forward(const ConvShape&, const Forward<at::BFloat16>&);

} // namespace dspnet::CPU_CAPABILITY
