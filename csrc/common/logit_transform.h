// The parameters by which a GEMM's outputs become final logits. The maths is LogitMap's, in online_softmax.h.
#pragma once

#if defined(__CUDACC__)
#define RK_INLINE __host__ __device__ __forceinline__
#else
#define RK_INLINE inline __attribute__((always_inline))
#endif

namespace rk {

// Final logits of a GEMM's outputs x: z = cap tanh((x + bias) scale / cap) / temperature, without tanh where cap is 0.
struct LogitTransform {
  float scale = 1, softcap = 0, temperature = 1;
};

inline LogitTransform transform_of(double scale, double softcap, double temperature) {
  return {static_cast<float>(scale), static_cast<float>(softcap), static_cast<float>(temperature)};
}

enum class Transform { identity, affine, softcap };

RK_INLINE Transform kind_of(const LogitTransform& t, bool with_bias) {
  if (t.softcap > 0) return Transform::softcap;
  return t.scale == 1 && t.temperature == 1 && !with_bias ? Transform::identity : Transform::affine;
}

}  // namespace rk
