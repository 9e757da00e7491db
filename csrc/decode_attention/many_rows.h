// Many rows: rows run along the lanes of vectors and keys are broadcast, so that softmax needs no sums across lanes, and products run in
// registers:
//
//   scores [keys, rows] = K [keys, width] Q^T [width, rows]        out [width, rows] += V^T [width, keys] P [keys, rows]
//
// In bfloat16, where the processor multiplies pairs, each 32-bit lane holds two neighbours along the summed dimension.
#pragma once
#include <cstring>
#include <type_traits>

#include "decode_attention/cpu_task.h"

namespace dreamkernels::decode_attention::DK_ISA {
namespace {

// A register tile: kTileRows broadcast operands times up to kTileVecs vectors.
constexpr int kTileRows = DK_VEC_LEVEL >= 512 ? 8 : 4;
constexpr int kTileVecs = DK_VEC_LEVEL >= 512 ? 3 : 2;

struct FloatProducts {
  using Stored = float;
  static constexpr int pack = 1;
  static DK_INLINE Vec load_operand(const float* p) { return load(p, Full{}); }
  static DK_INLINE Vec broadcast(const float* p) { return Vec(*p); }
  static DK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};
struct PairProducts {
  using Stored = BFloat16;
  static constexpr int pack = 2;
  static DK_INLINE Pairs load_operand(const BFloat16* p) { return load_pairs(p); }
  static DK_INLINE Pairs broadcast(const BFloat16* p) { return broadcast_pair(p); }
  static DK_INLINE Vec multiply_add(Pairs a, Pairs b, Vec c) { return dot(a, b, c); }
};
template <class E>
using ProductsOf = std::conditional_t<DK_VEC_LEVEL == 513 && std::is_same_v<E, BFloat16>, PairProducts, FloatProducts>;

// The operands and sums of a task. Widths are rounded up to whole register tiles; what is beyond is zero.
template <class P>
struct Buffers {
  using Stored = typename P::Stored;
  int64_t width, lanes;
  Stored* queries;   // [width / pack, lanes, pack]
  Stored* keys;      // [kTileKeys, width]
  Stored* values;    // [kTileKeys / pack, width, pack]
  Stored* weights;   // [kTileKeys / pack, kTileVecs * Vec::width, pack]: probabilities of one block of rows
  float* scores;     // [kTileKeys, kTileVecs * Vec::width]
  float* out;        // [width, lanes]
  float *maximum, *total, *low, *high;  // [lanes]; a row sees the keys between low and high (exclusive), counted from `part.begin`

  static int64_t width_of(const Job& job) { return round_up(job.width, kTileRows); }
  static int64_t lanes_of(const Job& job) { return round_up(job.rows(), Vec::width); }
  static constexpr int64_t block = kTileVecs * Vec::width;
  static int64_t bytes(const Job& job) {
    const int64_t w = width_of(job), l = lanes_of(job);
    return Workspace::bytes_of<Stored>(w * l) + 2 * Workspace::bytes_of<Stored>(kTileKeys * w) +
           Workspace::bytes_of<Stored>(kTileKeys * block) + Workspace::bytes_of<float>(kTileKeys * block) +
           Workspace::bytes_of<float>(w * l) + 4 * Workspace::bytes_of<float>(l);
  }
  Buffers(const Job& job, Workspace& workspace) : width(width_of(job)), lanes(lanes_of(job)) {
    queries = workspace.take<Stored>(width * lanes);
    keys = workspace.take<Stored>(kTileKeys * width);
    values = workspace.take<Stored>(kTileKeys * width);
    weights = workspace.take<Stored>(kTileKeys * block);
    scores = workspace.take<float>(kTileKeys * block);
    out = workspace.take<float>(width * lanes);
    maximum = workspace.take<float>(lanes);
    total = workspace.take<float>(lanes);
    low = workspace.take<float>(lanes);
    high = workspace.take<float>(lanes);
    std::memset(queries, 0, width * lanes * sizeof(Stored));
    std::memset(keys, 0, kTileKeys * width * sizeof(Stored));
    std::memset(values, 0, kTileKeys * width * sizeof(Stored));
  }
};

// Copies a row of width elements, converted where products are of floats.
template <class E, class S>
DK_INLINE void copy_row(const E* from, S* to, int width) {
  if constexpr (std::is_same_v<S, E>) {
    std::memcpy(to, from, width * sizeof(E));
  } else {
    for_each_vector(width, [&](int64_t d, auto extent) __attribute__((always_inline)) { store(to + d, load(from + d, extent), extent); });
  }
}

// The channels of two rows alternate: a[0], b[0], a[1], b[1] ...
DK_INLINE void interleave(const BFloat16* a, const BFloat16* b, BFloat16* to, int width) {
  int d = 0;
#if DK_VEC_LEVEL >= 512
  for (; d + 16 <= width; d += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + d)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + d)));
    _mm512_storeu_si512(to + 2 * d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
#endif
  for (; d < width; ++d) {
    to[2 * d] = a[d];
    to[2 * d + 1] = b[d];
  }
}

