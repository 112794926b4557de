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

Vec add(Vec a, Vec b) { return a + b; }

template <class T>
struct AmxForward {
  static constexpr int64_t kQueryRows = 64, kRowUnit = 16, kKeyBlock = 128;
  static constexpr int kDegree = std::is_same_v<T, float> ? 5 : 3;
  static constexpr int Parts = kParts<T>;
  const Attention& p;
  const int64_t dim, d_chunks, d_blocks, padded, k_rows, key_floats, value_floats;
  const float score_scale;  // positive; a negative scale flips the sign of the queries instead
  const Plan plan;

  explicit AmxForward(const Attention& p_)
      : p(p_),
        dim(p.dim),
        d_chunks((dim + 31) / 32),
        d_blocks((dim + 15) / 16),
        padded(d_blocks * 16),
        k_rows(round_up(std::max(p.directions[0].k_len, p.directions[1].k_len), 32)),
        key_floats(k_rows / 16 * d_chunks * Parts * kTileBytes / 4),
        value_floats(k_rows / 32 * d_blocks * Parts * kTileBytes / 4),
        score_scale(std::abs(p.scale) * kLog2e),
        plan(p, key_floats + value_floats,
             kQueryRows * (d_chunks * 16 * Parts + kKeyBlock + kKeyBlock / 2 * Parts + padded + 3)) {}

  Tiles keys(int64_t slot) const {
    return {reinterpret_cast<char*>(plan.of_head(slot)), d_chunks * Parts * kTileBytes, d_chunks * kTileBytes, kTileBytes};
  }
  Tiles values(int64_t slot) const {
    return {reinterpret_cast<char*>(plan.of_head(slot) + key_floats), Parts * kTileBytes, kTileBytes,
            d_blocks * Parts * kTileBytes};
  }

  void pack(const Head& at, int64_t slot, int64_t lo) const {
    const Direction& d = *at.direction;
    const auto pointer = [&](const Strided& s, int64_t i) -> const T* {
      return i < d.k_len ? row<T>(s, at.batch, i, at.head) : nullptr;
    };
    for (int64_t i = lo; i < std::min(lo + kPackRows, round_up(d.k_len, 32)); i += 32) {
      for (const int64_t j : {i, i + 16})
        pack_rows_tiles<Parts>(keys(slot), j / 16, dim, true, [&](int r) { return pointer(d.k, j + r); });
      pack_depth_tiles<Parts>(values(slot), i / 32, dim, false, [&](int r) { return pointer(d.v, i + r); });
    }
  }

