// One call of decode_attention, as the CPU and the CUDA kernels take it.
//
// For each sequence and each head of the cache the queries that share it form one matrix of rows: row r is query r / group of head
// (kv_head * group + r % group), so that neighbouring rows see nearly the same keys.
#pragma once
#include <cstdint>

#include "common/paged_cache.h"

namespace dreamkernels::decode_attention {

// The keys [begin, end) of a sequence.
struct KeyRange {
  int64_t begin, end;
};

struct Job {
  const void *q, *k_cache, *v_cache;
  const int32_t* cache_seqlens;
  void* out;           // [sequences, tokens, q_heads, width], row-major
  float* lse;          // [sequences, q_heads, tokens]
  float* partial_out;  // [splits, sequences * kv_heads, rows, width], each normalised by its own sum; null when splits is 1
  float* partial_lse;  // [splits, sequences * kv_heads, rows]
  int64_t q_sequence, q_token, q_head;  // strides of q in elements; channels are adjacent
  CacheStrides k_strides, v_strides;
  Paging paging;
  int64_t sequences;
  int tokens, q_heads, kv_heads, width;
  int window;  // -1: none
  int splits;
  float scale, softcap;  // softcap 0: none
  bool causal;

  DK_HOST_DEVICE int group() const { return q_heads / kv_heads; }
  DK_HOST_DEVICE int rows() const { return tokens * group(); }

  // The length of a sequence, never more than its memory.
  DK_HOST_DEVICE int64_t length_of(int64_t sequence) const {
    const int64_t length = cache_seqlens[sequence];
    return length < 0 ? 0 : length > paging.capacity() ? paging.capacity() : length;
  }

  // The keys that at least one of the queries first_token ... last_token sees.
  DK_HOST_DEVICE KeyRange visible(int64_t length, int first_token, int last_token) const {
    const int64_t first = length - tokens + first_token, last = length - tokens + last_token;
    int64_t begin = window < 0 ? 0 : first - window + 1;
    int64_t end = causal ? last + 1 : window < 0 ? length : last + window;
    if (begin < 0) begin = 0;
    if (end > length) end = length;
    return {begin, end < begin ? begin : end};
  }
  // Whether the query at `position` of its sequence sees a key.
  DK_HOST_DEVICE bool sees(int64_t position, int64_t key) const {
    if (causal && key > position) return false;
    return window < 0 || (key > position - window && key < position + window);
  }

  // Part `split` of a range, in whole tiles; the parts depend on the range and on `splits` only.
  DK_HOST_DEVICE KeyRange part(KeyRange range, int split, int tile) const {
    const int64_t first = range.begin / tile, tiles = (range.end + tile - 1) / tile - first;
    const int64_t each = (tiles + splits - 1) / splits;
    int64_t begin = (first + split * each) * tile, end = begin + each * tile;
    if (begin < range.begin) begin = range.begin;
    if (end > range.end) end = range.end;
    return {begin, end < begin ? begin : end};
  }
};

// As many parts as give every multiprocessor two blocks, with at least two tiles of keys each when the cache is full. From shapes alone:
// the lengths are on the device, and reading them would stop the host.
inline int choose_splits(int64_t blocks, int64_t capacity, int tile, int64_t multiprocessors) {
  constexpr int64_t most = 64;
  const int64_t wanted = (2 * multiprocessors + blocks - 1) / (blocks < 1 ? 1 : blocks);
  const int64_t useful = capacity / (2 * tile);
  const int64_t splits = wanted < useful ? wanted : useful;
  return static_cast<int>(splits < 1 ? 1 : splits > most ? most : splits);
}

}  // namespace dreamkernels::decode_attention
