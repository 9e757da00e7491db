// Forward: flash attention with the queries along the vector lanes.
//
//   scores [keys, queries] = K Q^T        keys x head_dim rows of K broadcast, Q^T packed once per block of queries
//   probabilities = 2^(scores - maximum)  maximum and sum over keys run lane by lane: nothing crosses lanes
//   O^T [head_dim, queries] += V^T P
//
// All head dimensions, down to 8, fill the lanes this way, and neither K nor P is ever transposed.
#include "attention/kernels.h"
#include "attention/pack.h"
#include "attention/scores.h"

namespace dreamkernels::attention::DK_ISA {
namespace {

constexpr int64_t kKeys = 128;  // keys per block: scores, probabilities and packed values stay in the first two caches
static_assert(kQueryAlignment % kQueries == 0);

template <class A>
struct ForwardBuffers {
  using Stored = typename A::Stored;
  Stored* queries;        // per block [ceil(head_dim / pack), lanes]
  float* out;             // per block [depth, lanes]
  float *maximum, *sum;   // per block [lanes]; maximum in units of the kept scores
  float* factors;         // [lanes]
  float* scores;          // [kKeys, lanes]
  Stored* probabilities;  // [kKeys / pack, lanes]; float32: in place of the scores
  Stored* key_copies;
  Stored* values;         // [kKeys / pack, width]
  int64_t query_size, out_size;

  ForwardBuffers() = default;
  ForwardBuffers(Arena& arena, int64_t blocks, int64_t head_dim) {
    query_size = round_up(head_dim, A::pack) * kQueries;
    out_size = round_up(head_dim, kRows) * kQueries;
    queries = arena.take<Stored>(blocks * query_size);
    out = arena.take<float>(blocks * out_size);
    maximum = arena.take<float>(blocks * kQueries);
    sum = arena.take<float>(blocks * kQueries);
    factors = arena.take<float>(kQueries);
    scores = arena.take<float>(kKeys * kQueries);
    probabilities = A::same_forms ? reinterpret_cast<Stored*>(scores) : arena.take<Stored>(kKeys * kQueries);
    key_copies = arena.take<Stored>(kKeys * round_up(head_dim, A::pack));
    values = arena.take<Stored>(kKeys * round_up(head_dim, Vec::width));
  }
};

template <class A, class E>
class ForwardTask {
  using Stored = typename A::Stored;

 public:
  ForwardTask(const Forward& job, const Task& task, const ForwardBuffers<A>& buffers)
      : job_(job),
        p_(job.problem),
        task_(task),
        sequence_(p_.sequences[task.sequence]),
        b_(buffers),
        mask_(p_.visibility, sequence_.queries, sequence_.keys),
        scaling_(p_.scale, p_.softcap),
        steps_((p_.head_dim + A::pack - 1) / A::pack),
        depth_(round_up(p_.head_dim, kRows)),
        width_(round_up(p_.head_dim, Vec::width)) {}

