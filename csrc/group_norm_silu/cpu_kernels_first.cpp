// Channels first: a group lies in one piece. One task per sample and group.
#include "group_norm_silu/channel.h"

namespace dreamkernels::group_norm_silu::DK_ISA {
namespace {

// Moments of a contiguous run, from differences to a pivot per chunk: the mean over the chunk's first eighth. Hence at most eight times
// the variance of the chunk is cancelled when the differences are subtracted again: three bits.
template <class E>
void add_moments(const E* x, int64_t count, double shift, Moments& moments) {
  constexpr int64_t chunk = 4096;
  for (int64_t begin = 0; begin < count; begin += chunk, x += chunk) {
    const int64_t n = count - begin < chunk ? count - begin : chunk, head = (n + 7) / 8;
    Vec total[2], differences[2], squares[2];
    for_each_two(
        head,
        [&](int64_t i) __attribute__((always_inline)) {
          const Two v = load_two(x + i);
          total[0] = total[0] + v.a;
          total[1] = total[1] + v.b;
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) { total[0] = total[0] + load(x + i, extent); });
    const float pivot = sum(total[0] + total[1]) / static_cast<float>(head);
    for_each_two(
        n,
        [&](int64_t i) __attribute__((always_inline)) {
          const Two v = load_two(x + i);
          const Vec a = v.a - Vec(pivot), b = v.b - Vec(pivot);
          differences[0] = differences[0] + a;
          differences[1] = differences[1] + b;
          squares[0] = fma(a, a, squares[0]);
          squares[1] = fma(b, b, squares[1]);
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) {
          const Vec d = inside(load(x + i, extent) - Vec(pivot), extent);
          differences[0] = differences[0] + d;
          squares[0] = fma(d, d, squares[0]);
        });
    const double elements = static_cast<double>(n), rest = sum(differences[0] + differences[1]) / elements;
    moments.join(elements, pivot + rest + shift, sum(squares[0] + squares[1]) - rest * rest * elements);
  }
}

// Sums wait for memory and the last pass over a group for arithmetic, so the latter asks for the next group's elements, which follow
// at this distance: 0 where there is none, or where they would not stay in the second-level cache.
template <class E>
int64_t distance_to_next(const Job& job, bool has_next) {
  constexpr int64_t most_bytes = 131072;
  const int64_t elements = job.channels / job.groups * job.positions;
  return has_next && elements * static_cast<int64_t>(sizeof(E)) <= most_bytes ? elements : 0;
}
template <class E>
DK_INLINE void prefetch_two(const E* p) {
  constexpr int64_t per_line = 64 / static_cast<int64_t>(sizeof(E));
  for (int64_t i = 0; i < 2 * Vec::width; i += per_line) __builtin_prefetch(p + i, 0, 2);
}

template <class E, bool kSilu>
void forward_of_group(const Job& job, int64_t task, int64_t next) {
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
          prefetch_two(x + i + next);
          store_two(y + i, {activation<E, kSilu>(fma(v.a - m, a, b)), activation<E, kSilu>(fma(v.b - m, a, b))});
        },
        [&](int64_t i, auto extent) __attribute__((always_inline)) {
          store(y + i, activation<E, kSilu>(fma(load(x + i, extent) - m, a, b)), extent);
        });
  }
}

// With room for dz of the whole group, sigmoid is computed once instead of twice. For float32 that room is grad_x itself.
template <class E, bool kSilu, bool kRoom>
void backward_of_group(const Job& job, float* room, int64_t task, int64_t next) {
  const int64_t sample = task / job.groups, width = job.channels / job.groups, positions = job.positions;
  const int64_t first = (task % job.groups) * width;
  const int64_t at = (sample * job.channels + first) * positions;
  const E *x = static_cast<const E*>(job.x) + at, *grad_y = static_cast<const E*>(job.grad_y) + at;
  if constexpr (kRoom && sizeof(E) == sizeof(float)) room = static_cast<float*>(job.grad_x) + at;
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
          prefetch_two(x + row + i + next);
          prefetch_two(grad_y + row + i + next);
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

}  // namespace

void forward_first(Element element, const Job& job, int64_t begin_task, int64_t end_task) {
  with_element(element, [&]<class E>(E*) {
    const auto forward = job.silu ? forward_of_group<E, true> : forward_of_group<E, false>;
    for (int64_t task = begin_task; task < end_task; ++task) {
      forward(job, task, distance_to_next<E>(job, task + 1 < end_task));
    }
  });
}

void backward_first(Element element, const Job& job, float* room, int64_t begin_task, int64_t end_task) {
  with_element(element, [&]<class E>(E*) {
    const bool has_room = room || (element == Element::float32 && job.grad_x);
    const auto backward = !job.silu  ? backward_of_group<E, false, false>
                          : has_room ? backward_of_group<E, true, true>
                                     : backward_of_group<E, true, false>;
    for (int64_t task = begin_task; task < end_task; ++task) {
      backward(job, room, task, distance_to_next<E>(job, task + 1 < end_task));
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
