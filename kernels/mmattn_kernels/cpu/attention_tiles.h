// SPDX-License-Identifier: MIT
// Windowed attention on tiles: of bf16 and, with AMX, in three parts, of fp32 (see tiles.h).
#pragma once

#include "attention_plan.h"
#include "tiles.h"

namespace mmattn::MMATTN_ISA {
namespace {

// Operands with the channels as depth have 16 positions a block; those with the positions as depth, 32 a chunk.
template <int Parts>
Tiles tiles_by_position(float* memory, int64_t dim) {
  const int64_t chunks = (dim + 31) / 32;
  return {reinterpret_cast<char*>(memory), chunks * Parts * kTileBytes, chunks * kTileBytes, kTileBytes};
}

template <int Parts>
Tiles tiles_by_channel(float* memory, int64_t dim) {
  return {reinterpret_cast<char*>(memory), Parts * kTileBytes, kTileBytes, (dim + 15) / 16 * Parts * kTileBytes};
}

// Tiles of [rows, depth] of a fixed size, the parts of a tile side by side: 4 KB apart they would share cache sets.
template <int Parts>
Tiles tiles_by_row(float* memory, int64_t depth) {
  return {reinterpret_cast<char*>(memory), depth / 32 * Parts * kTileBytes, kTileBytes, Parts * kTileBytes};
}

Tiles from_block(const Tiles& t, int64_t block) {
  return {t.at(block, 0, 0), t.block, t.part, t.chunk};
}
Tiles from_chunk(const Tiles& t, int64_t chunk) {
  return {t.at(0, 0, chunk), t.block, t.part, t.chunk};
}

// Floats of an operand of `rows` x `depth`.
template <int Parts>
int64_t tile_floats(int64_t rows, int64_t depth) {
  return round_up(rows, 16) * round_up(depth, 32) * Parts / 2;
}

template <class T>
class TileForward {
 public:
  using Element = T;
  static constexpr int Parts = kParts<T>, kDegree = Parts == 1 ? 3 : 5;
  // Scores, weights and a block of keys or values fit the first-level cache together.
  static constexpr int64_t kQueryRows = 32, kRowUnit = 16, kKeyBlock = Parts == 1 ? 96 : 64;
  static constexpr bool kExclusive = false;
  static int64_t bytes_per_key(int64_t dim) { return 4 * round_up(dim, 16) * Parts; }

  TileForward(const Attention& p, int64_t longest, Scratch& scratch)
      : p_(p),
        dim_(p.dim),
        d_chunks_((dim_ + 31) / 32),
        d_blocks_((dim_ + 15) / 16),
        padded_(d_blocks_ * 16),
        score_scale_(p.scale * kLog2e<float>),
        sign_(p.scale < 0 ? -1.0f : 1.0f),
        keys_(tiles_by_position<Parts>(scratch.take(tile_floats<Parts>(round_up(longest, 32), dim_)), dim_)),
        values_(tiles_by_channel<Parts>(scratch.take(tile_floats<Parts>(dim_, longest)), dim_)),
        queries_(tiles_by_position<Parts>(scratch.take(tile_floats<Parts>(kQueryRows, dim_)), dim_)),
        weights_(tiles_by_row<Parts>(scratch.take(tile_floats<Parts>(kQueryRows, kKeyBlock)), kKeyBlock)),
        scores_(scratch.take(kQueryRows * kKeyBlock)),
        out_(scratch.take(kQueryRows * padded_)),
        top_(scratch.take(kQueryRows)),
        sums_(scratch.take(kQueryRows * 16)) {}

  void run(const Run& run) const {
    const TileRegisters registers;
    const Direction& d = *run.direction;
    for (int64_t i = 0; i < run.ring; i += 32) {
      for (int64_t j = i + 32; j < i + 64; ++j) prefetch(run.key<T>(d.k, j), dim_), prefetch(run.key<T>(d.v, j), dim_);
      for (const int64_t j : {i, i + 16})
        pack_rows_tiles<Parts, true>(keys_, j / 16, dim_, [&](int r) { return run.key<T>(d.k, j + r); });
      pack_depth_tiles<Parts, false>(values_, i / 32, dim_, [&](int r) { return run.key<T>(d.v, i + r); });
    }
    for (const QueryBlock* block = run.begin; block != run.end; ++block) attend(run, *block);
  }

