// The backward pass of linear_logprobs with a frozen head, on any device.
#include "common/checks.h"
#include "logprob/linear_logprobs.h"

namespace rk {

at::Tensor linear_logprobs_frozen_backward(const at::Tensor& grad_logprobs, const at::Tensor& directions,
                                           const at::Tensor& targets, int64_t ignore_index, at::ScalarType dtype) {
  const int64_t n = directions.size(0);
  TORCH_CHECK_VALUE(directions.dim() == 2, "directions must be [N, D], got ", directions.sizes());
  check_rows("targets", targets, n, at::kLong);
  TORCH_CHECK_VALUE(grad_logprobs.dim() == 1 && grad_logprobs.size(0) == n, "grad_logprobs must be [", n, "], got ",
                    grad_logprobs.sizes());
  // Whatever comes in at a row that does not count, NaN too: its gradient is 0.
  const at::Tensor of_rows = at::where(targets == ignore_index, 0, grad_logprobs).unsqueeze(1);
  at::Tensor gradient = at::empty(directions.sizes(), directions.options().dtype(dtype));
  return at::mul_out(gradient, directions, of_rows);
}

}  // namespace rk
