// Checks of an op's arguments: whatever Python passes, no op reads out of bounds. Messages state expected and received.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "common/format.h"
#include "common/side.h"

namespace rk {

inline Format format_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return Format::f32;
    case at::kBFloat16: return Format::bf16;
    case at::kHalf: return Format::f16;
    default: TORCH_CHECK_TYPE(false, "native computes in float32, bfloat16 or float16, got ", dtype);
  }
}

inline void check_side(const Side& side) {
  const auto& [hidden, weight, bias, transform, gemm_dtype] = side;
  TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [N, D], got ", hidden.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) >= 1,
                    "weight must be [V, D] with V, D >= 1, got ", weight.sizes());
  TORCH_CHECK_VALUE(hidden.size(1) == weight.size(1), "hidden and weight must share D, got ", hidden.sizes(), " and ",
                    weight.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias must be [", weight.size(0),
                    "], got ", bias ? bias->sizes() : at::IntArrayRef{});
  format_of(gemm_dtype);
}

inline void check_rows(const char* name, const at::Tensor& tensor, int64_t rows, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == rows, name, " must be [", rows, "], got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
}

// Contiguous and in fp32, to be read: values that are so already are not copied, nor cut off from their graph.
inline at::Tensor in_fp32(const at::Tensor& values) {
  if (values.scalar_type() == at::kFloat) return values.is_contiguous() ? values : values.contiguous();
  return values.detach().to(at::kFloat).contiguous();
}

// [rows] floats of a per-row tensor that may be absent, of another dtype, or strided.
inline at::Tensor float_rows(const std::optional<at::Tensor>& tensor, int64_t rows) {
  if (!tensor || !tensor->defined()) return at::zeros({rows}, at::kFloat);  // on CPU; CUDA kernels take null instead
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == rows, "a per-row tensor must be [", rows, "], got ",
                    tensor->sizes());
  return in_fp32(*tensor);
}

}  // namespace rk
