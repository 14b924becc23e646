// The one knob that bounds scratch memory.
#pragma once

#include <atomic>
#include <cstdint>

namespace rk {

// 0: not set, so that each kind of device has its own default.
inline std::atomic<int64_t>& workspace_budget_mib() {
  static std::atomic<int64_t> mib{0};
  return mib;
}

constexpr int64_t kCpuBudgetMib = 64, kCudaBudgetMib = 256;

inline int64_t workspace_budget_bytes(int64_t default_mib) {
  const int64_t mib = workspace_budget_mib();
  return (mib ? mib : default_mib) << 20;
}

}  // namespace rk
