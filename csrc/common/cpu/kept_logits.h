// Logits that forward keeps for backward on CPU.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "common/tile_plan.h"

namespace rk {

// The places where the logits of a block and of the vocabulary's first tiles, as many as fit, are kept.
struct KeptLogits {
  int64_t vocab = 0, size = 0;  // rows of the vocabulary that are kept, and their logits of all blocks
  float* data = nullptr;

  // Shares out memory for `count` logits evenly, so that it holds what it can of the `rows` that count.
  static KeptLogits plan(int64_t count, int64_t rows, int64_t vocab, int64_t tile) {
    const int64_t padded = round_up(rows, kRowBlock);
    if (padded == 0) return {};
    const int64_t fits = count / padded, kept = fits >= vocab ? vocab : fits / tile * tile;
    return {kept, padded * kept};
  }

  bool has(int64_t v, int64_t count) const { return v + count <= vocab; }
  float* tile(int64_t block, int64_t v) const { return data + (block * vocab + v) * kRowBlock; }
};

// `count` floats at the start of a cache line, of which the caller writes the first `written`; behind them are zeros.
// Memory that one call no longer needs serves the next: new pages cost about what the GEMM costs that they are to
// spare. One such block waits, within half of the budget.
at::Tensor kept_logits_memory(int64_t count, int64_t written);

// ValueError unless it can be what a forward has kept.
void check_logit_cache(const at::Tensor& logit_cache);

// After a change of the budget: frees the block that waits, if it is too large now.
void trim_kept_logits_memory();

}  // namespace rk
