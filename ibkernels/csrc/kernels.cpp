// The passes of kernels.h, as loops that the compiler vectorises for the instruction set IBKERNELS_ISA, with the table
// IBKERNELS_KERNELS of them. Nothing here may come from a header whose inline functions other files share: see
// elementary.h.
#include "kernels.h"

#include "philox.h"

namespace ibkernels {
inline namespace IBKERNELS_ISA {
namespace {

struct Float32 {
  using type = float;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

struct Bfloat16 {
  using type = uint16_t;
  static float load(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
  // To the nearest, ties to even; NaN stays NaN.
  static uint16_t store(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
};

void fill_normals(uint64_t seed, uint64_t offset, uint32_t row, int64_t columns, float* out) {
  const philox::Stream stream(seed, offset);
  for (int64_t first = 0; first < columns; first += philox::kColumnsAtOnce) {
    float block[philox::kColumnsAtOnce];
    philox::fill_block(stream, row, first, block);
    for (int64_t i = first; i < columns && i < first + philox::kColumnsAtOnce; ++i) out[i] = block[i - first];
  }
}

// The noise of one row, past the width as far as a block of the stream reaches.
inline void draw(const Bottleneck& b, uint32_t row, float* noise) {
  const philox::Stream stream(b.seed, b.offset);
  for (int64_t first = 0; first < b.width; first += philox::kColumnsAtOnce) {
    philox::fill_block(stream, row, first, noise + first);
  }
}

// As torch.clamp: NaN stays NaN.
inline float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// What a loop reads of `b` is copied before it: the compiler cannot know that writing z leaves it as it is, and a choice
// that is the same for the whole row is a template's, since one of its sides may not be read.
template <typename T, bool sampled>
void sample_as(const Bottleneck& b, uint32_t row, float* raw, const float* bias, float* noise, void* z_out, float* kl_out,
               void* mu_out) {
  const int64_t width = b.width;
  const float low = b.logvar_min, high = b.logvar_max;
  float* const raw_logvar = raw + width;
  auto* const z = static_cast<typename T::type*>(z_out);
  auto* const saved_mu = static_cast<typename T::type*>(mu_out);
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < 2 * width; ++i) raw[i] += bias[i];
  }
  if (sampled) draw(b, row, noise);
  float kl = 0.0f;
#pragma omp simd reduction(+ : kl)
  for (int64_t i = 0; i < width; ++i) {
    const float mu = raw[i];
    const float logvar = clamp(raw_logvar[i], low, high);
    const float std = exp_(0.5f * logvar);
    kl += mu * mu + (std * std - 1.0f - logvar);
    z[i] = T::store(sampled ? mu + std * noise[i] : mu);
  }
  *kl_out = 0.5f * kl * b.kl_scale;
  if (saved_mu != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) saved_mu[i] = T::store(raw[i]);
  }
}

template <typename T>
constexpr auto sample_for(bool sampled) {
  return sampled ? sample_as<T, true> : sample_as<T, false>;
}

void sample(const Bottleneck& b, uint32_t row, float* raw, const float* bias, float* noise, void* z, float* kl, void* mu) {
  const auto as = b.element == Element::kFloat32 ? sample_for<Float32>(b.sample) : sample_for<Bfloat16>(b.sample);
  as(b, row, raw, bias, noise, z, kl, mu);
}

template <typename T, bool has_upstream, bool sampled>
void sample_backward_as(const Bottleneck& b, uint32_t row, const float* mu, const float* raw_logvar,
                        const void* grad_z_in, float grad_kl, float* noise, float* grad) {
  const int64_t width = b.width;
  const float low = b.logvar_min, high = b.logvar_max, kl = grad_kl * b.kl_scale;
  const auto* const grad_z = static_cast<const typename T::type*>(grad_z_in);
  if (sampled) draw(b, row, noise);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float upstream = has_upstream ? T::load(grad_z[i]) : 0.0f;
    const float raw = raw_logvar[i];
    const float std = exp_(0.5f * clamp(raw, low, high));
    const float through_std = sampled ? upstream * std * noise[i] : 0.0f;
    const bool outside = raw < low || raw > high;  // not so for NaN, which stays
    grad[i] = upstream + kl * mu[i];
    grad[width + i] = outside ? 0.0f : 0.5f * (through_std + kl * (std * std - 1.0f));
  }
}

template <typename T>
constexpr auto sample_backward_for(bool has_upstream, bool sampled) {
  if (!has_upstream) return sample_backward_as<T, false, false>;
  return sampled ? sample_backward_as<T, true, true> : sample_backward_as<T, true, false>;
}

void sample_backward(const Bottleneck& b, uint32_t row, const float* mu, const float* raw_logvar, const void* grad_z,
                     float grad_kl, float* noise, float* grad) {
  const auto as = b.element == Element::kFloat32 ? sample_backward_for<Float32>(grad_z != nullptr, b.sample)
                                                 : sample_backward_for<Bfloat16>(grad_z != nullptr, b.sample);
  as(b, row, mu, raw_logvar, grad_z, grad_kl, noise, grad);
}

float finish_logits(float* logits, const float* bias, int64_t size, float scale, float softcap) {
  if (scale != 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) logits[i] *= scale;
  }
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) logits[i] += bias[i];
  }
  if (softcap != 0.0f) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) logits[i] = softcap * tanh_(logits[i] / softcap);
  }
  float peak = -__builtin_inff();
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < size; ++i) peak = logits[i] > peak ? logits[i] : peak;
  return peak;
}

