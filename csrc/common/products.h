// The multiply-adds of all matrix products so far, on any device: how many products an op takes is tested by them.
#pragma once

#include <atomic>
#include <cstdint>

namespace rk {

inline std::atomic<int64_t>& multiply_adds() {
  static std::atomic<int64_t> count{0};
  return count;
}

inline void count_product(int64_t m, int64_t n, int64_t k) {
  multiply_adds().fetch_add(m * n * k, std::memory_order_relaxed);
}

}  // namespace rk
