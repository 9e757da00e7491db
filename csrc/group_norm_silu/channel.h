// What both layouts share: the arithmetic of one channel.
//
// y = act(z), z = (x + shift - mean) r w + b. With m = mean - shift, d = x - m and a = r w, per channel:
//   z = d a + b      dz = grad_y act'(z)      grad_x = a dz - d r^2 m2 - r m1
// where m1 and m2 are the means over the group of w dz and of w dz d r. Subtracting m before scaling keeps a large mean from
// cancelling. From the sums over a channel's positions, A1 = sum dz, A2 = sum dz d, D = sum d:
//   grad_b = A1      grad_w = r A2      grad_shift = sum of grad_x = a A1 - r^2 m2 D - S r m1
#pragma once
#include <cmath>

#include "common/vec.h"
#include "group_norm_silu/kernels.h"

namespace dreamkernels::group_norm_silu::DK_ISA {

using namespace ::dreamkernels::DK_ISA;

template <class E, bool kSilu>
DK_INLINE Vec activation(Vec z) {
  if constexpr (!kSilu) return z;
  return z * sigmoid_for<E>(z);
}
template <class E, bool kSilu>
DK_INLINE Vec activation_gradient(Vec grad, Vec z) {
  if constexpr (!kSilu) return grad;
  const Vec s = sigmoid_for<E>(z);
  return grad * fma(z * s, Vec(1.0f) - s, s);
}

template <class E>
double value(const void* row, int64_t i, double otherwise) {
  return row ? static_cast<double>(sum(load(static_cast<const E*>(row) + i, Tail{1}))) : otherwise;
}

// What a channel is normalised with, as floats. `b` takes up what rounding m lost.
struct Channel {
  float m, a, b;
};
template <class E>
Channel channel_of(const Job& job, int64_t sample, int64_t channel, double mean, double rstd) {
  const double m = mean - value<E>(job.shift, sample * job.channels + channel, 0.0);
  const double a = rstd * value<E>(job.weight, channel, 1.0);
  const float rounded = static_cast<float>(m);
  return {rounded, static_cast<float>(a), static_cast<float>(value<E>(job.bias, channel, 0.0) - (m - rounded) * a)};
}

// Count, mean and sum of squared differences to the mean; joined as in Chan, Golub and LeVeque, 1983.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void join(double n, double other_mean, double other_squares) {
    const double difference = other_mean - mean, all = count + n;
    squares += other_squares + difference * difference * count * n / all;
    mean += difference * n / all;
    count = all;
  }
  double rstd(double eps) const { return 1.0 / std::sqrt(squares / count + eps); }
};

// f2(i) for 2 * Vec::width elements, f1(i, extent) for a vector of the remainder.
template <class F2, class F1>
DK_INLINE void for_each_two(int64_t count, F2&& f2, F1&& f1) {
  int64_t i = 0;
  for (; i + 2 * Vec::width <= count; i += 2 * Vec::width) f2(i);
  for_each_vector(count - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) { f1(i + offset, extent); });
}

DK_INLINE Vec inside(Vec v, Full) { return v; }
DK_INLINE Vec inside(Vec v, Tail tail) { return select_less(lane_numbers(), Vec(static_cast<float>(tail.count)), v, Vec(0.0f)); }

}  // namespace dreamkernels::group_norm_silu::DK_ISA
