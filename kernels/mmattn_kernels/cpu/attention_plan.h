// SPDX-License-Identifier: MIT
// What the attention kernels share: the rule of windows, the order of work, the memory of a call.
#pragma once

#include <algorithm>
#include <new>
#include <utility>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "attention.h"
#include "simd.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kMaxDim = 256;
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kMasked = -1e30f;  // finite, so that masked minus maximum is never NaN

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

class Buffer {  // uninitialised floats that begin on a cache line
 public:
  explicit Buffer(int64_t n) : data_(static_cast<float*>(::operator new[](n * sizeof(float), kLine))) {}
  ~Buffer() { ::operator delete[](data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* at(int64_t n) const { return data_ + n; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
};

struct Range {
  int64_t lo, hi;
};

// The rule of windows. Where every segment sees all keys, order does not matter and all queries form one segment.
struct Windows {
  int64_t segments, q_segment, q_len, k_segment, k_len, length, shift;

  Windows(const Attention& p, const Direction& d)
      : segments(p.frames),
        q_segment(d.q_len / p.frames),
        q_len(d.q_len),
        k_segment(d.k_len / p.frames),
        k_len(d.k_len),
        length(p.window * k_segment),
        shift(p.shift) {
    if (length == k_len) segments = 1, q_segment = q_len, shift = 0;
  }

  Range queries(int64_t segment) const {  // the last segment owns the left-over positions
    return {segment * q_segment, segment + 1 == segments ? q_len : (segment + 1) * q_segment};
  }

  // Runs of segments for backward. A run of window - 1 segments and its neighbour's neighbour read disjoint keys, so
  // with an even number of runs two colours are enough; windows of one segment never meet and need one.
  template <class Visit>
  void each_run(int64_t window, int64_t colour, Visit visit) const {
    const int64_t length = std::max<int64_t>(window - 1, 1);
    int64_t runs = segments / length;
    if (window > 1) runs = runs < 2 ? 1 : runs / 2 * 2;
    for (int64_t i = 0; i < runs; ++i)
      if ((window > 1 ? i % 2 : 0) == colour) visit(Range{i * length, i + 1 == runs ? segments : (i + 1) * length});
  }

  template <class Visit>
  void each_key_range(int64_t segment, Visit visit) const {
    const int64_t lo = (segment + shift) * k_segment % k_len, hi = lo + length;
    visit(Range{lo, std::min(hi, k_len)});
    if (hi > k_len) visit(Range{0, hi - k_len});
  }
};

// Blocks of at most `panels` panels of `width` keys that cover `range`, split evenly: visit(first panel, panels).
template <class Visit>
void each_key_block(Range range, int64_t width, int64_t panels, Visit visit) {
  const int64_t first = range.lo / width, count = (range.hi + width - 1) / width - first;
  const int64_t blocks = (count + panels - 1) / panels;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = first + count * i / blocks, end = first + count * (i + 1) / blocks;
    visit(begin, end - begin);
  }
}

// The queries of a segment in blocks of at most `rows`, split evenly in whole units: visit(block).
template <class Visit>
void each_query_block(const Windows& w, int64_t segment, int64_t rows, int64_t unit, Visit visit) {
  const Range q = w.queries(segment);
  const int64_t units = (q.hi - q.lo + unit - 1) / unit, blocks = (units * unit + rows - 1) / rows;
  for (int64_t i = 0; i < blocks; ++i)
    visit(Range{q.lo + units * i / blocks * unit, std::min(q.hi, q.lo + units * (i + 1) / blocks * unit)});
}

template <class T>
T* row(const Strided& s, int64_t batch, int64_t position, int64_t head) {
  return static_cast<T*>(s.data) + batch * s.batch + position * s.position + head * s.head;
}

// Calls task(i) for i in [0, count), shared by the team of the enclosing parallel region, and waits for all of it.
template <class Task>
void share(int64_t count, Task task) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) task(i);
}

int64_t thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// A head is one (direction, batch, head). Heads are packed and computed in waves, so that memory is bounded by the wave
// and a small team still finds its packed keys in cache.
struct Head {
  const Direction* direction;
  int64_t batch, head;
  Windows windows;
};

