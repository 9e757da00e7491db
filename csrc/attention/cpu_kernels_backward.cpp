// Backward: one task per sequence and key-value head, or per range of its keys.
//
//   P  = e^(scores - lse)       [keys, queries], recomputed as in the forward
//   dS = P (V dO^T - delta)     delta = rowsum(dO O) - dlse, or rowsum(P dO V^T) - dlse
//   dV += P dO    dK += dS Q    [keys, head_dim]
//   dQ^T += K^T dS              [head_dim, queries]
//
// A task packs its queries and output gradients once, in the two forms that the five products read, then takes its keys block by
// block: dK and dV of a block are complete when its queries have passed, dQ^T grows in the task's own memory. Every sum has one
// owner and one order.
#include "attention/backward_buffers.h"
#include "attention/kernels.h"
#include "attention/pack.h"
#include "attention/scores.h"

namespace dreamkernels::attention::DK_ISA {
namespace {

constexpr float kHiddenLse = 1e30f;       // makes every probability of a query zero

template <class A, class E>
class BackwardTask {
  using Stored = typename A::Stored;

 public:
  BackwardTask(const Backward& job, const Task& task, const BackwardBuffers<A>& buffers)
      : job_(job),
        p_(job.problem),
        task_(task),
        sequence_(p_.sequences[task.sequence]),
        b_(buffers),
        mask_(p_.visibility, sequence_.queries, sequence_.keys),
        scaling_(p_.scale, p_.softcap),
        blocks_((sequence_.queries + kQueries - 1) / kQueries),
        group_(p_.heads / p_.kv_heads),
        steps_((p_.head_dim + A::pack - 1) / A::pack),
        depth_(round_up(p_.head_dim, kRows)),
        width_(round_up(p_.head_dim, Vec::width)) {}

  void run() {
    each_block([&]<int kVecs>(int64_t head, int64_t block) { begin_block<kVecs>(head, block); });
    for (int64_t first = task_.begin; first < task_.end; first += kKeys) run_keys({first, std::min(first + kKeys, task_.end)});
    each_block([&]<int kVecs>(int64_t head, int64_t block) { end_block<kVecs>(head, block); });
  }

 private:
  template <class F>
  void each_block(F&& f) {
    for (int64_t head = 0; head < group_; ++head) {
      for (int64_t block = 0; block < blocks_; ++block) {
        with_vectors((queries(block) + Vec::width - 1) / Vec::width, [&]<int kVecs>() { f.template operator()<kVecs>(head, block); });
      }
    }
  }
  int64_t queries(int64_t block) const { return std::min<int64_t>(kQueries, sequence_.queries - block * kQueries); }
  int64_t query_head(int64_t head) const { return task_.head * group_ + head; }
  int64_t out_offset(int64_t head, int64_t block) const {
    return ((sequence_.first_query + block * kQueries) * p_.heads + query_head(head)) * p_.head_dim;
  }

  template <int kVecs>
  void begin_block(int64_t head, int64_t block) {
    constexpr int64_t lanes = kVecs * Vec::width;
    const auto to = b_.block(head * blocks_ + block);
    const int64_t h = query_head(head), first = block * kQueries, count = queries(block);
    const E* q = static_cast<const E*>(p_.q.data) + sequence_.q + h * p_.q.head_stride + first * p_.q.token_stride;
    const E* grad = static_cast<const E*>(job_.grad_out.data) + sequence_.grad_out + h * job_.grad_out.head_stride +
                    first * job_.grad_out.token_stride;
    pack_transposed<A>(q, p_.q.token_stride, count, p_.head_dim, to.q_lanes, lanes);
    pack_transposed<A>(grad, job_.grad_out.token_stride, count, p_.head_dim, to.grad_lanes, lanes);
    std::memset(static_cast<void*>(to.q_rows), 0, lanes * width_ * sizeof(Stored));
    std::memset(static_cast<void*>(to.grad_rows), 0, lanes * width_ * sizeof(Stored));
    pack_rows<A>(q, p_.q.token_stride, count, p_.head_dim, to.q_rows, width_);
    pack_rows<A>(grad, job_.grad_out.token_stride, count, p_.head_dim, to.grad_rows, width_);
    std::fill_n(to.grad_q, depth_ * lanes, 0.0f);
    std::fill_n(to.total, lanes, 0.0f);

    const E* out = static_cast<const E*>(job_.out) + out_offset(head, block);
    pack_transposed<A>(out, p_.heads * p_.head_dim, count, p_.head_dim, b_.out_lanes, lanes);
    const int64_t at = sequence_.lse + h * p_.lse_head_stride + first;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const bool hidden = lane >= count || job_.lse[at + lane] == -INFINITY;
      to.lse[lane] = hidden ? kHiddenLse : job_.lse[at + lane];
      to.delta[lane] = !hidden && job_.grad_lse ? -job_.grad_lse[at + lane] : 0.0f;
      to.minus_grad_lse[lane] = to.delta[lane];
    }
    add_products<kVecs>(to, block);
  }

