// SPDX-License-Identifier: MIT
// The memory of threads, and which thread this is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mmattn::MMATTN_ISA {
namespace {

inline int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Of the team in a parallel region, which may be smaller than was asked for.
inline int thread_count() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Uninitialised floats that begin on a cache line. The memory of a few that are gone is kept for those of the next
// calls: fresh from the system, every page would cost a fault again, together as much as the work done in them. Places
// are swapped, never locked: a process that forks while its threads are here leaves the child nothing to wait for.
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    const int64_t bytes = round_up(n * static_cast<int64_t>(sizeof(float)), kLine) + kLine;
    block_ = take(bytes);
    if (block_) return;
    block_ = static_cast<Block*>(::operator new(bytes, std::align_val_t{kLine}));
    block_->bytes = bytes;
  }
  ~Buffer() {
    if (block_->bytes <= kMostKept)
      keep(block_);
    else
      release(block_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const { return reinterpret_cast<float*>(reinterpret_cast<char*>(block_) + kLine); }

 private:
  struct Block {
    int64_t bytes;
  };
  static constexpr int64_t kLine = 64, kMostKept = 32 << 20;
  static inline Block* kept_[4];

  static Block* exchange(Block** place, Block* with) { return __atomic_exchange_n(place, with, __ATOMIC_ACQ_REL); }
  static void release(Block* block) {
    if (block) ::operator delete(block, std::align_val_t{kLine});
  }

  // A kept block of this many bytes, up to four times as many; null where there is none.
  static Block* take(int64_t bytes) {
    for (Block*& place : kept_) {
      Block* block = exchange(&place, nullptr);
      if (block && block->bytes >= bytes && block->bytes <= 4 * bytes) return block;
      if (block) release(exchange(&place, block));  // of another thread, which has filled the place meanwhile
    }
    return nullptr;
  }

  // In the first place that is empty or holds a smaller one.
  static void keep(Block* block) {
    for (Block*& place : kept_) {
      const int64_t bytes = block->bytes;  // read first: in its place it is any thread's, to use and to release
      Block* other = exchange(&place, block);
      if (!other || other->bytes < bytes) return release(other);
      block = exchange(&place, other);  // the smaller one, unless another thread was quicker
      if (!block) return;
    }
    release(block);
  }

  Block* block_;
};

// Hands out pieces of a thread's memory; with no memory it only counts.
class Scratch {
 public:
  explicit Scratch(float* memory) : memory_(memory) {}
  float* take(int64_t floats) { return memory_ + std::exchange(used_, used_ + round_up(floats, 16)); }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
