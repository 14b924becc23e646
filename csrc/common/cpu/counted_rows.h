// Compaction: which rows count, so that no other is read, multiplied or differentiated.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/tile_plan.h"

namespace rk {

struct CountedRows {
  at::Tensor index;              // [n] int64, the rows that count
  std::vector<int64_t> targets;  // [round_up(n, kRowBlock)], -1 where there is none

  static CountedRows of_targets(const at::Tensor& targets, int64_t ignore_index, int64_t vocab) {
    const at::Tensor contiguous = targets.contiguous();
    const int64_t* target = contiguous.const_data_ptr<int64_t>();
    CountedRows rows;
    std::vector<int64_t> index;
    for (int64_t row = 0; row < contiguous.size(0); ++row) {
      if (target[row] == ignore_index) continue;
      TORCH_CHECK_INDEX(target[row] >= 0 && target[row] < vocab, "target ", target[row], " is outside [0, ", vocab,
                        ") and is not ignore_index (", ignore_index, ")");
      index.push_back(row);
      rows.targets.push_back(target[row]);
    }
    rows.set(index);
    return rows;
  }

  static CountedRows of_mask(const at::Tensor& mask) {
    const at::Tensor contiguous = mask.contiguous();
    const bool* counts = contiguous.const_data_ptr<bool>();
    CountedRows rows;
    std::vector<int64_t> index;
    for (int64_t row = 0; row < contiguous.size(0); ++row) {
      if (counts[row]) index.push_back(row);
    }
    rows.set(index);
    return rows;
  }

  int64_t count() const { return index.size(0); }
  // The rows of the block from `row` on that are not padding.
  int64_t live(int64_t row) const { return std::min(kRowBlock, count() - row); }
  int64_t padded() const { return static_cast<int64_t>(targets.size()); }

  // Per-row values [all_rows] of the rows that count, padded to whole blocks with `fill`.
  at::Tensor gather(const std::optional<at::Tensor>& values, int64_t all_rows, float fill) const {
    at::Tensor out = at::full({padded()}, fill, at::kFloat);
    if (count() > 0) out.narrow(0, 0, count()).copy_(float_rows(values, all_rows).index_select(0, index));
    return out;
  }

  // The inverse: values of the rows that count, 0 elsewhere.
  void scatter(const float* values, float* to) const {
    const int64_t* row = index.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < count(); ++i) to[row[i]] = values[i];
  }

  at::Tensor scatter(const std::vector<float>& values, int64_t all_rows) const {
    at::Tensor out = at::zeros({all_rows}, at::kFloat);
    scatter(values.data(), out.data_ptr<float>());
    return out;
  }

 private:
  void set(const std::vector<int64_t>& rows) {
    const auto count = static_cast<int64_t>(rows.size());
    index = at::empty({count}, at::kLong);
    std::copy(rows.begin(), rows.end(), index.data_ptr<int64_t>());
    targets.resize(round_up(count, kRowBlock), -1);
  }
};

}  // namespace rk
