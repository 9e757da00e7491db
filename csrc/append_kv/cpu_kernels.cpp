#include "append_kv/kernels.h"

#include <cmath>
#include <cstring>

#include "common/vec.h"

namespace dreamkernels::append_kv::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

template <class E>
DK_INLINE float rstd_of_row(const E* x, int width, float eps) {
  Vec squares[2];
  for_each_vector(width, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    const Vec v = load(x + i, extent);
    Vec& part = squares[i / Vec::width % 2];
    part = fma(v, v, part);
  });
  return static_cast<float>(1.0 / std::sqrt(sum(squares[0] + squares[1]) / static_cast<double>(width) + eps));
}

// y = rotation of norm(x); weight null: x is not normalised. Rounds where rms_norm followed by rotary would.
template <class E, class Table, bool kNorm>
DK_INLINE void rotate_row(const E* x, E* y, const E* weight, const Table* cos, const Table* sin, const Job& job) {
  const int half = job.rotated / 2;
  const Vec rstd(kNorm ? rstd_of_row(x, job.width, job.eps) : 1.0f);
  auto normalised = [&](int64_t i, auto extent) __attribute__((always_inline)) {
    const Vec v = load(x + i, extent);
    if constexpr (kNorm) {
      return round_to<E>(round_to<E>(v * rstd) * load(weight + i, extent));
    } else {
      return v;
    }
  };
  for_each_vector(half, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    const Vec first = normalised(i, extent), second = normalised(i + half, extent);
    store(y + i, first * load(cos + i, extent) - second * load(sin + i, extent), extent);
    store(y + i + half, second * load(cos + i + half, extent) + first * load(sin + i + half, extent), extent);
  });
  for_each_vector(job.width - job.rotated, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
    const int64_t i = job.rotated + offset;
    store(y + i, normalised(i, extent), extent);
  });
}

template <class E, class Table>
void rows(const Job& job, int64_t begin, int64_t end) {
  const int64_t heads = job.heads();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row / heads % job.tokens, sequence = row / heads / job.tokens;
    const int64_t position = job.cache_seqlens[sequence] + token;
    const int64_t page = job.paging.page_of(sequence, position), slot = job.paging.slot_of(position);
    auto source = [&](const void* data, const TokenStrides& strides, int64_t head) {
      return static_cast<const E*>(data) + sequence * strides.sequence + token * strides.token + head * strides.head;
    };
    int64_t head = row % heads;
    if (head >= job.q_heads + job.kv_heads) {
      head -= job.q_heads + job.kv_heads;
      std::memcpy(static_cast<E*>(job.v_cache) + job.v_cache_strides.offset(page, slot, head), source(job.v, job.v_strides, head),
                  job.width * sizeof(E));
      continue;
    }
    const bool is_query = head < job.q_heads;
    if (!is_query) head -= job.q_heads;
    const E* x = is_query ? source(job.q, job.q_strides, head) : source(job.k, job.k_strides, head);
    E* y = is_query ? static_cast<E*>(job.rotated_q) + ((sequence * job.tokens + token) * job.q_heads + head) * job.width
                    : static_cast<E*>(job.k_cache) + job.k_cache_strides.offset(page, slot, head);
    const E* weight = static_cast<const E*>(is_query ? job.q_norm_weight : job.k_norm_weight);
    const Table* cos = static_cast<const Table*>(job.cos) + position * job.rotated;
    const Table* sin = static_cast<const Table*>(job.sin) + position * job.rotated;
    weight ? rotate_row<E, Table, true>(x, y, weight, cos, sin, job) : rotate_row<E, Table, false>(x, y, weight, cos, sin, job);
  }
}

}  // namespace

void append_rows(Element element, bool float_tables, const Job& job, int64_t begin_row, int64_t end_row) {
  with_element(element, [&]<class E>(E*) {
    float_tables ? rows<E, float>(job, begin_row, end_row) : rows<E, E>(job, begin_row, end_row);
  });
}

}  // namespace dreamkernels::append_kv::DK_ISA
