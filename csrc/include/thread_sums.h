// Sums of per-channel quantities for each view, over all threads: fp32 sums of up to 256 positions, merged in double.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace dspnet::inline CPU_CAPABILITY {

// Sums in double, [threads, rows, channels]; rows: those of Deferred.
class ThreadSums {
 public:
  ThreadSums(int64_t rows, int64_t channels)
      : channels_(channels), size_(rows * channels), sums_(at::get_num_threads() * size_) {}

  // For calls inside parallel regions. values: [channels].
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

// One thread's fp32 sums of several quantities over consecutive images with the same rows of ThreadSums. flush() calls
// flush_to(rows, sums) with sums[quantity] of [channels] and clears them.
template <size_t quantities, typename Rows, typename FlushTo>
class BufferedSums {
 public:
  using Accumulators = std::array<float*, quantities>;

  BufferedSums(int64_t channels, Rows rows, FlushTo flush_to)
      : flush_to_(flush_to), rows_(rows), values_(quantities * channels) {
    for (size_t q = 0; q < quantities; ++q) {
      accumulators_[q] = values_.data() + q * channels;
    }
  }

  // Returns the accumulators for `count` more positions; flushes first if the rows change or fp32 would round too
  // often.
  const Accumulators& reserve(int64_t count, const Rows& rows) {
    constexpr int64_t limit = 256; // positions that are summed in fp32
    if (count_ + count > limit || rows != rows_) {
      flush();
    }
    count_ += count;
    rows_ = rows;
    return accumulators_;
  }

  void flush() {
    if (count_ > 0) {
      flush_to_(rows_, accumulators_);
    }
    std::fill(values_.begin(), values_.end(), 0.f);
    count_ = 0;
  }

 private:
  FlushTo flush_to_;
  Rows rows_;
  std::vector<float> values_;
  Accumulators accumulators_;
  int64_t count_ = 0;
};

template <size_t quantities, typename Rows, typename FlushTo>
BufferedSums<quantities, Rows, FlushTo> buffered_sums(int64_t channels, Rows rows, FlushTo flush_to) {
  return {channels, rows, flush_to};
}

} // namespace dspnet::CPU_CAPABILITY
