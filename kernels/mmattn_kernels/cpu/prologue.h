// SPDX-License-Identifier: MIT
// Statistics of groups, and normalisation, FiLM and activation as one map per channel:
//   y = activate(z),  z = (x - mean) * factor + offset,  with a mean, a factor and an offset for each (batch, channel).
// The positions are cut into parts of a fixed size, each with sums of its own, merged in their order: the result does not
// depend on the number of threads.
#pragma once

#include <cmath>
#include <vector>

#include "memory.h"
#include "norm.h"
#include "simd.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kSliceRows = 32;              // positions summed in registers
constexpr int64_t kSliceVecs = 8;               // vectors of channels that are summed in registers
constexpr int64_t kPartElements = 1 << 16;      // of x in a part
template <class T>
constexpr int kDegree = sizeof(T) == 2 ? 3 : 5;  // of the exponential's polynomial

template <class T>
T* row(const Tokens& t, int64_t batch, int64_t position) {
  return static_cast<T*>(t.data) + batch * t.batch + position * t.position;
}

struct Parts {
  int64_t rows, count, length;
  Parts(int64_t length_, int64_t channels)
      : rows(std::max(round_up(kPartElements / channels, kSliceRows), kSliceRows)),
        count((length_ + rows - 1) / rows),
        length(length_) {}
  int64_t begin(int64_t part) const { return part * rows; }
  int64_t end(int64_t part) const { return std::min(length, (part + 1) * rows); }
};

// Mean and sum of squared deviations of n numbers, merged with those of more (Chan, Golub, LeVeque).
struct Moments {
  double n = 0, mean = 0, m2 = 0;
  void merge(const Moments& other) {
    if (other.n == 0) return;
    const double total = n + other.n, delta = other.mean - mean;
    mean += delta * other.n / total;
    m2 += other.m2 + delta * delta * n * other.n / total;
    n = total;
  }
};

// Adds to sums[c] and squares[c] those of x - pivot over `rows` positions, for N vectors of channels from c on.
template <class T, int N>
void add_slice(const Tokens& x, int64_t batch, int64_t first, int64_t rows, int64_t c, int64_t channels,
               const float* pivot, float* sums, float* squares) {
  Vec sum[N] = {}, square[N] = {}, at[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) at[v] = load(pivot + v * kLanes);
  const T* p = row<T>(x, batch, first) + c;
  for (int64_t r = 0; r < rows; ++r, p += x.position)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const Vec value = (N == 1 ? load_lanes(p, channels - c) : load(p + v * kLanes)) - at[v];
      sum[v] += value;
      square[v] += value * value;
    }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    store(sums + v * kLanes, load(sums + v * kLanes) + sum[v]);
    store(squares + v * kLanes, load(squares + v * kLanes) + square[v]);
  }
}

// Moments of each group over positions [begin, end). The sums are of x - pivot, the pivot of a channel being its first value
// here: as one of the values it is about as far from the mean as they are, so no digits are lost however far that is
// from zero. `channel` holds three floats a channel, padded to whole vectors.
template <class T>
void part_moments(const Tokens& x, int64_t batch, int64_t begin, int64_t end, int64_t channels, int64_t groups,
                  float* channel, Moments* out) {
  const int64_t padded = round_up(channels, kLanes), whole = channels - channels % (kSliceVecs * kLanes);
  float *pivot = channel, *sums = channel + padded, *squares = channel + 2 * padded;
  load_row(pivot, row<T>(x, batch, begin), channels, padded, 1.0f);
  std::memset(sums, 0, 2 * padded * sizeof(float));
  for (int64_t first = begin; first < end; first += kSliceRows) {
    const int64_t rows = std::min(kSliceRows, end - first);
    int64_t c = 0;
    for (; c < whole; c += kSliceVecs * kLanes)
      add_slice<T, kSliceVecs>(x, batch, first, rows, c, channels, pivot + c, sums + c, squares + c);
    for (; c < channels; c += kLanes)
      add_slice<T, 1>(x, batch, first, rows, c, channels, pivot + c, sums + c, squares + c);
  }
  const int64_t size = channels / groups;
  const double rows = static_cast<double>(end - begin);
  for (int64_t g = 0; g < groups; ++g) {
    out[g] = {};
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      const double sum = sums[c];
      out[g].merge({rows, pivot[c] + sum / rows, std::max(squares[c] - sum * sum / rows, 0.0)});
    }
  }
}

// Rows of one float a channel for each batch, padded so that two vectors can be read at any channel.
class PerChannel {
 public:
  PerChannel(int64_t batch, int64_t channels, int64_t rows)
      : padded_(round_up(channels, 2 * kLanes)), rows_(rows), memory_(std::max<int64_t>(batch * rows * padded_, 1)) {}
  float* at(int64_t batch, int64_t row) const { return memory_.data() + (batch * rows_ + row) * padded_; }
  int64_t padded() const { return padded_; }

