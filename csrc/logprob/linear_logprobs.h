// The ops of the logprob room; their schemas are in bindings.cpp, their contract in rlhf_kernels/logprob/__init__.py.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace rk {

// -> logprobs, max_logit, log_sum, entropy, is_top1, mean_logit, log_sum_sq_probs (each [N] or empty), logit_cache
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
linear_logprobs_cpu(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                    const std::optional<at::Tensor>& bias, double logit_scale, double logit_softcap, double temperature,
                    int64_t ignore_index, at::ScalarType gemm_dtype, bool want_entropy, bool want_is_top1,
                    bool want_mean_logit, bool want_log_sum_sq_probs, int64_t kept_logits);

// -> gradients of hidden, weight, bias (empty where not needed)
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_logprobs_backward_cpu(
    const std::optional<at::Tensor>& grad_logprobs, const std::optional<at::Tensor>& grad_log_sum,
    const std::optional<at::Tensor>& grad_entropy, const at::Tensor& hidden, const at::Tensor& weight,
    const at::Tensor& targets, const std::optional<at::Tensor>& bias, const at::Tensor& max_logit,
    const at::Tensor& log_sum, const at::Tensor& entropy, const at::Tensor& logit_cache, double logit_scale,
    double logit_softcap, double temperature, int64_t ignore_index, at::ScalarType gemm_dtype, bool need_hidden,
    bool need_weight, bool need_bias);

// The same on CUDA.
decltype(linear_logprobs_cpu) linear_logprobs_cuda;
decltype(linear_logprobs_backward_cpu) linear_logprobs_backward_cuda;

}  // namespace rk