  void run() {
    const int64_t blocks = (task_.end - task_.begin + kQueries - 1) / kQueries;
    for (int64_t block = 0; block < blocks; ++block) {
      with_vectors(vectors(block), [&]<int kVecs>() { begin_block<kVecs>(block); });
    }
    const Range keys = mask_.visible(task_.begin, task_.end - task_.begin);
    // Blocks of keys begin at fixed places, so that a result does not depend on how queries are shared out over tasks.
    for (int64_t first = keys.begin / kKeys * kKeys; first < keys.end; first += kKeys) {
      const Range here{std::max(first, keys.begin / kRows * kRows), std::min(first + kKeys, keys.end)};
      prepare(here);
      for (int64_t block = 0; block < blocks; ++block) {
        Range seen = mask_.visible(first_query(block), queries(block));
        seen = {std::max(seen.begin / kRows * kRows, here.begin), std::min(seen.end, here.end)};
        if (!seen.empty()) {
          with_vectors(vectors(block), [&]<int kVecs>() { attend<kVecs>(block, seen, here.begin); });
        }
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      with_vectors(vectors(block), [&]<int kVecs>() { end_block<kVecs>(block); });
    }
  }

 private:
  int64_t first_query(int64_t block) const { return task_.begin + block * kQueries; }
  int64_t queries(int64_t block) const { return std::min<int64_t>(kQueries, task_.end - first_query(block)); }
  int64_t vectors(int64_t block) const { return (queries(block) + Vec::width - 1) / Vec::width; }

  template <int kVecs>
  void begin_block(int64_t block) {
    constexpr int64_t lanes = kVecs * Vec::width;
    const E* q = static_cast<const E*>(p_.q.data) + sequence_.q + task_.head * p_.q.head_stride +
                 first_query(block) * p_.q.token_stride;
    pack_transposed<A>(q, p_.q.token_stride, queries(block), p_.head_dim, b_.queries + block * b_.query_size, lanes);
    std::fill_n(b_.out + block * b_.out_size, depth_ * lanes, 0.0f);
    std::fill_n(b_.maximum + block * kQueries, lanes, kLeastScore);
    std::fill_n(b_.sum + block * kQueries, lanes, 0.0f);
  }

  void prepare(Range keys) {
    const int64_t head = task_.head / (p_.heads / p_.kv_heads), count = keys.end - keys.begin;
    const E* k = static_cast<const E*>(p_.k.data) + sequence_.k + head * p_.k.head_stride + keys.begin * p_.k.token_stride;
    const E* v = static_cast<const E*>(p_.v.data) + sequence_.v + head * p_.v.head_stride + keys.begin * p_.v.token_stride;
    keys_.prepare(k, p_.k.token_stride, count, p_.head_dim, b_.key_copies);
    if constexpr (sizeof(E) == sizeof(float)) {
      if (p_.head_dim % kRows == 0) {
        values_ = v;
        value_stride_ = p_.v.token_stride;
        return;
      }
    }
    pack_rows<A>(v, p_.v.token_stride, count, p_.head_dim, b_.values, width_);
    values_ = b_.values;
    value_stride_ = width_ * A::pack;
  }

  // One block of queries and the keys `seen`, the rows of which begin at key `origin`.
  template <int kVecs>
  void attend(int64_t block, Range seen, int64_t origin) {
    Vec maximum[kVecs];
    for (int v = 0; v < kVecs; ++v) maximum[v] = load(b_.maximum + block * kQueries + v * Vec::width, Full{});
    score<kVecs>(block, seen, origin, maximum);
    const int64_t rows = round_up(seen.end - seen.begin, kRows);
    exponentiate<kVecs>(block, rows, maximum);
    accumulate<kVecs>(block, seen, origin);
  }

  template <int kVecs>
  DK_INLINE void score(int64_t block, Range seen, int64_t origin, Vec (&maximum)[kVecs]) {
    constexpr int64_t lanes = kVecs * Vec::width;
    const Stored* q = b_.queries + block * b_.query_size;
    float* to = b_.scores;
    const int64_t query = first_query(block);
    for (int64_t key = seen.begin; key < seen.end; key += kRows, to += kRows * lanes) {
      const bool masked = !mask_.all_visible(key, query, queries(block));
      const bool final = !masked && !scaling_.at_once;
      const auto keep = [&](Vec(&tile)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) {
            store(to + r * lanes + v * Vec::width, tile[r][v], Full{});
            if (final) maximum[v] = max(maximum[v], tile[r][v]);
          }
        }
      };
      multiply_rows<A, kRows, kVecs>(keys_.row(key - origin), keys_.stride(key - origin), q, lanes * A::pack, steps_, to, keep);
      if (!final) adjust<kVecs>(to, key, query, masked, maximum);
    }
  }

