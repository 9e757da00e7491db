// Where a key-value cache keeps a position of a sequence: in pages that a table names, or, without a table, in one page per sequence.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define DK_HOST_DEVICE __host__ __device__
#else
#define DK_HOST_DEVICE
#endif

namespace dreamkernels {

struct Paging {
  const int32_t* block_table;  // [sequences, pages_per_sequence]; null: page b holds sequence b
  int64_t page_size;           // positions per page
  int64_t pages;
  int64_t pages_per_sequence;  // 1 without a table

  DK_HOST_DEVICE int64_t capacity() const { return page_size * pages_per_sequence; }

  // The page of a position in [0, capacity); may be out of range where the table is wrong.
  DK_HOST_DEVICE int64_t page_of(int64_t sequence, int64_t position) const {
    return block_table ? block_table[sequence * pages_per_sequence + position / page_size] : sequence;
  }
  DK_HOST_DEVICE int64_t slot_of(int64_t position) const { return block_table ? position % page_size : position; }
  DK_HOST_DEVICE bool has_page(int64_t page) const { return page >= 0 && page < pages; }
};

// Distances in elements between neighbours of [page, position, head, channel]; channels are adjacent.
struct CacheStrides {
  int64_t page, position, head;

  DK_HOST_DEVICE int64_t offset(int64_t p, int64_t slot, int64_t h) const { return p * page + slot * position + h * head; }
};

}  // namespace dreamkernels
