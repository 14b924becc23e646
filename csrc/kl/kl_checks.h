// Checks that the kl room makes on every device.
#pragma once

#include "common/checks.h"
#include "kl/linear_kl.h"
#include "kl/penalty_terms.h"

namespace rk {

inline void check_kl(const KlSide& policy, const KlSide& ref, const at::Tensor& mask) {
  check_head(policy.hidden, policy.weight, policy.bias);
  check_head(ref.hidden, ref.weight, ref.bias);
  format_of(policy.gemm_dtype);
  format_of(ref.gemm_dtype);
  TORCH_CHECK_VALUE(policy.weight.size(0) == ref.weight.size(0), "policy and reference must share a vocabulary, got ",
                    policy.weight.size(0), " and ", ref.weight.size(0));
  TORCH_CHECK_VALUE(policy.hidden.size(0) == ref.hidden.size(0), "policy and reference must have the same rows, got ",
                    policy.hidden.size(0), " and ", ref.hidden.size(0));
  check_rows("mask", mask, policy.hidden.size(0), at::kBool);
}

inline void check_penalty(const at::Tensor& logprobs, const at::Tensor& ref_logprobs, int64_t estimator) {
  TORCH_CHECK_VALUE(logprobs.sizes() == ref_logprobs.sizes(), "logprobs and ref_logprobs must share a shape, got ",
                    logprobs.sizes(), " and ", ref_logprobs.sizes());
  TORCH_CHECK_VALUE(estimator >= 0 && estimator < kKlEstimators, "estimator must be in [0, ", kKlEstimators, "), got ",
                    estimator);
}

}  // namespace rk
