// Few rows: each key is read once and meets every row, one after another. Limited by the memory of the cache.
#pragma once
#include <type_traits>

#include "decode_attention/cpu_task.h"

namespace dreamkernels::decode_attention::DK_ISA {
namespace {

constexpr int kFewRows = 4;

DK_INLINE float capped(float score, const Job& job) {
  score *= job.scale;
  return job.softcap > 0.0f ? job.softcap * std::tanh(score / job.softcap) : score;
}

template <class E>
DK_INLINE float dot_of_rows(const float* q, const E* k, int width) {
  Vec sums[4];
  int64_t d = 0;
  for (; d + 4 * Vec::width <= width; d += 4 * Vec::width) {
    for (int i = 0; i < 4; ++i) sums[i] = fma(load(q + d + i * Vec::width, Full{}), load(k + d + i * Vec::width, Full{}), sums[i]);
  }
  for (; d + Vec::width <= width; d += Vec::width) sums[0] = fma(load(q + d, Full{}), load(k + d, Full{}), sums[0]);
  if (d < width) {
    const Tail tail{static_cast<int>(width - d)};
    sums[1] = fma(load(q + d, tail), load(k + d, tail), sums[1]);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows of one head lie far from each other, a page of memory or more, which the processor does not foresee: it is told.
template <class E>
DK_INLINE void prefetch(const E* row, int elements) {
  constexpr int line = 64 / sizeof(E);
  for (int d = 0; d < elements; d += line) __builtin_prefetch(row + d);
}

// out = out * factor + sum over keys of p[k] values[k]. `next`: as many rows that are wanted after this as `coming` says.
template <class E>
DK_INLINE void add_values(float* out, float factor, const float* p, const E* const* values, int begin, int end, int width,
                          const E* const* next, int coming) {
  auto step = [&](int64_t d, auto extent, auto vectors) __attribute__((always_inline)) {
    Vec sums[vectors];
    for (int k = begin; k < end; ++k) {
      if (k < coming) prefetch(next[k] + d, static_cast<int>(vectors * Vec::width));
      const Vec weight(p[k]);
      for (int i = 0; i < vectors; ++i) sums[i] = fma(weight, load(values[k] + d + i * Vec::width, extent), sums[i]);
    }
    for (int i = 0; i < vectors; ++i) {
      store(out + d + i * Vec::width, fma(load(out + d + i * Vec::width, extent), Vec(factor), sums[i]), extent);
    }
  };
  int64_t d = 0;
  for (; d + 4 * Vec::width <= width; d += 4 * Vec::width) step(d, Full{}, std::integral_constant<int, 4>{});
  for (; d + Vec::width <= width; d += Vec::width) step(d, Full{}, std::integral_constant<int, 1>{});
  if (d < width) step(d, Tail{static_cast<int>(width - d)}, std::integral_constant<int, 1>{});
}

template <class E>
void attend_few_rows(const Task& task, float* workspace) {
  const Job& job = task.job;
  const int rows = job.rows(), width = job.width;
  float *queries = workspace, *out = workspace + rows * width;
  float maximum[kFewRows], total[kFewRows] = {};
  for (int r = 0; r < rows; ++r) {
    maximum[r] = kMinusInfinity;
    for_each_vector(width, [&](int64_t d, auto extent) __attribute__((always_inline)) {
      store(queries + r * width + d, load(task.query<E>(r) + d, extent), extent);
      store(out + r * width + d, Vec(), extent);
    });
  }
  TileRows<E> next(job, task.sequence, task.kv_head, task.part.begin, task.part.end);
  for (int64_t first = task.part.begin; first < task.part.end; first += kTileKeys) {
    const TileRows<E> tile = next;
    next = TileRows<E>(job, task.sequence, task.kv_head, first + kTileKeys, task.part.end);
    for (int r = 0; r < rows; ++r) {
      const KeyRange seen = task.seen_by(r);
      const int begin = static_cast<int>(std::clamp<int64_t>(seen.begin - first, 0, tile.count));
      const int end = static_cast<int>(std::clamp<int64_t>(seen.end - first, begin, tile.count));
      if (begin == end) continue;
      float p[kTileKeys];
      float highest = maximum[r];
      for (int k = begin; k < end; ++k) {
        if (r == 0) prefetch(tile.values[k], width);
        p[k] = capped(dot_of_rows(queries + r * width, tile.keys[k], width), job);
        highest = std::max(highest, p[k]);
      }
      Vec sums;
      for_each_vector(end - begin, [&](int64_t i, auto extent) __attribute__((always_inline)) {
        store(p + begin + i, exp(load(p + begin + i, extent) - Vec(highest)), extent);
        sums = sums + load(p + begin + i, extent);
      });
      float factor[Vec::width];
      store(factor, exp(Vec(maximum[r] - highest)), Full{});
      total[r] = total[r] * factor[0] + sum(sums);
      maximum[r] = highest;
      add_values(out + r * width, factor[0], p, tile.values, begin, end, width, next.keys, r == 0 ? next.count : 0);
    }
  }
  for (int r = 0; r < rows; ++r) {
    task.store_row<E>(r, maximum[r], total[r], [&](auto* to, float inverse) {
      for_each_vector(width, [&](int64_t d, auto extent) __attribute__((always_inline)) {
        store(to + d, load(out + r * width + d, extent) * Vec(inverse), extent);
      });
    });
  }
}

}  // namespace
}  // namespace dreamkernels::decode_attention::DK_ISA
