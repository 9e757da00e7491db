// CUDA C++ implementation of splice_embeddings' forward, chosen by implementation="cuda" (Triton is the default on CUDA).
//
// One block per row: the row's source is looked up once, then the row is copied in 16-byte pieces. The sources are passed
// by value, kSources at a time; a launch handles the rows whose source is among them (and, in the first launch, the kept tokens), so
// every row is still read once and written once.
#include "common/cuda.h"

namespace dreamkernels::splice_embeddings {
namespace kernels {  // not anonymous: nvcc would put the number of its process into their names

constexpr int kThreads = 128;
constexpr int kSources = 16;

struct Sources {
  const void* data[kSources];
  int64_t start[kSources + 1];  // numbers of the first row of each, and one past the last; all after `count` equal the end
};

template <class Unit, class Id>
__global__ void __launch_bounds__(kThreads)
splice_rows(const Unit* __restrict__ tokens, const Id* __restrict__ index, Unit* __restrict__ out, Sources sources, int64_t units,
            int64_t total_rows, bool copies_tokens) {
  const int64_t t = blockIdx.x;
  const int64_t row = index[t];
  const Unit* from = nullptr;
  if (row < 0 || row >= total_rows) {
    if (copies_tokens) from = tokens + t * units;
  } else {
#pragma unroll
    for (int s = 0; s < kSources; ++s) {
      if (row >= sources.start[s] && row < sources.start[s + 1]) {
        from = static_cast<const Unit*>(sources.data[s]) + (row - sources.start[s]) * units;
      }
    }
  }
  if (from == nullptr) return;
  for (int64_t i = threadIdx.x; i < units; i += kThreads) out[t * units + i] = from[i];
}

}  // namespace kernels

namespace {

template <class Unit>
void launch(const Tensor& tokens, const std::vector<Tensor>& sources, const Tensor& index, const Tensor& out, int64_t row_bytes) {
  int64_t total = 0;
  for (const Tensor& source : sources) total += source.size(0);
  const auto stream = current_stream(tokens);
  const unsigned rows = static_cast<unsigned>(tokens.size(0));
  int64_t start = 0;
  for (size_t first = 0; first == 0 || first < sources.size(); first += kernels::kSources) {
    kernels::Sources group{};
    for (int s = 0; s < kernels::kSources; ++s) {
      group.start[s] = start;
      if (first + s < sources.size()) {
        group.data[s] = sources[first + s].data_ptr();
        start += sources[first + s].size(0);
      }
    }
    group.start[kernels::kSources] = start;
    const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
    const auto* from = static_cast<const Unit*>(tokens.data_ptr());
    auto* to = static_cast<Unit*>(out.data_ptr());
    if (index.scalar_type() == ScalarType::Long) {
      const auto* ids = static_cast<const int64_t*>(index.data_ptr());
      kernels::splice_rows<<<rows, kernels::kThreads, 0, stream>>>(from, ids, to, group, units, total, first == 0);
    } else {
      const auto* ids = static_cast<const int32_t*>(index.data_ptr());
      kernels::splice_rows<<<rows, kernels::kThreads, 0, stream>>>(from, ids, to, group, units, total, first == 0);
    }
    check_launch("splice_embeddings");
  }
}

Tensor splice_embeddings(Tensor token_embeds, std::vector<Tensor> sources, Tensor index) {
  token_embeds = row_major(token_embeds);
  index = row_major(index);
  for (Tensor& source : sources) source = row_major(source);
  Tensor out = new_like(token_embeds);
  if (token_embeds.numel() == 0) return out;
  const int64_t row_bytes = token_embeds.size(1) * static_cast<int64_t>(token_embeds.element_size());
  bool vectorised = row_bytes % 16 == 0 && aligned_to(token_embeds.data_ptr(), 16) && aligned_to(out.data_ptr(), 16);
  for (const Tensor& source : sources) vectorised = vectorised && aligned_to(source.data_ptr(), 16);
  torch::stable::accelerator::DeviceGuard guard(token_embeds.get_device_index());
  vectorised ? launch<uint4>(token_embeds, sources, index, out, row_bytes)
             : launch<uint16_t>(token_embeds, sources, index, out, row_bytes);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CUDA, m) { m.impl("splice_embeddings.cuda", TORCH_BOX(&splice_embeddings)); }

}  // namespace dreamkernels::splice_embeddings
