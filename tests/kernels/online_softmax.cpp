// csrc/common/online_softmax.h for test_online_softmax.py, through plain C functions: the scalar maths that CUDA
// kernels use is the same code.
#include "common/online_softmax.h"

#include <cstdint>

using namespace rk;

namespace {

// Merges states of single entries, `part` neighbours at a time, and those parts in their order.
template <class State, class Single>
State fold(int64_t count, int64_t part, const Single& single) {
  State all = State::empty();
  for (int64_t begin = 0; begin < count; begin += part) {
    State of_part = State::empty();
    for (int64_t i = begin; i < count && i < begin + part; ++i) merge<ScalarMath>(of_part, single(i));
    merge<ScalarMath>(all, of_part);
  }
  return all;
}

template <Transform kind>
void map_logits(const LogitTransform& t, const float* x, float bias, int64_t count, float* z, float* slope) {
  const LogitMap<ScalarMath, kind> map(t);
  for (int64_t i = 0; i < count; ++i) {
    z[i] = map(x[i], bias);
    slope[i] = map.derivative(z[i]);
  }
}

}  // namespace

extern "C" {

// to: logprob of entry 0, max, log of the sum, entropy, log_sum_sq_probs
void softmax(const float* z, int64_t count, int64_t part, float* to) {
  using State = SoftmaxState<ScalarMath>;
  const auto s = fold<State>(count, part, [&](int64_t i) {
    auto one = State::empty();
    one.max = z[i];
    add_softmax_term<ScalarMath, true, true>(one, z[i] - finite_max<ScalarMath>(z[i]));
    return one;
  });
  const float values[] = {logprob_of(s, z[0]), s.max, std::log(s.sum), entropy_of(s), log_sum_sq_probs_of(s)};
  for (int i = 0; i < 5; ++i) to[i] = values[i];
}

// d loss / d z of every entry, for the target 0; row: max, log_sum, grad_logprob, grad_logsumexp, grad_entropy, entropy
void softmax_gradient(const float* z, int64_t count, const float* row, bool with_entropy, float* to) {
  const RowGradient<ScalarMath> r{row[0], row[1], row[2], row[3], row[4], row[5]};
  to[0] = target_logit_gradient<ScalarMath>(z[0], r, with_entropy);
  for (int64_t i = 1; i < count; ++i) to[i] = logit_gradient<ScalarMath>(z[i], r, with_entropy);
}

// to: kl; max and log-sum of p and of q, centre, shift. KL(p || q) of p = softmax(z), q = softmax(y).
void kl(const float* z, const float* y, int64_t count, int64_t part, float* to) {
  using State = KlState<ScalarMath>;
  const auto s = fold<State>(count, part, [&](int64_t i) {
    auto one = State::empty();
    note_kl_maxima<ScalarMath>(one, z[i], y[i]);
    settle_centre<ScalarMath>(one);
    add_kl_pair<ScalarMath>(one, z[i], y[i], finite_max<ScalarMath>(one.max), finite_max<ScalarMath>(one.other_max));
    return one;
  });
  const KlResult result = kl_of(s);
  const float values[] = {result.kl, s.max,       std::log(s.sum), s.other_max, std::log(s.other_sum),
                          s.centre,  result.shift};
  for (int i = 0; i < 7; ++i) to[i] = values[i];
}

// d KL / d z (weighing) or d KL / d y, from the seven numbers of kl()
void kl_gradient(const float* z, const float* y, int64_t count, const float* row, bool weighing, float* to) {
  const KlRow<ScalarMath> r{row[1], row[2], row[3], row[4], row[5], row[6], row[0], 1.0f};
  for (int64_t i = 0; i < count; ++i) {
    to[i] =
        weighing ? kl_gradient_of_weighing<ScalarMath>(z[i], y[i], r) : kl_gradient_of_other<ScalarMath>(z[i], y[i], r);
  }
}

void expm1_minus_identity(const float* u, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = ScalarMath::expm1_minus_identity(u[i]);
}

void final_logits(const float* x, float bias, bool with_bias, int64_t count, float scale, float softcap,
                  float temperature, float* z, float* slope) {
  const LogitTransform t{scale, softcap, temperature};
  switch (kind_of(t, with_bias)) {
    case Transform::identity: return map_logits<Transform::identity>(t, x, bias, count, z, slope);
    case Transform::affine: return map_logits<Transform::affine>(t, x, bias, count, z, slope);
    case Transform::softcap: return map_logits<Transform::softcap>(t, x, bias, count, z, slope);
  }
}
}
