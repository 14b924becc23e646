#include "common/cpu/kept_logits.h"

#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "common/workspace.h"

namespace rk {
namespace {

// Pages of its own: those that were never written are not committed and hold zeros, and all go back when it is freed,
// which malloc may not do with what it found in its heap.
struct Block {
  explicit Block(int64_t size)
      : count(size), start(mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    TORCH_CHECK(start != MAP_FAILED, "out of memory: ", bytes(), " bytes to keep logits for backward; ",
                "a smaller rk.set_workspace_budget recomputes them instead");
  }
  Block(const Block&) = delete;
  ~Block() { munmap(start, bytes()); }

  int64_t bytes() const { return count * static_cast<int64_t>(sizeof(float)); }
  bool fits_budget() const { return bytes() <= workspace_budget_bytes(Memory::cpu) / 2; }
  float* data() const { return static_cast<float*>(start); }

  const int64_t count;
  void* const start;
  int64_t written = 0;
};

class Waiting {
 public:
  // A block of at least `count` floats. One that is too small is freed first: the two would exceed the budget.
  std::unique_ptr<Block> take(int64_t count) {
    std::unique_ptr<Block> block;
    {
      const std::lock_guard lock(mutex_);
      block.swap(block_);
    }
    if (block && block->count < count) block.reset();
    return block ? std::move(block) : std::make_unique<Block>(count);
  }

  void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard lock(mutex_);
    if (block->fits_budget() && (!block_ || block->count > block_->count)) block_.swap(block);
  }

  void trim() {
    const std::lock_guard lock(mutex_);
    if (block_ && !block_->fits_budget()) block_.reset();
  }

 private:
  std::mutex mutex_;
  std::unique_ptr<Block> block_;
};

Waiting& waiting() {
  static auto* const alive = new Waiting;  // also when tensors are freed after statics
  return *alive;
}

}  // namespace

at::Tensor kept_logits_memory(int64_t count, int64_t written) {
  if (count == 0) return at::empty({0}, at::kFloat);
  Block* const block = waiting().take(count).release();
  if (block->written > written) std::fill(block->data() + written, block->data() + block->written, 0.0f);
  block->written = written;
  const auto give_back = [block](void*) { waiting().give_back(std::unique_ptr<Block>(block)); };
  return at::from_blob(block->data(), {count}, give_back, at::kFloat);
}

void check_logit_cache(const at::Tensor& logit_cache) {
  TORCH_CHECK_VALUE(logit_cache.dim() == 1 && logit_cache.is_contiguous() && logit_cache.scalar_type() == at::kFloat,
                    "logit_cache must be flat and float32, got ", logit_cache.sizes(), " of ",
                    logit_cache.scalar_type());
}

void trim_kept_logits_memory() { waiting().trim(); }

}  // namespace rk