  void block(const Head& at, const Task& task) const {
    const TileRegisters registers;
    const Direction& d = *at.direction;
    const int64_t rows = task.queries.hi - task.queries.lo, row_blocks = (rows + 15) / 16;
    const Tiles keys = this->keys(task.slot), values = this->values(task.slot);
    float* scratch = plan.of_thread();
    const Tiles queries{reinterpret_cast<char*>(scratch), d_chunks * Parts * kTileBytes, d_chunks * kTileBytes, kTileBytes};
    scratch += kQueryRows * d_chunks * 16 * Parts;
    const Tiles weights{reinterpret_cast<char*>(scratch), kKeyBlock / 32 * Parts * kTileBytes, kKeyBlock / 32 * kTileBytes,
                        kTileBytes};
    scratch += kQueryRows * kKeyBlock / 2 * Parts;
    float* scores = scratch;
    float* out = scores + kQueryRows * kKeyBlock;
    float* top = out + kQueryRows * padded;
    float* sum = top + kQueryRows;
    for (int64_t b = 0; b < row_blocks; ++b) {
      pack_rows_tiles<Parts>(queries, b, dim, false, [&](int r) -> const T* {
        const int64_t i = task.queries.lo + b * 16 + r;
        return i < task.queries.hi ? row<T>(d.q, at.batch, i, at.head) : nullptr;
      });
      store(top + b * 16, broadcast(kMasked));
      store(sum + b * 16, Vec{});
    }
    const float flip = p.scale < 0 ? -1.0f : 1.0f;
    bool first_block = true;
    at.windows.each_key_range(task.segment, [&](Range range) {
      each_key_block(range, 32, kKeyBlock / 32, [&](int64_t chunk, int64_t chunks) {
        const int64_t lo = std::max<int64_t>(range.lo - chunk * 32, 0), hi = std::min(range.hi - chunk * 32, chunks * 32);
        tile_gemm<Parts>(row_blocks, lo / 16, (hi + 15) / 16, d_chunks, queries,
                         {keys.at(chunk * 2, 0, 0), keys.block, keys.part, keys.chunk}, scores, kKeyBlock, false);
        for (int64_t b = 0; b < row_blocks; ++b)
          softmax_rows(scores + b * 16 * kKeyBlock, std::min<int64_t>(rows - b * 16, 16), lo, hi, chunks * 2, flip,
                       top + b * 16, sum + b * 16, out + b * 16 * padded, first_block,
                       {weights.at(b, 0, 0), 0, weights.part, weights.chunk});
        tile_gemm<Parts>(row_blocks, 0, d_blocks, chunks, weights,
                         {values.at(0, 0, chunk), values.block, values.part, values.chunk}, out, padded, !first_block);
        first_block = false;
      });
    });
    float* lse = d.lse + (at.batch * p.heads + at.head) * d.q_len + task.queries.lo;
    for (int64_t r = 0; r < rows; ++r) {
      store_row(row<T>(d.out, at.batch, task.queries.lo + r, at.head), out + r * padded, dim, 1 / sum[r]);
      lse[r] = (top[r] + std::log2(sum[r])) * kLn2;
    }
  }

  // Scores of up to 16 rows become weights in tiles; top and sum move on, and `out` is rescaled where top rose.
  void softmax_rows(float* scores, int64_t rows, int64_t lo, int64_t hi, int64_t panels, float flip, float* top, float* sum,
                    float* out, bool first_block, const Tiles& weights) const {
    const int64_t begin = lo / 16, end = (hi + 15) / 16;
    Vec most[16], total[16];
    for (int r = 0; r < 16; ++r) {
      most[r] = broadcast(kMasked);
      if (r >= rows) continue;
      float* s = scores + r * kKeyBlock;
      if (lo > begin * 16 || hi < end * 16 || flip < 0) {
        for (int64_t v = begin; v < end; ++v)
          store(s + v * 16, keep_lanes(load(s + v * 16) * flip, lo - v * 16, hi - v * 16, kMasked));
      }
      Vec m = load(s + begin * 16);
      for (int64_t v = begin + 1; v < end; ++v) m = max(m, load(s + v * 16));
      most[r] = m;
    }
    const Vec old_top = load(top), new_top = max(old_top, reduce_rows(most, [](Vec a, Vec b) { return max(a, b); }) * score_scale);
    const Vec rescale = exp2(old_top - new_top);
    store(top, new_top);
    for (int r = 0; r < 16; ++r) {
      total[r] = Vec{};
      if (r >= rows) continue;
      const float* s = scores + r * kKeyBlock;
      const Vec row_top = broadcast(top[r]), scale = broadcast(score_scale);
      for (int64_t v = 0; v < panels; v += 2) {
        const Vec low = v < begin ? Vec{} : exp2<kDegree>(load(s + v * 16) * scale - row_top);
        const Vec high = v + 1 >= end ? Vec{} : exp2<kDegree>(load(s + v * 16 + 16) * scale - row_top);
        total[r] += low + high;
        __m512i word[Parts];
        split_words<Parts>(low, high, word);
        for (int part = 0; part < Parts; ++part) _mm512_store_si512(weights.at(0, part, v / 2) + r * 64, word[part]);
      }
    }
    store(sum, load(sum) * rescale + reduce_rows(total, add));
    if (first_block || _mm512_cmp_ps_mask(rescale, broadcast(1.0f), _CMP_NEQ_UQ) == 0) return;
    for (int r = 0; r < rows; ++r) {
      const Vec row_factor = broadcast(rescale[r]);
      for (int64_t c = 0; c < padded; c += 16) store(out + r * padded + c, load(out + r * padded + c) * row_factor);
    }
  }
};

