// Sizes of tiles and how scratch memory is divided: plain arithmetic, no torch, reachable from Python for its tests.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/tile_plan_constants.h"

namespace rk {

constexpr int64_t kTilesPerSplit = 8;

// Floats of a row of logits that are kept for backward on CUDA: rows start a multiple of 256 bytes apart.
constexpr int64_t cached_vocab(int64_t vocab) { return (vocab + 63) / 64 * 64; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// The rows that GEMMs go over, of so many.
constexpr int64_t live_rows(int64_t rows) { return round_up(rows, kRowStep); }

// Vocabulary rows of a tile: its slice of the head stays in half a megabyte, so that it survives in a core's L2 while
// all rows pass over it. Of wide heads that is a GEMM of few rows, which in fp32 costs more (a fifth at 32 rows, on an
// AVX2 machine) than reading the slice from further away. A function of the head alone, so that a row's bits do not
// depend on its batch.
inline int64_t vocab_tile(int64_t hidden_size, int64_t element_size) {
  const int64_t rows = (512 * 1024) / (hidden_size * element_size);
  return std::clamp<int64_t>(rows / 32 * 32, element_size == sizeof(float) ? 128 : 32, 256);
}

struct ForwardPlan {
  int64_t tile;
  int64_t split,
      splits;          // a split is the part of the vocabulary whose statistics one task folds; splits merge in order
  int64_t row_chunk;   // rows whose packed hidden states and partial statistics are held at a time
  int64_t row_groups;  // tasks a split is divided into: more tasks than threads, results the same
};

// `stats`: floats a row leaves per split. `hidden_sizes_sum`: of all hidden states packed (policy's, and reference's
// for the KL); `widest_hidden`: the largest of them.
inline ForwardPlan plan_forward(int64_t rows, int64_t vocab, int64_t hidden_sizes_sum, int64_t widest_hidden,
                                int64_t element_size, int64_t stats, int64_t budget, int64_t threads) {
  ForwardPlan plan{};
  plan.tile = vocab_tile(widest_hidden, element_size);
  plan.split = kTilesPerSplit * plan.tile;
  plan.splits = ceil_div(vocab, plan.split);
  const int64_t per_row = hidden_sizes_sum * element_size + plan.splits * stats * 4;
  const int64_t affordable = budget * 3 / 4 / per_row / kRowBlock * kRowBlock;
  plan.row_chunk = std::clamp(affordable, kRowBlock, round_up(std::max<int64_t>(rows, 1), kRowBlock));
  const int64_t blocks = plan.row_chunk / kRowBlock;
  plan.row_groups = std::clamp<int64_t>(ceil_div(8 * threads, plan.splits), 1, blocks);
  return plan;
}

struct BackwardPlan {
  int64_t tile;
  int64_t vocab_group;  // vocabulary rows whose dlogits are held at a time, a multiple of `tile`
  int64_t row_chunk;    // rows of them held at a time; below all rows, dW needs an fp32 accumulator of its own
  int64_t bytes;        // of scratch, without the fp32 dH and without threads' own tiles
};

inline int64_t backward_bytes(const BackwardPlan& plan, int64_t rows, int64_t hidden_size, int64_t recomputed_sizes_sum,
                              int64_t element_size) {
  const int64_t padded = round_up(hidden_size, kRowBlock);
  const int64_t packed_rows = plan.row_chunk * (recomputed_sizes_sum + padded) * element_size;
  const int64_t dlogits = 2 * plan.vocab_group * plan.row_chunk * element_size;
  const int64_t packed_head = plan.vocab_group * padded * element_size;
  const int64_t weight_sums = plan.row_chunk < rows ? plan.vocab_group * padded * 4 : 0;
  return packed_rows + dlogits + packed_head + weight_sums;
}

// `recomputed_sizes_sum`: hidden sizes of what is recomputed (policy, and reference for the KL).
inline BackwardPlan plan_backward(int64_t rows, int64_t vocab, int64_t hidden_size, int64_t recomputed_sizes_sum,
                                  int64_t widest_hidden, int64_t element_size, int64_t budget) {
  BackwardPlan plan{};
  plan.tile = vocab_tile(widest_hidden, element_size);
  plan.vocab_group = std::min(round_up(1024, plan.tile), round_up(vocab, plan.tile));
  plan.row_chunk = round_up(std::max<int64_t>(rows, 1), kRowBlock);
  const auto bytes = [&] { return backward_bytes(plan, rows, hidden_size, recomputed_sizes_sum, element_size); };
  // Shrink what is larger until it fits three quarters; the rest is the threads' tiles.
  while (bytes() > budget * 3 / 4 && (plan.row_chunk > kRowBlock || plan.vocab_group > plan.tile)) {
    const bool shrink_rows = plan.vocab_group == plan.tile || plan.row_chunk > plan.vocab_group;
    if (shrink_rows && plan.row_chunk > kRowBlock) {
      plan.row_chunk = round_up(plan.row_chunk / 2, kRowBlock);
    } else {
      plan.vocab_group = round_up(plan.vocab_group / 2, plan.tile);
    }
  }
  plan.bytes = bytes();
  return plan;
}

constexpr int64_t kFrozenBlocks = 2;  // of rows, that one task of a split goes over

// Forward with a frozen head: log-probs and their gradients of the hidden states in one pass over the vocabulary.
struct FrozenPlan {
  int64_t tile, split, splits;  // as in ForwardPlan, so that log-probs have the bits of a plain forward
  int64_t group;                // splits whose weights are held at a time, to multiply the head by
  int64_t row_chunk;            // rows held at a time
  int64_t packed;               // vocabulary rows of the head that are packed at a time, a multiple of `tile`
  int64_t bytes;                // of scratch, without threads' own
};

inline FrozenPlan plan_frozen(int64_t rows, int64_t vocab, int64_t hidden_size, int64_t element_size, int64_t stats,
                              int64_t budget) {
  constexpr int64_t kEnoughTasks = 8;  // of a group; more of them would push weights and packed rows out of the cache
  FrozenPlan plan{};
  plan.tile = vocab_tile(hidden_size, element_size);
  plan.split = kTilesPerSplit * plan.tile;
  plan.splits = ceil_div(vocab, plan.split);
  plan.row_chunk = round_up(std::max<int64_t>(rows, 1), kRowBlock);
  plan.group = std::clamp<int64_t>(kEnoughTasks * kFrozenBlocks * kRowBlock / plan.row_chunk, 1, plan.splits);
  plan.packed = plan.group * plan.split;
  const int64_t padded = round_up(hidden_size, kRowBlock);
  const auto bytes = [&] {
    const int64_t row = hidden_size * element_size + padded * 4 + plan.splits * stats * 4 +
                        plan.group * (plan.split * element_size + kTilesPerSplit * 8);
    return plan.row_chunk * row + plan.packed * padded * element_size;
  };
  // What costs least shrinks first; fewer rows at a time mean that the head is read once more.
  while (bytes() > budget * 3 / 4) {
    if (plan.group > 1) {
      plan.group = ceil_div(plan.group, 2);
      plan.packed = std::min(plan.packed, plan.group * plan.split);
    } else if (plan.packed > plan.tile && plan.packed * padded * element_size > budget / 4) {
      plan.packed = round_up(plan.packed / 2, plan.tile);
    } else if (plan.row_chunk > kRowBlock) {
      plan.row_chunk = round_up(plan.row_chunk / 2, kRowBlock);
    } else if (plan.packed > plan.tile) {
      plan.packed = round_up(plan.packed / 2, plan.tile);
    } else {
      break;
    }
  }
  plan.bytes = bytes();
  return plan;
}

}  // namespace rk
