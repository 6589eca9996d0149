// Walking rows of C channels, as memory-bound operators do: a block of rows that stays in the L1 cache, in it panels of
// one or two vectors of channels whose coefficients and sums stay in registers while they go down the block's rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "deferred.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {

constexpr int64_t kGrainElements = 32768; // less than this is not worth waking a thread

// `vectors` whole vectors, or the last channels that do not fill one.
template <int vectors_, bool tail_>
struct Panel {
  static constexpr int vectors = vectors_;
  static constexpr bool tail = tail_;
  int64_t channel; // the first one
  int64_t count; // of channels in a tail

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

// Calls run(panel, first row, number of rows), block after block: few rows, because their sums are rounded as often.
template <typename Run>
void for_blocks(int64_t begin, int64_t end, int64_t channels, const Run& run) {
  const int64_t block = std::clamp<int64_t>(2048 / channels, 4, 32);
  for (; begin < end; begin += block) {
    const int64_t rows = std::min(block, end - begin);
    for_panels(channels, [&](const auto& panel) { run(panel, begin, rows); });
  }
}

// Images cut into equal parts of their positions, for the threads to share: more than one each only where images are
// few. Sums over an image then have as many parts.
struct Parts {
  int64_t images, positions, parts;

  Parts(int64_t images, int64_t positions, int64_t threads)
      : images(images),
        positions(positions),
        parts(images >= 4 * threads ? 1 : std::clamp<int64_t>(4 * threads / images, 1, std::max<int64_t>(positions, 1))) {}

  int64_t size() const {
    return images * parts;
  }
  int64_t image(int64_t part) const {
    return part / parts;
  }
  int64_t begin(int64_t part) const { // in rows, of all images
    return image(part) * positions + positions * (part % parts) / parts;
  }
  int64_t end(int64_t part) const {
    return image(part) * positions + positions * (part % parts + 1) / parts;
  }
  int64_t grain(int64_t channels) const {
    return std::max<int64_t>(1, kGrainElements * parts / std::max<int64_t>(positions * channels, 1));
  }
};

// The sums over images, [images, channels], of the sums over their parts.
inline void add_parts(const float* of_parts, const Parts& parts, int64_t channels, float* to) {
  std::fill_n(to, parts.images * channels, 0.f);
  for (int64_t part = 0; part < parts.size(); ++part) {
    for (int64_t c = 0; c < channels; ++c) {
      to[parts.image(part) * channels + c] += of_parts[part * channels + c];
    }
  }
}

} // namespace CPU_CAPABILITY
} // namespace dspnet
