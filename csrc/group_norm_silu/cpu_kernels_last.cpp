// Channels last: a position's channels lie together, so vectors run over channels.
//
// Arrays over the channels (sums and coefficients) lie in the order in which a row of elements E is loaded: that of Two, for as many
// whole ones as there are. slot says where a channel is.
#include "group_norm_silu/channel.h"

namespace dreamkernels::group_norm_silu::DK_ISA {
namespace {

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

// f.operator()<4>(row) for as many fours of rows as there are, then f.operator()<1>(row): what is kept per channel is read and written
// once for all rows of a call.
template <class F>
DK_INLINE void for_each_rows(int64_t count, F&& f) {
  int64_t row = 0;
  for (; row + 4 <= count; row += 4) f.template operator()<4>(row);
  for (; row < count; ++row) f.template operator()<1>(row);
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
  for_each_rows(head, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
    const E* from = x + row * channels;
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
  });
  const Vec scale(1.0f / static_cast<float>(head));
  for_each_vector(channels, [&](int64_t c, auto extent) { store(sums.first + c, load(sums.first + c, extent) * scale, extent); });

  for_each_rows(rows.count, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
    const E* from = x + row * channels;
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
  });
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
  for_each_rows(rows.count, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
    for_each_two(
        channels,
        [&](int64_t c) __attribute__((always_inline)) {
          const Two m = load_two(k.m + c), a = load_two(k.a + c), b = load_two(k.b + c);
          for (int64_t at = row * channels + c, n = 0; n < kRows; ++n, at += channels) {
            const Two v = load_two(x + at);
            store_two(y + at, {activation<E, kSilu>(fma(v.a - m.a, a.a, b.a)), activation<E, kSilu>(fma(v.b - m.b, a.b, b.b))});
          }
        },
        [&](int64_t c, auto extent) __attribute__((always_inline)) {
          const Vec m = load(k.m + c, extent), a = load(k.a + c, extent), b = load(k.b + c, extent);
          for (int64_t at = row * channels + c, n = 0; n < kRows; ++n, at += channels) {
            store(y + at, activation<E, kSilu>(fma(load(x + at, extent) - m, a, b)), extent);
          }
        });
  });
}

// Whether the sums leave dz in grad_x for the second pass, which then need not compute it again. float32 only: no rounding.
template <class E, bool kSilu>
constexpr bool kKeeps = kSilu && sizeof(E) == sizeof(float);

// Backward sums of a block: A1, A2 and D.
template <class E, bool kSilu>
void backward_sums(const Job& job, int64_t sample, int64_t block) {
  const int64_t channels = job.channels;
  const Rows rows = rows_of(job, sample, block);
  const Sums sums = sums_of(job, sample, block);
  const Coefficients k = coefficients_of(job, sample);
  const E* x = static_cast<const E*>(job.x) + rows.begin * channels;
  const E* grad_y = static_cast<const E*>(job.grad_y) + rows.begin * channels;
  E* kept = kKeeps<E, kSilu> && job.grad_x ? static_cast<E*>(job.grad_x) + rows.begin * channels : nullptr;
  for (int64_t c = 0; c < 3 * channels; ++c) sums.first[c] = 0.0f;
  auto step = [](Vec d, Vec grad, Vec a, Vec b, Vec& a1, Vec& a2, Vec& total) __attribute__((always_inline)) {
    const Vec dz = activation_gradient<E, kSilu>(grad, fma(d, a, b));
    a1 = a1 + dz;
    a2 = fma(dz, d, a2);
    total = total + d;
    return dz;
  };
  for_each_rows(rows.count, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
    for_each_two(
        channels,
        [&](int64_t c) __attribute__((always_inline)) {
          const Two m = load_two(k.m + c), a = load_two(k.a + c), b = load_two(k.b + c);
          Two a1 = load_two(sums.first + c), a2 = load_two(sums.second + c), total = load_two(sums.third + c);
          for (int64_t at = row * channels + c, n = 0; n < kRows; ++n, at += channels) {
            const Two v = load_two(x + at), grad = load_two(grad_y + at);
            const Two dz{step(v.a - m.a, grad.a, a.a, b.a, a1.a, a2.a, total.a),
                         step(v.b - m.b, grad.b, a.b, b.b, a1.b, a2.b, total.b)};
            if (kKeeps<E, kSilu> && kept) store_two(kept + at, dz);
          }
          store_two(sums.first + c, a1);
          store_two(sums.second + c, a2);
          store_two(sums.third + c, total);
        },
        [&](int64_t c, auto extent) __attribute__((always_inline)) {
          const Vec m = load(k.m + c, extent), a = load(k.a + c, extent), b = load(k.b + c, extent);
          Vec a1 = load(sums.first + c, extent), a2 = load(sums.second + c, extent), total = load(sums.third + c, extent);
          for (int64_t at = row * channels + c, n = 0; n < kRows; ++n, at += channels) {
            const Vec dz = step(load(x + at, extent) - m, load(grad_y + at, extent), a, b, a1, a2, total);
            if (kKeeps<E, kSilu> && kept) store(kept + at, dz, extent);
          }
          store(sums.first + c, a1, extent);
          store(sums.second + c, a2, extent);
          store(sums.third + c, total, extent);
        });
  });
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
  E* grad_x = static_cast<E*>(job.grad_x) + rows.begin * channels;
  const E* gradient = kKeeps<E, kSilu> ? grad_x : static_cast<const E*>(job.grad_y) + rows.begin * channels;
  auto result = [](Vec d, Vec grad, Vec a, Vec b, Vec slope, Vec constant) __attribute__((always_inline)) {
    const Vec dz = kKeeps<E, kSilu> ? grad : activation_gradient<E, kSilu>(grad, fma(d, a, b));
    return fma(dz, a, fma(d, slope, constant));
  };
  for_each_rows(rows.count, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
    for_each_two(
        channels,
        [&](int64_t c) __attribute__((always_inline)) {
          const Two m = load_two(k.m + c), a = load_two(k.a + c), b = load_two(k.b + c);
          const Two slope = load_two(k.slope + c), constant = load_two(k.constant + c);
          for (int64_t at = row * channels + c, n = 0; n < kRows; ++n, at += channels) {
            const Two v = load_two(x + at), grad = load_two(gradient + at);
            store_two(grad_x + at, {result(v.a - m.a, grad.a, a.a, b.a, slope.a, constant.a),
                                    result(v.b - m.b, grad.b, a.b, b.b, slope.b, constant.b)});
          }
        },
        [&](int64_t c, auto extent) __attribute__((always_inline)) {
          const Vec m = load(k.m + c, extent), a = load(k.a + c, extent), b = load(k.b + c, extent);
          const Vec slope = load(k.slope + c, extent), constant = load(k.constant + c, extent);
          for (int64_t at = row * channels + c, n = 0; n < kRows; ++n, at += channels) {
            const Vec d = load(x + at, extent) - m;
            store(grad_x + at, result(d, load(gradient + at, extent), a, b, slope, constant), extent);
          }
        });
  });
}

}  // namespace

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

}  // namespace dreamkernels::group_norm_silu::DK_ISA
