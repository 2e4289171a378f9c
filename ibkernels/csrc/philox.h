// The noise stream: normals as a pure function of (seed, offset, row, column), shared bit for bit with the reference and
// the GPU kernels. Plain C++20 without torch, so that it can be tested and vectorised on its own.
//
// One Philox-4x32-10 call (Salmon et al., SC 2011) gives four words: those of columns 16m + 2q + {0, 1, 8, 9}, which one
// GPU thread holds of a tensor-core accumulator. Its counter is (group, row, offset low, offset high ^ tag), its key the
// seed. A call costs 20 32x32->64-bit multiplications and serves four columns; draw rows with `fill_block`.
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"

namespace ibkernels::philox {
inline namespace IBKERNELS_ISA {

struct Words {
  uint32_t lane[4];
};
struct Normals {
  float lane[4];
};

// A round of Philox-4x32 on the counter (c0, c1, c2, c3).
IBKERNELS_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t{0xD2511F53} * c0;
  const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
  c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
  c1 = static_cast<uint32_t>(product1);
  c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
  c3 = static_cast<uint32_t>(product0);
}
inline constexpr int kRounds = 10;
inline constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;

// All rounds; the words of the Random123 library for the same counter and key.
inline Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t* const c = counter.lane;
  for (int round = 0; round < kRounds; ++round) {
    philox_round(c[0], c[1], c[2], c[3], key0, key1);
    key0 += kKeyStep0;
    key1 += kKeyStep1;
  }
  return counter;
}

// How many calls run side by side: they fill the widest vector registers that there are.
inline constexpr int kCallsAtOnce = 16;

// The part of the stream that one (seed, offset) names.
class Stream {
 public:
  Stream(uint64_t seed, uint64_t offset)
      : key0_(static_cast<uint32_t>(seed)),
        key1_(static_cast<uint32_t>(seed >> 32)),
        offset_low_(static_cast<uint32_t>(offset)),
        offset_high_(static_cast<uint32_t>(offset >> 32) ^ kTag) {}

  Words call(uint32_t row, uint32_t group) const {
    return philox4x32({{group, row, offset_low_, offset_high_}}, key0_, key1_);
  }

  // The calls of `group` and the next ones. Loops over arrays: over a struct a call the compiler makes no vector code.
  void calls(uint32_t row, uint32_t group, uint32_t (&words)[4][kCallsAtOnce]) const {
    for (int i = 0; i < kCallsAtOnce; ++i) {
      words[0][i] = group + i;
      words[1][i] = row;
      words[2][i] = offset_low_;
      words[3][i] = offset_high_;
    }
    uint32_t key0 = key0_, key1 = key1_;
    for (int round = 0; round < kRounds; ++round) {
#pragma omp simd
      for (int i = 0; i < kCallsAtOnce; ++i) {
        philox_round(words[0][i], words[1][i], words[2][i], words[3][i], key0, key1);
      }
      key0 += kKeyStep0;
      key1 += kKeyStep1;
    }
  }

 private:
  // "IBFT": keeps our counters clear of those of torch's own CUDA generator, which is Philox too.
  static constexpr uint32_t kTag = 0x49424654;

  uint32_t key0_, key1_, offset_low_, offset_high_;
};

// The call that serves a column, and which of its four words.
constexpr uint32_t group_of(uint64_t column) {
  return static_cast<uint32_t>(((column >> 4) << 2) | ((column >> 1) & 3));
}
constexpr uint32_t lane_of(uint64_t column) {
  return static_cast<uint32_t>((column & 1) | (((column >> 3) & 1) << 1));
}

// The inverse: columns first_column_of(group) + kLaneColumn[lane].
constexpr uint64_t first_column_of(uint32_t group) { return (uint64_t{group >> 2} << 4) | ((group & 3) << 1); }
inline constexpr int kLaneColumn[4] = {0, 1, 8, 9};

// A uniform in (0, 1): an odd multiple of 2^-24, hence exact in float32 and never 0 or 1.
IBKERNELS_INLINE float uniform(uint32_t word) { return static_cast<float>(static_cast<int32_t>((word >> 8) | 1)) * 0x1p-24f; }

// radius (cos, sin) of 2 pi uniform(word). The quarter turn is split off on integers, exactly, so that sin and cos only
// see angles within pi/4 and the float32 error stays at rounding level.
IBKERNELS_INLINE void point(float radius, uint32_t word, float& x, float& y) {
  constexpr float kRadiansPerStep = 0x1.921fb6p-22f;  // 2 pi / 2^24
  const int32_t steps = static_cast<int32_t>((word >> 8) | 1);
  const int32_t quarter = (steps + (1 << 21)) >> 22;  // nearest, 0..4
  const float angle = static_cast<float>(steps - quarter * (1 << 22)) * kRadiansPerStep;
  const float c = cos_(angle);
  const float s = sin_(angle);
  const float signed_radius = (quarter & 2) ? -radius : radius;
  x = signed_radius * ((quarter & 1) ? -s : c);
  y = signed_radius * ((quarter & 1) ? c : s);
}

IBKERNELS_INLINE float radius(uint32_t word) { return ::sqrtf(-2.0f * log_(uniform(word))); }

// Box-Muller: words 0, 1 give normals 0, 1 and words 2, 3 give normals 2, 3. |normal| <= 5.77.
inline Normals normals(const Words& words) {
  Normals out;
  for (int pair = 0; pair < 4; pair += 2) {
    point(radius(words.lane[pair]), words.lane[pair + 1], out.lane[pair], out.lane[pair + 1]);
  }
  return out;
}

// The normals of columns first..first + kColumnsAtOnce - 1 of `row`, first being a multiple of that.
inline constexpr int kColumnsAtOnce = 4 * kCallsAtOnce;

inline void fill_block(const Stream& stream, uint32_t row, int64_t first, float* out) {
  uint32_t words[4][kCallsAtOnce];
  float lanes[4][kCallsAtOnce];
  const uint32_t group = group_of(first);
  stream.calls(row, group, words);
  for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
    for (int i = 0; i < kCallsAtOnce; ++i) {
      point(radius(words[pair][i]), words[pair + 1][i], lanes[pair][i], lanes[pair + 1][i]);
    }
  }
  for (int i = 0; i < kCallsAtOnce; ++i) {
    float* const at = out + (first_column_of(group + i) - first);
    at[0] = lanes[0][i];
    at[1] = lanes[1][i];
    at[8] = lanes[2][i];
    at[9] = lanes[3][i];
  }
}

}  // namespace IBKERNELS_ISA
}  // namespace ibkernels::philox