 private:
  void attend(const Run& run, const QueryBlock& block) const {
    const Direction& d = *run.direction;
    const int64_t rows = block.queries.hi - block.queries.lo, row_blocks = (rows + 15) / 16;
    for (int64_t b = 0; b < row_blocks; ++b) {
      pack_rows_tiles<Parts, false>(queries_, b, dim_, [&](int r) -> const T* {
        const int64_t i = block.queries.lo + b * 16 + r;
        return i < block.queries.hi ? row<T>(d.q, run.batch, i, run.head) : nullptr;
      });
    }
    std::memset(sums_, 0, rows * 16 * sizeof(float));
    bool is_first = true;
    run.each_key_range(block, [&](Range range) {
      each_key_block(range, 32, kKeyBlock / 32, [&](int64_t chunk, int64_t chunks) {
        const Range keys{std::max<int64_t>(range.lo - chunk * 32, 0), std::min(range.hi - chunk * 32, chunks * 32)};
        tile_gemm<Parts>(row_blocks, keys.lo / 16, (keys.hi + 15) / 16, d_chunks_, queries_,
                         from_block(keys_, 2 * chunk), scores_, kKeyBlock, false);
        for (int64_t r = 0; r < rows; ++r) {
          if (is_first) {
            top_[r] = heaviest_score(keys, r);
            prefetch(row<T>(d.out, run.batch, block.queries.lo + r, run.head), dim_);
            if (block.queries.hi + r < d.q_len) prefetch(row<T>(d.q, run.batch, block.queries.hi + r, run.head), dim_);
          }
          Vec sum = weigh(keys, r);
          if (_mm512_cmp_ps_mask(sum, broadcast(kCeiling), _CMP_NLT_UQ)) {
            raise_top(keys, r);
            sum = weigh(keys, r);
          }
          store(sums_ + r * 16, sum);
        }
        tile_gemm<Parts>(row_blocks, 0, d_blocks_, chunks, weights_, from_chunk(values_, chunk), out_, padded_,
                         !is_first);
        is_first = false;
      });
    });
    double* lse = run.lse(block, p_.heads);
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = reduce_add(load(sums_ + r * 16));
      store_row(row<T>(d.out, run.batch, block.queries.lo + r, run.head), out_ + r * padded_, dim_, 1 / sum);
      lse[r] = log_sum_exp(top_[r], score_scale_, sum);
    }
  }

  // A row's weights are relative to the score that weighs most in its first block. Floating point does not mind greater
  // ones to come, so no block is searched for its maximum until a sum passes this.
  static constexpr float kCeiling = 1e12f;

  // The greatest score, or with a negative scale the least, as the products left it: scaled before it is taken off, a
  // large one is rounded by so much that its own weight is not 1, and rounded again to bf16.
  float heaviest_score(Range keys, int64_t r) const {
    const int64_t begin = keys.lo / 16, last = (keys.hi + 15) / 16 - 1;
    const float* scores = scores_ + r * kKeyBlock;
    const auto edge = [&](int64_t v) {
      return keep_lanes(load(scores + v * 16) * sign_, keys.lo - v * 16, keys.hi - v * 16, kLowest);
    };
    Vec most = max(edge(begin), edge(last));
    for (int64_t v = begin + 1; v < last; ++v) most = max(most, load(scores + v * 16) * sign_);
    return reduce_max(most) * sign_;
  }

  // The row's reference becomes the heaviest of its scores so far; its sum and its output shrink accordingly.
  void raise_top(Range keys, int64_t r) const {
    const float new_top = std::max(top_[r] * sign_, heaviest_score(keys, r) * sign_) * sign_;
    const float factor = std::exp2((top_[r] - new_top) * score_scale_);
    top_[r] = new_top;
    store(sums_ + r * 16, load(sums_ + r * 16) * factor);
    for (int64_t c = 0; c < padded_; c += 16) store(out_ + r * padded_ + c, load(out_ + r * padded_ + c) * factor);
  }

