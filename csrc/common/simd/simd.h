// A vector of floats and the maths on it, for the instruction set that the including file selected: RK_ISA, and in
// RK_LANES how many floats its registers hold. (Wider ones would do, but gcc compares and selects them lane by lane.)
//
// Written in the compiler's vector extensions: one source gives AVX-512, AVX2 and portable code, and arm64 builds too.
// Each function is branch-free and lane-wise, so a token's bits do not depend on its lane or its neighbours.
#ifndef RK_ISA
#error "include this through isa/*.cpp"
#endif
#pragma once

#include "common/online_softmax.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors as arguments: everything here is inlined
#endif

namespace rk {
namespace RK_ISA {

constexpr int kLanes = RK_LANES;
typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef double VecD __attribute__((vector_size(8 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));

struct Simd {
  using F = VecF;

  static RK_INLINE F set(float x) { return x - F{}; }
  static RK_INLINE F load(const float* from) {
    F v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
  }
  static RK_INLINE void store(float* to, F v) { __builtin_memcpy(to, &v, sizeof(v)); }
  static RK_INLINE F select(VecI mask, F a, F b) { return mask ? a : b; }
  static RK_INLINE F max(F a, F b) { return a > b ? a : b; }
  static RK_INLINE F min(F a, F b) { return a < b ? a : b; }

  // x = n log 2 + r with |r| <= log(2) / 2; adding 1.5 * 2^23 rounds to the nearest integer.
  struct Reduced {
    F r;
    VecI n;
  };
  static RK_INLINE Reduced reduce(F x) {
    const F shifted = x * 1.44269504088896341f + 12582912.0f;
    const F n = shifted - 12582912.0f;
    const F r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // log 2 in two parts, the first exact
    return {r, (VecI)shifted};
  }
  // e^r - 1 by its Taylor series: the first term left out, r^8 / 8!, is below 6e-9.
  static RK_INLINE F expm1_of_reduced(F r) {
    F s = r * (1.0f / 5040) + 1.0f / 720;
    s = s * r + 1.0f / 120;
    s = s * r + 1.0f / 24;
    s = s * r + 1.0f / 6;
    s = s * r + 0.5f;
    return s * (r * r) + r;
  }

  // For x <= 88. Below the smallest normal number the result is exactly 0; NaN stays NaN.
  static RK_INLINE F exp(F x) {
    const Reduced red = reduce(x);
    const F e = expm1_of_reduced(red.r) + 1.0f;
    const F scaled = (F)((VecI)e + (red.n << 23));
    return x < -87.3f ? F{} : scaled;
  }

  // For any x: beyond +-88 as at +-88.
  static RK_INLINE F expm1(F x) {
    const F bounded = x > 88.0f ? set(88.0f) : (x < -88.0f ? set(-88.0f) : x);
    const Reduced red = reduce(bounded);
    const F power = (F)((red.n << 23) + 0x3f800000);  // 2^n: the rounding constant's low bits are n
    const F small = expm1_of_reduced(red.r);
    return power * small + (power - 1.0f);
  }

  static RK_INLINE F expm1_minus_identity(F u) {
    const VecI small = (u < 1.0f) & (u > -1.0f);
    return small ? expm1_minus_identity_series<F>(small ? u : F{}) : expm1(u) - u;
  }

  // For 0 <= x <= 1: 2 artanh s with s = x / (x + 2) <= 1/3. The first term left out, s^16 / 17, is below 2e-9.
  static RK_INLINE F log1p(F x) {
    const F s = x / (x + 2.0f), q = s * s;
    F sum = q * (1.0f / 15) + 1.0f / 13;
    sum = sum * q + 1.0f / 11;
    sum = sum * q + 1.0f / 9;
    sum = sum * q + 1.0f / 7;
    sum = sum * q + 1.0f / 5;
    sum = sum * q + 1.0f / 3;
    return 2.0f * (s * q * sum + s);
  }

  // tanh x = (e^2x - 1) / (e^2x - 1 + 2)
  static RK_INLINE F tanh(F x) {
    const F bounded = x > 20.0f ? set(20.0f) : (x < -20.0f ? set(-20.0f) : x);
    const F e = expm1(2.0f * bounded);
    return e / (e + 2.0f);
  }

  // Round to nearest even; NaN stays NaN.
  static RK_INLINE VecU to_bf16_bits(F x) {
    const VecU bits = (VecU)x;
    const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (x != x) ? VecU{} + 0x7fc0 : rounded;
  }

  // Round to nearest even, subnormals included; from 65520 on infinity; NaN stays NaN.
  static RK_INLINE VecU to_f16_bits(F x) {
    const VecU bits = (VecU)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    // Normal results: rebias the exponent (127 - 15 = 112) and round off 13 bits.
    const VecU normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 the addend 0.5 puts the last subnormal bit, 2^-24, at the unit of the float: the adder rounds.
    const VecU subnormal = (VecU)((F)magnitude + 0.5f) - 0x3f000000;
    VecU half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? VecU{} + 0x7c00 : half;
    half = magnitude > 0x7f800000 ? VecU{} + 0x7e00 : half;
    return half | sign;
  }
};

struct AllLanes {};  // a whole vector: no loop over lanes, which would keep it out of registers

// The first `lanes` of a vector, of floats or of 16-bit halves; zeros behind them.
template <class T>
using VecOf = std::conditional_t<sizeof(T) == 2, VecH, VecF>;

template <class T>
static RK_INLINE VecOf<T> load_some(const T* from, AllLanes) {
  VecOf<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <class T>
static RK_INLINE VecOf<T> load_some(const T* from, int64_t lanes) {
  VecOf<T> v{};
  for (int64_t i = 0; i < lanes; ++i) v[i] = from[i];
  return v;
}

template <class T>
static RK_INLINE void store_some(T* to, VecOf<T> v, AllLanes) {
  __builtin_memcpy(to, &v, sizeof(v));
}
template <class T>
static RK_INLINE void store_some(T* to, VecOf<T> v, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) to[i] = v[i];
}

// f(begin, lanes) for every vector of `count` numbers; the last may have fewer lanes.
template <class F>
static RK_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, AllLanes{});
  if (i < count) f(i, count - i);
}

// Exchanges the off-diagonal blocks of size `half` between two rows of a matrix: one step of its transposition.
template <int half>
static RK_INLINE void exchange(VecU& a, VecU& b) {
#define RK_LOW(k) (((k) & half) ? kLanes + (k) - half : (k))
#define RK_HIGH(k) (((k) & half) ? kLanes + (k) : (k) + half)
#define RK_4(f, k) f(k), f(k + 1), f(k + 2), f(k + 3)
#if RK_LANES == 16
#define RK_ALL(f) RK_4(f, 0), RK_4(f, 4), RK_4(f, 8), RK_4(f, 12)
#elif RK_LANES == 8
#define RK_ALL(f) RK_4(f, 0), RK_4(f, 4)
#else
#define RK_ALL(f) RK_4(f, 0)
#endif
#if defined(__clang__)
  const VecU low = __builtin_shufflevector(a, b, RK_ALL(RK_LOW));
  const VecU high = __builtin_shufflevector(a, b, RK_ALL(RK_HIGH));
#else
  const VecU low = __builtin_shuffle(a, b, VecU{RK_ALL(RK_LOW)});
  const VecU high = __builtin_shuffle(a, b, VecU{RK_ALL(RK_HIGH)});
#endif
#undef RK_LOW
#undef RK_HIGH
#undef RK_ALL
#undef RK_4
  a = low;
  b = high;
}

template <int half>
static RK_INLINE void exchange_all(VecU (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if ((i & half) == 0) exchange<half>(rows[i], rows[i + half]);
  }
}

static RK_INLINE void transpose(VecU (&rows)[kLanes]) {
  if constexpr (kLanes > 8) exchange_all<8>(rows);
  if constexpr (kLanes > 4) exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

}  // namespace RK_ISA
}  // namespace rk
