// Products of bfloat16 matrices with float32 sums, where the machine has instructions for them: torch's brgemm, a kernel
// of oneDNN that runs on the calling thread whatever its region. It reads its right factor packed, and its left factor
// along rows of an even number of elements.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "matrix.h"
#include "packing.h"

namespace ibkernels {

// Decided by what the machine has, ATEN_CPU_CAPABILITY and torch.backends.mkldnn.enabled. Without it, bfloat16 is widened
// and multiplied as float32.
bool has_bfloat16_products();

using Bits = View<uint16_t>;

constexpr int64_t kHeight = 256, kDepth = 512;  // rows and terms of one kernel's product, a panel of which stays in L2

constexpr int64_t even(int64_t size) { return size + size % 2; }

// Memory of a right factor [rows, columns], rows even: panels of kPanel columns, in each the pairs of its rows, of which
// the elements of a column lie together.
struct Packed {
  int64_t rows;
  Scratch<uint16_t> data;

  Packed(int64_t rows, int64_t columns)
      : rows(rows), data(scratch<uint16_t>(rows * ceil_div(columns, kPanel) * kPanel)) {}
  uint16_t* at(int64_t row, int64_t column) const { return data.get() + column * rows + row * kPanel; }
};

// Packs `from`, or its transpose, at an even row and a column that begins a panel; a row past an odd last one is zero.
inline void pack(const Packed& to, const Bits& from, int64_t row = 0, int64_t column = 0) {
  for (int64_t i = 0; i < from.columns; i += kPanel) {
    pack_panel(from.data + i, from.stride, from.rows, std::min(kPanel, from.columns - i), to.at(row, column + i));
  }
}
inline void pack_transposed(const Packed& to, const Bits& from, int64_t column = 0) {
  for (int64_t i = 0; i < from.rows; i += kPanel) {
    pack_transposed_panel(from.data + i * from.stride, from.stride, std::min(kPanel, from.rows - i), from.columns,
                          to.at(0, column + i));
  }
}

// A whole parameter [rows, columns], packed in parallel; its transpose with `transposed`.
inline Packed packed(const Bits& from, bool transposed) {
  const int64_t columns = transposed ? from.rows : from.columns;
  Packed to(even(transposed ? from.columns : from.rows), columns);
  for_shares(ceil_div(columns, kPanel), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPanel, count = std::min(end * kPanel, columns) - first;
    if (count <= 0) return;
    if (transposed) {
      pack_transposed(to, from.block(first, count, 0, from.columns), first);
    } else {
      pack(to, from.block(0, from.rows, first, count), 0, first);
    }
  });
  return to;
}

// visit(begin, size) for pieces of `count` whose sizes are powers of two. The library generates a kernel for each size
// that it meets and keeps it for good: these are few, however many tokens there are.
template <typename Visit>
void for_pieces(int64_t count, int64_t most, const Visit& visit) {
  for (int64_t begin = 0, size = most; begin < count; begin += size) {
    while (size > count - begin) size /= 2;
    visit(begin, size);
  }
}

// out = a b, or with `add` out += a b, of the rows of b from an even one on and of its columns from one that begins a panel.
// The columns of `a` are an even number.
inline void multiply(const Matrix& out, const Bits& a, const Packed& b, bool add = false, int64_t row = 0,
                     int64_t column = 0) {
  for (int64_t i = 0; i < out.columns; i += kPanel) {
    const int64_t columns = std::min(kPanel, out.columns - i);
    for_pieces(a.columns, kDepth, [&](int64_t k, int64_t depth) {
      for_pieces(out.rows, kHeight, [&](int64_t m, int64_t height) {
        at::native::cpublas::brgemm(height, columns, depth, a.stride, kPanel, out.stride, add || k > 0,
                                    reinterpret_cast<const at::BFloat16*>(a.data + m * a.stride + k),
                                    reinterpret_cast<const at::BFloat16*>(b.at(row + k, column + i)),
                                    out.data + m * out.stride + i);
      });
    });
  }
  at::native::cpublas::brgemm_release();  // AMX has a state
}

inline Bits bits_of(const at::Tensor& tensor, int64_t row, int64_t rows) {
  return matrix_of<uint16_t>(tensor).block(row, rows, 0, tensor.size(1));
}

inline void transpose(const Bits& from, uint16_t* out, int64_t out_stride) {
  transpose(from.data, from.stride, from.rows, from.columns, out, out_stride);
}

inline void narrow(const Matrix& from, const Bits& to) {
  for (int64_t i = 0; i < from.rows; ++i) {
    kernels().narrow(from.data + i * from.stride, from.columns, to.data + i * to.stride);
  }
}

}  // namespace ibkernels
