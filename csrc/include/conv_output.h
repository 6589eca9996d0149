// The epilogue of convolutions computed as matrix products: stores a tile of y and sums it for the moments.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace dspnet::inline CPU_CAPABILITY {

// An epilogue of multiply(). pivot, sum, square: [padded channels], the arguments of ChannelMoments::merge, or null.
template <typename scalar_t>
struct StoreOutput {
  scalar_t* y; // of the first row
  int64_t stride; // between rows
  int64_t channels;
  int64_t ahead; // prefetch distance, in elements of y
  float* pivot = nullptr;
  float* sum = nullptr;
  float* square = nullptr;
  bool has_pivot = false;
  bool begins = true; // overwrites the sums; otherwise adds to them

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t c = column + v * kVec;
      Vec out[R];
      with_lanes(v + 1 < V, channels - c, [&](auto... count) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          prefetch(y + (row + r) * stride + c + ahead);
          out[r] = store(y + (row + r) * stride + c, sums[r][v], count...);
        }
      });
      if (pivot) {
        add_up(begins && row == 0, c, out);
      }
    }
  }

  // Sums a tile in registers first: adding each row to the block's sum would round that sum once per row. If no pivot
  // exists yet, the mean of the first tile becomes the pivot, since it is near the block's mean.
  template <int R>
  DSPNET_INLINE void add_up(bool first, int64_t c, const Vec (&out)[R]) const {
    if (first && !has_pivot) {
      Vec near = out[0];
#pragma GCC unroll 16
      for (int r = 1; r < R; ++r) {
        near = near + out[r];
      }
      (near * Vec(1.f / R)).store(pivot + c);
    }
    const Vec near = Vec::loadu(pivot + c);
    Vec total = out[0] - near, squares = total * total;
#pragma GCC unroll 16
    for (int r = 1; r < R; ++r) {
      const Vec difference = out[r] - near;
      total = total + difference;
      squares = at::vec::fmadd(difference, difference, squares);
    }
    if (!first) {
      total = total + Vec::loadu(sum + c);
      squares = squares + Vec::loadu(square + c);
    }
    total.store(sum + c);
    squares.store(square + c);
  }
};

} // namespace dspnet::CPU_CAPABILITY
