// Sixteen numbers at a time, on AVX-512, on AVX2, or in plain C++ that a compiler vectorises.
//
// Everything above this file is written once in these terms. Two properties matter there:
//   * an operation on lane i depends on lane i only, so a row never depends on its neighbours;
//   * `sum` and `largest` reduce in one fixed order.
//
// Pairs are sixteen times two neighbouring weights (k, k + 1), one pair for each output column,
// multiplied by one pair of activations: the shape of AVX512-BF16's vdpbf16ps. Without that
// instruction a pair is two vectors of floats and `dot2` is two fused multiply-adds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ROOST_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ROOST_AVX2 1
#endif
#if defined(ROOST_AVX512) && defined(__AVX512BF16__)
#define ROOST_BF16 1
#endif
#if defined(ROOST_AVX512) || defined(ROOST_AVX2)
#include <immintrin.h>
#endif

#define ROOST_INLINE inline __attribute__((always_inline))

// Cases of a switch from a number of rows to the kernel compiled for it.
#define ROOST_FOR_1_TO_12(CASE) \
  CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)

namespace roost {

constexpr int kLanes = 16;

using bf16 = uint16_t;
using half = uint16_t;

ROOST_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

ROOST_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

ROOST_INLINE float from_bf16(bf16 value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// Round to nearest even; NaN stays NaN.
ROOST_INLINE bf16 to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>(bits >> 16 | 0x40);
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// IEEE half to float, exact, subnormals included.
ROOST_INLINE float from_half(half value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t magnitude = value & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;
  return from_bits(sign | to_bits(scaled));
}

// Float to IEEE half, round to nearest even; beyond its range infinity.
inline half to_half(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<half>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<half>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded bits at the bottom
    return static_cast<half>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<half>(sign | (rounded - 0x38000000) >> 13);
}

// -- Floats: sixteen floats ----------------------------------------------------------------

#if defined(ROOST_AVX512)

struct Floats {
  __m512 v;
};

ROOST_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
ROOST_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
ROOST_INLINE Floats splat(float a) { return {_mm512_set1_ps(a)}; }
ROOST_INLINE Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
ROOST_INLINE Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
ROOST_INLINE Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
ROOST_INLINE Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
ROOST_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ROOST_INLINE Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
ROOST_INLINE Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
ROOST_INLINE Floats nearest(Floats a) { return {_mm512_roundscale_ps(a.v, 8)}; }
ROOST_INLINE Floats power_of_2(Floats n) {  // n whole, -126 .. 127
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
ROOST_INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
ROOST_INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
// Lanes first .. end - 1 of a, `other` elsewhere.
ROOST_INLINE Floats keep(Floats a, int first, int end, Floats other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 mask =
      _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first)), lane,
                                   _mm512_set1_epi32(end));
  return {_mm512_mask_blend_ps(mask, other.v, a.v)};
}
ROOST_INLINE Floats load_half(const half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
ROOST_INLINE Floats load_bf16(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

#elif defined(ROOST_AVX2)

struct Floats {
  __m256 a, b;
};

ROOST_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ROOST_INLINE void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
ROOST_INLINE Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ROOST_INLINE Floats add(Floats x, Floats y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
ROOST_INLINE Floats sub(Floats x, Floats y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
ROOST_INLINE Floats mul(Floats x, Floats y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
ROOST_INLINE Floats div(Floats x, Floats y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
ROOST_INLINE Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
ROOST_INLINE Floats larger(Floats x, Floats y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
ROOST_INLINE Floats smaller(Floats x, Floats y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
ROOST_INLINE Floats nearest(Floats x) {
  return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)};
}
ROOST_INLINE __m256 power_of_2(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
ROOST_INLINE Floats power_of_2(Floats n) { return {power_of_2(n.a), power_of_2(n.b)}; }
ROOST_INLINE float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
ROOST_INLINE float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
ROOST_INLINE __m256 keep(__m256 x, __m256i lane, int first, int end, __m256 other) {
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
  const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_andnot_si256(below, inside)));
}
ROOST_INLINE Floats keep(Floats x, int first, int end, Floats other) {
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  return {keep(x.a, low, first, end, other.a), keep(x.b, high, first, end, other.b)};
}
ROOST_INLINE Floats load_half(const half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
ROOST_INLINE __m256 widen_bf16(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
ROOST_INLINE Floats load_bf16(const bf16* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }

#else

struct Floats {
  float v[kLanes];
};

template <class F>
ROOST_INLINE Floats lanes(F f) {
  Floats out;
  for (int i = 0; i < kLanes; i++) out.v[i] = f(i);
  return out;
}
ROOST_INLINE Floats load(const float* p) {
  return lanes([=](int i) { return p[i]; });
}
ROOST_INLINE void store(float* p, Floats a) { memcpy(p, a.v, sizeof a.v); }
ROOST_INLINE Floats splat(float a) {
  return lanes([=](int) { return a; });
}
ROOST_INLINE Floats add(Floats a, Floats b) {
  return lanes([=](int i) { return a.v[i] + b.v[i]; });
}
ROOST_INLINE Floats sub(Floats a, Floats b) {
  return lanes([=](int i) { return a.v[i] - b.v[i]; });
}
ROOST_INLINE Floats mul(Floats a, Floats b) {
  return lanes([=](int i) { return a.v[i] * b.v[i]; });
}
ROOST_INLINE Floats div(Floats a, Floats b) {
  return lanes([=](int i) { return a.v[i] / b.v[i]; });
}
ROOST_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return lanes([=](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
ROOST_INLINE Floats larger(Floats a, Floats b) {
  return lanes([=](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
ROOST_INLINE Floats smaller(Floats a, Floats b) {
  return lanes([=](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
ROOST_INLINE Floats nearest(Floats a) {
  return lanes([=](int i) { return std::nearbyint(a.v[i]); });
}
ROOST_INLINE Floats power_of_2(Floats n) {
  return lanes([=](int i) { return from_bits(static_cast<uint32_t>(n.v[i] + 127.f) << 23); });
}
ROOST_INLINE float sum(Floats a) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
  return a.v[0];
}
ROOST_INLINE float largest(Floats a) {
  float out = a.v[0];
  for (int i = 1; i < kLanes; i++) out = a.v[i] > out ? a.v[i] : out;
  return out;
}
ROOST_INLINE Floats keep(Floats a, int first, int end, Floats other) {
  return lanes([=](int i) { return first <= i && i < end ? a.v[i] : other.v[i]; });
}
ROOST_INLINE Floats load_half(const half* p) {
  return lanes([=](int i) { return from_half(p[i]); });
}
ROOST_INLINE Floats load_bf16(const bf16* p) {
  return lanes([=](int i) { return from_bf16(p[i]); });
}

#endif

ROOST_INLINE void store_bf16(bf16* p, Floats a) {
#if defined(ROOST_BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
  float values[kLanes];
  store(values, a);
  for (int i = 0; i < kLanes; i++) p[i] = to_bf16(values[i]);
#endif
}

// Beyond half's range the largest half; NaN stays NaN.
ROOST_INLINE void store_half(half* p, Floats a) {
  a = larger(splat(-65504.f), smaller(splat(65504.f), a));
#if defined(ROOST_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(ROOST_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.a, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.b, 0));
#else
  float values[kLanes];
  store(values, a);
  for (int i = 0; i < kLanes; i++) p[i] = to_half(values[i]);
#endif
}

// e^x, relative error below 2e-7, 1.6e-38 below -87, NaN of NaN. Cephes' expf polynomial.
ROOST_INLINE Floats exponential(Floats x) {
  x = larger(splat(-87.f), x);  // in this order NaN stays
  const Floats n = nearest(mul(x, splat(1.44269504f)));
  const Floats r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  Floats p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, splat(1.f)));
  return mul(p, power_of_2(smaller(n, splat(127.f))));
}

// -- Pairs: sixteen times two weights ------------------------------------------------------

#if defined(ROOST_BF16)

using Pairs = __m512bh;

ROOST_INLINE Pairs pairs_of_bf16(const void* p) { return (Pairs)_mm512_loadu_si512(p); }

// 32 signed bytes, pair after pair; every int8 is a bf16.
ROOST_INLINE Pairs pairs_of_int8(const int8_t* p) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
  return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)),
                             _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)));
}

// Four times 32 nibbles in 64 bytes: pair `step` of a 32-bit lane is bits 4 * step .. + 3 and
// 16 + 4 * step .. + 3 of the lane rotated right by 3. Here a nibble q becomes the bf16 16 + q, by
// its place in the mantissa of 16.0: one operation on any port, where a table takes a shuffle.
struct Nibbles {
  __m512i packed;
};
constexpr float kNibbleBias = 16.f;
ROOST_INLINE Nibbles load_nibbles(const void* p) { return {_mm512_loadu_si512(p)}; }
template <int kStep>
ROOST_INLINE Pairs pairs_of_nibbles(Nibbles n) {
  const __m512i in_place = kStep == 0 ? n.packed : _mm512_ror_epi32(n.packed, 4 * kStep);
  return (Pairs)_mm512_ternarylogic_epi32(in_place, _mm512_set1_epi16(0x0078),
                                          _mm512_set1_epi16(0x4180), 0xea);  // (a & b) | c
}

ROOST_INLINE Floats dot2(Floats acc, Pairs w, const bf16* x) {
  int pair;
  memcpy(&pair, x, 4);
  return {_mm512_dpbf16_ps(acc.v, w, (__m512bh)_mm512_set1_epi32(pair))};
}

#else

struct Pairs {
  Floats even, odd;
};

ROOST_INLINE Pairs split_pairs(const float* values) {
  float even[kLanes], odd[kLanes];
  for (int i = 0; i < kLanes; i++) {
    even[i] = values[2 * i];
    odd[i] = values[2 * i + 1];
  }
  return {load(even), load(odd)};
}

ROOST_INLINE Pairs pairs_of_bf16(const void* p) {
  uint32_t bits[kLanes];
  float even[kLanes], odd[kLanes];
  memcpy(bits, p, sizeof bits);
  for (int i = 0; i < kLanes; i++) {
    even[i] = from_bits(bits[i] << 16);
    odd[i] = from_bits(bits[i] & 0xffff0000);
  }
  return {load(even), load(odd)};
}

ROOST_INLINE Pairs pairs_of_int8(const int8_t* p) {
  float values[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; i++) values[i] = p[i];
  return split_pairs(values);
}

struct Nibbles {
  uint32_t packed[kLanes];
};
constexpr float kNibbleBias = 0.f;
ROOST_INLINE Nibbles load_nibbles(const void* p) {
  Nibbles n;
  memcpy(n.packed, p, sizeof n.packed);
  for (int i = 0; i < kLanes; i++) n.packed[i] = n.packed[i] >> 3 | n.packed[i] << 29;
  return n;
}
template <int kStep>
ROOST_INLINE Pairs pairs_of_nibbles(const Nibbles& n) {
  float even[kLanes], odd[kLanes];
  for (int i = 0; i < kLanes; i++) {
    even[i] = static_cast<float>(n.packed[i] >> 4 * kStep & 15);
    odd[i] = static_cast<float>(n.packed[i] >> (16 + 4 * kStep) & 15);
  }
  return {load(even), load(odd)};
}

ROOST_INLINE Floats dot2(Floats acc, Pairs w, const bf16* x) {
  return fma(w.odd, splat(from_bf16(x[1])), fma(w.even, splat(from_bf16(x[0])), acc));
}

#endif

}  // namespace roost
