// AVX2 with FMA and F16C: 8 floats; the tail goes through a buffer of one vector.
#pragma once
#include <immintrin.h>

#include <cstring>

namespace dreamkernels::DK_ISA {

struct Vec {
  static constexpr int width = 8;
  __m256 v;
  Vec() : v(_mm256_setzero_ps()) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
  explicit Vec(__m256 x) : v(x) {}
};

DK_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, b.v)); }
DK_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.v, b.v)); }
DK_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.v, b.v)); }
DK_INLINE Vec operator/(Vec a, Vec b) { return Vec(_mm256_div_ps(a.v, b.v)); }
DK_INLINE Vec max(Vec a, Vec b) { return Vec(_mm256_max_ps(a.v, b.v)); }
DK_INLINE Vec min(Vec a, Vec b) { return Vec(_mm256_min_ps(a.v, b.v)); }
DK_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.v, b.v, c.v)); }
DK_INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
DK_INLINE float maximum(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
DK_INLINE Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return Vec(_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
DK_INLINE Vec lane_numbers() { return Vec(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)); }
DK_INLINE Vec round_to_integer(Vec a) { return Vec(_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
DK_INLINE __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
DK_INLINE Vec times_power_of_two(Vec a, Vec n) {  // in two factors: 2^n alone would leave the range of normal floats
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return Vec(_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half))));
}

DK_INLINE Vec from_bits(__m128i bits, BFloat16) {
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
}
DK_INLINE Vec from_bits(__m128i bits, Half) { return Vec(_mm256_cvtph_ps(bits)); }

DK_INLINE __m256i rounded_bf16_bits(Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
DK_INLINE __m128i to_bits(Vec a, BFloat16) {
  const __m256i high = _mm256_srli_epi32(rounded_bf16_bits(a), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);  // undo the pack within 128-bit halves
  return _mm256_castsi256_si128(packed);
}
DK_INLINE __m128i to_bits(Vec a, Half) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

DK_INLINE Vec load(const float* p, Full) { return Vec(_mm256_loadu_ps(p)); }
DK_INLINE void store(float* p, Vec a, Full) { _mm256_storeu_ps(p, a.v); }

template <class E>
DK_INLINE Vec load(const E* p, Full) {
  return from_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), E{});
}
template <class E>
DK_INLINE void store(E* p, Vec a, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bits(a, E{}));
}

template <class E>
DK_INLINE Vec load(const E* p, Tail t) {
  E buffer[Vec::width] = {};
  std::memcpy(buffer, p, t.count * sizeof(E));
  return load(buffer, Full{});
}
template <class E>
DK_INLINE void store(E* p, Vec a, Tail t) {
  E buffer[Vec::width];
  store(buffer, a, Full{});
  std::memcpy(p, buffer, t.count * sizeof(E));
}

template <class E>
DK_INLINE Vec round_to(Vec a) {
  return from_bits(to_bits(a, E{}), E{});
}
template <>
DK_INLINE Vec round_to<float>(Vec a) {
  return a;
}

// Pairs of bfloat16 in 32-bit lanes.
struct Pairs {
  __m256i v;
};
DK_INLINE Pairs load_pairs(const BFloat16* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
DK_INLINE void store_pairs(BFloat16* p, Pairs a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
DK_INLINE Pairs broadcast_pair(const BFloat16* p) {
  int32_t both;
  std::memcpy(&both, p, sizeof both);
  return {_mm256_set1_epi32(both)};
}
DK_INLINE Vec first_of(Pairs a) { return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))); }
DK_INLINE Vec second_of(Pairs a) {
  return Vec(_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))));
}
DK_INLINE Pairs pairs_of(Vec first, Vec second) {
  return {_mm256_blend_epi16(_mm256_srli_epi32(rounded_bf16_bits(first), 16), rounded_bf16_bits(second), 0b10101010)};
}
DK_INLINE Vec dot(Pairs a, Pairs b, Vec c) {
  return fma(first_of(a), first_of(b), fma(second_of(a), second_of(b), c));
}

// The instruction's 12 bits would be too few.
DK_INLINE Vec approximate_reciprocal(Vec a) { return Vec(1.0f) / a; }

}  // namespace dreamkernels::DK_ISA
