// Tests of elementary.h and of the passes of kernels.h without torch, run by ctest: for every instruction set that this
// machine has, against the formulas in double precision.
#include "../kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../packing.h"
#include "../philox.h"
#include "expect.h"

using namespace ibkernels;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kEpsilon = 0x1p-23;  // of float32

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found{&kKernelsBaseline};
#ifdef IBKERNELS_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kKernelsAvx2);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back(&kKernelsAvx512);
  }
#endif
  return found;
}

bool close(double actual, double expected, double relative, double absolute = 0.0) {
  return std::abs(actual - expected) <= relative * std::abs(expected) + absolute;
}

void elementary_functions_equal_double_precision() {
  for (double x = -87.3; x < 88.3; x += 0.00137) {
    const float f = static_cast<float>(x);
    EXPECT(close(exp_(f), std::exp(static_cast<double>(f)), 2 * kEpsilon));
  }
  for (double x = 1e-37; x < 1e37; x *= 1.0037) {
    const float f = static_cast<float>(x);
    EXPECT(close(log_(f), std::log(static_cast<double>(f)), 2 * kEpsilon, 2e-8));
  }
  for (double x = -0.7854; x < 0.7854; x += 1e-5) {
    const float f = static_cast<float>(x);
    EXPECT(close(sin_(f), std::sin(static_cast<double>(f)), 2 * kEpsilon));
    EXPECT(close(cos_(f), std::cos(static_cast<double>(f)), 2 * kEpsilon));
  }
  for (double x = -12.0; x < 12.0; x += 0.000137) {
    const float f = static_cast<float>(x);
    EXPECT(close(tanh_(f), std::tanh(static_cast<double>(f)), 3 * kEpsilon));
  }
  EXPECT(exp_(-kInfinity) == 0.0f && exp_(-1000.0f) == 0.0f && exp_(0.0f) == 1.0f);
  EXPECT(exp_(kInfinity) == kInfinity && exp_(100.0f) == kInfinity);
  EXPECT(std::isnan(exp_(kNaN)) && std::isnan(tanh_(kNaN)));
  EXPECT(tanh_(kInfinity) == 1.0f && tanh_(-kInfinity) == -1.0f);
}

std::vector<float> random_floats(size_t size, float scale) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(size);
  for (float& value : values) value = normal(generator);
  return values;
}

void sampling_equals_the_formulas(const Kernels& k) {
  for (int64_t width : {1, 7, 16, 64, 65, 130}) {
    const Bottleneck b{width, true, 5, 6, -4.0f, 4.0f, 1.0f / static_cast<float>(width), Element::kFloat32};
    std::vector<float> raw = random_floats(2 * width, 3.0f), bias = random_floats(2 * width, 1.0f);
    const std::vector<float> before = raw, grad_z = random_floats(width, 1.0f);
    std::vector<float> noise(noise_size(width)), z(width), mu(width), grad(2 * width), normals(width);
    float kl = kNaN;
    k.fill_normals(5, 6, 9, width, normals.data());
    k.sample(b, 9, raw.data(), bias.data(), noise.data(), z.data(), &kl, mu.data());
    k.sample_backward(b, 9, mu.data(), raw.data() + width, grad_z.data(), 0.7f, noise.data(), grad.data());
    const philox::Stream stream(5, 6);
    double expected_kl = 0.0;
    for (int64_t i = 0; i < width; ++i) {
      const float eps = philox::normals(stream.call(9, philox::group_of(i))).lane[philox::lane_of(i)];
      const double m = static_cast<double>(before[i]) + bias[i];
      const double r = static_cast<double>(before[width + i]) + bias[width + i];
      const double logvar = std::clamp(r, -4.0, 4.0), std = std::exp(logvar / 2), c = 0.7 / width;
      expected_kl += 0.5 * (m * m + std * std - 1 - logvar) / width;
      EXPECT(close(normals[i], eps, 0, 1e-6));
      EXPECT(close(z[i], m + std * eps, 1e-6, 1e-5));
      EXPECT(close(mu[i], m, 1e-6, 1e-6));
      EXPECT(close(grad[i], grad_z[i] + c * m, 1e-6, 1e-6));
      const bool inside = r >= -4.0 && r <= 4.0;
      EXPECT(close(grad[width + i], inside ? 0.5 * (grad_z[i] * std * eps + c * (std * std - 1)) : 0.0, 1e-6, 1e-5));
    }
    EXPECT(close(kl, expected_kl, 1e-5, 1e-6));
  }
}

