// Tests of philox.h without torch, run by ctest: the Random123 known answers, the column mapping, the project's own test
// vectors, and float32 normals against double precision.
#include "../philox.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "expect.h"

namespace philox = ibkernels::philox;

namespace {

bool equal(const philox::Words& words, std::initializer_list<uint32_t> expected) {
  return std::equal(expected.begin(), expected.end(), words.lane);
}

void random123_known_answers() {
  EXPECT(equal(philox::philox4x32({{0, 0, 0, 0}}, 0, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT(equal(philox::philox4x32({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, 0xffffffff, 0xffffffff),
               {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT(equal(philox::philox4x32({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0),
               {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

void column_mapping() {
  std::vector<int> hits(4096, 0);
  for (uint32_t group = 0; group < 1024; ++group) {
    for (uint32_t lane = 0; lane < 4; ++lane) {
      const uint64_t column = philox::first_column_of(group) + philox::kLaneColumn[lane];
      ++hits[column];
      EXPECT(philox::group_of(column) == group);
      EXPECT(philox::lane_of(column) == lane);
    }
  }
  for (int count : hits) EXPECT(count == 1);
}

void a_block_holds_the_normals_of_its_columns() {
  const philox::Stream stream(1, 2);
  for (int64_t first : {0, 64, 6400}) {
    float block[philox::kColumnsAtOnce];
    philox::fill_block(stream, 3, first, block);
    for (int i = 0; i < philox::kColumnsAtOnce; ++i) {
      const philox::Normals drawn = philox::normals(stream.call(3, philox::group_of(first + i)));
      EXPECT(std::abs(block[i] - drawn.lane[philox::lane_of(first + i)]) < 1e-6);
    }
  }
}

void stream_test_vectors() {
  struct Vector {
    uint32_t row, column, word;
    double normal;
  };
  const Vector vectors[] = {{0, 0, 0xb1b649f8, -0.8386606}, {0, 1, 0x87d61e30, -0.1633222}, {0, 8, 0xa14ccfaf, -0.9541123},
                            {0, 9, 0x7b1065e7, 0.1161563},  {0, 2, 0x887a8368, 1.0427895},  {3, 17, 0x31a7005a, 2.0478523}};
  const philox::Stream stream(0x0123456789abcdef, 0x100000005);
  for (const Vector& v : vectors) {
    const philox::Words words = stream.call(v.row, philox::group_of(v.column));
    EXPECT(words.lane[philox::lane_of(v.column)] == v.word);
    EXPECT(std::abs(philox::normals(words).lane[philox::lane_of(v.column)] - v.normal) < 1e-6);
  }
}

void uniform_stays_inside_the_unit_interval() {
  EXPECT(philox::uniform(0) == 0x1p-24f);
  EXPECT(philox::uniform(0xff) == 0x1p-24f);
  EXPECT(philox::uniform(0xffffffff) == 1.0f - 0x1p-24f);
}

// The words at the ends of every quarter turn and the smallest uniform are where a float32 Box-Muller goes wrong.
void normals_equal_double_precision() {
  std::vector<uint32_t> words;
  for (uint32_t eighth = 0; eighth < 8; ++eighth) {
    const uint32_t edge = eighth << 29;
    for (uint32_t word : {edge - 0x300, edge - 0x100, edge, edge + 0x100, edge + 0x300, edge + 0x10000000}) {
      words.push_back(word);
    }
  }
  const double pi = std::acos(-1.0);
  for (uint32_t radius_word : words) {
    for (uint32_t angle_word : words) {
      const philox::Normals got = philox::normals({{radius_word, angle_word, radius_word, angle_word}});
      const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(philox::uniform(radius_word))));
      const double angle = 2.0 * pi * static_cast<double>(philox::uniform(angle_word));
      for (int pair = 0; pair < 4; pair += 2) {
        EXPECT(std::abs(got.lane[pair] - radius * std::cos(angle)) < 1e-6);
        EXPECT(std::abs(got.lane[pair + 1] - radius * std::sin(angle)) < 1e-6);
      }
      EXPECT(std::abs(got.lane[0]) <= 5.77f);
    }
  }
}

}  // namespace

int main() {
  random123_known_answers();
  column_mapping();
  a_block_holds_the_normals_of_its_columns();
  stream_test_vectors();
  uniform_stays_inside_the_unit_interval();
  normals_equal_double_precision();
  return report();
}
