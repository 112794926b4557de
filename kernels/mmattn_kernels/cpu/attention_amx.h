// SPDX-License-Identifier: MIT
// Random-shift attention on AMX tiles, for bf16 and, in three parts, for fp32 (see amx.h).
#pragma once

#include <cmath>

#include "amx.h"
#include "attention_plan.h"

namespace mmattn::MMATTN_ISA {
namespace {

// op over the 16 lanes of each of 16 vectors: lane i of the result belongs to v[i].
template <class Op>
Vec reduce_rows(Vec (&v)[16], Op op) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
#pragma GCC unroll 4
  for (int width = 8; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i)
      v[i] = op((Vec)_mm512_permutex2var_ps(v[2 * i], even, v[2 * i + 1]),
                (Vec)_mm512_permutex2var_ps(v[2 * i], odd, v[2 * i + 1]));
  return v[0];
}

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

// Tiles of [rows, depth] of a fixed size, all chunks of a part together.
template <int Parts>
Tiles tiles_by_row(float* memory, int64_t depth) {
  return {reinterpret_cast<char*>(memory), depth / 32 * Parts * kTileBytes, depth / 32 * kTileBytes, kTileBytes};
}

Tiles from_block(const Tiles& t, int64_t block) { return {t.at(block, 0, 0), t.block, t.part, t.chunk}; }
Tiles from_chunk(const Tiles& t, int64_t chunk) { return {t.at(0, 0, chunk), t.block, t.part, t.chunk}; }

// Floats of an operand of `rows` x `depth`.
template <int Parts>
int64_t tile_floats(int64_t rows, int64_t depth) {
  return round_up(rows, 16) * round_up(depth, 32) * Parts / 2;
}

template <class T>
class AmxForward {
 public:
  static constexpr int64_t kQueryRows = 32, kRowUnit = 16, kKeyBlock = 128;
  static constexpr int Parts = kParts<T>, kDegree = Parts == 1 ? 3 : 5;
  static constexpr bool kExclusive = false;
  static int64_t bytes_per_key(int64_t dim) { return 4 * round_up(dim, 16) * Parts; }

  AmxForward(const Attention& p, int64_t longest, Scratch& scratch)
      : p_(p),
        dim_(p.dim),
        d_chunks_((dim_ + 31) / 32),
        d_blocks_((dim_ + 15) / 16),
        padded_(d_blocks_ * 16),
        score_scale_(std::abs(p.scale) * kLog2e),
        keys_(tiles_by_position<Parts>(scratch.take(tile_floats<Parts>(round_up(longest, 32), dim_)), dim_)),
        values_(tiles_by_channel<Parts>(scratch.take(tile_floats<Parts>(dim_, longest)), dim_)),
        queries_(tiles_by_position<Parts>(scratch.take(tile_floats<Parts>(kQueryRows, dim_)), dim_)),
        weights_{tiles_by_row<Parts>(scratch.take(tile_floats<Parts>(kQueryRows, kKeyBlock)), kKeyBlock),
                 tiles_by_row<Parts>(scratch.take(tile_floats<Parts>(kQueryRows, kKeyBlock)), kKeyBlock)},
        scores_{scratch.take(kQueryRows * kKeyBlock), scratch.take(kQueryRows * kKeyBlock)},
        out_(scratch.take(kQueryRows * padded_)),
        top_(scratch.take(kQueryRows)),
        sums_(scratch.take(kQueryRows * 16)),
        rescale_(scratch.take(kQueryRows)) {}

  void run(const Run& run) const {
    const TileRegisters registers;
    const Direction& d = *run.direction;
    for (int64_t i = 0; i < run.ring; i += 32) {
      for (const int64_t j : {i, i + 16})
        pack_rows_tiles<Parts>(keys_, j / 16, dim_, true, [&](int r) { return run.key<T>(d.k, j + r); });
      pack_depth_tiles<Parts>(values_, i / 32, dim_, false, [&](int r) { return run.key<T>(d.v, i + r); });
    }
    for (const QueryBlock* block = run.begin; block != run.end; ++block) attend(run, *block);
  }