Head head_of(const Attention& p, int64_t i) {
  const int64_t per_direction = p.batch * p.heads;
  const Direction& d = p.directions[i / per_direction];
  return {&d, i % per_direction / p.heads, i % p.heads, Windows(p, d)};
}

// The memory of a call: `per_head` floats for each head of a wave, `per_thread` floats of scratch for each thread.
class Plan {
 public:
  Plan(const Attention& p, int64_t per_head, int64_t per_thread)
      : heads(2 * p.batch * p.heads),
        wave(std::min<int64_t>(heads, 2 * p.threads)),
        longest(std::max(p.directions[0].k_len, p.directions[1].k_len)),
        per_head_(round_up(per_head, 16)),
        per_thread_(round_up(per_thread, 16)),
        memory_(wave * per_head_ + p.threads * per_thread_) {}

  float* of_head(int64_t slot) const { return memory_.at(slot * per_head_); }
  float* of_thread() const { return memory_.at(wave * per_head_ + thread_number() * per_thread_); }

  const int64_t heads, wave, longest;

 private:
  int64_t per_head_, per_thread_;
  Buffer memory_;
};

struct Task {
  int64_t slot, segment;
  Range queries;
};

constexpr int64_t kPackRows = 64;

template <class Kernel>
void run_forward(const Attention& p) {
  const Kernel kernel(p);
  const Plan& plan = kernel.plan;
#pragma omp parallel num_threads(p.threads)
  for (int64_t begin = 0; begin < plan.heads; begin += plan.wave) {
    const int64_t slots = std::min(plan.wave, plan.heads - begin), chunks = (plan.longest + kPackRows - 1) / kPackRows;
    share(slots * chunks, [&](int64_t i) {
      kernel.pack(head_of(p, begin + i / chunks), i / chunks, i % chunks * kPackRows);
    });
    std::vector<Task> tasks;  // the same list on every thread
    for (int64_t slot = 0; slot < slots; ++slot) {
      const Windows windows = head_of(p, begin + slot).windows;
      for (int64_t segment = 0; segment < windows.segments; ++segment)
        each_query_block(windows, segment, Kernel::kQueryRows, Kernel::kRowUnit,
                         [&](Range q) { tasks.push_back({slot, segment, q}); });
    }
    share(tasks.size(), [&](int64_t i) { kernel.block(head_of(p, begin + tasks[i].slot), tasks[i]); });
  }
}

template <class Kernel>
void run_backward(const Attention& p) {
  const Kernel kernel(p);
  const Plan& plan = kernel.plan;
#pragma omp parallel num_threads(p.threads)
  for (int64_t begin = 0; begin < plan.heads; begin += plan.wave) {
    const int64_t slots = std::min(plan.wave, plan.heads - begin), chunks = (plan.longest + kPackRows - 1) / kPackRows;
    share(slots * chunks, [&](int64_t i) {
      kernel.pack(head_of(p, begin + i / chunks), i / chunks, i % chunks * kPackRows);
    });
    for (int64_t colour = 0; colour < 2; ++colour) {
      std::vector<std::pair<int64_t, Range>> runs;  // slot, segments
      for (int64_t slot = 0; slot < slots; ++slot)
        head_of(p, begin + slot).windows.each_run(p.window, colour, [&](Range r) { runs.emplace_back(slot, r); });
      share(runs.size(), [&](int64_t i) {
        const auto [slot, segments] = runs[i];
        const Head at = head_of(p, begin + slot);
        for (int64_t segment = segments.lo; segment < segments.hi; ++segment)
          each_query_block(at.windows, segment, Kernel::kQueryRows, Kernel::kRowUnit,
                           [&, slot = slot](Range q) { kernel.block(at, {slot, segment, q}); });
      });
    }
    share(slots * chunks, [&](int64_t i) {
      kernel.unpack(head_of(p, begin + i / chunks), i / chunks, i % chunks * kPackRows);
    });
  }
}

}  // namespace
}  // namespace mmattn::MMATTN_ISA
