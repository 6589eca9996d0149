// Shared by the forward and the backward of the depthwise conv_moments: the split of channels and pixels, the layout of
// scratch, and the merge of the threads' sums.
//
// Channels form vectors of kVec, and vectors form groups whose scratch stays in the L2 cache. A unit of work is one
// image of one group. A thread processes consecutive units, ordered by group, so it shares at most its first and its
// last group with other threads. Within a unit, rows of pixels stream through scratch: every activation is read and
// written once.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "conv_moments.h"

namespace dspnet::inline CPU_CAPABILITY::depthwise {

#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__) // 32 registers
constexpr int64_t kTile = 8; // pixels whose sums stay in registers
#else
constexpr int64_t kTile = 4;
#endif
constexpr int64_t kPixels = 4; // pixels per load of a channel's parameters
constexpr int64_t kGrain = 16384; // elements of x per thread at least

// Splits `count` pixels into the fewest tiles of at most `most` pixels; tile sizes differ by at most one.
struct Tiles {
  int64_t size; // pixels of the smaller tiles, which come last
  int64_t larger, smaller; // numbers of tiles

  explicit Tiles(int64_t count, int64_t most = kTile) {
    const int64_t tiles = std::max<int64_t>(at::divup(count, most), 1);
    size = count / tiles;
    larger = count % tiles;
    smaller = size > 0 ? tiles - larger : 0;
  }
};

// Calls run(std::integral_constant<int, size>) for a size in [1, most] known only at run time.
template <int most = kTile, typename Run>
DSPNET_INLINE void with_size(int64_t size, const Run& run) {
  if constexpr (most > 1) {
    if (size < most) {
      return with_size<most - 1>(size, run);
    }
  }
  run(std::integral_constant<int, most>{});
}

// Calls run(std::integral_constant<int, n>, first pixel), n <= kPixels, for all of `count` pixels.
template <typename Run>
DSPNET_INLINE void for_pixels(int64_t count, const Run& run) {
  int64_t first = 0;
  for (; first + kPixels <= count; first += kPixels) {
    run(std::integral_constant<int, kPixels>{}, first);
  }
  if (first < count) {
    with_size<kPixels>(count - first, [&](auto pixels) { run(pixels, first); });
  }
}

struct Groups {
  int64_t channels, vectors; // in total
  int64_t size; // vectors of a group; the last group may have fewer
  int64_t count;

  // rows, weight: floats of scratch per vector. If the weight, which is read for every row, needs about as much scratch
  // as the rows or more, scratch must fit into the L1 cache, otherwise into the L2 cache.
  Groups(int64_t channels, int64_t images, int64_t rows, int64_t weight)
      : channels(channels), vectors(at::divup(channels, kVec)) {
    const int64_t scratch = (5 * weight >= 4 * rows ? 24 << 10 : 256 << 10) / static_cast<int64_t>(sizeof(float));
    const int64_t threads = at::get_num_threads();
    const int64_t fit = std::clamp<int64_t>(scratch / (rows + weight), 1, vectors);
    // Channels are split among threads only if images are few: reading a part of the channels is slower.
    const int64_t for_all_threads = images < 2 * threads ? std::min(2 * threads, vectors) : 1;
    size = at::divup(vectors, std::max(at::divup(vectors, fit), for_all_threads));
    count = at::divup(vectors, size);
  }
};

// The channels of one group.
struct Channels {
  int64_t first = 0, count = 0;
  int64_t vectors = 0;

  Channels() = default;
  Channels(const Groups& groups, int64_t group)
      : first(group * groups.size * kVec),
        count(std::min(groups.size * kVec, groups.channels - first)),
        vectors(at::divup(count, kVec)) {}

