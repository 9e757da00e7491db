// Resizing of RGB pictures, with the bits of Pillow's Image.resize.
#pragma once
#include <cstdint>

namespace dreamkernels {

enum class Filter { bilinear, bicubic };
enum class Level { scalar, avx2, avx512 };

struct Window {
  int64_t left, top, width, height;
};

// Resizes `picture`, bytes [height, width, 3], to `columns` x `rows` and writes the part `window` of the result to `to`, bytes
// [window.height, window.width, 3]; the rest is not computed. Pillow's way (Image.resize of an 8-bit picture, antialiased): first
// across, then down, or the other way round; each sum in int32 with weights of 22 fractional bits, rounded to bytes in between.
// Takes the best instructions that the processor has, of the levels up to `most`.
// Needs sizes of at least 1 and a window that is not empty and lies inside (checked by the caller).
void resize_crop(const uint8_t* picture, int64_t height, int64_t width, int64_t columns, int64_t rows, const Window& window,
                 Filter filter, bool down_first, uint8_t* to, Level most = Level::avx512);

}  // namespace dreamkernels
