#include "group_norm_silu/kernels.h"

#include <cmath>

#include "common/vec.h"

// y = act(z), z = (x + shift - mean) r w + b. With m = mean - shift, d = x - m and a = r w, per channel:
//   z = d a + b      dz = grad_y act'(z)      grad_x = a dz - d r^2 m2 - r m1
// where m1 and m2 are the means over the group of w dz and of w dz d r. Subtracting m before scaling keeps a large mean from
// cancelling. From the sums over a channel's positions, A1 = sum dz, A2 = sum dz d, D = sum d:
//   grad_b = A1      grad_w = r A2      grad_shift = sum of grad_x = a A1 - r^2 m2 D - S r m1
namespace dreamkernels::group_norm_silu::DK_ISA {
namespace {

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

// ---- channels first

// Moments of a contiguous run, in chunks that stay in the first-level cache for their second pass. That also finds what the mean of
// the first one was rounded by.
template <class E>
void add_moments(const E* x, int64_t count, double shift, Moments& moments) {
  constexpr int64_t chunk = 4096;
  for (int64_t begin = 0; begin < count; begin += chunk, x += chunk) {
    const int64_t n = count - begin < chunk ? count - begin : chunk;
    Vec total[2], differences[2], squares[2];
    for_each_two(
        n,
        [&](int64_t i) __attribute__((always_inline)) {
          const Two v = load_two(x + i);
          total[0] = total[0] + v.a;
          total[1] = total[1] + v.b;
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) { total[0] = total[0] + load(x + i, extent); });
    const double count_of_chunk = static_cast<double>(n);
    const float mean = static_cast<float>(sum(total[0] + total[1]) / count_of_chunk);
    for_each_two(
        n,
        [&](int64_t i) __attribute__((always_inline)) {
          const Two v = load_two(x + i);
          const Vec a = v.a - Vec(mean), b = v.b - Vec(mean);
          differences[0] = differences[0] + a;
          differences[1] = differences[1] + b;
          squares[0] = fma(a, a, squares[0]);
          squares[1] = fma(b, b, squares[1]);
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) {
          const Vec d = inside(load(x + i, extent) - Vec(mean), extent);
          differences[0] = differences[0] + d;
          squares[0] = fma(d, d, squares[0]);
        });
    const double rest = sum(differences[0] + differences[1]) / count_of_chunk;
    moments.join(count_of_chunk, mean + rest + shift, sum(squares[0] + squares[1]) - rest * rest * count_of_chunk);
  }
}

template <class E, bool kSilu>
void forward_of_group(const Job& job, int64_t task) {
  const int64_t sample = task / job.groups, width = job.channels / job.groups, positions = job.positions;
  const int64_t first = (task % job.groups) * width;
  const int64_t at = (sample * job.channels + first) * positions;
  const E* x = static_cast<const E*>(job.x) + at;
  E* y = static_cast<E*>(job.y) + at;
  Moments moments;
  if (!job.shift) {
    add_moments(x, width * positions, 0.0, moments);
  } else {
    for (int64_t c = 0; c < width; ++c) {
      add_moments(x + c * positions, positions, value<E>(job.shift, sample * job.channels + first + c, 0.0), moments);
    }
  }
  const double rstd = moments.rstd(job.eps);
  job.mean[task] = static_cast<float>(moments.mean);
  job.rstd[task] = static_cast<float>(rstd);
  for (int64_t c = 0; c < width; ++c, x += positions, y += positions) {
    const Channel channel = channel_of<E>(job, sample, first + c, moments.mean, rstd);
    const Vec m(channel.m), a(channel.a), b(channel.b);
    for_each_two(
        positions,
        [&](int64_t i) __attribute__((always_inline)) {
          const Two v = load_two(x + i);
          store_two(y + i, {activation<E, kSilu>(fma(v.a - m, a, b)), activation<E, kSilu>(fma(v.b - m, a, b))});
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) {
          store(y + i, activation<E, kSilu>(fma(load(x + i, extent) - m, a, b)), extent);
        });
  }
}

// With room for dz of the whole group, sigmoid is computed once instead of twice.
template <class E, bool kSilu, bool kRoom>
void backward_of_group(const Job& job, float* room, int64_t task) {
  const int64_t sample = task / job.groups, width = job.channels / job.groups, positions = job.positions;
  const int64_t first = (task % job.groups) * width;
  const int64_t at = (sample * job.channels + first) * positions;
  const E *x = static_cast<const E*>(job.x) + at, *grad_y = static_cast<const E*>(job.grad_y) + at;
  const double mean = job.mean[task], r = job.rstd[task], count = static_cast<double>(positions);
  double m1 = 0, m2 = 0;
  const int64_t first_of_sums = sample * job.channels + first;
  float* sums = job.partial + first_of_sums * 3;  // A1, A2, D of this group's channels
  for (int64_t c = 0; c < width; ++c) {
    const Channel channel = channel_of<E>(job, sample, first + c, mean, r);
    const Vec m(channel.m), a(channel.a), b(channel.b);
    const int64_t row = c * positions;
    Vec gradients[2], products[2], differences[2];
    auto step = [&](int k, Vec v, Vec grad, auto extent) __attribute__((always_inline)) {
      const Vec d = v - m;
      const Vec dz = activation_gradient<E, kSilu>(grad, fma(d, a, b));  // zero beyond the channel, as grad is
      gradients[k] = gradients[k] + dz;
      products[k] = fma(dz, d, products[k]);
      differences[k] = differences[k] + inside(d, extent);
      return dz;
    };
    for_each_two(
        positions,
        [&](int64_t i) __attribute__((always_inline)) {
          const Two v = load_two(x + row + i), grad = load_two(grad_y + row + i);
          const Two dz{step(0, v.a, grad.a, Full{}), step(1, v.b, grad.b, Full{})};
          if constexpr (kRoom) store_two(room + row + i, dz);
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) {
          const Vec dz = step(0, load(x + row + i, extent), load(grad_y + row + i, extent), extent);
          if constexpr (kRoom) store(room + row + i, dz, extent);
        });
    const double w = value<E>(job.weight, first + c, 1.0);
    const float a1 = sum(gradients[0] + gradients[1]), a2 = sum(products[0] + products[1]);
    sums[3 * c] = a1;
    sums[3 * c + 1] = a2;
    sums[3 * c + 2] = sum(differences[0] + differences[1]);
    m1 += w * a1;
    m2 += w * a2 * r;
    if (job.affine_sums) {
      float* affine = job.affine_sums + sample * 2 * job.channels + first + c;
      affine[0] = static_cast<float>(a2 * r);
      affine[job.channels] = a1;
    }
  }
  m1 /= count * static_cast<double>(width);
  m2 /= count * static_cast<double>(width);
  if (job.grad_shift) {
    for (int64_t c = 0; c < width; ++c) {
      const double a = r * value<E>(job.weight, first + c, 1.0);
      const double grad = a * sums[3 * c] - r * r * m2 * sums[3 * c + 2] - count * r * m1;
      store(static_cast<E*>(job.grad_shift) + first_of_sums + c, Vec(static_cast<float>(grad)), Tail{1});
    }
  }
  if (!job.grad_x) return;
  E* grad_x = static_cast<E*>(job.grad_x) + at;
  const Vec slope(static_cast<float>(-r * r * m2)), constant(static_cast<float>(-r * m1));
  for (int64_t c = 0; c < width; ++c) {
    const Channel channel = channel_of<E>(job, sample, first + c, mean, r);
    const Vec m(channel.m), a(channel.a), b(channel.b);
    const int64_t row = c * positions;
    auto result = [&](Vec v, Vec dz) __attribute__((always_inline)) { return fma(dz, a, fma(v - m, slope, constant)); };
    auto recomputed = [&](Vec v, Vec grad) __attribute__((always_inline)) {
      return activation_gradient<E, kSilu>(grad, fma(v - m, a, b));
    };
    for_each_two(
        positions,
        [&](int64_t i) __attribute__((always_inline)) {
          const Two v = load_two(x + row + i);
          Two dz;
          if constexpr (kRoom) {
            dz = load_two(room + row + i);  // as stored: first a, then b
          } else {
            const Two grad = load_two(grad_y + row + i);
            dz = {recomputed(v.a, grad.a), recomputed(v.b, grad.b)};
          }
          store_two(grad_x + row + i, {result(v.a, dz.a), result(v.b, dz.b)});
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) {
          const Vec v = load(x + row + i, extent);
          Vec dz;
          if constexpr (kRoom) {
            dz = load(room + row + i, extent);
          } else {
            dz = recomputed(v, load(grad_y + row + i, extent));
          }
          store(grad_x + row + i, result(v, dz), extent);
        });
  }
}

// ---- channels last
//
// Arrays over the channels (sums and coefficients) lie in the order in which a row of elements E is loaded: that of Two, for as many
// whole ones as there are. slot says where a channel is.

template <class E>
int64_t slot(int64_t channel, int64_t) {
  return channel;
}
template <>
int64_t slot<BFloat16>(int64_t channel, int64_t channels) {
  constexpr int64_t two = 2 * Vec::width;
  const int64_t begin = channel / two * two, k = channel - begin;
  return begin + two > channels ? channel : begin + k / 2 + (k % 2) * Vec::width;
}

struct Coefficients {
  float *m, *a, *b, *slope, *constant;
};
Coefficients coefficients_of(const Job& job, int64_t sample) {
  float* p = job.coefficients + sample * 5 * job.channels;
  return {p, p + job.channels, p + 2 * job.channels, p + 3 * job.channels, p + 4 * job.channels};
}
struct Sums {
  float *first, *second, *third;
};
Sums sums_of(const Job& job, int64_t sample, int64_t block) {
  float* p = job.partial + (sample * job.blocks() + block) * 3 * job.channels;
  return {p, p + job.channels, p + 2 * job.channels};
}
struct Rows {
  int64_t begin, count;
};
Rows rows_of(const Job& job, int64_t sample, int64_t block) {
  const int64_t begin = block * job.positions_per_block;
  const int64_t left = job.positions - begin;
  return {sample * job.positions + begin, left < job.positions_per_block ? left : job.positions_per_block};
}

// Forward sums of a block: pivot, sum of differences to it, sum of their squares. The pivot is the mean over the first eighth of the
// block, hence at most eight times the variance of the block is cancelled when it is subtracted again: three bits.
template <class E>
void forward_sums(const Job& job, int64_t sample, int64_t block) {
  const int64_t channels = job.channels;
  const Rows rows = rows_of(job, sample, block);
  const Sums sums = sums_of(job, sample, block);
  const E* x = static_cast<const E*>(job.x) + rows.begin * channels;
  const int64_t head = (rows.count + 7) / 8;
  for (int64_t c = 0; c < 3 * channels; ++c) sums.first[c] = 0.0f;
  const auto add_rows = [&]<int kRows>(const E* from) __attribute__((always_inline)) {
    for_each_two(
        channels,
        [&](int64_t c) __attribute__((always_inline)) {
          Two total = load_two(sums.first + c);
          for (int k = 0; k < kRows; ++k) {
            const Two v = load_two(from + k * channels + c);
            total = {total.a + v.a, total.b + v.b};
          }
          store_two(sums.first + c, total);
        },
        [&](int64_t c, auto extent) __attribute__((always_inline)) {
          Vec total = load(sums.first + c, extent);
          for (int k = 0; k < kRows; ++k) total = total + load(from + k * channels + c, extent);
          store(sums.first + c, total, extent);
        });
  };
  int64_t row = 0;
  for (; row + 4 <= head; row += 4) add_rows.template operator()<4>(x + row * channels);
  for (; row < head; ++row) add_rows.template operator()<1>(x + row * channels);
  const Vec scale(1.0f / static_cast<float>(head));
  for_each_vector(channels, [&](int64_t c, auto extent) { store(sums.first + c, load(sums.first + c, extent) * scale, extent); });

  const auto add_differences = [&]<int kRows>(const E* from) __attribute__((always_inline)) {
    for_each_two(
        channels,
        [&](int64_t c) __attribute__((always_inline)) {
          const Two pivot = load_two(sums.first + c);
          Two total = load_two(sums.second + c), squares = load_two(sums.third + c);
          for (int k = 0; k < kRows; ++k) {
            const Two v = load_two(from + k * channels + c);
            const Vec a = v.a - pivot.a, b = v.b - pivot.b;
            total = {total.a + a, total.b + b};
            squares = {fma(a, a, squares.a), fma(b, b, squares.b)};
          }
          store_two(sums.second + c, total);
          store_two(sums.third + c, squares);
        },
        [&](int64_t c, auto extent) __attribute__((always_inline)) {
          const Vec pivot = load(sums.first + c, extent);
          Vec total = load(sums.second + c, extent), squares = load(sums.third + c, extent);
          for (int k = 0; k < kRows; ++k) {
            const Vec d = load(from + k * channels + c, extent) - pivot;
            total = total + d;
            squares = fma(d, d, squares);
          }
          store(sums.second + c, total, extent);
          store(sums.third + c, squares, extent);
        });
  };
  for (row = 0; row + 4 <= rows.count; row += 4) add_differences.template operator()<4>(x + row * channels);
  for (; row < rows.count; ++row) add_differences.template operator()<1>(x + row * channels);
}

template <class E>
void write_channel(const Job& job, const Coefficients& to, int64_t sample, int64_t c, double mean, double rstd) {
  const Channel channel = channel_of<E>(job, sample, c, mean, rstd);
  const int64_t at = slot<E>(c, job.channels);
  to.m[at] = channel.m;
  to.a[at] = channel.a;
  to.b[at] = channel.b;
}

template <class E>
void finish_forward(const Job& job, int64_t sample) {
  const int64_t width = job.channels / job.groups;
  const Coefficients to = coefficients_of(job, sample);
  for (int64_t group = 0; group < job.groups; ++group) {
    Moments moments;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const int64_t at = slot<E>(c, job.channels);
      const double shift = value<E>(job.shift, sample * job.channels + c, 0.0);
      for (int64_t block = 0; block < job.blocks(); ++block) {
        const Sums sums = sums_of(job, sample, block);
        const double count = static_cast<double>(rows_of(job, sample, block).count), total = sums.second[at];
        const double squares = sums.third[at] - total * total / count;
        moments.join(count, sums.first[at] + shift + total / count, squares);
      }
    }
    const double rstd = moments.rstd(job.eps);
    job.mean[sample * job.groups + group] = static_cast<float>(moments.mean);
    job.rstd[sample * job.groups + group] = static_cast<float>(rstd);
    for (int64_t c = group * width; c < (group + 1) * width; ++c) write_channel<E>(job, to, sample, c, moments.mean, rstd);
  }
}

template <class E, bool kSilu>
void forward_apply(const Job& job, int64_t sample, int64_t block) {
  const int64_t channels = job.channels;
  const Rows rows = rows_of(job, sample, block);
  const Coefficients k = coefficients_of(job, sample);
  const E* x = static_cast<const E*>(job.x) + rows.begin * channels;
  E* y = static_cast<E*>(job.y) + rows.begin * channels;
  for (int64_t row = 0; row < rows.count; ++row, x += channels, y += channels) {
    for_each_two(
        channels,
        [&](int64_t c) __attribute__((always_inline)) {
          const Two v = load_two(x + c), m = load_two(k.m + c), a = load_two(k.a + c), b = load_two(k.b + c);
          store_two(y + c, {activation<E, kSilu>(fma(v.a - m.a, a.a, b.a)), activation<E, kSilu>(fma(v.b - m.b, a.b, b.b))});
        },
        [&](int64_t c, auto extent) __attribute__((always_inline)) {
          const Vec d = load(x + c, extent) - load(k.m + c, extent);
          store(y + c, activation<E, kSilu>(fma(d, load(k.a + c, extent), load(k.b + c, extent))), extent);
        });
  }
}

// Backward sums of a block: A1, A2 and D.
template <class E, bool kSilu>
void backward_sums(const Job& job, int64_t sample, int64_t block) {
  const int64_t channels = job.channels;
  const Rows rows = rows_of(job, sample, block);
  const Sums sums = sums_of(job, sample, block);
  const Coefficients k = coefficients_of(job, sample);
  const E* x = static_cast<const E*>(job.x) + rows.begin * channels;
  const E* grad_y = static_cast<const E*>(job.grad_y) + rows.begin * channels;
  for (int64_t c = 0; c < 3 * channels; ++c) sums.first[c] = 0.0f;
  for (int64_t row = 0; row < rows.count; ++row, x += channels, grad_y += channels) {
    auto step = [&](Vec d, Vec grad, Vec a, Vec b, Vec& a1, Vec& a2, Vec& total) __attribute__((always_inline)) {
      const Vec dz = activation_gradient<E, kSilu>(grad, fma(d, a, b));
      a1 = a1 + dz;
      a2 = fma(dz, d, a2);
      total = total + d;
    };
    for_each_two(
        channels,
        [&](int64_t c) __attribute__((always_inline)) {
          const Two v = load_two(x + c), grad = load_two(grad_y + c);
          const Two m = load_two(k.m + c), a = load_two(k.a + c), b = load_two(k.b + c);
          Two a1 = load_two(sums.first + c), a2 = load_two(sums.second + c), total = load_two(sums.third + c);
          step(v.a - m.a, grad.a, a.a, b.a, a1.a, a2.a, total.a);
          step(v.b - m.b, grad.b, a.b, b.b, a1.b, a2.b, total.b);
          store_two(sums.first + c, a1);
          store_two(sums.second + c, a2);
          store_two(sums.third + c, total);
        },
        [&](int64_t c, auto extent) __attribute__((always_inline)) {
          Vec a1 = load(sums.first + c, extent), a2 = load(sums.second + c, extent), total = load(sums.third + c, extent);
          step(load(x + c, extent) - load(k.m + c, extent), load(grad_y + c, extent), load(k.a + c, extent),
               load(k.b + c, extent), a1, a2, total);
          store(sums.first + c, a1, extent);
          store(sums.second + c, a2, extent);
          store(sums.third + c, total, extent);
        });
  }
}

template <class E>
void finish_backward(const Job& job, int64_t sample) {
  const int64_t width = job.channels / job.groups;
  const Coefficients to = coefficients_of(job, sample);
  const double count = static_cast<double>(job.positions);
  const Sums total = sums_of(job, sample, 0);  // takes up the other blocks, in their order
  for (int64_t block = 1; block < job.blocks(); ++block) {
    const Sums sums = sums_of(job, sample, block);
    for (int64_t c = 0; c < 3 * job.channels; ++c) total.first[c] += sums.first[c];
  }
  for (int64_t group = 0; group < job.groups; ++group) {
    const double r = job.rstd[sample * job.groups + group];
    double m1 = 0, m2 = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const int64_t at = slot<E>(c, job.channels);
      const double w = value<E>(job.weight, c, 1.0);
      m1 += w * total.first[at];
      m2 += w * total.second[at] * r;
    }
    m1 /= count * static_cast<double>(width);
    m2 /= count * static_cast<double>(width);
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const int64_t at = slot<E>(c, job.channels);
      to.slope[at] = static_cast<float>(-r * r * m2);
      to.constant[at] = static_cast<float>(-r * m1);
      if (job.affine_sums) {
        float* affine = job.affine_sums + sample * 2 * job.channels + c;
        affine[0] = static_cast<float>(total.second[at] * r);
        affine[job.channels] = total.first[at];
      }
      if (job.grad_shift) {
        const double a = r * value<E>(job.weight, c, 1.0);
        const double grad = a * total.first[at] - r * r * m2 * total.third[at] - count * r * m1;
        store(static_cast<E*>(job.grad_shift) + sample * job.channels + c, Vec(static_cast<float>(grad)), Tail{1});
      }
    }
  }
}

