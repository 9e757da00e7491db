#include "diffusion_loss/kernels.h"

#include <type_traits>

#include "common/vec.h"

namespace dreamkernels::diffusion_loss::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

template <class F>
void with_elements(Element wide, Element narrow, F&& f) {
  if (wide != Element::float32) {
    with_element(wide, [&]<class E>(E* e) { f(e, e); });
  } else {
    with_element(narrow, [&]<class E>(E* e) { f(static_cast<float*>(nullptr), e); });
  }
}

template <Target kind>
using As = std::integral_constant<Target, kind>;

template <class F>
void with_target(Target target, F&& f) {
  switch (target) {
    case Target::noise: return f(As<Target::noise>{});
    case Target::velocity: return f(As<Target::velocity>{});
    case Target::latents: return f(As<Target::latents>{});
  }
}

// prediction - target for the elements of a block.
template <Target kind, class W, class N>
struct Difference {
  const N* prediction;
  const W* latents;
  const W* noise;
  Vec signal, minus_sigma;

  DK_INLINE Difference(const Loss& job, const SampleRange& at)
      : prediction(static_cast<const N*>(job.prediction) + at.begin),
        latents(static_cast<const W*>(job.latents) + at.begin),
        noise(static_cast<const W*>(job.noise) + at.begin),
        signal(job.amplitudes[at.sample].signal),
        minus_sigma(-job.amplitudes[at.sample].sigma) {}

  template <class Extent>
  DK_INLINE Vec operator()(int64_t k, Extent extent) const {
    const Vec predicted = load(prediction + k, extent);
    if constexpr (kind == Target::noise) return predicted - load(noise + k, extent);
    if constexpr (kind == Target::latents) return predicted - load(latents + k, extent);
    if constexpr (kind == Target::velocity) {
      return predicted - fma(minus_sigma, load(latents + k, extent), signal * load(noise + k, extent));
    }
  }
};

}  // namespace

void add_noise(Element wide, Element narrow, const AddNoise& job, int64_t begin_item, int64_t end_item) {
  with_elements(wide, narrow, [&]<class W, class N>(W*, N*) {
    for_each_block(job.sample_elements, begin_item, end_item, [&](int64_t, const SampleRange& at) {
      const W* x = static_cast<const W*>(job.latents) + at.begin;
      const W* e = static_cast<const W*>(job.noise) + at.begin;
      N* noisy = static_cast<N*>(job.noisy) + at.begin;
      const Vec signal(job.amplitudes[at.sample].signal), sigma(job.amplitudes[at.sample].sigma);
      for_each_vector(at.count, [&](int64_t k, auto extent) __attribute__((always_inline)) {
        store(noisy + k, fma(signal, load(x + k, extent), sigma * load(e + k, extent)), extent);
      });
    });
  });
}

void squares(Element wide, Element narrow, const Loss& job, float* squares, int64_t begin_item, int64_t end_item) {
  with_elements(wide, narrow, [&]<class W, class N>(W*, N*) {
    with_target(job.target, [&]<Target kind>(As<kind>) {
      for_each_block(job.sample_elements, begin_item, end_item, [&](int64_t item, const SampleRange& at) {
        const Difference<kind, W, N> difference(job, at);
        // Sums of sums: as long chains of additions would lose more bits than PyTorch's pairwise ones.
        constexpr int64_t run = 16 * 2 * Vec::width;
        Vec total(0.0f);
        for (int64_t begin = 0; begin < at.count; begin += run) {
          const int64_t count = at.count - begin < run ? at.count - begin : run;
          Vec even(0.0f), odd(0.0f);  // two, so that one addition need not wait for the other
          int64_t k = 0;
          for (; k + 2 * Vec::width <= count; k += 2 * Vec::width) {
            const Vec a = difference(begin + k, Full{}), b = difference(begin + k + Vec::width, Full{});
            even = fma(a, a, even);
            odd = fma(b, b, odd);
          }
          for_each_vector(count - k, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
            const Vec a = difference(begin + k + offset, extent);
            even = fma(a, a, even);
          });
          total = total + (even + odd);
        }
        squares[item] = sum(total);
      });
    });
  });
}

void backward(Element wide, Element narrow, const Loss& job, const float* factors, void* grad, int64_t begin_item,
              int64_t end_item) {
  with_elements(wide, narrow, [&]<class W, class N>(W*, N*) {
    with_target(job.target, [&]<Target kind>(As<kind>) {
      for_each_block(job.sample_elements, begin_item, end_item, [&](int64_t, const SampleRange& at) {
        const Difference<kind, W, N> difference(job, at);
        N* to = static_cast<N*>(grad) + at.begin;
        const Vec factor(factors[at.sample]);
        for_each_vector(at.count, [&](int64_t k, auto extent) __attribute__((always_inline)) {
          store(to + k, factor * difference(k, extent), extent);
        });
      });
    });
  });
}

}  // namespace dreamkernels::diffusion_loss::DK_ISA
