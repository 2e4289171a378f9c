// The variational bottleneck on the CPU, forward and backward:
//   torch.ops.ibkernels_cpu.bottleneck_forward, torch.ops.ibkernels_cpu.bottleneck_backward
// with the arguments of the Python specification, ibkernels/reference/bottleneck.py. Weights come contiguous in the
// dtype of `hidden`, float32 or bfloat16, and the bias as float32.
//
// Forward, 4 N H K FLOPs (linear encoder): a block of rows goes through the library GEMM into scratch that stays in L2,
// then through one pass for bias, clamp, noise, sample and KL. Backward: blocks of rows make the gradient G of
// [mu | raw logvar] and, from it, their gradient of `hidden`; then tiles of the weight gradients add G^T hidden. In bfloat16,
// products round G where the GPU kernels do, and so does the gradient of t = hidden A^T; the bias's gradient is exact.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bfloat16.h"
#include "matrix.h"

namespace ibkernels {
namespace {

constexpr int64_t kBlockBytes = 512 * 1024;  // of [mu | logvar], to stay in L2
constexpr int64_t kChunkRows = 1024;         // rows whose gradients wait in scratch for the weight gradients
constexpr int64_t kTileRows = 128, kTileColumns = 256;  // of a weight gradient
constexpr int64_t kTransposedStride = kChunkRows + 32;  // not a power of two, which would share few cache lines

using OptionalTensor = std::optional<at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The arguments that forward and backward share, as the passes want them.
struct Problem {
  const at::Tensor& hidden;  // [N, H], contiguous
  bool bits;                 // products of bfloat16 factors; otherwise of float32 ones
  at::Tensor weight;         // [2K, H] or lora_a [R, H]; widened unless `bits`
  OptionalTensor lora_b;     // [2K, R], likewise
  const float* bias;
  const int64_t* rows;
  Bottleneck settings;
  int64_t block_rows;

  Problem(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& lora_b, const OptionalTensor& bias,
          const OptionalTensor& rng, const OptionalTensor& rows, double logvar_min, double logvar_max, bool kl_mean)
      : hidden(hidden),
        bias(bias ? bias->const_data_ptr<float>() : nullptr),
        rows(rows ? rows->const_data_ptr<int64_t>() : nullptr) {
    check("hidden", hidden, {at::kFloat, at::kBFloat16});
    check("weight", weight, {hidden.scalar_type()});
    if (lora_b) check("lora_b", *lora_b, {hidden.scalar_type()});
    if (bias) check("bias", *bias, {at::kFloat});
    if (rng) check("rng", *rng, {at::kLong});
    if (rows) check("rows", *rows, {at::kLong});
    const int64_t width = (lora_b ? *lora_b : weight).size(0) / 2;
    settings.width = width;
    settings.sample = rng.has_value();
    settings.seed = rng ? static_cast<uint64_t>(rng->const_data_ptr<int64_t>()[0]) : 0;
    settings.offset = rng ? static_cast<uint64_t>(rng->const_data_ptr<int64_t>()[1]) : 0;
    settings.logvar_min = static_cast<float>(logvar_min);
    settings.logvar_max = static_cast<float>(logvar_max);
    settings.kl_scale = kl_mean ? 1.0f / static_cast<float>(width) : 1.0f;
    settings.element = element_of(hidden);
    const auto suits = [](int64_t terms) { return terms > 0 && terms % 2 == 0; };
    bits = settings.element == Element::kBfloat16 && has_bfloat16_products() && suits(hidden.size(1)) && width > 0 &&
           (!lora_b || suits(weight.size(0)));
    this->weight = bits ? weight : weight.to(at::kFloat);
    if (lora_b) this->lora_b = bits ? *lora_b : lora_b->to(at::kFloat);
    // Small enough for L2 and to be shared by threads; not so small that packing the weight for each block tells.
    const int64_t in_cache = kBlockBytes / (2 * std::max<int64_t>(width, 1) * static_cast<int64_t>(sizeof(float)));
    block_rows = even(std::clamp<int64_t>(std::min(in_cache, ceil_div(num_tokens(), 16)), 64, 512));
  }