template <class P, class E>
void prepare_queries(const Task& task, Buffers<P>& buffers) {
  using Stored = typename P::Stored;
  const int width = task.job.width;
  for (int r = 0; r < task.job.rows(); ++r) {
    const E* from = task.query<E>(r);
    for (int d = 0; d < width; ++d) {
      Stored* to = buffers.queries + (d / P::pack * buffers.lanes + r) * P::pack + d % P::pack;
      if constexpr (std::is_same_v<Stored, E>) {
        *to = from[d];
      } else {
        store(to, load(from + d, Tail{1}), Tail{1});
      }
    }
  }
}

template <class P, class E>
void prepare_keys(const TileRows<E>& tile, Buffers<P>& buffers, int width) {
  for (int k = 0; k < tile.count; ++k) copy_row(tile.keys[k], buffers.keys + k * buffers.width, width);
  for (int k = tile.count; k < kTileKeys; ++k) std::memset(buffers.keys + k * buffers.width, 0, width * sizeof(*buffers.keys));
  if constexpr (P::pack == 2) {
    static constexpr BFloat16 zeros[1024] = {};
    for (int k = 0; k < kTileKeys; k += 2) {
      typename P::Stored* to = buffers.values + k * buffers.width;
      if (k + 1 < tile.count) {
        interleave(tile.values[k], tile.values[k + 1], to, width);
      } else if (k < tile.count && width <= 1024) {
        interleave(tile.values[k], zeros, to, width);
      } else if (k < tile.count) {
        for (int d = 0; d < width; ++d) to[2 * d] = tile.values[k][d], to[2 * d + 1] = BFloat16{0};
      } else {
        std::memset(to, 0, 2 * buffers.width * sizeof(*to));
      }
    }
  } else {
    for (int k = 0; k < tile.count; ++k) copy_row(tile.values[k], buffers.values + k * buffers.width, width);
    for (int k = tile.count; k < kTileKeys; ++k) std::memset(buffers.values + k * buffers.width, 0, width * sizeof(*buffers.values));
  }
}

// Calls finish(tile) with tile[r][v] = sum over steps of a[r, s] b[s, v]: kTileRows broadcast rows of a times kVecs vectors of b. In
// float32 the sum comes in pieces of at most kPiece steps, for finish to add up: short sums have smaller errors.
template <class P, int kVecs, class F>
DK_INLINE void multiply(const typename P::Stored* a, int64_t a_row, int64_t a_step, const typename P::Stored* b, int64_t b_step,
                        int64_t steps, F&& finish) {
  constexpr int64_t kPiece = P::pack == 1 ? 32 : 1 << 30;
  for (int64_t first = 0; first < steps; first += kPiece) {
    Vec tile[kTileRows][kVecs];
    for (int64_t s = first; s < std::min(steps, first + kPiece); ++s, a += a_step, b += b_step) {
      decltype(P::load_operand(b)) column[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) column[v] = P::load_operand(b + v * Vec::width * P::pack);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const auto element = P::broadcast(a + r * a_row);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) tile[r][v] = P::multiply_add(element, column[v], tile[r][v]);
      }
    }
    finish(tile, first == 0);
  }
}

