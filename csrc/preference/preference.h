// The ops of the preference room; their schemas are in bindings.cpp, their contracts in rlhf_kernels/dpo/pairwise.py
// and rlhf_kernels/bradley_terry/__init__.py.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace rk {

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

}  // namespace rk
