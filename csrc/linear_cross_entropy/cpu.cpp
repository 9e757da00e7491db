// CPU implementation of dreamkernels::linear_cross_entropy (schemas: dreamkernels/ops/linear_cross_entropy).
//
// The rows with a target are walked over in chunks; the logits of one chunk exist at a time, and turn into their gradient in
// place, so that a chunk costs three products (torch's own):
//
//   logits [rows, V] = hidden weight^T       grad_hidden [rows, H] = gradient weight       grad_weight [V, H] += gradient^T hidden
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "linear_cross_entropy/kernels.h"

namespace dreamkernels::linear_cross_entropy {
namespace {

constexpr const char* kName = "linear_cross_entropy";
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };  // as in aten

// A matrix that looks into a tensor.
Tensor matrix(const Tensor& base, int64_t first_element, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  int64_t offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(base.get(), &offset));
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(base.get(), 2, sizes, strides, offset + first_element, &made));
  return Tensor(made);
}

// `count` rows of a row-major [N, width] tensor from row `first` on.
Tensor rows_of(const Tensor& base, int64_t first, int64_t count) {
  const int64_t width = base.size(1);
  return matrix(base, first * width, count, width, width, 1);
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

// The rows that count, in their order, and their targets.
struct Compacted {
  std::vector<int64_t> rows, targets;

  Compacted(const Tensor& tensor, int64_t ignore_index, int64_t vocabulary) {
    const bool wide = tensor.scalar_type() == ScalarType::Long;
    if (!wide && tensor.scalar_type() != ScalarType::Int) fail(kName, ": targets must be int32 or int64");
    const void* data = tensor.data_ptr();
    for (int64_t t = 0; t < tensor.numel(); ++t) {
      const int64_t target = wide ? static_cast<const int64_t*>(data)[t] : static_cast<const int32_t*>(data)[t];
      if (target == ignore_index) continue;
      if (target < 0 || target >= vocabulary) {
        fail(kName, ": targets[", t, "] = ", target, " is out of range (0 to ", vocabulary - 1, ", or ignore_index ",
             ignore_index, ")");
      }
      rows.push_back(t);
      targets.push_back(target);
    }
  }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

struct Options {
  int64_t ignore_index;
  double softcap;
  double z_loss;
  int64_t chunk;  // rows; 0: as many as fit into kChunkBytes
  bool hidden_grad;
  bool weight_grad;
};

// Logits of 64 MiB: with two chunks the weight gradient needs no sum beside it, and 2048 rows of 32,000 bfloat16 are two chunks.
// Smaller chunks would need one of as many bytes as they save.
constexpr int64_t kChunkBytes = int64_t{64} << 20;
constexpr int64_t kRowMultiple = 16;

int64_t chunk_rows(const Tensor& weight, const Options& options, int64_t count) {
  const int64_t row_bytes = weight.size(0) * static_cast<int64_t>(weight.element_size());
  int64_t most = options.chunk > 0 ? options.chunk : std::max(kRowMultiple, kChunkBytes / row_bytes / kRowMultiple * kRowMultiple);
  const int64_t chunks = std::max<int64_t>(1, (count + most - 1) / most);
  const int64_t even = (count + chunks - 1) / chunks;  // equal chunks: a short last one would multiply badly
  return std::max<int64_t>(1, std::min(most, (even + kRowMultiple - 1) / kRowMultiple * kRowMultiple));
}

// grad_weight += gradient^T hidden, over all chunks.
class WeightGradient {
 public:
  WeightGradient(const Tensor& weight, int64_t chunks)
      : out_(new_like(weight)), element_(element_of(weight, kName)), chunks_(chunks) {}

  const Tensor& out() const { return out_; }

  void add(const Tensor& gradient, const Tensor& hidden, int64_t chunk) {
    const int64_t vocabulary = out_.size(0), rows = gradient.size(0);
    if (chunk == 0) return multiply(out_, matrix(gradient, 0, vocabulary, rows, 1, vocabulary), hidden);
    // float32 adds inside the product; so may the last of two chunks, which rounds once more as the sum below would.
    if (element_ == Element::float32 || chunks_ == 2) {
      return multiply_add(out_, matrix(gradient, 0, vocabulary, rows, 1, vocabulary), hidden);
    }
    add_in_parts(gradient, hidden, chunk);
  }

 private:
  // A few columns of the gradient at a time, whose product is still in the cache when it is added.
  void add_in_parts(const Tensor& gradient, const Tensor& hidden, int64_t chunk) {
    constexpr int64_t part_bytes = int64_t{2} << 20;
    const int64_t vocabulary = out_.size(0), width = out_.size(1), rows = gradient.size(0);
    if (!low_) {
      low_ = new_row_major(out_, {vocabulary, width}, element_ == Element::bfloat16 ? ScalarType::Short : ScalarType::Float);
    }
    const int64_t step = std::min(vocabulary, std::max<int64_t>(64, part_bytes / std::max<int64_t>(1, width * 2)));
    const Tensor part = new_row_major(out_, {step, width}, out_.scalar_type());
    const auto kernel = DK_FOR_ACTIVE_ISA(accumulate);
    for (int64_t first = 0; first < vocabulary; first += step) {
      const int64_t columns = std::min(step, vocabulary - first);
      multiply(rows_of(part, 0, columns), matrix(gradient, first, columns, rows, 1, vocabulary), hidden);
      const Accumulate job{part.data_ptr(), at(out_, first * width), at(*low_, first * width), chunk == 1, chunk == chunks_ - 1};
      torch::stable::parallel_for(0, columns * width, 32768, [&](int64_t begin, int64_t end) { kernel(element_, job, begin, end); });
    }
  }

  static void* at(const Tensor& tensor, int64_t element) {
    return static_cast<char*>(tensor.data_ptr()) + element * static_cast<int64_t>(tensor.element_size());
  }

  Tensor out_;
  Element element_;
  int64_t chunks_;
  std::optional<Tensor> low_;
};

void copy_rows(const Tensor& from, const Tensor& to, const int64_t* from_rows, const int64_t* to_rows, int64_t count) {
  const int64_t row_bytes = from.size(1) * static_cast<int64_t>(from.element_size());
  const char* source = static_cast<const char*>(from.data_ptr());
  char* target = static_cast<char*>(to.data_ptr());
  torch::stable::parallel_for(0, count, row_grain(from.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(target + (to_rows ? to_rows[i] : i) * row_bytes, source + (from_rows ? from_rows[i] : i) * row_bytes, row_bytes);
    }
  });
}

void zero(const Tensor& x) { std::memset(x.data_ptr(), 0, x.numel() * static_cast<int64_t>(x.element_size())); }

struct Gradients {
  Tensor hidden, weight;
};

// losses: one per compacted row, or null. factors: the derivative of the result with respect to each of them, where a gradient
// is wanted.
Gradients run(const Tensor& hidden, const Tensor& weight, const Compacted& valid, const Options& options, const float* factors,
              float* losses) {
  const int64_t vocabulary = weight.size(0), width = weight.size(1), count = valid.count();
  const bool gather = count != hidden.size(0);
  const int64_t step = chunk_rows(weight, options, count), chunks = (count + step - 1) / step;
  const bool gradients = options.hidden_grad || options.weight_grad;
  const Element element = element_of(hidden, kName);
  const ScalarType dtype = hidden.scalar_type();

  Tensor grad_hidden = new_row_major(hidden, options.hidden_grad ? std::vector<int64_t>{hidden.size(0), width} : std::vector<int64_t>{0}, dtype);
  if (options.hidden_grad && gather) zero(grad_hidden);
  std::optional<WeightGradient> grad_weight;
  if (options.weight_grad) grad_weight.emplace(weight, chunks);
  if (options.weight_grad && count == 0) zero(grad_weight->out());
  const auto kernel = DK_FOR_ACTIVE_ISA(loss_rows);
  const Tensor logits = new_row_major(hidden, {std::min(step, count), vocabulary}, dtype);
  const Tensor gathered = new_row_major(hidden, {gather ? std::min(step, count) : 0, width}, dtype);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * step, rows = std::min(step, count - first);
    const int64_t* numbers = valid.rows.data() + first;
    if (gather) copy_rows(hidden, gathered, numbers, nullptr, rows);
    const Tensor states = gather ? rows_of(gathered, 0, rows) : rows_of(hidden, first, rows);
    const Tensor of_rows = rows_of(logits, 0, rows);
    multiply(of_rows, states, matrix(weight, 0, width, vocabulary, 1, width));
    const Rows job{logits.data_ptr(), valid.targets.data() + first, gradients ? factors + first : nullptr,
                   losses ? losses + first : nullptr, vocabulary, static_cast<float>(options.softcap),
                   static_cast<float>(options.z_loss)};
    torch::stable::parallel_for(0, rows, row_grain(vocabulary), [&](int64_t begin, int64_t end) { kernel(element, job, begin, end); });
    if (grad_weight) grad_weight->add(of_rows, states, chunk);
    if (options.hidden_grad) {  // after the weight gradient: what was gathered is overwritten
      multiply(gather ? states : rows_of(grad_hidden, first, rows), of_rows, weight);
      if (gather) copy_rows(gathered, grad_hidden, nullptr, numbers, rows);
    }
  }
  return {grad_hidden, grad_weight ? grad_weight->out() : new_row_major(weight, {0}, dtype)};
}

