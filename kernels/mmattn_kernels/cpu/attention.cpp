// SPDX-License-Identifier: MIT
// Random-shift windowed attention, both directions, forward and backward:
//   O_i = softmax(scale * Q_i K_w^T) V_w,   w = the circular window of query segment i.
// Keys and values are packed once per (direction, batch, head); a window is one or two plain ranges of packed keys.
// Forward: a task owns up to kQueryRows queries of one segment and streams its window with an online softmax in base 2.
// Backward: the probabilities come back from the saved log-sum-exp; a task owns a run of query segments. Runs of one
// colour read disjoint keys, so colours are done one after the other and dK, dV need no atomics: every sum has one order.
#include <cmath>

#include "attention_plan.h"
#include "gemm.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kKeyBlock = 128, kKeyPanels = kKeyBlock / kLanes;

int64_t packed_floats(const Attention& p) {
  const int64_t longest = std::max(p.directions[0].k_len, p.directions[1].k_len);
  return round_up(longest, kLanes) * round_up(p.dim, kLanes);
}

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

template <class T>
struct Forward {
  static constexpr int64_t kQueryRows = 48, kRowUnit = 1;
  const Attention& p;
  const int64_t dim, padded, matrix;
  const Plan plan;

  explicit Forward(const Attention& p_)
      : p(p_),
        dim(p.dim),
        padded(round_up(dim, kLanes)),
        matrix(packed_floats(p)),
        plan(p, 2 * matrix, kQueryRows * (2 * padded + kKeyBlock + 3)) {}

  void pack(const Head& at, int64_t slot, int64_t lo) const {
    pack_panels<T>(plan.of_head(slot), at.direction->k, at, lo, dim);
    pack_rows<T>(plan.of_head(slot) + matrix, at.direction->v, at, lo, dim);
  }

  void block(const Head& at, const Task& task) const {
    const int64_t rows = task.queries.hi - task.queries.lo;
    const Direction& d = *at.direction;
    const float* keys = plan.of_head(task.slot);
    const float* values = keys + matrix;
    float* queries = plan.of_thread();
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
};

template <class T>
struct Backward {
  static constexpr int64_t kQueryRows = 48, kRowUnit = 1;
  const Attention& p;
  const int64_t dim, padded, matrix;
  const Plan plan;

  explicit Backward(const Attention& p_)
      : p(p_),
        dim(p.dim),
        padded(round_up(dim, kLanes)),
        matrix(packed_floats(p)),
        plan(p, 5 * matrix, kQueryRows * (3 * padded + 2 * kKeyBlock + 1)) {}

  void pack(const Head& at, int64_t slot, int64_t lo) const {
    float* packed = plan.of_head(slot);
    pack_panels<T>(packed, at.direction->k, at, lo, dim);
    pack_rows<T>(packed + matrix, at.direction->k, at, lo, dim);
    pack_panels<T>(packed + 2 * matrix, at.direction->v, at, lo, dim);
    const int64_t size = std::min(kPackRows, std::max<int64_t>(round_up(at.direction->k_len, kLanes) - lo, 0));
    for (const int64_t which : {3, 4})
      std::memset(packed + which * matrix + lo * padded, 0, size * padded * sizeof(float));
  }

  void unpack(const Head& at, int64_t slot, int64_t lo) const {
    const float* d_keys = plan.of_head(slot) + 3 * matrix;
    const float* d_values = d_keys + matrix;
    for (int64_t r = lo; r < std::min(lo + kPackRows, at.direction->k_len); ++r) {
      // The packed queries carry scale * log2(e); d_k wants scale alone.
      store_row(row<T>(at.direction->d_k, at.batch, r, at.head), d_keys + r * padded, dim, kLn2);
      store_row(row<T>(at.direction->d_v, at.batch, r, at.head), d_values + r * padded, dim, 1.0f);
    }
  }

  // One block of queries against its window: d_q of these queries, and their share of d_k and d_v of the window's keys.
  void block(const Head& at, const Task& task) const {
    const int64_t rows = task.queries.hi - task.queries.lo, vecs = padded / kLanes;
    const Direction& d = *at.direction;
    const float* key_panels = plan.of_head(task.slot);
    const float* key_rows = key_panels + matrix;
    const float* value_panels = key_rows + matrix;
    float* d_keys = plan.of_head(task.slot) + 3 * matrix;
    float* d_values = d_keys + matrix;
    float* queries = plan.of_thread();
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
};

}  // namespace

#if defined(__AMX_BF16__)
void attention_forward(const Attention& p) {
  p.is_bf16 ? run_forward<AmxForward<bf16>>(p) : run_forward<AmxForward<float>>(p);
}
void attention_backward(const Attention& p) {
  p.is_bf16 ? run_backward<AmxBackward<bf16>>(p) : run_backward<AmxBackward<float>>(p);
}
#else
void attention_forward(const Attention& p) { p.is_bf16 ? run_forward<Forward<bf16>>(p) : run_forward<Forward<float>>(p); }

void attention_backward(const Attention& p) {
  p.is_bf16 ? run_backward<Backward<bf16>>(p) : run_backward<Backward<float>>(p);
}
#endif

}  // namespace mmattn::MMATTN_ISA
