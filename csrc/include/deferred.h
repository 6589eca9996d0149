// Deferred normalisation (dspnet_fast/ops/deferred.py): operators compute h = act(scale x + shift) * gate while loading
// x. Computation is in fp32; activations are stored as scalar_t, float or at::BFloat16.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstring>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

// Functions pass vectors in registers only if they are inlined.
#define DSPNET_INLINE inline __attribute__((always_inline))

namespace dspnet::inline CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kVec = Vec::size(); // floats: 16 with AVX-512, 4 on aarch64, 8 otherwise

enum class Act { identity, relu, relu6, hardswish, silu, gelu, gelu_tanh };

// scale, shift: [rows, C] with rows 1 or the number of views, or null with rows = 0. gate: [N, C] or null.
struct Deferred {
  const float* scale = nullptr;
  const float* shift = nullptr;
  int64_t rows = 0;
  Act act = Act::identity;
  const float* gate = nullptr;

  // The row for image n of `images`.
  int64_t row(int64_t n, int64_t images) const {
    return rows > 1 ? n / (images / rows) : 0;
  }
  // Those of image n, [C] each, or null.
  const float* scale_of(int64_t n, int64_t images, int64_t channels) const {
    return rows ? scale + row(n, images) * channels : nullptr;
  }
  const float* shift_of(int64_t n, int64_t images, int64_t channels) const {
    return rows ? shift + row(n, images) * channels : nullptr;
  }
  const float* gate_of(int64_t n, int64_t channels) const {
    return gate ? gate + n * channels : nullptr;
  }
};

// 1 / (1 + exp(-z))
DSPNET_INLINE Vec sigmoid(const Vec& z) {
  return Vec(1) / (Vec(1) + z.neg().exp());
}

// exp(-z^2 / 2)
DSPNET_INLINE Vec gaussian(const Vec& z) {
  return (z * z * Vec(-0.5f)).exp();
}

// The distribution function of the standard normal distribution, (1 + erf(z / sqrt(2))) / 2, within 7.5e-8:
// Abramowitz and Stegun, 7.1.26. `power` is gaussian(z).
DSPNET_INLINE Vec normal_cdf(const Vec& z, const Vec& power) {
  const Vec t = Vec(1) / at::vec::fmadd(z.abs(), Vec(0.3275911f * 0.70710678f), Vec(1));
  Vec sum = at::vec::fmadd(t, Vec(0.5f * 1.061405429f), Vec(0.5f * -1.453152027f));
  sum = at::vec::fmadd(t, sum, Vec(0.5f * 1.421413741f));
  sum = at::vec::fmadd(t, sum, Vec(0.5f * -0.284496736f));
  sum = at::vec::fmadd(t, sum, Vec(0.5f * 0.254829592f));
  const Vec tail = sum * t * power; // that of -|z|
#if defined(CPU_CAPABILITY_AVX512)
  return Vec(_mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(z, Vec(0), _CMP_GT_OQ), Vec(1), tail));
#else
  return Vec::blendv(tail, Vec(1) - tail, z > Vec(0));
#endif
}

// The factor of z in GELU's tanh approximation: sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)).
constexpr float kGeluLinear = 1.5957691216f, kGeluCubic = 0.044715f * kGeluLinear;
DSPNET_INLINE Vec gelu_sigmoid(const Vec& z) {
  return sigmoid(z * at::vec::fmadd(z * z, Vec(kGeluCubic), Vec(kGeluLinear)));
}

template <Act act>
DSPNET_INLINE Vec activate(const Vec& z) {
  if constexpr (act == Act::relu) {
    return at::vec::maximum(z, Vec(0));
  } else if constexpr (act == Act::relu6) {
    return at::vec::clamp(z, Vec(0), Vec(6));
  } else if constexpr (act == Act::hardswish) {
    return z * at::vec::clamp(z + Vec(3), Vec(0), Vec(6)) * Vec(1.f / 6);
  } else if constexpr (act == Act::silu) {
    return z * sigmoid(z);
  } else if constexpr (act == Act::gelu) {
    return z * normal_cdf(z, gaussian(z));
  } else if constexpr (act == Act::gelu_tanh) {
    return z * gelu_sigmoid(z);
  } else {
    return z;
  }
}

// act'(z)
template <Act act>
DSPNET_INLINE Vec activation_gradient(const Vec& z) {
  if constexpr (act == Act::relu) {
#if defined(CPU_CAPABILITY_AVX512)
    return Vec(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, Vec(0), _CMP_GT_OQ), Vec(1)));
#else
    return Vec::blendv(Vec(0), Vec(1), z > Vec(0));
#endif
  } else if constexpr (act == Act::relu6) {
#if defined(CPU_CAPABILITY_AVX512)
    const __mmask16 positive = _mm512_cmp_ps_mask(z, Vec(0), _CMP_GT_OQ);
    return Vec(_mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(positive, z, Vec(6), _CMP_LT_OQ), Vec(1)));
#else
    return Vec::blendv(Vec(0), Vec::blendv(Vec(0), Vec(1), z < Vec(6)), z > Vec(0));
