// SPDX-License-Identifier: MIT
// Windowed attention along one or more directions, forward and backward:
//   O_i = softmax(scale * Q_i K_w^T) V_w,   w = the circular window of query segment i.
// A thread takes a run of query blocks, packs the keys and values of all their windows once, and streams each block
// through its window in base 2 with an online softmax. Backward gets the probabilities back from the saved log-sum-exp;
// its runs share no key, so each owns its d_k and d_v: no atomics, and every sum has one order. Where a head is cut
// into several of them for want of other work, d_q is the sum of their shares, in their order.
#include <type_traits>

#include "attention_plan.h"
#include "gemm.h"
#if defined(__AVX512BF16__)
#include "attention_tiles.h"
#endif

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kKeyBlock = 128, kKeyPanels = kKeyBlock / kLanes;

// The keys of a run as panels [panel][channel][kLanes]; keys past the end are zero.
template <class T>
void pack_panels(float* panels, const Strided& s, const Run& run, int64_t dim) {
  float line[kLanes][kMaxDim];
  for (int64_t base = 0; base < run.ring; base += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      prefetch(run.key<T>(s, base + i + 2 * kLanes), dim);
      if (const T* key = run.key<T>(s, base + i))
        load_row(line[i], key, dim, round_up(dim, kLanes), 1.0f);
      else
        std::memset(line[i], 0, sizeof line[i]);
    }
    for (int64_t c = 0; c < dim; ++c)
      for (int i = 0; i < kLanes; ++i) panels[base * dim + c * kLanes + i] = line[i][c];
  }
}

// The keys of a run as rows, channels padded with zeros; rows past the end, up to a whole panel, are zero.
template <class T>
void pack_rows(float* rows, const Strided& s, const Run& run, int64_t dim) {
  const int64_t padded = round_up(dim, kLanes);
  for (int64_t i = 0; i < round_up(run.ring, kLanes); ++i) {
    prefetch(run.key<T>(s, i + 32), dim);
    if (const T* key = run.key<T>(s, i))
      load_row(rows + i * padded, key, dim, padded, 1.0f);
    else
      std::memset(rows + i * padded, 0, padded * sizeof(float));
  }
}

template <class T>
class Forward {
 public:
  using Element = T;
  static constexpr int64_t kQueryRows = 48, kRowUnit = 1;
  static constexpr bool kExclusive = false;
  static int64_t bytes_per_key(int64_t dim) { return 2 * round_up(dim, kLanes) * sizeof(float); }

  Forward(const Attention& p, int64_t longest, Scratch& scratch)
      : p_(p),
        dim_(p.dim),
        padded_(round_up(dim_, kLanes)),
        keys_(scratch.take(round_up(longest, kLanes) * dim_)),
        values_(scratch.take(round_up(longest, kLanes) * padded_)),
        scale_(p.scale),
        queries_(scratch.take(kQueryRows * padded_)),
        scores_(scratch.take(kQueryRows * kKeyBlock)),
        out_(scratch.take(kQueryRows * padded_)),
        top_(scratch.take(kQueryRows)),
        sum_(scratch.take(kQueryRows)),
        factor_(scratch.take(kQueryRows)) {}

  void run(const Run& run) const {
    pack_panels<T>(keys_, run.direction->k, run, dim_);
    pack_rows<T>(values_, run.direction->v, run, dim_);
    for (const QueryBlock* block = run.begin; block != run.end; ++block) attend(run, *block);
  }

