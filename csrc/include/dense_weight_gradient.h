// The weight gradient of the dense conv_moments: for every kernel row, the sum of h^T e over all output positions.
//
// The threads share it by images, each with matrices of its own that are added up at the end. Where that would take
// longer than to keep h and e of all images, as with many channels on small maps, the threads share it by outputs: the
// products are added to the weight's gradient itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "dense.h"

namespace dspnet::inline CPU_CAPABILITY::dense {

constexpr int64_t kOuterRows = 128; // rows that a weight gradient sums in registers

struct PartialWeight;

// Pairs of matrices whose products are summed: rows of h and of e at the same output positions.
struct Pairs {
  std::vector<std::pair<const float*, const float*>> first; // the first rows of each pair
  int64_t rows, stride, other_stride;
};

// Like multiply_outer_panel, summed over all pairs.
template <int V, int R, typename Arithmetic, typename Epilogue>
void multiply_pairs(const Pairs& pairs, int64_t i, int64_t end, int64_t column, const Epilogue& epilogue) {
  for (; i + R <= end; i += R) {
    Vec sums[R][V];
    clear(sums);
    for (const auto& [a, b] : pairs.first) {
      const float *values = a + i, *columns = b + column;
      for (int64_t row = 0; row < pairs.rows; ++row) {
        add_product<Arithmetic>(sums, values, 1, columns);
        values += pairs.stride;
        columns += pairs.other_stride;
      }
    }
    epilogue(i, column, sums);
  }
  if constexpr (R > 1) {
    if (i < end) {
      multiply_pairs<V, R - 1, Arithmetic>(pairs, i, end, column, epilogue);
    }
  }
}

template <typename Arithmetic>
struct WeightGradient {
  static constexpr bool kPaired = Arithmetic::kRows > 1;

  const ConvShape& shape;
  Prefix to; // data is null if not wanted
  int64_t run; // k C: the taps of one kernel row
  bool h_in_columns; // the columns of the matrix of one kernel row are those of h, otherwise those of e
  Panels columns; // of this matrix, [rows, columns]
  int64_t rows;

  WeightGradient(const ConvShape& shape, const Prefix& to)
      : shape(shape),
        to(to),
        run(shape.kernel * shape.channels),
        h_in_columns(kPaired || Panels(run).waste() <= Panels(shape.out_channels).waste()),
        columns(h_in_columns ? run : shape.out_channels),
        rows(h_in_columns ? shape.out_channels : run) {}

  int64_t size() const { // of a thread's matrices
    return shape.kernel * rows * columns.padded();
  }

  // Whether the threads share the gradient by outputs; floats: of h and e of all images. Each is written once, and each
  // number of a matrix is written and read.
  bool by_outputs(int64_t floats) const {
    return to.data && to.in == 1 && shape.channels % kVec == 0 && floats < 2 * size();
  }

  // Adds the products of images that a thread has to its matrices, or, with `begins`, overwrites them.
  void add(const Band& band, const FormedRows& h, const FormedRows& e, float* matrices, bool begins) const {
    const int64_t images = images_at_once(band.end - band.begin);
    for (int64_t first = 0; first < band.images; first += images) {
      for (int64_t ky = 0; ky < shape.kernel; ++ky) {
        const Reach row{ky, 0, 0, Arithmetic::lanes(shape.out_width)};
        Pairs pairs = pairs_of(band, first, std::min(first + images, band.images), row, h, e);
        if (!h_in_columns) {
          std::swap(pairs.stride, pairs.other_stride);
          for (auto& [of_e, of_h] : pairs.first) {
            std::swap(of_e, of_h);
          }
        }
        const AddToMatrix epilogue{matrices + ky * rows * columns.padded(), columns.padded(), begins && first == 0};
        for (int64_t p = 0; p < columns.count; ++p) {
          with_vectors(columns.width(p), [&](auto v) {
            multiply_pairs<v, kTileRows<v>, Arithmetic>(pairs, 0, rows, columns.column(p), epilogue);
          });
        }
      }
    }
  }

  // Adds the threads' matrices to the prefix: all taps of kSide numbers, channels or outputs, that follow each other in
  // the matrices.
  void merge(const float* matrices, const std::vector<char>& used) const {
    const int64_t kernel = shape.kernel, taps = kernel * kernel, channels = shape.channels;
    const int64_t count = h_in_columns ? channels : shape.out_channels, stride = columns.padded();
    const bool adjacent = (h_in_columns ? to.in : to.out) == 1; // in the prefix too
    in_parallel(h_in_columns ? shape.out_channels : channels, taps * count, [&](int64_t i) {
      float* block = scratch<BlockSums>(2 * taps * kSide); // [tap, number], then [number, tap]
      for (int64_t first = 0; first < count; first += kSide) {
        const int64_t numbers = std::min(kSide, count - first);
        const int64_t o = h_in_columns ? i : first, channel = h_in_columns ? first : i;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t ky = tap / kernel, kx = tap % kernel, in_run = kx * channels + channel;
          const int64_t row = h_in_columns ? o : in_run, column = h_in_columns ? in_run : o;
          const float* parts = matrices + (ky * rows + row) * stride + column;
          for (int64_t v = 0; v < numbers; v += kVec) {
            const int64_t lanes = std::min(kVec, numbers - v);
            Vec sum(0);
            for (size_t thread = 0; thread < used.size(); ++thread) {
              if (used[thread]) {
                sum = sum + load(parts + thread * size() + v, lanes);
              }
            }
            if (adjacent) {
              float* at = &to.at(o, channel, ky, kx) + v;
              store(at, load(at, lanes) + sum, lanes);
            } else {
              sum.store(block + tap * kSide + v);
            }
          }
        }
        if (!adjacent) {
          add_taps(block, numbers, o, channel);
        }
      }
    });
  }