// Everything is computed transposed, keys down and queries across, so that the weights P^T come out as the first operand
// of dV = P^T dO and the log-sum-exp of 16 queries is one vector.
template <class T>
struct AmxBackward {
  static constexpr int64_t kQueryRows = 64, kRowUnit = 32, kKeyBlock = 128;
  static constexpr int64_t kQueryChunks = kQueryRows / 32, kKeyChunks = kKeyBlock / 32;
  static constexpr int Parts = kParts<T>;
  const Attention& p;
  const int64_t dim, d_chunks, d_blocks, padded, k_rows, row_floats, depth_floats;
  const Plan plan;

  explicit AmxBackward(const Attention& p_)
      : p(p_),
        dim(p.dim),
        d_chunks((dim + 31) / 32),
        d_blocks((dim + 15) / 16),
        padded(d_blocks * 16),
        k_rows(round_up(std::max(p.directions[0].k_len, p.directions[1].k_len), 32)),
        row_floats(k_rows / 16 * d_chunks * Parts * kTileBytes / 4),
        depth_floats(k_rows / 32 * d_blocks * Parts * kTileBytes / 4),
        plan(p, 2 * row_floats + depth_floats + 2 * k_rows * padded,
             kQueryRows * (2 * d_chunks * 16 * Parts + 2 * padded / 2 * Parts) + kQueryRows * kKeyBlock * 2 +
                 3 * kQueryRows * kKeyBlock / 2 * Parts + (kQueryRows + kKeyBlock) * padded + 2 * kQueryRows) {}

  // Operands with the channels as depth have 16 positions a block; those with the positions as depth, 32 a chunk.
  Tiles by_rows(float* memory) const {
    return {reinterpret_cast<char*>(memory), d_chunks * Parts * kTileBytes, d_chunks * kTileBytes, kTileBytes};
  }
  Tiles by_depth(float* memory) const {
    return {reinterpret_cast<char*>(memory), Parts * kTileBytes, kTileBytes, d_blocks * Parts * kTileBytes};
  }
  Tiles key_rows(int64_t slot) const { return by_rows(plan.of_head(slot)); }
  Tiles value_rows(int64_t slot) const { return by_rows(plan.of_head(slot) + row_floats); }
  Tiles key_depth(int64_t slot) const { return by_depth(plan.of_head(slot) + 2 * row_floats); }
  float* d_keys(int64_t slot) const { return plan.of_head(slot) + 2 * row_floats + depth_floats; }
  float* d_values(int64_t slot) const { return d_keys(slot) + k_rows * padded; }

  void pack(const Head& at, int64_t slot, int64_t lo) const {
    const Direction& d = *at.direction;
    const int64_t end = std::min(lo + kPackRows, round_up(d.k_len, 32));
    const auto pointer = [&](const Strided& s, int64_t i) -> const T* {
      return i < d.k_len ? row<T>(s, at.batch, i, at.head) : nullptr;
    };
    for (int64_t i = lo; i < end; i += 32) {
      for (const int64_t j : {i, i + 16}) {
        pack_rows_tiles<Parts>(key_rows(slot), j / 16, dim, false, [&](int r) { return pointer(d.k, j + r); });
        pack_rows_tiles<Parts>(value_rows(slot), j / 16, dim, false, [&](int r) { return pointer(d.v, j + r); });
      }
      pack_depth_tiles<Parts>(key_depth(slot), i / 32, dim, true, [&](int r) { return pointer(d.k, i + r); });
    }
    for (int64_t r = lo; r < end; ++r)
      for (float* gradient : {d_keys(slot), d_values(slot)})
        std::memset(gradient + r * padded, 0, padded * sizeof(float));
  }

