// SPDX-License-Identifier: MIT
// Statistics of groups, and normalisation, FiLM and activation as one map per channel:
//   y = activate(z),  z = (x - mean) * factor + offset,  with a mean, a factor and an offset for each (batch, channel).
// The positions are cut into parts of a fixed size, each with sums of its own, merged in their order: the result does
// not depend on the number of threads.
#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "memory.h"
#include "norm.h"
#include "simd.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kSliceRows = 32;          // positions summed in registers
constexpr int64_t kSlicePairs = 4;          // pairs of vectors of channels whose sums stay there
constexpr int64_t kPartElements = 1 << 16;  // of x in a part
template <class T>
constexpr int kDegree = sizeof(T) == 2 ? 3 : 5;  // of the exponential's polynomial

template <class T>
T* row(const Tokens& t, int64_t batch, int64_t position) {
  return static_cast<T*>(t.data) + batch * t.batch + position * t.position;
}

// One number of a parameter, or `missing` without one.
inline float value(const Parameter& p, int64_t batch, int64_t c, float missing) {
  if (!p.data) return missing;
  const int64_t at = batch * p.batch + c;
  if (!p.is_bf16) return static_cast<const float*>(p.data)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p.data)[at]) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
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

// The channels of a part in ranges of whole groups and pairs of vectors, where the parts are no even share for the
// threads: sums of a channel are the same bits in any range.
struct ChannelRanges {
  int64_t unit, units, count, channels;
  ChannelRanges(int64_t channels_, int64_t group_size, int64_t parts, int64_t threads)
      : unit(std::lcm<int64_t>(group_size, 2 * kLanes)),
        units((channels_ + unit - 1) / unit),
        count(parts % threads ? std::clamp<int64_t>((4 * threads + parts - 1) / parts, 1, units) : 1),
        channels(channels_) {}
  int64_t begin(int64_t range) const { return std::min(channels, units * range / count * unit); }
};

inline void tell_parts(const char* loop, int64_t batches, const Parts& parts, const ChannelRanges& ranges,
                       double numbers, const Work& work) {
  for (int64_t i = 0; i < batches * parts.count; ++i)
    for (int64_t r = 0; r < ranges.count; ++r)
      work.fixed(loop, 0,
                 (parts.end(i % parts.count) - parts.begin(i % parts.count)) * (ranges.begin(r + 1) - ranges.begin(r)) *
                     numbers);
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

// 2 * kLanes channels: their two halves or, where kEvenAndOdd, the even and the odd ones, which a shift and a mask of
// bf16 words yield.
struct Pair {
  Vec first, second;
};
template <class T>
constexpr bool kEvenAndOdd =
#if defined(__AVX512BF16__)
    sizeof(T) == 2;
#else
    false;
#endif

template <class T>
inline Pair load_pair(const T* p, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (kEvenAndOdd<T>) {
    const __m512i words = n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p);
    return {(Vec)_mm512_slli_epi32(words, 16), (Vec)_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000))};
  }
#endif
  return {load_lanes(p, n), load_lanes(p + kLanes, n - kLanes)};
}

#if defined(__AVX512BF16__)
// 32 rounded bf16 in the order of the channels.
inline __m512i in_order(const Pair& pair) {
  return interleave((__m512i)_mm512_cvtne2ps_pbh(pair.second, pair.first));
}
#endif

template <class T>
inline void store_pair(T* p, const Pair& pair, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (kEvenAndOdd<T>) {
    if (n >= 32)
      _mm512_storeu_si512(p, in_order(pair));
    else
      _mm512_mask_storeu_epi16(p, (1u << n) - 1, in_order(pair));
    return;
  }
#endif
  store_lanes(p, pair.first, n);
  if (n > kLanes) store_lanes(p + kLanes, pair.second, n - kLanes);
}

// Where channel c lies among vectors that were loaded so.
inline int64_t even_and_odd_place(int64_t c) {
  const int64_t in_pair = c % (2 * kLanes);
  return c - in_pair + in_pair % 2 * kLanes + in_pair / 2;
}