  int64_t num_tokens() const { return hidden.size(0); }
  int64_t hidden_size() const { return hidden.size(1); }
  int64_t width() const { return settings.width; }
  int64_t rank() const { return lora_b ? weight.size(0) : 0; }
  uint32_t row_id(int64_t n) const { return static_cast<uint32_t>(rows ? rows[n] : n); }
  // Floats of scratch that one block's rows of `hidden` take when they are not float32 already.
  int64_t widened(int64_t num_rows) const {
    return settings.element == Element::kFloat32 || bits ? 0 : num_rows * hidden_size();
  }
};

void* row_of(const at::Tensor& tensor, int64_t n) {
  return static_cast<char*>(tensor.data_ptr()) + n * tensor.stride(0) * tensor.element_size();
}

// The packed factor, or its transpose; of no size where it is not wanted.
Packed pack_if(bool wanted, const OptionalTensor& factor, bool transposed) {
  return wanted ? packed(matrix_of<uint16_t>(*factor), transposed) : Packed(0, 0);
}

Tensors4 bottleneck_forward(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& lora_b,
                            const OptionalTensor& bias, const OptionalTensor& rng, const OptionalTensor& rows,
                            double logvar_min, double logvar_max, bool kl_mean, bool save) {
  const Problem p(hidden, weight, lora_b, bias, rng, rows, logvar_min, logvar_max, kl_mean);
  const int64_t num_tokens = p.num_tokens(), width = p.width(), rank = p.rank();
  at::Tensor z = at::empty({num_tokens, width}, hidden.options());
  at::Tensor kl = at::empty({num_tokens}, hidden.options().dtype(at::kFloat));
  at::Tensor saved0 = at::empty({save ? num_tokens : 0, lora_b ? rank : width}, hidden.options());
  at::Tensor saved1 = save && !lora_b ? at::empty({num_tokens, width}, kl.options()) : at::empty({0}, kl.options());
  const Kernels& k = kernels();
  const Packed weight_t = pack_if(p.bits, p.weight, true), lora_b_t = pack_if(p.bits && lora_b, p.lora_b, true);

  for_shares(ceil_div(num_tokens, p.block_rows), [&](int64_t begin, int64_t end) {
    const auto raw_scratch = scratch(p.block_rows * 2 * width);
    const auto low_scratch = scratch(p.block_rows * rank);
    const auto bits_scratch = scratch<uint16_t>(p.block_rows * rank);
    const auto wide_scratch = scratch(p.widened(p.block_rows));
    const auto noise = scratch(noise_size(width));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * p.block_rows, count = std::min(p.block_rows, num_tokens - first);
      const Matrix raw(raw_scratch.get(), count, 2 * width);
      const auto multiply_hidden = [&](const Matrix& out) {
        if (p.bits) {
          multiply(out, bits_of(hidden, first, count), weight_t);
        } else {
          multiply_transposed(out, rows_of(hidden, first, count, wide_scratch.get()), matrix_of(p.weight));
        }
      };
      if (lora_b) {
        const Matrix t(low_scratch.get(), count, rank);
        const Bits t_bits(bits_scratch.get(), count, rank);
        multiply_hidden(t);
        if (p.settings.element == Element::kBfloat16) {
          // Rounded as what is saved, so that backward sees what forward saw.
          narrow(t, t_bits);
          k.widen(t_bits.data, count * rank, t.data);
          if (save) std::copy_n(t_bits.data, count * rank, static_cast<uint16_t*>(row_of(saved0, first)));
        } else if (save) {
          std::copy_n(t.data, count * rank, static_cast<float*>(row_of(saved0, first)));
        }
        if (p.bits) {
          multiply(raw, t_bits, lora_b_t);
        } else {
          multiply_transposed(raw, t, matrix_of(*p.lora_b));
        }
      } else {
        multiply_hidden(raw);
      }
      for (int64_t i = 0; i < count; ++i) {
        float* const row = raw.data + i * 2 * width;
        void* const mu = save && !lora_b ? row_of(saved0, first + i) : nullptr;
        k.sample(p.settings, p.row_id(first + i), row, p.bias, noise.get(), row_of(z, first + i),
                 kl.mutable_data_ptr<float>() + first + i, mu);
        if (mu != nullptr) std::copy(row + width, row + 2 * width, static_cast<float*>(row_of(saved1, first + i)));
      }
    }
  });
  return {z, kl, saved0, saved1};
}

// grad_weight += left^T right, tile by tile.
void accumulate(const at::Tensor& grad_weight, const Matrix& left, const Matrix& right) {
  const Matrix out = matrix_of(grad_weight);
  for_each_tile(out.rows, out.columns, kTileRows, kTileColumns,
                [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
                  add_transposed_product(out.block(row, rows, column, columns), left.block(0, left.rows, row, rows),
                                         right.block(0, right.rows, column, columns), 1.0f);
                });
}

// Likewise, of left^T and right as the products of bfloat16 read them.
void accumulate(const at::Tensor& grad_weight, const Bits& left_t, const Packed& right) {
  const Matrix out = matrix_of(grad_weight);
  for_each_tile(out.rows, out.columns, kTileRows, kTileColumns,
                [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
                  multiply(out.block(row, rows, column, columns), left_t.block(row, rows, 0, left_t.columns), right,
                           true, 0, column);
                });
}

void accumulate_columns(std::vector<double>& sums, const Matrix& grad) {
  at::parallel_for(0, grad.columns, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < grad.rows; ++n) {
      for (int64_t i = begin; i < end; ++i) sums[i] += grad.data[n * grad.stride + i];
    }
  });
}

