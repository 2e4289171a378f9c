// Products of row-major float32 matrices inside a parallel region. They go through torch's library GEMM, which is held to
// one thread there; work is split into tiles whose sizes depend on the problem alone, so that no result depends on how many
// threads there are. Products of bfloat16 matrices are in bfloat16.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <new>

#include "kernels.h"

#ifdef __linux__  // elsewhere torch has no MKL, and a linker may not take a symbol that no library has
extern "C" [[gnu::weak]] int MKL_Set_Num_Threads_Local(int threads);
#endif

namespace ibkernels {

// A view of `rows` x `columns` elements, `stride` apart from row to row.
template <typename T>
struct View {
  T* data;
  int64_t rows, columns, stride;

  View(T* data, int64_t rows, int64_t columns) : View(data, rows, columns, columns) {}
  View(T* data, int64_t rows, int64_t columns, int64_t stride)
      : data(data), rows(rows), columns(columns), stride(stride) {}

  View block(int64_t row, int64_t num_rows, int64_t column, int64_t num_columns) const {
    return {data + row * stride + column, num_rows, num_columns, stride};
  }
};
using Matrix = View<float>;

inline at::Tensor tensor_of(const Matrix& matrix) {
  return at::from_blob(matrix.data, {matrix.rows, matrix.columns}, {matrix.stride, 1}, at::kFloat);
}

template <typename T = float>
View<T> matrix_of(const at::Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

// out = a b; out = a b^T; out = beta * out + scale * a^T b, where a beta of 0 never reads `out`.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b) {
  at::Tensor result = tensor_of(out);
  at::cpu::mm_out(result, tensor_of(a), tensor_of(b));
}
inline void multiply_transposed(const Matrix& out, const Matrix& a, const Matrix& b) {
  at::Tensor result = tensor_of(out);
  at::cpu::mm_out(result, tensor_of(a), tensor_of(b).t());
}
inline void add_transposed_product(const Matrix& out, const Matrix& a, const Matrix& b, float beta, float scale = 1.0f) {
  at::Tensor result = tensor_of(out);
  at::cpu::addmm_out(result, result, tensor_of(a).t(), tensor_of(b), beta, scale);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// While it lives, MKL takes this thread for its only one. Even inside a parallel region MKL may, on Intel's processors, split
// a product's sums for as many threads as torch was given. A library that is not MKL knows where it is.
struct OneThread {
  OneThread() { set(1); }
  ~OneThread() { set(0); }  // what holds for all threads
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

  static void set([[maybe_unused]] int threads) {
#ifdef __linux__
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(threads);
#endif
  }
};

// visit(begin, end) for shares of `count` tasks, in parallel. A single task would run outside of a parallel region, where
// the library may split its sums over threads: an empty second one prevents that.
template <typename Visit>
void for_shares(int64_t count, const Visit& visit) {
  at::parallel_for(0, count == 1 ? 2 : count, 1, [&](int64_t begin, int64_t end) {
    const OneThread one;
    visit(begin, std::min(end, count));
  });
}

// visit(row, rows, column, columns) for every tile of a rows x columns matrix, in parallel.
template <typename Visit>
void for_each_tile(int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns, const Visit& visit) {
  const int64_t across = ceil_div(columns, tile_columns);
  for_shares(ceil_div(rows, tile_rows) * across, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / across * tile_rows, column = tile % across * tile_columns;
      visit(row, std::min(tile_rows, rows - row), column, std::min(tile_columns, columns - column));
    }
  });
}

// What native.py sees to: a mistake here would read wrong numbers.
inline void check(const char* name, const at::Tensor& tensor, std::initializer_list<at::ScalarType> dtypes) {
  TORCH_CHECK(tensor.is_contiguous() && std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end(),
              name, " is ", tensor.scalar_type(), " of strides ", tensor.strides(),
              "; it must be contiguous, and of the dtype that the op's file gives.");
}

inline Element element_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 ? Element::kBfloat16 : Element::kFloat32;
}

// A block of a contiguous [N, D] tensor as float32: in place, or widened into `scratch`.
inline Matrix block_of(const at::Tensor& tensor, int64_t row, int64_t rows, int64_t column, int64_t columns,
                       float* scratch) {
  const int64_t width = tensor.size(1), start = row * width + column;
  if (element_of(tensor) == Element::kFloat32) return {static_cast<float*>(tensor.data_ptr()) + start, rows, columns, width};
  const auto* const bits = static_cast<const uint16_t*>(tensor.data_ptr()) + start;
  for (int64_t i = 0; i < rows; ++i) kernels().widen(bits + i * width, columns, scratch + i * columns);
  return {scratch, rows, columns};
}

inline Matrix rows_of(const at::Tensor& tensor, int64_t row, int64_t rows, float* scratch) {
  return block_of(tensor, row, rows, 0, tensor.size(1), scratch);
}

struct FreeScratch {
  void operator()(void* data) const { ::operator delete[](data, std::align_val_t{64}); }
};
template <typename T>
using Scratch = std::unique_ptr<T[], FreeScratch>;

// Uninitialised numbers. A library GEMM may order its sums by the alignment of what it reads, which is therefore fixed.
template <typename T = float>
Scratch<T> scratch(int64_t size) {
  return Scratch<T>(static_cast<T*>(::operator new[](size * sizeof(T), std::align_val_t{64})));
}

}  // namespace ibkernels