  int64_t lanes(int64_t vector) const { // lanes with a channel
    return std::min(kVec, count - vector * kVec);
  }
};

// Calls run(vector, lanes); lanes is a compile-time constant for full vectors.
template <typename Run>
DSPNET_INLINE void for_vectors(const Channels& channels, const Run& run) {
  const int64_t whole = channels.count / kVec;
  for (int64_t v = 0; v < whole; ++v) {
    run(v, std::integral_constant<int64_t, kVec>{});
  }
  if (whole < channels.vectors) {
    run(whole, channels.lanes(whole));
  }
}

template <typename scalar_t>
DSPNET_INLINE Vec load_lanes(const scalar_t* from, std::integral_constant<int64_t, kVec>) {
  return load(from);
}
template <typename scalar_t>
DSPNET_INLINE Vec load_lanes(const scalar_t* from, int64_t lanes) {
  return load(from, lanes);
}
template <typename scalar_t>
DSPNET_INLINE Vec store_lanes(scalar_t* to, const Vec& value, std::integral_constant<int64_t, kVec>) {
  return store(to, value);
}
template <typename scalar_t>
DSPNET_INLINE Vec store_lanes(scalar_t* to, const Vec& value, int64_t lanes) {
  return store(to, value, lanes);
}

DSPNET_INLINE void add_to(float* sum, const Vec& value) {
  (Vec::loadu(sum) + value).store(sum);
}

// The layout of a row of pixels in scratch: [vector][phase][column][kVec]. Column q of the padded row is column q /
// stride of phase q % stride, so a convolution with a stride is a sum of convolutions without one.
struct PaddedRow {
  int64_t stride, columns; // of the convolution; of a phase

  PaddedRow(int64_t stride, int64_t padded_width) : stride(stride), columns(at::divup(padded_width, stride)) {}

  int64_t phase_stride() const { // floats between phases
    return columns * kVec;
  }
  int64_t vector_stride() const { // floats between vectors
    return stride * phase_stride();
  }
  int64_t at(int64_t q) const {
    return (q % stride) * phase_stride() + q / stride * kVec;
  }
};

// Zeroed thread-local memory, aligned to a vector. Every construction reuses and clears the same memory.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    static thread_local std::vector<float> memory;
    constexpr int64_t line = 64 / sizeof(float);
    memory.resize(std::max<size_t>(memory.size(), floats + line));
    void* start = memory.data();
    size_t space = memory.size() * sizeof(float);
    next_ = static_cast<float*>(std::align(64, floats * sizeof(float), start, space));
    std::fill_n(next_, floats, 0.f);
  }

  float* take(int64_t floats) {
    return std::exchange(next_, next_ + floats);
  }

 private:
  float* next_;
};

// Scale, shift and gate of the channels of a group for one image. Lanes without a channel are zero.
struct DeferredChannels {
  float *scale, *shift, *gate;

  DeferredChannels(Scratch& scratch, int64_t vectors)
      : scale(scratch.take(vectors * kVec)), shift(scratch.take(vectors * kVec)), gate(scratch.take(vectors * kVec)) {}

  static int64_t floats(int64_t vectors) {
    return 3 * vectors * kVec;
  }

  void read(const ConvShape& shape, const Deferred& deferred, const Channels& channels, int64_t n) {
    const auto fill = [&](float* to, const float* from, int64_t row, float constant) {
      if (from) {
        std::copy_n(from + row * shape.channels + channels.first, channels.count, to);
      } else {
        std::fill_n(to, channels.count, constant);
      }
      std::fill(to + channels.count, to + channels.vectors * kVec, 0.f);
    };
    fill(scale, deferred.scale, deferred.row(n, shape.images), 1);
    fill(shift, deferred.shift, deferred.row(n, shape.images), 0);
    fill(gate, deferred.gate, n, 1);
  }
};

