// Shared by the forward and the backward of the pointwise conv_moments: blocks of rows, the formation of h for a block,
// and the packing of the weight.
//
// Rows are the positions of all images. They are processed in blocks: a block's h = act(scale x + shift) * gate is
// computed once, into scratch that stays in the cache. Products of bfloat16 activations are BFloat16Pairs where the
// processor has the instruction, and otherwise Fp32.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "bfloat16_pairs.h"
#include "conv_moments.h"
#include "gemm.h"

namespace dspnet::inline CPU_CAPABILITY::pointwise {

struct PackedWeight;
struct FormedInput;
struct BlockSums;

// Splits the rows of all images into blocks. A segment is the rows of one view, or of one row of scale and shift; no
// block contains rows of two segments.
struct Blocks {
  struct Block {
    int64_t segment, begin, rows;
  };

  int64_t segments, segment_rows, rows, per_segment;

  // limit: rows in a block at most; rounded to a multiple of kRowMultiple, at least one.
  Blocks(const ConvShape& shape, const Deferred& deferred, int64_t limit)
      : segments(std::max<int64_t>({shape.views, deferred.rows, 1})),
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

// Calls run(std::integral_constant<int, n>, first row) for groups of n rows; every group begins at an even row.
template <typename Run>
DSPNET_INLINE void for_row_groups(int64_t rows, const Run& run) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    run(std::integral_constant<int, 4>{}, r);
  }
  if (r + 2 <= rows) {
    run(std::integral_constant<int, 2>{}, r);
    r += 2;
  }
  if (r < rows) {
    run(std::integral_constant<int, 1>{}, r);
  }
}

// Copies rows of C floats to rows of whole vectors, padded with zeros. Without rows: one row of `fill`.
inline std::vector<float> padded_rows(const float* from, int64_t rows, int64_t columns, float fill = 0) {
  const int64_t stride = round_up(columns, kVec);
  std::vector<float> padded(std::max<int64_t>(rows, 1) * stride, from ? 0.f : fill);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(from + r * columns, columns, padded.begin() + r * stride);
  }
  return padded;
}

// x and its deferred normalisation.
template <typename scalar_t>
struct Input {
  const scalar_t* x;
  Deferred deferred;
  int64_t channels, stride, positions; // stride: between rows of h in scratch
  std::vector<float> scale, shift; // [max(rows, 1), stride]

  Input(const ConvShape& shape, const scalar_t* x, const Deferred& deferred)
      : x(x),
        deferred(deferred),
        channels(shape.channels),
        stride(round_up(channels, kVec)),
        positions(shape.positions()),
        scale(padded_rows(deferred.scale, deferred.rows, channels, 1)),
        shift(padded_rows(deferred.shift, deferred.rows, channels)) {}

  bool is_deferred() const {
    return deferred.scale || deferred.act != Act::identity || deferred.gate;
  }
  int64_t row(int64_t segment) const { // of scale and shift
    return deferred.rows > 1 ? segment : 0;
  }

  // Prefetches rows that are multiplied as they are.
  void prefetch_rows(int64_t begin, int64_t rows) const {
    constexpr int64_t line = 64 / sizeof(scalar_t);
    for (int64_t i = begin * channels; i < (begin + rows) * channels; i += line) {
      prefetch(x + i);
    }
  }

  // Computes h for rows of one segment, and prefetches as many rows after them.
  template <typename Layout>
  void form(int64_t segment, int64_t begin, int64_t rows, const Layout& to) const {
    with_act(deferred.act, [&](auto act) {
      if (!is_deferred()) {
        form<Act::identity, false, false>(segment, begin, rows, to);
      } else if (deferred.gate) {
        form<act, true, true>(segment, begin, rows, to);
      } else {
        form<act, true, false>(segment, begin, rows, to);
      }
    });
  }

  template <Act act, bool normalized, bool gated, typename Layout>
  void form(int64_t segment, int64_t begin, int64_t rows, const Layout& to) const {
    for_row_groups(rows, [&](auto count, int64_t r) {
      form_group<act, normalized, gated, count>(segment, begin + r, r, rows * channels, to);
    });
  }

  template <Act act, bool normalized, bool gated, int R, typename Layout>
  void form_group(int64_t segment, int64_t begin, int64_t row, int64_t ahead, const Layout& to) const {
    const float* scales = scale.data() + this->row(segment) * stride;
    const float* shifts = shift.data() + this->row(segment) * stride;
    const scalar_t* from = x + begin * channels;
    const float* gates[R];
    for (int r = 0; gated && r < R; ++r) {
      gates[r] = deferred.gate + (begin + r) / positions * channels;
    }
    const auto vector = [&](int64_t c, auto... count) {
      const Vec a = Vec::loadu(scales + c), b = Vec::loadu(shifts + c);
      Vec h[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        prefetch(from + r * channels + c + ahead);
        h[r] = load(from + r * channels + c, count...);
        if constexpr (normalized) {
          h[r] = activate<act>(at::vec::fmadd(h[r], a, b));
        }
        if constexpr (gated) {
          h[r] = h[r] * load(gates[r] + c, count...);
        }
      }
      to.store(row, c, h);
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

// Packs a matrix into panels; element (k, column) = from[k * depth_stride + column * column_stride].
template <typename Arithmetic>
const float* pack(
    const Panels& panels, const float* from, int64_t depth_stride, int64_t column_stride, int64_t depth) {
  const int64_t lanes = Arithmetic::lanes(depth);
  float* to = scratch<PackedWeight>(panels.padded() * lanes);
  constexpr int64_t kGrain = 1 << 16; // floats per thread at least
  at::parallel_for(0, panels.count, kGrain / (depth * kVec * kPanelVectors) + 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      Arithmetic::pack(to + panels.offset(p, lanes), panels, p, from, depth_stride, column_stride, depth);
    }
  });
  return to;
}

} // namespace dspnet::CPU_CAPABILITY::pointwise
