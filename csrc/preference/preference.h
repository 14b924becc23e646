// The ops of the preference room; their schemas are in bindings.cpp, their contracts in rlhf_kernels/dpo/pairwise.py
// and rlhf_kernels/bradley_terry/__init__.py.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "common/checks.h"
#include "preference/pair_losses.h"

namespace rk {

inline void check_pairs(const at::Tensor& chosen, const at::Tensor& rejected, int64_t loss_type) {
  TORCH_CHECK_VALUE(loss_type >= 0 && loss_type < kPairLosses, "loss_type must be in [0, ", kPairLosses, "), got ",
                    loss_type);
  check_rows("chosen_idxs", chosen, chosen.size(0), at::kLong);
  check_rows("rejected_idxs", rejected, chosen.size(0), at::kLong);
}

// -> losses [P], rewards [S]
std::tuple<at::Tensor, at::Tensor> dpo_loss_cpu(const at::Tensor& policy, const std::optional<at::Tensor>& ref,
                                                const at::Tensor& chosen, const at::Tensor& rejected, double beta,
                                                int64_t loss_type, double label_smoothing);
// -> gradient of policy [S]
at::Tensor dpo_loss_backward_cpu(const at::Tensor& grad_losses, const at::Tensor& policy,
                                 const std::optional<at::Tensor>& ref, const at::Tensor& chosen,
                                 const at::Tensor& rejected, double beta, int64_t loss_type, double label_smoothing);

// -> losses [P]
at::Tensor bradley_terry_loss_cpu(const at::Tensor& chosen, const at::Tensor& rejected,
                                  const std::optional<at::Tensor>& margin, double label_smoothing,
                                  double center_coefficient);
// -> gradients of chosen and rejected [P]
std::tuple<at::Tensor, at::Tensor> bradley_terry_loss_backward_cpu(const at::Tensor& grad_losses,
                                                                   const at::Tensor& chosen, const at::Tensor& rejected,
                                                                   const std::optional<at::Tensor>& margin,
                                                                   double label_smoothing, double center_coefficient);

// The same on CUDA.
decltype(dpo_loss_cpu) dpo_loss_cuda;
decltype(dpo_loss_backward_cpu) dpo_loss_backward_cuda;
decltype(bradley_terry_loss_cpu) bradley_terry_loss_cuda;
decltype(bradley_terry_loss_backward_cpu) bradley_terry_loss_backward_cuda;

// Either device's loss, with its gradient.
decltype(dpo_loss_cpu) dpo_loss_autograd;
decltype(bradley_terry_loss_cpu) bradley_terry_loss_autograd;

}  // namespace rk
