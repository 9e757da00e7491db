// One call of append_kv, as the CPU and the CUDA kernels take it.
#pragma once
#include <cstdint>

#include "common/paged_cache.h"

namespace dreamkernels::append_kv {

// Distances in elements between neighbours of [sequence, token, head, channel]; channels are adjacent.
struct TokenStrides {
  int64_t sequence, token, head;
};

struct Job {
  const void *q, *k, *v;
  void *k_cache, *v_cache;
  void* rotated_q;  // [sequences, tokens, q_heads, width], row-major
  const int32_t* cache_seqlens;
  const void *cos, *sin;                   // [positions, rotated]
  const void *q_norm_weight, *k_norm_weight;  // [width]; null: not normalised
  TokenStrides q_strides, k_strides, v_strides;
  CacheStrides k_cache_strides, v_cache_strides;
  Paging paging;
  int64_t sequences, tokens, positions;
  int q_heads, kv_heads, width, rotated;
  float eps;

  DK_HOST_DEVICE int heads() const { return q_heads + 2 * kv_heads; }
};

}  // namespace dreamkernels::append_kv
