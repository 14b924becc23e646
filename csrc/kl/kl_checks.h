// Checks that the kl room makes on every device.
#pragma once

#include "common/checks.h"
#include "kl/linear_kl.h"
#include "kl/penalty_terms.h"

namespace rk {

inline void check_kl(const KlInputs& inputs) {
  const Side &policy = inputs.policy, &ref = inputs.ref;
  check_side(policy);
  check_side(ref);
  TORCH_CHECK_VALUE(policy.vocab() == ref.vocab(), "policy and reference must share a vocabulary, got ", policy.vocab(),
                    " and ", ref.vocab());
  TORCH_CHECK_VALUE(policy.rows() == ref.rows(), "policy and reference must have the same rows, got ", policy.rows(),
                    " and ", ref.rows());
  check_rows("mask", inputs.mask, policy.rows(), at::kBool);
}

inline void check_penalty(const at::Tensor& logprobs, const at::Tensor& ref_logprobs, int64_t estimator) {
  TORCH_CHECK_VALUE(logprobs.sizes() == ref_logprobs.sizes(), "logprobs and ref_logprobs must share a shape, got ",
                    logprobs.sizes(), " and ", ref_logprobs.sizes());
  TORCH_CHECK_VALUE(estimator >= 0 && estimator < kKlEstimators, "estimator must be in [0, ", kKlEstimators, "), got ",
                    estimator);
}

}  // namespace rk