template <class E, bool kSilu>
void backward_apply(const Job& job, int64_t sample, int64_t block) {
  const int64_t channels = job.channels;
  const Rows rows = rows_of(job, sample, block);
  const Coefficients k = coefficients_of(job, sample);
  const E* x = static_cast<const E*>(job.x) + rows.begin * channels;
  const E* grad_y = static_cast<const E*>(job.grad_y) + rows.begin * channels;
  E* grad_x = static_cast<E*>(job.grad_x) + rows.begin * channels;
  auto result = [](Vec d, Vec grad, Vec a, Vec b, Vec slope, Vec constant) __attribute__((always_inline)) {
    return fma(activation_gradient<E, kSilu>(grad, fma(d, a, b)), a, fma(d, slope, constant));
  };
  for (int64_t row = 0; row < rows.count; ++row, x += channels, grad_y += channels, grad_x += channels) {
    for_each_two(
        channels,
        [&](int64_t c) __attribute__((always_inline)) {
          const Two v = load_two(x + c), grad = load_two(grad_y + c), m = load_two(k.m + c), a = load_two(k.a + c);
          const Two b = load_two(k.b + c), slope = load_two(k.slope + c), constant = load_two(k.constant + c);
          store_two(grad_x + c, {result(v.a - m.a, grad.a, a.a, b.a, slope.a, constant.a),
                                 result(v.b - m.b, grad.b, a.b, b.b, slope.b, constant.b)});
        },
        [&](int64_t c, auto extent) __attribute__((always_inline)) {
          store(grad_x + c,
                result(load(x + c, extent) - load(k.m + c, extent), load(grad_y + c, extent), load(k.a + c, extent),
                       load(k.b + c, extent), load(k.slope + c, extent), load(k.constant + c, extent)),
                extent);
        });
  }
}

}  // namespace

