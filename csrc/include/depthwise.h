// What the forward and the backward of the depthwise conv_moments have in common: how channels and pixels are cut, how
// scratch is laid out, and how the sums of several threads become one.
//
// Channels are taken in vectors of kVec, vectors in groups whose scratch stays in the L2 cache. A unit of work is one
// image of one group; a thread takes units in a row, group by group, so that at most its first and its last group are
// shared with others. Inside a unit rows of pixels stream through scratch: every activation is read and written once.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "conv_moments.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {
namespace depthwise {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kTile = 8; // pixels whose sums a loop holds in registers
#else
constexpr int64_t kTile = 4;
#endif
constexpr int64_t kPixels = 4; // that share one load of a channel's parameters
constexpr int64_t kGrain = 16384; // elements of x: less than this is not worth waking a thread

// `count` pixels in as few tiles of up to kTile as possible, which differ by one pixel at most.
struct Tiles {
  int64_t size; // of the smaller ones, which come last
  int64_t larger, smaller; // how many

  explicit Tiles(int64_t count, int64_t most = kTile) {
    const int64_t tiles = std::max<int64_t>(at::divup(count, most), 1);
    size = count / tiles;
    larger = count % tiles;
    smaller = size > 0 ? tiles - larger : 0;
  }
};

// run(std::integral_constant<int, size>) for a size in 1..most known only at run time.
template <int most = kTile, typename Run>
DSPNET_INLINE void with_size(int64_t size, const Run& run) {
  if constexpr (most > 1) {
    if (size < most) {
      return with_size<most - 1>(size, run);
    }
  }
  run(std::integral_constant<int, most>{});
}

// run(std::integral_constant<int, n>, first pixel) over all of `count` pixels, n up to kPixels.
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
  int64_t channels, vectors; // of all
  int64_t size; // vectors of a group; the last may have less
  int64_t count;

  // rows, weight: floats of scratch that a vector takes. What is read for every row is to stay in L1 if it is much.
  Groups(int64_t channels, int64_t images, int64_t rows, int64_t weight)
      : channels(channels), vectors(at::divup(channels, kVec)) {
    const int64_t scratch = (5 * weight >= 4 * rows ? 24 << 10 : 256 << 10) / static_cast<int64_t>(sizeof(float));
    const int64_t threads = at::get_num_threads();
    const int64_t fit = std::clamp<int64_t>(scratch / (rows + weight), 1, vectors);
    // Threads take whole images while there are enough: pieces of pixels are read slower.
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

  int64_t lanes(int64_t vector) const { // in use
    return std::min(kVec, count - vector * kVec);
  }
};

// run(vector, lanes) with lanes a constant wherever all are in use.
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
DSPNET_INLINE void store_lanes(scalar_t* to, const Vec& value, std::integral_constant<int64_t, kVec>) {
  store(to, value);
}
template <typename scalar_t>
DSPNET_INLINE void store_lanes(scalar_t* to, const Vec& value, int64_t lanes) {
  store(to, value, lanes);
}

// Into the L2 cache: while rows are computed from scratch, the processor has no reads to guess the next ones from.
template <typename scalar_t>
DSPNET_INLINE void prefetch(const scalar_t* from) {
  __builtin_prefetch(from, 0, 2);
}

DSPNET_INLINE void add_to(float* sum, const Vec& value) {
  (Vec::loadu(sum) + value).store(sum);
}

// A row of pixels in scratch, [vector][phase][column][kVec]: column q of the padded row is column q / stride of phase
// q % stride, so that a convolution with a stride is a sum of convolutions without one.
struct PaddedRow {
  int64_t stride, columns; // columns: of a phase

  PaddedRow(int64_t stride, int64_t padded_width) : stride(stride), columns(at::divup(padded_width, stride)) {}

  int64_t of_phase() const { // floats
    return columns * kVec;
  }
  int64_t of_vector() const {
    return stride * of_phase();
  }
  int64_t at(int64_t q) const {
    return (q % stride) * of_phase() + q / stride * kVec;
  }
};

// Zeroed memory of this thread, aligned to a vector. What it held is lost with every call.
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

// What the channels of a group are deferred in one image. Lanes without a channel hold zeros.
struct DeferredChannels {
  float *scale, *shift, *gate;

  DeferredChannels(Scratch& scratch, int64_t vectors)
      : scale(scratch.take(vectors * kVec)), shift(scratch.take(vectors * kVec)), gate(scratch.take(vectors * kVec)) {}

  static int64_t floats(int64_t vectors) {
    return 3 * vectors * kVec;
  }

  void read(const ConvShape& shape, const Deferred& deferred, const Channels& channels, int64_t n) {
    const auto fill = [&](float* to, const float* from, int64_t row, float otherwise) {
      if (from) {
        std::copy_n(from + row * shape.channels + channels.first, channels.count, to);
      } else {
        std::fill_n(to, channels.count, otherwise);
      }
      std::fill(to + channels.count, to + channels.vectors * kVec, 0.f);
    };
    fill(scale, deferred.scale, deferred.row(n, shape.images), 1);
    fill(shift, deferred.shift, deferred.row(n, shape.images), 0);
    fill(gate, deferred.gate, n, 1);
  }
};

// Scratch of a row of h = act(scale x + shift) * gate: columns of x from `x` on, to where `column` says.
template <Act act, typename scalar_t>
void materialize_row(
    const scalar_t* x,
    int64_t pixel, // between pixels of x
    int64_t width,
    const Channels& channels,
    const DeferredChannels& deferred,
    const int64_t* column, // floats from the start of a vector's row
    int64_t of_vector,
    float* h,
    int64_t ahead) { // elements of x, to what will be read next
  const Channels local = channels; // GCC takes it that a store of a vector may change what is behind a reference
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
        (activate<act>(z) * gate).store(to[p] + v * of_vector);
      }
    });
  });
}

// [vector][tap][kVec] from the weight's prefix. Lanes without a channel hold zeros.
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

// Adds sums of fp32 to sums in double, and starts them anew.
inline void flush(float* from, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += from[i];
    from[i] = 0;
  }
}

// All units over the threads. A Worker is made per thread from `call` and has
//     Sums start(group): begins a group with sums of zero        image(n): one unit, into the sums
//     Sums stop(): the sums of the group
// and `call` has finish(group, sums): to the outputs. Sums of a group that threads share are merged in their order.
template <typename Worker, typename Call>
void run_groups(const Call& call, const Groups& groups, int64_t images, int64_t elements_of_a_unit) {
  struct Part {
    int64_t group = -1;
    typename Worker::Sums sums;
  };
  std::vector<Part> parts(2 * at::get_num_threads());
  const int64_t grain = at::divup(kGrain, elements_of_a_unit);
  at::parallel_for(0, groups.count * images, grain, [&](int64_t unit, int64_t end) {
    Worker worker(call);
    Part* part = &parts[2 * at::get_thread_num()];
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
        *part++ = {group, std::move(sums)};
      }
    }
  });
  for (size_t i = 0; i < parts.size();) {
    Part& part = parts[i++];
    if (part.group < 0) {
      continue;
    }
    for (; i < parts.size() && (parts[i].group == part.group || parts[i].group < 0); ++i) {
      if (parts[i].group >= 0) {
        part.sums.merge(parts[i].sums);
      }
    }
    call.finish(part.group, part.sums);
  }
}

} // namespace depthwise
} // namespace CPU_CAPABILITY
} // namespace dspnet