 private:
  void attend(const Run& run, const QueryBlock& block) const {
    const Direction& d = *run.direction;
    const int64_t rows = block.queries.hi - block.queries.lo, row_blocks = (rows + 15) / 16;
    for (int64_t b = 0; b < row_blocks; ++b) {
      pack_rows_tiles<Parts>(queries_, b, dim_, false, [&](int r) -> const T* {
        const int64_t i = block.queries.lo + b * 16 + r;
        return i < block.queries.hi ? row<T>(d.q, run.batch, i, run.head) : nullptr;
      });
      store(top_ + b * 16, broadcast(kMasked));
    }
    std::memset(sums_, 0, rows * 16 * sizeof(float));
    std::vector<KeyBlock> blocks;
    run.each_key_range(block, [&](Range range) {
      each_key_block(range, 32, kKeyBlock / 32, [&](int64_t chunk, int64_t chunks) {
        blocks.push_back({chunk, chunks, std::max<int64_t>(range.lo - chunk * 32, 0),
                          std::min(range.hi - chunk * 32, chunks * 32)});
      });
    });
    // While the vector units turn the scores of a block into weights, the tile unit multiplies the weights of the block
    // before with their values, and the queries with the keys of the block after.
    const int64_t count = blocks.size();
    const auto scores_of = [&](int64_t i) {
      const KeyBlock& k = blocks[i];
      return SteppedProduct<Parts>(queries_, row_blocks, from_block(keys_, 2 * k.chunk), k.lo / 16, (k.hi + 15) / 16,
                                   d_chunks_, scores_[i % 2], kKeyBlock, false);
    };
    const auto outputs_of = [&](int64_t i) {
      return SteppedProduct<Parts>(weights_[i % 2], row_blocks, from_chunk(values_, blocks[i].chunk), 0, d_blocks_,
                                   blocks[i].chunks, out_, padded_, i > 0);
    };
    scores_of(0).advance(kAllSteps);
    for (int64_t i = 0; i < count; ++i) {
      SteppedProduct<Parts> before = i > 0 ? outputs_of(i - 1) : SteppedProduct<Parts>();
      SteppedProduct<Parts> after = i + 1 < count ? scores_of(i + 1) : SteppedProduct<Parts>();
      bool rises = false;
      for (int64_t b = 0; b < row_blocks; ++b)
        rises |= raise_top(blocks[i], scores_[i % 2], b, std::min<int64_t>(rows - b * 16, 16));
      const int64_t steps = before.steps() + after.steps();
      for (int64_t r = 0; r < rows; ++r) {
        weigh(blocks[i], scores_[i % 2] + r * kKeyBlock, weights_[i % 2], r);
        after.advance(before.advance(steps * (r + 1) / rows - steps * r / rows));
      }
      after.advance(before.advance(kAllSteps));
      if (i > 0 && rises) rescale_outputs(rows);
    }
    outputs_of(count - 1).advance(kAllSteps);
    float* lse = run.lse(block, p_.heads);
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = reduce_add(load(sums_ + r * 16));
      store_row(row<T>(d.out, run.batch, block.queries.lo + r, run.head), out_ + r * padded_, dim_, 1 / sum);
      lse[r] = (top_[r] + std::log2(sum)) * kLn2;
    }
  }

  struct KeyBlock {
    int64_t chunk, chunks, lo, hi;  // 32 keys a chunk; of those the window holds [lo, hi)
  };

  // Masks the scores of row block b. A row's reference rises to the maximum only once that is 2^kHeadroom above it, which
  // floating point does not mind and which spares nearly all rescaling; then its sum so far shrinks. Whether any rose.
  static constexpr float kHeadroom = 8;
  bool raise_top(const KeyBlock& keys, float* block_scores, int64_t b, int64_t rows) const {
    const int64_t begin = keys.lo / 16, end = (keys.hi + 15) / 16;
    const bool is_partial = keys.lo > begin * 16 || keys.hi < end * 16;
    const float sign = p_.scale < 0 ? -1.0f : 1.0f;  // so that the greatest score is the greatest weight
    Vec most[16];
    for (int64_t r = 0; r < 16; ++r) {
      most[r] = broadcast(kMasked);
      if (r >= rows) continue;
      float* s = block_scores + (b * 16 + r) * kKeyBlock;
      if (is_partial || sign < 0)
        for (int64_t v = begin; v < end; ++v)
          store(s + v * 16, keep_lanes(load(s + v * 16) * sign, keys.lo - v * 16, keys.hi - v * 16, kMasked));
      Vec m = load(s + begin * 16);
      for (int64_t v = begin + 1; v < end; ++v) m = max(m, load(s + v * 16));
      most[r] = m;
    }
    const Vec block_top = reduce_rows(most, [](Vec x, Vec y) { return max(x, y); }) * score_scale_;
    const Vec old_top = load(top_ + b * 16);
    const __mmask16 rises = _mm512_cmp_ps_mask(block_top, old_top + kHeadroom, _CMP_GT_OQ);
    const Vec rescale = _mm512_mask_blend_ps(rises, broadcast(1.0f), exp2(old_top - block_top));
    store(top_ + b * 16, _mm512_mask_blend_ps(rises, old_top, block_top));
    store(rescale_ + b * 16, rescale);
    for (int64_t r = 0; rises && r < rows; ++r) {
      float* sum = sums_ + (b * 16 + r) * 16;
      store(sum, load(sum) * rescale_[b * 16 + r]);
    }
    return rises;
  }

