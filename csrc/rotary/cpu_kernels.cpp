#include "rotary/kernels.h"

#include <cstring>
#include <type_traits>

#include "common/vec.h"

namespace dreamkernels::rotary::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

// Heads that share one reading of a table row. More would be more streams than the prefetchers follow.
constexpr int64_t heads_per_group = 8;

DK_INLINE Two minus(const Two& t) { return {Vec(0.0f) - t.a, Vec(0.0f) - t.b}; }

int64_t table_row(const Rotate& job, int64_t batch, int64_t token) {
  const int64_t at = batch * job.position_batch + token * job.position_token;
  return job.wide_positions ? static_cast<const int64_t*>(job.positions)[at] : static_cast<const int32_t*>(job.positions)[at];
}

// y1 = c1 x1 - s1 x2, y2 = c2 x2 + s2 x1 for the halves of a head; transposed: y1 = c1 x1 + s2 x2, y2 = c2 x2 - s1 x1.
template <class E, class Table>
DK_INLINE void rotate_heads(const Rotate& job, const Table* cos, const Table* sin, const E* x, int64_t x_head, E* y,
                            int64_t y_head, int64_t heads) {
  const int64_t half = job.rotated / 2;
  int64_t i = 0;
  if constexpr (std::is_same_v<E, Table>) {  // elements of one type come in one order (Two), whatever it is
    for (; i + 2 * Vec::width <= half; i += 2 * Vec::width) {
      const Two c1 = load_two(cos + i), c2 = load_two(cos + half + i);
      const Two s1 = minus(load_two(sin + i)), s2 = load_two(sin + half + i);
      const Two to_first = job.transposed ? s2 : s1, to_second = job.transposed ? s1 : s2;
      for (int64_t h = 0; h < heads; ++h) {
        const E* from = x + h * x_head + i;
        E* to = y + h * y_head + i;
        const Two first = load_two(from), second = load_two(from + half);
        store_two(to, {fma(second.a, to_first.a, first.a * c1.a), fma(second.b, to_first.b, first.b * c1.b)});
        store_two(to + half, {fma(first.a, to_second.a, second.a * c2.a), fma(first.b, to_second.b, second.b * c2.b)});
      }
    }
  }
  for_each_vector(half - i, [&](int64_t offset, auto extent) __attribute__((always_inline)) {
    const int64_t at = i + offset;
    const Vec c1 = load(cos + at, extent), c2 = load(cos + half + at, extent);
    const Vec s1 = Vec(0.0f) - load(sin + at, extent), s2 = load(sin + half + at, extent);
    const Vec to_first = job.transposed ? s2 : s1, to_second = job.transposed ? s1 : s2;
    for (int64_t h = 0; h < heads; ++h) {
      const E* from = x + h * x_head + at;
      E* to = y + h * y_head + at;
      const Vec first = load(from, extent), second = load(from + half, extent);
      store(to, fma(second, to_first, first * c1), extent);
      store(to + half, fma(first, to_second, second * c2), extent);
    }
  });
  const int64_t kept = job.width - job.rotated;
  if (kept > 0 && x != y) {
    for (int64_t h = 0; h < heads; ++h) {
      std::memcpy(y + h * y_head + job.rotated, x + h * x_head + job.rotated, kept * sizeof(E));
    }
  }
}

template <class E, class Table>
void rotate(const Rotate& job, int64_t begin_tile, int64_t end_tile) {
  const int64_t tiles_per_sequence = (job.tokens + tokens_per_tile - 1) / tokens_per_tile;
  for (int64_t tile = begin_tile; tile < end_tile; ++tile) {
    const int64_t batch = tile / tiles_per_sequence;
    const int64_t begin = tile % tiles_per_sequence * tokens_per_tile;
    const int64_t end = begin + tokens_per_tile < job.tokens ? begin + tokens_per_tile : job.tokens;
    for (const Heads& part : job.parts) {
      auto group = [&](int64_t token, int64_t head) __attribute__((always_inline)) {
        const int64_t row = job.positions ? table_row(job, batch, token) : token;
        const int64_t cos_batch = job.positions ? 0 : batch * job.cos_batch;
        const int64_t sin_batch = job.positions ? 0 : batch * job.sin_batch;
        const int64_t count = part.count - head < heads_per_group ? part.count - head : heads_per_group;
        rotate_heads<E>(job, static_cast<const Table*>(job.cos) + cos_batch + row * job.cos_row,
                        static_cast<const Table*>(job.sin) + sin_batch + row * job.sin_row,
                        static_cast<const E*>(part.x) + batch * part.from.batch + token * part.from.token + head * part.from.head,
                        part.from.head,
                        static_cast<E*>(part.y) + batch * part.to.batch + token * part.to.token + head * part.to.head,
                        part.to.head, count);
      };
      // The inner loop walks along memory.
      if (part.from.head > part.from.token) {
        for (int64_t head = 0; head < part.count; head += heads_per_group) {
          for (int64_t token = begin; token < end; ++token) group(token, head);
        }
      } else {
        for (int64_t token = begin; token < end; ++token) {
          for (int64_t head = 0; head < part.count; head += heads_per_group) group(token, head);
        }
      }
    }
  }
}

}  // namespace

void rotate_tiles(Element element, const Rotate& job, int64_t begin_tile, int64_t end_tile) {
  with_element(element, [&]<class E>(E*) {
    job.float32_tables ? rotate<E, float>(job, begin_tile, end_tile) : rotate<E, E>(job, begin_tile, end_tile);
  });
}

}  // namespace dreamkernels::rotary::DK_ISA