void forward_first(Element element, const Job& job, int64_t begin_task, int64_t end_task) {
  with_element(element, [&]<class E>(E*) {
    for (int64_t task = begin_task; task < end_task; ++task) {
      job.silu ? forward_of_group<E, true>(job, task) : forward_of_group<E, false>(job, task);
    }
  });
}

void backward_first(Element element, const Job& job, float* room, int64_t begin_task, int64_t end_task) {
  with_element(element, [&]<class E>(E*) {
    for (int64_t task = begin_task; task < end_task; ++task) {
      if (!job.silu) {
        backward_of_group<E, false, false>(job, nullptr, task);
      } else {
        room ? backward_of_group<E, true, true>(job, room, task) : backward_of_group<E, true, false>(job, nullptr, task);
      }
    }
  });
}

void start_last(Element element, const Job& job, int64_t sample) {
  with_element(element, [&]<class E>(E*) {
    const Coefficients to = coefficients_of(job, sample);
    for (int64_t c = 0; c < job.channels; ++c) {
      const int64_t group = sample * job.groups + c / (job.channels / job.groups);
      write_channel<E>(job, to, sample, c, job.mean[group], job.rstd[group]);
    }
  });
}

void sum_last(Element element, const Job& job, int64_t sample, int64_t begin_block, int64_t end_block) {
  with_element(element, [&]<class E>(E*) {
    for (int64_t block = begin_block; block < end_block; ++block) {
      if (!job.grad_y) {
        forward_sums<E>(job, sample, block);
      } else {
        job.silu ? backward_sums<E, true>(job, sample, block) : backward_sums<E, false>(job, sample, block);
      }
    }
  });
}

