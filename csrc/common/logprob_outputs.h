// The optional outputs of linear_logprobs that a row kernel accumulates, on both devices; a set of bits.
#pragma once

#include <cstdint>

namespace rk {

// kExtras: what is_top1, mean_logit and log_sum_sq_probs are made from.
enum LogprobOutputs : int32_t { kPlain = 0, kEntropy = 1, kExtras = 2 };

}  // namespace rk
