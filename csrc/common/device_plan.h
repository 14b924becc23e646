// Sizes of logit tiles and scratch on a GPU: plain arithmetic, reachable from Python. docs/gpu-notes.md has a table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/tile_plan.h"

namespace rk {

struct DeviceSizes {
  int64_t multiprocessors, l2_bytes;
};

struct DeviceHeads {
  int64_t width;         // of the head that is differentiated
  int64_t widths;        // of all heads whose logits are computed, together
  int64_t count;         // of those: one, or two for the KL
  int64_t element_size;  // of the GEMM's operands
  bool bias;
  bool cast_weight;  // a head is not as the GEMM reads it: its slices are copied
  bool copy_hidden;  // hidden states are gathered or cast
};

struct DevicePlan {
  int64_t nominal_columns, nominal_rows;  // for which the algorithm of the logits' GEMM is chosen: a row's bits follow
                                          // from them, and they from the heads, the device and the budget, not from N
  int64_t tile;                           // vocabulary rows of a logit tile; forward's is nominal, as rows' sums follow
  int64_t row_chunk;                      // rows of a logit tile, at most
  int64_t vocab_group;                    // backward: vocabulary rows whose dlogits are held at a time
  int64_t rows_at_once;  // rows whose operands and dlogits are held; below all rows, dW needs an fp32 accumulator
  int64_t bytes;         // of scratch
  double waves;          // of a full logit tile
  double utilisation;    // of the multiprocessors over all logit tiles
};

// Chooses by what a pass over all rows and the vocabulary costs. The unit of cost is what a wave, a CTA's tile of a
// product on each multiprocessor, takes for one step of the inner dimension: a few nanoseconds.
class DevicePlanner {
 public:
  DevicePlanner(const DeviceHeads& heads, int64_t vocab, const DeviceSizes& device, int64_t budget)
      : heads_(heads),
        device_(device),
        vocab_(vocab),
        blocks_(ceil_div(vocab, kColumns)),
        most_ctas_(std::max<int64_t>(1, budget / 4 / kTileBytes)) {
    const int64_t column_bytes = heads.widths * heads.element_size;
    most_blocks_ = std::min({blocks_, most_ctas_, kMostBlocks});
    if (heads.cast_weight) most_blocks_ = std::clamp<int64_t>(budget / 4 / (kColumns * column_bytes), 1, most_blocks_);
    int64_t least = kNever;
    for (int64_t columns = 1; columns <= most_blocks_; ++columns) {
      if (!even(columns)) continue;
      int64_t cost = 0;
      Rows rows{};
      for (const int64_t batch : {8, 16, 32, 64}) {  // 1024 to 8192 rows: a tile must serve them all
        rows = rows_for(batch, columns);
        cost += rows.cost;
      }
      if (cost > least) continue;
      least = cost;
      plan_.nominal_columns = columns * kColumns;
      plan_.nominal_rows = rows.blocks * kRows;
    }
    int64_t& most = plan_.nominal_columns;
    while (heads.cast_weight && most > kLeastColumns && most * column_bytes > budget / 2) most /= 2;
    most = std::min(most, round_up(vocab, kLeastColumns));
  }

  // `kept`: logits are written to where they stay, and are there in backward. `budget`: what is left beside them.
  DevicePlan plan(int64_t rows, bool backward, bool kept, int64_t budget) {
    rows_ = std::max<int64_t>(rows, 1);
    backward_ = backward;
    kept_ = kept;
    for (int64_t chunks = 1, held = rows_ + kRows; held > kRows; chunks *= 2) {  // the fewest chunks of rows that fit
      held = std::min(rows_, round_up(ceil_div(rows_, chunks), kRows));
      if (backward ? choose_backward(held, budget) : choose_forward(held, budget)) break;
    }
    if (backward && least_ == kNever) {
      take(std::min(kRows, rows_), {1, 0}, std::min(kColumns, plan_.nominal_columns), 1);
    }
    plan_.bytes = bytes();
    const int64_t here = ceil_div(plan_.row_chunk, kRows), columns = ceil_div(plan_.tile, kColumns);
    plan_.waves = static_cast<double>(here * columns) / device_.multiprocessors;
    int64_t ctas = 0, waves = 0;
    each_tile(ceil_div(rows_, kRows), here, columns, [&](int64_t times, int64_t row_blocks, int64_t column_blocks) {
      ctas += times * row_blocks * column_blocks;
      waves += times * ceil_div(row_blocks * column_blocks, device_.multiprocessors);
    });
    plan_.utilisation = static_cast<double>(ctas) / (waves * device_.multiprocessors);
    return plan_;
  }

