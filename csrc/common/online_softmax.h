// The inline maths of every kernel, once: streaming softmax statistics, their merge, and gradients of logits.
//
// Each function is a template on a maths policy M, which supplies the number type F and a handful of functions on it:
// a vector of tokens on CPU (common/simd/simd.h), or one float on a GPU and in scalar loops (ScalarMath below):
//   M::F, M::set, M::exp, M::expm1, M::expm1_minus_identity, M::log1p (of [0, 1]), M::tanh, M::max, M::min,
//   M::select(mask, a, b)
// Comparing two F gives a mask for M::select. All quantities are in nats.
#pragma once

#include <cmath>
#include <limits>

#include "common/logit_transform.h"

namespace rk {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^u - 1 - u >= 0 without cancellation, for |u| < 1: u^2 (1/2! + u/3! + ... + u^10/12!), by Horner.
template <class F>
RK_INLINE F expm1_minus_identity_series(F u) {
  F sum = u * (1.0f / 479001600) + 1.0f / 39916800;
  sum = sum * u + 1.0f / 3628800;
  sum = sum * u + 1.0f / 362880;
  sum = sum * u + 1.0f / 40320;
  sum = sum * u + 1.0f / 5040;
  sum = sum * u + 1.0f / 720;
  sum = sum * u + 1.0f / 120;
  sum = sum * u + 1.0f / 24;
  sum = sum * u + 1.0f / 6;
  sum = sum * u + 0.5f;
  return u * u * sum;
}

struct ScalarMath {
  using F = float;
  static RK_INLINE F set(float x) { return x; }
  static RK_INLINE F exp(F x) { return ::expf(x); }
  static RK_INLINE F expm1(F x) { return ::expm1f(x); }
  static RK_INLINE F expm1_minus_identity(F u) {
    return ::fabsf(u) < 1.0f ? expm1_minus_identity_series(u) : ::expm1f(u) - u;
  }
  static RK_INLINE F log1p(F x) { return ::log1pf(x); }
  static RK_INLINE F tanh(F x) { return ::tanhf(x); }
  static RK_INLINE F max(F a, F b) { return a > b ? a : b; }
  static RK_INLINE F min(F a, F b) { return a < b ? a : b; }
  static RK_INLINE F select(bool mask, F a, F b) { return mask ? a : b; }
};

// ---- final logits --------------------------------------------------------------------------------------------------

// The final logit z of a GEMM's output x, and dz/dx from z.
template <class M, Transform kind>
struct LogitMap {
  using F = typename M::F;
  float gain, cap, inverse_cap, slope;

  RK_INLINE explicit LogitMap(const LogitTransform& t)
      : gain(kind == Transform::softcap ? t.scale / t.softcap : t.scale / t.temperature),
        cap(t.softcap / t.temperature),
        inverse_cap(cap > 0 ? 1 / cap : 0),
        slope(t.scale / t.temperature) {}

  RK_INLINE F operator()(F x, float bias) const {
    if constexpr (kind == Transform::identity) return x;
    const F scaled = (x + bias) * gain;
    if constexpr (kind == Transform::softcap) return cap * M::tanh(scaled);
    return scaled;
  }
  RK_INLINE F derivative(F z) const {
    if constexpr (kind == Transform::identity) return M::set(1);
    if constexpr (kind == Transform::affine) return M::set(slope);
    const F t = z * inverse_cap;
    return slope * (1.0f - t * t);
  }
};

// The exponent z - scale log 2 of 2^-scale e^z for a whole number, with log 2 in two parts: the first has so few bits
// that its multiple is exact.
template <class M>
RK_INLINE typename M::F scaled_exponent(typename M::F z, typename M::F scale) {
  return (z - scale * 0.693359375f) - scale * -2.12194440e-4f;
}

// ---- softmax statistics ------------------------------------------------------------------------------------------

// The statistics of a part of the vocabulary that a softmax needs, relative to the part's own maximum m = max z:
//   sum = S e^(z-m),   shifted = S (z-m) e^(z-m) (for the entropy),   squares = S e^(2(z-m))
template <class M>
struct SoftmaxState {
  using F = typename M::F;
  F max, sum, shifted, squares;

