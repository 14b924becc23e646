// The one knob that bounds scratch memory.
#pragma once

#include <atomic>
#include <cstdint>

namespace rk {

inline std::atomic<int64_t>& workspace_budget_mib() {
  static std::atomic<int64_t> mib{64};
  return mib;
}

inline int64_t workspace_budget_bytes() { return workspace_budget_mib() << 20; }

}  // namespace rk
