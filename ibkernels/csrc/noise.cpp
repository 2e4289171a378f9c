// The noise stream of philox.h as torch operators on the CPU, for the C++ backend and for tests of the contract:
//   torch.ops.ibkernels_cpu.philox_bits(rng, rows, columns)    the 32-bit words, int64 [N, columns]
//   torch.ops.ibkernels_cpu.philox_normal(rng, rows, columns)  the normals, float32 [N, columns]
// with rng int64 [2] = (seed, offset) and rows int64 [N], row ids taken modulo 2^32.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "kernels.h"
#include "philox.h"

namespace ibkernels {
namespace {

// Some 20 us of work on one core: enough that starting a thread for it pays.
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

// An [N, columns] tensor whose rows `fill(row id, row)` writes, in parallel.
template <typename T, typename Fill>
at::Tensor fill_rows(const at::Tensor& rows, int64_t columns, at::ScalarType dtype, const Fill& fill) {
  const at::Tensor ids = rows.contiguous();
  const at::Tensor out = at::empty({ids.size(0), columns}, rows.options().dtype(dtype));
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  T* const data = out.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, columns));
  at::parallel_for(0, ids.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) fill(static_cast<uint32_t>(id[n]), data + n * columns);
  });
  return out;
}

std::array<uint64_t, 2> seed_and_offset(const at::Tensor& rng) {
  return {static_cast<uint64_t>(rng[0].item<int64_t>()), static_cast<uint64_t>(rng[1].item<int64_t>())};
}

at::Tensor philox_bits(const at::Tensor& rng, const at::Tensor& rows, int64_t columns) {
  check_inputs(rng, rows, columns);
  const auto [seed, offset] = seed_and_offset(rng);
  const philox::Stream stream(seed, offset);
  return fill_rows<int64_t>(rows, columns, at::kLong, [&](uint32_t row, int64_t* out) {
    for (int64_t column = 0; column < columns; ++column) {
      out[column] = stream.call(row, philox::group_of(column)).lane[philox::lane_of(column)];
    }
  });
}

at::Tensor philox_normal(const at::Tensor& rng, const at::Tensor& rows, int64_t columns) {
  check_inputs(rng, rows, columns);
  const auto [seed, offset] = seed_and_offset(rng);
  const auto draw = kernels().fill_normals;
  return fill_rows<float>(rows, columns, at::kFloat, [&, seed = seed, offset = offset](uint32_t row, float* out) {
    draw(seed, offset, row, columns, out);
  });
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