 private:
  int64_t padded_, rows_;
  Buffer memory_;
};

struct Coefficients : PerChannel {
  Coefficients(int64_t batch, int64_t channels) : PerChannel(batch, channels, 3) {}
  float* mean(int64_t batch) const { return at(batch, 0); }
  float* factor(int64_t batch) const { return at(batch, 1); }
  float* offset(int64_t batch) const { return at(batch, 2); }
};

// `remainder` is what is missing of a float that holds the mean: for a large mean as much as a rounding of x.
struct GroupStats {
  float mean = 0, rstd = 1, remainder = 0;
};

inline void set_coefficients(const Norm& norm, const Coefficients& to, int64_t batch, int64_t channels,
                             const GroupStats* stats) {
  const int64_t size = norm.groups ? channels / norm.groups : channels;
  float *mean = to.mean(batch), *factor = to.factor(batch), *offset = to.offset(batch);
  for (int64_t c = 0; c < to.padded(); ++c) {
    if (c >= channels) {
      mean[c] = factor[c] = offset[c] = 0;
      continue;
    }
    const GroupStats s = stats ? stats[c / size] : GroupStats{};
    const float gain = norm.scale ? 1.0f + norm.scale[batch * channels + c] : 1.0f;
    const float weight = norm.weight ? norm.weight[c] : 1.0f, bias = norm.bias ? norm.bias[c] : 0.0f;
    mean[c] = s.mean;
    factor[c] = s.rstd * weight * gain;
    offset[c] = bias * gain + (norm.shift ? norm.shift[batch * channels + c] : 0.0f) - s.remainder * factor[c];
  }
}

// Reads x once, writes norm.stats and the coefficients. Without groups there is nothing to read.
template <class T>
void prepare(const Norm& norm, const Tokens& x, int64_t batches, int64_t length, int64_t channels, int threads,
             const Coefficients& to) {
  if (norm.groups == 0) {
    for (int64_t b = 0; b < batches; ++b) set_coefficients(norm, to, b, channels, nullptr);
    return;
  }
  struct Slot {  // types of this file, so that no other instruction set's build of their vectors can be linked in
    Moments moments;
  };
  struct Group {
    GroupStats stats;
  };
  const Parts parts(length, channels);
  const int64_t padded = round_up(channels, kLanes) * 3;
  std::vector<Slot> partial(batches * parts.count * norm.groups);
  const Buffer memory(padded * threads);
#pragma omp parallel num_threads(threads)
  {
    float* channel = memory.data() + thread_number() * padded;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batches * parts.count; ++i) {
      const int64_t b = i / parts.count, part = i % parts.count;
      part_moments<T>(x, b, parts.begin(part), parts.end(part), channels, norm.groups, channel,
                      &partial[i * norm.groups].moments);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batches; ++b) {
      std::vector<Group> groups(norm.groups);
      for (int64_t g = 0; g < norm.groups; ++g) {
        Moments all;
        for (int64_t part = 0; part < parts.count; ++part)
          all.merge(partial[(b * parts.count + part) * norm.groups + g].moments);
        const float mean = static_cast<float>(all.mean);
        const float rstd = static_cast<float>(1.0 / std::sqrt(all.m2 / all.n + norm.eps));
        groups[g].stats = {mean, rstd, static_cast<float>(all.mean - mean)};
        norm.stats[(b * norm.groups + g) * 2] = mean;
        norm.stats[(b * norm.groups + g) * 2 + 1] = rstd;
      }
      set_coefficients(norm, to, b, channels, &groups[0].stats);
    }
  }
}

template <bool kSilu, int Degree>
inline Vec activate(Vec z) {
  if constexpr (kSilu) return z * sigmoid<Degree>(z);
  return z;
}

// The derivative of the activation times `d_y`.
template <bool kSilu>
inline Vec activate_backward(Vec z, Vec d_y) {
  if constexpr (kSilu) {
    const Vec s = sigmoid(z);
    return d_y * s * (1.0f + z * (1.0f - s));
  }
  return d_y;
}

enum class Prologue { none, affine, silu };

inline Prologue prologue_of(const Norm& norm) {
  if (norm.silu) return Prologue::silu;
  return norm.groups || norm.scale || norm.shift ? Prologue::affine : Prologue::none;
}

// y of the channels [c, c + kLanes) of one batch; zero past the last channel, where all three coefficients are.
template <Prologue kPrologue, int Degree>
inline Vec apply(Vec x, const Coefficients& coefficients, int64_t batch, int64_t c) {
  if constexpr (kPrologue == Prologue::none) return x;
  const Vec centred = x - load(coefficients.mean(batch) + c);
  return activate<kPrologue == Prologue::silu, Degree>(centred * load(coefficients.factor(batch) + c) +
                                                       load(coefficients.offset(batch) + c));
}

}  // namespace
}  // namespace mmattn::MMATTN_ISA
