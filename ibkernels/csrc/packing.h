// bfloat16 factors in the order in which brgemm reads them (bfloat16.h), for machines with AVX-512.
#pragma once

#include <cstdint>

namespace ibkernels {

constexpr int64_t kPanel = 64;  // columns of a panel of a right factor; oneDNN takes no more

// A panel: the rows of `from`, or its columns, in pairs of which the elements that belong to one column of the factor lie
// together, kPanel columns to a pair; an odd last one is paired with zeros.
void pack_panel(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* out);
void pack_transposed_panel(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* out);

// The transpose of `from`, whose rows are out_stride apart, with a column of zeros behind an odd last one.
void transpose(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* out, int64_t out_stride);

}  // namespace ibkernels