  // Adds all products to the prefix, tap by tap; by_outputs() must be true. all: a band of all images.
  void add_by_outputs(const Band& all, const FormedRows& h, const FormedRows& e) const {
    const Panels channels(shape.channels);
    const int64_t kernel = shape.kernel, blocks = (shape.out_channels + kRowMultiple - 1) / kRowMultiple;
    const int64_t images = images_at_once(shape.out_height);
    in_parallel(blocks * kernel, kRowMultiple * run, [&](int64_t i) {
      const int64_t ky = i % kernel, o = i / kernel * kRowMultiple;
      const int64_t end = std::min(o + kRowMultiple, shape.out_channels);
      for (int64_t kx = 0; kx < kernel; ++kx) {
        std::vector<Pairs> parts;
        for (int64_t first = 0; first < all.images; first += images) {
          parts.push_back(pairs_of(all, first, std::min(first + images, all.images), reach_of(ky, kx), h, e));
        }
        const AddToMatrix epilogue{&to.at(0, 0, ky, kx), to.out, false};
        for (int64_t p = 0; p < channels.count; ++p) {
          for (const Pairs& pairs : parts) {
            with_vectors(channels.width(p), [&](auto v) {
              multiply_pairs<v, kTileRows<v>, Arithmetic>(pairs, o, end, channels.column(p), epilogue);
            });
          }
        }
      }
    });
  }

 private:
  int64_t images_at_once(int64_t output_rows) const { // fit into the L1 cache, if possible
    return std::max<int64_t>(kOuterRows / (output_rows * shape.out_width), 1);
  }

  // Pixels of a row of e, or pairs of them, from `begin` on, and the first tap that they are multiplied with.
  struct Reach {
    int64_t ky, kx, begin, rows;
  };

  // Without the pixels of e whose tap is beside the image, if they are not paired.
  Reach reach_of(int64_t ky, int64_t kx) const {
    if (kPaired) {
      return {ky, kx, 0, Arithmetic::lanes(shape.out_width)};
    }
    const int64_t first = kx - shape.padding, stride = shape.stride; // first: the pixel of h that e's first one reads
    const int64_t begin = first < 0 ? std::min((stride - 1 - first) / stride, shape.out_width) : 0;
    return {ky, kx, begin, std::clamp((shape.width - 1 - first) / stride + 1, begin, shape.out_width) - begin};
  }

  // The rows of e of images [first, last) that read h, each with the row of h.
  Pairs pairs_of(
      const Band& band, int64_t first, int64_t last, const Reach& reach, const FormedRows& h, const FormedRows& e)
      const {
    Pairs pairs{{}, reach.rows, shape.out_channels, Arithmetic::kRows * shape.stride * shape.channels};
    for (int64_t i = first; i < last; ++i) {
      for (int64_t y = band.begin; y < band.end; ++y) {
        const int64_t row = y * shape.stride - shape.padding + reach.ky;
        if (row >= 0 && row < shape.height) {
          const float* tap = h.pixel(i, row, reach.begin * shape.stride - shape.padding) + reach.kx * shape.channels;
          pairs.first.emplace_back(e.pixel(i, y, reach.begin), tap);
        }
      }
    }
    return pairs;
  }

  // Adds block[tap, number] to the prefix from [o, channel] on. The taps of a contiguous weight follow each other.
  void add_taps(float* block, int64_t numbers, int64_t o, int64_t channel) const {
    const int64_t taps = shape.kernel * shape.kernel;
    float* turned = block + taps * kSide;
    for (int64_t tap = 0; tap < taps; tap += kSide) {
      at::vec::transpose_mxn<float>(
          block + tap * kSide, kSide, turned + tap, taps, static_cast<int>(std::min(kSide, taps - tap)),
          static_cast<int>(numbers));
    }
    const int64_t stride = h_in_columns ? to.in : to.out;
    const bool contiguous = to.column == 1 && to.row == shape.kernel;
    const int64_t length = !contiguous ? 1 : stride == taps ? numbers * taps : taps;
    for (int64_t at = 0; at < numbers * taps; at += length) {
      const int64_t tap = at % taps;
      float* sums = &to.at(o, channel, tap / shape.kernel, tap % shape.kernel) + at / taps * stride;
      for (int64_t i = 0; i < length; ++i) {
        sums[i] += turned[at + i];
      }
    }
  }
};

} // namespace dspnet::CPU_CAPABILITY::dense