Tensors4 bottleneck_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const at::Tensor& hidden,
                             const at::Tensor& weight, const OptionalTensor& lora_b, const OptionalTensor& bias,
                             const OptionalTensor& rng, const OptionalTensor& rows, const at::Tensor& saved0,
                             const at::Tensor& saved1, double logvar_min, double logvar_max, bool kl_mean,
                             bool needs_hidden, bool needs_weight, bool needs_lora_b, bool needs_bias) {
  const Problem p(hidden, weight, lora_b, bias, rng, rows, logvar_min, logvar_max, kl_mean);
  if (grad_z) check("grad_z", *grad_z, {hidden.scalar_type()});
  if (grad_kl) check("grad_kl", *grad_kl, {at::kFloat});
  check("saved0", saved0, {hidden.scalar_type()});
  check("saved1", saved1, {at::kFloat});
  const int64_t num_tokens = p.num_tokens(), width = p.width(), rank = p.rank(), hidden_size = p.hidden_size();
  const at::TensorOptions floats = hidden.options().dtype(at::kFloat);
  const bool bfloat16 = p.settings.element == Element::kBfloat16, bits = p.bits;
  const float* const upstream_kl = grad_kl ? grad_kl->const_data_ptr<float>() : nullptr;
  const Kernels& k = kernels();

  at::Tensor grad_hidden = at::empty({needs_hidden ? num_tokens : 0, hidden_size}, hidden.options());
  const at::Tensor grad_weight = at::zeros({needs_weight ? weight.size(0) : 0, hidden_size}, floats);
  const at::Tensor grad_lora_b = at::zeros({needs_lora_b ? 2 * width : 0, rank}, floats);
  std::vector<double> bias_sums(needs_bias ? 2 * width : 0);

  const int64_t chunk_rows = std::min(kChunkRows, num_tokens);
  const auto grads = scratch(chunk_rows * 2 * width);
  const auto low = scratch(bfloat16 && !bits ? chunk_rows * rank : 0);  // t
  const auto grads_low = scratch(chunk_rows * rank);           // G B
  const auto wide = scratch(needs_weight ? p.widened(chunk_rows) : 0);
  const bool weight_of_low = needs_weight && lora_b.has_value(), uses_grad_t = (needs_weight && !lora_b) || needs_lora_b;
  const auto grad_t = scratch<uint16_t>(bits && uses_grad_t ? 2 * width * kTransposedStride : 0);
  const auto low_t = scratch<uint16_t>(bits && weight_of_low ? rank * kTransposedStride : 0);
  const Packed packed_x(kChunkRows, bits && needs_weight ? hidden_size : 0);
  const Packed packed_t(kChunkRows, bits && needs_lora_b ? rank : 0);
  const Packed packed_weight = pack_if(bits && needs_hidden, p.weight, false);
  const Packed lora_b_t = pack_if(bits && lora_b, p.lora_b, true);
  const Packed packed_lora_b = pack_if(bits && lora_b && (needs_hidden || needs_weight), p.lora_b, false);
  for (int64_t start = 0; start < num_tokens; start += chunk_rows) {
    const int64_t chunk = std::min(chunk_rows, num_tokens - start);
    const Matrix grad(grads.get(), chunk, 2 * width), grad_low(grads_low.get(), chunk, rank);
    const Matrix t = lora_b && !bits ? rows_of(saved0, start, chunk, low.get()) : Matrix(nullptr, 0, 0);
    for_shares(ceil_div(chunk, p.block_rows), [&](int64_t begin, int64_t end) {
      const auto noise = scratch(noise_size(width));
      const auto raw_scratch = scratch(lora_b ? p.block_rows * 2 * width : 0);
      const auto mu_scratch = scratch(bfloat16 ? width : 0);
      const auto out_scratch = scratch(bfloat16 && needs_hidden ? p.block_rows * hidden_size : 0);
      const auto grad_bits = scratch<uint16_t>(bits ? p.block_rows * 2 * width : 0);
      const auto low_bits = scratch<uint16_t>(bits ? p.block_rows * rank : 0);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * p.block_rows, count = std::min(p.block_rows, chunk - first);
        const Matrix raw(raw_scratch.get(), count, 2 * width);
        if (lora_b && bits) {
          multiply(raw, bits_of(saved0, start + first, count), lora_b_t);
        } else if (lora_b) {
          multiply_transposed(raw, t.block(first, count, 0, rank), matrix_of(*p.lora_b));
        }
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = start + first + i;
          const float *mu, *raw_logvar;
          if (lora_b) {
            float* const row = raw.data + i * 2 * width;
            if (p.bias != nullptr) {
              for (int64_t c = 0; c < 2 * width; ++c) row[c] += p.bias[c];
            }
            mu = row, raw_logvar = row + width;
          } else {
            mu = rows_of(saved0, n, 1, mu_scratch.get()).data;
            raw_logvar = static_cast<const float*>(row_of(saved1, n));
          }
          k.sample_backward(p.settings, p.row_id(n), mu, raw_logvar, grad_z ? row_of(*grad_z, n) : nullptr,
                            upstream_kl ? upstream_kl[n] : 0.0f, noise.get(), grad.data + (first + i) * 2 * width);
        }
        const Matrix grad_block = grad.block(first, count, 0, 2 * width);
        const Matrix low_block = grad_low.block(first, count, 0, rank);
        const Bits rounded(grad_bits.get(), count, 2 * width), rounded_low(low_bits.get(), count, rank);
        if (bits) {
          narrow(grad_block, rounded);
          if (uses_grad_t) transpose(rounded, grad_t.get() + first, kTransposedStride);
        }
        if (lora_b && (needs_hidden || needs_weight)) {
          if (bits) {
            multiply(low_block, rounded, packed_lora_b);
            narrow(low_block, rounded_low);
            if (weight_of_low) transpose(rounded_low, low_t.get() + first, kTransposedStride);
          } else {
            multiply(low_block, grad_block, matrix_of(*p.lora_b));
          }
        }
        if (needs_hidden) {
          void* const rows_out = row_of(grad_hidden, start + first);
          const Matrix out(bfloat16 ? out_scratch.get() : static_cast<float*>(rows_out), count, hidden_size);
          if (bits) {
            multiply(out, lora_b ? rounded_low : rounded, packed_weight);
          } else {
            multiply(out, lora_b ? low_block : grad_block, matrix_of(p.weight));
          }
          if (bfloat16) k.narrow(out.data, count * hidden_size, rows_out);
        }
        if (bits && needs_weight) pack(packed_x, bits_of(hidden, start + first, count), first);
        if (bits && needs_lora_b) pack(packed_t, bits_of(saved0, start + first, count), first);
        if (needs_weight && bfloat16 && !bits) {
          rows_of(hidden, start + first, count, wide.get() + first * hidden_size);
        }
      }
    });
    if (bits) {
      const auto transposed = [&](const Scratch<uint16_t>& of, int64_t rows) {
        return Bits(of.get(), rows, even(chunk), kTransposedStride);
      };
      if (needs_weight) {
        accumulate(grad_weight, lora_b ? transposed(low_t, rank) : transposed(grad_t, 2 * width), packed_x);
      }
      if (needs_lora_b) accumulate(grad_lora_b, transposed(grad_t, 2 * width), packed_t);
    } else if (needs_weight) {
      const Matrix x(bfloat16 ? wide.get() : static_cast<float*>(row_of(hidden, start)), chunk, hidden_size);
      accumulate(grad_weight, lora_b ? grad_low : grad, x);
    }
    if (needs_lora_b && !bits) accumulate(grad_lora_b, grad, t);
    if (needs_bias) accumulate_columns(bias_sums, grad);
  }
  const at::Tensor grad_bias = at::empty({static_cast<int64_t>(bias_sums.size())}, floats);
  std::copy(bias_sums.begin(), bias_sums.end(), grad_bias.mutable_data_ptr<float>());
  return {grad_hidden, grad_weight, grad_lora_b, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ibkernels_cpu, m) {
  m.def(
      "bottleneck_forward(Tensor hidden, Tensor weight, Tensor? lora_b, Tensor? bias, Tensor? rng, Tensor? rows, "
      "float logvar_min, float logvar_max, bool kl_mean, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bottleneck_backward(Tensor? grad_z, Tensor? grad_kl, Tensor hidden, Tensor weight, Tensor? lora_b, Tensor? bias, "
      "Tensor? rng, Tensor? rows, Tensor saved0, Tensor saved1, float logvar_min, float logvar_max, bool kl_mean, "
      "bool needs_hidden, bool needs_weight, bool needs_lora_b, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ibkernels_cpu, CPU, m) {
  m.impl("bottleneck_forward", &bottleneck_forward);
  m.impl("bottleneck_backward", &bottleneck_backward);
}

}  // namespace ibkernels
