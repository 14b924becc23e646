// The pairwise losses and their derivatives, for host and device. Equations: rlhf_kernels/dpo/pairwise.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/online_softmax.h"

namespace rk {

// The order is that of COMPILED_TYPES in rlhf_kernels/dpo/ops.py.
enum class PairLoss : int64_t { sigmoid = 0, hinge = 1, ipo = 2, robust = 3 };
constexpr int64_t kPairLosses = 4;

// -log sigma(x) = log(1 + e^-x), without overflow on either side.
RK_INLINE float minus_log_sigmoid(float x) { return ::fmaxf(-x, 0.0f) + ::log1pf(::expf(-::fabsf(x))); }

RK_INLINE float sigmoid(float x) {
  const float e = ::expf(-::fabsf(x));
  return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

struct LossAndSlope {
  float loss, slope;  // slope = d loss / d h
};

// h: a pair's difference of log-ratios.
RK_INLINE LossAndSlope pair_loss(PairLoss type, float h, float beta, float smoothing) {
  const float mu = beta * h;
  switch (type) {
    case PairLoss::sigmoid:
      return {(1 - smoothing) * minus_log_sigmoid(mu) + smoothing * minus_log_sigmoid(-mu),
              beta * (smoothing * sigmoid(mu) - (1 - smoothing) * sigmoid(-mu))};
    case PairLoss::hinge: return {::fmaxf(1 - mu, 0.0f), mu < 1 ? -beta : 0.0f};
    case PairLoss::ipo: {
      const float off = h - 1 / (2 * beta);
      return {off * off, 2 * off};
    }
    case PairLoss::robust: {
      const float scale = 1 / (1 - 2 * smoothing);
      return {scale * ((1 - smoothing) * minus_log_sigmoid(mu) - smoothing * minus_log_sigmoid(-mu)),
              -scale * beta * ((1 - smoothing) * sigmoid(-mu) + smoothing * sigmoid(mu))};
    }
  }
  return {0, 0};
}

struct BradleyTerry {
  float loss, slope_chosen, slope_rejected;
};

RK_INLINE BradleyTerry bradley_terry(float chosen, float rejected, float margin, float smoothing, float centring) {
  const LossAndSlope pair = pair_loss(PairLoss::sigmoid, chosen - rejected - margin, 1.0f, smoothing);
  const float sum = chosen + rejected;
  return {pair.loss + centring * sum * sum, pair.slope + 2 * centring * sum, -pair.slope + 2 * centring * sum};
}

}  // namespace rk
