// conv_moments, pointwise: y = h W^T over the positions of all images as rows, and its gradient.
//
// Forward: rows are taken in blocks. A block's h = act(scale x + shift) * gate is formed once, into scratch that stays in
// cache, and multiplied by the packed weight; the epilogue stores y and sums it for the moments. Per row of K channels in
// and N out: 2 K N flops, (K + N) values read or written.
//
// Backward, in one pass: a block's e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt and h are formed once; then
// dW += e^T h, and dh = e W, whose epilogue goes on to dx and the sums for dscale, dshift and dgate. Per row 4 K N flops,
// 3 N + 2 K values (without dx: 2 N + K and half the flops).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_moments.h"
#include "gemm.h"
#include "moments.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {
namespace {

// Rows of all images, one after another, in blocks. Those of one view make a segment, and no block straddles two.
struct Blocks {
  struct Block {
    int64_t segment, begin, rows;
  };

  int64_t segments, segment_rows, rows, per_segment;

  // At most `limit` rows in a block, or kRowMultiple.
  Blocks(const ConvShape& shape, const Owed& owed, int64_t limit)
      : segments(std::max<int64_t>({shape.views, owed.rows, 1})),
        segment_rows(shape.images / segments * shape.positions()),
        rows(std::min(segment_rows, std::max<int64_t>(limit / kRowMultiple, 1) * kRowMultiple)),
        per_segment((segment_rows + rows - 1) / rows) {}

  int64_t count() const {
    return segments * per_segment;
  }
  Block at(int64_t b) const {
    const int64_t segment = b / per_segment, offset = b % per_segment * rows;
    return {segment, segment * segment_rows + offset, std::min(rows, segment_rows - offset)};
  }
};

// Rows of C floats as rows of whole vectors, filled up with zeros; without rows, one of `absent`.
std::vector<float> padded_rows(const float* from, int64_t rows, int64_t columns, float absent = 0) {
  const int64_t stride = round_up(columns, kVec);
  std::vector<float> padded(std::max<int64_t>(rows, 1) * stride, from ? 0.f : absent);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(from + r * columns, columns, padded.begin() + r * stride);
  }
  return padded;
}

// x and what it is owed.
template <typename scalar_t>
struct Input {
  const scalar_t* x;
  Owed owed;
  int64_t channels, stride, positions; // stride: of formed rows
  std::vector<float> scale, shift; // [max(rows, 1), stride]

  Input(const ConvShape& shape, const scalar_t* x, const Owed& owed)
      : x(x),
        owed(owed),
        channels(shape.channels),
        stride(round_up(channels, kVec)),
        positions(shape.positions()),
        scale(padded_rows(owed.scale, owed.rows, channels, 1)),
        shift(padded_rows(owed.shift, owed.rows, channels)) {}

  bool is_owed() const {
    return owed.scale || owed.act != Act::identity || owed.gate;
  }
  int64_t row(int64_t segment) const { // of scale and shift
    return owed.rows > 1 ? segment : 0;
  }

  // h of some rows of one segment.
  void form(int64_t segment, int64_t begin, int64_t rows, float* to) const {
    with_act(owed.act, [&](auto act) {
      if (!is_owed()) {
        form<Act::identity, false, false>(segment, begin, rows, to);
      } else if (owed.gate) {
        form<act, true, true>(segment, begin, rows, to);
      } else {
        form<act, true, false>(segment, begin, rows, to);
      }
    });
  }

