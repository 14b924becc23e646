// Runs a kernel: its blocks one after another, the threads of a block as fibers that wait for each other.
#pragma once

#include <bit>
#include <bitset>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"
#include "launches.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace rk_cuda_on_host {

// Of threads and of blocks: 0 ascending, 1 descending, from 2 on a shuffle that the number seeds. As long as it is
// negative, the environment variable RK_CUDA_ON_HOST_SCHEDULE is asked at each launch; unset, it is 0.
inline int schedule = -1;

using Location = std::source_location;

inline std::string describe(const Location& at) {
  const std::string path = at.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(at.line());
}

enum class State { runs, at_barrier, in_collective, returned };

struct Thread {
  explicit Thread(size_t number) : fiber(number) {}
  Fiber fiber;
  State state = State::returned;
  // What it waits in, if it waits:
  const char* call = "";
  Location at;
  unsigned mask = 0;
  uint64_t value = 0;   // brought along
  unsigned source = 0;  // the lane whose value it wants, or:
  bool votes = false;   // it wants a bit of each lane
  uint64_t result = 0;
};

class Machine {
 public:
  void launch(const std::function<void()>& kernel, dim3 blocks, dim3 threads, const Location& at) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    const uint64_t block_threads = uint64_t{threads.x} * threads.y * threads.z;
    const uint64_t grid_blocks = uint64_t{blocks.x} * blocks.y * blocks.z;
    if (block_threads == 0 || block_threads > kMaxThreads || threads.z > 64 || grid_blocks == 0 ||
        blocks.x > 0x7fffffff || blocks.y > 0xffff || blocks.z > 0xffff) {
      throw std::runtime_error("CUDA on host, launch at " + describe(at) + ": invalid configuration, " +
                               describe(blocks) + " blocks of " + describe(threads) + " threads");
    }
    kernel_ = &kernel, launched_at_ = at, blockDim = threads, gridDim = blocks;
    count_ = static_cast<unsigned>(block_threads);
    while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>(threads_.size()));
    const int chosen = schedule >= 0 ? schedule : schedule_of_environment();
    by_rank_ = order(count_, chosen);
    ranks_.resize(count_);
    for (unsigned rank = 0; rank < count_; ++rank) ranks_[by_rank_[rank]] = rank;
    for (const unsigned block : order(grid_blocks, chosen)) {
      blockIdx = {block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y};
      run_block();
    }
  }

  void barrier(const Location& at) {
    Thread& self = wait(State::at_barrier, "__syncthreads", at);
    ++at_barrier_;
    self.fiber.leave();
  }

  // A lane brings a value and gets `source`'s, or a vote's bits, once all lanes of the mask are here.
  uint64_t collective(const char* call, unsigned mask, uint64_t value, unsigned source, bool votes,
                      const Location& at) {
    Thread& self = wait(State::in_collective, call, at);
    self.mask = mask, self.value = value, self.source = source, self.votes = votes;
    if (!(mask >> lane() & 1)) fail(call, "with a mask that lacks the caller's own lane");
    if (!votes && !(mask >> source & 1)) fail(call, "reads a lane that the mask lacks");
    complete_collective();
    self.fiber.leave();
    return self.result;
  }

  unsigned lane() const { return current_ % warpSize; }

  // Ends the launch, not only this thread.
  void fail(const char* call, const char* why) {
    error_ = "thread " + std::to_string(current_) + ": " + call + " " + why;  // nothing may be left to destroy below
    threads_[current_]->fiber.leave();
  }

 private:
  static constexpr unsigned kMaxThreads = 1024;

  static std::string describe(const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  }
  static std::string describe(const Location& at) { return rk_cuda_on_host::describe(at); }

  static int schedule_of_environment() {
    const char* text = std::getenv("RK_CUDA_ON_HOST_SCHEDULE");
    return text ? std::atoi(text) : 0;
  }

  static std::vector<unsigned> order(uint64_t count, int chosen) {
    std::vector<unsigned> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0u);
    if (chosen == 1) return {numbers.rbegin(), numbers.rend()};
    if (chosen < 2) return numbers;
    std::mt19937 random(static_cast<unsigned>(chosen));
    for (uint64_t i = count - 1; i > 0; --i) std::swap(numbers[i], numbers[random() % (i + 1)]);
    return numbers;
  }

  void set_ready(unsigned thread) {
    threads_[thread]->state = State::runs;
    ready_.set(ranks_[thread]);
  }

  Thread& wait(State state, const char* call, const Location& at) {
    Thread& self = *threads_[current_];
    self.state = state, self.call = call, self.at = at;
    return self;
  }

  static void run_thread();

  void run_block() {
    error_.clear(), ready_.reset(), at_barrier_ = 0, live_ = count_;
    for (unsigned thread = 0; thread < count_; ++thread) {
      threads_[thread]->fiber.start(run_thread);
      set_ready(thread);
    }
    while (live_ > 0) {
      const size_t rank = ready_._Find_first();
      if (rank < ready_.size()) {
        ready_.reset(rank);
        current_ = by_rank_[rank];
        threadIdx = {current_ % blockDim.x, current_ / blockDim.x % blockDim.y, current_ / blockDim.x / blockDim.y};
        threads_[current_]->fiber.run();
      } else if (at_barrier_ == live_) {
        open_barrier();
      } else {
        error_ = "no thread can go on: " + deadlock();
      }
      if (!error_.empty()) {
        for (unsigned thread = 0; thread < count_; ++thread) threads_[thread]->fiber.abandon();
        throw std::runtime_error("CUDA on host, launch at " + describe(launched_at_) + ", block " +
                                 describe(dim3(blockIdx.x, blockIdx.y, blockIdx.z)) + ": " + error_);
      }
    }
  }

  // Threads that have returned need not come.
  void open_barrier() {
    const Thread* first = nullptr;
    for (unsigned thread = 0; thread < count_; ++thread) {
      if (threads_[thread]->state != State::at_barrier) continue;
      if (first && first->at.line() != threads_[thread]->at.line()) {
        error_ = "threads meet at different barriers: " + where(*first) + " and " + where(*threads_[thread]);
        return;
      }
      first = first ? first : threads_[thread].get();
      set_ready(thread);
    }
    at_barrier_ = 0;
  }

  const Thread* thread_of_lane(unsigned warp_begin, unsigned lane) const {
    return warp_begin + lane < count_ ? threads_[warp_begin + lane].get() : nullptr;
  }

  static bool meets(const Thread& a, const Thread* b) {
    return b && b->state == State::in_collective && b->mask == a.mask && std::strcmp(b->call, a.call) == 0;
  }

  // If the current thread was the last that its collective waited for.
  void complete_collective() {
    const unsigned warp_begin = current_ - lane();
    const unsigned mask = threads_[current_]->mask;
    uint64_t ballot = 0;
    for (unsigned lane = 0; lane < warpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const Thread* other = thread_of_lane(warp_begin, lane);
      if (!meets(*threads_[current_], other)) return;
      ballot |= static_cast<uint64_t>(other->value != 0) << lane;
    }
    for (unsigned lane = 0; lane < warpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& thread = *threads_[warp_begin + lane];
      thread.result = thread.votes ? ballot : threads_[warp_begin + thread.source]->value;
      set_ready(warp_begin + lane);
    }
  }

  static std::string where(const Thread& thread) { return std::string(thread.call) + " at " + describe(thread.at); }

  // The first thread that waits for its warp in vain, and for whom; such a one there is, or all were at the barrier.
  std::string deadlock() const {
    for (unsigned thread = 0; thread < count_; ++thread) {
      const Thread& waiting = *threads_[thread];
      if (waiting.state != State::in_collective) continue;
      const unsigned warp_begin = thread - thread % warpSize;
      for (unsigned lane = 0; lane < warpSize; ++lane) {
        const Thread* other = thread_of_lane(warp_begin, lane);
        if (!(waiting.mask >> lane & 1) || meets(waiting, other)) continue;
        const std::string self = "thread " + std::to_string(thread) + " waits in " + where(waiting);
        const std::string awaited = self + " for lane " + std::to_string(lane) + " of its warp, which ";
        if (!other) return awaited + "does not exist";
        if (other->state == State::returned) return awaited + "has returned";
        return awaited + "waits in " + where(*other) + (other->mask != waiting.mask ? " with another mask" : "");
      }
    }
    return "threads that returned are counted wrongly";
  }

  std::mutex mutex_;
  const std::function<void()>* kernel_ = nullptr;
  Location launched_at_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<unsigned> by_rank_, ranks_;
  std::bitset<kMaxThreads> ready_;  // by rank
  unsigned count_ = 0, live_ = 0, at_barrier_ = 0, current_ = 0;
  std::string error_;
};

