// SPDX-License-Identifier: MIT
// Random-shift windowed attention, both directions, forward and backward:
//   O_i = softmax(scale * Q_i K_w^T) V_w,   w = the circular window of query segment i.
// Keys and values are packed once per (direction, batch, head); a window is one or two plain ranges of packed keys.
// Forward: a task owns up to kQueryRows queries of one segment and streams its window with an online softmax in base 2.
// Backward: the probabilities come back from the saved log-sum-exp; a task owns a run of query segments. Runs of one
// colour read disjoint keys, so colours are done one after the other and dK, dV need no atomics: every sum has one order.
#include "attention.h"

#include <cmath>
#include <new>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "gemm.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kQueryRows = 48, kKeyBlock = 128, kMaxDim = 256;
constexpr int64_t kKeyPanels = kKeyBlock / kLanes;
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

// The queries of a segment in blocks of at most `rows`, split evenly: visit(block).
template <class Visit>
void each_query_block(const Windows& w, int64_t segment, int64_t rows, Visit visit) {
  const Range q = w.queries(segment);
  const int64_t count = q.hi - q.lo, blocks = (count + rows - 1) / rows;
  for (int64_t i = 0; i < blocks; ++i) visit(Range{q.lo + count * i / blocks, q.lo + count * (i + 1) / blocks});
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

// Packed keys of a wave: `matrices` of [longest, dim] floats for each head, then `scratch` floats for each thread.
struct Plan {
  int64_t heads, wave, dim, padded, rows, matrix, scratch;
  Buffer memory;

  Plan(const Attention& p, int64_t matrices_, int64_t scratch_)
      : heads(2 * p.batch * p.heads),
        wave(std::min<int64_t>(heads, 2 * p.threads)),
        dim(p.dim),
        padded(round_up(p.dim, kLanes)),
        rows(round_up(std::max(p.directions[0].k_len, p.directions[1].k_len), kLanes)),
        matrix(round_up(rows * padded, 16)),
        scratch(round_up(scratch_, 16)),
        memory(wave * matrices_ * matrix + p.threads * scratch),
        matrices(matrices_) {}

  float* packed(int64_t slot, int64_t which) const { return memory.at((slot * matrices + which) * matrix); }
  float* scratch_of_thread() const { return memory.at(wave * matrices * matrix + thread_number() * scratch); }

 private:
  int64_t matrices;
};

constexpr int64_t kPackRows = 64;

// Up to kPackRows rows from `lo` into panels [panel][channel][kLanes]; rows past the end are zero.
template <class T>
void pack_panels(float* panels, const Strided& s, const Head& at, int64_t lo, int64_t dim) {
  float line[kLanes][kMaxDim];
  for (int64_t base = lo; base < std::min(lo + kPackRows, at.direction->k_len); base += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (base + i < at.direction->k_len)
        load_row(line[i], row<T>(s, at.batch, base + i, at.head), dim, round_up(dim, kLanes), 1.0f);
      else
        std::memset(line[i], 0, sizeof line[i]);
    }
    for (int64_t c = 0; c < dim; ++c)
      for (int i = 0; i < kLanes; ++i) panels[base * dim + c * kLanes + i] = line[i][c];
  }
}

// Up to kPackRows rows from `lo`, channels padded with zeros; rows past the end are zero.
template <class T>
void pack_rows(float* rows, const Strided& s, const Head& at, int64_t lo, int64_t dim) {
  const int64_t padded = round_up(dim, kLanes), k_len = at.direction->k_len;
  for (int64_t i = lo; i < std::min(lo + kPackRows, round_up(k_len, kLanes)); ++i) {
    if (i < k_len)
      load_row(rows + i * padded, row<T>(s, at.batch, i, at.head), dim, padded, 1.0f);
    else
      std::memset(rows + i * padded, 0, padded * sizeof(float));
  }
}

struct Task {
  int64_t slot, segment;
  Range queries;
};

