// Autograd in C++, for ops on a number a response: torch.library's, which is Python, takes longer than such an op.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <memory>
#include <utility>

namespace rk {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether a result is to be differentiated by this argument; else nothing need be kept of it. Forward mode counts:
// Function::apply refuses it in words.
inline bool wants_gradient(const at::Tensor& argument) {
  return (at::GradMode::is_enabled() && argument.requires_grad()) || argument._fw_grad(0).defined();
}

// An option for backward, beside the tensors. Saving one and finding it again takes about a microsecond, which counts
// where a whole step takes fifty: one that is not saved reads as 0, as most options are.
template <class T>
void save_option(AutogradContext* ctx, const char* name, T value) {
  if (value != 0) ctx->saved_data[name] = value;
}

template <class T>
T saved_option(const AutogradContext* ctx, const char* name) {
  const auto entry = ctx->saved_data.find(name);
  return entry == ctx->saved_data.end() ? T(0) : entry->second.to<T>();
}

// A gradient has its argument's dtype. Called in vain, `to` takes as long as a small gradient.
inline at::Tensor in_dtype_of(const at::Tensor& argument, at::Tensor gradient) {
  return gradient.scalar_type() == argument.scalar_type() ? gradient : gradient.to(argument.scalar_type());
}

// Gradients which, where create_graph=True asks for theirs, raise when these are computed. Computed below autograd,
// they would otherwise pass for constants.
inline variable_list once(const char* op, variable_list gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  for (at::Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = gradient.detach().requires_grad_();
  }
  const auto raise = std::make_shared<torch::autograd::DelayedError>(
      c10::str(op, " is differentiable once; use backend='reference' for second derivatives"),
      static_cast<int64_t>(gradients.size()));
  return (*raise)(std::move(gradients));
}

}  // namespace rk
