// Number formats on the device: loads into float, stores rounded once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/format.h"

namespace rk::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) with the format's type.
template <class F>
void with_type(Format format, const F& f) {
  switch (format) {
    case Format::f32: return f(TypeTag<float>{});
    case Format::bf16: return f(TypeTag<__nv_bfloat16>{});
    case Format::f16: return f(TypeTag<__half>{});
  }
}

}  // namespace rk::cuda
