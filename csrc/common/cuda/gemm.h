// Matrix products by the vendor's library, as the kernels need them: row-major, 16-bit or fp32 operands, fp32 sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/format.h"

namespace rk::cuda {

// c [m][n] = (accumulate ? c : 0) + op(a) op(b). Strides are those of stored rows, in elements; rows of all three start
// at multiples of kRowAlignment bytes, as matrix units read them.
struct GemmArgs {
  int64_t m, n, k;
  const void* a;  // stored [m][k], or [k][m] where transposed
  int64_t a_stride;
  bool a_transposed;
  const void* b;  // stored [k][n], or [n][k] where transposed
  int64_t b_stride;
  bool b_transposed;
  void* c;
  int64_t c_stride;
  bool accumulate;
  Format operands, result;  // result: f32 or the operands' format, rounded once
  // Positive: the size for which the algorithm is chosen, nominal_n a multiple of 8. Products of the same k, operands'
  // strides and formats, and the same remainder of n by 8, that share it run the same algorithm whatever m, n and c's
  // stride: a logit's bits do not depend on the others, nor on where it is kept. 0: chosen for what it is.
  int64_t nominal_m, nominal_n;
};

struct GemmContext {
  void* workspace;
  int64_t workspace_bytes;
  bool allow_tf32;
  cudaStream_t stream;
};

// Throws std::runtime_error where the library refuses.
void gemm(const GemmContext& context, const GemmArgs& args);

constexpr int64_t kRowAlignment = 16;
constexpr int64_t kGemmWorkspaceBytes = int64_t{32} << 20;

}  // namespace rk::cuda
