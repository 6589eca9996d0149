// Packs the weights of dense convolutions for products over taps.
//
// The taps of a contiguous weight [O, I, k, k] follow each other, so all of them are packed together: one tap after
// another would read every cache line of the weight k k times.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "bfloat16_pairs.h"
#include "conv_moments.h"
#include "gemm.h"

namespace dspnet::inline CPU_CAPABILITY::dense {

constexpr int64_t kSide = 16; // rows and columns of blocks that are transposed

struct PackedWeight;
struct UnpackedTaps;

// Calls run(index) in parallel for all indices in [0, count).
template <typename Run>
void in_parallel(int64_t count, int64_t floats_each, const Run& run) {
  constexpr int64_t kGrain = 1 << 15; // floats per thread at least
  at::parallel_for(0, count, kGrain / std::max<int64_t>(floats_each, 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      run(i);
    }
  });
}

// Where the rows of a tap go: from row `row` on of a packed matrix with `depth` rows. Both are in lanes.
struct Place {
  int64_t ky, kx; // the tap
  float* packed;
  int64_t depth, row;

  float* panel(const Panels& panels, int64_t p) const {
    return packed + panels.offset(p, depth) + row * panels.width(p);
  }
};

// A weight as one matrix per tap: [input channels, output channels], or, transposed, [output, input channels].
template <typename Arithmetic>
struct WeightPacking {
  const Prefix& weight;
  int64_t kernel;
  bool transposed;
  int64_t depth; // rows
  const Panels& panels; // of the columns

  int64_t row_stride() const {
    return transposed ? weight.out : weight.in;
  }
  int64_t column_stride() const {
    return transposed ? weight.in : weight.out;
  }

  void pack(const std::vector<Place>& places) const {
    if (kernel > 1 && weight.column == 1 && weight.row == kernel) {
      pack_together(places);
    } else {
      const int64_t count = static_cast<int64_t>(places.size());
      in_parallel(panels.count * count, kPanelVectors * kVec * depth, [&](int64_t i) {
        const int64_t p = i / count;
        const Place& place = places[i % count];
        Arithmetic::pack(
            place.panel(panels, p), panels, p, &weight.at(0, 0, place.ky, place.kx), row_stride(), column_stride(),
            depth);
      });
    }
  }

 private:
  // Reads numbers that follow each other in the weight: all taps of several rows of kSide columns, or, transposed, of
  // all columns of a panel, row by row.
  void pack_together(const std::vector<Place>& places) const {
    const int64_t taps = kernel * kernel, blocks = (depth + kSide - 1) / kSide;
    in_parallel(panels.count * blocks, kPanelVectors * kVec * kSide * taps, [&](int64_t i) {
      const int64_t p = i / blocks, begin = i % blocks * kSide, end = std::min(begin + kSide, depth);
      if (transposed) {
        for (int64_t row = begin; row < end; row += Arithmetic::kRows) {
          pack_block(places, p, row, std::min(row + Arithmetic::kRows, end), 0, panels.width(p));
        }
      } else {
        for (int64_t c = 0; c < panels.width(p); c += kSide) {
          pack_block(places, p, begin, end, c, std::integral_constant<int64_t, kSide>{});
        }
      }
    });
  }

  // Packs rows [first, end) of `wide` columns from column c of panel p on.
  template <typename Wide>
  void pack_block(const std::vector<Place>& places, int64_t p, int64_t first, int64_t end, int64_t c, Wide wide) const {
    const int64_t taps = kernel * kernel, lanes = std::min<int64_t>(wide, panels.width(p) - c);
    float* block = scratch<UnpackedTaps>(taps * kSide * std::max(kSide, kPanelVectors * kVec));
    read_block(first, end - first, panels.column(p) + c, wide, block);
    for (const Place& place : places) {
      const float* row = block + (place.ky * kernel + place.kx) * wide;
      float* to = place.panel(panels, p) + first / Arithmetic::kRows * panels.width(p) + c;
      for (int64_t k = first; k < end; k += Arithmetic::kRows, to += panels.width(p)) {
        for (int64_t v = 0; v < lanes; v += kVec) {
          const Vec next = k + 1 < end ? Vec::loadu(row + taps * wide + v) : Vec(0);
          Arithmetic::put(to + v, Vec::loadu(row + v), next);
        }
        row += Arithmetic::kRows * taps * wide;
      }
    }
  }

  // Reads rows [first, first + rows) of `wide` columns: block[row, tap, column]. Columns past the last are zero.
  template <typename Wide>
  void read_block(int64_t first, int64_t rows, int64_t column, Wide wide, float* block) const {
    const int64_t taps = kernel * kernel, columns = std::clamp<int64_t>(panels.columns - column, 0, wide);
    if (columns < wide) {
      std::fill_n(block, rows * taps * wide, 0.f);
    }
    const int64_t run = row_stride() == taps ? rows * taps : taps; // numbers that follow each other in the weight
    for (int64_t at = 0; at < rows * taps; at += run) {
      const float* from = weight.data + column * column_stride() + (first + at / taps) * row_stride();
      for (int64_t c = 0; c < columns; c += kSide) {
        for (int64_t t = 0; t < run; t += kSide) {
          at::vec::transpose_mxn<float>(
              from + c * column_stride() + t, column_stride(), block + (at + t) * wide + c, wide,
              static_cast<int>(std::min(kSide, columns - c)), static_cast<int>(std::min(kSide, run - t)));
        }
      }
    }
  }
};

} // namespace dspnet::CPU_CAPABILITY::dense
