// SPDX-License-Identifier: MIT
// A hash of the content of memory, by which mmattn_kernels.cpu.conv knows a weight that it has packed.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mmattn {

constexpr int64_t kHashBlock = 4096, kHashShift = 64;  // bytes hashed with one key; between the keys of the two hashes

struct HashKey {
  alignas(64) uint64_t block[(kHashBlock + kHashShift) / 8];
  uint64_t chain[2];  // below 2^61 - 1
};

struct ContentHash {
  uint64_t words[2];
};

#define MMATTN_DECLARE(isa)                                                                   \
  namespace isa {                                                                             \
  ContentHash content_hash(const void* data, int64_t bytes, const HashKey& key, int threads); \
  }
MMATTN_EACH_ISA(MMATTN_DECLARE)
#undef MMATTN_DECLARE

}  // namespace mmattn
