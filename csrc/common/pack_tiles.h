// Moving data between formats: packing a GEMM's right operand, and rounding fp32 results to the tensor they go to.
#ifndef RK_ISA
#error "include this through common/isa/*.cpp"
#endif
#pragma once

#include "common/simd.h"
#include "common/tile_kernels.h"
#include "common/tile_plan_constants.h"

namespace rk {
namespace RK_ISA {

static void pack_columns(Format format, const void* rows, int64_t stride, int64_t k, int64_t columns, void* packed) {
  if (format == Format::f32) {
    const float* from = static_cast<const float*>(rows);
    float* to = static_cast<float*>(packed);
    for (int64_t i = 0; i < k; ++i, from += stride, to += kRowBlock) {
      __builtin_memcpy(to, from, columns * sizeof(float));
      __builtin_memset(to + columns, 0, (kRowBlock - columns) * sizeof(float));
    }
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(rows);
  uint16_t* to = static_cast<uint16_t*>(packed);
  for (int64_t i = 0; i < k; i += 2, from += 2 * stride, to += 2 * kRowBlock) {
    uint16_t two[2][kRowBlock] = {};
    __builtin_memcpy(two[0], from, columns * sizeof(uint16_t));
    if (i + 1 < k) __builtin_memcpy(two[1], from + stride, columns * sizeof(uint16_t));
    for (int64_t column = 0; column < kRowBlock; column += kLanes) {
      VecH low, high;
      __builtin_memcpy(&low, two[0] + column, sizeof(low));
      __builtin_memcpy(&high, two[1] + column, sizeof(high));
      const VecU pairs = __builtin_convertvector(low, VecU) | (__builtin_convertvector(high, VecU) << 16);
      __builtin_memcpy(to + 2 * column, &pairs, sizeof(pairs));
    }
  }
}

static void store_rows(Format format, const float* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                       int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride) {
    if (format == Format::f32) {
      __builtin_memcpy(static_cast<float*>(to) + row * to_stride, from, columns * sizeof(float));
      continue;
    }
    uint16_t* out = static_cast<uint16_t*>(to) + row * to_stride;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = columns - column < kLanes ? columns - column : kLanes;
      VecF values{};
      __builtin_memcpy(&values, from + column, width * sizeof(float));
      const VecU bits = format == Format::bf16 ? Simd::to_bf16_bits(values) : Simd::to_f16_bits(values);
      const VecH half = __builtin_convertvector(bits, VecH);
      __builtin_memcpy(out + column, &half, width * sizeof(uint16_t));
    }
  }
}

}  // namespace RK_ISA
}  // namespace rk
