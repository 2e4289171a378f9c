// The functions of packing.h, compiled for AVX-512 on x86: they run only where products of bfloat16 factors do. Nothing here
// may come from a header whose inline functions other files share.
#include "packing.h"

namespace ibkernels {
namespace {

constexpr uint16_t kZeros[kPanel] = {};

// Two elements that enter one instruction: the first in the low half.
using Pair [[gnu::may_alias]] = uint32_t;
using Pairs = uint32_t __attribute__((vector_size(64)));
constexpr int64_t kPairs = 16;

#ifdef __clang__
#define IBKERNELS_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define IBKERNELS_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Pairs{__VA_ARGS__})
#endif

template <int...>
struct Lanes {};
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

// One step of a transpose by halves: blocks of `step` x `step` above the diagonal change places with those below.
template <int step, int... lane>
[[gnu::always_inline]] inline void exchange(Pairs& upper, Pairs& lower, Lanes<lane...>) {
  const Pairs x = upper, y = lower;
  upper = IBKERNELS_SHUFFLE(x, y, ((lane & step) != 0 ? 16 + lane - step : lane)...);
  lower = IBKERNELS_SHUFFLE(x, y, ((lane & step) != 0 ? 16 + lane : lane + step)...);
}

template <int step>
[[gnu::always_inline]] inline void exchange_all(Pairs* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kPairs; ++i) {
    if ((i & step) == 0) exchange<step>(rows[i], rows[i + step], AllLanes());
  }
}

[[gnu::always_inline]] inline void transpose_pairs(Pairs (&rows)[kPairs]) {
  exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

}  // namespace

void pack_panel(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* out) {
  auto* pairs = reinterpret_cast<Pair*>(out);
  for (int64_t row = 0; row < rows; row += 2) {
    const uint16_t* const second = row + 1 < rows ? from + stride : kZeros;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) pairs[i] = from[i] | static_cast<uint32_t>(second[i]) << 16;
    from += 2 * stride;
    pairs += kPanel;
  }
}

void pack_transposed_panel(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* out) {
  for (int64_t row = 0; row < rows; row += kPairs) {
    uint16_t* to = out + 2 * row;
    for (int64_t first = 0; first < columns; first += 2 * kPairs) {
      const int64_t count = columns - first < 2 * kPairs ? columns - first : 2 * kPairs;
      Pairs block[kPairs];
      const uint16_t* source = from + first;
      for (int64_t i = 0; i < kPairs; ++i, source += stride) {
        block[i] = Pairs{};
        if (row + i >= rows) continue;
        if (count == 2 * kPairs) {
          __builtin_memcpy(&block[i], source, sizeof(Pairs));
        } else {
          __builtin_memcpy(&block[i], source, count * sizeof(uint16_t));
        }
      }
      transpose_pairs(block);
      for (int64_t i = 0; i < (count + 1) / 2; ++i, to += 2 * kPanel) __builtin_memcpy(to, &block[i], sizeof(Pairs));
    }
    for (int64_t i = 0; i < kPairs; ++i) from += stride;
  }
}

void transpose(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* out, int64_t out_stride) {
  for (int64_t row = 0; row < rows; row += 2 * kPairs) {
    const int64_t pairs = rows - row < 2 * kPairs ? (rows - row + 1) / 2 : kPairs;
    uint16_t* to = out + row;
    for (int64_t first = 0; first < columns; first += kPairs) {
      const int64_t count = columns - first < kPairs ? columns - first : kPairs;
      alignas(64) uint32_t block[kPairs][kPairs] = {};
      const uint16_t* source = from + first;
      for (int64_t i = 0; i < pairs; ++i) {
        const uint16_t* const second = row + 2 * i + 1 < rows ? source + stride : kZeros;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) block[i][j] = source[j] | static_cast<uint32_t>(second[j]) << 16;
        source += 2 * stride;
      }
      Pairs registers[kPairs];
      __builtin_memcpy(registers, block, sizeof(block));
      transpose_pairs(registers);
      for (int64_t i = 0; i < count; ++i, to += out_stride) {
        __builtin_memcpy(to, &registers[i], pairs * sizeof(Pair));
      }
    }
    for (int64_t i = 0; i < 2 * kPairs; ++i) from += stride;
  }
}

}  // namespace ibkernels