  template <Act act, bool normalized, bool gated>
  void form(int64_t segment, int64_t begin, int64_t rows, float* to) const {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      form_group<act, normalized, gated, 4>(segment, begin + r, to + r * stride);
    }
    for (; r < rows; ++r) {
      form_group<act, normalized, gated, 1>(segment, begin + r, to + r * stride);
    }
  }

  template <Act act, bool normalized, bool gated, int R>
  void form_group(int64_t segment, int64_t begin, float* to) const {
    const float* scales = scale.data() + row(segment) * stride;
    const float* shifts = shift.data() + row(segment) * stride;
    const scalar_t* from = x + begin * channels;
    const float* gates[R];
    for (int r = 0; gated && r < R; ++r) {
      gates[r] = owed.gate + (begin + r) / positions * channels;
    }
    const auto vector = [&](int64_t c, auto... count) {
      const Vec a = Vec::loadu(scales + c), b = Vec::loadu(shifts + c);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        Vec h = load(from + r * channels + c, count...);
        if constexpr (normalized) {
          h = activate<act>(at::vec::fmadd(h, a, b));
        }
        if constexpr (gated) {
          h = h * load(gates[r] + c, count...);
        }
        h.store(to + r * stride + c);
      }
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

// The moments of some channels of y over one view, in double.
struct ViewMoments {
  double count = 0;
  std::vector<double> mean, squares;

  // Of a block of `rows` rows: sums of differences from a pivot and of their squares. As Moments::merge, all channels
  // at once.
  void merge(int64_t rows, int64_t channels, const float* pivot, const float* sum, const float* square) {
    mean.resize(channels);
    squares.resize(channels);
    const double block = static_cast<double>(rows), total = count + block;
    const double inverse = 1 / block, share = block / total, weight = count * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double shifted = sum[c] * inverse;
      const double delta = pivot[c] + shifted - mean[c];
      mean[c] += delta * share;
      squares[c] += square[c] - shifted * sum[c] + delta * delta * weight;
    }
    count = total;
  }

  // The mean so far, if there is one: the best pivot for what follows.
  bool to_pivot(int64_t channels, float* pivot) const {
    for (int64_t c = 0; count > 0 && c < channels; ++c) {
      pivot[c] = static_cast<float>(mean[c]);
    }
    return count > 0;
  }
};

// Stores y, and with a pivot sums it for the moments of the block.
template <typename scalar_t>
struct StoreOutput {
  scalar_t* y; // the block's first row
  int64_t channels;
  float* pivot = nullptr; // [padded channels] each, or null
  float* sum = nullptr;
  float* square = nullptr;
  bool has_pivot = false;

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[R][V]) const {
    scalar_t* to = y + row * channels + column;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t count = channels - column - v * kVec;
      if (v + 1 < V || count >= kVec) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          store(to + r * channels + v * kVec, sums[r][v]);
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          store(to + r * channels + v * kVec, sums[r][v], count);
        }
      }
    }
    if (pivot) {
      add_up(row, column, sums);
    }
  }

  // Sums of a tile first: adding every row to the block's sum would round it as often. Without a pivot yet, it is the
  // mean of the first tile: near the block's mean, whatever that is.
  template <int R, int V>
  DSPNET_INLINE void add_up(int64_t row, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t c = column + v * kVec;
      if (row == 0 && !has_pivot) {
        Vec near = sums[0][v];
#pragma GCC unroll 16
        for (int r = 1; r < R; ++r) {
          near = near + sums[r][v];
        }
        (near * Vec(1.f / R)).store(pivot + c);
      }
      const Vec near = Vec::loadu(pivot + c);
      Vec total = sums[0][v] - near, squares = total * total;
#pragma GCC unroll 16
      for (int r = 1; r < R; ++r) {
        const Vec difference = sums[r][v] - near;
        total = total + difference;
        squares = at::vec::fmadd(difference, difference, squares);
      }
      if (row > 0) {
        total = total + Vec::loadu(sum + c);
        squares = squares + Vec::loadu(square + c);
      }
      total.store(sum + c);
      squares.store(square + c);
    }
  }
};

constexpr int64_t kForwardBytes = 48 << 10; // of formed rows in a block
constexpr int64_t kForwardRows = 192; // whose fp32 sums are exact enough

struct PackedWeight;
struct FormedInput;
struct FormedOutput;
struct BlockSums;

