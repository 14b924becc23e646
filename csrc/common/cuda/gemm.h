// Matrix products by the vendor's library, as the kernels need them: row-major, 16-bit or fp32 operands, fp32 sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/format.h"

namespace rk::cuda {

// c [m][n] = (accumulate ? c : 0) + op(a) op(b). Strides are those of stored rows, in elements.
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
  // Positive: the number of rows for which the algorithm is chosen. Products of the same n, k, strides and formats that
  // also share it run the same algorithm whatever their m: a row's bits do not depend on the others. 0: chosen for m.
  int64_t nominal_m;
};

struct GemmContext {
  void* workspace;
  int64_t workspace_bytes;
  bool allow_tf32;
  cudaStream_t stream;
};

// Throws std::runtime_error where the library refuses.
void gemm(const GemmContext& context, const GemmArgs& args);

constexpr int64_t kGemmWorkspaceBytes = int64_t{32} << 20;

}  // namespace rk::cuda
