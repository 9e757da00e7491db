#include "layer_norm/kernels.h"

#include <cmath>

#include "common/vec.h"

namespace dreamkernels::layer_norm::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

// A row in steps of two pairs of vectors, so that four sums hide the latency of fma: f2(i, k) for 2 * Vec::width elements whose
// sums are k and k + 1, f1(i, extent) for a vector of the remainder.
template <class F2, class F1>
DK_INLINE void for_each_two(int64_t width, F2&& f2, F1&& f1) {
  int64_t i = 0;
  for (; i + 4 * Vec::width <= width; i += 4 * Vec::width) {
    f2(i, 0);
    f2(i + 2 * Vec::width, 2);
  }
  for_each_vector(width - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) { f1(i + offset, extent); });
}

DK_INLINE float total(const Vec (&part)[4]) { return sum((part[0] + part[1]) + (part[2] + part[3])); }

// The tail of a difference to the mean: lanes beyond the row must not count.
DK_INLINE Vec inside(Vec v, Full) { return v; }
DK_INLINE Vec inside(Vec v, Tail tail) { return select_less(lane_numbers(), Vec(static_cast<float>(tail.count)), v, Vec(0.0f)); }

struct Statistics {
  float mean;   // rounded
  double rest;  // what the mean is more than that
  double rstd;
};

template <class E>
DK_INLINE float mean_of_row(const E* x, int64_t width) {
  Vec values[4];
  for_each_two(
      width,
      [&](int64_t i, int k) __attribute__((always_inline)) {
        const Two v = load_two(x + i);
        values[k] = values[k] + v.a;
        values[k + 1] = values[k + 1] + v.b;
      },
      [&](int64_t i, auto extent) __attribute__((always_inline)) { values[0] = values[0] + load(x + i, extent); });
  return static_cast<float>(total(values) / static_cast<double>(width));
}

DK_INLINE Statistics statistics(float mean, const Vec (&differences)[4], const Vec (&squares)[4], int64_t width, double eps) {
  const double count = static_cast<double>(width), rest = total(differences) / count;
  return {mean, rest, 1.0 / std::sqrt(total(squares) / count - rest * rest + eps)};
}

// Two passes over a row in the first-level cache: the squares are of differences, so a large mean does not cancel. The second pass
// also finds what the first one's sum was rounded by.
template <class E>
DK_INLINE Statistics statistics_of_row(const E* x, int64_t width, double eps) {
  Vec differences[4], squares[4];
  const float mean = mean_of_row(x, width);
  for_each_two(
      width,
      [&](int64_t i, int k) __attribute__((always_inline)) {
        const Two v = load_two(x + i);
        const Vec a = v.a - Vec(mean), b = v.b - Vec(mean);
        differences[k] = differences[k] + a;
        differences[k + 1] = differences[k + 1] + b;
        squares[k] = fma(a, a, squares[k]);
        squares[k + 1] = fma(b, b, squares[k + 1]);
      },
      [&](int64_t i, auto extent) __attribute__((always_inline)) {
        const Vec d = inside(load(x + i, extent) - Vec(mean), extent);
        differences[0] = differences[0] + d;
        squares[0] = fma(d, d, squares[0]);
      });
  return statistics(mean, differences, squares, width, eps);
}

template <class E>
void forward(const Forward& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  const E *weight = static_cast<const E*>(job.weight), *bias = static_cast<const E*>(job.bias);
  for (int64_t row = begin; row < end; ++row) {
    const E* x = static_cast<const E*>(job.x) + row * width;
    E* y = static_cast<E*>(job.y) + row * width;
    const Statistics statistics = statistics_of_row(x, width, job.eps);
    const Vec mean(statistics.mean), rstd(static_cast<float>(statistics.rstd));
    const Vec offset(static_cast<float>(-statistics.rest * statistics.rstd));
    for_each_two(
        width,
        [&](int64_t i, int) __attribute__((always_inline)) {
          const Two v = load_two(x + i), w = load_two(weight + i), b = load_two(bias + i);
          store_two(y + i, {fma(fma(v.a - mean, rstd, offset), w.a, b.a), fma(fma(v.b - mean, rstd, offset), w.b, b.b)});
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) {
          const Vec normalised = fma(load(x + i, extent) - mean, rstd, offset);
          store(y + i, fma(normalised, load(weight + i, extent), load(bias + i, extent)), extent);
        });
  }
}