 private:
  // Long, since one block's scores stay in the cache from product to product; a call in between has eight operands.
  void attend(const Run& run, const QueryBlock& block) const {
    const int64_t rows = block.queries.hi - block.queries.lo;
    const Direction& d = *run.direction;
    for (int64_t r = 0; r < rows; ++r)
      load_row(queries_ + r * padded_, row<T>(d.q, run.batch, block.queries.lo + r, run.head), dim_, padded_,
               scale_.of_queries);
    for (int64_t r = 0; r < kQueryRows; ++r) top_[r] = factor_[r] = kLowest, sum_[r] = 0;
    const Vec scale = broadcast(scale_.of_differences);

    bool is_first = true;
    run.each_key_range(block, [&](Range range) {
      each_key_block(range, kLanes, kKeyPanels, [&](int64_t panel, int64_t panels) {
        const int64_t lo = range.lo - panel * kLanes, hi = range.hi - panel * kLanes, last = (panels - 1) * kLanes;
        gemm<Init::zero>({rows,
                          panels,
                          dim_,
                          {queries_, padded_, 1},
                          {keys_ + panel * dim_ * kLanes, dim_ * kLanes, kLanes},
                          {scores_, kKeyBlock}});
        for (int64_t r = 0; r < rows; ++r) {
          float* s = scores_ + r * kKeyBlock;
          if (lo > 0) store(s, keep_lanes(load(s), lo, kLanes, kMasked));
          if (hi < last + kLanes) store(s + last, keep_lanes(load(s + last), 0, hi - last, kMasked));
          Vec most = load(s);
          for (int64_t v = 1; v < panels; ++v) most = max(most, load(s + v * kLanes));
          factor_[r] = std::max(top_[r], reduce_max(most));
        }
        for (int64_t r = 0; r < rows; r += kLanes) {
          const Vec new_top = load(factor_ + r), rescale = exp2((load(top_ + r) - new_top) * scale);
          store(top_ + r, new_top);
          store(factor_ + r, rescale);
          store(sum_ + r, load(sum_ + r) * rescale);
        }
        for (int64_t r = 0; r < rows; ++r) {
          float* s = scores_ + r * kKeyBlock;
          if (is_first) {
            prefetch(row<T>(d.out, run.batch, block.queries.lo + r, run.head), dim_);
            if (block.queries.hi + r < d.q_len) prefetch(row<T>(d.q, run.batch, block.queries.hi + r, run.head), dim_);
          }
          const Vec row_top = broadcast(top_[r]);
          Vec total{};
          for (int64_t v = 0; v < panels; ++v) {
            const Vec weight = exp2((load(s + v * kLanes) - row_top) * scale);
            store(s + v * kLanes, weight);
            total += weight;
          }
          sum_[r] += reduce_add(total);
        }
        const int64_t first = std::max<int64_t>(lo, 0), end = std::min(hi, panels * kLanes);
        const Gemm of_values{rows,
                             padded_ / kLanes,
                             end - first,
                             {scores_ + first, kKeyBlock, 1},
                             {values_ + (panel * kLanes + first) * padded_, kLanes, padded_},
                             {out_, padded_},
                             factor_};
        is_first ? gemm<Init::zero>(of_values) : gemm<Init::rescale>(of_values);
        is_first = false;
      });
    });
    double* lse = run.lse(block, p_.heads);
    for (int64_t r = 0; r < rows; ++r) {
      store_row(row<T>(d.out, run.batch, block.queries.lo + r, run.head), out_ + r * padded_, dim_, 1 / sum_[r]);
      lse[r] = log_sum_exp(top_[r], scale_.of_differences, sum_[r]);
    }
  }

  const Attention& p_;
  const int64_t dim_, padded_;
  float *const keys_, *const values_;
  const ScoreScale scale_;
  float *const queries_, *const scores_, *const out_;
  float *const top_, *const sum_, *const factor_;  // of each row: the maximum so far, the sum, the factor of the block
};

template <class T>
class Backward {
 public:
  using Element = T;
  static constexpr int64_t kQueryRows = 48, kRowUnit = 1;
  static constexpr bool kExclusive = true;
  static int64_t bytes_per_key(int64_t dim) { return 5 * round_up(dim, kLanes) * sizeof(float); }

