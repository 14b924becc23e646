// The one knob that bounds scratch memory.
#pragma once

#include <atomic>
#include <cstdint>

namespace rk {

enum class Scratch { cpu, cuda };

// rlhf_kernels/_workspace.py sets them, and knows what is usual on this machine.
inline std::atomic<int64_t>& workspace_budget_mib(Scratch kind) {
  static std::atomic<int64_t> cpu{64}, cuda{256};
  return kind == Scratch::cpu ? cpu : cuda;
}

inline int64_t workspace_budget_bytes(Scratch kind) { return workspace_budget_mib(kind) << 20; }

}  // namespace rk
