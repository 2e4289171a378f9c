// The noise stream: normals as a pure function of (seed, offset, row, column), shared bit for bit with the reference and
// the GPU kernels. Plain C++17 without torch, so that it can be tested and vectorised on its own.
//
// One Philox-4x32-10 call (Salmon et al., SC 2011) gives four words: those of columns 16m + 2q + {0, 1, 8, 9}, which one
// GPU thread holds of a tensor-core accumulator. Its counter is (group, row, offset low, offset high ^ tag), its key the
// seed. A call costs 20 32x32->64-bit multiplications and serves four columns; draw whole rows with `for_each_call`.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace ibkernels::philox {

using Words = std::array<uint32_t, 4>;
using Normals = std::array<float, 4>;

// Ten rounds of Philox-4x32 on `counter`; the words of the Random123 library for the same counter and key.
inline Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// The part of the stream that one (seed, offset) names.
class Stream {
 public:
  Stream(uint64_t seed, uint64_t offset)
      : key0_(static_cast<uint32_t>(seed)),
        key1_(static_cast<uint32_t>(seed >> 32)),
        offset_low_(static_cast<uint32_t>(offset)),
        offset_high_(static_cast<uint32_t>(offset >> 32) ^ kTag) {}

  Words call(uint32_t row, uint32_t group) const {
    return philox4x32_10({group, row, offset_low_, offset_high_}, key0_, key1_);
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
inline constexpr std::array<int, 4> kLaneColumn = {0, 1, 8, 9};

// A uniform in (0, 1): an odd multiple of 2^-24, hence exact in float32 and never 0 or 1.
inline float uniform(uint32_t word) { return static_cast<float>((word >> 8) | 1) * 0x1p-24f; }

// (cos, sin) of 2 pi uniform(word). The quarter turn is split off on integers, exactly, so that sin and cos only see
// angles within pi/4 and the float32 error stays at rounding level.
inline std::array<float, 2> direction(uint32_t word) {
  constexpr float kRadiansPerStep = 0x1.921fb6p-22f;  // 2 pi / 2^24
  const int32_t steps = static_cast<int32_t>((word >> 8) | 1);
  const int32_t quarter = (steps + (1 << 21)) >> 22;  // nearest, 0..4
  const float angle = static_cast<float>(steps - quarter * (1 << 22)) * kRadiansPerStep;
  const float c = std::cos(angle);
  const float s = std::sin(angle);
  const float x = (quarter & 1) ? -s : c;
  const float y = (quarter & 1) ? c : s;
  return (quarter & 2) ? std::array<float, 2>{-x, -y} : std::array<float, 2>{x, y};
}

// Box-Muller: words 0, 1 give normals 0, 1 and words 2, 3 give normals 2, 3. |normal| <= 5.77.
inline Normals normals(const Words& words) {
  const float radius0 = std::sqrt(-2.0f * std::log(uniform(words[0])));
  const float radius1 = std::sqrt(-2.0f * std::log(uniform(words[2])));
  const auto [cos0, sin0] = direction(words[1]);
  const auto [cos1, sin1] = direction(words[3]);
  return {radius0 * cos0, radius0 * sin0, radius1 * cos1, radius1 * sin1};
}

// Calls visit(words, first_column) once per Philox call that columns 0..columns-1 of `row` need. When `columns` is not a
// multiple of 16 a call may also serve columns beyond the end, which the visitor leaves out.
template <typename Visit>
void for_each_call(const Stream& stream, uint32_t row, int64_t columns, const Visit& visit) {
  for (int64_t block = 0; block < columns; block += 16) {
    for (int64_t column = block; column < block + 8 && column < columns; column += 2) {
      visit(stream.call(row, group_of(column)), column);
    }
  }
}

}  // namespace ibkernels::philox