  Backward(const Attention& p, int64_t longest, Scratch& scratch)
      : p_(p),
        dim_(p.dim),
        padded_(round_up(dim_, kLanes)),
        scale_(p.scale),
        key_panels_(scratch.take(round_up(longest, kLanes) * dim_)),
        key_rows_(scratch.take(round_up(longest, kLanes) * padded_)),
        value_panels_(scratch.take(round_up(longest, kLanes) * dim_)),
        d_keys_(scratch.take(longest * padded_)),
        d_values_(scratch.take(longest * padded_)),
        queries_(scratch.take(kQueryRows * padded_)),
        d_out_(scratch.take(kQueryRows * padded_)),
        d_queries_(scratch.take(kQueryRows * padded_)),
        weights_(scratch.take(kQueryRows * kKeyBlock)),
        d_scores_(scratch.take(kQueryRows * kKeyBlock)),
        delta_(scratch.take(kQueryRows)) {}

  void run(const Run& run) const {
    const Direction& d = *run.direction;
    pack_panels<T>(key_panels_, d.k, run, dim_);
    pack_rows<T>(key_rows_, d.k, run, dim_);
    pack_panels<T>(value_panels_, d.v, run, dim_);
    std::memset(d_keys_, 0, run.ring * padded_ * sizeof(float));
    std::memset(d_values_, 0, run.ring * padded_ * sizeof(float));
    for (const QueryBlock* block = run.begin; block != run.end; ++block) differentiate(run, *block);
    for (int64_t i = 0; i < run.ring; ++i) {
      // The packed queries carry a part of the scale already.
      store_row(run.key<T>(d.d_k, i), d_keys_ + i * padded_, dim_, scale_.of_differences * kLn2<float>);
      store_row(run.key<T>(d.d_v, i), d_values_ + i * padded_, dim_, 1.0f);
    }
  }

 private:
  // d_q of these queries, and their share of d_k and d_v of the window's keys. Long for the reason of `attend`.
  void differentiate(const Run& run, const QueryBlock& block) const {
    const int64_t rows = block.queries.hi - block.queries.lo, vecs = padded_ / kLanes;
    const Direction& d = *run.direction;
    const double* lse = run.lse(block, p_.heads);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = block.queries.lo + r;
      load_row(queries_ + r * padded_, row<T>(d.q, run.batch, position, run.head), dim_, padded_, scale_.of_queries);
      load_row(d_out_ + r * padded_, row<T>(d.d_out, run.batch, position, run.head), dim_, padded_, 1.0f);
      load_row(d_queries_ + r * padded_, row<T>(d.out, run.batch, position, run.head), dim_, padded_, 1.0f);
      Vec total{};
      for (int64_t v = 0; v < padded_; v += kLanes)
        total += load(d_out_ + r * padded_ + v) * load(d_queries_ + r * padded_ + v);
      delta_[r] = reduce_add(total) - run.d_lse(block, p_.heads, r);
    }
    std::memset(d_queries_, 0, rows * padded_ * sizeof(float));
    const Vec scale = broadcast(scale_.of_differences);