  // delta += dO O. A query with one key, where O is V, takes the order of V dO^T, which leaves a dS of exactly zero, as it should.
  // Others in float32 take a better order: with few keys, an error of delta weighs more than those of dP.
  template <int kVecs>
  DK_INLINE void add_products(const BackwardBlock<A>& to, int64_t block) {
    constexpr int64_t lanes = kVecs * Vec::width;
    constexpr int parts = 8;
    for (int v = 0; v < kVecs; ++v) {
      Vec chain, chains, part[parts];
      for (int64_t s = 0; s < steps_; ++s) {
        const int64_t i = (s * lanes + v * Vec::width) * A::pack;
        const auto out = A::load(b_.out_lanes + i), grad = A::load(to.grad_lanes + i);
        chain = A::dot(out, grad, chain);
        if constexpr (A::pack == 1) {
          part[s % parts] = A::dot(out, grad, part[s % parts]);
          if (s % kChain == kChain - 1 || s == steps_ - 1) {  // as multiply_rows
            chains = chain + chains;
            chain = Vec();
          }
        }
      }
      float* delta = to.delta + v * Vec::width;
      Vec products = chain;
      if constexpr (A::pack == 1) {
        for (int width = parts / 2; width > 0; width /= 2) {
          for (int n = 0; n < width; ++n) part[n] = part[n] + part[n + width];
        }
        const Vec keys = mask_.visible_keys(block * kQueries + v * Vec::width);
        products = select_less(keys, Vec(1.5f), chains, part[0]);
      }
      store(delta, load(delta, Full{}) + products, Full{});
    }
  }

  void run_keys(Range keys) {
    const int64_t count = keys.end - keys.begin;
    // The first group of keys with a gradient: constants before it cost three products instead of five.
    const int64_t variable = std::max(keys.begin, sequence_.constant_keys / kRows * kRows);
    const E* k = static_cast<const E*>(p_.k.data) + sequence_.k + task_.head * p_.k.head_stride + keys.begin * p_.k.token_stride;
    const E* v = static_cast<const E*>(p_.v.data) + sequence_.v + task_.head * p_.v.head_stride + keys.begin * p_.v.token_stride;
    key_rows_.prepare(k, p_.k.token_stride, count, p_.head_dim, b_.key_copies);
    value_rows_.prepare(v, p_.v.token_stride, count, p_.head_dim, b_.value_copies);
    pack_rows<A>(k, p_.k.token_stride, count, p_.head_dim, b_.keys, width_);
    std::fill_n(b_.grad_k, round_up(count, kRows) * width_, 0.0f);
    std::fill_n(b_.grad_v, round_up(count, kRows) * width_, 0.0f);
    each_block([&]<int kVecs>(int64_t head, int64_t block) {
      Range seen = mask_.visible(block * kQueries, queries(block));
      seen = {std::max((seen.begin - keys.begin) / kRows * kRows + keys.begin, keys.begin), std::min(seen.end, keys.end)};
      if (seen.empty()) return;
      const auto packed = b_.block(head * blocks_ + block);
      const Range all = mask_.visible(block * kQueries, queries(block));
      differentiate_scores<kVecs>(packed, block, seen, keys.begin, all.begin >= keys.begin && all.end <= keys.end);
      accumulate_rows<kVecs>(b_.p_rows, packed.grad_rows, b_.grad_v, seen, keys.begin, variable);
      accumulate_rows<kVecs>(b_.ds_rows, packed.q_rows, b_.grad_k, seen, keys.begin, variable);
      accumulate_grad_q<kVecs>(packed, seen, keys.begin);
    });
    write_rows(b_.grad_k, static_cast<E*>(job_.grad_k), keys, p_.scale);
    write_rows(b_.grad_v, static_cast<E*>(job_.grad_v), keys, 1.0f);
  }

