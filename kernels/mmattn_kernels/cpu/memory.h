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
// calls: fresh from the system, every page would cost a fault again, together as much as the work done in them.
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    const int64_t bytes = round_up(n * static_cast<int64_t>(sizeof(float)), kLine) + kLine;
    block_ = exchange([&](Block* kept) { return kept && kept->bytes >= bytes && kept->bytes <= 4 * bytes; }, nullptr);
    if (block_) return;
    block_ = static_cast<Block*>(::operator new(bytes, std::align_val_t{kLine}));
    block_->bytes = bytes;
  }
  ~Buffer() {
    Block* left = block_;
    if (left->bytes <= kMostKept)
      left = exchange([&](Block* kept) { return !kept || kept->bytes < left->bytes; }, left);
    if (left) ::operator delete(left, std::align_val_t{kLine});
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
  static inline bool busy_;

  // Puts `with` in the first place whose content is `wanted` and returns that; returns `with` where there is none.
  template <class Wanted>
  static Block* exchange(Wanted wanted, Block* with) {
    while (__atomic_test_and_set(&busy_, __ATOMIC_ACQUIRE)) continue;
    for (Block*& place : kept_)
      if (wanted(place)) {
        std::swap(place, with);
        break;
      }
    __atomic_clear(&busy_, __ATOMIC_RELEASE);
    return with;
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
