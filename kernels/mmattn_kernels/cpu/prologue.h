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

constexpr int64_t kSliceRows = 32;              // positions whose mean is taken before their deviations from it
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

// visit(first channel, vectors) for slices of at most kSliceVecs vectors; the last vector may be partial.
template <class Visit>
void each_slice(int64_t channels, Visit visit) {
  for (int64_t c = 0; c < channels; c += kSliceVecs * kLanes)
    visit(c, std::min<int64_t>(kSliceVecs, (channels - c + kLanes - 1) / kLanes));
}

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

// Moments of each group over positions [begin, end). `channel` holds two floats a channel, padded to whole vectors.
template <class T>
void part_moments(const Tokens& x, int64_t batch, int64_t begin, int64_t end, int64_t channels, int64_t groups,
                  float* channel, Moments* out) {
  const int64_t padded = round_up(channels, kLanes);
  float *means = channel, *m2s = channel + padded;
  for (int64_t first = begin; first < end; first += kSliceRows) {
    const int64_t rows = std::min(kSliceRows, end - first);
    const float before = static_cast<float>(first - begin), total = before + static_cast<float>(rows);
    each_slice(channels, [&](int64_t c, int64_t vecs) {
      const auto each = [&](auto visit) {
        for (int64_t r = 0; r < rows; ++r) {
          const T* p = row<T>(x, batch, first + r) + c;
          if (vecs == kSliceVecs && c + kSliceVecs * kLanes <= channels) {
#pragma GCC unroll 8
            for (int v = 0; v < kSliceVecs; ++v) visit(v, load(p + v * kLanes));
          } else {
            for (int64_t v = 0; v < vecs; ++v) visit(v, load_lanes(p + v * kLanes, channels - c - v * kLanes));
          }
        }
      };
      Vec sum[kSliceVecs] = {}, square[kSliceVecs] = {};
      each([&](int64_t v, Vec value) { sum[v] += value; });
      for (int64_t v = 0; v < vecs; ++v) sum[v] *= 1.0f / rows;
      each([&](int64_t v, Vec value) { square[v] += (value - sum[v]) * (value - sum[v]); });
      for (int64_t v = 0; v < vecs; ++v) {
        float *mean = means + c + v * kLanes, *m2 = m2s + c + v * kLanes;
        if (first == begin) {
          store(mean, sum[v]);
          store(m2, square[v]);
        } else {
          const Vec delta = sum[v] - load(mean);
          store(mean, load(mean) + delta * (rows / total));
          store(m2, load(m2) + square[v] + delta * delta * (before * rows / total));
        }
      }
    });
  }
  const int64_t size = channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0, m2 = 0;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) mean += means[c];
    mean /= size;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) m2 += m2s[c] + (means[c] - mean) * (means[c] - mean) * (end - begin);
    out[g] = {static_cast<double>((end - begin) * size), mean, m2};
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
  const int64_t padded = round_up(channels, kLanes) * 2;
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