  // Fills p_rows, ds_rows and ds_lanes; row 0 is key seen.begin. Where `complete`, these are all keys that the queries see, and
  // float32 takes delta from the products at hand: with few keys dS is a small difference of large numbers, of which the rounding of
  // O would be several times the error.
  template <int kVecs>
  DK_INLINE void differentiate_scores(const BackwardBlock<A>& packed, int64_t block, Range seen, int64_t origin, bool complete) {
    constexpr int64_t lanes = kVecs * Vec::width;
    const int64_t query = block * kQueries;
    const bool late = A::pack == 1 && complete;
    Vec total[kVecs], products[2][kVecs];
    for (int64_t key = seen.begin; key < seen.end; key += kRows) {
      const int64_t offset = (key - seen.begin) * lanes;
      const bool final = !scaling_.at_once && mask_.all_visible(key, query, queries(block));
      multiply_rows<A, kRows, kVecs>(key_rows_.row(key - origin), key_rows_.stride(key - origin), packed.q_lanes, lanes * A::pack,
                                steps_, b_.partial, [&](Vec(&tile)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 16
                                  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
                                    for (int v = 0; v < kVecs; ++v) {
                                      store(b_.probabilities + r * lanes + v * Vec::width, tile[r][v], Full{});
                                    }
                                  }
                                });
      float* const slopes = b_.slopes + (late ? offset : 0);
      if (!final) adjust<kVecs>(key, query, slopes);
      for (int v = 0; v < kVecs; ++v) {
        const Vec lse = load(packed.lse + v * Vec::width, Full{});
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r += 2) {
          float* at = b_.probabilities + r * lanes + v * Vec::width;
          const Vec first = scaling_.template relative_to_lse<A>(load(at, Full{}), lse);
          const Vec second = scaling_.template relative_to_lse<A>(load(at + lanes, Full{}), lse);
          if constexpr (A::pack == 1) total[v] = total[v] + (first + second);
          store(at, first, Full{});
          store(at + lanes, second, Full{});
          store_forms<kVecs>(b_.p_rows + offset + r * lanes + v * Vec::width, nullptr, first, second);
        }
      }
      multiply_rows<A, kRows, kVecs>(
          value_rows_.row(key - origin), value_rows_.stride(key - origin), packed.grad_lanes, lanes * A::pack, steps_, b_.partial,
          [&](Vec(&tile)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) {
              const Vec delta = load(packed.delta + v * Vec::width, Full{});
              if constexpr (A::pack == 1) {
                if (late) {
#pragma GCC unroll 16
                  for (int r = 0; r < kRows; ++r) {
                    const float* at = b_.probabilities + r * lanes + v * Vec::width;
                    products[r % 2][v] = fma(load(at, Full{}), tile[r][v], products[r % 2][v]);
                    store(b_.ds_rows + offset + r * lanes + v * Vec::width, tile[r][v], Full{});
                  }
                  continue;
                }
              }
#pragma GCC unroll 16
              for (int r = 0; r < kRows; r += 2) {
                const float* at = b_.probabilities + r * lanes + v * Vec::width;
                tile[r][v] = load(at, Full{}) * (tile[r][v] - delta);
                tile[r + 1][v] = load(at + lanes, Full{}) * (tile[r + 1][v] - delta);
                if (scaling_.softcap > 0) {
                  const float* slope = slopes + r * lanes + v * Vec::width;
                  tile[r][v] = tile[r][v] * load(slope, Full{});
                  tile[r + 1][v] = tile[r + 1][v] * load(slope + lanes, Full{});
                }
                store_forms<kVecs>(b_.ds_rows + offset + r * lanes + v * Vec::width,
                                   b_.ds_lanes + offset + r * lanes + v * Vec::width * A::pack, tile[r][v], tile[r + 1][v]);
              }
            }
          });
    }
    if constexpr (A::pack == 1) {
      if (late) {
        for (int v = 0; v < kVecs; ++v) {
          // The sum of P is 1 but for the rounding of lse, which this takes away.
          const Vec whole = select_less(Vec(), total[v], Vec(1.0f) / total[v], Vec());
          const Vec mean = (products[0][v] + products[1][v]) * whole;
          const Vec minus_grad_lse = load(packed.minus_grad_lse + v * Vec::width, Full{});
          for (int64_t at = v * Vec::width; at < round_up(seen.end - seen.begin, kRows) * lanes; at += lanes) {
            const Vec p = load(b_.p_rows + at, Full{}) * whole;
            Vec ds = p * ((load(b_.ds_rows + at, Full{}) - mean) - minus_grad_lse);  // in this order: the first may be zero
            if (scaling_.softcap > 0) ds = ds * load(b_.slopes + at, Full{});
            store(b_.p_rows + at, p, Full{});
            store(b_.ds_rows + at, ds, Full{});
          }
          total[v] = select_less(Vec(), total[v], Vec(1.0f), Vec());
        }
      }
      for (int v = 0; v < kVecs; ++v) {
        float* at = packed.total + v * Vec::width;
        store(at, load(at, Full{}) + total[v], Full{});
      }
    }
  }

  // Rows r and r + 1 of a tile, in the form of rows and, unless `interleaved` is null, in that of lanes.
  template <int kVecs>
  static DK_INLINE void store_forms(Stored* rows, [[maybe_unused]] Stored* interleaved, Vec first, Vec second) {
    constexpr int64_t lanes = kVecs * Vec::width;
    if constexpr (A::same_forms) {
      store(rows, first, Full{});
      store(rows + lanes, second, Full{});
    } else {
#if DK_VEC_LEVEL == 513
      const __m512i both = rounded_rows(first, second);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + lanes), _mm512_extracti64x4_epi64(both, 1));
      if (interleaved) _mm512_storeu_si512(interleaved, interleaved_rows(both));
