// Plain C++, for any processor. Eight floats in an array: the compiler vectorises the loops for its baseline instruction set, and
// sums over a row keep as many partial sums, hence as small an error, as the AVX2 level.
#pragma once
#include <cstring>

namespace dreamkernels::DK_ISA {

struct Vec {
  static constexpr int width = 8;
  float v[width] = {};
  Vec() = default;
  explicit Vec(float x) {
    for (float& lane : v) lane = x;
  }
};

DK_INLINE Vec operator+(Vec a, const Vec& b) {
  for (int k = 0; k < Vec::width; ++k) a.v[k] += b.v[k];
  return a;
}
DK_INLINE Vec operator-(Vec a, const Vec& b) {
  for (int k = 0; k < Vec::width; ++k) a.v[k] -= b.v[k];
  return a;
}
DK_INLINE Vec operator*(Vec a, const Vec& b) {
  for (int k = 0; k < Vec::width; ++k) a.v[k] *= b.v[k];
  return a;
}
DK_INLINE Vec operator/(Vec a, const Vec& b) {
  for (int k = 0; k < Vec::width; ++k) a.v[k] /= b.v[k];
  return a;
}
DK_INLINE Vec max(Vec a, const Vec& b) {
  for (int k = 0; k < Vec::width; ++k) a.v[k] = a.v[k] > b.v[k] ? a.v[k] : b.v[k];
  return a;
}
DK_INLINE Vec min(Vec a, const Vec& b) {
  for (int k = 0; k < Vec::width; ++k) a.v[k] = a.v[k] < b.v[k] ? a.v[k] : b.v[k];
  return a;
}
DK_INLINE Vec fma(Vec a, const Vec& b, const Vec& c) {
  for (int k = 0; k < Vec::width; ++k) a.v[k] = a.v[k] * b.v[k] + c.v[k];
  return a;
}
DK_INLINE float sum(const Vec& a) {
  return ((a.v[0] + a.v[1]) + (a.v[2] + a.v[3])) + ((a.v[4] + a.v[5]) + (a.v[6] + a.v[7]));
}
DK_INLINE float maximum(const Vec& a) {
  float largest = a.v[0];
  for (int k = 1; k < Vec::width; ++k) largest = largest > a.v[k] ? largest : a.v[k];
  return largest;
}
DK_INLINE Vec select_less(const Vec& a, const Vec& b, const Vec& then, const Vec& otherwise) {
  Vec chosen;
  for (int k = 0; k < Vec::width; ++k) chosen.v[k] = a.v[k] < b.v[k] ? then.v[k] : otherwise.v[k];
  return chosen;
}
DK_INLINE Vec lane_numbers() {
  Vec numbers;
  for (int k = 0; k < Vec::width; ++k) numbers.v[k] = static_cast<float>(k);
  return numbers;
}

DK_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
DK_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

DK_INLINE Vec round_to_integer(Vec a) {  // adding 1.5 * 2^23 leaves no bit for a fraction; enough below 2^22
  for (float& lane : a.v) lane = (lane + 0x1.8p23f) - 0x1.8p23f;
  return a;
}
DK_INLINE float power_of_two(int32_t n) { return bits_float(static_cast<uint32_t>(n + 127) << 23); }
DK_INLINE Vec times_power_of_two(Vec a, const Vec& n) {  // in two factors: 2^n alone would leave the range of normal floats
  for (int k = 0; k < Vec::width; ++k) {
    const int32_t whole = static_cast<int32_t>(n.v[k]), half = whole >> 1;
    a.v[k] = a.v[k] * power_of_two(half) * power_of_two(whole - half);
  }
  return a;
}

DK_INLINE float to_float(float x) { return x; }
DK_INLINE float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
DK_INLINE float to_float(Half x) {
  // Shift exponent and mantissa into place, then rescale by 2^112 (the difference of the exponent biases): this is exact for
  // normal and denormal numbers; only infinity and NaN need their exponent set.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_float(sign | 0x7f800000u | (magnitude & 0x007fffffu));
  return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
}

DK_INLINE void from_float(float x, float& to) { to = x; }
DK_INLINE void from_float(float x, BFloat16& to) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
  to.bits = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>(rounded >> 16);
}
DK_INLINE void from_float(float x, Half& to) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    bits = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below the smallest normal half: adding 0.5 leaves the half's denormal bits, correctly rounded, at the end of the mantissa.
    bits = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    bits = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | bits);
}

template <class E>
DK_INLINE Vec load(const E* p, Tail t) {
  Vec a;
  for (int k = 0; k < t.count; ++k) a.v[k] = to_float(p[k]);
  return a;
}
template <class E>
DK_INLINE void store(E* p, const Vec& a, Tail t) {
  for (int k = 0; k < t.count; ++k) from_float(a.v[k], p[k]);
}
template <class E>
DK_INLINE Vec load(const E* p, Full) {
  return load(p, Tail{Vec::width});
}
template <class E>
DK_INLINE void store(E* p, const Vec& a, Full) {
  store(p, a, Tail{Vec::width});
}

template <class E>
DK_INLINE Vec round_to(Vec a) {
  for (float& lane : a.v) {
    E rounded;
    from_float(lane, rounded);
    lane = to_float(rounded);
  }
  return a;
}

// Pairs of bfloat16 in 32-bit lanes.
struct Pairs {
  BFloat16 v[2 * Vec::width];
};
DK_INLINE Pairs load_pairs(const BFloat16* p) {
  Pairs a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
DK_INLINE void store_pairs(BFloat16* p, const Pairs& a) { std::memcpy(p, a.v, sizeof a.v); }
DK_INLINE Pairs broadcast_pair(const BFloat16* p) {
  Pairs a;
  for (int k = 0; k < 2 * Vec::width; ++k) a.v[k] = p[k & 1];
  return a;
}
DK_INLINE Vec first_of(const Pairs& a) {
  Vec first;
  for (int k = 0; k < Vec::width; ++k) first.v[k] = to_float(a.v[2 * k]);
  return first;
}
DK_INLINE Vec second_of(const Pairs& a) {
  Vec second;
  for (int k = 0; k < Vec::width; ++k) second.v[k] = to_float(a.v[2 * k + 1]);
  return second;
}
DK_INLINE Pairs pairs_of(const Vec& first, const Vec& second) {
  Pairs a;
  for (int k = 0; k < Vec::width; ++k) {
    from_float(first.v[k], a.v[2 * k]);
    from_float(second.v[k], a.v[2 * k + 1]);
  }
  return a;
}
DK_INLINE Vec dot(const Pairs& a, const Pairs& b, const Vec& c) {
  return fma(first_of(a), first_of(b), fma(second_of(a), second_of(b), c));
}

DK_INLINE Vec approximate_reciprocal(Vec a) { return Vec(1.0f) / a; }

}  // namespace dreamkernels::DK_ISA