// Adds to `sums` and `squares` those of x - pivot over `rows` positions, for N pairs of vectors of channels.
template <int N, class T>
void add_slice(const T* x, int64_t position, int64_t rows, int64_t channels, const float* pivot, float* sums,
               float* squares) {
  Vec sum[2 * N] = {}, square[2 * N] = {}, at[2 * N];
#pragma GCC unroll 8
  for (int v = 0; v < 2 * N; ++v) at[v] = load(pivot + v * kLanes);
  for (int64_t r = 0; r < rows; ++r, x += position)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const Pair pair = load_pair(x + v * 2 * kLanes, N == 1 ? channels : 2 * kLanes);
      const Vec first = pair.first - at[2 * v], second = pair.second - at[2 * v + 1];
      sum[2 * v] += first;
      square[2 * v] += first * first;
      sum[2 * v + 1] += second;
      square[2 * v + 1] += second * second;
    }
#pragma GCC unroll 8
  for (int v = 0; v < 2 * N; ++v) {
    store(sums + v * kLanes, load(sums + v * kLanes) + sum[v]);
    store(squares + v * kLanes, load(squares + v * kLanes) + square[v]);
  }
}

// Moments of each group over positions [begin, end). The sums are of x - pivot, the pivot of a channel being its first
// value here: as one of the values it is about as far from the mean as they are, so no digits are lost however far that
// is from zero. `channel` holds three floats a channel, padded to whole pairs of vectors.
template <class T>
void part_moments(const Tokens& x, int64_t batch, int64_t begin, int64_t end, int64_t channels, int64_t groups,
                  float* channel, Moments* out) {
  constexpr int64_t kPair = 2 * kLanes;
  const int64_t padded = round_up(channels, kPair), sliced = channels - channels % (kSlicePairs * kPair);
  float *pivot = channel, *sums = channel + padded, *squares = channel + 2 * padded;
  for (int64_t c = 0; c < channels; c += kPair) {
    const Pair first = load_pair(row<T>(x, batch, begin) + c, channels - c);
    store(pivot + c, first.first);
    store(pivot + c + kLanes, first.second);
  }
  std::memset(sums, 0, 2 * padded * sizeof(float));
  for (int64_t first = begin; first < end; first += kSliceRows) {
    const int64_t rows = std::min(kSliceRows, end - first);
    const T* p = row<T>(x, batch, first);
    int64_t c = 0;
    for (; c < sliced; c += kSlicePairs * kPair)
      add_slice<kSlicePairs>(p + c, x.position, rows, channels - c, pivot + c, sums + c, squares + c);
    for (; c < channels; c += kPair)
      add_slice<1>(p + c, x.position, rows, channels - c, pivot + c, sums + c, squares + c);
  }
  const int64_t size = channels / groups;
  const double rows = static_cast<double>(end - begin), per_row = 1 / rows, per_channel = 1.0 / size;
  for (int64_t g = 0; g < groups; ++g) {
    // Means of the channels are kept as distances from one of them, so that squares of a common one cannot swamp them.
    const double origin = pivot[kEvenAndOdd<T> ? even_and_odd_place(g * size) : g * size];
    double mean = 0, square = 0, m2 = 0;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      const int64_t at = kEvenAndOdd<T> ? even_and_odd_place(c) : c;
      const double sum = sums[at], distance = pivot[at] - origin + sum * per_row;
      mean += distance;
      square += distance * distance;
      m2 += std::max(squares[at] - sum * sum * per_row, 0.0);
    }
    out[g] = {rows * size, origin + mean * per_channel, m2 + rows * std::max(square - mean * mean * per_channel, 0.0)};
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

class Coefficients : public PerChannel {
 public:
  // For whom `load_pair` brings even and odd channels apart, they are kept apart here too.
  Coefficients(int64_t batch, int64_t channels, bool even_and_odd = false)
      : PerChannel(batch, channels, 3), even_and_odd_(even_and_odd) {}
  int64_t place(int64_t c) const { return even_and_odd_ ? even_and_odd_place(c) : c; }
  float* mean(int64_t batch) const { return at(batch, 0); }
  float* factor(int64_t batch) const { return at(batch, 1); }
  float* offset(int64_t batch) const { return at(batch, 2); }

 private:
  bool even_and_odd_;
};

// What the coefficients of all batches share, at the places of the channels: weight, bias, and the group, which past
// the last channel is one more than there are.
class Channels {
 public:
  Channels(const Norm& norm, const Coefficients& to, int64_t channels) : count_(channels), parameters_(1, channels, 3) {
    const int64_t size = norm.groups ? channels / norm.groups : channels, last = channels / size;
    int32_t* group = reinterpret_cast<int32_t*>(parameters_.at(0, 2));
    for (int64_t c = 0, g = 0, left = size; c < to.padded(); ++c, --left) {
      if (left == 0 && g < last) ++g, left = size;
      const int64_t at = to.place(c);
      parameters_.at(0, 0)[at] = c < channels ? value(norm.weight, 0, c, 1.0f) : 0.0f;
      parameters_.at(0, 1)[at] = c < channels ? value(norm.bias, 0, c, 0.0f) : 0.0f;
      group[at] = static_cast<int32_t>(g);
    }
  }
  int64_t count() const { return count_; }
  const float* weight() const { return parameters_.at(0, 0); }
  const float* bias() const { return parameters_.at(0, 1); }
  int32_t group(int64_t at) const { return reinterpret_cast<const int32_t*>(parameters_.at(0, 2))[at]; }

 private:
  int64_t count_;
  PerChannel parameters_;
};

// `remainder` is what is missing of a float that holds the mean: for a large mean as much as a rounding of x.
struct GroupStats {
  float mean = 0, rstd = 1, remainder = 0;
};

// Numbers as long to do as a merge of moments, in doubles one by one, or as reading a channel's parameters.
constexpr double kOfMerge = 32, kOfChannel = 16;

inline void set_coefficients(const Norm& norm, const Channels& channels, const Coefficients& to, int64_t batch,
                             const GroupStats* stats) {
  float *mean = to.mean(batch), *factor = to.factor(batch), *offset = to.offset(batch);
  const float *weight = channels.weight(), *bias = channels.bias();
  for (int64_t at = 0; at < to.padded(); ++at) {
    const GroupStats& s = stats[channels.group(at)];
    mean[at] = s.mean;
    factor[at] = s.rstd * weight[at];
    offset[at] = bias[at] - s.remainder * factor[at];
  }
  if (!norm.scale.data && !norm.shift.data) return;
  for (int64_t c = 0; c < channels.count(); ++c) {
    const int64_t at = to.place(c);
    const float gain = 1.0f + value(norm.scale, batch, c, 0.0f);
    factor[at] *= gain;
    offset[at] = bias[at] * gain + value(norm.shift, batch, c, 0.0f) - stats[channels.group(at)].remainder * factor[at];
  }
}

// From the statistics that forward has written; of no groups there are none.
inline void set_coefficients_from_stats(const Norm& norm, const Coefficients& to, int64_t batches, int64_t channels) {
  const Channels shared(norm, to, channels);
  std::vector<GroupStats> groups(std::max<int64_t>(norm.groups, 1));
  groups.push_back({0, 0, 0});
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t g = 0; g < norm.groups; ++g) {
      const float* s = norm.stats + (b * norm.groups + g) * kStats;
      groups[g] = {s[0], s[1], s[2]};
    }
    set_coefficients(norm, shared, to, b, groups.data());
  }
}