  static RK_INLINE SoftmaxState empty() { return {M::set(-kInfinity), M::set(0), M::set(0), M::set(0)}; }
};

// A part whose logits are all -inf has no finite maximum: subtract 0 there, so that exp(-inf - 0) is 0 and not NaN.
template <class M>
RK_INLINE typename M::F finite_max(typename M::F max) {
  return M::select(max == M::set(-kInfinity), M::set(0), max);
}

// One logit's terms, with delta = z - max.
template <class M, bool with_entropy, bool with_squares>
RK_INLINE void add_softmax_term(SoftmaxState<M>& s, typename M::F delta) {
  const auto e = M::exp(delta);
  s.sum = s.sum + e;
  if constexpr (with_entropy) s.shifted = s.shifted + e * M::max(delta, M::set(-100.0f));  // 0 * -inf is 0 here
  if constexpr (with_squares) s.squares = s.squares + e * e;
}

// Restates `s` relative to new_max >= s.max. With delta = m - m':
//   S e^(z-m') = e^delta sum,   S (z-m') e^(z-m') = e^delta (shifted + delta sum)
template <class M>
RK_INLINE void rescale(SoftmaxState<M>& s, typename M::F new_max) {
  using F = typename M::F;
  const F empty = M::set(-kInfinity);
  const F delta = M::select(s.max == empty, M::set(0), s.max - new_max);  // an empty part sums to 0 anyway
  const F factor = M::exp(delta);
  s.shifted = factor * (s.shifted + delta * s.sum);
  s.sum = factor * s.sum;
  s.squares = factor * factor * s.squares;
  s.max = new_max;
}

// a <- statistics of both parts.
template <class M>
RK_INLINE void merge(SoftmaxState<M>& a, SoftmaxState<M> b) {
  const typename M::F new_max = M::max(a.max, b.max);
  rescale<M>(a, new_max);
  rescale<M>(b, new_max);
  a.sum = a.sum + b.sum;
  a.shifted = a.shifted + b.shifted;
  a.squares = a.squares + b.squares;
}

// log p of the logit z, of a row's whole vocabulary
RK_INLINE float logprob_of(const SoftmaxState<ScalarMath>& s, float z) {
  return (z - finite_max<ScalarMath>(s.max)) - ::logf(s.sum);
}

// H = -S p log p = log sum - S p (z - m)
RK_INLINE float entropy_of(const SoftmaxState<ScalarMath>& s) { return ::logf(s.sum) - s.shifted / s.sum; }

// log S p^2: in double, since the terms are larger than their difference
RK_INLINE float log_sum_sq_probs_of(const SoftmaxState<ScalarMath>& s) {
  return static_cast<float>(::log(static_cast<double>(s.squares)) - 2 * ::log(static_cast<double>(s.sum)));
}

// ---- gradients with respect to the final logits z -------------------------------------------------------------------

// Upstream gradients of a row and what its softmax was.
template <class M>
struct RowGradient {
  using F = typename M::F;
  F max, log_sum;                  // logsumexp = max + log_sum, kept apart for precision
  F grad_logprob, grad_logsumexp;  // d loss / d logprob, d loss / d logsumexp
  F grad_entropy, entropy;
};

// d loss / d z_v of v other than the target: p_v [(g_lse - g_lp) - g_H (log p_v + H)]
template <class M>
RK_INLINE typename M::F logit_gradient(typename M::F z, const RowGradient<M>& row, bool with_entropy) {
  const auto log_p = (z - row.max) - row.log_sum;
  const auto p = M::exp(log_p);
  auto g = row.grad_logsumexp - row.grad_logprob;
  if (with_entropy) {  // log p of an impossible token is -inf, and its p is 0: keep their product 0
    g = g - row.grad_entropy * (M::max(log_p, M::set(-100.0f)) + row.entropy);
  }
  return p * g;
}

// The same of the target: g_lp (1 - p_y) is -g_lp expm1(log p_y), exact where p_y is near 1.
template <class M>
RK_INLINE typename M::F target_logit_gradient(typename M::F z, RowGradient<M> row, bool with_entropy) {
  const auto log_p = (z - row.max) - row.log_sum;
  const auto through_logprob = M::set(0) - row.grad_logprob * M::expm1(log_p);
  row.grad_logprob = M::set(0);
  return through_logprob + logit_gradient<M>(z, row, with_entropy);
}

// ---- KL divergence -------------------------------------------------------------------------------------------------

// KL(p || q) of p = softmax(z) and q = softmax(y) over a part of the vocabulary, about a centre c (any number):
// with u = (z - y) - c and the weights w = e^(z - max z) not yet normalised,
//   second = S w (e^-u - 1 + u) >= 0,   first = S w u.
// Over the whole vocabulary, divided by S w: S = second, B = S - first = S p (e^-u - 1), and because S q = 1,
//   log(1 + B) = c - lse(z) + lse(y),   KL = S - (B - log(1 + B)),
// where both terms are of second order in u: near the reference nothing cancels.
template <class M>
struct KlState {
  using F = typename M::F;
  F max, sum;              // of the weighing distribution p
  F other_max, other_sum;  // of q
  F centre, second, first;

