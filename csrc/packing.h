// Sequence packing: which sequences share one packed pass of a fixed number of tokens.
#pragma once
#include <cstdint>
#include <vector>

namespace dreamkernels {

// First fit with look-ahead. Sequences are taken in order; a bin is filled from the next `look_ahead` sequences that are not yet
// placed, earliest first, and is closed when none of them fits. bin_of[i] receives the bin of sequence i; returns the number of bins.
// Needs 0 <= lengths[i] <= budget and look_ahead >= 1 (checked by the caller).
int64_t pack_sequences(const int64_t* lengths, int64_t count, int64_t budget, int64_t look_ahead, int64_t* bin_of);

}  // namespace dreamkernels
