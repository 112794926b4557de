// SPDX-License-Identifier: MIT
// What the attention kernels share: the rule of windows, how the work is cut into runs, the memory of a thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <list>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "simd.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kMaxDim = 256;
constexpr int64_t kCacheBytes = 1 << 20;  // packed keys a run may hold: half of a common second-level cache
constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();  // less than any score, and no NaN less a score

template <class T>
T* row(const Strided& s, int64_t batch, int64_t position, int64_t head) {
  return static_cast<T*>(s.data) + batch * s.batch + position * s.position + head * s.head;
}

// The natural logarithm of a sum of exponentials of base 2 that are relative to `scale` times `top`.
inline double log_sum_exp(float top, float scale, float sum) {
  return (static_cast<double>(top) * scale + std::log2(sum)) * kLn2<double>;
}

// The same in base 2, as two floats.
struct BinaryLse {
  float high, low;
  explicit BinaryLse(double lse) {
    const double binary = lse * kLog2e<double>;
    high = static_cast<float>(binary);
    low = static_cast<float>(binary - high);
  }
};

// What the queries carry of the scale, and what is left for differences of scores: its sign and its size, since a score
// scaled before the greatest is taken off is rounded once more, by its own size. All of it and 1 where it is so small
// that the log-sum-exp divided by it would be no float.
struct ScoreScale {
  float of_queries, of_differences;  // the latter in base 2, above 0
  explicit ScoreScale(float scale)
      : of_queries(scale < 0 ? -1.0f : 1.0f), of_differences(std::abs(scale) * kLog2e<float>) {
    if (of_differences < 1e-20f) of_queries = scale * kLog2e<float>, of_differences = 1.0f;
  }
};

struct Range {
  int64_t lo, hi;
};

// The rule of windows of one direction. Where every segment sees all keys their order does not matter, and all queries
// form one segment.
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
};

struct QueryBlock {
  int64_t segment;
  Range queries;
};

// Blocks of at most `rows` queries of one segment, each segment split evenly in whole units.
std::vector<QueryBlock> query_blocks(const Windows& w, int64_t rows, int64_t unit) {
  std::vector<QueryBlock> blocks;
  for (int64_t segment = 0; segment < w.segments; ++segment) {
    const Range q = w.queries(segment);
    const int64_t units = (q.hi - q.lo + unit - 1) / unit, count = (units * unit + rows - 1) / rows;
    for (int64_t i = 0; i < count; ++i)
      blocks.push_back(
          {segment, {q.lo + units * i / count * unit, std::min(q.hi, q.lo + units * (i + 1) / count * unit)}});
  }
  return blocks;
}

// One thread's piece of work: consecutive query blocks of one (batch, head), and the circular range of keys they read.
// The thread packs that range once, as keys 0..ring-1; a window is one or two plain ranges of it.
struct Run {
  const Direction* direction;
  int64_t batch, head, ring, origin, first_segment;
  bool is_last;  // of its head
  Windows windows;
  const QueryBlock *begin, *end;

  Run(const Direction* d, int64_t batch_, int64_t head_, const Windows& w, const QueryBlock* begin_,
      const QueryBlock* end_, bool is_last_)
      : direction(d),
        batch(batch_),
        head(head_),
        first_segment(begin_->segment),
        is_last(is_last_),
        windows(w),
        begin(begin_),
        end(end_) {
    ring = std::min(w.length + (end[-1].segment - first_segment) * w.k_segment, w.k_len);
    origin = (first_segment + w.shift) * w.k_segment % w.k_len;
  }

  template <class T>
  T* key(const Strided& s, int64_t i) const {  // null past the ring
    if (i >= ring) return nullptr;
    const int64_t position = origin + i;
    return row<T>(s, batch, position < windows.k_len ? position : position - windows.k_len, head);
  }

  double* lse(const QueryBlock& block, int64_t heads) const {
    return direction->lse + (batch * heads + head) * direction->q_len + block.queries.lo;
  }

  template <class Visit>
  void each_key_range(const QueryBlock& block, Visit visit) const {
    const int64_t lo = (block.segment - first_segment) * windows.k_segment, hi = lo + windows.length;
    visit(Range{lo, std::min(hi, ring)});
    if (hi > ring) visit(Range{0, hi - ring});
  }
};

