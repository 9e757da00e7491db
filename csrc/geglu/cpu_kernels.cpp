#include "geglu/kernels.h"

#include "common/vec.h"

namespace dreamkernels::geglu::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

// y = h g Phi(g), Phi and phi the standard normal distribution and density.
template <class E>
DK_INLINE Vec gated(Vec hidden, Vec gate) {
  return hidden * (gate * standard_normal<E>(gate).cdf);
}

template <class E>
void forward(const E* x, E* y, int64_t width, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row, x += 2 * width, y += width) {
    int64_t i = 0;
    for (; i + 2 * Vec::width <= width; i += 2 * Vec::width) {
      const Two hidden = load_two(x + i), gate = load_two(x + width + i);
      store_two(y + i, {gated<E>(hidden.a, gate.a), gated<E>(hidden.b, gate.b)});
    }
    for_each_vector(width - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
      const int64_t at = i + offset;
      store(y + at, gated<E>(load(x + at, extent), load(x + width + at, extent)), extent);
    });
  }
}

// grad_h = grad_y g Phi(g)      grad_g = grad_y h (Phi(g) + g phi(g))
struct Gradients {
  Vec hidden, gate;
};
template <class E>
DK_INLINE Gradients gradients(Vec grad, Vec hidden, Vec gate) {
  const StandardNormal normal = standard_normal<E>(gate);
  return {grad * (gate * normal.cdf), grad * hidden * fma(gate, normal.density, normal.cdf)};
}

template <class E>
void backward(const E* grad_y, const E* x, E* grad_x, int64_t width, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row, grad_y += width, x += 2 * width, grad_x += 2 * width) {
    int64_t i = 0;
    for (; i + 2 * Vec::width <= width; i += 2 * Vec::width) {
      const Two grad = load_two(grad_y + i), hidden = load_two(x + i), gate = load_two(x + width + i);
      const Gradients a = gradients<E>(grad.a, hidden.a, gate.a), b = gradients<E>(grad.b, hidden.b, gate.b);
      store_two(grad_x + i, {a.hidden, b.hidden});
      store_two(grad_x + width + i, {a.gate, b.gate});
    }
    for_each_vector(width - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
      const int64_t at = i + offset;
      const Gradients g = gradients<E>(load(grad_y + at, extent), load(x + at, extent), load(x + width + at, extent));
      store(grad_x + at, g.hidden, extent);
      store(grad_x + width + at, g.gate, extent);
    });
  }
}

}  // namespace

void forward_rows(Element element, const void* x, void* y, int64_t width, int64_t begin_row, int64_t end_row) {
  with_element(element, [&]<class E>(E*) {
    forward(static_cast<const E*>(x) + begin_row * 2 * width, static_cast<E*>(y) + begin_row * width, width,
            end_row - begin_row);
  });
}

void backward_rows(Element element, const void* grad_y, const void* x, void* grad_x, int64_t width, int64_t begin_row,
                   int64_t end_row) {
  with_element(element, [&]<class E>(E*) {
    backward(static_cast<const E*>(grad_y) + begin_row * width, static_cast<const E*>(x) + begin_row * 2 * width,
             static_cast<E*>(grad_x) + begin_row * 2 * width, width, end_row - begin_row);
  });
}

}  // namespace dreamkernels::geglu::DK_ISA
