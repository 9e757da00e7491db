// What forward and backward share between the product of queries and keys and the exponential: masks, scale and soft cap.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention/kernels.h"
#include "attention/multiply.h"

namespace dreamkernels::attention::DK_ISA {

constexpr float kHidden = -1e38f;      // a hidden score; finite, so that differences of two are
constexpr float kLeastScore = -1e30f;  // below every visible score, above every hidden one
constexpr float kLog2E = 1.44269504f;

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// A group of kRows keys beside a block of queries.
class Mask {
 public:
  Mask(const Visibility& visibility, int64_t queries, int64_t keys)
      : nearest_(visibility.nearest), farthest_(visibility.farthest), offset_(keys - queries), keys_(keys) {
    for (int k = 0; k < 2 * Vec::width; ++k) {
      from_nearest_[k] = k < Vec::width ? -1.0f : 0.0f;
      to_farthest_[k] = k <= Vec::width ? 0.0f : -1.0f;
    }
    to_farthest_[2 * Vec::width] = -1.0f;
  }

  // The keys that some query of the block sees.
  Range visible(int64_t first_query, int64_t queries) const {
    const int64_t begin = first_query + offset_ - farthest_, end = first_query + queries - 1 + offset_ - nearest_ + 1;
    return {std::max<int64_t>(0, begin), std::min(keys_, end)};
  }

  // How many keys each of Vec::width queries sees.
  Vec visible_keys(int64_t first_query) const {
    float counts[Vec::width];
    for (int lane = 0; lane < Vec::width; ++lane) {
      const Range seen = visible(first_query + lane, 1);
      counts[lane] = static_cast<float>(std::max<int64_t>(0, seen.end - seen.begin));
    }
    return load(counts, Full{});
  }

  bool all_visible(int64_t key, int64_t first_query, int64_t queries) const {
    const int64_t nearest = first_query + offset_ - (key + kRows - 1), farthest = first_query + queries - 1 + offset_ - key;
    return nearest >= nearest_ && farthest <= farthest_ && key + kRows <= keys_;
  }

  // The scores of one key and Vec::width queries, with kHidden, whatever they were, in the place of hidden ones.
  DK_INLINE Vec hide(Vec scores, int64_t key, int64_t first_query) const {
    if (key >= keys_) return Vec(kHidden);
    constexpr int64_t w = Vec::width;
    const int64_t distance = first_query + offset_ - key;  // of the first lane
    const int64_t near = std::clamp<int64_t>(distance - nearest_, -w, 0), far = std::clamp<int64_t>(distance - farthest_, -w, 1);
    const Vec hidden = load(from_nearest_ + w + near, Full{}) + load(to_farthest_ + w + far, Full{});
    return select_less(hidden, Vec(0.0f), Vec(kHidden), scores);
  }

 private:
  int64_t nearest_, farthest_, offset_, keys_;
  // 0 or, where hidden, -1; [w + x] is a key at distance nearest + x or farthest + x.
  float from_nearest_[2 * Vec::width];
  float to_farthest_[2 * Vec::width + 1];
};

// The product rounded on its own: the compiler would fuse it with a following sum, and equal scores would differ by a rounding.
DK_INLINE Vec rounded_product(Vec a, Vec b) {
  Vec product = a * b;
#if DK_VEC_LEVEL >= 512
  asm("" : "+v"(product.v));
#elif DK_VEC_LEVEL == 2
  asm("" : "+x"(product.v));
#endif
  return product;
}

// Scores are kept as the product leaves them where scaling can wait for the exponent, which is nearly always.
struct Scaling {
  bool at_once;      // a soft cap needs scaled scores, and a maximum needs a positive factor
  float scale;       // applied at once
  float softcap;     // 0: none
  float to_natural;  // from kept scores to exponents of e
  float to_log2;     // ... and of two

  Scaling(float requested, float softcap)
      : at_once(softcap > 0 || !(requested > 1e-6f && requested < 1e6f)),
        scale(requested),
        softcap(softcap),
        to_natural(at_once ? 1.0f : requested),
        to_log2(to_natural * kLog2E) {}

  // e^(score - maximum), where `shift` is shift_of(maximum), and e^(score - lse). Float32 rounds where a plain softmax does, so that
  // it is as exact and the only visible key has probability 1; where the result is rounded to bfloat16, one fused operation does.
  template <class A>
  DK_INLINE Vec relative_to_maximum(Vec score, Vec shift) const {
    if constexpr (A::pack == 1) return exp(rounded_product(score, Vec(to_natural)) - shift);
    return coarse_exp2(fma(score, Vec(to_log2), Vec(0.0f) - shift));
  }
  template <class A>
  DK_INLINE Vec shift_of(Vec maximum) const {
    return rounded_product(maximum, Vec(A::pack == 1 ? to_natural : to_log2));
  }
  template <class A>
  DK_INLINE Vec relative_to_lse(Vec score, Vec lse) const {
    if constexpr (A::pack == 1) return exp(rounded_product(score, Vec(to_natural)) - lse);
    return coarse_exp2(fma(score, Vec(to_log2), Vec(0.0f) - lse * Vec(kLog2E)));
  }
};

// cap tanh(scaled / cap); `slope` receives the derivative with respect to the scaled score.
DK_INLINE Vec capped(Vec scaled, float cap, Vec& slope) {
  const Vec t = tanh(scaled * Vec(1.0f / cap));
  slope = fma(Vec(0.0f) - t, t, Vec(1.0f));
  return t * Vec(cap);
}

}  // namespace dreamkernels::attention::DK_ISA
