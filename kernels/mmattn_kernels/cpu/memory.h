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

class Buffer {  // uninitialised floats that begin on a cache line
 public:
  explicit Buffer(int64_t n) : data_(static_cast<float*>(::operator new[](n * sizeof(float), kLine))) {}
  ~Buffer() { ::operator delete[](data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
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
