// The ops of the kl room; their schemas are in bindings.cpp, their contract in rlhf_kernels/kl/__init__.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "common/gradients.h"
#include "common/side.h"

namespace rk {

// Both models, the rows that count [N] bool, and whether it is KL(policy || ref) or the other direction.
struct KlInputs {
  Side policy, ref;
  const at::Tensor& mask;
  bool policy_ref;
};

// The forward's outputs that backward takes.
struct SavedKl {
  const at::Tensor &kl, &stats, &logit_cache;
};

// kept_logits: how many of both models' logits are kept for backward.
// -> kl [N], stats [6, N]: max and log-sum of the weighing distribution, of the other one, centre, shift; logit_cache
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_kl_cpu(const KlInputs& inputs, int64_t kept_logits);

// -> gradients of the policy's hidden, weight, bias (empty where not needed)
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_kl_backward_cpu(const at::Tensor& grad_kl, const SavedKl& saved,
                                                                      const KlInputs& inputs, GradientNeeds needs);

// Sampled-token estimators, elementwise; estimator 0, 1, 2 is k1, k2, k3.
at::Tensor kl_penalty_cpu(const at::Tensor& logprobs, const at::Tensor& ref_logprobs, int64_t estimator);
at::Tensor kl_penalty_backward_cpu(const at::Tensor& grad, const at::Tensor& logprobs, const at::Tensor& ref_logprobs,
                                   int64_t estimator);

// The same on CUDA.
decltype(linear_kl_cpu) linear_kl_cuda;
decltype(linear_kl_backward_cpu) linear_kl_backward_cuda;
decltype(kl_penalty_cpu) kl_penalty_cuda;
decltype(kl_penalty_backward_cpu) kl_penalty_backward_cuda;

// Either device's estimator, with its gradient.
decltype(kl_penalty_cpu) kl_penalty_autograd;

}  // namespace rk