void softmax_equals_the_formulas(const Kernels& k) {
  for (int64_t size : {1, 5, 16, 17, 512, 1003}) {
    std::vector<float> logits = random_floats(size, 4.0f);
    const std::vector<float> bias = random_floats(size, 1.0f);
    std::vector<double> expected(size);
    for (int64_t i = 0; i < size; ++i) expected[i] = 5.0 * std::tanh((0.5 * logits[i] + bias[i]) / 5.0);
    const float peak = k.finish_logits(logits.data(), bias.data(), size, 0.5f, 5.0f);
    EXPECT(peak == *std::max_element(logits.begin(), logits.end()));
    double total = 0.0, sum = 0.0, weighted = 0.0;  // of d, d = logit - peak
    for (int64_t i = 0; i < size; ++i) {
      EXPECT(close(logits[i], expected[i], 4 * kEpsilon, 1e-6));
      total += std::exp(static_cast<double>(logits[i]) - peak);
      sum += static_cast<double>(logits[i]) - peak;
      weighted += (static_cast<double>(logits[i]) - peak) * std::exp(static_cast<double>(logits[i]) - peak);
    }
    double plain = kNaN, product = kNaN;
    EXPECT(close(k.sum_exp(logits.data(), size, peak, &plain, &product, false), total, 1e-5));
    EXPECT(close(plain, sum, 1e-5, 1e-3) && close(product, weighted, 1e-5, 1e-5));
    std::vector<float> grad = logits, kept = logits;
    k.gradient_under_softcap(grad.data(), size, peak, 0.3f, 0.01f, 5.0f);
    EXPECT(close(k.sum_exp(kept.data(), size, peak, nullptr, nullptr, true), total, 1e-5));
    k.gradient_of_kept(kept.data(), size, 0.3f, 0.01f);
    for (int64_t i = 0; i < size; ++i) {
      const double slope = 1 - std::pow(logits[i] / 5.0, 2);
      const double expected_gradient = 0.3 * std::exp(static_cast<double>(logits[i]) - peak) - 0.01;
      EXPECT(close(grad[i], expected_gradient * slope, 1e-5, 1e-6));
      EXPECT(close(kept[i], expected_gradient, 1e-5, 1e-6));
    }
  }
}

void impossible_words_weigh_nothing(const Kernels& k) {
  std::vector<float> logits{0.0f, -kInfinity, 1.0f};
  double sum, weighted;
  const double total = k.sum_exp(logits.data(), 3, 1.0f, &sum, &weighted, false);
  EXPECT(close(total, 1 + std::exp(-1.0), 1e-6) && close(weighted, -std::exp(-1.0), 1e-6));
  std::vector<float> broken{0.0f, kNaN, 1.0f};
  EXPECT(std::isnan(k.sum_exp(broken.data(), 3, 1.0f, nullptr, nullptr, true)));
}

void bfloat16_rounds_to_the_nearest_even(const Kernels& k) {
  const std::vector<float> values{1.0f, -2.5f, 1.00390625f, 1.01171875f, 3.1415927f, kInfinity, kNaN, 0x1p-130f};
  const std::vector<float> expected{1.0f, -2.5f, 1.0f, 1.015625f, 3.140625f, kInfinity, kNaN, 0x1p-130f};
  std::vector<uint16_t> bits(values.size());
  std::vector<float> back(values.size());
  k.narrow(values.data(), static_cast<int64_t>(values.size()), bits.data());
  k.widen(bits.data(), static_cast<int64_t>(values.size()), back.data());
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT(back[i] == expected[i] || (std::isnan(back[i]) && std::isnan(expected[i])));
  }
}

void factors_are_packed_in_pairs() {
  constexpr int64_t kStride = 150;
  for (int64_t rows : {1, 2, 15, 16, 31, 32, 33, 70}) {
    for (int64_t columns : {1, 2, 16, 17, 63, 64, 140}) {
      std::vector<uint16_t> from(rows * kStride), out(kPanel * 160, 0xffff);
      for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i * 7919);
      const auto element = [&](int64_t row, int64_t column) -> uint16_t {
        return row < rows && column < columns ? from[row * kStride + column] : 0;
      };
      if (columns <= kPanel) {
        pack_panel(from.data(), kStride, rows, columns, out.data());
        for (int64_t i = 0; i < rows + rows % 2; ++i) {
          for (int64_t j = 0; j < columns; ++j) EXPECT(out[i / 2 * 2 * kPanel + 2 * j + i % 2] == element(i, j));
        }
      }
      if (rows <= kPanel) {
        pack_transposed_panel(from.data(), kStride, rows, columns, out.data());
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns + columns % 2; ++j) {
            EXPECT(out[j / 2 * 2 * kPanel + 2 * i + j % 2] == element(i, j));
          }
        }
      }
      constexpr int64_t kOutStride = 74;
      std::vector<uint16_t> transposed(columns * kOutStride, 0xffff);
      transpose(from.data(), kStride, rows, columns, transposed.data(), kOutStride);
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < kOutStride; ++i) {
          EXPECT(transposed[j * kOutStride + i] == (i < rows + rows % 2 ? element(i, j) : 0xffff));
        }
      }
    }
  }
}

}  // namespace

int main() {
  elementary_functions_equal_double_precision();
  for (const Kernels* k : tables()) {
    std::printf("%s\n", k->isa);
    sampling_equals_the_formulas(*k);
    softmax_equals_the_formulas(*k);
    impossible_words_weigh_nothing(*k);
    bfloat16_rounds_to_the_nearest_even(*k);
  }
#ifdef IBKERNELS_X86
  if (tables().back() == &kKernelsAvx512) factors_are_packed_in_pairs();
#else
  factors_are_packed_in_pairs();
#endif
  return report();
}
