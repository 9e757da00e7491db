#include "guided_step/kernels.h"

#include "common/vec.h"

namespace dreamkernels::guided_step::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

DK_INLINE float scale_of(const Step& job, int64_t sample) { return job.scales ? job.scales[sample] : job.scale; }

template <class P, class Extent>
DK_INLINE Vec guided(const P* unconditional, const P* conditional, int64_t k, Vec scale, Extent extent) {
  const Vec u = load(unconditional + k, extent);
  return fma(scale, load(conditional + k, extent) - u, u);
}

// NaN stays: max and min return their second argument where one is NaN.
DK_INLINE Vec clip(Vec v, Vec limit) { return max(Vec(0.0f) - limit, min(limit, v)); }

template <class L, class P>
DK_INLINE void step_block(const Step& job, const SampleRange& at) {
  const auto* x = static_cast<const L*>(job.latents) + at.begin;
  const auto* u = static_cast<const P*>(job.unconditional) + (job.unconditional ? at.begin : 0);
  const auto* c = static_cast<const P*>(job.conditional) + at.begin;
  const auto* noise = static_cast<const L*>(job.noise) + (job.noise ? at.begin : 0);
  const float* history = job.history + (job.history ? at.begin : 0);
  auto* next = static_cast<L*>(job.next) + at.begin;
  float* x0 = job.x0 + (job.x0 ? at.begin : 0);
  const Coefficients& by = job.coefficients;
  const Vec scale(scale_of(job, at.sample)), rescale(job.rescales ? job.rescales[at.sample] : 1.0f), limit(by.limit);
  for_each_vector(at.count, [&](int64_t k, auto extent) __attribute__((always_inline)) {
    const Vec latent = load(x + k, extent);
    Vec m = job.unconditional ? guided(u, c, k, scale, extent) : load(c + k, extent);
    if (job.rescales) m = m * rescale;
    const Vec clean = clip(fma(Vec(by.x0_from_latents), latent, Vec(by.x0_from_prediction) * m), limit);
    Vec sum = Vec(by.from_x0) * clean;
    if (by.from_latents != 0.0f) sum = fma(Vec(by.from_latents), latent, sum);
    if (by.from_prediction != 0.0f) sum = fma(Vec(by.from_prediction), m, sum);
    if (job.history) sum = fma(Vec(by.from_history), load(history + k, extent), sum);
    if (job.noise) sum = fma(Vec(by.from_noise), load(noise + k, extent), sum);
    store(next + k, sum, extent);
    if (job.x0) store(x0 + k, clean, extent);
  });
}

// Differences to the mean where there are elements; zero in the lanes behind the end.
DK_INLINE Vec difference(Vec v, Vec mean, Full) { return v - mean; }
DK_INLINE Vec difference(Vec v, Vec mean, Tail tail) {
  return select_less(lane_numbers(), Vec(static_cast<float>(tail.count)), v - mean, Vec(0.0f));
}

// Sums of the differences to a rounded mean, and of their squares: what the mean lacks is known from the first.
struct Sums {
  Vec differences{0.0f}, squares{0.0f};

  DK_INLINE void add(Vec d) {
    differences = differences + d;
    squares = fma(d, d, squares);
  }
  DK_INLINE void finish(float count, float& mean, float& squares_to_mean) const {
    const float lacking = sum(differences);
    squares_to_mean = sum(squares) - lacking * lacking / count;
    mean += lacking / count;
  }
};

template <class P>
DK_INLINE Moments moments_of_block(const Step& job, const SampleRange& at) {
  const auto* u = static_cast<const P*>(job.unconditional) + at.begin;
  const auto* c = static_cast<const P*>(job.conditional) + at.begin;
  const Vec scale(scale_of(job, at.sample));
  Vec sum_c(0.0f), sum_g(0.0f);
  for_each_vector(at.count, [&](int64_t k, auto extent) __attribute__((always_inline)) {
    sum_c = sum_c + load(c + k, extent);
    sum_g = sum_g + guided(u, c, k, scale, extent);
  });
  const float count = static_cast<float>(at.count);
  Moments found{sum(sum_c) / count, 0.0f, sum(sum_g) / count, 0.0f};
  const Vec mean_c(found.conditional_mean), mean_g(found.guided_mean);
  Sums of_c, of_g;
  for_each_vector(at.count, [&](int64_t k, auto extent) __attribute__((always_inline)) {
    of_c.add(difference(load(c + k, extent), mean_c, extent));
    of_g.add(difference(guided(u, c, k, scale, extent), mean_g, extent));
  });
  of_c.finish(count, found.conditional_mean, found.conditional_squares);
  of_g.finish(count, found.guided_mean, found.guided_squares);
  return found;
}

template <class L, class P>
void step_items(const Step& job, int64_t begin_item, int64_t end_item) {
  for_each_block(job.sample_elements, begin_item, end_item, [&](int64_t, const SampleRange& at) { step_block<L, P>(job, at); });
}

}  // namespace

void step(Element latents, Element prediction, const Step& job, int64_t begin_item, int64_t end_item) {
  if (latents != Element::float32) {
    with_element(latents, [&]<class E>(E*) { step_items<E, E>(job, begin_item, end_item); });
  } else {
    with_element(prediction, [&]<class E>(E*) { step_items<float, E>(job, begin_item, end_item); });
  }
}

void moments(Element prediction, const Step& job, Moments* found, int64_t begin_item, int64_t end_item) {
  with_element(prediction, [&]<class E>(E*) {
    for_each_block(job.sample_elements, begin_item, end_item,
                   [&](int64_t item, const SampleRange& at) { found[item] = moments_of_block<E>(job, at); });
  });
}

}  // namespace dreamkernels::guided_step::DK_ISA
