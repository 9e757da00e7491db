#include "linear_cross_entropy/kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "common/vec.h"

namespace dreamkernels::linear_cross_entropy::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Lanes beyond a tail become `value`, so that they change no maximum.
DK_INLINE Vec fill_tail(Vec v, Full, float) { return v; }
DK_INLINE Vec fill_tail(Vec v, Tail t, float value) {
  return select_less(lane_numbers(), Vec(static_cast<float>(t.count)), v, Vec(value));
}

// With t = tanh(logit / softcap) the capped logit is softcap * t; without a cap it is the logit.
//
// Three walks over a row, which stays in the second-level cache: the maximum, the exponentials and their sum, the gradient. The
// exponentials (with a cap: t, from which they are made again) wait in `held`.
template <class E, bool kCap>
DK_INLINE float largest_of_row(const E* logits, float* held, int64_t vocabulary, float softcap) {
  Vec largest[4];
  for (Vec& part : largest) part = Vec(-kInfinity);
  const Vec inverse(1.0f / softcap), cap(softcap);
  auto step = [&](int64_t i, Vec& part, auto extent) __attribute__((always_inline)) {
    Vec v = load(logits + i, extent);
    if constexpr (kCap) {
      const Vec t = tanh(v * inverse);
      store(held + i, t, extent);
      v = t * cap;
    }
    part = max(fill_tail(v, extent, -kInfinity), part);
  };
  int64_t i = 0;
  for (; i + 4 * Vec::width <= vocabulary; i += 4 * Vec::width) {
    for (int k = 0; k < 4; ++k) step(i + k * Vec::width, largest[k], Full{});
  }
  for (; i + Vec::width <= vocabulary; i += Vec::width) step(i, largest[0], Full{});
  if (i < vocabulary) step(i, largest[0], Tail{static_cast<int>(vocabulary - i)});
  return maximum(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

template <class E, bool kCap, bool kHold>
DK_INLINE float exponentials_of_row(const E* logits, float* held, int64_t vocabulary, float softcap, float largest) {
  Vec sums[4];
  const Vec cap(softcap), shift(largest);
  auto step = [&](int64_t i, Vec& part, auto extent) __attribute__((always_inline)) {
    const Vec v = kCap ? load(held + i, extent) * cap : load(logits + i, extent);
    const Vec e = exp(fill_tail(v - shift, extent, -kInfinity));
    if constexpr (kHold && !kCap) store(held + i, e, extent);
    part = part + e;
  };
  int64_t i = 0;
  for (; i + 4 * Vec::width <= vocabulary; i += 4 * Vec::width) {
    for (int k = 0; k < 4; ++k) step(i + k * Vec::width, sums[k], Full{});
  }
  for (; i + Vec::width <= vocabulary; i += Vec::width) step(i, sums[0], Full{});
  if (i < vocabulary) step(i, sums[0], Tail{static_cast<int>(vocabulary - i)});
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class E>
DK_INLINE float element_at(const E* p) {
  float lanes[Vec::width];
  store(lanes, load(p, Tail{1}), Full{});
  return lanes[0];
}

template <class E>
DK_INLINE void set_element(E* p, float value) {
  store(p, Vec(value), Tail{1});
}

// loss = lse - logit[target] + z_loss lse^2;  d loss / d logit[v] = softmax[v] (1 + 2 z_loss lse) - (v == target), and with a
// cap times 1 - t^2.
template <class E, bool kCap, bool kGradient>
void rows(const Rows& job, int64_t begin, int64_t end) {
  const int64_t vocabulary = job.vocabulary;
  const bool hold = kCap || kGradient;
  const std::unique_ptr<float[]> held(hold ? new float[vocabulary] : nullptr);
  const Vec cap(job.softcap), one(1.0f);
  for (int64_t row = begin; row < end; ++row) {
    E* logits = static_cast<E*>(job.logits) + row * vocabulary;
    const int64_t target = job.targets[row];
    const float largest = largest_of_row<E, kCap>(logits, held.get(), vocabulary, job.softcap);
    const float total = exponentials_of_row<E, kCap, kGradient>(logits, held.get(), vocabulary, job.softcap, largest);
    const float target_tanh = kCap ? held[target] : 0.0f;
    const double target_logit = kCap ? target_tanh * job.softcap : element_at(logits + target);
    const double lse = largest + std::log(static_cast<double>(total));
    if (job.losses) job.losses[row] = static_cast<float>(lse - target_logit + job.z_loss * lse * lse);
    if constexpr (!kGradient) continue;
    const double scale = job.factors[row], of_softmax = scale * (1.0 + 2.0 * job.z_loss * lse) / total;
    const Vec factor(static_cast<float>(of_softmax)), shift(largest);
    for_each_vector(vocabulary, [&](int64_t i, auto extent) __attribute__((always_inline)) {
      Vec e = load(held.get() + i, extent);
      if constexpr (kCap) {
        const Vec t = e;
        e = exp(t * cap - shift) * (one - t * t);
      }
      store(logits + i, e * factor, extent);
    });
    const double e = kCap ? std::exp(target_logit - largest) : held[target];
    set_element(logits + target, static_cast<float>((e * of_softmax - scale) * (1.0 - double(target_tanh) * target_tanh)));
  }
}

DK_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
DK_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Plain loops, which the compiler turns into vectors.
template <bool kFirst, bool kLast>
void accumulate_split(const Accumulate& job, int64_t begin, int64_t end) {
  const uint16_t* __restrict part = static_cast<const uint16_t*>(job.part);
  uint16_t* __restrict high = static_cast<uint16_t*>(job.total);
  uint16_t* __restrict low = static_cast<uint16_t*>(job.low);
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t before = static_cast<uint32_t>(high[i]) << 16 | (kFirst ? 0u : low[i]);
    const float total = float_of(before) + float_of(static_cast<uint32_t>(part[i]) << 16);
    const uint32_t bits = bits_of(total);
    if constexpr (kLast) {
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      high[i] = total != total ? uint16_t{0x7fc0} : static_cast<uint16_t>(rounded);
    } else {
      high[i] = static_cast<uint16_t>(bits >> 16);
      low[i] = static_cast<uint16_t>(bits);
    }
  }
}

template <class E>
void accumulate_wide(const Accumulate& job, int64_t begin, int64_t end) {
  const E* part = static_cast<const E*>(job.part) + begin;
  E* total = static_cast<E*>(job.total) + begin;
  float* low = static_cast<float*>(job.low) + begin;
  for_each_vector(end - begin, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    const Vec added = (job.first ? load(total + i, extent) : load(low + i, extent)) + load(part + i, extent);
    job.last ? store(total + i, added, extent) : store(low + i, added, extent);
  });
}

}  // namespace

