// The gradients that a backward pass computes, and which of them are needed.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace rk {

struct HeadGradients {
  at::Tensor hidden, weight, bias;  // undefined where not needed

  // The gradients as an op returns them, which cannot return nothing.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> tensors(const at::Tensor& like) const {
    const auto or_empty = [&](const at::Tensor& tensor) {
      return tensor.defined() ? tensor : at::empty({0}, like.options().dtype(at::kFloat));
    };
    return {or_empty(hidden), or_empty(weight), or_empty(bias)};
  }
};

struct GradientNeeds {
  bool hidden, weight, bias;
};

}  // namespace rk
