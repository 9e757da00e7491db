// What the two CPU kernels share: memory of a thread, the rows of a tile of keys, and the task of a part.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "common/vec.h"
#include "decode_attention/kernels.h"

namespace dreamkernels::decode_attention::DK_ISA {
namespace {

using namespace ::dreamkernels::DK_ISA;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One allocation for what a thread needs.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64)))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(static_cast<char*>(memory_) + used_);
    used_ += bytes_of<T>(count);
    return piece;
  }
  template <class T>
  static int64_t bytes_of(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

 private:
  void* memory_;
  int64_t used_ = 0;
};

// The rows of a tile of keys and of their values.
template <class E>
struct TileRows {
  const E* keys[kTileKeys];
  const E* values[kTileKeys];
  int count;

  TileRows(const Job& job, int64_t sequence, int64_t kv_head, int64_t first, int64_t end)
      : count(static_cast<int>(std::clamp<int64_t>(end - first, 0, kTileKeys))) {
    for (int k = 0; k < count; ++k) {
      const int64_t page = job.paging.page_of(sequence, first + k), slot = job.paging.slot_of(first + k);
      keys[k] = static_cast<const E*>(job.k_cache) + job.k_strides.offset(page, slot, kv_head);
      values[k] = static_cast<const E*>(job.v_cache) + job.v_strides.offset(page, slot, kv_head);
    }
  }
};

// One task: a part of the keys of a sequence, for all rows of a head.
struct Task {
  const Job& job;
  int64_t sequence, kv_head, split, length;
  KeyRange part;

  Task(const Job& j, int64_t index) : job(j) {
    const int64_t heads = job.sequences * job.kv_heads;
    split = index / heads;
    sequence = index % heads / job.kv_heads;
    kv_head = index % job.kv_heads;
    length = job.length_of(sequence);
    part = job.part(job.visible(length, 0, job.tokens - 1), static_cast<int>(split), kTileKeys);
  }
  template <class E>
  const E* query(int row) const {
    return static_cast<const E*>(job.q) + sequence * job.q_sequence + row / job.group() * job.q_token +
           (kv_head * job.group() + row % job.group()) * job.q_head;
  }
  // The keys that a row sees.
  KeyRange seen_by(int row) const { return job.visible(length, row / job.group(), row / job.group()); }

  // Stores channel values out(d) of a row, divided by its sum.
  template <class E, class F>
  void store_row(int row, float maximum, float total, F&& out) const {
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const float lse = total > 0.0f ? maximum + std::log(total) : kMinusInfinity;
    const int64_t head = kv_head * job.group() + row % job.group(), token = row / job.group();
    if (job.splits == 1) {
      out(static_cast<E*>(job.out) + ((sequence * job.tokens + token) * job.q_heads + head) * job.width, inverse);
      job.lse[(sequence * job.q_heads + head) * job.tokens + token] = lse;
    } else {
      const int64_t at = ((split * job.sequences + sequence) * job.kv_heads + kv_head) * job.rows() + row;
      out(job.partial_out + at * job.width, inverse);
      job.partial_lse[at] = lse;
    }
  }
};

}  // namespace
}  // namespace dreamkernels::decode_attention::DK_ISA
