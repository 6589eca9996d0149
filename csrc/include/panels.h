// Loops over rows of C channels for memory-bound operators. A block of rows stays in the L1 cache; within a block,
// panels of one or two vectors of channels keep their coefficients and sums in registers for all rows of the block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "deferred.h"

namespace dspnet::inline CPU_CAPABILITY {

constexpr int64_t kBlocksAhead = 4;
constexpr int64_t kGrainElements = 32768; // per thread at least: less costs more to start than to compute

// `vectors` whole vectors, or, if `tail`, the last channels, fewer than a vector.
template <int vectors_, bool tail_>
struct Panel {
  static constexpr int vectors = vectors_;
  static constexpr bool tail = tail_;
  int64_t channel; // first channel
  int64_t count; // channels in a tail
  int64_t ahead = 0; // prefetch distance of read() and write(), in elements

  template <typename scalar_t>
  Vec get(const scalar_t* row, int v) const {
    if constexpr (tail) {
      return load(row + channel, count);
    } else {
      return load(row + channel + v * kVec);
    }
  }

  Vec get_or(const float* row, int v, float otherwise) const {
    return row ? get(row, v) : Vec(otherwise);
  }

  template <typename scalar_t>
  void put(scalar_t* row, int v, const Vec& value) const {
    if constexpr (tail) {
      store(row + channel, value, count);
    } else {
      store(row + channel + v * kVec, value);
    }
  }

  void add(float* row, int v, const Vec& value) const {
    put(row, v, get(row, v) + value);
  }

  // get() and put() for rows of a tensor that a loop passes over once.
  template <typename scalar_t>
  Vec read(const scalar_t* row, int v) const {
    prefetch(row + channel + v * kVec + ahead);
    return get(row, v);
  }

  template <typename scalar_t>
  void write(scalar_t* row, int v, const Vec& value) const {
    prefetch(row + channel + v * kVec + ahead);
    put(row, v, value);
  }
};

// Calls run(panel) for all channels.
template <typename Run>
void for_panels(int64_t channels, const Run& run) {
  int64_t c = 0;
  for (; c + 2 * kVec <= channels; c += 2 * kVec) {
    run(Panel<2, false>{c, kVec});
  }
  if (c + kVec <= channels) {
    run(Panel<1, false>{c, kVec});
    c += kVec;
  }
  if (c < channels) {
    run(Panel<1, true>{c, channels - c});
  }
}

// Calls run(panel, first row, number of rows) for each block. Blocks are short: their sums are in fp32. Panels prefetch
// the rows of a later block: one panel after another is no stream that the hardware prefetcher detects.
template <typename Run>
void for_blocks(int64_t begin, int64_t end, int64_t channels, const Run& run) {
  const int64_t block = std::clamp<int64_t>(2048 / channels, 4, 32);
  for (; begin < end; begin += block) {
    const int64_t rows = std::min(block, end - begin);
    for_panels(channels, [&](auto panel) {
      panel.ahead = kBlocksAhead * block * channels;
      run(panel, begin, rows);
    });
  }
}

// Splits images into parts of about equal size for the threads: several per image only if there are fewer than four
// images per thread. Sums over an image are then sums of part sums.
struct Parts {
  int64_t images, positions, per_image; // per_image: parts of an image

  Parts(int64_t images, int64_t positions, int64_t threads)
      : images(images),
        positions(positions),
        per_image(
            images >= 4 * threads ? 1
                                  : std::clamp<int64_t>(4 * threads / images, 1, std::max<int64_t>(positions, 1))) {}

  int64_t size() const {
    return images * per_image;
  }
  int64_t image(int64_t part) const {
    return part / per_image;
  }
  int64_t begin(int64_t part) const { // a row, counted over all images
    return image(part) * positions + positions * (part % per_image) / per_image;
  }
  int64_t end(int64_t part) const {
    return image(part) * positions + positions * (part % per_image + 1) / per_image;
  }
  int64_t grain(int64_t channels) const {
    return std::max<int64_t>(1, kGrainElements * per_image / std::max<int64_t>(positions * channels, 1));
  }
};

// Adds up part_sums, [parts, channels], to the sums over images, [images, channels].
inline void add_parts(const float* part_sums, const Parts& parts, int64_t channels, float* to) {
  std::fill_n(to, parts.images * channels, 0.f);
  for (int64_t part = 0; part < parts.size(); ++part) {
    for (int64_t c = 0; c < channels; ++c) {
      to[parts.image(part) * channels + c] += part_sums[part * channels + c];
    }
  }
}

} // namespace dspnet::CPU_CAPABILITY