  // The scores of a row become weights in tiles; returns its sum so far, in 16 lanes.
  Vec weigh(Range keys, int64_t r) const {
    const int64_t begin = keys.lo / 16, end = (keys.hi + 15) / 16, part_stride = weights_.part;
    const int64_t first_partial = keys.lo % 16 ? begin : -1, last_partial = keys.hi % 16 ? end - 1 : end;
    const float* scores = scores_ + r * kKeyBlock;
    const Vec row_top = broadcast(top_[r]), scale = broadcast(score_scale_);
    char* tile = weights_.at(r / 16, 0, 0) + r % 16 * 64;
    Vec sum = load(sums_ + r * 16);
    const auto weight = [&](int64_t v) {
      const Vec w = exp2<kDegree>((load(scores + v * 16) - row_top) * scale);
      return v <= first_partial || v >= last_partial ? keep_lanes(w, keys.lo - v * 16, keys.hi - v * 16, 0) : w;
    };
    const auto emit = [&](Vec low, Vec high) {
      sum += low + high;
      __m512i word[Parts];
      split_words_positive(low, high, word);
      for (int part = 0; part < Parts; ++part) _mm512_store_si512(tile + part * part_stride, word[part]);
      tile += weights_.chunk;
    };
    int64_t v = 0;
    if (begin > 0) emit(Vec{}, weight(1)), v = 2;
    for (; v + 1 < end; v += 2) emit(weight(v), weight(v + 1));
    if (v < end) emit(weight(v), Vec{});
    return sum;
  }

  const Attention& p_;
  const int64_t dim_, d_chunks_, d_blocks_, padded_;
  const float score_scale_, sign_;
  const Tiles keys_, values_, queries_, weights_;
  float *const scores_, *const out_;
  float *const top_, *const sums_;  // of each row: what its weights are relative to, and their sum in 16 lanes
};

// Everything is computed transposed, keys down and queries across, so that the weights P^T come out as the first
// operand of dV = P^T dO and the log-sum-exp of 16 queries is one vector.
template <class T>
class TileBackward {
 public:
  using Element = T;
  static constexpr int64_t kQueryRows = 64, kRowUnit = 32, kKeyBlock = 128;
  static constexpr int Parts = kParts<T>, kDegree = Parts == 1 ? 3 : 5;
  static constexpr bool kExclusive = true;
  static int64_t bytes_per_key(int64_t dim) { return round_up(dim, 16) * (6 * Parts + 8); }

  TileBackward(const Attention& p, int64_t longest, Scratch& scratch)
      : p_(p),
        dim_(p.dim),
        d_chunks_((dim_ + 31) / 32),
        d_blocks_((dim_ + 15) / 16),
        padded_(d_blocks_ * 16),
        keys_(tiles_by_position<Parts>(scratch.take(tile_floats<Parts>(round_up(longest, 32), dim_)), dim_)),
        values_(tiles_by_position<Parts>(scratch.take(tile_floats<Parts>(round_up(longest, 32), dim_)), dim_)),
        keys_deep_(tiles_by_channel<Parts>(scratch.take(tile_floats<Parts>(dim_, longest)), dim_)),
        queries_(tiles_by_position<Parts>(scratch.take(tile_floats<Parts>(kQueryRows, dim_)), dim_)),
        d_out_(tiles_by_position<Parts>(scratch.take(tile_floats<Parts>(kQueryRows, dim_)), dim_)),
        queries_deep_(tiles_by_channel<Parts>(scratch.take(tile_floats<Parts>(dim_, kQueryRows)), dim_)),
        d_out_deep_(tiles_by_channel<Parts>(scratch.take(tile_floats<Parts>(dim_, kQueryRows)), dim_)),
        weights_(tiles_by_row<Parts>(scratch.take(tile_floats<Parts>(kKeyBlock, kQueryRows)), kQueryRows)),
        d_scores_(tiles_by_row<Parts>(scratch.take(tile_floats<Parts>(kKeyBlock, kQueryRows)), kQueryRows)),
        d_scores_deep_(tiles_by_row<Parts>(scratch.take(tile_floats<Parts>(kQueryRows, kKeyBlock)), kKeyBlock)),
        d_keys_(scratch.take(round_up(longest, 32) * padded_)),
        d_values_(scratch.take(round_up(longest, 32) * padded_)),
        score_(scratch.take(kQueryRows * kKeyBlock)),
        d_weight_(scratch.take(kQueryRows * kKeyBlock)),
        d_queries_(scratch.take(kQueryRows * padded_)),
        lse_(scratch.take(kQueryRows)),
        lse_rest_(scratch.take(kQueryRows)),
        delta_(scratch.take(kQueryRows)) {}

