// Owed normalisation, as dspnet_fast/ops/owed.py specifies it: h = act(scale x + shift) * gate, formed while x is read.
// Everything here computes in fp32; activations are stored as scalar_t, float or at::BFloat16.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

namespace dspnet {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kVec = Vec::size(); // floats: 16 with AVX-512, 8 otherwise

enum class Act { identity, relu, hardswish };

// scale, shift: [rows, C] with rows 1 or the number of views, or null with rows = 0. gate: [N, C] or null.
struct Owed {
  const float* scale = nullptr;
  const float* shift = nullptr;
  int64_t rows = 0;
  Act act = Act::identity;
  const float* gate = nullptr;

  // The row that serves image n of `images`.
  int64_t row(int64_t n, int64_t images) const {
    return rows > 1 ? n / (images / rows) : 0;
  }
};

template <Act act>
Vec activate(const Vec& z) {
  if constexpr (act == Act::relu) {
    return at::vec::maximum(z, Vec(0));
  } else if constexpr (act == Act::hardswish) {
    return z * at::vec::clamp(z + Vec(3), Vec(0), Vec(6)) * Vec(1.f / 6);
  } else {
    return z;
  }
}

// act'(z)
template <Act act>
Vec slope(const Vec& z) {
  if constexpr (act == Act::relu) {
    return Vec::blendv(Vec(0), Vec(1), z > Vec(0));
  } else if constexpr (act == Act::hardswish) {
    const Vec middle = at::vec::fmadd(z, Vec(1.f / 3), Vec(0.5f));
    return Vec::blendv(Vec::blendv(middle, Vec(0), z < Vec(-3)), Vec(1), z > Vec(3));
  } else {
    return Vec(1);
  }
}

// Calls run(std::integral_constant<Act, act>) for the act known only at run time.
template <typename Run>
auto with_act(Act act, const Run& run) {
  switch (act) {
    case Act::relu:
      return run(std::integral_constant<Act, Act::relu>{});
    case Act::hardswish:
      return run(std::integral_constant<Act, Act::hardswish>{});
    default:
      return run(std::integral_constant<Act, Act::identity>{});
  }
}

// kVec stored values as fp32.
inline Vec load(const float* from) {
  return Vec::loadu(from);
}
inline Vec load(const at::BFloat16* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16)));
#elif defined(CPU_CAPABILITY_AVX2)
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16)));
#else
  float wide[kVec];
  for (int64_t i = 0; i < kVec; ++i) {
    wide[i] = from[i];
  }
  return Vec::loadu(wide);
#endif
}

// The first `count` < kVec of them; the rest are zero.
inline Vec load(const float* from, int64_t count) {
  return Vec::loadu(from, count);
}
inline Vec load(const at::BFloat16* from, int64_t count) {
  at::BFloat16 padded[kVec] = {};
  for (int64_t i = 0; i < count; ++i) {
    padded[i] = from[i];
  }
  return load(padded);
}

inline void store(float* to, const Vec& value) {
  value.store(to);
}
inline void store(float* to, const Vec& value, int64_t count) {
  value.store(to, count);
}
// Rounds to the nearest even. NaN stays NaN.
inline void store(at::BFloat16* to, const Vec& value, int64_t count = kVec) {
  float wide[kVec];
  value.store(wide);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = wide[i];
  }
}

} // namespace CPU_CAPABILITY
} // namespace dspnet