// y = n w + b, n = (x - mean) r.  With g = grad_y w:
//   grad_x = r (g - mean(g) - n mean(g n))      grad_w = sum over rows of grad_y n      grad_b = sum over rows of grad_y
struct RowFactors {
  Vec mean, r, offset, g_mean, projection;  // n = (x - mean) r + offset; projection: mean(g n)
};

// The second pass over x finds its sums and those of the gradient together. The means of all rows come first: the processor then works
// on one row's sums while another's mean, which needs a few dozen cycles after its last element, is on its way.
template <class E, int kRows>
DK_INLINE void factors_of_rows(const E* grad_y, const E* x, const E* weight, int64_t width, double eps, RowFactors (&factors)[kRows]) {
  float means[kRows];
  for (int row = 0; row < kRows; ++row) means[row] = mean_of_row(x + row * width, width);
  for (int row = 0; row < kRows; ++row, grad_y += width, x += width) {
    const Vec mean(means[row]);
    Vec differences[4], squares[4], gradients[4], products[4];
    for_each_two(
        width,
        [&](int64_t i, int k) __attribute__((always_inline)) {
          const Two v = load_two(x + i), grad = load_two(grad_y + i), w = load_two(weight + i);
          const Two d = {v.a - mean, v.b - mean}, g = {grad.a * w.a, grad.b * w.b};
          differences[k] = differences[k] + d.a;
          differences[k + 1] = differences[k + 1] + d.b;
          squares[k] = fma(d.a, d.a, squares[k]);
          squares[k + 1] = fma(d.b, d.b, squares[k + 1]);
          gradients[k] = gradients[k] + g.a;
          gradients[k + 1] = gradients[k + 1] + g.b;
          products[k] = fma(g.a, d.a, products[k]);
          products[k + 1] = fma(g.b, d.b, products[k + 1]);
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) {
          const Vec d = inside(load(x + i, extent) - mean, extent);
          const Vec g = load(grad_y + i, extent) * load(weight + i, extent);  // zero beyond the row
          differences[0] = differences[0] + d;
          squares[0] = fma(d, d, squares[0]);
          gradients[0] = gradients[0] + g;
          products[0] = fma(g, d, products[0]);
        });
    const Statistics found = statistics(means[row], differences, squares, width, eps);
    const double count = static_cast<double>(width), r = found.rstd;
    const double g_mean = total(gradients) / count, projection = (total(products) / count - g_mean * found.rest) * r;
    factors[row] = {mean, Vec(static_cast<float>(r)), Vec(static_cast<float>(-found.rest * r)), Vec(static_cast<float>(g_mean)),
                    Vec(static_cast<float>(projection))};
  }
}

// The gradient of one vector of x, added to the running sums of the weight and bias gradients.
template <bool kAffine>
DK_INLINE Vec gradient(const RowFactors& f, Vec v, Vec grad, Vec w, Vec& weight_sum, Vec& bias_sum) {
  const Vec normalised = fma(v - f.mean, f.r, f.offset);
  if constexpr (kAffine) {
    weight_sum = fma(grad, normalised, weight_sum);
    bias_sum = bias_sum + grad;
  }
  return f.r * (fma(grad, w, Vec(0.0f) - f.g_mean) - normalised * f.projection);
}

