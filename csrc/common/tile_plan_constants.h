// Constants of tile_plan.h, apart because the vector code may not include the standard library (see tile_kernels.h).
#pragma once

#include <cstdint>

namespace rk {

// Rows (tokens) of a logit tile: one brgemm call has at most 64 columns, and 64 floats are four 512-bit vectors.
constexpr int64_t kRowBlock = 64;
// Of a block that is not full, GEMMs go over the rows up to this multiple: few shapes, for each of which brgemm makes a
// kernel of its own.
constexpr int64_t kRowStep = 16;

}  // namespace rk