#endif
    }
  }

  template <int kVecs>
  __attribute__((noinline)) void adjust(int64_t key, int64_t query, float* slopes) {
    const bool masked = !mask_.all_visible(key, query, kVecs * Vec::width);
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        const int64_t at = (r * kVecs + v) * Vec::width;
        Vec s = load(b_.probabilities + at, Full{});
        if (scaling_.at_once) s = s * Vec(scaling_.scale);
        if (scaling_.softcap > 0) {
          Vec slope;
          s = capped(s, scaling_.softcap, slope);
          store(slopes + at, slope, Full{});
        }
        if (masked) s = mask_.hide(s, key + r, query + v * Vec::width);
        store(b_.probabilities + at, s, Full{});
      }
    }
  }

  // grad[key] += sum over queries of rows[key, query] right[query], from key `variable` on
  template <int kVecs>
  DK_INLINE void accumulate_rows(const Stored* rows, const Stored* right, float* grad, Range seen, int64_t origin,
                                 int64_t variable) {
    for (int64_t d = 0; d < width_;) {
      // Of four vectors two and two: a last one alone would wait for its loads.
      const int64_t left = (width_ - d) / Vec::width, now = left == kMaxVecs + 1 ? 2 : std::min<int64_t>(left, kMaxVecs);
      with_vectors(now, [&]<int kColumns>() {
        constexpr int64_t lanes = kVecs * Vec::width;
        for (int64_t key = std::max(seen.begin, variable); key < seen.end; key += kRows) {
          float* to = grad + (key - origin) * width_ + d;
          multiply<A, kRows, kColumns>(rows + (key - seen.begin) * lanes, lanes, A::pack, right + d * A::pack, width_ * A::pack,
                                       lanes / A::pack, [&](Vec(&tile)[kRows][kColumns]) __attribute__((always_inline)) {
                                         add_tile<kColumns>(tile, to, width_);
                                       });
        }
      });
      d += now * Vec::width;
    }
  }

  template <int kVecs>
  DK_INLINE void accumulate_grad_q(const BackwardBlock<A>& packed, Range seen, int64_t origin) {
    constexpr int64_t lanes = kVecs * Vec::width;
    const int64_t steps = (seen.end - seen.begin + A::pack - 1) / A::pack;
    for (int64_t d = 0; d < depth_; d += kRows) {
      multiply<A, kRows, kVecs>(b_.keys + (seen.begin - origin) * width_ + d * A::pack, A::pack, width_ * A::pack, b_.ds_lanes,
                                lanes * A::pack, steps, [&](Vec(&tile)[kRows][kVecs]) __attribute__((always_inline)) {
                                  add_tile<kVecs>(tile, packed.grad_q + d * lanes, lanes);
                                });
    }
  }

  template <int kVecs>
  static DK_INLINE void add_tile(Vec (&tile)[kRows][kVecs], float* to, int64_t stride) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        float* at = to + r * stride + v * Vec::width;
        store(at, load(at, Full{}) + tile[r][v], Full{});
      }
    }
  }

  void write_rows(const float* grad, E* to, Range keys, float scale) {
    const Vec factor(scale);
    for (int64_t key = keys.begin; key < keys.end; ++key, grad += width_) {
      E* row = to + ((sequence_.first_key + key) * p_.kv_heads + task_.head) * p_.head_dim;
      for_each_vector(p_.head_dim, [&](int64_t d, auto extent) __attribute__((always_inline)) {
        store(row + d, key < sequence_.constant_keys ? Vec() : load(grad + d, extent) * factor, extent);
      });
    }
  }

  template <int kVecs>
  void end_block(int64_t head, int64_t block) {
    constexpr int64_t lanes = kVecs * Vec::width;
    const float* grad_q = b_.block(head * blocks_ + block).grad_q;
    const int64_t at = out_offset(head, block), stride = p_.heads * p_.head_dim;
    // The rounding of lse scales all probabilities of a query alike, by up to 1 +- 2e-7. In float32 that would be its largest error;
    // their sum tells how much it was.
    const float* total = b_.block(head * blocks_ + block).total;
    const bool known = A::pack == 1 && task_.part < 0;
    for (int64_t lane = 0; lane < lanes; ++lane) b_.factors[lane] = known && total[lane] > 0.0f ? p_.scale / total[lane] : p_.scale;
    if (task_.part >= 0) {
      float* part = job_.grad_q_parts + task_.part * job_.part_stride;
      store_transposed(grad_q, lanes, b_.factors, queries(block), p_.head_dim, part + at, stride);
    } else {
      store_transposed(grad_q, lanes, b_.factors, queries(block), p_.head_dim, static_cast<E*>(job_.grad_q) + at, stride);
    }
  }

  const Backward& job_;
  const Problem& p_;
  const Task& task_;
  const Sequence& sequence_;
  const BackwardBuffers<A>& b_;
  Mask mask_;
  Scaling scaling_;
  int64_t blocks_, group_;
  int64_t steps_;          // lanes' worth of head_dim
  int64_t depth_, width_;  // head_dim rounded up to tiles and to vectors
  LeftRows<A> key_rows_, value_rows_;
};

