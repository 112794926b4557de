// SPDX-License-Identifier: MIT
// What a group normalisation call needs to know, as mmattn_kernels.cpu.norm passes it.
#pragma once

#include <array>
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

struct Rows {  // of channels, contiguous, by four dimensions, strides in elements
  void* data;
  std::array<int64_t, 4> strides;
};

// to = scale * (terms[0] + terms[1] + ...), in float32 and rounded once; zeros without terms. A term may be `to`.
struct Sum {
  static constexpr int kMost = 4;

  Rows to;
  std::array<Rows, kMost> terms;  // null behind the last one
  std::array<int64_t, 4> sizes;
  int64_t channels;
  float scale;
  bool is_bf16;
  int threads;
};

#define MMATTN_DECLARE(isa)                                                  \
  namespace isa {                                                            \
  void group_norm_forward(const GroupNorm& p);                               \
  void group_norm_backward(const GroupNorm& p);                              \
  void group_norm_work(const GroupNorm& p, bool backward, const Work& work); \
  void parameter_gradients(const ParameterGradients& p);                     \
  void sum(const Sum& p);                                                    \
  }
MMATTN_EACH_ISA(MMATTN_DECLARE)
#undef MMATTN_DECLARE

}  // namespace mmattn
