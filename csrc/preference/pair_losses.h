// The pairwise losses and their derivatives, on the maths policy M of common/online_softmax.h: a float on a GPU, a
// vector of pairs on CPU. Equations: rlhf_kernels/dpo/pairwise.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/online_softmax.h"

namespace rk {

// The order is that of COMPILED_TYPES in rlhf_kernels/dpo/ops.py.
enum class PairLoss : int64_t { sigmoid = 0, hinge = 1, ipo = 2, robust = 3 };
constexpr int64_t kPairLosses = 4;

// -log sigma(x) = log(1 + e^-x), without overflow on either side.
template <class M>
RK_INLINE typename M::F minus_log_sigmoid(typename M::F x) {
  return M::max(-x, M::set(0)) + M::log1p(M::exp(-M::max(x, -x)));
}

template <class M>
RK_INLINE typename M::F sigmoid(typename M::F x) {
  const auto e = M::exp(-M::max(x, -x));
  return M::select(x >= 0.0f, M::set(1), e) / (e + 1.0f);
}

template <class M>
struct LossAndSlope {
  typename M::F loss, slope;  // slope = d loss / d h
};

// h: a pair's difference of log-ratios.
template <class M>
RK_INLINE LossAndSlope<M> pair_loss(PairLoss type, typename M::F h, float beta, float smoothing) {
  const auto mu = beta * h;
  switch (type) {
    case PairLoss::sigmoid:
      if (smoothing == 0) return {minus_log_sigmoid<M>(mu), -beta * sigmoid<M>(-mu)};
      return {(1 - smoothing) * minus_log_sigmoid<M>(mu) + smoothing * minus_log_sigmoid<M>(-mu),
              beta * (smoothing * sigmoid<M>(mu) - (1 - smoothing) * sigmoid<M>(-mu))};
    case PairLoss::hinge: return {M::max(1.0f - mu, M::set(0)), M::select(mu < 1.0f, M::set(-beta), M::set(0))};
    case PairLoss::ipo: {
      const auto off = h - 1 / (2 * beta);
      return {off * off, 2.0f * off};
    }
    case PairLoss::robust: {
      const float scale = 1 / (1 - 2 * smoothing);
      return {scale * ((1 - smoothing) * minus_log_sigmoid<M>(mu) - smoothing * minus_log_sigmoid<M>(-mu)),
              -scale * beta * ((1 - smoothing) * sigmoid<M>(-mu) + smoothing * sigmoid<M>(mu))};
    }
  }
  return {h, h};
}

template <class M>
struct BradleyTerry {
  typename M::F loss, slope_chosen, slope_rejected;
};

template <class M>
RK_INLINE BradleyTerry<M> bradley_terry(typename M::F chosen, typename M::F rejected, typename M::F margin,
                                        float smoothing, float centring) {
  const auto pair = pair_loss<M>(PairLoss::sigmoid, chosen - rejected - margin, 1.0f, smoothing);
  const auto sum = chosen + rejected;
  const auto pull = 2 * centring * sum;
  return {pair.loss + centring * sum * sum, pair.slope + pull, pull - pair.slope};
}

}  // namespace rk
