// Sums of per-channel quantities by view, over threads: fp32 sums of some hundred rows, merged in double.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace dspnet {
inline namespace CPU_CAPABILITY {

// [threads, rows, channels], rows as Deferred has them.
class ThreadSums {
 public:
  ThreadSums(int64_t rows, int64_t channels)
      : channels_(channels), size_(rows * channels), sums_(at::get_num_threads() * size_) {}

  // To be called in a parallel region. values: [channels].
  void add(int64_t row, const float* values) {
    if (size_ == 0) {
      return;
    }
    double* sums = sums_.data() + at::get_thread_num() * size_ + row * channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      sums[c] += values[c];
    }
  }

  // to: [rows, channels], or null.
  void write(float* to) const {
    for (int64_t i = 0; to && i < size_; ++i) {
      double sum = 0;
      for (size_t at = i; at < sums_.size(); at += size_) {
        sum += sums_[at];
      }
      to[i] = static_cast<float>(sum);
    }
  }

 private:
  int64_t channels_, size_;
  std::vector<double> sums_;
};

// One thread's fp32 sums of some quantities over consecutive images that belong to the same rows of ThreadSums.
// sink(rows, sums) takes them, sums[quantity] being [channels].
template <size_t quantities, typename Rows, typename Sink>
class PendingSums {
 public:
  using Places = std::array<float*, quantities>;

  PendingSums(int64_t channels, Rows rows, Sink sink) : sink_(sink), rows_(rows), values_(quantities * channels) {
    for (size_t q = 0; q < quantities; ++q) {
      places_[q] = values_.data() + q * channels;
    }
  }

  // Where to add the sums over `count` more positions.
  const Places& next(int64_t count, const Rows& rows) {
    constexpr int64_t limit = 256; // positions summed in fp32
    if (count_ + count > limit || rows != rows_) {
      flush();
    }
    count_ += count;
    rows_ = rows;
    return places_;
  }

  void flush() {
    if (count_ > 0) {
      sink_(rows_, places_);
    }
    std::fill(values_.begin(), values_.end(), 0.f);
    count_ = 0;
  }

 private:
  Sink sink_;
  Rows rows_;
  std::vector<float> values_;
  Places places_;
  int64_t count_ = 0;
};

template <size_t quantities, typename Rows, typename Sink>
PendingSums<quantities, Rows, Sink> pending_sums(int64_t channels, Rows rows, Sink sink) {
  return {channels, rows, sink};
}

} // namespace CPU_CAPABILITY
} // namespace dspnet
