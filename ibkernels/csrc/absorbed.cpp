// What absorbing the bottleneck's up-projection into a bfloat16 head takes, where bfloat16 factors are multiplied as such:
//   torch.ops.ibkernels_cpu.head_times(head [V, H], exact [H, M]) -> head exact, float32 [V, M]
//   torch.ops.ibkernels_cpu.transposed_times(exact [V, M], head [V, H]) -> exact^T head, float32 [M, H]
// `exact` is float32, and is not to be rounded to bfloat16: it is taken apart into a high and a low half, two products.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "bfloat16.h"

namespace ibkernels {
namespace {

constexpr int64_t kWordsAtOnce = 4096, kStride = kWordsAtOnce + 32;
constexpr int64_t kWordsPerTask = 128;

// high + low = from, to about 16 bits. Returns whether some of `low` is not zero.
bool take_apart(const Matrix& from, const Bits& high, const Bits& low) {
  const Kernels& k = kernels();
  std::vector<float> rest(from.columns);
  bool inexact = false;
  for (int64_t i = 0; i < from.rows; ++i) {
    const float* const row = from.data + i * from.stride;
    uint16_t* const low_row = low.data + i * low.stride;
    k.narrow(row, from.columns, high.data + i * high.stride);
    k.widen(high.data + i * high.stride, from.columns, rest.data());
    for (int64_t j = 0; j < from.columns; ++j) rest[j] = row[j] - rest[j];
    k.narrow(rest.data(), from.columns, low_row);
    for (int64_t j = 0; j < from.columns; ++j) inexact |= low_row[j] << 1 != 0;
  }
  return inexact;
}

at::Tensor head_times(const at::Tensor& head, const at::Tensor& exact) {
  check("head", head, {at::kBFloat16});
  check("exact", exact, {at::kFloat});
  const int64_t vocabulary = head.size(0), hidden_size = head.size(1), width = exact.size(1);
  const auto high = scratch<uint16_t>(hidden_size * width), low = scratch<uint16_t>(hidden_size * width);
  const Bits high_bits(high.get(), hidden_size, width), low_bits(low.get(), hidden_size, width);
  const bool inexact = take_apart(matrix_of(exact), high_bits, low_bits);
  const Packed packed_high = packed(high_bits, false), packed_low = packed(low_bits, false);
  const at::Tensor out = at::empty({vocabulary, width}, exact.options());
  for_each_tile(vocabulary, width, kHeight, width, [&](int64_t row, int64_t rows, int64_t, int64_t) {
    const Matrix tile = matrix_of(out).block(row, rows, 0, width);
    multiply(tile, bits_of(head, row, rows), packed_high);
    if (inexact) multiply(tile, bits_of(head, row, rows), packed_low, true);
  });
  return out;
}

at::Tensor transposed_times(const at::Tensor& exact, const at::Tensor& head) {
  check("exact", exact, {at::kFloat});
  check("head", head, {at::kBFloat16});
  const int64_t vocabulary = head.size(0), hidden_size = head.size(1), width = exact.size(1);
  const at::Tensor out = at::zeros({width, hidden_size}, exact.options());
  const auto high_t = scratch<uint16_t>(width * kStride), low_t = scratch<uint16_t>(width * kStride);
  for (int64_t word = 0; word < vocabulary; word += kWordsAtOnce) {
    const int64_t words = std::min(kWordsAtOnce, vocabulary - word);
    for_shares(ceil_div(words, kWordsPerTask), [&](int64_t begin, int64_t end) {
      const auto high = scratch<uint16_t>(kWordsPerTask * width), low = scratch<uint16_t>(kWordsPerTask * width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kWordsPerTask, count = std::min(kWordsPerTask, words - first);
        const Bits high_bits(high.get(), count, width), low_bits(low.get(), count, width);
        take_apart(matrix_of(exact).block(word + first, count, 0, width), high_bits, low_bits);
        transpose(high_bits, high_t.get() + first, kStride);
        transpose(low_bits, low_t.get() + first, kStride);
      }
    });
    for_shares(ceil_div(hidden_size, kPanel), [&](int64_t begin, int64_t end) {
      const Packed panel(kWordsAtOnce, kPanel);
      for (int64_t column = begin * kPanel; column < std::min(end * kPanel, hidden_size); column += kPanel) {
        const int64_t columns = std::min(kPanel, hidden_size - column);
        const Matrix tile = matrix_of(out).block(0, width, column, columns);
        pack(panel, matrix_of<uint16_t>(head).block(word, words, column, columns));
        multiply(tile, Bits(high_t.get(), width, even(words), kStride), panel, true);
        multiply(tile, Bits(low_t.get(), width, even(words), kStride), panel, true);
      }
    });
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ibkernels_cpu, m) {
  m.def("head_times(Tensor head, Tensor exact) -> Tensor");
  m.def("transposed_times(Tensor exact, Tensor head) -> Tensor");
}

TORCH_LIBRARY_IMPL(ibkernels_cpu, CPU, m) {
  m.impl("head_times", &head_times);
  m.impl("transposed_times", &transposed_times);
}

}  // namespace ibkernels
