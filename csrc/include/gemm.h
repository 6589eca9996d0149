// Matrix products from register tiles, for convolutions as implicit GEMM. Everything is fp32, or with BFloat16Pairs
// (bfloat16_pairs.h) products of bfloat16 numbers summed in fp32.
//
//   multiply()          sums[row, column] = sum over taps t and k of  A[row, t, k] * B[t, k, column]
//   multiply_outer()    sums[i, column]   = sum over rows of          A[row, i] * B[row, column]
//
// multiply() is a convolution (A: the input's rows, B: the weight) or its input gradient (A: the output gradient's
// rows, B: the weight transposed); multiply_outer() is a weight gradient. Both keep a tile of kTileRows<V> x V vectors
// in registers, initialise it to zero and pass it to an epilogue, which stores it. Operations on the output, such as
// moments, are part of the epilogue, so they need no further pass over memory. An epilogue is a functor with
//
//   template <int R, int V>
//   DSPNET_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[R][V]) const
//
// where sums[r][v] holds the columns from column + v kVec on of row + r. The last vector of the last panel may hold
// columns past the last, which epilogues must ignore. DSPNET_INLINE is required: the tile stays in registers only if
// the call is inlined. A loop over an array of vectors needs `#pragma GCC unroll 16`, or GCC 12 keeps the array on the
// stack.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "deferred.h"

namespace dspnet::inline CPU_CAPABILITY {

// A tile must fit into the registers with V vectors of B and one of A.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kRegisters = 32;
constexpr int kPanelVectors = 4;
template <int V>
constexpr int kTileRows = V == 1 ? 16 : V == 2 ? 12 : V == 3 ? 8 : 6;
#elif defined(__aarch64__) // NEON broadcasts into a register, so a tile must fit beside one more vector per row
constexpr int64_t kRegisters = 32;
constexpr int kPanelVectors = 4;
template <int V>
constexpr int kTileRows = V == 4 ? 4 : V == 3 ? 6 : 8;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kRegisters = 16;
constexpr int kPanelVectors = 2;
template <int V>
constexpr int kTileRows = V == 1 ? 12 : 6;
#else // no SIMD vectors of this width: vectors are unrolled to scalars, so larger tiles would take long to compile
constexpr int64_t kRegisters = 16;
constexpr int kPanelVectors = 1;
template <int V>
constexpr int kTileRows = 4;
#endif
constexpr int64_t kRowMultiple = 48; // a multiple of every kTileRows: blocks of this many rows divide into whole tiles

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The columns of a matrix in panels of at most kPanelVectors vectors, as even as possible. A packed matrix holds one
// panel after another, each [depth][width(p)], the columns past the last zero.
struct Panels {
  int64_t columns, vectors, count;

  explicit Panels(int64_t columns)
      : columns(columns), vectors((columns + kVec - 1) / kVec), count((vectors + kPanelVectors - 1) / kPanelVectors) {}

  int64_t first_vector(int64_t p) const {
    return p * (vectors / count) + std::min(p, vectors % count);
  }
  int64_t width(int64_t p) const { // in columns
    return (vectors / count + (p < vectors % count)) * kVec;
  }
  int64_t column(int64_t p) const {
    return first_vector(p) * kVec;
  }
  int64_t padded() const {
    return vectors * kVec;
  }
  // Where panel p of a packed matrix begins.
  int64_t offset(int64_t p, int64_t depth) const {
    return column(p) * depth;
  }
  // Executed multiplications per useful one. The factor 1.2 accounts for the loads of single-vector panels.
  double waste() const {
    return static_cast<double>(padded()) / columns * (vectors == 1 ? 1.2 : 1);
  }
};

// Packs `depth` rows of panel p, element (k, column) = from[k * depth_stride + column * column_stride]. For a matrix of
// several taps, call it once per tap, with `to` at the tap's first row: offset(p, taps * depth) + tap * depth *
// width(p).
inline void pack_panel(
    float* to,
    const Panels& panels,
    int64_t p,
    const float* from,
    int64_t depth_stride,
    int64_t column_stride,
    int64_t depth) {
  const int64_t width = panels.width(p), count = std::min(width, panels.columns - panels.column(p));
  from += panels.column(p) * column_stride;
  if (depth_stride == 1 && column_stride != 1) {
    constexpr int64_t kSide = 16;
    for (int64_t k = 0; k < depth; k += kSide) {
      const int64_t rows = std::min(kSide, depth - k);
      for (int64_t c = 0; c < count; c += kSide) {
        at::vec::transpose_mxn<float>(
            from + c * column_stride + k, column_stride, to + k * width + c, width,
            static_cast<int>(std::min(kSide, count - c)), static_cast<int>(rows));
        for (int64_t i = c; i < std::min(c + kSide, count); ++i) {
          prefetch(from + i * column_stride + k + 4 * kSide);
        }
      }
    }
  } else if (column_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      std::copy_n(from + k * depth_stride, count, to + k * width);
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t c = 0; c < count; ++c) {
        to[k * width + c] = from[k * depth_stride + c * column_stride];
      }
    }
  }
  for (int64_t k = 0; count < width && k < depth; ++k) {
    std::fill(to + k * width + count, to + (k + 1) * width, 0.f);
  }
}