void check(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  if (hidden.dim() != 2 || weight.dim() != 2 || hidden.size(1) != weight.size(1) || targets.dim() != 1 ||
      targets.size(0) != hidden.size(0)) {
    fail(kName, ": hidden ", shape_of(hidden), " [T, H], weight ", shape_of(weight), " [V, H] and targets ", shape_of(targets),
         " [T] do not fit");
  }
  if (hidden.scalar_type() != weight.scalar_type()) fail(kName, ": hidden and weight must have the same dtype");
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int64_t ignore_index,
                                                        int64_t reduction, double softcap, double z_loss, int64_t chunk,
                                                        bool hidden_grad, bool weight_grad) {
  check(hidden, weight, targets);
  hidden = row_major(hidden);
  weight = row_major(weight);
  targets = row_major(targets);
  const Compacted valid(targets, ignore_index, weight.size(0));
  const int64_t count = valid.count();
  std::vector<float> losses(count), factors;
  if (hidden_grad || weight_grad) factors.assign(count, reduction == kMean ? static_cast<float>(1.0 / count) : 1.0f);
  const Options options{ignore_index, softcap, z_loss, chunk, hidden_grad, weight_grad};
  const Gradients made = run(hidden, weight, valid, options, factors.data(), losses.data());

  Tensor loss = new_row_major(hidden, reduction == kNone ? std::vector<int64_t>{hidden.size(0)} : std::vector<int64_t>{}, ScalarType::Float);
  float* out = static_cast<float*>(loss.data_ptr());
  if (reduction == kNone) {
    zero(loss);
    for (int64_t i = 0; i < count; ++i) out[valid.rows[i]] = losses[i];
  } else {
    double total = 0.0;
    for (float value : losses) total += value;
    *out = static_cast<float>(reduction == kMean ? total / std::max<int64_t>(1, count) : total);
  }
  return {loss, made.hidden, made.weight};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets,
                                                         int64_t ignore_index, int64_t reduction, double softcap, double z_loss,
                                                         int64_t chunk, bool hidden_grad, bool weight_grad) {
  check(hidden, weight, targets);
  if (grad_loss.scalar_type() != ScalarType::Float || grad_loss.numel() != (reduction == kNone ? hidden.size(0) : 1)) {
    fail(kName, ": the gradient of the loss must be float32 with the shape of the loss, not ", shape_of(grad_loss));
  }
  grad_loss = row_major(grad_loss);
  hidden = row_major(hidden);
  weight = row_major(weight);
  targets = row_major(targets);
  const Compacted valid(targets, ignore_index, weight.size(0));
  const float* grad = static_cast<const float*>(grad_loss.data_ptr());
  std::vector<float> factors(valid.count());
  for (int64_t i = 0; i < valid.count(); ++i) {
    factors[i] = reduction == kNone ? grad[valid.rows[i]]
                                    : static_cast<float>(*grad / (reduction == kMean ? static_cast<double>(valid.count()) : 1.0));
  }
  const Options options{ignore_index, softcap, z_loss, chunk, hidden_grad, weight_grad};
  const Gradients made = run(hidden, weight, valid, options, factors.data(), nullptr);
  return {made.hidden, made.weight};
}

void linear_cross_entropy_scale(Tensor grad_hidden, Tensor grad_weight, Tensor grad_loss) {
  if (grad_loss.scalar_type() != ScalarType::Float || grad_loss.numel() != 1) fail(kName, ": the gradient of the loss must be one float32");
  const float factor = *static_cast<const float*>(grad_loss.data_ptr());
  if (factor == 1.0f) return;
  const auto kernel = DK_FOR_ACTIVE_ISA(scale);
  for (const Tensor& gradient : {grad_hidden, grad_weight}) {
    if (!gradient.is_contiguous()) fail(kName, ": a gradient to be scaled must be contiguous");
    const Element element = element_of(gradient, kName);
    torch::stable::parallel_for(0, gradient.numel(), 32768, [&](int64_t begin, int64_t end) {
      kernel(element, gradient.data_ptr(), factor, begin, end);
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dreamkernels, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy.inference", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
  m.impl("linear_cross_entropy_scale", TORCH_BOX(&linear_cross_entropy_scale));
}

}  // namespace dreamkernels::linear_cross_entropy