  void run(const Run& run) const {
    const TileRegisters registers;
    const Direction& d = *run.direction;
    for (int64_t i = 0; i < run.ring; i += 32) {
      for (int64_t j = i + 32; j < i + 64; ++j) prefetch(run.key<T>(d.k, j), dim_), prefetch(run.key<T>(d.v, j), dim_);
      for (const int64_t j : {i, i + 16}) {
        pack_rows_tiles<Parts, false>(keys_, j / 16, dim_, [&](int r) { return run.key<T>(d.k, j + r); });
        pack_rows_tiles<Parts, false>(values_, j / 16, dim_, [&](int r) { return run.key<T>(d.v, j + r); });
      }
      pack_depth_tiles<Parts, true>(keys_deep_, i / 32, dim_, [&](int r) { return run.key<T>(d.k, i + r); });
    }
    std::memset(d_keys_, 0, round_up(run.ring, 32) * padded_ * sizeof(float));
    std::memset(d_values_, 0, round_up(run.ring, 32) * padded_ * sizeof(float));
    for (const QueryBlock* block = run.begin; block != run.end; ++block) differentiate(run, *block);
    for (int64_t i = 0; i < run.ring; ++i) {
      store_row(run.key<T>(d.d_k, i), d_keys_ + i * padded_, dim_, p_.scale);
      store_row(run.key<T>(d.d_v, i), d_values_ + i * padded_, dim_, 1.0f);
    }
  }

 private:
  // d_q of these queries, and their share of d_k and d_v of the window's keys.
  void differentiate(const Run& run, const QueryBlock& block) const {
    const int64_t rows = block.queries.hi - block.queries.lo, q_chunks = (rows + 31) / 32, q_blocks = 2 * q_chunks;
    load_queries(run, block, q_chunks);
    bool is_first = true;
    int64_t next = block.queries.hi;
    run.each_key_range(block, [&](Range range) {
      each_key_block(range, 32, kKeyBlock / 32, [&](int64_t chunk, int64_t chunks) {
        for (const int64_t end = std::min(next + 16, run.direction->q_len); next < end; ++next)
          for (const Strided* s : {&run.direction->q, &run.direction->d_out, &run.direction->out})
            prefetch(row<T>(*s, run.batch, next, run.head), dim_);
        const int64_t k_blocks = 2 * chunks, first = chunk * 32 * padded_;
        // To the last bit the scores of forward, whose logarithm is subtracted.
        tile_gemm<Parts, true>(k_blocks, 0, q_blocks, d_chunks_, from_block(keys_, 2 * chunk), queries_, score_,
                               kQueryRows, false);
        tile_gemm<Parts>(k_blocks, 0, q_blocks, d_chunks_, from_block(values_, 2 * chunk), d_out_, d_weight_,
                         kQueryRows, false);
        softmax_gradient({range.lo - chunk * 32, range.hi - chunk * 32}, chunks, q_chunks);
        tile_gemm<Parts>(k_blocks, 0, d_blocks_, q_chunks, weights_, d_out_deep_, d_values_ + first, padded_, true);
        tile_gemm<Parts>(k_blocks, 0, d_blocks_, q_chunks, d_scores_, queries_deep_, d_keys_ + first, padded_, true);
        tile_gemm<Parts>(d_blocks_, 0, q_blocks, chunks, from_chunk(keys_deep_, chunk), d_scores_deep_, d_queries_,
                         kQueryRows, !is_first);
        is_first = false;
      });
    });
    for (int64_t b = 0; b < q_blocks; ++b) store_d_queries(run, block, b);
  }