// The rows of A: element (row, tap t, k) = data[row * stride + taps[t] + k], k < depth. Without taps: one tap, at 0.
// For a dense convolution, rows are the pixels of one output row, `stride` is the convolution's stride times the
// channels, and each kernel row is a tap. A tap's rows of B begin at depths[t], or, without depths, where those of the
// previous tap end.
struct Rows {
  const float* data;
  int64_t stride;
  int64_t depth;
  const int64_t* taps = nullptr;
  int64_t tap_count = 1;
  const int64_t* depths = nullptr;

  Rows from(int64_t row) const {
    Rows rest = *this;
    rest.data += row * stride;
    return rest;
  }
};

template <int R, int V>
DSPNET_INLINE void clear(Vec (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      sums[r][v] = Vec(0);
    }
  }
}

// The arithmetic of a product: a lane of A and of B is an fp32 number.
struct Fp32 {
  using Number = float;
  static constexpr int kRows = 1; // of a matrix, whose numbers share a lane
  static constexpr auto& pack = pack_panel;

  // Stores the lanes of kRows rows.
  static DSPNET_INLINE void put(float* to, const Vec& row, const Vec& /* the next row */) {
    row.store(to);
  }

  // Lanes of a sum over `count` products.
  static constexpr int64_t lanes(int64_t count) {
    return count;
  }

  static DSPNET_INLINE void add(Vec& sum, const Vec& a, const Vec& b) {
    sum = at::vec::fmadd(a, b, sum);
  }
};

// sums[r] += a[r * row_stride] * b
template <typename Arithmetic, int R, int V>
DSPNET_INLINE void add_product(Vec (&sums)[R][V], const float* a, int64_t row_stride, const float* b) {
  Vec columns[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    columns[v] = Vec::loadu(b + v * kVec);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec value(a[r * row_stride]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      Arithmetic::add(sums[r][v], value, columns[v]);
    }
  }
}

// Thread-local memory that is reused between calls, because the first access to new pages is slow. Each `Use` has
// separate memory. The contents are undefined.
template <typename Use>
float* scratch(int64_t floats) {
  constexpr int64_t kAlign = 16; // floats in a cache line
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats + kAlign) {
    memory = std::vector<float>(); // frees before it allocates
    memory.resize(floats + kAlign);
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (round_up(address, kAlign * sizeof(float)) - address) / sizeof(float);
}

// Longer sums are split into partial sums of this length: rounding errors grow with the length of a chain of additions.
constexpr int64_t kChain = 256;
struct ParkedTile;

template <int R, int V>
DSPNET_INLINE void add_parked(Vec (&sums)[R][V], const float* parked) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      sums[r][v] = sums[r][v] + Vec::loadu(parked + (r * V + v) * kVec);
    }
  }
}

template <int R, int V>
DSPNET_INLINE void park(const Vec (&sums)[R][V], float* parked) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      sums[r][v].store(parked + (r * V + v) * kVec);
    }
  }
}

template <int V, int R, typename Arithmetic, typename Epilogue>
void multiply_tile(
    const Rows& a, int64_t row, const float* panel, int64_t column, float* parked, const Epilogue& epilogue) {
  Vec sums[R][V];
  clear(sums);
  bool begun = false;
  int64_t chain = 0;
  const float* rows = a.data + row * a.stride;
  for (int64_t t = 0; t < a.tap_count; ++t) {
    const float* from = a.taps ? rows + a.taps[t] : rows;
    const float* columns = panel + (a.depths ? a.depths[t] : t * a.depth) * V * kVec;
    for (int64_t k = 0; k < a.depth;) {
      const int64_t end = std::min(k + kChain, a.depth);
      if (chain > 0 && chain + end - k > kChain) {
        if (begun) {
          add_parked(sums, parked);
        }
        park(sums, parked);
        clear(sums);
        begun = true;
        chain = 0;
      }
      chain += end - k;
      for (; k < end; ++k) {
        add_product<Arithmetic>(sums, from + k, a.stride, columns);
        columns += V * kVec;
      }
    }
  }
  if (begun) {
    add_parked(sums, parked);
  }
  epilogue(row, column, sums);
}

