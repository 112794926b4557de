// SPDX-License-Identifier: MIT
// What a windowed attention call needs to know, as mmattn_kernels.cpu.attention passes it.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "work.h"

namespace mmattn {

struct Strided {  // [batch, position, head, channel], strides in elements, channels contiguous
  void* data;
  int64_t batch, position, head;
};

// Queries of one stream against windows of the other's keys and values, or of its own.
struct Direction {
  Strided q, k, v, out, d_out, d_q, d_k, d_v;  // the last four in backward only
  double* lse;  // [batch, head, q_len], natural logarithm; of logits in the thousands a float holds three digits
  const double* d_lse;  // the loss's gradient by lse, in backward; null where it has none
  int64_t q_len, k_len;
};

// Queries query_bounds[i]..query_bounds[i+1]-1 read keys (key_begin[i] + j) % k_len, j < key_length[i]. The bounds
// ascend from 0 to the number of queries, and no length is over that of keys.
struct Tables {
  const int32_t *query_bounds, *key_begin, *key_length;
  int64_t segments;  // 0: windows are equal
};

struct Attention {
  std::vector<Direction> directions;  // video queries and audio queries; or those of a stream that attends to itself
  Tables tables;
  int64_t batch, heads, dim;
  int64_t frames, window, shift;  // without tables
  float scale;
  bool is_bf16;
  int threads;
};

#define MMATTN_DECLARE(isa)                                                 \
  namespace isa {                                                           \
  void attention_forward(const Attention& p);                               \
  void attention_backward(const Attention& p);                              \
  void attention_work(const Attention& p, bool backward, const Work& work); \
  }
MMATTN_EACH_ISA(MMATTN_DECLARE)
#undef MMATTN_DECLARE

}  // namespace mmattn