  void load_queries(const Run& run, const QueryBlock& block, int64_t q_chunks) const {
    const Direction& d = *run.direction;
    const int64_t rows = block.queries.hi - block.queries.lo;
    const auto query = [&](const Strided& s, int64_t i) -> const T* {
      return i < rows ? row<T>(s, run.batch, block.queries.lo + i, run.head) : nullptr;
    };
    for (int64_t b = 0; b < 2 * q_chunks; ++b) {
      pack_rows_tiles<Parts, true>(queries_, b, dim_, [&](int r) { return query(d.q, b * 16 + r); });
      pack_rows_tiles<Parts, true>(d_out_, b, dim_, [&](int r) { return query(d.d_out, b * 16 + r); });
    }
    for (int64_t c = 0; c < q_chunks; ++c) {
      pack_depth_tiles<Parts, false>(queries_deep_, c, dim_, [&](int r) { return query(d.q, c * 32 + r); });
      pack_depth_tiles<Parts, false>(d_out_deep_, c, dim_, [&](int r) { return query(d.d_out, c * 32 + r); });
    }
    const double* lse = run.lse(block, p_.heads);
    for (int64_t r = 0; r < q_chunks * 32; ++r) {
      const BinaryLse row_lse(r < rows ? lse[r] : 1e30);  // the weights of padding are zero
      lse_[r] = row_lse.high;
      lse_rest_[r] = row_lse.low;
      Vec total{};
      for (int64_t c = 0; r < rows && c < dim_; c += 16)
        total += load_lanes(query(d.d_out, r) + c, dim_ - c) * load_lanes(query(d.out, r) + c, dim_ - c);
      delta_[r] = reduce_add(total) - (r < rows ? run.d_lse(block, p_.heads, r) : 0.0f);
    }
  }

  // P = exp2(S - lse) and dS = P (dP - delta) into tiles; keys outside the window are zero.
  void softmax_gradient(Range keys, int64_t chunks, int64_t q_chunks) const {
    const Vec scale = broadcast(p_.scale * kLog2e<float>);
    for (int64_t k = 0; k < chunks * 32; ++k) {
      const bool is_inside = k >= keys.lo && k < keys.hi;
      for (int64_t c = 0; c < q_chunks; ++c) {
        Vec weight[2] = {}, gradient[2] = {};
        const float* s = score_ + k * kQueryRows + c * 32;
        float* ds = d_weight_ + k * kQueryRows + c * 32;
        for (int half = 0; half < 2; ++half) {
          if (is_inside) {
            const int64_t q = c * 32 + half * 16;
            weight[half] = exp2<kDegree>(load(s + half * 16) * scale - load(lse_ + q) - load(lse_rest_ + q));
            gradient[half] = weight[half] * (load(ds + half * 16) - load(delta_ + q));
          }
          store(ds + half * 16, gradient[half]);
        }
        store_words<Parts>(weight[0], weight[1], weights_, k / 16, c, k % 16);
        store_words<Parts>(gradient[0], gradient[1], d_scores_, k / 16, c, k % 16);
      }
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < 16; ++i) {
        const float* low = d_weight_ + (chunk * 32 + i) * kQueryRows;
        for (int64_t b = 0; b < 2 * q_chunks; ++b)
          store_words<Parts>(load(low + b * 16), load(low + 16 * kQueryRows + b * 16), d_scores_deep_, b, chunk, i);
      }
  }

  void store_d_queries(const Run& run, const QueryBlock& block, int64_t b) const {  // from [channel][query]
    float line[16][kMaxDim];
    for (int64_t c = 0; c < padded_; c += 16) {
      __m512i words[16];
      for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(d_queries_ + (c + i) * kQueryRows + b * 16);
      transpose_words(words);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(line[i] + c, words[i]);
    }
    const int64_t rows = block.queries.hi - block.queries.lo;
    for (int i = 0; i < 16 && b * 16 + i < rows; ++i) run.store_d_query<T>(block, b * 16 + i, line[i], dim_, p_.scale);
  }

  const Attention& p_;
  const int64_t dim_, d_chunks_, d_blocks_, padded_;
  const Tiles keys_, values_, keys_deep_, queries_, d_out_, queries_deep_, d_out_deep_;
  const Tiles weights_, d_scores_, d_scores_deep_;  // P^T and dS^T as first operands, dS^T as a second one
  float *const d_keys_, *const d_values_, *const score_, *const d_weight_;
  float* const d_queries_;  // [channel][query]
  float *const lse_, *const lse_rest_, *const delta_;
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