// Multiplies tiles of R rows, then smaller tiles for the remaining rows.
template <int V, int R, typename Arithmetic = Fp32, typename Epilogue>
void multiply_rows(
    const Rows& a,
    int64_t row,
    int64_t end,
    const float* panel,
    int64_t column,
    float* parked,
    const Epilogue& epilogue) {
  for (; row + R <= end; row += R) {
    multiply_tile<V, R, Arithmetic>(a, row, panel, column, parked, epilogue);
  }
  if constexpr (R > 1) {
    if (row < end) {
      multiply_rows<V, R / 2, Arithmetic>(a, row, end, panel, column, parked, epilogue);
    }
  }
}

// Calls run(std::integral_constant<int, V>), V the vectors of a panel of this width.
template <int V = kPanelVectors, typename Run>
void with_vectors(int64_t width, const Run& run) {
  if constexpr (V > 1) {
    if (width < V * kVec) {
      return with_vectors<V - 1>(width, run);
    }
  }
  run(std::integral_constant<int, V>{});
}

// Multiplies `rows` rows of A by the panels [first, last) of B, packed with depth a.tap_count * a.depth. The order of
// tiles is by panel, then by row: the first tile of a panel holds row 0.
template <typename Arithmetic = Fp32, typename Epilogue>
void multiply(
    const Rows& a,
    int64_t rows,
    const float* packed,
    const Panels& panels,
    int64_t first,
    int64_t last,
    const Epilogue& epilogue) {
  float* parked = scratch<ParkedTile>(kRegisters * kVec);
  for (int64_t p = first; p < last; ++p) {
    const float* panel = packed + panels.offset(p, a.tap_count * a.depth);
    with_vectors(panels.width(p), [&](auto v) {
      multiply_rows<v, kTileRows<v>, Arithmetic>(a, 0, rows, panel, panels.column(p), parked, epilogue);
    });
  }
}

// For epilogues: calls run() for a full vector, which `whole` states at compile time, and run(count) for a partial one.
// AVX-512 always calls run(count): masked stores handle both, which halves the code.
template <typename Run>
DSPNET_INLINE void with_lanes([[maybe_unused]] bool whole, int64_t count, const Run& run) {
#if defined(CPU_CAPABILITY_AVX512)
  run(std::min(count, kVec));
#else
  if (whole || count >= kVec) {
    run();
  } else {
    run(count);
  }
#endif
}

// Rows of a matrix, `stride` floats apart. multiply_outer reads its B in whole vectors.
struct Matrix {
  const float* data;
  int64_t stride;
};

template <int V, int R, typename Arithmetic = Fp32, typename Epilogue>
void multiply_outer_tile(
    const Matrix& a, const Matrix& b, int64_t rows, int64_t i, int64_t column, const Epilogue& epilogue) {
  Vec sums[R][V];
  clear(sums);
  const float* values = a.data + i;
  const float* columns = b.data + column;
  for (int64_t row = 0; row < rows; ++row) {
    add_product<Arithmetic>(sums, values, 1, columns);
    values += a.stride;
    columns += b.stride;
  }
  epilogue(i, column, sums);
}

template <int V, int R, typename Arithmetic, typename Epilogue>
void multiply_outer_panel(
    const Matrix& a, const Matrix& b, int64_t rows, int64_t i, int64_t end, int64_t column, const Epilogue& epilogue) {
  for (; i + R <= end; i += R) {
    multiply_outer_tile<V, R, Arithmetic>(a, b, rows, i, column, epilogue);
  }
  if constexpr (R > 1) {
    if (i < end) {
      multiply_outer_panel<V, R - 1, Arithmetic>(a, b, rows, i, end, column, epilogue);
    }
  }
}

// Multiplies A's columns [0, height) by B's columns in panels [first, last), summed over `rows` rows of both.
template <typename Arithmetic = Fp32, typename Epilogue>
void multiply_outer(
    const Matrix& a,
    int64_t height,
    const Matrix& b,
    const Panels& panels,
    int64_t first,
    int64_t last,
    int64_t rows,
    const Epilogue& epilogue) {
  for (int64_t p = first; p < last; ++p) {
    with_vectors(panels.width(p), [&](auto v) {
      multiply_outer_panel<v, kTileRows<v>, Arithmetic>(a, b, rows, 0, height, panels.column(p), epilogue);
    });
  }
}

// Epilogue: adds a tile to a matrix in whole vectors, or, with `begins`, overwrites it.
struct AddToMatrix {
  float* to;
  int64_t stride;
  bool begins;

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t i, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* row = to + (i + r) * stride + column;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        (begins ? sums[r][v] : Vec::loadu(row + v * kVec) + sums[r][v]).store(row + v * kVec);
      }
    }
  }
};

} // namespace dspnet::CPU_CAPABILITY
