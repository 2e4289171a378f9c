// The noise stream of philox.h as torch operators on the CPU, for the C++ backend and for tests of the contract:
//   torch.ops.ibkernels_cpu.philox_bits(rng, rows, columns)    the 32-bit words, int64 [N, columns]
//   torch.ops.ibkernels_cpu.philox_normal(rng, rows, columns)  the normals, float32 [N, columns]
// with rng int64 [2] = (seed, offset) and rows int64 [N], row ids taken modulo 2^32.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "philox.h"

namespace ibkernels {
namespace {

// About 100 us of work on one core: enough that starting a thread for it pays.
constexpr int64_t kValuesPerTask = 8192;

void check_inputs(const at::Tensor& rng, const at::Tensor& rows, int64_t columns) {
  TORCH_CHECK(rng.scalar_type() == at::kLong && rng.dim() == 1 && rng.size(0) == 2,
              "rng must be an int64 tensor of shape [2] holding (seed, offset), as ibkernels.rng_state() makes it; got ",
              rng.scalar_type(), " of shape ", rng.sizes(), ".");
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.dim() == 1,
              "rows must be an int64 tensor of shape [N] holding row ids; got ", rows.scalar_type(), " of shape ",
              rows.sizes(), ".");
  TORCH_CHECK(columns >= 0 && columns <= INT32_MAX, "columns must be between 0 and 2147483647; got ", columns, ".");
}

// out[n, c] = element lane_of(c) of draw(words of the call that serves (rows[n], c)).
template <typename T, typename Draw>
at::Tensor fill(const at::Tensor& rng, const at::Tensor& rows, int64_t columns, at::ScalarType dtype, const Draw& draw) {
  check_inputs(rng, rows, columns);
  const at::Tensor state = rng.contiguous();
  const at::Tensor ids = rows.contiguous();
  const philox::Stream stream(static_cast<uint64_t>(state.const_data_ptr<int64_t>()[0]),
                              static_cast<uint64_t>(state.const_data_ptr<int64_t>()[1]));
  at::Tensor out = at::empty({ids.size(0), columns}, rows.options().dtype(dtype));

  const int64_t* id = ids.const_data_ptr<int64_t>();
  T* const data = out.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, columns));
  at::parallel_for(0, ids.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      T* const row = data + n * columns;
      philox::for_each_call(stream, static_cast<uint32_t>(id[n]), columns,
                            [&](const philox::Words& words, int64_t first_column) {
                              const auto values = draw(words);
                              for (int lane = 0; lane < 4; ++lane) {
                                const int64_t column = first_column + philox::kLaneColumn[lane];
                                if (column < columns) row[column] = static_cast<T>(values[lane]);
                              }
                            });
    }
  });
  return out;
}

at::Tensor philox_bits(const at::Tensor& rng, const at::Tensor& rows, int64_t columns) {
  return fill<int64_t>(rng, rows, columns, at::kLong, [](const philox::Words& words) { return words; });
}

at::Tensor philox_normal(const at::Tensor& rng, const at::Tensor& rows, int64_t columns) {
  return fill<float>(rng, rows, columns, at::kFloat, philox::normals);
}

}  // namespace

TORCH_LIBRARY(ibkernels_cpu, m) {
  m.def("philox_bits(Tensor rng, Tensor rows, int columns) -> Tensor");
  m.def("philox_normal(Tensor rng, Tensor rows, int columns) -> Tensor");
}

TORCH_LIBRARY_IMPL(ibkernels_cpu, CPU, m) {
  m.impl("philox_bits", &philox_bits);
  m.impl("philox_normal", &philox_normal);
}

}  // namespace ibkernels
