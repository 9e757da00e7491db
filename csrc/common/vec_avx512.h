// AVX-512 (F, BW, DQ, VL): 16 floats; masked loads and stores for the tail. The level avx512bf16 adds native bfloat16 products.
#pragma once
#include <immintrin.h>

#include <cstring>

namespace dreamkernels::DK_ISA {

struct Vec {
  static constexpr int width = 16;
  __m512 v;
  Vec() : v(_mm512_setzero_ps()) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  explicit Vec(__m512 x) : v(x) {}
};

DK_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.v, b.v)); }
DK_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.v, b.v)); }
DK_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.v, b.v)); }
DK_INLINE Vec operator/(Vec a, Vec b) { return Vec(_mm512_div_ps(a.v, b.v)); }
DK_INLINE Vec max(Vec a, Vec b) { return Vec(_mm512_max_ps(a.v, b.v)); }
DK_INLINE Vec min(Vec a, Vec b) { return Vec(_mm512_min_ps(a.v, b.v)); }
DK_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.v, b.v, c.v)); }
DK_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
DK_INLINE float maximum(Vec a) { return _mm512_reduce_max_ps(a.v); }
DK_INLINE Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return Vec(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), otherwise.v, then.v));
}
DK_INLINE Vec lane_numbers() {
  return Vec(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
DK_INLINE Vec round_to_integer(Vec a) { return Vec(_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
DK_INLINE Vec times_power_of_two(Vec a, Vec n) { return Vec(_mm512_scalef_ps(a.v, n.v)); }

DK_INLINE __mmask16 mask_of(Tail tail) { return static_cast<__mmask16>((1u << tail.count) - 1u); }

DK_INLINE Vec from_bits(__m256i bits, BFloat16) {
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
}
DK_INLINE Vec from_bits(__m256i bits, Half) { return Vec(_mm512_cvtph_ps(bits)); }

// In integers rather than with vcvtneps2bf16: that instruction flushes denormals, needs a newer processor, and is no faster
// where memory is the limit.
DK_INLINE __m512i rounded_bf16_bits(Vec a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
DK_INLINE __m256i to_bits(Vec a, BFloat16) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bf16_bits(a), 16)); }
DK_INLINE __m256i to_bits(Vec a, Half) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

DK_INLINE Vec load(const float* p, Full) { return Vec(_mm512_loadu_ps(p)); }
DK_INLINE Vec load(const float* p, Tail t) { return Vec(_mm512_maskz_loadu_ps(mask_of(t), p)); }
DK_INLINE void store(float* p, Vec a, Full) { _mm512_storeu_ps(p, a.v); }
DK_INLINE void store(float* p, Vec a, Tail t) { _mm512_mask_storeu_ps(p, mask_of(t), a.v); }

template <class E>
DK_INLINE Vec load(const E* p, Full) {
  return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), E{});
}
template <class E>
DK_INLINE Vec load(const E* p, Tail t) {
  return from_bits(_mm256_maskz_loadu_epi16(mask_of(t), p), E{});
}
template <class E>
DK_INLINE void store(E* p, Vec a, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(a, E{}));
}
template <class E>
DK_INLINE void store(E* p, Vec a, Tail t) {
  _mm256_mask_storeu_epi16(p, mask_of(t), to_bits(a, E{}));
}

template <class E>
DK_INLINE Vec round_to(Vec a) {
  return from_bits(to_bits(a, E{}), E{});
}
template <>
DK_INLINE Vec round_to<float>(Vec a) {
  return a;
}
template <>
DK_INLINE Vec round_to<BFloat16>(Vec a) {
  return Vec(_mm512_castsi512_ps(_mm512_and_si512(rounded_bf16_bits(a), _mm512_set1_epi32(static_cast<int>(0xffff0000u)))));
}

// Pairs of bfloat16 in 32-bit lanes.
struct Pairs {
  __m512i v;
};
DK_INLINE Pairs load_pairs(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }
DK_INLINE void store_pairs(BFloat16* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
DK_INLINE Pairs broadcast_pair(const BFloat16* p) {
  int32_t both;
  std::memcpy(&both, p, sizeof both);
  return {_mm512_set1_epi32(both)};
}
DK_INLINE Vec first_of(Pairs a) { return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))); }
DK_INLINE Vec second_of(Pairs a) {
  return Vec(_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))));
}
#if DK_VEC_LEVEL == 513
DK_INLINE Pairs pairs_of(Vec first, Vec second) {
  const __m512i all_first_then_all_second = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v));
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i interleave = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  return {_mm512_permutexvar_epi16(interleave, all_first_then_all_second)};
}
DK_INLINE Vec dot(Pairs a, Pairs b, Vec c) {
  return Vec(_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v)));
}
#else
DK_INLINE Pairs pairs_of(Vec first, Vec second) {
  return {_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded_bf16_bits(first), 16), rounded_bf16_bits(second))};
}
DK_INLINE Vec dot(Pairs a, Pairs b, Vec c) {
  return fma(first_of(a), first_of(b), fma(second_of(a), second_of(b), c));
}
#endif

DK_INLINE Vec approximate_reciprocal(Vec a) { return Vec(_mm512_rcp14_ps(a.v)); }

}  // namespace dreamkernels::DK_ISA
