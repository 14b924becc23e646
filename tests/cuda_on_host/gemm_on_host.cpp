// rk::cuda::gemm for kernels that run on the host: plain loops in place of the vendor's library.
//
// A row's sums are taken in an order that no other row and no count of rows changes, as the interface promises; and
// nothing but the named elements is read or written, so that AddressSanitizer sees where a caller names too many.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda/gemm.h"
#include "common/products.h"

namespace rk::cuda {
namespace {

constexpr int64_t kColumns = 256, kDepth = 64;  // of op(b)'s tile, as fp32

float load(const void* from, Format format, int64_t i) {
  switch (format) {
    case Format::f32: return static_cast<const float*>(from)[i];
    case Format::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
    case Format::f16: return __half2float(static_cast<const __half*>(from)[i]);
  }
  throw std::runtime_error("gemm: unknown format");
}

void store(void* to, Format format, int64_t i, float value) {
  switch (format) {
    case Format::f32: static_cast<float*>(to)[i] = value; break;
    case Format::bf16: static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value); break;
    case Format::f16: static_cast<__half*>(to)[i] = __float2half_rn(value); break;
  }
}

void check(const GemmContext& context, const GemmArgs& args) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("gemm: expected ") + what);
  };
  require(args.m >= 0 && args.n >= 0 && args.k >= 0, "sizes that are not negative");
  require(args.a_stride >= (args.a_transposed ? args.m : args.k), "rows of a that do not overlap");
  require(args.b_stride >= (args.b_transposed ? args.k : args.n), "rows of b that do not overlap");
  require(args.c_stride >= args.n, "rows of c that do not overlap");
  require(args.result == Format::f32 || args.result == args.operands, "a result in fp32 or the operands' format");
  require(!args.accumulate || args.result == Format::f32, "fp32 where the product is added to c");
  require(args.nominal_m >= 0 && args.nominal_n >= 0 && args.nominal_n % 8 == 0, "a nominal size");
  require((args.nominal_m == 0) == (args.nominal_n == 0), "both nominal sizes or none");
  const auto starts = [](const void* data, int64_t stride, Format format) {
    return reinterpret_cast<uintptr_t>(data) % kRowAlignment == 0 && stride * size_of(format) % kRowAlignment == 0;
  };
  require(starts(args.a, args.a_stride, args.operands) && starts(args.b, args.b_stride, args.operands) &&
              starts(args.c, args.c_stride, args.result),
          "rows that start at multiples of 16 bytes");
  // It is the library's own; the beginning of it will do to spoil what someone else keeps there.
  if (context.workspace) std::memset(context.workspace, 0xff, std::min<int64_t>(context.workspace_bytes, 1 << 16));
}

}  // namespace

void gemm(const GemmContext& context, const GemmArgs& args) {
  check(context, args);
  count_product(args.m, args.n, args.k);
  const auto a_at = [&](int64_t row, int64_t depth) {
    return load(args.a, args.operands, args.a_transposed ? depth * args.a_stride + row : row * args.a_stride + depth);
  };
  const auto b_at = [&](int64_t depth, int64_t column) {
    return load(args.b, args.operands,
                args.b_transposed ? column * args.b_stride + depth : depth * args.b_stride + column);
  };
  std::vector<float> tile(kDepth * kColumns), sums(args.m * kColumns), part(kColumns);
  for (int64_t column = 0; column < args.n; column += kColumns) {
    const int64_t columns = std::min(kColumns, args.n - column);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t depth = 0; depth < args.k; depth += kDepth) {  // sums of sums: their error does not grow with k
      const int64_t depths = std::min(kDepth, args.k - depth);
      for (int64_t d = 0; d < depths; ++d) {
        for (int64_t j = 0; j < columns; ++j) tile[d * kColumns + j] = b_at(depth + d, column + j);
      }
      for (int64_t row = 0; row < args.m; ++row) {
        std::fill(part.begin(), part.end(), 0.0f);
        for (int64_t d = 0; d < depths; ++d) {
          const float a = a_at(row, depth + d);
          for (int64_t j = 0; j < columns; ++j) part[j] += a * tile[d * kColumns + j];
        }
        for (int64_t j = 0; j < columns; ++j) sums[row * kColumns + j] += part[j];
      }
    }
    for (int64_t row = 0; row < args.m; ++row) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t i = row * args.c_stride + column + j;
        const float before = args.accumulate ? static_cast<const float*>(args.c)[i] : 0.0f;
        store(args.c, args.result, i, before + sums[row * kColumns + j]);
      }
    }
  }
}

}  // namespace rk::cuda
