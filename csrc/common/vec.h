// A vector of floats of the instruction set this file is compiled for (namespace DK_ISA), with conversions from and to tensor
// elements. All arithmetic is float32; bfloat16 and float16 round to nearest even when stored. Every level has this interface:
//
//   Vec::width                  floats per vector                    Vec(float)          the same float in every lane
//   load(p, Full{})             width elements at p                  store(p, v, Full{})
//   load(p, Tail{n})            the first n < width, others zero     store(p, v, Tail{n})
//   round_to<E>(v)              v at the precision of element type E
//   v + w, v - w, v * w, v / w, fma(a, b, c) = a * b + c
//   max(a, b), min(a, b)        lane by lane; b where one of them is NaN
//   sum(v), maximum(v)          over the lanes (maximum of NaN: unspecified)
//   select_less(a, b, t, e)     t where a < b, else e
//   lane_numbers()              0, 1, 2, ...
//   approximate_reciprocal(v)   1 / v with a relative error of at most 2^-14
//   round_to_integer(v)         to nearest even, |v| < 2^22      times_power_of_two(v, n)   v * 2^n, integral n in [-300, 250]
//   exp(v), sigmoid(v), tanh(v), power_of_two_for<E>(v), sigmoid_for<E>(v), standard_normal<E>(v) below
//
// Pairs holds 2 * Vec::width bfloat16 as Vec::width pairs: load_pairs(p), store_pairs(p, a), broadcast_pair(p) (one pair in
// every lane), pairs_of(v, w) (rounds; lane k is the pair v[k], w[k]), first_of(a), second_of(a), and
//   dot(a, b, c)                c + first(a) * first(b) + second(a) * second(b), lane by lane
// At the level avx512bf16 pairs_of and dot are instructions of the processor, which take denormals (below 1.2e-38) for zero.
//
// Two holds 2 * Vec::width elements in the order that converts fastest (for bfloat16: a has the even ones, b the odd ones):
// load_two(p), store_two(p, t), round_two_to<E>(t). What is combined must come from the same element type.
#pragma once
#include "common/elements.h"

#define DK_INLINE inline __attribute__((always_inline))

namespace dreamkernels {
struct Full {};
struct Tail {
  int count;
};
}  // namespace dreamkernels

#if DK_VEC_LEVEL >= 512
#include "common/vec_avx512.h"
#elif DK_VEC_LEVEL == 2
#include "common/vec_avx2.h"
#else
#include "common/vec_scalar.h"
#endif

namespace dreamkernels::DK_ISA {

struct Two {
  Vec a, b;
};
template <class E>
DK_INLINE Two load_two(const E* p) {
  return {load(p, Full{}), load(p + Vec::width, Full{})};
}
template <>
DK_INLINE Two load_two(const BFloat16* p) {
  const Pairs both = load_pairs(p);
  return {first_of(both), second_of(both)};
}
template <class E>
DK_INLINE void store_two(E* p, const Two& t) {
  store(p, t.a, Full{});
  store(p + Vec::width, t.b, Full{});
}
template <>
DK_INLINE void store_two(BFloat16* p, const Two& t) {
  store_pairs(p, pairs_of(t.a, t.b));
}
template <class E>
DK_INLINE Two round_two_to(const Two& t) {
  return {round_to<E>(t.a), round_to<E>(t.b)};
}
template <>
DK_INLINE Two round_two_to<BFloat16>(const Two& t) {
  const Pairs both = pairs_of(t.a, t.b);
  return {first_of(both), second_of(both)};
}

// Calls f(i, Full{}) for every full vector of `count` elements and f(i, Tail{n}) for a remainder.
template <class F>
DK_INLINE void for_each_vector(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) f(i, Full{});
  if (i < count) f(i, Tail{static_cast<int>(count - i)});
}

// e^v = 2^n e^r with n = round(v / ln 2), |r| <= ln(2) / 2, and e^r = 1 + r + r^2 p(r). The coefficients of p are a least-maximum
// fit: relative error 4e-9 before rounding, so the result is within one unit in the last place. Exact at the ends: e^-inf is 0,
// overflow is inf, NaN stays.
DK_INLINE Vec exp(Vec v) {
  v = max(Vec(-104.0f), min(Vec(89.0f), v));
  const Vec n = round_to_integer(v * Vec(1.44269504f));
  Vec r = fma(n, Vec(-0.693359375f), v);  // ln 2 in two parts, so that the difference is exact
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec p(0.001381459878757596f);
  p = fma(p, r, Vec(0.008368716575205326f));
  p = fma(p, r, Vec(0.04166838899254799f));
  p = fma(p, r, Vec(0.1666652113199234f));
  p = fma(p, r, Vec(0.4999999403953552f));
  return times_power_of_two(fma(r * r, p, r) + Vec(1.0f), n);
}

