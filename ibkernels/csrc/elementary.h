// exp, log, sin, cos and tanh in float32 without branches or calls, so that a loop over them becomes vector code for
// whatever the file is compiled for. Minimax polynomials of the Cephes library (Moshier, 1984-1992); errors are about one
// unit in the last place (tests/elementary_test.cpp).
//
// IBKERNELS_ISA names the instruction set of the including file. It is part of every symbol: without it the linker would
// keep one copy of an inline function, and a machine might meet instructions that it lacks.
#pragma once

#include <cmath>
#include <cstdint>

#ifndef IBKERNELS_ISA
#define IBKERNELS_ISA baseline
#endif

// A loop vectorises only where nothing in it is called.
#define IBKERNELS_INLINE [[gnu::always_inline]] inline

namespace ibkernels {
inline namespace IBKERNELS_ISA {

// e^x: NaN for NaN, 0 below the normal numbers, infinity above e^88.37 = 2.4e38.
IBKERNELS_INLINE float exp_(float x) {
  constexpr float kLowest = -87.336544f, kHighest = 88.37f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float clamped = x > kHighest ? kHighest : (x < kLowest ? kLowest : x);
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t power = (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23;
  const float result = p * __builtin_bit_cast(float, power);
  return x > kHighest ? __builtin_inff() : (x < kLowest ? 0.0f : result);
}

// ln x of a positive normal number.
IBKERNELS_INLINE float log_(float x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2))
  const uint32_t bits = __builtin_bit_cast(uint32_t, x) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float m = __builtin_bit_cast(float, (bits & 0x007fffffu) + 0x3f3504f3u);
  const float r = m - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float square = r * r;
  float y = p * r * square;
  y = y - e * 2.12194440e-4f;
  y = y - 0.5f * square;
  return r + y + e * 0.693359375f;
}

// sin x and cos x for |x| <= pi / 4.
IBKERNELS_INLINE float sin_(float x) {
  const float square = x * x;
  float p = -1.9515295891e-4f;
  p = p * square + 8.3321608736e-3f;
  p = p * square - 1.6666654611e-1f;
  return p * square * x + x;
}

IBKERNELS_INLINE float cos_(float x) {
  const float square = x * x;
  float p = 2.443315711809948e-5f;
  p = p * square - 1.388731625493765e-3f;
  p = p * square + 4.166664568298827e-2f;
  return p * square * square - 0.5f * square + 1.0f;
}

IBKERNELS_INLINE float tanh_(float x) {
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  const float magnitude = x < 0.0f ? -x : x;
  const float far = 1.0f - 2.0f / (exp_(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace IBKERNELS_ISA
}  // namespace ibkernels
