// SPDX-License-Identifier: MIT
// What a group normalisation call needs to know, as mmattn_kernels.cpu.norm passes it.
#pragma once

#include <cstdint>

#include "isa.h"
#include "work.h"

namespace mmattn {

constexpr int64_t kStats = 3;

struct Tokens {  // [batch, position, channel], strides in elements, channels contiguous; null where absent
  void* data;
  int64_t batch, position;
};

struct Parameter {  // [channels], or [batch, channels] with a stride; float or bf16; null where absent
  const void* data;
  int64_t batch;
  bool is_bf16;
};

// y = activation((h * weight + bias) * (1 + scale) + shift), h = (x - mean) / sqrt(variance + eps) of each group.
struct Norm {
  Parameter weight, bias;  // [channels], null without groups
  Parameter scale, shift;  // [batch, channels], each may be null
  float* stats;            // [batch, groups, kStats]: mean, 1 / sqrt(variance + eps), what the mean as a float lacks
  int64_t groups;          // 0: h = x
  float eps;
  bool silu;
};

struct GroupNorm {
  Tokens x, out, d_out, d_x;  // forward: x, out; backward: x, d_out, d_x, which may be d_out
  Norm norm;
  float* sums;  // [batch, channels, 2], backward: sums over the positions of dz and dz * h, z the activation's argument
  int64_t batch, length, channels;
  bool is_bf16;
  int threads;
};

// Where the gradients of a norm's parameters go, each as large as its parameter; null where not wanted.
struct ParameterGradients {
  Norm norm;
  float* sums;  // as of GroupNorm
  void *d_weight, *d_bias, *d_scale, *d_shift;
  int64_t batch, channels;
  int64_t film_batch;  // stride of the batches of d_scale and d_shift, in elements
};

// to += from, or to = from where that is the first term of a sum; zeros where `from` is null.
struct Addition {
  Tokens to, from;
  int64_t batch, length, channels;
  bool is_first, is_bf16;
};

#define MMATTN_DECLARE(isa)                                                  \
  namespace isa {                                                            \
  void group_norm_forward(const GroupNorm& p);                               \
  void group_norm_backward(const GroupNorm& p);                              \
  void group_norm_work(const GroupNorm& p, bool backward, const Work& work); \
  void parameter_gradients(const ParameterGradients& p);                     \
  void add(const Addition& p);                                               \
  }
MMATTN_EACH_ISA(MMATTN_DECLARE)
#undef MMATTN_DECLARE

}  // namespace mmattn
