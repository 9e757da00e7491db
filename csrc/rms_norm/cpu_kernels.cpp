#include "rms_norm/kernels.h"

#include <cmath>

#include "common/vec.h"

namespace dreamkernels::rms_norm::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

// Row x -> sum of squares. With a residual, writes h = round(x + residual) first and sums the squares of that.
template <class E, bool kResidual>
DK_INLINE float squares_of_row(const E* x, const E* residual, E* h, int64_t width) {
  Vec squares[4];  // independent sums hide the latency of fma
  auto two = [&](int64_t i, Vec& a, Vec& b) __attribute__((always_inline)) {
    Two v = load_two(x + i);
    if constexpr (kResidual) {
      const Two r = load_two(residual + i);
      v = round_two_to<E>({v.a + r.a, v.b + r.b});
      store_two(h + i, v);
    }
    a = fma(v.a, v.a, a);
    b = fma(v.b, v.b, b);
  };
  int64_t i = 0;
  for (; i + 4 * Vec::width <= width; i += 4 * Vec::width) {
    two(i, squares[0], squares[1]);
    two(i + 2 * Vec::width, squares[2], squares[3]);
  }
  for_each_vector(width - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
    Vec v = load(x + i + offset, extent);
    if constexpr (kResidual) {
      v = round_to<E>(v + load(residual + i + offset, extent));
      store(h + i + offset, v, extent);
    }
    squares[0] = fma(v, v, squares[0]);
  });
  return sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

template <class E, bool kResidual>
void forward(const Forward& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  const E* weight = static_cast<const E*>(job.weight);
  for (int64_t row = begin; row < end; ++row) {
    const E* x = static_cast<const E*>(job.x) + row * width;
    const E* residual = kResidual ? static_cast<const E*>(job.residual) + row * width : nullptr;
    E* h = kResidual ? static_cast<E*>(job.new_residual) + row * width : nullptr;
    E* y = static_cast<E*>(job.y) + row * width;
    const float squares = squares_of_row<E, kResidual>(x, residual, h, width);
    const Vec rstd(static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + job.eps)));
    const E* normalised = kResidual ? h : x;
    // The row is in the first-level cache now. LLaMA rounds the normalised value before it is scaled.
    int64_t i = 0;
    for (; i + 2 * Vec::width <= width; i += 2 * Vec::width) {
      const Two v = load_two(normalised + i), w = load_two(weight + i);
      const Two rounded = round_two_to<E>({v.a * rstd, v.b * rstd});
      store_two(y + i, {rounded.a * w.a, rounded.b * w.b});
    }
    for_each_vector(width - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
      const int64_t at = i + offset;
      store(y + at, round_to<E>(load(normalised + at, extent) * rstd) * load(weight + at, extent), extent);
    });
  }
}

// y = x r w, r = (mean(x^2) + eps)^(-1/2).  With g = grad_y w:
//   grad_x = r g - x r^3 mean(g x)      grad_w = sum over rows of grad_y x r
struct RowFactors {
  Vec r;
  Vec minus_projection;  // -r^3 mean(g x)
};

template <class E>
DK_INLINE RowFactors factors_of_row(const E* grad_y, const E* x, const E* weight, int64_t width, double eps) {
  Vec squares[2], products[2];
  auto step = [&](int64_t i, int k, auto extent) __attribute__((always_inline)) {
    const Vec v = load(x + i, extent);
    squares[k] = fma(v, v, squares[k]);
    products[k] = fma(load(grad_y + i, extent) * load(weight + i, extent), v, products[k]);
  };
  int64_t i = 0;
  for (; i + 2 * Vec::width <= width; i += 2 * Vec::width) {
    step(i, 0, Full{});
    step(i + Vec::width, 1, Full{});
  }
  for (; i + Vec::width <= width; i += Vec::width) step(i, 0, Full{});
  if (i < width) step(i, 0, Tail{static_cast<int>(width - i)});
  // Once per row, so double costs nothing; it leaves the sums as the only inexact part of the factors.
  const double r = 1.0 / std::sqrt(sum(squares[0] + squares[1]) / static_cast<double>(width) + eps);
  const double projection = r * r * r * sum(products[0] + products[1]) / static_cast<double>(width);
  return {Vec(static_cast<float>(r)), Vec(static_cast<float>(-projection))};
}