// Applies the soft cap, and hides what a row does not see; leaves scores that are to be multiplied by the returned factor.
template <class P, int kVecs>
float cap_and_mask(const Job& job, const Buffers<P>& buffers, int64_t lane, int64_t first, int count) {
  constexpr int64_t block = Buffers<P>::block;
  float scale = job.scale;
  if (job.softcap > 0.0f) {
    for (int64_t i = 0; i < kTileKeys * block; i += Vec::width) {
      store(buffers.scores + i, tanh(load(buffers.scores + i, Full{}) * Vec(scale / job.softcap)) * Vec(job.softcap), Full{});
    }
    scale = 1.0f;
  }
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = lane + v * Vec::width;
    // Differences to the tile's first key: small, so exact.
    const Vec low = max(load(buffers.low + at, Full{}) - Vec(static_cast<float>(first)), Vec(-1.0f));
    const Vec high = min(load(buffers.high + at, Full{}) - Vec(static_cast<float>(first)), Vec(static_cast<float>(count)));
    if (maximum(low) <= -1.0f && maximum(Vec(0.0f) - high) <= -kTileKeys) continue;  // every row sees every key
    for (int k = 0; k < kTileKeys; ++k) {
      float* scores = buffers.scores + k * block + v * Vec::width;
      const Vec key(static_cast<float>(k));
      const Vec below = select_less(key, high, load(scores, Full{}), Vec(kMinusInfinity));
      store(scores, select_less(low, key, below, Vec(kMinusInfinity)), Full{});
    }
  }
  return scale;
}

// A tile of keys for kVecs vectors of rows, beginning at lane `lane`; `first` is the tile's first key counted from part.begin.
template <class P, int kVecs>
void attend_block(const Job& job, const Buffers<P>& buffers, int64_t lane, int64_t first, int count) {
  constexpr int64_t block = Buffers<P>::block;
  const int steps = static_cast<int>((job.width + P::pack - 1) / P::pack);
  for (int k = 0; k < kTileKeys; k += kTileRows) {
    multiply<P, kVecs>(buffers.keys + k * buffers.width, buffers.width, P::pack, buffers.queries + lane * P::pack,
                       buffers.lanes * P::pack, steps, [&](const auto& tile, bool is_first) __attribute__((always_inline)) {
      for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < kVecs; ++v) {
          float* score = buffers.scores + (k + r) * block + v * Vec::width;
          store(score, is_first ? tile[r][v] : tile[r][v] + load(score, Full{}), Full{});
        }
      }
    });
  }
  const Vec scale(cap_and_mask<P, kVecs>(job, buffers, lane, first, count));
  Vec factor[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = lane + v * Vec::width;
    Vec highest[2] = {Vec(kMinusInfinity), Vec(kMinusInfinity)};
    for (int k = 0; k < kTileKeys; k += 2) {
      for (int i = 0; i < 2; ++i) highest[i] = max(load(buffers.scores + (k + i) * block + v * Vec::width, Full{}), highest[i]);
    }
    const Vec before = load(buffers.maximum + at, Full{}), now = max(max(highest[0], highest[1]) * scale, before);
    const Vec base = max(now, Vec(-3.0e38f));  // a row that has seen no key
    factor[v] = exp(before - base);
    Vec total[2];
    const Vec minus_base = Vec(0.0f) - base;
    for (int k = 0; k < kTileKeys; k += P::pack) {
      const float* scores = buffers.scores + k * block + v * Vec::width;
      const Vec p = exp(fma(load(scores, Full{}), scale, minus_base));
      total[k / P::pack % 2] = total[k / P::pack % 2] + p;
      if constexpr (P::pack == 2) {
        const Vec next = exp(fma(load(scores + block, Full{}), scale, minus_base));
        total[k / P::pack % 2] = total[k / P::pack % 2] + next;
        store_pairs(buffers.weights + (k / 2 * block + v * Vec::width) * 2, pairs_of(p, next));
      } else {
        store(buffers.weights + k * block + v * Vec::width, p, Full{});
      }
    }
    store(buffers.total + at, fma(load(buffers.total + at, Full{}), factor[v], total[0] + total[1]), Full{});
    store(buffers.maximum + at, now, Full{});
  }
  for (int64_t d = 0; d < buffers.width; d += kTileRows) {
    multiply<P, kVecs>(buffers.values + d * P::pack, P::pack, buffers.width * P::pack, buffers.weights, block * P::pack,
                       kTileKeys / P::pack, [&](const auto& tile, bool is_first) __attribute__((always_inline)) {
      float* out = buffers.out + d * buffers.lanes + lane;
      for (int r = 0; r < kTileRows; ++r, out += buffers.lanes) {
        for (int v = 0; v < kVecs; ++v) {
          const Vec before = load(out + v * Vec::width, Full{});
          store(out + v * Vec::width, is_first ? fma(before, factor[v], tile[r][v]) : before + tile[r][v], Full{});
        }
      }
    });
  }
}