  // The scores of a row become weights in tiles.
  void weigh(const KeyBlock& keys, const float* scores, const Tiles& weights, int64_t r) const {
    const int64_t begin = keys.lo / 16, end = (keys.hi + 15) / 16;
    const Vec row_top = broadcast(top_[r]), scale = broadcast(score_scale_);
    char* tile = weights.at(r / 16, 0, 0) + r % 16 * 64;
    const int64_t part_stride = weights.part;
    Vec total = load(sums_ + r * 16);
    const auto emit = [&](Vec low, Vec high) {
      total += low + high;
      __m512i word[Parts];
      split_words_positive(low, high, word);
      for (int part = 0; part < Parts; ++part) _mm512_store_si512(tile + part * part_stride, word[part]);
      tile += kTileBytes;
    };
    const auto weight = [&](int64_t v) { return exp2<kDegree>(load(scores + v * 16) * scale - row_top); };
    int64_t v = 0;
    if (begin > 0) emit(Vec{}, weight(1)), v = 2;
    for (; v + 1 < end; v += 2) emit(weight(v), weight(v + 1));
    if (v < end) emit(weight(v), Vec{});
    store(sums_ + r * 16, total);
  }

  void rescale_outputs(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (rescale_[r] == 1.0f) continue;
      for (int64_t c = 0; c < padded_; c += 16) store(out_ + r * padded_ + c, load(out_ + r * padded_ + c) * rescale_[r]);
    }
  }

  const Attention& p_;
  const int64_t dim_, d_chunks_, d_blocks_, padded_;
  const float score_scale_;
  const Tiles keys_, values_, queries_, weights_[2];
  float *const scores_[2], *const out_;
  float *const top_, *const sums_, *const rescale_;  // of each row: the maximum so far, the sum in 16 lanes, the last factor
};

// Everything is computed transposed, keys down and queries across, so that the weights P^T come out as the first operand
// of dV = P^T dO and the log-sum-exp of 16 queries is one vector.
template <class T>
class AmxBackward {
 public:
  static constexpr int64_t kQueryRows = 64, kRowUnit = 32, kKeyBlock = 128;
  static constexpr int Parts = kParts<T>, kDegree = Parts == 1 ? 3 : 5;
  static constexpr bool kExclusive = true;
  static int64_t bytes_per_key(int64_t dim) { return round_up(dim, 16) * (6 * Parts + 8); }

  AmxBackward(const Attention& p, int64_t longest, Scratch& scratch)
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
        delta_(scratch.take(kQueryRows)) {}

  void run(const Run& run) const {
    const TileRegisters registers;
    const Direction& d = *run.direction;
    for (int64_t i = 0; i < run.ring; i += 32) {
      for (const int64_t j : {i, i + 16}) {
        pack_rows_tiles<Parts>(keys_, j / 16, dim_, false, [&](int r) { return run.key<T>(d.k, j + r); });
        pack_rows_tiles<Parts>(values_, j / 16, dim_, false, [&](int r) { return run.key<T>(d.v, j + r); });
      }
      pack_depth_tiles<Parts>(keys_deep_, i / 32, dim_, true, [&](int r) { return run.key<T>(d.k, i + r); });
    }
    std::memset(d_keys_, 0, round_up(run.ring, 32) * padded_ * sizeof(float));
    std::memset(d_values_, 0, round_up(run.ring, 32) * padded_ * sizeof(float));
    for (const QueryBlock* block = run.begin; block != run.end; ++block) differentiate(run, *block);
    for (int64_t i = 0; i < run.ring; ++i) {
      store_row(run.key<T>(d.d_k, i), d_keys_ + i * padded_, dim_, p_.scale);
      store_row(run.key<T>(d.d_v, i), d_values_ + i * padded_, dim_, 1.0f);
    }
    zero_unread<T>(run, dim_);
  }