 private:
  static constexpr int64_t kRows = 128, kColumns = 256;           // of a CTA's tile, as the fastest GEMMs have it
  static constexpr int64_t kTileBytes = kRows * kColumns * 4;     // of fp32 logits
  static constexpr int64_t kMostBlocks = 64, kMostWaves = 4;      // larger tiles and groups gain next to nothing
  static constexpr int64_t kLeastColumns = 64, kStateBytes = 32;  // of a row's running statistics
  static constexpr int64_t kLaunch = 512;     // a product's start, fill and drain: some microseconds
  static constexpr int64_t kPerByte = 100;    // a byte for each element of a wave, from memory; half of it from L2
  static constexpr int64_t kRowBytes = 1024;  // a row kernel starts and merges a row while it would read so many
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

  struct Rows {
    int64_t blocks, cost;
  };

  // Whether slices of so many blocks cut the vocabulary evenly: no fewer do, and the last is no sliver.
  bool even(int64_t columns) const {
    const int64_t slices = ceil_div(blocks_, columns);
    return ceil_div(blocks_, slices) == columns && 2 * (blocks_ - (slices - 1) * columns) >= columns;
  }

  // f(times, row blocks, column blocks) for full tiles, and for what is left at the end of rows and vocabulary.
  template <class F>
  void each_tile(int64_t rows, int64_t row_blocks, int64_t column_blocks, const F& f) const {
    const int64_t row_rest = rows % row_blocks, column_rest = blocks_ % column_blocks;
    const int64_t row_times = rows / row_blocks, column_times = blocks_ / column_blocks;
    f(row_times * column_times, row_blocks, column_blocks);
    if (column_rest) f(row_times, row_blocks, column_rest);
    if (row_rest) f(column_times, row_rest, column_blocks);
    if (row_rest && column_rest) f(1, row_rest, column_rest);
  }

  int64_t traffic(int64_t bytes) const { return bytes * kPerByte / (device_.multiprocessors * kRows * kColumns); }

  // One tile of each head, and the row kernel that reads it: from memory as far as L2 cannot hold tile and operands.
  int64_t tile_cost(int64_t row_blocks, int64_t column_blocks) const {
    const int64_t ctas = row_blocks * column_blocks, rows = row_blocks * kRows;
    const int64_t logits = ctas * kTileBytes * heads_.count;
    const int64_t operands = (rows + column_blocks * kColumns) * heads_.widths * heads_.element_size;
    const int64_t away = std::max<int64_t>(0, logits - logits * device_.l2_bytes / (logits + operands));
    return ceil_div(ctas, device_.multiprocessors) * heads_.widths + heads_.count * kLaunch +
           traffic((logits + away) / 2 + heads_.count * rows * kRowBytes);
  }

  // The rows of a tile of so many columns that make a pass over `rows` cheapest: the most in one to four waves, or
  // equal parts that are no larger.
  Rows rows_for(int64_t rows, int64_t columns) const {
    Rows best{1, kNever};
    for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
      const int64_t most = std::min(waves * device_.multiprocessors, most_ctas_) / columns;
      const int64_t whole = std::clamp<int64_t>(most, 1, rows);
      for (const int64_t blocks : {whole, ceil_div(rows, ceil_div(rows, whole))}) {
        int64_t cost = 0;
        each_tile(rows, blocks, columns, [&](int64_t times, int64_t row_blocks, int64_t column_blocks) {
          cost += times * tile_cost(row_blocks, column_blocks);
        });
        if (cost < best.cost) best = {blocks, cost};
      }
    }
    return best;
  }

