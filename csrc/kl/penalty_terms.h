// The sampled-token estimators of KL(policy || ref), for host and device. Equations: rlhf_kernels/kl/__init__.py.
#pragma once

#include <cstdint>

#include "common/online_softmax.h"

namespace rk {

// The order is that of ESTIMATORS in rlhf_kernels/kl/ops.py.
enum class KlEstimator : int64_t { k1 = 0, k2 = 1, k3 = 2 };
constexpr int64_t kKlEstimators = 3;

// With log_ratio = ref - policy; M: the maths policy of common/online_softmax.h.
template <class M>
RK_INLINE typename M::F kl_estimate(KlEstimator estimator, typename M::F log_ratio) {
  if (estimator == KlEstimator::k1) return -log_ratio;
  if (estimator == KlEstimator::k2) return 0.5f * log_ratio * log_ratio;
  return M::expm1_minus_identity(log_ratio);
}

// Its derivative with respect to the policy's log-probability.
template <class M>
RK_INLINE typename M::F kl_estimate_slope(KlEstimator estimator, typename M::F log_ratio) {
  if (estimator == KlEstimator::k1) return M::set(1);
  if (estimator == KlEstimator::k2) return -log_ratio;
  return -M::expm1(log_ratio);
}

}  // namespace rk
