// The elementwise passes of the CPU ops over rows that are in cache. kernels.cpp is compiled once for each instruction
// set; `kernels()` is the best of them that this machine and ATEN_CPU_CAPABILITY allow.
#pragma once

#include <cstdint>

namespace ibkernels {

// The elements of the activations: float32, or bfloat16 as its 16 bits.
enum class Element { kFloat32, kBfloat16 };

// What every row of a bottleneck shares.
struct Bottleneck {
  int64_t width;  // K
  bool sample;    // false: z = mu
  uint64_t seed, offset;
  float logvar_min, logvar_max;
  float kl_scale;  // 1, or 1/K for a mean over K
  Element element;
};

struct Kernels {
  const char* isa;

  // out[0..columns) = the normals of `row` in the stream (seed, offset).
  void (*fill_normals)(uint64_t seed, uint64_t offset, uint32_t row, int64_t columns, float* out);

  // One row: raw [2K] = mu and logvar before the clamp, less the bias, to which bias [2K] (or null) is added in place.
  // Writes z [K] and *kl, and mu [K] unless null. `noise` is scratch of noise_size(K) floats.
  void (*sample)(const Bottleneck&, uint32_t row, float* raw, const float* bias, float* noise, void* z, float* kl, void* mu);

  // One row of the gradient of [mu | raw logvar], [2K], from mu, raw_logvar, grad_z [K] (elements, or null)
  // and grad_kl.
  void (*sample_backward)(const Bottleneck&, uint32_t row, const float* mu, const float* raw_logvar, const void* grad_z,
                          float grad_kl, float* noise, float* grad);

  // In place: logit = softcap(scale * logit + bias); bias may be null, softcap is 0 for none. Returns the largest.
  float (*finish_logits)(float* logits, const float* bias, int64_t size, float scale, float softcap);

  // Sums over a row of logits, with d = logit - peak: exp(d) and, where not null, d and d exp(d). With `keep` the logits
  // become exp(d).
  double (*sum_exp)(float* logits, int64_t size, float peak, double* sum, double* weighted_sum, bool keep);

  // In place, of exponentials kept: softmax_scale * exp(d) - uniform. And of logits under a softcap, whose slope is
  // wanted too: (softmax_scale * exp(d) - uniform) * slope.
  void (*gradient_of_kept)(float* exponentials, int64_t size, float softmax_scale, float uniform);
  void (*gradient_under_softcap)(float* logits, int64_t size, float peak, float softmax_scale, float uniform,
                                 float softcap);

  void (*widen)(const void* bfloat16, int64_t size, float* out);
  void (*narrow)(const float* values, int64_t size, void* bfloat16);
};

constexpr int64_t noise_size(int64_t width) { return (width + 63) / 64 * 64; }

const Kernels& kernels();

extern const Kernels kKernelsBaseline;
#ifdef IBKERNELS_X86
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace ibkernels