// Sums of float32 over this many words, sums of those in double: over a whole vocabulary float32 would lose digits.
constexpr int64_t kSegment = 512;

double sum_exp(float* logits, int64_t size, float peak, double* sum, double* weighted_sum, bool keep) {
  double total = 0.0, plain_total = 0.0, weighted_total = 0.0;
  for (int64_t first = 0; first < size; first += kSegment) {
    const int64_t end = size - first < kSegment ? size : first + kSegment;
    if (sum != nullptr) {
      float plain = 0.0f;
#pragma omp simd reduction(+ : plain)
      for (int64_t i = first; i < end; ++i) plain += logits[i] - peak;
      plain_total += plain;
    }
    if (weighted_sum != nullptr) {
      float weighted = 0.0f;
#pragma omp simd reduction(+ : weighted)
      for (int64_t i = first; i < end; ++i) {
        const float shifted = logits[i] - peak;
        const float probability = exp_(shifted);
        weighted += probability == 0.0f ? 0.0f : shifted * probability;  // 0 log 0 = 0, also for a logit of -inf
      }
      weighted_total += weighted;
    }
    float exponentials = 0.0f;
    if (keep) {
#pragma omp simd reduction(+ : exponentials)
      for (int64_t i = first; i < end; ++i) {
        logits[i] = exp_(logits[i] - peak);
        exponentials += logits[i];
      }
    } else {
#pragma omp simd reduction(+ : exponentials)
      for (int64_t i = first; i < end; ++i) exponentials += exp_(logits[i] - peak);
    }
    total += exponentials;
  }
  if (sum != nullptr) *sum = plain_total;
  if (weighted_sum != nullptr) *weighted_sum = weighted_total;
  return total;
}

void gradient_of_kept(float* exponentials, int64_t size, float softmax_scale, float uniform) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) exponentials[i] = softmax_scale * exponentials[i] - uniform;
}

void gradient_under_softcap(float* logits, int64_t size, float peak, float softmax_scale, float uniform, float softcap) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float share = logits[i] / softcap;
    logits[i] = (softmax_scale * exp_(logits[i] - peak) - uniform) * (1.0f - share * share);
  }
}

void widen(const void* bfloat16, int64_t size, float* out) {
  const auto* const bits = static_cast<const uint16_t*>(bfloat16);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = Bfloat16::load(bits[i]);
}

void narrow(const float* values, int64_t size, void* bfloat16) {
  auto* const bits = static_cast<uint16_t*>(bfloat16);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) bits[i] = Bfloat16::store(values[i]);
}

#define IBKERNELS_STRING(name) #name
#define IBKERNELS_NAME(name) IBKERNELS_STRING(name)

}  // namespace
}  // namespace IBKERNELS_ISA

extern const Kernels IBKERNELS_KERNELS;
const Kernels IBKERNELS_KERNELS = {IBKERNELS_NAME(IBKERNELS_ISA),
                                   fill_normals,
                                   sample,
                                   sample_backward,
                                   finish_logits,
                                   sum_exp,
                                   gradient_of_kept,
                                   gradient_under_softcap,
                                   widen,
                                   narrow};

}  // namespace ibkernels
