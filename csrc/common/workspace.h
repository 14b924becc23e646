// The one knob that bounds scratch memory.
#pragma once

#include <atomic>
#include <cstdint>

namespace rk {

enum class Memory { cpu, cuda };

// rlhf_kernels/_workspace.py sets them, and knows what is usual on this machine.
inline std::atomic<int64_t>& workspace_budget_mib(Memory kind) {
  static std::atomic<int64_t> cpu{64}, cuda{256};
  return kind == Memory::cpu ? cpu : cuda;
}

inline int64_t workspace_budget_bytes(Memory kind) { return workspace_budget_mib(kind) << 20; }

}  // namespace rk