  template <int kVecs>
  __attribute__((noinline)) void adjust(float* scores, int64_t key, int64_t query, bool masked, Vec (&maximum)[kVecs]) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v, scores += Vec::width) {
        Vec s = load(scores, Full{});
        if (scaling_.at_once) s = s * Vec(scaling_.scale);
        if (scaling_.softcap > 0) {
          Vec slope;
          s = capped(s, scaling_.softcap, slope);
        }
        if (masked) s = mask_.hide(s, key + r, query + v * Vec::width);
        store(scores, s, Full{});
        maximum[v] = max(maximum[v], s);
      }
    }
  }

  template <int kVecs>
  DK_INLINE void exponentiate(int64_t block, int64_t rows, Vec (&maximum)[kVecs]) {
    constexpr int64_t lanes = kVecs * Vec::width;
    Vec shift[kVecs];
    Vec sum[2][kVecs];  // of this block of keys alone, and in two parts: a single chain over all keys would lose digits
    for (int v = 0; v < kVecs; ++v) {
      float* kept_maximum = b_.maximum + block * kQueries + v * Vec::width;
      const Vec factor = scaling_.template relative_to_maximum<Float32Arithmetic>(
          load(kept_maximum, Full{}), scaling_.template shift_of<Float32Arithmetic>(maximum[v]));
      store(kept_maximum, maximum[v], Full{});
      store(b_.factors + v * Vec::width, factor, Full{});
      shift[v] = scaling_.template shift_of<A>(maximum[v]);
    }
    float* scores = b_.scores;
    [[maybe_unused]] Stored* to = b_.probabilities;
    for (int64_t r = 0; r < rows; r += 2, scores += 2 * lanes, to += 2 * lanes) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        float* at = scores + v * Vec::width;
        const Vec first = scaling_.template relative_to_maximum<A>(load(at, Full{}), shift[v]);
        const Vec second = scaling_.template relative_to_maximum<A>(load(at + lanes, Full{}), shift[v]);
        sum[0][v] = sum[0][v] + first;
        sum[1][v] = sum[1][v] + second;
        if constexpr (A::pack == 1) {
          store(at, first, Full{});
          store(at + lanes, second, Full{});
        } else {
          store_interleaved(to + v * Vec::width * A::pack, first, second);
        }
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      float* total = b_.sum + block * kQueries + v * Vec::width;
      store(total, fma(load(total, Full{}), load(b_.factors + v * Vec::width, Full{}), sum[0][v] + sum[1][v]), Full{});
    }
  }

  static DK_INLINE void store_interleaved([[maybe_unused]] Stored* to, [[maybe_unused]] Vec first, [[maybe_unused]] Vec second) {
#if DK_VEC_LEVEL == 513
    _mm512_storeu_si512(to, interleaved_rows(rounded_rows(first, second)));
#endif
  }

  template <int kVecs>
  DK_INLINE void accumulate(int64_t block, Range seen, int64_t origin) {
    constexpr int64_t lanes = kVecs * Vec::width;
    const int64_t steps = (seen.end - seen.begin + A::pack - 1) / A::pack;
    const Stored* values = values_ + (seen.begin - origin) / A::pack * value_stride_;
    Vec factor[kVecs];
    for (int v = 0; v < kVecs; ++v) factor[v] = load(b_.factors + v * Vec::width, Full{});
    for (int64_t d = 0; d < depth_; d += kRows) {
      float* out = b_.out + block * b_.out_size + d * lanes;
      multiply<A, kRows, kVecs>(
          values + d * A::pack, A::pack, value_stride_, b_.probabilities, lanes * A::pack, steps,
          [&](Vec(&tile)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
              for (int v = 0; v < kVecs; ++v) {
                float* at = out + r * lanes + v * Vec::width;
                store(at, fma(load(at, Full{}), factor[v], tile[r][v]), Full{});
              }
            }
          });
    }
  }

  template <int kVecs>
  void end_block(int64_t block) {
    constexpr int64_t lanes = kVecs * Vec::width;
    const float *sum = b_.sum + block * kQueries, *maximum = b_.maximum + block * kQueries;
    float* lse = job_.lse + sequence_.lse + task_.head * p_.lse_head_stride + first_query(block);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const bool hidden = sum[lane] == 0.0f;  // such a query sees no key
      b_.factors[lane] = hidden ? 0.0f : 1.0f / sum[lane];
      if (lane < queries(block)) {
        lse[lane] = hidden ? -INFINITY : maximum[lane] * scaling_.to_natural + std::log(sum[lane]);
      }
    }
    E* out = static_cast<E*>(job_.out) + ((sequence_.first_query + first_query(block)) * p_.heads + task_.head) * p_.head_dim;
    store_transposed(b_.out + block * b_.out_size, lanes, b_.factors, queries(block), p_.head_dim, out, p_.heads * p_.head_dim);
  }

  const Forward& job_;
  const Problem& p_;
  const Task& task_;
  const Sequence& sequence_;
  const ForwardBuffers<A>& b_;
  Mask mask_;
  Scaling scaling_;
  int64_t steps_;         // lanes' worth of head_dim
  int64_t depth_, width_;  // head_dim rounded up to tiles and to vectors
  LeftRows<A> keys_;
  const Stored* values_ = nullptr;
  int64_t value_stride_ = 0;
};

template <class A, class E>
void run_tasks(const Forward& job, std::atomic<int64_t>& next_task) {
  const Problem& p = job.problem;
  int64_t longest = 0;
  for (int64_t t = 0; t < p.task_count; ++t) longest = std::max(longest, p.tasks[t].end - p.tasks[t].begin);
  const Workspace<ForwardBuffers<A>> workspace((longest + kQueries - 1) / kQueries, p.head_dim);
  for (int64_t t; (t = next_task.fetch_add(1, std::memory_order_relaxed)) < p.task_count;) {
    ForwardTask<A, E>(job, p.tasks[t], workspace.buffers).run();
  }
}

}  // namespace

void forward_tasks(Element element, const Forward& job, std::atomic<int64_t>& next_task) {
  with_element(element, [&]<class E>(E*) {
#if DK_VEC_LEVEL == 513
    if constexpr (std::is_same_v<E, BFloat16>) return run_tasks<BFloat16Arithmetic, E>(job, next_task);
#endif
    run_tasks<Float32Arithmetic, E>(job, next_task);
  });
}

}  // namespace dreamkernels::attention::DK_ISA
