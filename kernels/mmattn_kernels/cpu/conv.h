// SPDX-License-Identifier: MIT
// What a dilated convolution call needs to know, as mmattn_kernels.cpu.conv passes it.
#pragma once

#include "isa.h"
#include "norm.h"

namespace mmattn {

// The weight of (out channel, in channel, tap) lies at their sum of multiples of the strides, which may be negative.
struct ConvWeights {
  const void* weight;
  bool weight_is_bf16;
  int64_t out_stride, in_stride, tap_stride;
  int64_t out_channels, in_channels, taps;
  bool is_bf16;  // of the computation
  int threads;
};

struct Conv {
  Tokens x, out, residual;  // residual may be null; of a single tap `out` may be x; `out` is the gradient of the output
                            // in conv_weight_gradient
  const void* packed;       // null: the weights are packed on the way, for this call alone
  ConvWeights weights;      // where they are not packed
  Parameter bias;           // null or [out_channels]
  Norm norm;                // of the prologue
  int64_t batch, length, in_channels, out_channels, taps, dilation;
  int64_t height, width;  // of the frames that the sequence consists of, for 3 x 3 taps; 0 for taps along the sequence
  bool is_bf16;
  int threads;
  void* d_weight = nullptr;  // [out_channels, in_channels, taps]
  bool d_weight_is_bf16 = false;
};

// What a planner is asked of: the convolution, the gradient of its weight, the sums of the output gradient.
enum class ConvLoop { forward, weight_gradient, column_sums };

#define MMATTN_DECLARE(isa)                                                                                \
  namespace isa {                                                                                          \
  int64_t conv_packed_bytes(int64_t out_channels, int64_t in_channels, int64_t taps, bool is_bf16);        \
  void conv_pack(const ConvWeights& w, void* packed); /* conv_packed_bytes, on a cache line */             \
  void conv_forward(const Conv& p);                                                                        \
  void conv_weight_gradient(const Conv& p);                                                                \
  void column_sums(const Tokens& t, int64_t batch, int64_t length, int64_t channels, bool is_bf16, float*, \
                   int threads);                                                                           \
  void conv_work(const Conv& p, ConvLoop what, const Work& work);                                          \
  }
MMATTN_EACH_ISA(MMATTN_DECLARE)
#undef MMATTN_DECLARE

}  // namespace mmattn
