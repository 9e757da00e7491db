// The CUDA kernels of decode_attention. Compiled by nvcc, and for the CPU by the emulator of the tests.
//
// A block attends with one tile of 16 * kRowWarps rows (see job.h) to one part of the keys of its sequence, kKeys at a time:
//
//            keys of a tile
//          | warp 0 | warp 1 | warp 2 | warp 3 |   kRowWarps = 1: up to 16 rows, the four warps divide the keys
//   rows   +-----------------------------------+
//          |              warp 0               |   kRowWarps = 4: up to 64 rows, the four warps divide the rows
//          |              ...                  |
//
// K and V tiles come by cp.async, kStages - 1 tiles ahead, one barrier per tile. Rows of kWidth channels are stored as chunks of 16
// bytes, permuted within the row such that 8 rows of one column of chunks lie in 8 different groups of banks. Every warp keeps a
// softmax of its own; they are joined in shared memory at the end, in a fixed order.
#pragma once
#include "common/device.h"
#include "decode_attention/job.h"

namespace dreamkernels::decode_attention::kernels {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kKeys = 64;
constexpr float kLog2e = 1.4426950408889634f;

template <int kWidth>
struct Tile {
  static constexpr int kChunks = kWidth / 8;
  static constexpr int kUnit = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;  // of chunks that may change places
  static_assert(kChunks % 2 == 0);

  // The place of a chunk in a tile, in elements.
  static __device__ __forceinline__ int at(int row, int chunk) { return (row * kChunks + (chunk ^ (row / (8 / kUnit) % kUnit))) * 8; }
};

template <int kWidth, int kRowWarps>
struct Layout {
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kKeyWarps = kWarps / kRowWarps;
  static constexpr int kStages = kWidth <= 64 ? 3 : 2;
  static constexpr int kElements = (kRows + 2 * kStages * kKeys) * kWidth;
  static constexpr int kSumStride = kWidth + 4;  // floats per row of the results that the warps exchange
  static constexpr int kBytes = kElements * 2;
  static_assert(kWarps * 16 * kSumStride * 4 <= kBytes);
};

template <class E, int kWidth, int kRows>
__device__ __forceinline__ void load_queries(E* to, const Job& job, int64_t sequence, int kv_head, int first_row) {
  constexpr int chunks = Tile<kWidth>::kChunks;
  for (int i = threadIdx.x; i < kRows * chunks; i += kThreads) {
    const int r = i / chunks, chunk = i % chunks, row = first_row + r;
    const bool valid = row < job.rows() && chunk * 8 < job.width;
    const int token = valid ? row / job.group() : 0, head = kv_head * job.group() + (valid ? row % job.group() : 0);
    const E* from = static_cast<const E*>(job.q) + sequence * job.q_sequence + token * job.q_token + head * job.q_head;
    copy_async_16(to + Tile<kWidth>::at(r, chunk), from + (valid ? chunk * 8 : 0), valid);
  }
}

// Keys or values [first, first + kKeys) of a sequence; zeros from `end` on, and in pages that do not exist.
template <class E, int kWidth>
__device__ __forceinline__ void load_keys(E* to, const void* cache, const CacheStrides& strides, const Job& job, int64_t sequence,
                                          int kv_head, int64_t first, int64_t end) {
  constexpr int chunks = Tile<kWidth>::kChunks;
#pragma unroll 4
  for (int i = threadIdx.x; i < kKeys * chunks; i += kThreads) {
    const int r = i / chunks, chunk = i % chunks;
    bool valid = first + r < end && chunk * 8 < job.width;
    int64_t page = sequence, slot = first + r;
    if (job.paging.block_table && valid) {
      // Positions and pages fit 32 bits, whose division is much cheaper.
      const unsigned position = static_cast<unsigned>(first + r), size = static_cast<unsigned>(job.paging.page_size);
      page = job.paging.block_table[sequence * job.paging.pages_per_sequence + position / size];
      slot = position % size;
      valid = job.paging.has_page(page);
    }
    const E* from = static_cast<const E*>(cache) + (valid ? strides.offset(page, slot, kv_head) + chunk * 8 : 0);
    copy_async_16(to + Tile<kWidth>::at(r, chunk), from, valid);
  }
}

// Softmax statistics and the weighted sum of values, of 16 rows: thread l holds rows l / 4 and l / 4 + 8, and of every 8 channels
// 2 (l % 4) and the next one. Scores are in units of log2.
template <int kWidth>
struct Sums {
  float out[kWidth / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};
};

// The scores of 16 rows and kTileKeys keys.
template <class E, int kWidth, int kTileKeys>
__device__ __forceinline__ void multiply_keys(float (&scores)[kTileKeys / 8][4], const uint32_t (&q)[kWidth / 16][4], const E* keys,
                                              int first_key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
#pragma unroll
    for (int j = 0; j < kTileKeys / 16; ++j) {
      uint32_t b[4];
      load_matrices<4>(b, keys + Tile<kWidth>::at(first_key + j * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
      mma_16_8_16<E>(scores[2 * j], q[step], b[0], b[1]);
      mma_16_8_16<E>(scores[2 * j + 1], q[step], b[2], b[3]);
    }
  }
}

template <int kTileKeys>
__device__ __forceinline__ void scale_and_mask(float (&scores)[kTileKeys / 8][4], const Job& job, const int64_t (&position)[2],
                                               int64_t first_key, KeyRange part) {
  const int lane = threadIdx.x % 32;
  const float cap_factor = job.softcap > 0.0f ? 2.0f * kLog2e * job.scale / job.softcap : 0.0f;
#pragma unroll
  for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float s = scores[j][i];
      if (job.softcap > 0.0f) {  // c tanh(s / c) = c (1 - 2 / (e^(2 s / c) + 1))
        s = job.softcap * kLog2e * (1.0f - 2.0f / (exp2_approximate(cap_factor * s) + 1.0f));
      } else {
        s *= job.scale * kLog2e;
      }
      const int64_t key = first_key + j * 8 + lane % 4 * 2 + i % 2;
      const bool visible = key >= part.begin && key < part.end && job.sees(position[i / 2], key);
      scores[j][i] = visible ? s : -INFINITY;
    }
  }
}