template <class A, class E>
void run_tasks(const Backward& job, std::atomic<int64_t>& next_task) {
  const Problem& p = job.problem;
  int64_t longest = 0;
  for (int64_t t = 0; t < p.task_count; ++t) longest = std::max(longest, p.sequences[p.tasks[t].sequence].queries);
  const int64_t blocks = (longest + kQueries - 1) / kQueries * (p.heads / p.kv_heads);
  const Workspace<BackwardBuffers<A>> workspace(blocks, p.head_dim);
  for (int64_t t; (t = next_task.fetch_add(1, std::memory_order_relaxed)) < p.task_count;) {
    BackwardTask<A, E>(job, p.tasks[t], workspace.buffers).run();
  }
}

}  // namespace

void backward_tasks(Element element, const Backward& job, std::atomic<int64_t>& next_task) {
  with_element(element, [&]<class E>(E*) {
#if DK_VEC_LEVEL == 513
    if constexpr (std::is_same_v<E, BFloat16>) return run_tasks<BFloat16Arithmetic, E>(job, next_task);
#endif
    run_tasks<Float32Arithmetic, E>(job, next_task);
  });
}

void reduce_grad_q(Element element, const Backward& job, int64_t parts, int64_t begin, int64_t end) {
  with_element(element, [&]<class E>(E*) {
    E* to = static_cast<E*>(job.grad_q) + begin;
    for_each_vector(end - begin, [&](int64_t i, auto extent) __attribute__((always_inline)) {
      Vec total = load(job.grad_q_parts + begin + i, extent);
      for (int64_t part = 1; part < parts; ++part) total = total + load(job.grad_q_parts + part * job.part_stride + begin + i, extent);
      store(to + i, total, extent);
    });
  });
}

}  // namespace dreamkernels::attention::DK_ISA