// Computes a row of h = act(scale x + shift) * gate into scratch; column[i]: offset of pixel i in scratch.
template <Act act, typename scalar_t>
void form_h_row(
    const scalar_t* x,
    int64_t pixel, // stride between pixels of x
    int64_t width,
    const Channels& channels,
    const DeferredChannels& deferred,
    const int64_t* column,
    int64_t vector_stride,
    float* h,
    int64_t ahead) { // prefetch distance, in elements of x
  const Channels local = channels; // a copy: GCC assumes that vector stores may modify referenced objects
  const float *scales = deferred.scale, *shifts = deferred.shift, *gates = deferred.gate;
  for_pixels(width, [&](auto pixels, int64_t first) __attribute__((always_inline)) {
    constexpr int count = pixels;
    std::array<const scalar_t*, count> from;
    std::array<float*, count> to;
    for (int p = 0; p < count; ++p) {
      from[p] = x + (first + p) * pixel;
      to[p] = h + column[first + p];
    }
    for_vectors(local, [&](int64_t v, auto lanes) __attribute__((always_inline)) {
      const Vec scale = Vec::loadu(scales + v * kVec), shift = Vec::loadu(shifts + v * kVec);
      const Vec gate = Vec::loadu(gates + v * kVec);
#pragma GCC unroll 4
      for (int p = 0; p < count; ++p) {
        prefetch(from[p] + v * kVec + ahead);
        const Vec z = at::vec::fmadd(load_lanes(from[p] + v * kVec, lanes), scale, shift);
        (activate<act>(z) * gate).store(to[p] + v * vector_stride);
      }
    });
  });
}

// Packs the weight's prefix to [vector][tap][kVec]. Lanes without a channel are zero.
inline void pack_weight(const Prefix& weight, int64_t kernel, const Channels& channels, float* packed) {
  const int64_t taps = kernel * kernel;
  std::fill_n(packed, channels.vectors * taps * kVec, 0.f);
  for (int64_t c = 0; c < channels.count; ++c) {
    float* to = packed + c / kVec * taps * kVec + c % kVec;
    for (int64_t ky = 0; ky < kernel; ++ky) {
      for (int64_t kx = 0; kx < kernel; ++kx) {
        to[(ky * kernel + kx) * kVec] = weight.at(channels.first + c, 0, ky, kx);
      }
    }
  }
}

// Adds sums in fp32 to sums in double, and clears them.
inline void flush(float* from, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += from[i];
    from[i] = 0;
  }
}

// Distributes all units over the threads. Each thread constructs a Worker from `call`. A Worker has
//     void start(group): begins a group, with sums of zero       void image(n): processes one unit
//     Sums stop(): returns the sums of the group
// and `call` has finish(group, sums), which writes the outputs. If threads share a group, their sums are merged in the
// order of the threads.
template <typename Worker, typename Call>
void run_groups(const Call& call, const Groups& groups, int64_t images, int64_t unit_elements) {
  struct GroupSums {
    int64_t group = -1; // -1: unused
    typename Worker::Sums sums;
  };
  std::vector<GroupSums> shared(2 * at::get_num_threads());
  const int64_t grain = at::divup(kGrain, unit_elements);
  at::parallel_for(0, groups.count * images, grain, [&](int64_t unit, int64_t end) {
    Worker worker(call);
    GroupSums* next_shared = &shared[2 * at::get_thread_num()];
    while (unit < end) {
      const int64_t group = unit / images, first = unit;
      worker.start(group);
      for (; unit < std::min(end, (group + 1) * images); ++unit) {
        worker.image(unit % images);
      }
      typename Worker::Sums sums = worker.stop();
      if (unit - first == images) {
        call.finish(group, sums);
      } else {
        *next_shared++ = {group, std::move(sums)};
      }
    }
  });
  for (size_t i = 0; i < shared.size();) {
    GroupSums& merged = shared[i++];
    if (merged.group < 0) {
      continue;
    }
    for (; i < shared.size() && (shared[i].group == merged.group || shared[i].group < 0); ++i) {
      if (shared[i].group >= 0) {
        merged.sums.merge(shared[i].sums);
      }
    }
    call.finish(merged.group, merged.sums);
  }
}

} // namespace dspnet::CPU_CAPABILITY::depthwise
