// SPDX-License-Identifier: MIT
// The fp32 register-tile matrix product all kernels share: C[m, :] = init + sum_k A[m, k] * B[k, :].
// A is read by broadcast and may be strided both ways (so A and A^T are the same code); B is read in vectors, the
// columns of one vector contiguous, the vectors `b.vec` apart (so a row-major matrix and a panel-packed one are too).
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace mmattn::MMATTN_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 accumulators, 4 of B and a broadcast in 32 registers
#else
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 accumulators, 2 of B and a broadcast in 16 registers
#endif

// Columns of a register tile, as which the other operand of a convolution is packed: a panel of out channels.
constexpr int64_t kPanel = kTileVecs * kLanes;
inline int64_t panels_of(int64_t columns) {
  return (columns + kPanel - 1) / kPanel;
}
// Of the columns that a panel has, of so many in all.
inline int64_t vecs_of_panel(int64_t columns, int64_t panel) {
  return std::min<int64_t>(kTileVecs, (columns - panel * kPanel + kLanes - 1) / kLanes);
}

enum class Init { zero, add, rescale };  // C starts at 0, at C, at row_factor[m] * C

struct Gemm {
  struct Left {
    const float* data;
    int64_t row, depth;
  };
  struct Right {
    const float* data;
    int64_t vec, depth;
  };
  struct Result {
    float* data;
    int64_t row;
  };
  int64_t rows, vecs, depth;
  Left a;
  Right b;
  Result c;
  const float* row_factor = nullptr;
};

template <Init kInit, int R, int V>
void gemm_tile(const Gemm& g, int64_t row, int64_t vec) {
  const float* a = g.a.data + row * g.a.row;
  const float* b = g.b.data + vec * g.b.vec;
  float* c = g.c.data + row * g.c.row + vec * kLanes;
  const int64_t a_row = g.a.row, a_depth = g.a.depth, b_vec = g.b.vec, b_depth = g.b.depth;
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      acc[r][v] = Vec{};
      if constexpr (kInit == Init::rescale) acc[r][v] = load(c + r * g.c.row + v * kLanes) * g.row_factor[row + r];
    }
  for (int64_t k = 0; k < g.depth; ++k) {
    Vec bk[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bk[v] = load(b + v * b_vec);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec ak = broadcast(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += ak * bk[v];
    }
    a += a_depth;
    b += b_depth;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* to = c + r * g.c.row + v * kLanes;
      // Added at the end: sums of sums are more accurate than one long one.
      store(to, kInit == Init::add ? load(to) + acc[r][v] : acc[r][v]);
    }
}

template <Init kInit>
using GemmTile = void (*)(const Gemm&, int64_t, int64_t);

template <Init kInit, int... I>
constexpr auto gemm_tiles(std::integer_sequence<int, I...>) {
  struct Table {
    GemmTile<kInit> tile[kTileRows * kTileVecs];
  };
  return Table{{gemm_tile<kInit, I / kTileVecs + 1, I % kTileVecs + 1>...}};
}

// Rows and vectors are split evenly: 25 rows become 5 tiles of 5, not 4 of 6 and one of 1.
template <Init kInit>
inline void gemm(const Gemm& g) {
  static constexpr auto table = gemm_tiles<kInit>(std::make_integer_sequence<int, kTileRows * kTileVecs>{});
  const int64_t row_tiles = (g.rows + kTileRows - 1) / kTileRows, vec_tiles = (g.vecs + kTileVecs - 1) / kTileVecs;
  for (int64_t j = 0; j < vec_tiles; ++j) {
    const int64_t vec = g.vecs * j / vec_tiles, vecs = g.vecs * (j + 1) / vec_tiles - vec;
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t row = g.rows * i / row_tiles, rows = g.rows * (i + 1) / row_tiles - row;
      table.tile[(rows - 1) * kTileVecs + vecs - 1](g, row, vec);
    }
  }
}

}  // namespace mmattn::MMATTN_ISA