// Reads x once, writes norm.stats and the coefficients. Without groups there is nothing to read.
template <class T>
void prepare(const Norm& norm, const Tokens& x, int64_t batches, int64_t length, int64_t channels, int threads,
             const Coefficients& to) {
  if (norm.groups == 0) return set_coefficients_from_stats(norm, to, batches, channels);
  const Parts parts(length, channels);
  const int64_t size = channels / norm.groups;
  const ChannelRanges ranges(channels, size, batches * parts.count, threads);
  const int64_t padded = round_up(channels, 2 * kLanes) * 3;
  std::vector<Moments> partial(batches * parts.count * norm.groups);
  const Buffer memory(padded * threads);
  const Channels shared(norm, to, channels);
  std::vector<GroupStats> groups(batches * (norm.groups + 1), GroupStats{0, 0, 0});
#pragma omp parallel num_threads(threads)
  {
    float* channel = memory.data() + thread_number() * padded;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < batches * parts.count * ranges.count; ++j) {
      const int64_t i = j / ranges.count, b = i / parts.count, part = i % parts.count;
      const int64_t first = ranges.begin(j % ranges.count), count = ranges.begin(j % ranges.count + 1) - first;
      const Tokens own{static_cast<T*>(x.data) + first, x.batch, x.position};
      part_moments<T>(own, b, parts.begin(part), parts.end(part), count, count / size, channel,
                      &partial[i * norm.groups + first / size]);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batches * norm.groups; ++i) {
      const int64_t b = i / norm.groups, g = i % norm.groups;
      Moments all;
      for (int64_t part = 0; part < parts.count; ++part) all.merge(partial[(b * parts.count + part) * norm.groups + g]);
      const float mean = static_cast<float>(all.mean);
      const float rstd = static_cast<float>(1.0 / std::sqrt(all.m2 / all.n + norm.eps));
      const GroupStats own{mean, rstd, static_cast<float>(all.mean - mean)};
      groups[b * (norm.groups + 1) + g] = own;
      float* s = norm.stats + i * kStats;
      s[0] = own.mean, s[1] = own.rstd, s[2] = own.remainder;
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batches; ++b) set_coefficients(norm, shared, to, b, &groups[b * (norm.groups + 1)]);
  }
}

