// CUDA's dialect of C++ for a plain compiler: kernels are executed on the host, so that the tests run csrc/**/*.cu on
// machines without a GPU, under sanitizers too.
//
// Blocks run one after another; each thread of a block is a fiber (fibers.h). A thread runs until it waits at a barrier
// or in a warp collective; then the first one that can run, in the order that `schedule` says, does. What depends on
// that order is a race, so a kernel gives the same bits under every schedule, or is wrong. What a GPU leaves undefined
// (a lane that never comes, a barrier that not all threads reach) ends the launch with an exception that says who waits
// for whom. Neither speed nor what a GPU's memory may reorder is modelled.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // of the block that runs; like a GPU's, what the last block left is in it

// ---- vector types
// ----------------------------------------------------------------------------------------------------

#define RK_CUDA_VECTOR_2(name, element)      \
  struct alignas(2 * sizeof(element)) name { \
    element x, y;                            \
  };                                         \
  inline name make_##name(element x, element y) { return {x, y}; }
#define RK_CUDA_VECTOR_4(name, element)      \
  struct alignas(4 * sizeof(element)) name { \
    element x, y, z, w;                      \
  };                                         \
  inline name make_##name(element x, element y, element z, element w) { return {x, y, z, w}; }
RK_CUDA_VECTOR_2(float2, float)
RK_CUDA_VECTOR_4(float4, float)
RK_CUDA_VECTOR_2(double2, double)
RK_CUDA_VECTOR_2(int2, int)
RK_CUDA_VECTOR_4(int4, int)
RK_CUDA_VECTOR_2(uint2, unsigned)
RK_CUDA_VECTOR_4(uint4, unsigned)
RK_CUDA_VECTOR_2(longlong2, long long)
#undef RK_CUDA_VECTOR_2
#undef RK_CUDA_VECTOR_4

// ---- what threads do together
// ----------------------------------------------------------------------------------------

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  rk_cuda_on_host::machine.barrier(at);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location at = std::source_location::current()) {
  rk_cuda_on_host::machine.collective("__syncwarp", mask, 0, 0, true, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, std::source_location at = std::source_location::current()) {
  return static_cast<unsigned>(rk_cuda_on_host::machine.collective("__ballot_sync", mask, predicate != 0, 0, true, at));
}

inline int __ffs(unsigned bits) { return std::countr_zero(bits) % 32 + (bits != 0); }

inline int __any_sync(unsigned mask, int predicate, std::source_location at = std::source_location::current()) {
  return rk_cuda_on_host::machine.collective("__any_sync", mask, predicate != 0, 0, true, at) != 0;
}

inline int __all_sync(unsigned mask, int predicate, std::source_location at = std::source_location::current()) {
  return rk_cuda_on_host::machine.collective("__all_sync", mask, predicate != 0, 0, true, at) == mask;
}

template <rk_cuda_on_host::Exchangeable T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              std::source_location at = std::source_location::current()) {
  return rk_cuda_on_host::shuffle("__shfl_sync", mask, value, width, at, [=](int) { return source & (width - 1); });
}

template <rk_cuda_on_host::Exchangeable T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 std::source_location at = std::source_location::current()) {
  const int by = static_cast<int>(delta);
  return rk_cuda_on_host::shuffle("__shfl_up_sync", mask, value, width, at,
                                  [=](int lane) { return lane < by ? lane : lane - by; });
}

template <rk_cuda_on_host::Exchangeable T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   std::source_location at = std::source_location::current()) {
  const int by = static_cast<int>(delta);
  return rk_cuda_on_host::shuffle("__shfl_down_sync", mask, value, width, at, [=](int lane) { return lane + by; });
}

// With a mask of `width` or more CUDA also reads lanes of lower segments; that is not modelled: one's own value.
template <rk_cuda_on_host::Exchangeable T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  std::source_location at = std::source_location::current()) {
  return rk_cuda_on_host::shuffle("__shfl_xor_sync", mask, value, width, at,
                                  [=](int lane) { return lane ^ lane_mask; });
}

// ---- numbers
// ---------------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* from) {
  return *from;
}

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

// Bits only, as under the flags with which torch compiles CUDA: no arithmetic, no implicit conversions.
struct __nv_bfloat16 {
  unsigned short bits;
};
struct __half {
  unsigned short bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {0x7fff};                                             // CUDA's NaN
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // a tie goes to the even one
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  return {std::bit_cast<unsigned short>(static_cast<_Float16>(value))};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline float __half2float(__half value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }

// ---- the host's side
// -------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