 private:
  // d_q of these queries, and their share of d_k and d_v of the window's keys.
  void differentiate(const Run& run, const QueryBlock& block) const {
    const int64_t rows = block.queries.hi - block.queries.lo, q_chunks = (rows + 31) / 32, q_blocks = 2 * q_chunks;
    load_queries(run, block, q_chunks);
    bool is_first = true;
    run.each_key_range(block, [&](Range range) {
      each_key_block(range, 32, kKeyBlock / 32, [&](int64_t chunk, int64_t chunks) {
        const int64_t k_blocks = 2 * chunks, first = chunk * 32 * padded_;
        tile_gemm<Parts>(k_blocks, 0, q_blocks, d_chunks_, from_block(keys_, 2 * chunk), queries_, score_, kQueryRows, false);
        tile_gemm<Parts>(k_blocks, 0, q_blocks, d_chunks_, from_block(values_, 2 * chunk), d_out_, d_weight_, kQueryRows,
                         false);
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
      pack_rows_tiles<Parts>(queries_, b, dim_, true, [&](int r) { return query(d.q, b * 16 + r); });
      pack_rows_tiles<Parts>(d_out_, b, dim_, true, [&](int r) { return query(d.d_out, b * 16 + r); });
    }
    for (int64_t c = 0; c < q_chunks; ++c) {
      pack_depth_tiles<Parts>(queries_deep_, c, dim_, false, [&](int r) { return query(d.q, c * 32 + r); });
      pack_depth_tiles<Parts>(d_out_deep_, c, dim_, false, [&](int r) { return query(d.d_out, c * 32 + r); });
    }
    const float* lse = run.lse(block, p_.heads);
    for (int64_t r = 0; r < q_chunks * 32; ++r) {
      lse_[r] = r < rows ? lse[r] * kLog2e : -kMasked;  // the weights of padding are zero
      Vec total{};
      for (int64_t c = 0; r < rows && c < dim_; c += 16)
        total += load_lanes(query(d.d_out, r) + c, dim_ - c) * load_lanes(query(d.out, r) + c, dim_ - c);
      delta_[r] = reduce_add(total);
    }
  }

  // P = exp2(S - lse) and dS = P (dP - delta) into tiles; keys outside the window are zero.
  void softmax_gradient(Range keys, int64_t chunks, int64_t q_chunks) const {
    const Vec scale = broadcast(p_.scale * kLog2e);
    for (int64_t k = 0; k < chunks * 32; ++k) {
      const bool is_inside = k >= keys.lo && k < keys.hi;
      for (int64_t c = 0; c < q_chunks; ++c) {
        Vec weight[2] = {}, gradient[2] = {};
        const float* s = score_ + k * kQueryRows + c * 32;
        float* ds = d_weight_ + k * kQueryRows + c * 32;
        for (int half = 0; half < 2; ++half) {
          if (is_inside) {
            const int64_t q = c * 32 + half * 16;
            weight[half] = exp2<kDegree>(load(s + half * 16) * scale - load(lse_ + q));
            gradient[half] = weight[half] * (load(ds + half * 16) - load(delta_ + q));
          }
          store(ds + half * 16, gradient[half]);
        }
        store_words<Parts>(weight[0], weight[1], weights_, k / 16, c, k % 16);
        store_words<Parts>(gradient[0], gradient[1], d_scores_, k / 16, c, k % 16);
      }
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      pack_depth_tiles<Parts>(d_scores_deep_, chunk, q_chunks * 32, false,
                              [&](int r) -> const float* { return d_weight_ + (chunk * 32 + r) * kQueryRows; });
  }

  void store_d_queries(const Run& run, const QueryBlock& block, int64_t b) const {  // from [channel][query]
    float line[16][kMaxDim];
    for (int64_t c = 0; c < padded_; c += 16) {
      __m512i words[16];
      for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(d_queries_ + (c + i) * kQueryRows + b * 16);
      transpose_words(words);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(line[i] + c, words[i]);
    }
    const int64_t first = block.queries.lo + b * 16;
    for (int i = 0; i < 16 && first + i < block.queries.hi; ++i)
      store_row(row<T>(run.direction->d_q, run.batch, first + i, run.head), line[i], dim_, p_.scale);
  }

  const Attention& p_;
  const int64_t dim_, d_chunks_, d_blocks_, padded_;
  const Tiles keys_, values_, keys_deep_, queries_, d_out_, queries_deep_, d_out_deep_;
  const Tiles weights_, d_scores_, d_scores_deep_;  // P^T and dS^T as first operands, dS^T as a second one
  float *const d_keys_, *const d_values_, *const score_, *const d_weight_;
  float* const d_queries_;  // [channel][query]
  float *const lse_, *const delta_;
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