  void unpack(const Head& at, int64_t slot, int64_t lo) const {
    for (int64_t r = lo; r < std::min(lo + kPackRows, at.direction->k_len); ++r) {
      store_row(row<T>(at.direction->d_k, at.batch, r, at.head), d_keys(slot) + r * padded, dim, p.scale);
      store_row(row<T>(at.direction->d_v, at.batch, r, at.head), d_values(slot) + r * padded, dim, 1.0f);
    }
  }

  void block(const Head& at, const Task& task) const {
    const TileRegisters registers;
    const Direction& d = *at.direction;
    const int64_t rows = task.queries.hi - task.queries.lo, q_chunks = (rows + 31) / 32, q_blocks = 2 * q_chunks;
    float* scratch = plan.of_thread();
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    const Tiles queries = by_rows(take(kQueryRows * d_chunks * 16 * Parts));
    const Tiles d_out = by_rows(take(kQueryRows * d_chunks * 16 * Parts));
    const Tiles query_depth = by_depth(take(kQueryRows * padded / 2 * Parts));
    const Tiles d_out_depth = by_depth(take(kQueryRows * padded / 2 * Parts));
    // P^T and dS^T as first operands (depth: queries) and dS^T as a second one (depth: keys).
    const auto by_query = [&] {
      return Tiles{reinterpret_cast<char*>(take(kQueryRows * kKeyBlock / 2 * Parts)), kQueryChunks * Parts * kTileBytes,
                   kQueryChunks * kTileBytes, kTileBytes};
    };
    const Tiles weights = by_query(), d_scores = by_query();
    const Tiles d_scores_depth{reinterpret_cast<char*>(take(kQueryRows * kKeyBlock / 2 * Parts)),
                               kKeyChunks * Parts * kTileBytes, kKeyChunks * kTileBytes, kTileBytes};
    float* score = take(kQueryRows * kKeyBlock);
    float* d_weight = take(kQueryRows * kKeyBlock);
    float* d_queries = take(kQueryRows * padded);  // [channel][query]
    float* partial = take(kKeyBlock * padded);
    float* lse = take(kQueryRows);
    float* delta = take(kQueryRows);

    const auto pointer = [&](const Strided& s, int64_t i) -> const T* {
      return i < rows ? row<T>(s, at.batch, task.queries.lo + i, at.head) : nullptr;
    };
    for (int64_t b = 0; b < q_blocks; ++b) {
      pack_rows_tiles<Parts>(queries, b, dim, true, [&](int r) { return pointer(d.q, b * 16 + r); });
      pack_rows_tiles<Parts>(d_out, b, dim, true, [&](int r) { return pointer(d.d_out, b * 16 + r); });
    }
    for (int64_t c = 0; c < q_chunks; ++c) {
      pack_depth_tiles<Parts>(query_depth, c, dim, false, [&](int r) { return pointer(d.q, c * 32 + r); });
      pack_depth_tiles<Parts>(d_out_depth, c, dim, false, [&](int r) { return pointer(d.d_out, c * 32 + r); });
    }
    const float* saved_lse = d.lse + (at.batch * p.heads + at.head) * d.q_len + task.queries.lo;
    for (int64_t r = 0; r < q_blocks * 16; ++r) {
      lse[r] = r < rows ? saved_lse[r] * kLog2e : -kMasked;  // the weights of padding are 2^-1e30
      Vec total{};
      for (int64_t c = 0; r < rows && c < dim; c += 16)
        total += load_lanes(pointer(d.d_out, r) + c, dim - c) * load_lanes(pointer(d.out, r) + c, dim - c);
      delta[r] = reduce_add(total);
    }

    bool first_block = true;
    at.windows.each_key_range(task.segment, [&](Range range) {
      each_key_block(range, 32, kKeyChunks, [&](int64_t chunk, int64_t chunks) {
        const int64_t lo = std::max<int64_t>(range.lo - chunk * 32, 0), hi = std::min(range.hi - chunk * 32, chunks * 32);
        const int64_t k_blocks = 2 * chunks;
        const Tiles k = key_rows(task.slot), v = value_rows(task.slot), k_depth = key_depth(task.slot);
        tile_gemm<Parts>(k_blocks, 0, q_blocks, d_chunks, {k.at(2 * chunk, 0, 0), k.block, k.part, k.chunk}, queries,
                         score, kQueryRows, false);
        tile_gemm<Parts>(k_blocks, 0, q_blocks, d_chunks, {v.at(2 * chunk, 0, 0), v.block, v.part, v.chunk}, d_out,
                         d_weight, kQueryRows, false);
        softmax_gradient(score, d_weight, lse, delta, lo, hi, chunks, q_chunks, weights, d_scores, d_scores_depth);
        accumulate(d_values(task.slot) + chunk * 32 * padded, weights, d_out_depth, lo, hi, k_blocks, q_chunks, partial);
        accumulate(d_keys(task.slot) + chunk * 32 * padded, d_scores, query_depth, lo, hi, k_blocks, q_chunks, partial);
        tile_gemm<Parts>(d_blocks, 0, q_blocks, chunks, {k_depth.at(0, 0, chunk), k_depth.block, k_depth.part, k_depth.chunk},
                         d_scores_depth, d_queries, kQueryRows, !first_block);
        first_block = false;
      });
    });
    float line[kMaxDim];
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < dim; ++c) line[c] = d_queries[c * kQueryRows + r];
      store_row(row<T>(d.d_q, at.batch, task.queries.lo + r, at.head), line, dim, p.scale);
    }
  }

  // P = exp2(S - lse), dS = P (dP - delta), both into tiles; keys outside [lo, hi) are zero.
  void softmax_gradient(float* score, float* d_weight, const float* lse, const float* delta, int64_t lo, int64_t hi,
                        int64_t chunks, int64_t q_chunks, const Tiles& weights, const Tiles& d_scores,
                        const Tiles& d_scores_depth) const {
    const Vec scale = broadcast(p.scale * kLog2e);
    for (int64_t k = 0; k < chunks * 32; ++k) {
      for (int64_t c = 0; c < q_chunks; ++c) {
        Vec weight[2] = {}, gradient[2] = {};
        float* s = score + k * kQueryRows + c * 32;
        float* ds = d_weight + k * kQueryRows + c * 32;
        for (int half = 0; half < 2 && k >= lo && k < hi; ++half) {
          const int64_t q = c * 32 + half * 16;
          weight[half] = exp2<Parts == 1 ? 3 : 5>(load(s + half * 16) * scale - load(lse + q));
          gradient[half] = weight[half] * (load(ds + half * 16) - load(delta + q));
        }
        store(ds, gradient[0]);
        store(ds + 16, gradient[1]);
        __m512i word[Parts];
        split_words<Parts>(weight[0], weight[1], word);
        for (int i = 0; i < Parts; ++i) _mm512_store_si512(weights.at(k / 16, i, c) + k % 16 * 64, word[i]);
        split_words<Parts>(gradient[0], gradient[1], word);
        for (int i = 0; i < Parts; ++i) _mm512_store_si512(d_scores.at(k / 16, i, c) + k % 16 * 64, word[i]);
      }
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      pack_depth_tiles<Parts>(d_scores_depth, chunk, q_chunks * 32, false,
                              [&](int r) -> const float* { return d_weight + (chunk * 32 + r) * kQueryRows; });
  }

  // gradient[lo:hi] += A B^T. A neighbour may own the other rows of the edge tiles, so these must not be touched.
  void accumulate(float* gradient, const Tiles& a, const Tiles& b, int64_t lo, int64_t hi, int64_t k_blocks,
                  int64_t q_chunks, float* partial) const {
    if (lo == 0 && hi == k_blocks * 16) {
      tile_gemm<Parts>(k_blocks, 0, d_blocks, q_chunks, a, b, gradient, padded, true);
      return;
    }
    tile_gemm<Parts>(k_blocks, 0, d_blocks, q_chunks, a, b, partial, padded, false);
    for (int64_t i = lo * padded; i < hi * padded; i += 16) store(gradient + i, load(gradient + i) + load(partial + i));
  }
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
