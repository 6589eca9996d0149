// Mean and variance that stay exact where |mean| is large against the standard deviation: sums of differences from a
// pivot near the mean, merged over blocks as Chan et al. (1979) do. Never E[y^2] - E[y]^2 of raw values.
#pragma once

#include <cstdint>

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

} // namespace CPU_CAPABILITY
} // namespace dspnet