inline Machine machine;

inline void Machine::run_thread() {
  machine.threads_[machine.current_]->fiber.entered();
  (*machine.kernel_)();
  Thread& self = *machine.threads_[machine.current_];
  self.state = State::returned;
  --machine.live_;
  self.fiber.leave(true);
}

// A count that CUDA would cut to 32 bits without a word is an error here.
template <class Size>
dim3 to_dim3(Size size, const Location& at) {
  if constexpr (std::is_integral_v<Size>) {
    if (!std::in_range<int>(size)) {
      throw std::runtime_error("CUDA on host, launch at " + describe(at) + ": invalid configuration, " +
                               std::to_string(size) + " blocks or threads");
    }
    return dim3(static_cast<unsigned>(size));
  } else {
    return size;
  }
}

template <class Kernel, class Blocks, class Threads>
void launch(const Kernel& kernel, Blocks blocks, Threads threads, const Location& at = Location::current()) {
  machine.launch(kernel, to_dim3(blocks, at), to_dim3(threads, at), at);
}

// As RK_LAUNCH calls it: counted.
template <class GetSite, class Kernel, class Blocks, class Threads>
void launch(GetSite, const Kernel& kernel, Blocks blocks, Threads threads, const Location& at = Location::current()) {
  ++LaunchesOf<GetSite>::launches.count;
  launch(kernel, blocks, threads, at);
}

template <class T>
concept Exchangeable = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// `offset` finds the lane within the segments of `width` lanes into which the warp falls; none: one's own value.
template <Exchangeable T, class Offset>
T shuffle(const char* call, unsigned mask, T value, int width, const Location& at, const Offset& source_in_segment) {
  if (width < 1 || width > warpSize || !std::has_single_bit(static_cast<unsigned>(width))) {
    machine.fail(call, "with a width that is no power of two up to 32");
  }
  const int lane = static_cast<int>(machine.lane()), begin = lane & ~(width - 1);
  const int source = source_in_segment(lane - begin);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = machine.collective(call, mask, bits, static_cast<unsigned>(source < width ? begin + source : lane), false, at);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace rk_cuda_on_host
