// What a backward pass is asked for, and what it returns.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace rk {

struct HeadGradients {
  at::Tensor hidden, weight, bias;  // undefined where not needed

  // As an op returns them, which cannot return nothing.
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
