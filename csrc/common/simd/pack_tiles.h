// Moving data between formats: packing a GEMM's right operand, and rounding fp32 results to the tensor they go to.
#ifndef RK_ISA
#error "include this through isa/*.cpp"
#endif
#pragma once

#include "common/simd/simd.h"
#include "common/simd/tile_kernels.h"
#include "common/tile_plan_constants.h"

namespace rk {
namespace RK_ISA {

static void pack_columns(Format format, const void* rows, int64_t stride, int64_t k, int64_t columns, void* packed) {
  if (format == Format::f32) {
    const float* from = static_cast<const float*>(rows);
    float* to = static_cast<float*>(packed);
    for (int64_t i = 0; i < k; ++i, from += stride, to += kRowBlock) {
      for_vectors(columns, [&](int64_t c, auto lanes) { Simd::store(to + c, load_some(from + c, lanes)); });
      for (int64_t c = columns; c < kRowBlock; ++c) to[c] = 0;
    }
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(rows);
  uint32_t* to = static_cast<uint32_t*>(packed);
  for (int64_t i = 0; i < k; i += 2, from += 2 * stride, to += kRowBlock) {
    for_vectors(columns, [&](int64_t c, auto lanes) {
      const VecU low = __builtin_convertvector(load_some(from + c, lanes), VecU);
      VecU pairs = low;
      if (i + 1 < k) pairs |= __builtin_convertvector(load_some(from + stride + c, lanes), VecU) << 16;
      __builtin_memcpy(to + c, &pairs, sizeof(pairs));
    });
    for (int64_t c = columns; c < kRowBlock; ++c) to[c] = 0;
  }
}

template <Format format>
static void store_rows_as(const float* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                          int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride) {
    for_vectors(columns, [&](int64_t c, auto lanes) {
      const VecF values = load_some(from + c, lanes);
      if constexpr (format == Format::f32) {
        store_some(static_cast<float*>(to) + row * to_stride + c, values, lanes);
      } else {
        const VecU bits = format == Format::bf16 ? Simd::to_bf16_bits(values) : Simd::to_f16_bits(values);
        const VecH halves = __builtin_convertvector(bits, VecH);
        store_some(static_cast<uint16_t*>(to) + row * to_stride + c, halves, lanes);
      }
    });
  }
}

static void store_rows(Format format, const float* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                       int64_t columns) {
  switch (format) {
    case Format::f32: return store_rows_as<Format::f32>(from, from_stride, to, to_stride, rows, columns);
    case Format::bf16: return store_rows_as<Format::bf16>(from, from_stride, to, to_stride, rows, columns);
    case Format::f16: return store_rows_as<Format::f16>(from, from_stride, to, to_stride, rows, columns);
  }
}

}  // namespace RK_ISA
}  // namespace rk