void finish_last(Element element, const Job& job, int64_t sample) {
  with_element(element, [&]<class E>(E*) {
    job.grad_y ? finish_backward<E>(job, sample) : finish_forward<E>(job, sample);
  });
}

// Backwards, since the last blocks summed are still in the cache.
void apply_last(Element element, const Job& job, int64_t sample, int64_t begin_block, int64_t end_block) {
  with_element(element, [&]<class E>(E*) {
    for (int64_t block = end_block - 1; block >= begin_block; --block) {
      if (!job.grad_y) {
        job.silu ? forward_apply<E, true>(job, sample, block) : forward_apply<E, false>(job, sample, block);
      } else {
        job.silu ? backward_apply<E, true>(job, sample, block) : backward_apply<E, false>(job, sample, block);
      }
    }
  });
}

void reduce_affine(Element element, const Job& job, int64_t samples, void* grad_weight, void* grad_bias) {
  with_element(element, [&]<class E>(E*) {
    for_each_vector(job.channels, [&](int64_t c, auto extent) __attribute__((always_inline)) {
      Vec weight, bias;
      for (int64_t sample = 0; sample < samples; ++sample) {
        const float* sums = job.affine_sums + sample * 2 * job.channels + c;
        weight = weight + load(sums, extent);
        bias = bias + load(sums + job.channels, extent);
      }
      store(static_cast<E*>(grad_weight) + c, weight, extent);
      store(static_cast<E*>(grad_bias) + c, bias, extent);
    });
  });
}

}  // namespace dreamkernels::group_norm_silu::DK_ISA
