// The CUDA kernels of decode_attention on the CPU: for Python, and with EMULATOR_MAIN for the race checker (one width):
// decode_attention SEED TOKENS.
#include "decode_attention/kernel.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

using namespace dreamkernels::decode_attention;

template <class E, int kWidth>
void run(const Job& job) {
  if (kernels::rows_per_block(job) == 16) {
    emulator::launch(kernels::grid_of(job), kernels::kThreads, kernels::Layout<kWidth, 1>::kBytes,
                     [=] { kernels::decode_attention<E, kWidth, 1>(job); });
  } else {
    emulator::launch(kernels::grid_of(job), kernels::kThreads, kernels::Layout<kWidth, 4>::kBytes,
                     [=] { kernels::decode_attention<E, kWidth, 4>(job); });
  }
  if (job.splits > 1) emulator::launch(kernels::combine_grid_of(job), kernels::kThreads, 0, [=] { kernels::combine_splits<E>(job); });
}

}  // namespace

#if !defined(EMULATOR_MAIN)
extern "C" const char* decode_attention(const Job* job, int64_t half) {
  return emulator::message_of([=] {
    kernels::with_width(job->width, [=]<int kWidth>() { half ? run<__half, kWidth>(*job) : run<__nv_bfloat16, kWidth>(*job); });
  });
}
extern "C" int64_t sizeof_job() { return sizeof(Job); }
#else
int main(int, char** arguments) {
  const int tokens = std::atoi(arguments[2]), heads = 4, kv_heads = 2, width = 32, splits = 2;
  const int64_t sequences = 1, page_size = 48, pages = 6, row = kv_heads * width, rows = tokens * heads;
  std::vector<uint16_t> q(rows * width, 0x3f80), out(q), k_cache(pages * page_size * row, 0x3c00), v_cache(k_cache);
  std::vector<float> lse(rows), partial_lse(splits * rows), partial_out(splits * rows * width);
  const std::vector<int32_t> lengths{250}, block_table{5, 1, 0, 2, 3, 4};
  Job job{};
  job.q = q.data(), job.k_cache = k_cache.data(), job.v_cache = v_cache.data(), job.cache_seqlens = lengths.data();
  job.out = out.data(), job.lse = lse.data(), job.partial_out = partial_out.data(), job.partial_lse = partial_lse.data();
  job.q_sequence = rows * width, job.q_token = heads * width, job.q_head = width;
  job.k_strides = job.v_strides = {page_size * row, row, width};
  job.paging = {block_table.data(), page_size, pages, 6};
  job.sequences = sequences, job.tokens = tokens, job.q_heads = heads, job.kv_heads = kv_heads, job.width = width;
  job.window = -1, job.splits = splits, job.scale = 0.2f, job.causal = true;
  emulator::set_seed(static_cast<unsigned>(std::atoi(arguments[1])));
  if (const char* message = emulator::message_of([&] { run<__nv_bfloat16, 32>(job); })) {
    std::printf("%s\n", message);
    return 2;
  }
  std::printf("finished\n");
}
#endif