#endif
  } else if constexpr (act == Act::silu) {
    const Vec s = sigmoid(z);
    return s * at::vec::fmadd(z, Vec(1) - s, Vec(1));
  } else if constexpr (act == Act::gelu) {
    const Vec power = gaussian(z);
    return at::vec::fmadd(z * Vec(0.39894228f), power, normal_cdf(z, power)); // density power / sqrt(2 pi)
  } else if constexpr (act == Act::gelu_tanh) {
    const Vec s = gelu_sigmoid(z);
    const Vec slope = at::vec::fmadd(z * z, Vec(3 * kGeluCubic), Vec(kGeluLinear));
    return s * at::vec::fmadd(z * slope, Vec(1) - s, Vec(1));
  } else if constexpr (act == Act::hardswish) {
    const Vec middle = at::vec::fmadd(z, Vec(1.f / 3), Vec(0.5f));
#if defined(CPU_CAPABILITY_AVX512)
    const Vec low = Vec(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, Vec(-3), _CMP_NLT_UQ), middle));
    return Vec(_mm512_mask_mov_ps(low, _mm512_cmp_ps_mask(z, Vec(3), _CMP_GT_OQ), Vec(1)));
#else
    return Vec::blendv(Vec::blendv(middle, Vec(0), z < Vec(-3)), Vec(1), z > Vec(3));
#endif
  } else {
    return Vec(1);
  }
}

// Calls run(std::integral_constant<Act, act>) for an act known only at run time.
template <typename Run>
auto with_act(Act act, const Run& run) {
  switch (act) {
    case Act::relu:
      return run(std::integral_constant<Act, Act::relu>{});
    case Act::relu6:
      return run(std::integral_constant<Act, Act::relu6>{});
    case Act::silu:
      return run(std::integral_constant<Act, Act::silu>{});
    case Act::hardswish:
      return run(std::integral_constant<Act, Act::hardswish>{});
    case Act::gelu:
      return run(std::integral_constant<Act, Act::gelu>{});
    case Act::gelu_tanh:
      return run(std::integral_constant<Act, Act::gelu_tanh>{});
    default:
      return run(std::integral_constant<Act, Act::identity>{});
  }
}

// Prefetches into the L2 cache, also memory that will be written. Passes over tensors that alternate with work on
// scratch need it, because the hardware prefetcher does not run ahead of them. The address may be past the tensor.
template <typename scalar_t>
DSPNET_INLINE void prefetch(const scalar_t* from) {
  __builtin_prefetch(from, 0, 2);
}

// Loads kVec values as fp32.
DSPNET_INLINE Vec load(const float* from) {
  return Vec::loadu(from);
}
DSPNET_INLINE Vec load(const at::BFloat16* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16)));
#elif defined(CPU_CAPABILITY_AVX2)
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16)));
#else
  float upcast[kVec];
  for (int64_t i = 0; i < kVec; ++i) {
    upcast[i] = from[i];
  }
  return Vec::loadu(upcast);
#endif
}

// Loads `count` <= kVec values as fp32; the other lanes are zero.
DSPNET_INLINE Vec load(const float* from, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  return Vec(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
#else
  return Vec::loadu(from, count);
#endif
}
DSPNET_INLINE Vec load(const at::BFloat16* from, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
#else
  at::BFloat16 padded[kVec] = {};
  std::memcpy(padded, from, count * sizeof(*from));
  return load(padded);
#endif
}

// Stores kVec or `count` values, rounded to the type, and returns what load() would return.
DSPNET_INLINE Vec store(float* to, const Vec& value) {
  value.store(to);
  return value;
}
DSPNET_INLINE Vec store(float* to, const Vec& value, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), value);
#else
  value.store(to, count);
#endif
  return value;
}
#if defined(CPU_CAPABILITY_AVX512)
// Rounds to bfloat16, nearest even, in the lower half of each lane. NaN stays NaN.
DSPNET_INLINE __m512i to_bfloat16(const Vec& value) {
  // Masked intrinsics: GCC 12 warns about its own header in the others.
  constexpr __mmask16 all = 0xffff;
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(all, bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 ordered = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  return _mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), ordered, rounded, 16);
}
#elif defined(CPU_CAPABILITY_AVX2)
DSPNET_INLINE __m256i to_bfloat16(const Vec& value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i ordered = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_ORD_Q));
  return _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), _mm256_srli_epi32(rounded, 16), ordered);
}
#endif
DSPNET_INLINE Vec store(at::BFloat16* to, const Vec& value, int64_t count = kVec) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i lanes = to_bfloat16(value);
  const __m256i halves = _mm512_maskz_cvtepi32_epi16(0xffff, lanes);
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), halves);
  return Vec(_mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, lanes, 16)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lanes = to_bfloat16(value);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  if (count == kVec) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  } else {
    std::memcpy(to, &halves, count * sizeof(*to));
  }
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(lanes, 16)));
#else
  float upcast[kVec];
  value.store(upcast);
  for (int64_t i = 0; i < kVec; ++i) {
    const at::BFloat16 rounded = upcast[i];
    if (i < count) {
      to[i] = rounded;
    }
    upcast[i] = rounded;
  }
  return Vec::loadu(upcast);
#endif
}

} // namespace dspnet::CPU_CAPABILITY