// The columns of a matrix, element (k, column) = from[k * depth_stride + column * column_stride], packed in panels.
const float* pack(
    const Panels& panels, const float* from, int64_t depth_stride, int64_t column_stride, int64_t depth) {
  float* to = scratch<PackedWeight>(panels.padded() * depth);
  constexpr int64_t kGrain = 1 << 16; // floats: less is not worth waking a thread
  at::parallel_for(0, panels.count, kGrain / (depth * kVec * kPanelVectors) + 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      pack_panel(to + panels.offset(p, depth), panels, p, from, depth_stride, column_stride, depth);
    }
  });
  return to;
}

void finish_moments(
    const std::vector<ViewMoments>& parts, int64_t views, int64_t channels, float* mean, float* variance) {
  for (int64_t view = 0; view < views; ++view) {
    for (int64_t c = 0; c < channels; ++c) {
      Moments all;
      for (size_t part = view; part < parts.size(); part += views) {
        if (parts[part].count > 0) {
          all.merge({parts[part].count, parts[part].mean[c], parts[part].squares[c]});
        }
      }
      mean[view * channels + c] = static_cast<float>(all.mean);
      variance[view * channels + c] = static_cast<float>(all.variance());
    }
  }
}

} // namespace

template <typename scalar_t>
void pointwise_forward(const ConvShape& shape, const Forward<scalar_t>& args) {
  const int64_t channels = shape.channels, out_channels = shape.out_channels, views = shape.views;
  const Blocks blocks(shape, args.owed, std::min(kForwardRows, kForwardBytes / (channels * static_cast<int64_t>(sizeof(float)))));
  const Input<scalar_t> input(shape, args.x, args.owed);
  const Panels panels(out_channels);
  const float* weight = pack(panels, args.weight.data, args.weight.in, args.weight.out, channels);
  std::vector<ViewMoments> moments(at::get_num_threads() * views); // [thread, view]

  at::parallel_for(0, blocks.count(), 1, [&](int64_t first, int64_t last) {
    float* formed = scratch<FormedInput>(blocks.rows * input.stride);
    float* sums = scratch<BlockSums>(3 * panels.padded());
    std::fill_n(sums, panels.padded(), 0.f);
    for (int64_t b = first; b < last; ++b) {
      const auto [segment, begin, rows] = blocks.at(b);
      Rows h{formed, input.stride, channels};
      if (std::is_same_v<scalar_t, float> && !input.is_owed()) {
        h.data = reinterpret_cast<const float*>(args.x + begin * channels);
        h.stride = channels;
      } else {
        input.form(segment, begin, rows, formed);
      }
      StoreOutput<scalar_t> epilogue{args.y + begin * out_channels, out_channels};
      if (views == 0) {
        multiply(h, rows, weight, panels, 0, panels.count, epilogue);
        continue;
      }
      ViewMoments& view = moments[at::get_thread_num() * views + (views > 1 ? segment : 0)];
      epilogue.pivot = sums;
      epilogue.sum = sums + panels.padded();
      epilogue.square = sums + 2 * panels.padded();
      for (int64_t done = 0, some; done < rows; done += some) {
        epilogue.has_pivot = view.to_pivot(out_channels, sums);
        some = epilogue.has_pivot ? rows - done : std::min(rows, kRowMultiple); // few for a mean that is a good pivot
        epilogue.y = args.y + (begin + done) * out_channels;
        multiply(h.from(done), some, weight, panels, 0, panels.count, epilogue);
        view.merge(some, out_channels, epilogue.pivot, epilogue.sum, epilogue.square);
      }
    }
  });
  finish_moments(moments, views, out_channels, args.mean, args.variance);
}

template <typename scalar_t>
void pointwise_backward(const ConvShape&, const Backward<scalar_t>&) {
  TORCH_CHECK(false, "pointwise conv_moments is not there yet");
}

template void pointwise_forward(const ConvShape&, const Forward<float>&);
template void pointwise_forward(const ConvShape&, const Forward<at::BFloat16>&);
template void pointwise_backward(const ConvShape&, const Backward<float>&);
template void pointwise_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace CPU_CAPABILITY
} // namespace dspnet
