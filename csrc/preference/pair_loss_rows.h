// The pairwise losses, a vector of pairs at a time.
#ifndef RK_ISA
#error "include this through isa/*.cpp"
#endif
#pragma once

#include "common/simd/simd.h"
#include "common/simd/tile_kernels.h"
#include "preference/pair_losses.h"

namespace rk {
namespace RK_ISA {

// Losses and slopes in loops of their own, in which the other one's transcendentals are dead code.
static void pair_losses(const PairLossRows& rows) {
  const auto evaluate = [&](auto store) {
    for_vectors(rows.count, [&](int64_t i, auto lanes) {
      store(pair_loss<Simd>(rows.type, load_some(rows.h + i, lanes), rows.beta, rows.smoothing), i, lanes);
    });
  };
  if (rows.losses) {
    evaluate([&](const auto& pair, int64_t i, auto lanes) { store_some(rows.losses + i, pair.loss, lanes); });
  }
  if (rows.slopes) {
    evaluate([&](const auto& pair, int64_t i, auto lanes) { store_some(rows.slopes + i, pair.slope, lanes); });
  }
}

static void reward_losses(const RewardRows& rows) {
  const auto evaluate = [&](auto store) {
    for_vectors(rows.count, [&](int64_t i, auto lanes) {
      const VecF margin = rows.margin ? load_some(rows.margin + i, lanes) : VecF{};
      store(bradley_terry<Simd>(load_some(rows.chosen + i, lanes), load_some(rows.rejected + i, lanes), margin,
                                rows.smoothing, rows.centring),
            i, lanes);
    });
  };
  if (rows.losses) {
    evaluate([&](const auto& pair, int64_t i, auto lanes) { store_some(rows.losses + i, pair.loss, lanes); });
  }
  if (rows.grad) {
    evaluate([&](const auto& pair, int64_t i, auto lanes) {
      const VecF grad = load_some(rows.grad + i, lanes);
      store_some(rows.grad_chosen + i, grad * pair.slope_chosen, lanes);
      store_some(rows.grad_rejected + i, grad * pair.slope_rejected, lanes);
    });
  }
}

}  // namespace RK_ISA
}  // namespace rk
