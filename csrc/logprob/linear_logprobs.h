// The ops of the logprob room; their schemas are in bindings.cpp, their contract in rlhf_kernels/logprob/__init__.py.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "common/gradients.h"
#include "common/logprob_outputs.h"
#include "common/side.h"

namespace rk {

// The optional outputs that the caller wants.
struct WantedOutputs {
  bool entropy, is_top1, mean_logit, log_sum_sq_probs;

  // The statistics that row kernels accumulate for them: a set of LogprobOutputs.
  int32_t accumulated() const {
    return (entropy ? kEntropy : kPlain) | (is_top1 || mean_logit || log_sum_sq_probs ? kExtras : kPlain);
  }
};

// Targets [N] int64, of which those that are `ignore_index` do not count.
struct Targets {
  const at::Tensor& ids;
  int64_t ignore_index;
};

// Gradients into the outputs, each [N] or none.
struct LogprobUpstreams {
  const std::optional<at::Tensor>&logprobs, &log_sum, &entropy;
};

// The forward's outputs that backward takes.
struct SavedLogprobs {
  const at::Tensor &max_logit, &log_sum, &entropy, &logit_cache;
};

// -> logprobs, max_logit, log_sum, entropy, is_top1, mean_logit, log_sum_sq_probs (each [N] or empty), logit_cache
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
linear_logprobs_cpu(const Side& side, const Targets& targets, const WantedOutputs& wanted, int64_t kept_logits);

// The same of a head that needs no gradient; in the cache's place d logprob / d hidden [N, D], 0 of rows that do not
// count.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
linear_logprobs_frozen_cpu(const Side& side, const Targets& targets, const WantedOutputs& wanted);

// -> gradient of hidden [N, D] in `dtype`, from the directions d logprob / d hidden: on any device
at::Tensor linear_logprobs_frozen_backward(const at::Tensor& grad_logprobs, const at::Tensor& directions,
                                           const at::Tensor& targets, int64_t ignore_index, at::ScalarType dtype);

// -> gradients of hidden, weight, bias (empty where not needed)
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_logprobs_backward_cpu(const LogprobUpstreams& upstream,
                                                                            const SavedLogprobs& saved,
                                                                            const Side& side, const Targets& targets,
                                                                            GradientNeeds needs);

// The same on CUDA.
decltype(linear_logprobs_cpu) linear_logprobs_cuda;
decltype(linear_logprobs_frozen_cpu) linear_logprobs_frozen_cuda;
decltype(linear_logprobs_backward_cpu) linear_logprobs_backward_cuda;

}  // namespace rk
