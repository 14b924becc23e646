// kl_penalty and its gradient, a vector of tokens at a time.
#ifndef RK_ISA
#error "include this through isa/*.cpp"
#endif
#pragma once

#include "common/simd/simd.h"
#include "common/simd/tile_kernels.h"
#include "kl/penalty_terms.h"

namespace rk {
namespace RK_ISA {

static void kl_penalties(const KlPenaltyRows& rows) {
  for_vectors(rows.count, [&](int64_t i, auto lanes) {
    const VecF log_ratio = load_some(rows.ref + i, lanes) - load_some(rows.policy + i, lanes);
    const VecF value = rows.grad ? load_some(rows.grad + i, lanes) * kl_estimate_slope<Simd>(rows.estimator, log_ratio)
                                 : kl_estimate<Simd>(rows.estimator, log_ratio);
    store_some(rows.to + i, value, lanes);
  });
}

}  // namespace RK_ISA
}  // namespace rk