DK_INLINE Vec sigmoid(Vec v) { return Vec(1.0f) / (Vec(1.0f) + exp(Vec(0.0f) - v)); }

// 1 - 2 / (e^2v + 1) where that is at least 1/2; nearer to zero, where it would cancel, v - v^3 q(v^2).
DK_INLINE Vec tanh(Vec v) {
  const Vec far = Vec(1.0f) - Vec(2.0f) / (exp(v + v) + Vec(1.0f));
  const Vec square = v * v;
  Vec q(0.006205946672707796f);
  q = fma(q, square, Vec(-0.02102552354335785f));
  q = fma(q, square, Vec(0.05384168401360512f));
  q = fma(q, square, Vec(-0.13332490622997284f));
  q = fma(q, square, Vec(0.33333316445350647f));
  const Vec near = fma(v * square, Vec(0.0f) - q, v);
  return select_less(square, Vec(0.3125f), near, far);
}

template <int kTerms>
DK_INLINE Vec polynomial(const float (&coefficients)[kTerms], Vec x) {
  Vec sum(coefficients[kTerms - 1]);
  for (int k = kTerms - 2; k >= 0; --k) sum = fma(sum, x, Vec(coefficients[k]));
  return sum;
}

// 2^t for results that are stored as elements E: a relative error of 2e-9 before rounding, or where E has 16 bits of 2.7e-6 (rounding
// to E costs 2.4e-4 and more), and none from t. Beyond [-200, 200] as at its ends (0 and infinity); NaN stays.
template <class E>
DK_INLINE Vec power_of_two_for(Vec t) {
  constexpr float seven[] = {1.0f,
                             0.6931471824645996f,
                             0.24022646248340607f,
                             0.05550328269600868f,
                             0.009618490003049374f,
                             0.0013400063617154956f,
                             0.00015345697465818375f};
  constexpr float five[] = {0.9999992847442627f, 0.6931217312812805f, 0.24024753272533417f, 0.05591868609189987f,
                            0.009570006281137466f};
  t = max(Vec(-200.0f), min(Vec(200.0f), t));
  const Vec n = round_to_integer(t);
  if constexpr (sizeof(E) == sizeof(float)) {
    return times_power_of_two(polynomial(seven, t - n), n);
  } else {
    return times_power_of_two(polynomial(five, t - n), n);
  }
}

// sigmoid(v) for results that are stored as elements E: fewer instructions, and an error of 4 + 1.25 |v| units in the last place, or
// where E has 16 bits a relative error of 6.4e-5 (rounding to E costs 2.4e-4 and more).
template <class E>
DK_INLINE Vec sigmoid_for(Vec v) {
  const Vec denominator = Vec(1.0f) + power_of_two_for<E>(v * Vec(-1.44269504f));
  if constexpr (sizeof(E) == sizeof(float)) {
    return Vec(1.0f) / denominator;
  } else {
    return approximate_reciprocal(denominator);
  }
}

// The standard normal distribution at x: its distribution function cdf = (1 + erf(x / sqrt 2)) / 2 and its density. Exact GELU and
// its derivative need both, and both come from one exponential:
//   cdf(-|x|) = 2^t k p(k), t = -x^2 / (2 ln 2), k = 1 / (1 + c |x|)
// p is a least-maximum fit of erfc(u) e^(u^2): relative error 1.2e-8 before rounding. Unlike 1 + erf, the left tail keeps its relative
// precision: 8 + 1.25 x^2 units in the last place at most. For elements E of 16 bits the fit has fewer terms: 4.2e-6.
struct StandardNormal {
  Vec cdf, density;
};
template <class E>
DK_INLINE StandardNormal standard_normal(Vec x) {
  constexpr bool kFloat = sizeof(E) == sizeof(float);
  constexpr float nine[] = {0.10574156045913696f, 0.10524667054414749f, 0.10270091891288757f,
                            0.06031337380409241f, 0.13795243203639984f, -0.1163615733385086f,
                            0.21781399846076965f, -0.14422814548015594f, 0.030820753425359726f};
  constexpr float six[] = {0.12293057888746262f,  0.11857897788286209f, 0.1369328647851944f,
                           0.005910847801715136f, 0.19118106365203857f, -0.07553484290838242f};
  const Vec e = power_of_two_for<E>(x * x * Vec(-0.72134752f));
  const Vec k = Vec(1.0f) / fma(max(x, Vec(0.0f) - x), Vec(kFloat ? 0.265f : 0.3075f), Vec(1.0f));
  Vec p;
  if constexpr (kFloat) {
    p = polynomial(nine, k);
  } else {
    p = polynomial(six, k);
  }
  const Vec tail = e * (p * k);
  return {select_less(x, Vec(0.0f), tail, Vec(1.0f) - tail), e * Vec(0.398942280f)};
}

}  // namespace dreamkernels::DK_ISA
