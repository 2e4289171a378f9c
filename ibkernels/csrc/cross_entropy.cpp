// Cross-entropy of a linear head on the CPU, losses and gradients in one pass:
//   torch.ops.ibkernels_cpu.linear_cross_entropy
// with the arguments of ibkernels/reference/cross_entropy.py. `input` [N, D] and `weight` [V, D] are contiguous, of one
// dtype, float32 or bfloat16.
//
// 2 N V D FLOPs for the logits, as many for each gradient. Logits exist for a block of rows at a time, at most
// `logits_bytes` of them, and become their own gradient in place. A block takes three parallel phases: logits by tiles of
// words, the softmax by rows, and the two products with its gradient by tiles of what they make. Where bfloat16 factors are
// multiplied as such, the gradient of the logits is rounded to bfloat16, in place, as the GPU kernels round it.
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "bfloat16.h"
#include "matrix.h"

namespace ibkernels {
namespace {

constexpr int64_t kWords = 512;           // of a tile of logits
constexpr int64_t kLeastRows = 16;        // of a block, however wide the vocabulary
constexpr int64_t kWidenedFloats = 1 << 18;  // of a head in bfloat16 that a thread has in float32 at a time
constexpr int64_t kPackedElements = 1 << 19;  // or packed
constexpr int64_t kTransposedRows = 512, kTransposedStride = kTransposedRows + 32;  // of a tile of gradients

using OptionalTensor = std::optional<at::Tensor>;

struct Options {
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap, logit_scale;  // a softcap of 0: none
  bool stats;
};

// The results of one call, [N] each.
struct Losses {
  at::Tensor losses, lse, entropy, correct;
};

// One row: its logits, of largest value `peak`, become the gradient of its weighted loss where `gradient` says so.
void finish_row(const Options& o, const Kernels& k, float* logits, int64_t vocabulary, float peak, int64_t label, float g,
                bool gradient, int64_t n, const Losses& out) {
  const bool valid = label != o.ignore_index;
  double sum = 0.0, weighted_sum = 0.0;
  const bool keep = gradient && o.softcap == 0.0f;
  const float target = logits[valid ? label : 0];
  const bool correct = valid && o.stats && target == peak && std::find(logits, logits + label, peak) == logits + label;
  const double total = k.sum_exp(logits, vocabulary, peak, o.label_smoothing != 0.0f ? &sum : nullptr,
                                 o.stats ? &weighted_sum : nullptr, keep);
  const float log_total = static_cast<float>(std::log(total)), lse = log_total + peak;
  // Differences to the peak throughout: a large common offset would cost digits.
  float loss = log_total + (peak - target);
  if (o.label_smoothing != 0.0f) {
    loss += o.label_smoothing * ((target - peak) - static_cast<float>(sum / static_cast<double>(vocabulary)));
  }
  out.losses.mutable_data_ptr<float>()[n] = valid ? g * (loss + o.z_loss * lse * lse) : 0.0f;
  out.lse.mutable_data_ptr<float>()[n] = lse;
  out.entropy.mutable_data_ptr<float>()[n] = valid && o.stats ? log_total - static_cast<float>(weighted_sum / total) : 0.0f;
  out.correct.mutable_data_ptr<bool>()[n] = correct;
  if (!gradient) return;
  const float uniform = g * o.label_smoothing / static_cast<float>(vocabulary);
  const float softmax_scale = g * (1.0f + 2.0f * o.z_loss * lse) / static_cast<float>(total);
  if (keep) {
    k.gradient_of_kept(logits, vocabulary, softmax_scale, uniform);
  } else {
    k.gradient_under_softcap(logits, vocabulary, peak, softmax_scale, uniform, o.softcap);
  }
  if (!valid) return;
  const float share = o.softcap == 0.0f ? 0.0f : target / o.softcap;
  logits[label] -= (1.0f - o.label_smoothing) * g * (1.0f - share * share);
}

// How many words of a bfloat16 head of that width are widened at a time.
int64_t widened_words(int64_t width) {
  return std::clamp<int64_t>(kWidenedFloats / std::max<int64_t>(width, 1), 16, kWords);
}

// out = scale * grads [n, V] weight[:, column..], the columns of `out`, by blocks of words, which a cache holds; a bfloat16
// head is widened by smaller ones.
void multiply_by_head(const Matrix& out, const Matrix& grads, const at::Tensor& weight, int64_t column, float scale) {
  const int64_t vocabulary = weight.size(0);
  const bool bfloat16 = element_of(weight) == Element::kBfloat16;
  const int64_t block = bfloat16 ? widened_words(out.columns) : kWords;
  const auto head_scratch = scratch(bfloat16 ? block * out.columns : 0);
  at::Tensor sum = tensor_of(out);
  for (int64_t word = 0; word < vocabulary; word += block) {
    const int64_t words = std::min(block, vocabulary - word);
    const Matrix head = block_of(weight, word, words, column, out.columns, head_scratch.get());
    const at::Tensor left = tensor_of(grads.block(0, grads.rows, word, words));
    at::cpu::addmm_out(sum, sum, left, tensor_of(head), word == 0 ? 0.0 : 1.0, scale);
  }
}

// ---- the same of bfloat16 factors ----

// A row of floats becomes bfloat16 in its own first half. Behind an odd number of them, what a product reads and multiplies
// by zero, is half of one of them, finite where they are.
void narrow_in_place(float* row, int64_t size) {
  auto* const bits = reinterpret_cast<uint16_t*>(row);
  for (int64_t first = 0; first < size; first += kWords) {
    uint16_t buffer[kWords];
    const int64_t count = std::min(kWords, size - first);
    kernels().narrow(row + first, count, buffer);
    std::memcpy(bits + first, buffer, count * sizeof(uint16_t));
  }
}

// How many words of a head of that width are packed at a time.
int64_t packed_words(int64_t width) {
  return std::clamp<int64_t>(kPackedElements / std::max<int64_t>(width, 1) / kPanel * kPanel, kPanel, kWords);
}

// out = x head^T for words of the head; `packed_head` is scratch for packed_words of them.
void multiply_by_words(const Matrix& out, const Bits& x, const Bits& head, const Packed& packed_head) {
  const int64_t part = packed_words(head.columns);
  for (int64_t word = 0; word < head.rows; word += part) {
    const int64_t words = std::min(part, head.rows - word);
    pack_transposed(packed_head, head.block(word, words, 0, head.columns));
    multiply(out.block(0, out.rows, word, words), x, packed_head);
  }
}

// out = grads [n, V] head[:, column..], the columns of `out`.
void multiply_by_head(const Matrix& out, const Bits& grads, const Bits& head, int64_t column) {
  const Packed packed_head(kWords, out.columns);
  for (int64_t word = 0; word < head.rows; word += kWords) {
    const int64_t words = std::min(kWords, head.rows - word);
    pack(packed_head, head.block(word, words, column, out.columns));
    multiply(out, grads.block(0, grads.rows, word, even(words)), packed_head, word > 0);
  }
}

// out = grads^T x, or with `add` out += it; `transposed` is scratch for the gradients of some rows.
void multiply_transposed_grads(const Matrix& out, const Bits& grads, const Packed& x, bool add, uint16_t* transposed) {
  for (int64_t row = 0; row < grads.rows; row += kTransposedRows) {
    const int64_t rows = std::min(kTransposedRows, grads.rows - row);
    transpose(grads.block(row, rows, 0, grads.columns), transposed, kTransposedStride);
    multiply(out, Bits(transposed, grads.columns, even(rows), kTransposedStride), x, add || row > 0, row);
  }
}

void scale_rows(const Matrix& out, float scale) {
  for (int64_t i = 0; scale != 1.0f && i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) out.data[i * out.stride + j] *= scale;
  }
}

// ----

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& labels,
    const OptionalTensor& token_weight, int64_t ignore_index, double label_smoothing, double z_loss,
    std::optional<double> softcap, double logit_scale, bool needs_input, bool needs_weight, bool needs_bias, bool stats,
    int64_t logits_bytes) {
  const Options options{ignore_index, static_cast<float>(label_smoothing), static_cast<float>(z_loss),
                        static_cast<float>(softcap.value_or(0.0)), static_cast<float>(logit_scale), stats};
  check("input", input, {at::kFloat, at::kBFloat16});
  check("weight", weight, {input.scalar_type()});
  if (bias) check("bias", *bias, {at::kFloat});
  check("labels", labels, {at::kLong});
  if (token_weight) check("token_weight", *token_weight, {at::kFloat});
  const int64_t num_tokens = input.size(0), width = input.size(1), vocabulary = weight.size(0);
  TORCH_CHECK(vocabulary > 0, "weight has no rows; the vocabulary must have at least one word.");
  const int64_t* const label = labels.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < num_tokens; ++n) {
    TORCH_CHECK_INDEX(label[n] == ignore_index || (label[n] >= 0 && label[n] < vocabulary), "labels[", n, "] is ",
                      label[n], ", which is out of bounds for a vocabulary of ", vocabulary, " words.");
  }
  const float* const upstream = token_weight ? token_weight->const_data_ptr<float>() : nullptr;
  const float* const shift = bias ? bias->const_data_ptr<float>() : nullptr;
  const bool bits = element_of(weight) == Element::kBfloat16 && has_bfloat16_products() && width > 0 && width % 2 == 0;
  const bool bfloat16 = element_of(weight) == Element::kBfloat16 && !bits;  // widened, then
  const bool gradients = needs_input || needs_weight || needs_bias;
  const at::TensorOptions floats = input.options().dtype(at::kFloat);
  const Losses out{at::empty({num_tokens}, floats), at::empty({num_tokens}, floats), at::empty({num_tokens}, floats),
                   at::empty({num_tokens}, floats.dtype(at::kBool))};
  const at::Tensor grad_input = at::empty({needs_input ? num_tokens : 0, width}, floats);
  // Written by the first block of rows, added to by the others.
  at::Tensor grad_weight = at::empty({needs_weight ? vocabulary : 0, width}, floats);
  if (num_tokens == 0) grad_weight.zero_();
  std::vector<double> bias_sums(needs_bias ? vocabulary : 0);
  const Kernels& k = kernels();

  // Blocks of equal size, as few as the budget allows.
  const int64_t most_rows =
      std::max(kLeastRows, logits_bytes / (vocabulary * static_cast<int64_t>(sizeof(float))));
  const int64_t block_rows = num_tokens == 0 ? 0 : ceil_div(num_tokens, ceil_div(num_tokens, most_rows));
  const int64_t tiles = ceil_div(vocabulary, kWords);
  const auto logits_scratch = scratch(block_rows * vocabulary);
  const auto peaks = scratch(block_rows * tiles);
  const auto input_scratch = scratch(bfloat16 ? block_rows * width : 0);
  const Packed packed_x(even(block_rows), bits && needs_weight ? width : 0);

  for (int64_t start = 0; start < num_tokens; start += block_rows) {
    const int64_t rows = std::min(block_rows, num_tokens - start);
    const Matrix logits(logits_scratch.get(), rows, vocabulary);
    const Matrix x = bits ? Matrix(nullptr, 0, 0) : rows_of(input, start, rows, input_scratch.get());
    const Bits x_bits = bits ? bits_of(input, start, rows) : Bits(nullptr, 0, 0);
    const Bits grad_bits(reinterpret_cast<uint16_t*>(logits.data), rows, vocabulary, 2 * vocabulary);

    for_shares(tiles, [&](int64_t begin, int64_t end) {
      const int64_t piece = bfloat16 ? widened_words(width) : kWords;
      const auto head_scratch = scratch(bfloat16 ? piece * width : 0);
      const Packed packed_head(width, bits ? packed_words(width) : 0);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t word = tile * kWords, words = std::min(kWords, vocabulary - word);
        const Matrix block = logits.block(0, rows, word, words);
        if (bits) multiply_by_words(block, x_bits, bits_of(weight, word, words), packed_head);
        for (int64_t at = 0; !bits && at < words; at += piece) {
          const int64_t count = std::min(piece, words - at);
          multiply_transposed(block.block(0, rows, at, count), x, rows_of(weight, word + at, count, head_scratch.get()));
        }
        for (int64_t i = 0; i < rows; ++i) {
          peaks[i * tiles + tile] =
              k.finish_logits(block.data + i * block.stride, shift == nullptr ? nullptr : shift + word, words,
                              options.logit_scale, options.softcap);
        }
      }
    });

    for_shares(rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = start + i;
        const float peak = *std::max_element(&peaks[i * tiles], &peaks[i * tiles] + tiles);
        const float g = label[n] == ignore_index ? 0.0f : (upstream == nullptr ? 1.0f : upstream[n]);
        finish_row(options, k, logits.data + i * vocabulary, vocabulary, peak, label[n], g, gradients, n, out);
        if (bits && gradients) narrow_in_place(logits.data + i * vocabulary, vocabulary);
      }
    });

    if (needs_input) {
      const Matrix grads = matrix_of(grad_input).block(start, rows, 0, width);
      // Every tile of rows would widen a head in bfloat16 anew. Narrow tiles only where there would be too few.
      const int64_t tile_rows = bfloat16 || bits ? rows : 64;
      const int64_t tile_columns = ceil_div(rows, tile_rows) * ceil_div(width, 256) < 8 ? 64 : 256;
      for_each_tile(rows, width, tile_rows, tile_columns,
                    [&](int64_t row, int64_t num_rows, int64_t column, int64_t columns) {
                      const Matrix tile = grads.block(row, num_rows, column, columns);
                      if (bits) {
                        multiply_by_head(tile, grad_bits.block(row, num_rows, 0, vocabulary),
                                         matrix_of<uint16_t>(weight), column);
                        scale_rows(tile, options.logit_scale);
                      } else {
                        multiply_by_head(tile, logits.block(row, num_rows, 0, vocabulary), weight, column,
                                         options.logit_scale);
                      }
                    });
    }
    if (bits && needs_weight) {
      for_shares(ceil_div(width, kPanel), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kPanel, count = std::min(end * kPanel, width) - first;
        if (count > 0) pack(packed_x, x_bits.block(0, rows, first, count), 0, first);
      });
    }
    if (needs_weight || needs_bias) {
      for_shares(tiles, [&](int64_t begin, int64_t end) {
        const auto transposed = scratch<uint16_t>(bits && needs_weight ? kWords * kTransposedStride : 0);
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t word = tile * kWords, words = std::min(kWords, vocabulary - word);
          const Matrix grads = logits.block(0, rows, word, words);
          const Matrix tile_out(needs_weight ? grad_weight.mutable_data_ptr<float>() + word * width : nullptr, words, width);
          if (needs_weight && bits) {
            multiply_transposed_grads(tile_out, grad_bits.block(0, rows, word, words), packed_x, start > 0,
                                      transposed.get());
            if (start + rows == num_tokens) scale_rows(tile_out, options.logit_scale);
          } else if (needs_weight) {
            add_transposed_product(tile_out, grads, x, start == 0 ? 0.0f : 1.0f,
                                   options.logit_scale);
          }
          for (int64_t i = 0; needs_bias && i < rows; ++i) {
            float row[kWords];
            if (bits) k.widen(grad_bits.block(i, 1, word, words).data, words, row);
            const float* const values = bits ? row : grads.data + i * grads.stride;
            for (int64_t v = 0; v < words; ++v) bias_sums[word + v] += values[v];
          }
        }
      });
    }
  }
  const at::Tensor grad_bias = at::empty({static_cast<int64_t>(bias_sums.size())}, floats);
  std::copy(bias_sums.begin(), bias_sums.end(), grad_bias.mutable_data_ptr<float>());
  return {out.losses, out.lse, out.entropy, out.correct, grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ibkernels_cpu, m) {
  m.def(
      "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor labels, Tensor? token_weight, "
      "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale, bool needs_input, "
      "bool needs_weight, bool needs_bias, bool stats, int logits_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ibkernels_cpu, CPU, m) { m.impl("linear_cross_entropy", &linear_cross_entropy); }

}  // namespace ibkernels
