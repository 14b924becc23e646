// One model's hidden states and LM head, as the host side of an op takes them.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "common/logit_transform.h"

namespace rk {

// hidden [N, D], weight [V, D], bias [V] or none. `gemm_dtype`: the dtype to which the GEMM's operands are rounded
// first (autocast's, or the promoted type).
struct Side {
  const at::Tensor& hidden;
  const at::Tensor& weight;
  const std::optional<at::Tensor>& bias;
  LogitTransform transform;
  at::ScalarType gemm_dtype;

  int64_t rows() const { return hidden.size(0); }
  int64_t vocab() const { return weight.size(0); }
};

}  // namespace rk
