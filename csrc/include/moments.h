// Mean and variance per channel, accurate also if |mean| is much larger than the standard deviation. Sums are of
// differences from a pivot near the mean, merged over blocks (Chan et al., 1979). E[y^2] - E[y]^2 of raw values would
// cancel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dspnet::inline CPU_CAPABILITY {

// The number of rows, and per channel the mean and the sum of squared deviations.
struct ChannelMoments {
  double count = 0;
  std::vector<double> mean, squares;

  // Merges the sums over `rows` rows of differences from a pivot and of their squares.
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

  void merge(const ChannelMoments& other) {
    if (other.count == 0) {
      return;
    }
    mean.resize(other.mean.size());
    squares.resize(other.mean.size());
    const double total = count + other.count, share = other.count / total, weight = count * share;
    for (size_t c = 0; c < mean.size(); ++c) {
      const double delta = other.mean[c] - mean[c];
      mean[c] += delta * share;
      squares[c] += other.squares[c] + delta * delta * weight;
    }
    count = total;
  }

  // Writes the current mean, the best pivot for the following rows. Returns false if there are no rows yet.
  bool to_pivot(float* pivot) const {
    for (size_t c = 0; c < mean.size(); ++c) {
      pivot[c] = static_cast<float>(mean[c]);
    }
    return count > 0;
  }

  // variance: biased.
  void write(int64_t channels, float* means, float* variance) const {
    for (int64_t c = 0; c < channels; ++c) {
      means[c] = static_cast<float>(mean[c]);
      variance[c] = static_cast<float>(squares[c] < 0 ? 0 : squares[c] / count);
    }
  }
};

// parts: [part, view]. mean, variance: [views, channels].
inline void write_moments(
    const std::vector<ChannelMoments>& parts, int64_t views, int64_t channels, float* mean, float* variance) {
  for (int64_t view = 0; view < views; ++view) {
    ChannelMoments all;
    for (size_t part = view; part < parts.size(); part += views) {
      all.merge(parts[part]);
    }
    all.write(channels, mean + view * channels, variance + view * channels);
  }
}

} // namespace dspnet::CPU_CAPABILITY
