// SPDX-License-Identifier: MIT
// What a random-shift attention call needs to know, as mmattn_kernels.cpu.attention passes it.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace mmattn {

struct Strided {  // [batch, position, head, channel], strides in elements, channels contiguous
  void* data;
  int64_t batch, position, head;
};

// Queries of one stream against circular windows of the other's keys and values, or of its own.
struct Direction {
  Strided q, k, v, out, d_out, d_q, d_k, d_v;  // the last four in backward only
  double* lse;  // [batch, head, q_len], natural logarithm; of logits in the thousands a float holds three digits
  int64_t q_len, k_len;
};

struct Attention {
  std::vector<Direction> directions;  // video queries and audio queries; or those of a stream that attends to itself
  int64_t batch, heads, dim, frames, window, shift;
  float scale;
  bool is_bf16;
  int threads;
};

#define MMATTN_DECLARE(isa)                    \
  namespace isa {                              \
  void attention_forward(const Attention& p);  \
  void attention_backward(const Attention& p); \
  }
MMATTN_EACH_ISA(MMATTN_DECLARE)
#undef MMATTN_DECLARE

}  // namespace mmattn
