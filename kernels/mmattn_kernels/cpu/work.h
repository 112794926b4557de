// SPDX-License-Identifier: MIT
// What a plan tells of its work without doing it: the pieces of each loop over threads, one loop after the other.
#pragma once

#include <cstdint>

namespace mmattn {

// A piece of the loop `loop`: multiply-adds of matrix products, and numbers that go through anything else (packing,
// prologue and epilogue, statistics, sums). Threads take the next piece as they become free or, where it `is_static`,
// as many neighbours each as any other. A serial part is a loop of one piece.
struct Work {
  void* to;
  void (*add)(void* to, const char* loop, bool is_static, double products, double numbers);

  void dynamic(const char* loop, double products, double numbers) const { add(to, loop, false, products, numbers); }
  void fixed(const char* loop, double products, double numbers) const { add(to, loop, true, products, numbers); }
};

}  // namespace mmattn