  static RK_INLINE KlState empty() {
    const F none = M::set(-kInfinity), zero = M::set(0);
    return {none, zero, none, zero, zero, zero, zero};
  }
};

// First pass over a part: its maxima, and as its centre u where p has its mass, and u should be smallest.
template <class M>
RK_INLINE void note_kl_maxima(KlState<M>& s, typename M::F z, typename M::F y) {
  s.centre = M::select(z > s.max, z - y, s.centre);
  s.max = M::max(s.max, z);
  s.other_max = M::max(s.other_max, y);
}

// After it: where q is 0 at p's maximum, any centre will do.
template <class M>
RK_INLINE void settle_centre(KlState<M>& s) {
  s.centre = M::select(s.centre - s.centre == M::set(0), s.centre, M::set(0));
}

constexpr float kMaxExponent = 60.0f;  // e^60 times a vocabulary stays finite; beyond, kl_of takes the plain difference

// Second pass: one token's (second, first) contributions, for weight w.
template <class M>
RK_INLINE void add_kl_term(KlState<M>& s, typename M::F w, typename M::F z, typename M::F y) {
  const auto u = (z - y) - s.centre;
  const auto allowed = w != M::set(0);  // where p is 0 the term's limit is 0, though u may be -inf or NaN
  const auto minus_u = M::min(M::set(0) - u, M::set(kMaxExponent));
  s.second = s.second + M::select(allowed, w * M::expm1_minus_identity(minus_u), M::set(0));
  s.first = s.first + M::select(allowed, w * u, M::set(0));
}

// Second pass: everything that one token adds, relative to the part's finite maxima.
template <class M>
RK_INLINE void add_kl_pair(KlState<M>& s, typename M::F z, typename M::F y, typename M::F shift,
                           typename M::F other_shift) {
  const auto w = M::exp(z - shift);
  s.sum = s.sum + w;
  s.other_sum = s.other_sum + M::exp(y - other_shift);
  add_kl_term<M>(s, w, z, y);
}

// Restates `s` about the centre c' = c + delta:
//   first' = first - delta sum,   second' = second + B expm1(delta) + (expm1(delta) - delta) sum,  B = second - first
template <class M>
RK_INLINE void recentre(KlState<M>& s, typename M::F centre) {
  const auto delta = M::select(s.sum == M::set(0), M::set(0), centre - s.centre);
  const auto bounded = M::max(M::min(delta, M::set(kMaxExponent)), M::set(-kMaxExponent));
  s.second = s.second + (s.second - s.first) * M::expm1(bounded) + M::expm1_minus_identity(bounded) * s.sum;
  s.first = s.first - delta * s.sum;
  s.centre = centre;
}

// Restates a (max, sum) pair relative to new_max, and returns the factor.
template <class M>
RK_INLINE typename M::F rescale_sum(typename M::F& max, typename M::F& sum, typename M::F new_max) {
  const auto delta = M::select(max == M::set(-kInfinity), M::set(0), max - new_max);
  const auto factor = M::exp(delta);
  sum = factor * sum;
  max = new_max;
  return factor;
}

// Restates `s` about another centre, relative to maxima that are no smaller.
template <class M>
RK_INLINE void restate(KlState<M>& s, typename M::F max, typename M::F other_max, typename M::F centre) {
  recentre<M>(s, centre);
  const auto factor = rescale_sum<M>(s.max, s.sum, max);
  s.second = factor * s.second;
  s.first = factor * s.first;
  rescale_sum<M>(s.other_max, s.other_sum, other_max);
}

// a <- both parts, about the centre of the part with the larger maximum.
template <class M>
RK_INLINE void merge(KlState<M>& a, KlState<M> b) {
  const auto max = M::max(a.max, b.max), other_max = M::max(a.other_max, b.other_max);
  const auto centre = M::select(b.max > a.max, b.centre, a.centre);
  restate<M>(a, max, other_max, centre);
  restate<M>(b, max, other_max, centre);
  a.sum = a.sum + b.sum;
  a.other_sum = a.other_sum + b.other_sum;
  a.second = a.second + b.second;
  a.first = a.first + b.first;
}

struct KlResult {
  float kl;
  float shift;  // log p_v - log q_v = ((z_v - y_v) - centre) + shift
};

// The second-order form where it is consistent with the plain difference within the latter's own rounding error, the
// plain difference otherwise (far from the reference q may sit where p underflows, and S no longer sees it).
// The KL, in double: a row has few of these operations, and their terms may be large where the KL is not.
RK_INLINE KlResult kl_of(const KlState<ScalarMath>& s) {
  const double max_difference = static_cast<double>(s.max) - s.other_max;
  const double plain_shift = s.centre - max_difference - ::log(static_cast<double>(s.sum) / s.other_sum);
  const double second = static_cast<double>(s.second) / s.sum, first = static_cast<double>(s.first) / s.sum;
  const double b = second - first;
  const double noise = 1e-6 * (4 + ::fabs(s.max) + ::fabs(s.other_max) + ::fabs(s.centre));
  if (b > -0.5 && second < 1 && ::fabs(::log1p(b) - plain_shift) <= noise) {
    const double kl = second - (b - ::log1p(b));
    return {kl > 0 ? static_cast<float>(kl) : 0.0f, static_cast<float>(::log1p(b))};
  }
  const double kl = first + plain_shift;
  return {kl < 0 ? 0.0f : static_cast<float>(kl), static_cast<float>(plain_shift)};
}

template <class M>
struct KlRow {
  using F = typename M::F;
  F max, log_sum, other_max, other_log_sum;  // of the weighing p and of q
  F centre, shift, kl, grad;
};

// d KL(p || q) / d z for the logits z of the weighing distribution p: p_v (d_v - KL), d_v = log p_v - log q_v.
template <class M>
RK_INLINE typename M::F kl_gradient_of_weighing(typename M::F z, typename M::F y, const KlRow<M>& row) {
  const auto p = M::exp((z - row.max) - row.log_sum);
  const auto d = ((z - y) - row.centre) + row.shift;
  return M::select(p != M::set(0), row.grad * p * (d - row.kl), M::set(0));
}

// d KL(p || q) / d y for the logits y of the other one: q_v - p_v, as p_v expm1(-d) or -q_v expm1(d), whichever
// exponent is not positive.
template <class M>
RK_INLINE typename M::F kl_gradient_of_other(typename M::F z, typename M::F y, const KlRow<M>& row) {
  const auto p = M::exp((z - row.max) - row.log_sum);
  const auto q = M::exp((y - row.other_max) - row.other_log_sum);
  const auto d = ((z - y) - row.centre) + row.shift;
  const auto far = !((d > M::set(-1.0f)) & (d < M::set(1.0f)));  // also where d is NaN: neither allows the token
  const auto exponent = M::select(far, M::set(0), M::select(d > M::set(0), M::set(0) - d, d));
  const auto expm1 = expm1_minus_identity_series(exponent) + exponent;
  const auto near_value = M::select(d > M::set(0), p, M::set(0) - q) * expm1;
  return row.grad * M::select(far, q - p, near_value);
}

}  // namespace rk
