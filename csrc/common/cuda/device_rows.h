// The rows that count, as the host side of an op on CUDA sees them.
#pragma once

#include <ATen/ATen.h>

#include "common/cuda/compact.h"
#include "common/cuda/device.h"

namespace rk::cuda {

// The rows' places. In eager mode one count is read back, and `count` rows are left. Under graph capture nothing may be
// read back: every row keeps its place, and those that do not count have index -1 and are worked on as rows of zeros.
struct DeviceRows {
  at::Tensor index, targets;  // [all rows] int64, of which the first `count` hold
  int64_t count = 0;
  bool all = false;  // every row counts and is in its place

  const int64_t* index_data() const { return index.const_data_ptr<int64_t>(); }
  const int64_t* target_data() const { return targets.const_data_ptr<int64_t>(); }

  static DeviceRows of_targets(const at::Tensor& targets, int64_t ignore_index, int64_t vocab,
                               const DeviceScope& device) {
    const at::Tensor contiguous = targets.contiguous();
    return of({contiguous.const_data_ptr<int64_t>(), ignore_index, vocab, nullptr, targets.size(0)}, contiguous,
              device);
  }

  static DeviceRows of_mask(const at::Tensor& mask, const DeviceScope& device) {
    const at::Tensor contiguous = mask.contiguous();
    return of({nullptr, 0, 0, contiguous.const_data_ptr<bool>(), mask.size(0)}, contiguous, device);
  }

 private:
  static DeviceRows of(const RowChoice& choice, const at::Tensor& like, const DeviceScope& device) {
    const auto longs = like.options().dtype(at::kLong);
    DeviceRows rows{at::empty({choice.rows}, longs), at::empty({choice.rows}, longs)};
    const at::Tensor counts = at::empty({2}, longs);
    const bool capturing = device.capturing();
    compact_rows(choice, capturing, rows.index.data_ptr<int64_t>(), rows.targets.data_ptr<int64_t>(),
                 counts.data_ptr<int64_t>(), device.stream());
    rows.count = choice.rows;
    if (capturing) return rows;
    const at::Tensor read = counts.cpu();
    const int64_t bad = read.const_data_ptr<int64_t>()[1];
    TORCH_CHECK_INDEX(bad < 0, "target ", bad < 0 ? 0 : like[bad].item<int64_t>(), " is outside [0, ", choice.vocab,
                      ") and is not ignore_index (", choice.ignore_index, ")");
    rows.count = read.const_data_ptr<int64_t>()[0];
    rows.all = rows.count == choice.rows;
    return rows;
  }
};

}  // namespace rk::cuda