// Scores become probabilities relative to the running maximum, to which the sums so far are adjusted.
template <int kWidth, int kTileKeys>
__device__ __forceinline__ void update_softmax(float (&scores)[kTileKeys / 8][4], Sums<kWidth>& sums) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float maximum = sums.maximum[h];
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) maximum = fmaxf(maximum, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
    const float base = maximum == -INFINITY ? 0.0f : maximum;  // a row that has seen no key
    const float adjust = exp2_approximate(sums.maximum[h] - base);
    sums.maximum[h] = maximum;
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        scores[j][i] = exp2_approximate(scores[j][i] - base);
        total += scores[j][i];
      }
    }
    sums.total[h] = sums.total[h] * adjust + total;
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) {
      sums.out[d][2 * h] *= adjust;
      sums.out[d][2 * h + 1] *= adjust;
    }
  }
}

template <class E, int kWidth, int kTileKeys>
__device__ __forceinline__ void multiply_values(Sums<kWidth>& sums, const float (&p)[kTileKeys / 8][4], const E* values, int first_key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTileKeys / 16; ++j) {
    const uint32_t a[4] = {pack_two<E>(p[2 * j][0], p[2 * j][1]), pack_two<E>(p[2 * j][2], p[2 * j][3]),
                           pack_two<E>(p[2 * j + 1][0], p[2 * j + 1][1]), pack_two<E>(p[2 * j + 1][2], p[2 * j + 1][3])};
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      uint32_t b[4];
      load_matrices_transposed<4>(b, values + Tile<kWidth>::at(first_key + j * 16 + lane % 16, d * 2 + lane / 16));
      mma_16_8_16<E>(sums.out[2 * d], a, b[0], b[1]);
      mma_16_8_16<E>(sums.out[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// Where a row's results go.
struct Target {
  int64_t out, lse;
};
__device__ __forceinline__ Target target_of(const Job& job, int64_t sequence, int kv_head, int row) {
  const int token = row / job.group(), head = kv_head * job.group() + row % job.group();
  return {((sequence * job.tokens + token) * job.q_heads + head) * job.width, (sequence * job.q_heads + head) * job.tokens + token};
}

// Joins the warps that divided the keys, and stores the tile: the result, or a part of it.
template <class E, int kWidth, int kRowWarps>
__device__ __forceinline__ void store_tile(const Job& job, const Sums<kWidth>& sums, float* exchange, int64_t sequence, int kv_head,
                                           int split, int first_row) {
  using L = Layout<kWidth, kRowWarps>;
  DK_SHARED_ARRAY(float, maxima, kWarps * 16);
  DK_SHARED_ARRAY(float, totals, kWarps * 16);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int h = 0; h < 2; ++h) {
    float total = sums.total[h];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int row = warp * 16 + lane / 4 + h * 8;
    if (lane % 4 == 0) {
      maxima[row] = sums.maximum[h];
      totals[row] = total;
    }
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) {
      store_pack(exchange + row * L::kSumStride + d * 8 + lane % 4 * 2, Pack<float, 2>{sums.out[d][2 * h], sums.out[d][2 * h + 1]});
    }
  }
  __syncthreads();
  const int groups = job.width / 4;
  for (int i = threadIdx.x; i < L::kRows * groups; i += kThreads) {
    const int r = i / groups, column = i % groups * 4, row = first_row + r;
    if (row >= job.rows()) continue;
    // The warps that hold row r, one after another.
    const int held = r / 16 * L::kKeyWarps * 16 + r % 16;
    float maximum = -INFINITY;
    for (int w = 0; w < L::kKeyWarps; ++w) maximum = fmaxf(maximum, maxima[held + w * 16]);
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    float total = 0.0f, out[4] = {};
    for (int w = 0; w < L::kKeyWarps; ++w) {
      const float factor = exp2_approximate(maxima[held + w * 16] - base);
      total += factor * totals[held + w * 16];
      const auto part = load_pack<Pack<float, 4>>(exchange + (held + w * 16) * L::kSumStride + column);
      for (int k = 0; k < 4; ++k) out[k] = fmaf(factor, part.value[k], out[k]);
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const float lse = total > 0.0f ? (maximum + log2_approximate(total)) / kLog2e : -INFINITY;
    if (job.splits == 1) {
      const Target to = target_of(job, sequence, kv_head, row);
      Pack<E, 4> rounded;
      for (int k = 0; k < 4; ++k) rounded.value[k] = from_float<E>(out[k] * inverse);
      store_pack(static_cast<E*>(job.out) + to.out + column, rounded);
      if (column == 0) job.lse[to.lse] = lse;
    } else {
      const int64_t at = ((split * job.sequences + sequence) * job.kv_heads + kv_head) * job.rows() + row;
      store_pack(job.partial_out + at * job.width + column,
                 Pack<float, 4>{out[0] * inverse, out[1] * inverse, out[2] * inverse, out[3] * inverse});
      if (column == 0) job.partial_lse[at] = lse;
    }
  }
}

// Grid: (splits, tiles of rows, sequences * kv_heads).
template <class E, int kWidth, int kRowWarps>
__global__ void __launch_bounds__(kThreads) decode_attention(const Job job) {
  using L = Layout<kWidth, kRowWarps>;
  constexpr int tile_keys = kKeys / L::kKeyWarps;  // of one warp
  E* const queries = dynamic_shared<E>();
  E* const keys = queries + L::kRows * kWidth;
  E* const values = keys + L::kStages * kKeys * kWidth;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_warp = warp / L::kKeyWarps, first_key = warp % L::kKeyWarps * tile_keys;
  const int64_t sequence = blockIdx.z / static_cast<unsigned>(job.kv_heads);
  const int kv_head = static_cast<int>(blockIdx.z % static_cast<unsigned>(job.kv_heads));
  const int first_row = static_cast<int>(blockIdx.y) * L::kRows;
  const int last_row = first_row + L::kRows < job.rows() ? first_row + L::kRows - 1 : job.rows() - 1;

  const int64_t length = job.length_of(sequence);
  const KeyRange range = job.visible(length, first_row / job.group(), last_row / job.group());
  const KeyRange part = job.part(range, static_cast<int>(blockIdx.x), kKeys);
  const int64_t begin = part.begin / kKeys * kKeys;
  const int tiles = part.end > part.begin ? static_cast<int>((part.end - begin + kKeys - 1) / kKeys) : 0;
  auto load_tile = [&](int tile) {
    if (tile < tiles) {
      const int64_t first = begin + int64_t{tile} * kKeys;
      const int stage = tile % L::kStages * kKeys * kWidth;
      load_keys<E, kWidth>(keys + stage, job.k_cache, job.k_strides, job, sequence, kv_head, first, part.end);
      load_keys<E, kWidth>(values + stage, job.v_cache, job.v_strides, job, sequence, kv_head, first, part.end);
    }
    copy_async_commit();
  };

  load_queries<E, kWidth, L::kRows>(queries, job, sequence, kv_head, first_row);
  for (int tile = 0; tile < L::kStages - 1; ++tile) load_tile(tile);
  int64_t position[2];  // of this thread's two rows, in the sequence
  for (int h = 0; h < 2; ++h) position[h] = length - job.tokens + (first_row + row_warp * 16 + lane / 4 + h * 8) / job.group();

  Sums<kWidth> sums;
  uint32_t q[kWidth / 16][4];
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<L::kStages - 2>();
    __syncthreads();  // this tile is there, and all are done with the one before, whose place the next copies take
    load_tile(tile + L::kStages - 1);
    if (tile == 0) {
#pragma unroll
      for (int step = 0; step < kWidth / 16; ++step) {
        load_matrices<4>(q[step], queries + Tile<kWidth>::at(row_warp * 16 + lane % 16, step * 2 + lane / 16));
      }
    }
    const int stage = tile % L::kStages * kKeys * kWidth;
    float scores[tile_keys / 8][4] = {};
    multiply_keys<E, kWidth, tile_keys>(scores, q, keys + stage, first_key);
    scale_and_mask<tile_keys>(scores, job, position, begin + int64_t{tile} * kKeys + first_key, part);
    update_softmax<kWidth, tile_keys>(scores, sums);
    multiply_values<E, kWidth, tile_keys>(sums, scores, values + stage, first_key);
  }
  copy_async_wait<0>();
  __syncthreads();  // the results take the place of the tiles
  store_tile<E, kWidth, kRowWarps>(job, sums, dynamic_shared<float>(), sequence, kv_head, static_cast<int>(blockIdx.x), first_row);
}

// Joins the parts of a row, in their order: one warp per row. Grid: rows of all sequences and heads over kWarps.
template <class E>
__global__ void __launch_bounds__(kThreads) combine_splits(const Job job) {
  const int lane = threadIdx.x % 32;
  const int64_t all_rows = job.sequences * job.kv_heads * job.rows();
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= all_rows) return;
  float maximum = -INFINITY;
  for (int s = 0; s < job.splits; ++s) maximum = fmaxf(maximum, job.partial_lse[s * all_rows + at]);
  const float base = maximum == -INFINITY ? 0.0f : maximum;
  float total = 0.0f;
  for (int s = 0; s < job.splits; ++s) total += exp2_approximate((job.partial_lse[s * all_rows + at] - base) * kLog2e);
  const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
  const int64_t head_and_sequence = at / job.rows();
  const int row = static_cast<int>(at % job.rows());
  const Target to = target_of(job, head_and_sequence / job.kv_heads, static_cast<int>(head_and_sequence % job.kv_heads), row);
  for (int column = lane * 4; column < job.width; column += 128) {
    float out[4] = {};
    for (int s = 0; s < job.splits; ++s) {
      const float factor = exp2_approximate((job.partial_lse[s * all_rows + at] - base) * kLog2e) * inverse;
      const auto part = load_pack<Pack<float, 4>>(job.partial_out + (s * all_rows + at) * job.width + column);
      for (int k = 0; k < 4; ++k) out[k] = fmaf(factor, part.value[k], out[k]);
    }
    Pack<E, 4> rounded;
    for (int k = 0; k < 4; ++k) rounded.value[k] = from_float<E>(out[k]);
    store_pack(static_cast<E*>(job.out) + to.out + column, rounded);
  }
  if (lane == 0) job.lse[to.lse] = total > 0.0f ? base + log2_approximate(total) / kLog2e : -INFINITY;
}

inline int rows_per_block(const Job& job) { return job.rows() <= 16 ? 16 : 64; }
inline dim3 grid_of(const Job& job) {
  const int rows = rows_per_block(job);
  return dim3(static_cast<unsigned>(job.splits), static_cast<unsigned>((job.rows() + rows - 1) / rows),
              static_cast<unsigned>(job.sequences * job.kv_heads));
}
inline dim3 combine_grid_of(const Job& job) {
  return dim3(static_cast<unsigned>((job.sequences * job.kv_heads * job.rows() + kWarps - 1) / kWarps));
}

// Calls f with the compiled width that holds `width` channels (a template argument), or returns false.
template <class F>
bool with_width(int width, F&& f) {
  if (width <= 32) return f.template operator()<32>(), true;
  if (width <= 64) return f.template operator()<64>(), true;
  if (width <= 80) return f.template operator()<80>(), true;
  if (width <= 96) return f.template operator()<96>(), true;
  if (width <= 128) return f.template operator()<128>(), true;
  return false;
}

}  // namespace dreamkernels::decode_attention::kernels
