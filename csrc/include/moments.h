// Mean and variance that stay exact where |mean| is large against the standard deviation: sums of differences from a
// pivot near the mean, merged over blocks as Chan et al. (1979) do. Never E[y^2] - E[y]^2 of raw values.
#pragma once

#include <cstdint>
#include <vector>

namespace dspnet {
inline namespace CPU_CAPABILITY {

// Count, mean and sum of squared deviations of some values of one channel.
struct Moments {
  double count = 0;
  double mean = 0;
  double squares = 0;

  void merge(const Moments& other) {
    if (other.count == 0) {
      return;
    }
    const double delta = other.mean - mean;
    const double total = count + other.count;
    mean += delta * (other.count / total);
    squares += other.squares + delta * delta * (count * other.count / total);
    count = total;
  }

  // Of `count` values v with sum = sum(v - pivot) and sum_of_squares = sum((v - pivot)^2).
  static Moments shifted(double count, double pivot, double sum, double sum_of_squares) {
    return {count, pivot + sum / count, sum_of_squares - sum * sum / count};
  }

  double variance() const { // biased
    return count == 0 || squares < 0 ? 0 : squares / count;
  }
};

// Those of all channels at once.
struct ChannelMoments {
  double count = 0;
  std::vector<double> mean, squares;

  // Of `rows` rows: sums of differences from a pivot and of their squares.
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

  // The mean so far is the best pivot for what follows. False if there is none yet.
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

} // namespace CPU_CAPABILITY
} // namespace dspnet