template <class T>
void forward_block(const Attention& p, const Plan& plan, const Head& at, const Task& task) {
  const int64_t rows = task.queries.hi - task.queries.lo, dim = plan.dim, padded = plan.padded;
  const Direction& d = *at.direction;
  const float* keys = plan.packed(task.slot, 0);
  const float* values = plan.packed(task.slot, 1);
  float* queries = plan.scratch_of_thread();
  float* scores = queries + kQueryRows * padded;
  float* out = scores + kQueryRows * kKeyBlock;
  float* top = out + kQueryRows * padded;  // of each row: the maximum so far, the sum, the factor of the block
  float* sum = top + kQueryRows;
  float* factor = sum + kQueryRows;
  for (int64_t r = 0; r < rows; ++r)
    load_row(queries + r * padded, row<T>(d.q, at.batch, task.queries.lo + r, at.head), dim, padded, p.scale * kLog2e);
  for (int64_t r = 0; r < kQueryRows; ++r) top[r] = factor[r] = kMasked, sum[r] = 0;
  std::memset(out, 0, rows * padded * sizeof(float));

  at.windows.each_key_range(task.segment, [&](Range range) {
    each_key_block(range, kLanes, kKeyPanels, [&](int64_t panel, int64_t panels) {
      const int64_t lo = range.lo - panel * kLanes, hi = range.hi - panel * kLanes, last = (panels - 1) * kLanes;
      gemm<Init::zero>({rows, panels, dim, queries, padded, 1, keys + panel * dim * kLanes, dim * kLanes, kLanes,
                        scores, kKeyBlock});
      for (int64_t r = 0; r < rows; ++r) {
        float* s = scores + r * kKeyBlock;
        if (lo > 0) store(s, keep_lanes(load(s), lo, kLanes, kMasked));
        if (hi < last + kLanes) store(s + last, keep_lanes(load(s + last), 0, hi - last, kMasked));
        Vec most = load(s);
        for (int64_t v = 1; v < panels; ++v) most = max(most, load(s + v * kLanes));
        factor[r] = std::max(top[r], reduce_max(most));
      }
      for (int64_t r = 0; r < rows; r += kLanes) {
        const Vec new_top = load(factor + r), rescale = exp2(load(top + r) - new_top);
        store(top + r, new_top);
        store(factor + r, rescale);
        store(sum + r, load(sum + r) * rescale);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float* s = scores + r * kKeyBlock;
        const Vec row_top = broadcast(top[r]);
        Vec total{};
        for (int64_t v = 0; v < panels; ++v) {
          const Vec weight = exp2(load(s + v * kLanes) - row_top);
          store(s + v * kLanes, weight);
          total += weight;
        }
        sum[r] += reduce_add(total);
      }
      gemm<Init::rescale>({rows, padded / kLanes, panels * kLanes, scores, kKeyBlock, 1,
                           values + panel * kLanes * padded, kLanes, padded, out, padded, factor});
    });
  });
  float* lse = d.lse + (at.batch * p.heads + at.head) * d.q_len;
  for (int64_t r = 0; r < rows; ++r) {
    store_row(row<T>(d.out, at.batch, task.queries.lo + r, at.head), out + r * padded, dim, 1 / sum[r]);
    lse[task.queries.lo + r] = (top[r] + std::log2(sum[r])) * kLn2;
  }
}