inline void tell_prepare(const Norm& norm, int64_t batches, int64_t length, int64_t channels, int threads,
                         const Work& work) {
  work.fixed("parameters", 0, kOfChannel * channels);
  const Parts parts(length, channels);
  if (norm.groups)
    tell_parts("statistics", batches, parts,
               ChannelRanges(channels, channels / norm.groups, batches * parts.count, threads), 1, work);
  for (int64_t i = 0; i < batches * norm.groups; ++i) work.fixed("merges", 0, kOfMerge * parts.count);
  for (int64_t b = 0; b < batches; ++b) work.fixed("coefficients", 0, kOfChannel * channels);
}

template <bool kSilu, int Degree>
inline Vec activate(Vec z) {
  if constexpr (kSilu) return z * sigmoid<Degree>(z);
  return z;
}

// The derivative of the activation times `d_y`.
template <bool kSilu, int Degree>
inline Vec activate_backward(Vec z, Vec d_y) {
  if constexpr (kSilu) {
    const Vec s = sigmoid<Degree>(z);
    return d_y * s * (1.0f + z * (1.0f - s));
  }
  return d_y;
}

enum class Prologue { none, affine, silu };

inline Prologue prologue_of(const Norm& norm) {
  if (norm.silu) return Prologue::silu;
  return norm.groups || norm.scale.data || norm.shift.data ? Prologue::affine : Prologue::none;
}

// One batch's coefficients, as pointers that a loop keeps in registers, and those of one vector of channels.
struct Maps {
  const float *mean, *factor, *offset;
  Maps(const Coefficients& of, int64_t batch)
      : mean(of.mean(batch)), factor(of.factor(batch)), offset(of.offset(batch)) {}
};
struct Map {
  Vec mean, factor, offset;
  Map(const Maps& of, int64_t c) : mean(load(of.mean + c)), factor(load(of.factor + c)), offset(load(of.offset + c)) {}
};

// y; zero past the last channel, where x and all three coefficients are.
template <Prologue kPrologue, int Degree>
inline Vec apply(Vec x, const Map& map) {
  if constexpr (kPrologue == Prologue::none) return x;
  return activate<kPrologue == Prologue::silu, Degree>((x - map.mean) * map.factor + map.offset);
}

}  // namespace
}  // namespace mmattn::MMATTN_ISA
