// The pairwise losses, a vector of pairs at a time.
#ifndef RK_ISA
#error "include this through common/isa/*.cpp"
#endif
#pragma once

#include "common/simd.h"
#include "common/tile_kernels.h"
#include "preference/pair_losses.h"

namespace rk {
namespace RK_ISA {

static void pair_losses(const PairLossRows& rows) {
  for_vectors(rows.count, [&](int64_t i, auto lanes) {
    const auto pair = pair_loss<Simd>(rows.type, load_some(rows.h + i, lanes), rows.beta, rows.smoothing);
    if (rows.losses) store_some(rows.losses + i, pair.loss, lanes);
    if (rows.slopes) store_some(rows.slopes + i, pair.slope, lanes);
  });
}

static void reward_losses(const RewardRows& rows) {
  for_vectors(rows.count, [&](int64_t i, auto lanes) {
    const auto pair = bradley_terry<Simd>(load_some(rows.chosen + i, lanes), load_some(rows.rejected + i, lanes),
                                          load_some(rows.margin + i, lanes), rows.smoothing, rows.centring);
    if (rows.losses) store_some(rows.losses + i, pair.loss, lanes);
    if (!rows.grad) return;
    const VecF grad = load_some(rows.grad + i, lanes);
    store_some(rows.grad_chosen + i, grad * pair.slope_chosen, lanes);
    store_some(rows.grad_rejected + i, grad * pair.slope_rejected, lanes);
  });
}

}  // namespace RK_ISA
}  // namespace rk
