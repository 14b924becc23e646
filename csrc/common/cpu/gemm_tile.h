// A small GEMM on one thread: ATen's brgemm, which oneDNN compiles for the shape at its first call.
#pragma once

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <type_traits>

#include "common/products.h"
#include "common/tile_plan.h"

namespace rk {

template <class T>
constexpr int64_t kGemmDepthStep = std::is_same_v<T, float> ? 1 : 2;  // bf16 goes in pairs along the reduction

// Whether a GEMM of this dtype runs on bf16 operands, where the CPU multiplies them into fp32 (AMX, AVX512_BF16); the
// others run on float, exactly.
bool runs_on_bf16(at::ScalarType gemm);

// c [m][n] (+)= a [m][k] b, b packed [k][64], n <= 64; one thread, fp32 sums, whose order follows from k alone.
template <class T>
void gemm_tile(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b, float* c, int64_t c_stride,
               bool add) {
  // 64 columns of a depth block stay in the nearest cache. For float, shorter blocks also round long sums a little
  // less.
  constexpr int64_t kDepthBlock = std::is_same_v<T, float> ? 256 : 512;
  count_product(m, n, k);
  for (int64_t at = 0; at < k; at += kDepthBlock) {
    at::native::cpublas::brgemm(m, n, std::min(kDepthBlock, k - at), a_stride, kRowBlock, c_stride, add || at > 0,
                                a + at, b + at * kRowBlock, c, !std::is_same_v<T, float>);
  }
}

// Frees the matrix unit for others; at the end of a thread's GEMMs.
template <class T>
void gemm_release() {
  at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
}

struct GemmReleaser {
  void (*release)();
  ~GemmReleaser() { release(); }
};

}  // namespace rk