void loss_rows(Element element, const Rows& job, int64_t begin, int64_t end) {
  with_element(element, [&]<class E>(E*) {
    if (job.softcap != 0.0f) {
      job.factors ? rows<E, true, true>(job, begin, end) : rows<E, true, false>(job, begin, end);
    } else {
      job.factors ? rows<E, false, true>(job, begin, end) : rows<E, false, false>(job, begin, end);
    }
  });
}

void accumulate(Element element, const Accumulate& job, int64_t begin, int64_t end) {
  with_element(element, [&]<class E>(E*) {
    if (element != Element::bfloat16) return accumulate_wide<E>(job, begin, end);
    if (job.first) {
      job.last ? accumulate_split<true, true>(job, begin, end) : accumulate_split<true, false>(job, begin, end);
    } else {
      job.last ? accumulate_split<false, true>(job, begin, end) : accumulate_split<false, false>(job, begin, end);
    }
  });
}

void scale(Element element, void* x, float factor, int64_t begin, int64_t end) {
  with_element(element, [&]<class E>(E*) {
    E* values = static_cast<E*>(x) + begin;
    for_each_vector(end - begin, [&](int64_t i, auto extent) __attribute__((always_inline)) {
      store(values + i, load(values + i, extent) * Vec(factor), extent);
    });
  });
}

}  // namespace dreamkernels::linear_cross_entropy::DK_ISA