    run.each_key_range(block, [&](Range range) {
      each_key_block(range, kLanes, kKeyPanels, [&](int64_t panel, int64_t panels) {
        const int64_t first = panel * kLanes, lo = std::max<int64_t>(range.lo - first, 0);
        const int64_t hi = std::min(range.hi - first, panels * kLanes);
        const auto panel_product = [&](const float* of_rows, const float* of_keys, float* to) {
          gemm<Init::zero>({rows,
                            panels,
                            dim_,
                            {of_rows, padded_, 1},
                            {of_keys + first * dim_, dim_ * kLanes, kLanes},
                            {to, kKeyBlock}});
        };
        panel_product(queries_, key_panels_, weights_);
        panel_product(d_out_, value_panels_, d_scores_);
        for (int64_t r = 0; r < rows; ++r) {
          float* s = weights_ + r * kKeyBlock;
          float* ds = d_scores_ + r * kKeyBlock;
          const BinaryLse row_lse(lse[r] / scale_.of_differences);
          const Vec high = broadcast(row_lse.high), low = broadcast(row_lse.low), row_delta = broadcast(delta_[r]);
          for (int64_t v = 0; v < panels * kLanes; v += kLanes) {
            const Vec weight = exp2((load(s + v) - high - low) * scale);
            store(s + v, weight);
            store(ds + v, weight * (load(ds + v) - row_delta));
          }
        }
        const auto add_to_keys = [&](const float* scores, const float* of_rows, float* to) {
          gemm<Init::add>({hi - lo,
                           vecs,
                           rows,
                           {scores + lo, 1, kKeyBlock},
                           {of_rows, kLanes, padded_},
                           {to + (first + lo) * padded_, padded_}});
        };
        add_to_keys(weights_, d_out_, d_values_);
        add_to_keys(d_scores_, queries_, d_keys_);
        gemm<Init::add>({rows,
                         vecs,
                         hi - lo,
                         {d_scores_ + lo, kKeyBlock, 1},
                         {key_rows_ + (first + lo) * padded_, kLanes, padded_},
                         {d_queries_, padded_}});
      });
    });
    for (int64_t r = 0; r < rows; ++r) run.store_d_query<T>(block, r, d_queries_ + r * padded_, dim_, p_.scale);
  }

  const Attention& p_;
  const int64_t dim_, padded_;
  const ScoreScale scale_;
  float *const key_panels_, *const key_rows_, *const value_panels_, *const d_keys_, *const d_values_;
  float *const queries_, *const d_out_, *const d_queries_, *const weights_, *const d_scores_;
  float* const delta_;  // sum(d_out * out) - d_lse of each row
};

// A kernel as a value.
template <class K>
struct Use {
  using Kernel = K;
};

#if defined(__AVX512BF16__)
template <class T>
using LongForward = std::conditional_t<kOnTiles<T>, TileForward<T>, Forward<T>>;
template <class T>
using LongBackward = std::conditional_t<kOnTiles<T>, TileBackward<T>, Backward<T>>;
#else
template <class T>
using LongForward = Forward<T>;
template <class T>
using LongBackward = Backward<T>;
#endif

// The directions by their kernel, those of one together. Where every window of one fits a pair of tiles, packing would
// cost more than tiles save.
template <class T, template <class> class Short, template <class> class Long, class Visit>
void each_kernel(const Attention& p, Visit visit) {
  constexpr int64_t kFew = 32;
  Attention few = p, many = p;
  few.directions.clear();
  many.directions.clear();
  for (const Direction& d : p.directions) (Windows(p, d).longest <= kFew ? few : many).directions.push_back(d);
  if (!few.directions.empty()) visit(Use<Short<T>>{}, few);
  if (!many.directions.empty()) visit(Use<Long<T>>{}, many);
}

template <class Visit>
void each_forward(const Attention& p, Visit visit) {
  p.is_bf16 ? each_kernel<bf16, Forward, LongForward>(p, visit) : each_kernel<float, Forward, LongForward>(p, visit);
}

template <class Visit>
void each_backward(const Attention& p, Visit visit) {
  p.is_bf16 ? each_kernel<bf16, Backward, LongBackward>(p, visit)
            : each_kernel<float, Backward, LongBackward>(p, visit);
}

}  // namespace

void attention_forward(const Attention& p) {
  each_forward(p, [](auto use, const Attention& own) { run_all<typename decltype(use)::Kernel>(own); });
}

void attention_backward(const Attention& p) {
  each_backward(p, [](auto use, const Attention& own) { run_all<typename decltype(use)::Kernel>(own); });
}

void attention_work(const Attention& p, bool backward, const Work& work) {
  const auto visit = [&](auto use, const Attention& own) { tell_work<typename decltype(use)::Kernel>(own, work); };
  backward ? each_backward(p, visit) : each_forward(p, visit);
}

}  // namespace mmattn::MMATTN_ISA
