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

// The memory of what a thread's calls need on the way: the last piece taken is the first one given back, so that each
// call finds its pieces where the one before had them, in the caches. Fresh from the system, every page would cost a
// fault, together as much as the work done in them. Of a thread of its own: nothing is locked, so a process that forks
// leaves the child nothing to wait for.
class Stack {
 public:
  static constexpr int64_t kLine = 64, kMostKept = 128 << 20;

  static Stack& own() {
    static thread_local Stack stack;
    return stack;
  }
  Stack() = default;
  ~Stack() { release(data_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // Null where there is no room: then `wanted_` says how much there will be once all is given back.
  char* take(int64_t bytes) {
    const int64_t taken = taken_ + bytes;
    if (taken <= kMostKept) wanted_ = std::max(wanted_, taken);
    if (!taken_ && size_ < wanted_) {
      release(std::exchange(data_, nullptr));
      size_ = 0;
      data_ = allocate(wanted_);
      size_ = wanted_;
    }
    taken_ = taken;
#if !defined(__SANITIZE_ADDRESS__)  // which knows the bounds of each piece by itself
    if (used_ + bytes <= size_) return data_ + std::exchange(used_, used_ + bytes);
#endif
    return nullptr;
  }
  void give_back(int64_t bytes, bool is_inside) {
    taken_ -= bytes;
    if (is_inside) used_ -= bytes;
  }

  static char* allocate(int64_t bytes) { return static_cast<char*>(::operator new(bytes, std::align_val_t{kLine})); }
  static void release(char* data) { ::operator delete(data, std::align_val_t{kLine}); }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0, taken_ = 0, wanted_ = 0;
};

// Uninitialised floats that begin on a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : bytes_(round_up(n * static_cast<int64_t>(sizeof(float)), Stack::kLine)),
        piece_(Stack::own().take(bytes_)),
        data_(piece_ ? piece_ : outside(bytes_)) {}
  ~Buffer() {
    if (!piece_) Stack::release(data_);
    Stack::own().give_back(bytes_, piece_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const { return reinterpret_cast<float*>(data_); }

 private:
  static char* outside(int64_t bytes) {
    try {
      return Stack::allocate(bytes);
    } catch (...) {
      Stack::own().give_back(bytes, false);
      throw;
    }
  }

  const int64_t bytes_;
  char *const piece_, *const data_;  // of the stack, or null; and where the floats are
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