template <class E>
void attend_many_rows(const Task& task, Workspace& workspace) {
  using P = ProductsOf<E>;
  const Job& job = task.job;
  Buffers<P> buffers(job, workspace);
  prepare_queries<P, E>(task, buffers);
  for (int64_t i = 0; i < buffers.lanes; ++i) {
    const KeyRange seen = i < job.rows() ? task.seen_by(static_cast<int>(i)) : KeyRange{0, 0};
    buffers.maximum[i] = kMinusInfinity;
    buffers.total[i] = 0.0f;
    buffers.low[i] = static_cast<float>(std::max<int64_t>(seen.begin - task.part.begin, 0) - 1);
    buffers.high[i] = static_cast<float>(std::max<int64_t>(seen.end - task.part.begin, 0));
  }
  std::memset(buffers.out, 0, buffers.width * buffers.lanes * sizeof(float));
  for (int64_t first = task.part.begin; first < task.part.end; first += kTileKeys) {
    const TileRows<E> tile(job, task.sequence, task.kv_head, first, task.part.end);
    prepare_keys<P, E>(tile, buffers, job.width);
    const int64_t from_begin = first - task.part.begin;
    int64_t lane = 0;
    for (; lane + kTileVecs * Vec::width <= buffers.lanes; lane += kTileVecs * Vec::width) {
      attend_block<P, kTileVecs>(job, buffers, lane, from_begin, tile.count);
    }
    const int64_t left = (buffers.lanes - lane) / Vec::width;
    if (left == 2) attend_block<P, 2>(job, buffers, lane, from_begin, tile.count);
    if (left == 1) attend_block<P, 1>(job, buffers, lane, from_begin, tile.count);
  }
  for (int r = 0; r < job.rows(); ++r) {
    task.store_row<E>(r, buffers.maximum[r], buffers.total[r], [&](auto* to, float inverse) {
      float row[8];
      for (int d = 0; d < job.width; d += 8) {
        const int count = std::min(8, job.width - d);
        for (int i = 0; i < count; ++i) row[i] = buffers.out[(d + i) * buffers.lanes + r] * inverse;
        if constexpr (Vec::width == 8) {
          count == 8 ? store(to + d, load(row, Full{}), Full{}) : store(to + d, load(row, Tail{count}), Tail{count});
        } else {
          store(to + d, load(row, Tail{count}), Tail{count});
        }
      }
    });
  }
}

}  // namespace
}  // namespace dreamkernels::decode_attention::DK_ISA
