// The self-test kernel for Python, and with EMULATOR_MAIN a program for the race checker: self_test MISTAKE SEED.
#include "cuda_emulator/self_test.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

template <class E>
void run(const void* a, const void* b, float* out, int blocks, int tiles, int mistake) {
  emulator::launch(blocks, self_test::kThreads, self_test::kSharedElements * sizeof(E), [=] {
    self_test::row_sums(static_cast<const E*>(a), static_cast<const E*>(b), out, tiles, static_cast<self_test::Mistake>(mistake));
  });
}

}  // namespace

extern "C" const char* row_sums(int half, const void* a, const void* b, float* out, int blocks, int tiles, int mistake) {
  return emulator::message_of([&] { half ? run<__half>(a, b, out, blocks, tiles, mistake) : run<__nv_bfloat16>(a, b, out, blocks, tiles, mistake); });
}

#if defined(EMULATOR_MAIN)
int main(int count, char** arguments) {
  const int blocks = 3, tiles = 4;
  std::vector<uint16_t> a(blocks * tiles * 256, 0x3f80), b(tiles * 128, 0x3f80);
  std::vector<float> out(blocks * 16);
  emulator::set_seed(count > 2 ? static_cast<unsigned>(atoi(arguments[2])) : 0);
  if (const char* message = row_sums(0, a.data(), b.data(), out.data(), blocks, tiles, count > 1 ? atoi(arguments[1]) : 0)) {
    std::printf("%s\n", message);
    return 2;
  }
  std::printf("finished\n");
}
#endif