template <class T>
void forward(const Attention& p) {
  const Plan plan(p, 2, kQueryRows * (2 * round_up(p.dim, kLanes) + kKeyBlock + 3));
#pragma omp parallel num_threads(p.threads)
  for (int64_t begin = 0; begin < plan.heads; begin += plan.wave) {
    const int64_t slots = std::min(plan.wave, plan.heads - begin), chunks = (plan.rows + kPackRows - 1) / kPackRows;
    share(slots * chunks, [&](int64_t i) {
      const int64_t slot = i / chunks, lo = i % chunks * kPackRows;
      const Head at = head_of(p, begin + slot);
      pack_panels<T>(plan.packed(slot, 0), at.direction->k, at, lo, plan.dim);
      pack_rows<T>(plan.packed(slot, 1), at.direction->v, at, lo, plan.dim);
    });
    std::vector<Task> tasks;  // the same list on every thread
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t segment = 0; segment < head_of(p, begin + slot).windows.segments; ++segment)
        each_query_block(head_of(p, begin + slot).windows, segment, kQueryRows,
                         [&](Range q) { tasks.push_back({slot, segment, q}); });
    share(tasks.size(), [&](int64_t i) { forward_block<T>(p, plan, head_of(p, begin + tasks[i].slot), tasks[i]); });
  }
}

// One block of queries against its window: d_q of these queries, and their share of d_k and d_v of the window's keys.
template <class T>
void backward_block(const Attention& p, const Plan& plan, const Head& at, const Task& task) {
  const int64_t rows = task.queries.hi - task.queries.lo, dim = plan.dim, padded = plan.padded, vecs = padded / kLanes;
  const Direction& d = *at.direction;
  const float* key_panels = plan.packed(task.slot, 0);
  const float* key_rows = plan.packed(task.slot, 1);
  const float* value_panels = plan.packed(task.slot, 2);
  float* d_keys = plan.packed(task.slot, 3);
  float* d_values = plan.packed(task.slot, 4);
  float* queries = plan.scratch_of_thread();
  float* d_out = queries + kQueryRows * padded;
  float* d_queries = d_out + kQueryRows * padded;
  float* weights = d_queries + kQueryRows * padded;
  float* d_scores = weights + kQueryRows * kKeyBlock;
  float* delta = d_scores + kQueryRows * kKeyBlock;  // sum(d_out * out) of each row
  const float* lse = d.lse + (at.batch * p.heads + at.head) * d.q_len + task.queries.lo;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = task.queries.lo + r;
    load_row(queries + r * padded, row<T>(d.q, at.batch, position, at.head), dim, padded, p.scale * kLog2e);
    load_row(d_out + r * padded, row<T>(d.d_out, at.batch, position, at.head), dim, padded, 1.0f);
    load_row(d_queries + r * padded, row<T>(d.out, at.batch, position, at.head), dim, padded, 1.0f);
    Vec total{};
    for (int64_t v = 0; v < padded; v += kLanes) total += load(d_out + r * padded + v) * load(d_queries + r * padded + v);
    delta[r] = reduce_add(total);
  }
  std::memset(d_queries, 0, rows * padded * sizeof(float));

  at.windows.each_key_range(task.segment, [&](Range range) {
    each_key_block(range, kLanes, kKeyPanels, [&](int64_t panel, int64_t panels) {
      const int64_t first = panel * kLanes, lo = std::max<int64_t>(range.lo - first, 0);
      const int64_t hi = std::min(range.hi - first, panels * kLanes), last = (panels - 1) * kLanes;
      gemm<Init::zero>({rows, panels, dim, queries, padded, 1, key_panels + first * dim, dim * kLanes, kLanes,
                        weights, kKeyBlock});
      gemm<Init::zero>({rows, panels, dim, d_out, padded, 1, value_panels + first * dim, dim * kLanes, kLanes,
                        d_scores, kKeyBlock});
      for (int64_t r = 0; r < rows; ++r) {
        float* s = weights + r * kKeyBlock;
        float* ds = d_scores + r * kKeyBlock;
        if (lo > 0) store(s, keep_lanes(load(s), lo, kLanes, kMasked));
        if (hi < last + kLanes) store(s + last, keep_lanes(load(s + last), 0, hi - last, kMasked));
        const Vec row_lse = broadcast(lse[r] * kLog2e), row_delta = broadcast(delta[r]);
        for (int64_t v = 0; v < panels * kLanes; v += kLanes) {
          const Vec weight = exp2(load(s + v) - row_lse);
          store(s + v, weight);
          store(ds + v, weight * (load(ds + v) - row_delta));
        }
      }
      gemm<Init::add>({hi - lo, vecs, rows, weights + lo, 1, kKeyBlock, d_out, kLanes, padded,
                       d_values + (first + lo) * padded, padded});
      gemm<Init::add>({hi - lo, vecs, rows, d_scores + lo, 1, kKeyBlock, queries, kLanes, padded,
                       d_keys + (first + lo) * padded, padded});
      gemm<Init::add>({rows, vecs, panels * kLanes, d_scores, kKeyBlock, 1, key_rows + first * padded, kLanes, padded,
                       d_queries, padded});
    });
  });
  for (int64_t r = 0; r < rows; ++r)
    store_row(row<T>(d.d_q, at.batch, task.queries.lo + r, at.head), d_queries + r * padded, dim, p.scale);
}