// Where the frames do not divide the keys, no window may reach the last of them: their gradients are zero.
template <class T>
void zero_unread(const Run& run, int64_t dim) {
  const Windows& w = run.windows;
  const int64_t first = (w.segments - 1 + w.shift) * w.k_segment + w.length, end = w.shift * w.k_segment + w.k_len;
  for (int64_t i = first; run.is_last && i < end; ++i)
    for (const Strided* s : {&run.direction->d_k, &run.direction->d_v})
      std::memset(row<T>(*s, run.batch, i % w.k_len, run.head), 0, dim * sizeof(T));
}

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

// Cuts a direction into runs, for every batch and head: as long as the packed keys stay in cache, but enough of them
// for the threads. With `exclusive`, as backward needs it, no two runs of a head read the same key.
class Runs {
 public:
  Runs(const Attention& p, const Direction& d, int64_t rows, int64_t unit, int64_t bytes_per_key, bool exclusive)
      : windows_(p, d), blocks_(query_blocks(windows_, rows, unit)) {
    const int64_t count = blocks_.size(), heads = p.batch * p.heads;
    const int64_t cached = kCacheBytes / bytes_per_key - windows_.length;
    // Windows of one segment share no key, so longer runs would only push the keys out of the nearer caches.
    const int64_t segments =
        cached > 0 && p.window > 1 ? std::min(cached / windows_.k_segment + 1, windows_.segments) : 1;
    const int64_t wanted = (4 * p.threads + 2 * heads - 1) / (2 * heads);
    int64_t runs = std::max((windows_.segments + segments - 1) / segments, wanted);
    if (exclusive) runs = p.window == 1 ? std::min(runs, windows_.segments) : 1;
    runs = std::min(runs, count);
    struct Cut {  // a type of this file, so that no other instruction set's build of its vector can be linked in
      int64_t at;
    };
    std::vector<Cut> cuts;
    for (int64_t i = 0; i <= runs; ++i) {
      int64_t cut = count * i / runs;
      while (exclusive && cut > 0 && cut < count && blocks_[cut - 1].segment == blocks_[cut].segment) --cut;
      if (cuts.empty() || cut > cuts.back().at) cuts.push_back({cut});
    }
    for (size_t j = 0; j + 1 < cuts.size(); ++j)
      for (int64_t i = 0; i < heads; ++i) {
        runs_.emplace_back(&d, i / p.heads, i % p.heads, windows_, &blocks_[cuts[j].at], &blocks_[0] + cuts[j + 1].at,
                           j + 2 == cuts.size());
        longest_ = std::max(longest_, runs_.back().ring);
      }
  }

  Runs(const Runs&) = delete;
  Runs& operator=(const Runs&) = delete;
  const std::vector<Run>& all() const { return runs_; }
  int64_t longest() const { return longest_; }

 private:
  Windows windows_;
  std::vector<QueryBlock> blocks_;
  std::vector<Run> runs_;
  int64_t longest_ = 0;
};

// Kernel(p, longest ring, scratch) takes its memory from scratch; kernel.run(run) computes one run.
template <class Kernel>
void run_all(const Attention& p) {
  std::list<Runs> directions;
  std::vector<const Run*> runs;
  int64_t longest = 0;
  for (const Direction& d : p.directions) {
    const Runs& own = directions.emplace_back(p, d, Kernel::kQueryRows, Kernel::kRowUnit, Kernel::bytes_per_key(p.dim),
                                              Kernel::kExclusive);
    for (const Run& run : own.all()) runs.push_back(&run);
    longest = std::max(longest, own.longest());
  }
  // Of many runs a thread takes neighbours, which lie side by side in memory: the heads of a segment, the next segment.
  const int64_t chunk = std::max<int64_t>(runs.size() / (64 * p.threads), 1);
  Scratch counter(nullptr);
  Kernel(p, longest, counter);
  const int64_t per_thread = round_up(counter.used(), 1024);
  const Buffer memory(per_thread * p.threads);
#pragma omp parallel num_threads(p.threads)
  {
    Scratch scratch(memory.data() + thread_number() * per_thread);
    const Kernel kernel(p, longest, scratch);
#pragma omp for schedule(dynamic, chunk)
    for (size_t i = 0; i < runs.size(); ++i) kernel.run(*runs[i]);
  }
}

}  // namespace
}  // namespace mmattn::MMATTN_ISA
