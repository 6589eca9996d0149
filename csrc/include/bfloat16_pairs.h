// Products of bfloat16 numbers, summed in fp32 by vdpbf16ps (AVX512_BF16): arithmetic and layouts for gemm.h.
//
// A lane is a pair of numbers that follow each other in the dimension that a product sums over: columns of A in
// multiply(), rows of both matrices in multiply_outer(). The lower half is the first. The instruction adds the products
// of both pairs to a lane of the sum, so it needs half as many steps as fp32. The compiler may use AVX512_BF16 nowhere
// else: the AVX-512 build must run on processors without it, so these functions are assembler.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <type_traits>

#include "gemm.h"

namespace dspnet::inline CPU_CAPABILITY {

// How form() writes rows for Fp32: [rows][stride].
struct Fp32Rows {
  float* data;
  int64_t stride;

  template <int R>
  DSPNET_INLINE void store(int64_t row, int64_t c, const Vec (&values)[R]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      values[r].store(data + (row + r) * stride + c);
    }
  }
};

#if defined(CPU_CAPABILITY_AVX512)

// Whether this process uses the instruction: DSPNET_AVX512_BF16=0 switches it off.
inline bool multiplies_bfloat16() {
  static const bool has = [] {
    const char* setting = std::getenv("DSPNET_AVX512_BF16");
    return __builtin_cpu_supports("avx512bf16") && !(setting && std::string_view(setting) == "0");
  }();
  return has;
}

// Rounds to nearest even: 16 numbers of `first`, then 16 of `second`. Subnormal numbers become zero.
DSPNET_INLINE __m512i round_both(const Vec& first, const Vec& second) {
  __m512i rounded;
  asm("vcvtne2ps2bf16 %1, %2, %0"
      : "=v"(rounded)
      : "v"(static_cast<__m512>(first)), "v"(static_cast<__m512>(second)));
  return rounded;
}

// Stores 16 pairs of a number from each half of round_both().
DSPNET_INLINE void store_pairs(float* to, __m512i rounded) {
  alignas(64) static constexpr uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order), rounded));
}

// How form() writes rows for BFloat16Pairs: as operand A of multiply(), as an operand of multiply_outer(), or as both.
struct PairedRows {
  float* adjacent_columns; // [rows][stride / 2], or null
  float* adjacent_rows; // [rows / 2][stride], an odd last row paired with zeros, or null
  int64_t stride; // a multiple of kVec

  // row: even.
  template <int R>
  DSPNET_INLINE void store(int64_t row, int64_t c, const Vec (&values)[R]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 2) {
      const __m512i rounded = round_both(values[r], r + 1 < R ? values[r + 1 < R ? r + 1 : r] : Vec(0));
      if (adjacent_columns) {
        float* to = adjacent_columns + ((row + r) * stride + c) / 2;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(rounded));
        if (r + 1 < R) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + stride / 2), _mm512_maskz_extracti64x4_epi64(0xf, rounded, 1));
        }
      }
      if (adjacent_rows) {
        store_pairs(adjacent_rows + (row + r) / 2 * stride + c, rounded);
      }
    }
  }
};

struct UnpairedPanel;

// Stores pairs of a number from each of two rows, or, without a second row, of a number and zero.
inline void pair_rows(float* to, const at::BFloat16* first, const at::BFloat16* second, int64_t count) {
  for (int64_t i = 0; i < count; i += kVec) {
    const auto lanes = static_cast<__mmask16>((1u << std::min(kVec, count - i)) - 1);
    __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, first + i));
    if (second) {
      const __m512i upper = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, second + i));
      pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(upper, 16));
    }
    _mm512_mask_storeu_epi32(to + i, lanes, pairs);
  }
}

struct BFloat16Pairs {
  using Number = at::BFloat16;
  using Layout = PairedRows;
  static constexpr int kRows = 2;

  static DSPNET_INLINE void put(float* to, const Vec& row, const Vec& next) {
    store_pairs(to, round_both(row, next));
  }

  static DSPNET_INLINE void add(Vec& sum, const Vec& a, const Vec& b) {
    __m512 lanes = sum;
    asm("vdpbf16ps %2, %1, %0" : "+v"(lanes) : "v"(static_cast<__m512>(a)), "v"(static_cast<__m512>(b)));
    sum = Vec(lanes);
  }

  static constexpr int64_t lanes(int64_t count) {
    return (count + 1) / 2;
  }

  // Packs a panel as pack_panel() does, with pairs of adjacent rows.
  static void pack(
      float* to,
      const Panels& panels,
      int64_t p,
      const float* from,
      int64_t depth_stride,
      int64_t column_stride,
      int64_t depth) {
    const int64_t width = panels.width(p);
    float* rows = scratch<UnpairedPanel>(width * depth);
    pack_panel(rows, panels, p, from, depth_stride, column_stride, depth);
    for (int64_t k = 0; k < depth; k += 2, rows += 2 * width, to += width) {
      for (int64_t c = 0; c < width; c += kVec) {
        put(to + c, Vec::loadu(rows + c), k + 1 < depth ? Vec::loadu(rows + width + c) : Vec(0));
      }
    }
  }
};

#endif

// Calls run(Arithmetic{}), with the arithmetic of the products for activations of this type.
template <typename scalar_t, typename Run>
void with_arithmetic(const Run& run) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (multiplies_bfloat16()) {
      return run(BFloat16Pairs{});
    }
  }
#endif
  run(Fp32{});
}

} // namespace dspnet::CPU_CAPABILITY
