#include "packing.h"

#include <cstddef>

namespace dreamkernels {

int64_t pack_sequences(const int64_t* lengths, int64_t count, int64_t budget, int64_t look_ahead, int64_t* bin_of) {
  std::vector<int64_t> window;  // sequences that wait, in order
  int64_t next = 0, bins = 0;
  while (next < count || !window.empty()) {
    int64_t room = budget;
    bool placed_any = true;
    while (placed_any) {
      while (next < count && static_cast<int64_t>(window.size()) < look_ahead) window.push_back(next++);
      placed_any = false;
      std::size_t kept = 0;
      for (const int64_t sequence : window) {
        if (lengths[sequence] <= room) {
          room -= lengths[sequence];
          bin_of[sequence] = bins;
          placed_any = true;
        } else {
          window[kept++] = sequence;
        }
      }
      window.resize(kept);
    }
    ++bins;
  }
  return bins;
}

}  // namespace dreamkernels