// kRows rows at a time, so that the running sums are read and written once for all of them. Within a chunk the sums of 2 * Vec::width
// columns lie in the order of Two; the columns of the remainder in their own (see reduce_columns).
template <class E, int kRows, bool kAffine>
DK_INLINE void backward_rows(const Backward& job, int64_t row, float* weight_sums, float* bias_sums) {
  const int64_t width = job.width;
  const E* grad_y = static_cast<const E*>(job.grad_y) + row * width;
  const E* x = static_cast<const E*>(job.x) + row * width;
  const E* weight = static_cast<const E*>(job.weight);
  E* grad_x = static_cast<E*>(job.grad_x) + row * width;
  RowFactors factors[kRows];
  factors_of_rows(grad_y, x, weight, width, job.eps, factors);
  for_each_two(
      width,
      [&](int64_t i, int) __attribute__((always_inline)) {
        const Two w = load_two(weight + i);
        Two weight_sum, bias_sum;
        if constexpr (kAffine) {
          weight_sum = load_two(weight_sums + i);
          bias_sum = load_two(bias_sums + i);
        }
        for (int k = 0; k < kRows; ++k) {
          const int64_t at = k * width + i;
          const Two v = load_two(x + at), grad = load_two(grad_y + at);
          store_two(grad_x + at, {gradient<kAffine>(factors[k], v.a, grad.a, w.a, weight_sum.a, bias_sum.a),
                                  gradient<kAffine>(factors[k], v.b, grad.b, w.b, weight_sum.b, bias_sum.b)});
        }
        if constexpr (kAffine) {
          store_two(weight_sums + i, weight_sum);
          store_two(bias_sums + i, bias_sum);
        }
      },
      [&](int64_t i, auto extent) __attribute__((always_inline)) {
        Vec weight_sum, bias_sum;
        if constexpr (kAffine) {
          weight_sum = load(weight_sums + i, extent);
          bias_sum = load(bias_sums + i, extent);
        }
        const Vec w = load(weight + i, extent);
        for (int k = 0; k < kRows; ++k) {
          const int64_t at = k * width + i;
          const Vec v = load(x + at, extent), grad = load(grad_y + at, extent);
          store(grad_x + at, gradient<kAffine>(factors[k], v, grad, w, weight_sum, bias_sum), extent);
        }
        if constexpr (kAffine) {
          store(weight_sums + i, weight_sum, extent);
          store(bias_sums + i, bias_sum, extent);
        }
      });
}

template <class E, bool kAffine>
void backward(const Backward& job, int64_t begin_chunk, int64_t end_chunk) {
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    float* weight_sums = kAffine ? job.sums + chunk * 2 * job.width : nullptr;
    float* bias_sums = kAffine ? weight_sums + job.width : nullptr;
    int64_t row = chunk * job.rows_per_chunk;
    const int64_t end = row + job.rows_per_chunk < job.rows ? row + job.rows_per_chunk : job.rows;
    for (; row + 4 <= end; row += 4) backward_rows<E, 4, kAffine>(job, row, weight_sums, bias_sums);
    for (; row < end; ++row) backward_rows<E, 1, kAffine>(job, row, weight_sums, bias_sums);
  }
}

}  // namespace

void forward_rows(Element element, const Forward& job, int64_t begin_row, int64_t end_row) {
  with_element(element, [&]<class E>(E*) { forward<E>(job, begin_row, end_row); });
}

void backward_chunks(Element element, const Backward& job, int64_t begin_chunk, int64_t end_chunk) {
  with_element(element, [&]<class E>(E*) {
    job.sums ? backward<E, true>(job, begin_chunk, end_chunk) : backward<E, false>(job, begin_chunk, end_chunk);
  });
}

void reduce_columns(Element element, const float* sums, int64_t chunks, int64_t width, void* grad_weight, void* grad_bias) {
  with_element(element, [&]<class E>(E*) {
    for (int which = 0; which < 2; ++which) {
      const float* from = sums + which * width;
      E* to = static_cast<E*>(which ? grad_bias : grad_weight);
      for_each_two(
          width,
          [&](int64_t i, int) __attribute__((always_inline)) {
            Two total;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
              const Two part = load_two(from + chunk * 2 * width + i);
              total = {total.a + part.a, total.b + part.b};
            }
            store_two(to + i, total);
          },
          [&](int64_t i, auto extent) __attribute__((always_inline)) {
            Vec total;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) total = total + load(from + chunk * 2 * width + i, extent);
            store(to + i, total, extent);
          });
    }
  });
}

}  // namespace dreamkernels::layer_norm::DK_ISA