  int64_t bytes() const {
    const int64_t es = heads_.element_size, buffers = (kept_ ? 0 : heads_.count) + (backward_ && heads_.bias ? 1 : 0);
    const int64_t tiles = buffers * std::min(plan_.row_chunk, rows_) * plan_.tile * 4;
    const int64_t hidden = heads_.copy_hidden ? plan_.rows_at_once * heads_.widths * es : 0;
    const int64_t rows = plan_.rows_at_once * (backward_ ? plan_.vocab_group * es : kStateBytes);
    const int64_t cast = heads_.cast_weight ? plan_.vocab_group * heads_.widths * es : 0;
    const bool sums = backward_ && (heads_.cast_weight || plan_.rows_at_once < rows_);
    return tiles + hidden + rows + cast + (sums ? plan_.vocab_group * heads_.width * 4 : 0);
  }

  void take(int64_t held, Rows rows, int64_t tile, int64_t tiles) {
    plan_.rows_at_once = held;
    plan_.row_chunk = rows.blocks * kRows;
    plan_.tile = std::min(tile, round_up(vocab_, kLeastColumns));
    plan_.vocab_group = tiles * plan_.tile;
  }

  bool choose_forward(int64_t held, int64_t budget) {
    take(held, rows_for(ceil_div(held, kRows), ceil_div(plan_.nominal_columns, kColumns)), plan_.nominal_columns, 1);
    return bytes() <= budget;
  }

  // The tile and the dlogits that are held go together: what the products behind take, and how often the sums of dH are
  // read and written, follows from them. False as long as more chunks of rows may cost less.
  bool choose_backward(int64_t held, int64_t budget) {
    const int64_t chunks = ceil_div(rows_, held), width = heads_.width;
    DevicePlan best = plan_;
    const int64_t before = least_;
    for (int64_t columns = 1; columns <= most_blocks_; ++columns) {
      if (!even(columns)) continue;
      const int64_t slices = ceil_div(blocks_, columns);
      const Rows rows = rows_for(ceil_div(held, kRows), columns);
      for (int64_t tiles = 1; tiles * columns <= kMostBlocks; ++tiles) {
        const int64_t groups = ceil_div(slices, tiles);
        if (ceil_div(slices, groups) != tiles) continue;
        take(held, rows, columns * kColumns, tiles);
        if (bytes() > budget) break;
        const int64_t group = plan_.vocab_group, last = vocab_ - (groups - 1) * group;
        const auto products = [&](int64_t size) { return product(size, width, held) + product(held, width, size); };
        const int64_t sums = 8 * width * (groups * rows_ + (chunks > 1 || heads_.cast_weight ? chunks * vocab_ : 0));
        const int64_t cost = chunks * (rows.cost + (groups - 1) * products(group) + products(last)) + traffic(sums);
        if (cost >= least_) continue;
        least_ = cost;
        best = plan_;
      }
    }
    plan_ = best;
    return least_ < kNever && least_ >= before;
  }

  int64_t product(int64_t m, int64_t n, int64_t k) const {
    const int64_t ctas = ceil_div(m, kRows) * ceil_div(n, kColumns);
    return ceil_div(ctas, device_.multiprocessors) * k + kLaunch;
  }

  DeviceHeads heads_;
  DeviceSizes device_;
  int64_t vocab_, blocks_, most_ctas_, most_blocks_ = 1, rows_ = 1;
  bool backward_ = false, kept_ = false;
  int64_t least_ = kNever;
  DevicePlan plan_{};
};

// `budget`: for all scratch; `kept_bytes`: of it, what logits take that are kept between forward and backward.
inline DevicePlan plan_device(const DeviceHeads& heads, int64_t rows, int64_t vocab, bool backward,
                              const DeviceSizes& device, int64_t budget, int64_t kept_bytes) {
  return DevicePlanner(heads, vocab, device, budget)
      .plan(rows, backward, kept_bytes > 0, std::max(budget - kept_bytes, budget / 8));
}

}  // namespace rk