// kRows rows at a time, so that the running weight sums are read and written once for all of them.
template <class E, int kRows, bool kResidual, bool kWeight>
DK_INLINE void backward_rows(const Backward& job, int64_t row, float* weight_sums) {
  const int64_t width = job.width;
  const E* grad_y = static_cast<const E*>(job.grad_y) + row * width;
  const E* grad_residual = kResidual ? static_cast<const E*>(job.grad_residual) + row * width : nullptr;
  const E* x = static_cast<const E*>(job.x) + row * width;
  const E* weight = static_cast<const E*>(job.weight);
  E* grad_x = static_cast<E*>(job.grad_x) + row * width;
  RowFactors factors[kRows];
  for (int k = 0; k < kRows; ++k) {
    factors[k] = factors_of_row(grad_y + k * width, x + k * width, weight, width, job.eps);
  }
  for_each_vector(width, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    const Vec w = load(weight + i, extent);
    Vec weight_sum;
    if constexpr (kWeight) weight_sum = load(weight_sums + i, extent);
    for (int k = 0; k < kRows; ++k) {
      const int64_t at = k * width + i;
      const Vec v = load(x + at, extent);
      const Vec scaled = load(grad_y + at, extent) * factors[k].r;
      Vec grad = fma(v, factors[k].minus_projection, scaled * w);
      if constexpr (kResidual) grad = grad + load(grad_residual + at, extent);
      store(grad_x + at, grad, extent);
      if constexpr (kWeight) weight_sum = fma(scaled, v, weight_sum);
    }
    if constexpr (kWeight) store(weight_sums + i, weight_sum, extent);
  });
}

template <class E, bool kResidual, bool kWeight>
void backward(const Backward& job, int64_t begin_chunk, int64_t end_chunk) {
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    float* weight_sums = kWeight ? job.weight_sums + chunk * job.width : nullptr;
    int64_t row = chunk * job.rows_per_chunk;
    const int64_t end = row + job.rows_per_chunk < job.rows ? row + job.rows_per_chunk : job.rows;
    for (; row + 4 <= end; row += 4) backward_rows<E, 4, kResidual, kWeight>(job, row, weight_sums);
    for (; row < end; ++row) backward_rows<E, 1, kResidual, kWeight>(job, row, weight_sums);
  }
}

}  // namespace

void forward_rows(Element element, const Forward& job, int64_t begin_row, int64_t end_row) {
  with_element(element, [&]<class E>(E*) {
    job.residual ? forward<E, true>(job, begin_row, end_row) : forward<E, false>(job, begin_row, end_row);
  });
}

void backward_chunks(Element element, const Backward& job, int64_t begin_chunk, int64_t end_chunk) {
  with_element(element, [&]<class E>(E*) {
    if (job.grad_residual) {
      job.weight_sums ? backward<E, true, true>(job, begin_chunk, end_chunk)
                      : backward<E, true, false>(job, begin_chunk, end_chunk);
    } else {
      job.weight_sums ? backward<E, false, true>(job, begin_chunk, end_chunk)
                      : backward<E, false, false>(job, begin_chunk, end_chunk);
    }
  });
}

void reduce_columns(Element element, const float* sums, int64_t chunks, int64_t width, void* grad_weight, int64_t begin,
                    int64_t end) {
  with_element(element, [&]<class E>(E*) {
    for_each_vector(end - begin, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
      const int64_t i = begin + offset;
      Vec total;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total = total + load(sums + chunk * width + i, extent);
      store(static_cast<E*>(grad_weight) + i, total, extent);
    });
  });
}

}  // namespace dreamkernels::rms_norm::DK_ISA
