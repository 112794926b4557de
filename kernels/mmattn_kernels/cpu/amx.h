// SPDX-License-Identifier: MIT
// Matrix products on AMX tiles. An operand is packed as 1 KB tiles of 16 rows of 32 bf16; one of bf16 is a single
// tile, one of fp32 is three (x = x0 + x1 + x2 exactly, 8 significand bits each). The product of two such triples takes
// six tile products, smallest first; the three left out are below 2^-24 of the whole, so fp32 in stays fp32 out,
// at three times the rate of fp32 fused multiply-adds.
//
// A tile's 32 depths are 16 words of a pair (i, i + 16). Both operands use that order, so it never shows, and a word is
// one shift and one bitwise select of two fp32 vectors.
#pragma once

#include <type_traits>

#include "simd.h"

namespace mmattn::MMATTN_ISA {

constexpr int kTileBytes = 1024;
template <class T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;

// Tile registers of the calling thread, all 16 rows of 64 bytes, for the lifetime of the object.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

// Byte strides of a packed operand: 16-row blocks, parts, 32-deep chunks.
struct Tiles {
  char* base;
  int64_t block, part, chunk;
  char* at(int64_t b, int64_t p, int64_t c) const { return base + b * block + p * part + c * chunk; }
};

// C[16 M, 16 N] (+)= sum over chunks of A B^T, C fp32 with rows of `c_row` floats.
template <int Parts, int M, int N>
void tile_product(const Tiles& a, int64_t m, const Tiles& b, int64_t n, int64_t chunks, float* c, int64_t c_row, bool add) {
  const auto c_at = [&](int i, int j) { return c + (m + i) * 16 * c_row + (n + j) * 16; };
  if (add) {
    _tile_loadd(0, c_at(0, 0), c_row * 4);
    if constexpr (N > 1) _tile_loadd(1, c_at(0, 1), c_row * 4);
    if constexpr (M > 1) _tile_loadd(2, c_at(1, 0), c_row * 4);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, c_at(1, 1), c_row * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto accumulate = [&](int a_part, int b_part) {
    for (int64_t k = 0; k < chunks; ++k) {
      _tile_loadd(4, a.at(m, a_part, k), 64);
      _tile_loadd(6, b.at(n, b_part, k), 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N > 1) {
        _tile_loadd(7, b.at(n + 1, b_part, k), 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (M > 1) {
        _tile_loadd(5, a.at(m + 1, a_part, k), 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  };
  for (int order = Parts - 1; order >= 0; --order)
    for (int i = 0; i <= order; ++i) accumulate(i, order - i);
  _tile_stored(0, c_at(0, 0), c_row * 4);
  if constexpr (N > 1) _tile_stored(1, c_at(0, 1), c_row * 4);
  if constexpr (M > 1) _tile_stored(2, c_at(1, 0), c_row * 4);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c_at(1, 1), c_row * 4);
}

// C (+)= A B^T over blocks [0, m) x [n_begin, n_end) of 16 rows each.
template <int Parts>
inline void tile_gemm(int64_t m, int64_t n_begin, int64_t n_end, int64_t chunks, const Tiles& a, const Tiles& b,
                      float* c, int64_t c_row, bool add) {
  for (int64_t j = n_begin; j < n_end; j += 2)
    for (int64_t i = 0; i < m; i += 2) {
      if (j + 1 < n_end)
        i + 1 < m ? tile_product<Parts, 2, 2>(a, i, b, j, chunks, c, c_row, add)
                  : tile_product<Parts, 1, 2>(a, i, b, j, chunks, c, c_row, add);
      else
        i + 1 < m ? tile_product<Parts, 2, 1>(a, i, b, j, chunks, c, c_row, add)
                  : tile_product<Parts, 1, 1>(a, i, b, j, chunks, c, c_row, add);
    }
}

inline __m512i high_halves(__m512i low, __m512i high) {  // (low >> 16) | (high & 0xffff0000), per word
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, _mm512_set1_epi32(0xffff0000), 0xF8);
}

// The words of (low[i], high[i]), one vector of them for each part.
template <int Parts>
inline void split_words(Vec low, Vec high, __m512i (&word)[Parts]) {
  if constexpr (Parts == 1) {
    word[0] = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // halves in order; interleaved below
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    word[0] = _mm512_permutexvar_epi16(order, word[0]);
  } else {
    const __m512i mask = _mm512_set1_epi32(0xffff0000);
    const auto head = [&](Vec v) { return (Vec)_mm512_and_si512((__m512i)v, mask); };
    for (int part = 0; part < Parts; ++part) {
      word[part] = high_halves((__m512i)low, (__m512i)high);
      low -= head(low);
      high -= head(high);
    }
  }
}

// The words of (low[i], high[i]) as row `r` of the tiles of one block and chunk.
template <int Parts>
inline void store_words(Vec low, Vec high, const Tiles& out, int64_t block, int64_t chunk, int64_t r) {
  __m512i word[Parts];
  split_words<Parts>(low, high, word);
  for (int part = 0; part < Parts; ++part) _mm512_store_si512(out.at(block, part, chunk) + r * 64, word[part]);
}

// Transposes 16 rows of 16 words in place.
inline void transpose_words(__m512i (&row)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    row[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    row[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline Vec load_lanes(const float* p, int64_t n) {  // lanes past n are zero
  if (n >= 16) return load(p);
  return n <= 0 ? Vec{} : (Vec)_mm512_maskz_loadu_ps((1u << n) - 1, p);
}

inline Vec load_lanes(const bf16* p, int64_t n) {
  if (n >= 16) return load(p);
  if (n <= 0) return Vec{};
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << n) - 1, p)), 16);
}

template <int Parts>
inline void store_tile(const Tiles& out, int64_t block, int64_t chunk, __m512i (&words)[Parts][16], bool transposed) {
  for (int part = 0; part < Parts; ++part) {
    if (transposed) transpose_words(words[part]);
    char* tile = out.at(block, part, chunk);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, words[part][i]);
  }
}

// 16 vectors of `dim` channels as a block of rows whose depth is the channels. row(i) is a pointer, or null for zeros.
// The first operand of a product has its tiles so, the second has them transposed.
template <int Parts, class Row>
inline void pack_rows_tiles(const Tiles& out, int64_t block, int64_t dim, bool transposed, Row row) {
  for (int64_t chunk = 0; chunk * 32 < dim; ++chunk) {
    __m512i words[Parts][16];
    for (int i = 0; i < 16; ++i) {
      const auto* p = row(i);
      __m512i word[Parts];
      const int64_t at = chunk * 32;
      split_words<Parts>(p ? load_lanes(p + at, dim - at) : Vec{}, p ? load_lanes(p + at + 16, dim - at - 16) : Vec{}, word);
      for (int part = 0; part < Parts; ++part) words[part][i] = word[part];
    }
    store_tile<Parts>(out, block, chunk, words, transposed);
  }
}

// 32 vectors of `dim` channels as one chunk of depth of an operand whose rows are the channels. A second operand has its
// tiles so, a first has them transposed.
template <int Parts, class Row>
inline void pack_depth_tiles(const Tiles& out, int64_t chunk, int64_t dim, bool transposed, Row row) {
  for (int64_t block = 0; block * 16 < dim; ++block) {
    __m512i words[Parts][16];
    for (int i = 0; i < 16; ++i) {
      const auto *low = row(i), *high = row(i + 16);
      __m512i word[Parts];
      const int64_t at = block * 16;
      split_words<Parts>(low ? load_lanes(low + at, dim - at) : Vec{}, high ? load_lanes(high + at, dim - at) : Vec{}, word);
      for (int part = 0; part < Parts; ++part) words[part][i] = word[part];
    }
    store_tile<Parts>(out, block, chunk, words, transposed);
  }
}

}  // namespace mmattn::MMATTN_ISA