template <class T>
void backward(const Attention& p) {
  const Plan plan(p, 5, kQueryRows * (3 * round_up(p.dim, kLanes) + 2 * kKeyBlock + 1));
#pragma omp parallel num_threads(p.threads)
  for (int64_t begin = 0; begin < plan.heads; begin += plan.wave) {
    const int64_t slots = std::min(plan.wave, plan.heads - begin), chunks = (plan.rows + kPackRows - 1) / kPackRows;
    share(slots * chunks, [&](int64_t i) {
      const int64_t slot = i / chunks, lo = i % chunks * kPackRows, size = std::min(kPackRows, plan.rows - lo);
      const Head at = head_of(p, begin + slot);
      pack_panels<T>(plan.packed(slot, 0), at.direction->k, at, lo, plan.dim);
      pack_rows<T>(plan.packed(slot, 1), at.direction->k, at, lo, plan.dim);
      pack_panels<T>(plan.packed(slot, 2), at.direction->v, at, lo, plan.dim);
      for (const int64_t which : {3, 4})
        std::memset(plan.packed(slot, which) + lo * plan.padded, 0, size * plan.padded * sizeof(float));
    });
    for (int64_t colour = 0; colour < 2; ++colour) {
      std::vector<std::pair<int64_t, Range>> runs;  // slot, segments
      for (int64_t slot = 0; slot < slots; ++slot)
        head_of(p, begin + slot).windows.each_run(p.window, colour, [&](Range r) { runs.emplace_back(slot, r); });
      share(runs.size(), [&](int64_t i) {
        const auto [slot, segments] = runs[i];
        const Head at = head_of(p, begin + slot);
        for (int64_t segment = segments.lo; segment < segments.hi; ++segment)
          each_query_block(at.windows, segment, kQueryRows,
                           [&](Range q) { backward_block<T>(p, plan, at, {slot, segment, q}); });
      });
    }
    share(slots * chunks, [&](int64_t i) {
      const int64_t slot = i / chunks, lo = i % chunks * kPackRows;
      const Head at = head_of(p, begin + slot);
      for (int64_t r = lo; r < std::min(lo + kPackRows, at.direction->k_len); ++r) {
        // The packed queries carry scale * log2(e); d_k wants scale alone.
        store_row(row<T>(at.direction->d_k, at.batch, r, at.head), plan.packed(slot, 3) + r * plan.padded, plan.dim,
                  kLn2);
        store_row(row<T>(at.direction->d_v, at.batch, r, at.head), plan.packed(slot, 4) + r * plan.padded, plan.dim,
                  1.0f);
      }
    });
  }
}

}  // namespace

void attention_forward(const Attention& p) { p.is_bf16 ? forward<bf16>(p) : forward<float>(p); }

void attention_backward(const Attention& p) { p.is_bf16 ? backward<bf16>(p) : backward<float>(p); }

}  // namespace mmattn::MMATTN_ISA
