#include "swiglu/kernels.h"

#include "common/vec.h"

namespace dreamkernels::swiglu::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

// Calls f(row, first column, columns) for every piece of a row in the given blocks. A piece ends where its block does, so that which
// elements form a vector does not depend on the number of threads.
template <class F>
DK_INLINE void for_each_piece(int64_t width, int64_t elements, int64_t begin_block, int64_t end_block, F&& f) {
  for (int64_t block = begin_block; block < end_block; ++block) {
    int64_t begin = block * block_elements;
    const int64_t end = begin + block_elements < elements ? begin + block_elements : elements;
    for (int64_t row = begin / width, column = begin % width; begin < end; ++row, column = 0) {
      const int64_t count = width - column < end - begin ? width - column : end - begin;
      f(row, column, count);
      begin += count;
    }
  }
}

template <class E>
DK_INLINE E* at(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<E*>(rows.data) + row * rows.stride + column;
}

DK_INLINE Vec forward_of(Vec g, Vec u) { return g / (Vec(1.0f) + exp(Vec(0.0f) - g)) * u; }

// y = g s u with s = 1 / (1 + e^-g):  grad_u = grad_y g s,  grad_g = grad_y u s (1 + g (1 - s)).
struct Gradients {
  Vec gate, up;
};
DK_INLINE Gradients gradients_of(Vec grad_y, Vec g, Vec u) {
  const Vec s = sigmoid(g);
  const Vec scaled = grad_y * s;
  return {scaled * u * fma(g, Vec(1.0f) - s, Vec(1.0f)), scaled * g};
}

template <class E>
DK_INLINE void forward_piece(const E* gate, const E* up, E* y, int64_t count) {
  int64_t i = 0;
  for (; i + 2 * Vec::width <= count; i += 2 * Vec::width) {
    const Two g = load_two(gate + i), u = load_two(up + i);
    store_two(y + i, {forward_of(g.a, u.a), forward_of(g.b, u.b)});
  }
  for_each_vector(count - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
    store(y + i + offset, forward_of(load(gate + i + offset, extent), load(up + i + offset, extent)), extent);
  });
}

template <class E>
DK_INLINE void backward_piece(const E* grad_y, const E* gate, const E* up, E* grad_gate, E* grad_up, int64_t count) {
  int64_t i = 0;
  for (; i + 2 * Vec::width <= count; i += 2 * Vec::width) {
    const Two d = load_two(grad_y + i), g = load_two(gate + i), u = load_two(up + i);
    const Gradients a = gradients_of(d.a, g.a, u.a), b = gradients_of(d.b, g.b, u.b);
    store_two(grad_gate + i, {a.gate, b.gate});
    store_two(grad_up + i, {a.up, b.up});
  }
  for_each_vector(count - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
    const int64_t k = i + offset;
    const Gradients made = gradients_of(load(grad_y + k, extent), load(gate + k, extent), load(up + k, extent));
    store(grad_gate + k, made.gate, extent);
    store(grad_up + k, made.up, extent);
  });
}

}  // namespace

void forward(Element element, const Forward& job, int64_t begin_block, int64_t end_block) {
  with_element(element, [&]<class E>(E*) {
    for_each_piece(job.width, job.elements, begin_block, end_block, [&](int64_t row, int64_t column, int64_t count) {
      forward_piece(at<const E>(job.gate, row, column), at<const E>(job.up, row, column), at<E>(job.y, row, column), count);
    });
  });
}

void backward(Element element, const Backward& job, int64_t begin_block, int64_t end_block) {
  with_element(element, [&]<class E>(E*) {
    for_each_piece(job.width, job.elements, begin_block, end_block, [&](int64_t row, int64_t column, int64_t count) {
      backward_piece(at<const E>(job.grad_y, row, column), at<const E>(job.gate, row, column), at<const E>(job.up, row, column),
                     at<E>(job.grad_gate, row, column), at<E>(job.grad_up, row, column), count);
    });
  });
}

}  // namespace dreamkernels::swiglu::DK_ISA
