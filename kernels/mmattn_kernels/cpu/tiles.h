// SPDX-License-Identifier: MIT
// Matrix products of bf16 on packed tiles. An operand is packed as 1 KB tiles of 16 rows of 32 bf16; one of bf16 is a
// single tile. With AMX one of fp32 is three (x = x0 + x1 + x2 exactly, 8 significand bits each): the product of two
// such triples takes six tile products; the three left out are about 2^-24 of the whole and below, so fp32 in stays
// fp32 out. Without AMX the same tiles are multiplied by AVX-512's dot products of bf16 pairs, of bf16 alone.
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

// Byte strides of a packed operand: 16-row blocks, parts, 32-deep chunks.
struct Tiles {
  char* base;
  int64_t block, part, chunk;
  char* at(int64_t b, int64_t p, int64_t c) const { return base + b * block + p * part + c * chunk; }
};

// Byte strides from one 16-row block of an operand's chunk to the next, and from one part to the next.
struct Strides {
  int64_t block, part;
};

// Rows of floats: a product begins with what is in `from`, or zeros if that is null, and goes to `to`.
struct Sums {
  const float* from;
  int64_t from_row;
  float* to;
  int64_t to_row;
};

// sum_chunks: 16 M rows and 16 N columns of sums plus A B^T over the chunks of depth that each(visit) visits as
// visit(a, b), pointers to the first part of the first block of either.

#if defined(__AMX_BF16__)

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

// Tile registers: C in 0..3, A in 4 and 5, B in 6 and 7.
template <int M, int N>
inline void load_c(const float* c, int64_t c_row) {
  const int64_t bytes = c_row * 4;
  if (c) {
    _tile_loadd(0, c, bytes);
    if constexpr (N > 1) _tile_loadd(1, c + 16, bytes);
    if constexpr (M > 1) _tile_loadd(2, c + 16 * c_row, bytes);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, c + 16 * c_row + 16, bytes);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
  }
}

template <int M, int N>
inline void store_c(float* c, int64_t c_row) {
  const int64_t bytes = c_row * 4;
  _tile_stored(0, c, bytes);
  if constexpr (N > 1) _tile_stored(1, c + 16, bytes);
  if constexpr (M > 1) _tile_stored(2, c + 16 * c_row, bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * c_row + 16, bytes);
}

// C += A B^T over one chunk; `a` and `b` point at the first block's first part. Parts are taken in an order that
// changes one operand at a time: 14 tile loads for 24 products. With kMirrored the operands exchange their parts in it,
// so that B A^T has the bits of this product's transpose.
template <int Parts, int M, int N, bool kMirrored>
inline void multiply_chunk(const char* a, int64_t a_block, int64_t a_part, const char* b, int64_t b_block,
                           int64_t b_part) {
  const auto load_a = [&](int part) {
    _tile_loadd(4, a + part * a_part, 64);
    if constexpr (M > 1) _tile_loadd(5, a + part * a_part + a_block, 64);
  };
  const auto load_b = [&](int part) {
    _tile_loadd(6, b + part * b_part, 64);
    if constexpr (N > 1) _tile_loadd(7, b + part * b_part + b_block, 64);
  };
  const auto multiply = [&] {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (M > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  };
  if constexpr (Parts == 1) {
    load_a(0), load_b(0), multiply();
  } else {
    const auto load_one = [&](int part) { kMirrored ? load_b(part) : load_a(part); };
    const auto load_other = [&](int part) { kMirrored ? load_a(part) : load_b(part); };
    load_one(1), load_other(1), multiply();
    load_other(0), multiply();
    load_one(2), multiply();
    load_one(0), multiply();
    load_other(1), multiply();
    load_other(2), multiply();
  }
}

template <int Parts, int M, int N, bool kMirrored, class Each>
inline void sum_chunks(const Sums& c, const Strides& a, const Strides& b, Each each) {
  load_c<M, N>(c.from, c.from_row);
  each([&](const char* of_a, const char* of_b) {
    multiply_chunk<Parts, M, N, kMirrored>(of_a, a.block, a.part, of_b, b.block, b.part);
  });
  store_c<M, N>(c.to, c.to_row);
}

#else

struct TileRegisters {
  TileRegisters() {}
};

// Rows of C that are summed in registers at a time: with N = 2 in 16 of the 32, a word of A is read once for both.
constexpr int kSumRows = 8;

// sum += A B^T over one chunk, of kSumRows rows of A.
template <int N>
[[gnu::always_inline]] inline void multiply_rows(const char* a, const char* b, int64_t b_block,
                                                 Vec (&sum)[kSumRows][N]) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; ++i) {
    __m512bh right[N];
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) right[v] = (__m512bh)_mm512_load_si512(b + v * b_block + i * 64);
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r) {
      int32_t word;
      std::memcpy(&word, a + r * 64 + i * 4, sizeof word);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
    }
  }
}

// The rows of C one group after another, each over all chunks, so that its sums never leave the registers.
template <int Parts, int M, int N, bool, class Each>
inline void sum_chunks(const Sums& c, const Strides& a, const Strides& b, Each each) {
  static_assert(Parts == 1);
  const int64_t b_block = b.block;
  for (int64_t row = 0; row < 16 * M; row += kSumRows) {
    const float* from = c.from ? c.from + row * c.from_row : nullptr;
    float* to = c.to + row * c.to_row;
    const int64_t a_rows = row / 16 * a.block + row % 16 * 64;
    Vec sum[kSumRows][N];
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[r][v] = from ? load(from + r * c.from_row + v * 16) : Vec{};
    each([&](const char* of_a, const char* of_b)
             __attribute__((always_inline)) { multiply_rows<N>(of_a + a_rows, of_b, b_block, sum); });
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) store(to + r * c.to_row + v * 16, sum[r][v]);
  }
}

#endif

template <int Parts, int M, int N, bool kMirrored>
void tile_product(const Tiles& a, int64_t m, const Tiles& b, int64_t n, int64_t chunks, float* c, int64_t c_row,
                  bool add) {
  c += m * 16 * c_row + n * 16;
  const auto each = [&](auto visit) {
    for (int64_t k = 0; k < chunks; ++k) visit(a.at(m, 0, k), b.at(n, 0, k));
  };
  sum_chunks<Parts, M, N, kMirrored>({add ? c : nullptr, c_row, c, c_row}, {a.block, a.part}, {b.block, b.part}, each);
}

// Rows [0, 16 m) and columns [16 n_begin, 16 n_end) of C (+)= A B^T, C fp32 with rows of `c_row` floats.
template <int Parts, bool kMirrored = false>
inline void tile_gemm(int64_t m, int64_t n_begin, int64_t n_end, int64_t chunks, const Tiles& a, const Tiles& b,
                      float* c, int64_t c_row, bool add) {
  for (int64_t j = n_begin; j < n_end; j += 2)
    for (int64_t i = 0; i < m; i += 2) {
      if (j + 1 < n_end)
        i + 1 < m ? tile_product<Parts, 2, 2, kMirrored>(a, i, b, j, chunks, c, c_row, add)
                  : tile_product<Parts, 1, 2, kMirrored>(a, i, b, j, chunks, c, c_row, add);
      else
        i + 1 < m ? tile_product<Parts, 2, 1, kMirrored>(a, i, b, j, chunks, c, c_row, add)
                  : tile_product<Parts, 1, 1, kMirrored>(a, i, b, j, chunks, c, c_row, add);
    }
}

inline __m512i high_halves(__m512i low, __m512i high) {  // (low >> 16) | (high & 0xffff0000), per word
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, _mm512_set1_epi32(0xffff0000), 0xF8);
}

// The words of (low[i], high[i]), one vector of them for each part.
template <int Parts>
inline void split_words(Vec low, Vec high, __m512i (&word)[Parts]) {
  if constexpr (Parts == 1) {
    word[0] = interleave((__m512i)_mm512_cvtne2ps_pbh(high, low));
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

// The same for values known to be finite and not negative: half a unit in the last place, then cut.
inline void split_words_positive(Vec low, Vec high, __m512i (&word)[1]) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  word[0] = high_halves(_mm512_add_epi32((__m512i)low, half), _mm512_add_epi32((__m512i)high, half));
}
inline void split_words_positive(Vec low, Vec high, __m512i (&word)[3]) {
  split_words<3>(low, high, word);
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

// The words of 32 channels of a row (row_words) or of 16 channels of two rows (pair_words); bf16 is only moved.
template <int Parts>
inline void row_words(const float* p, int64_t n, __m512i (&word)[Parts]) {
  split_words<Parts>(load_lanes(p, n), load_lanes(p + 16, n - 16), word);
}

inline void row_words(const bf16* p, int64_t n, __m512i (&word)[1]) {
  const __m512i halves = _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
  word[0] = interleave(halves);
}

template <int Parts>
inline void pair_words(const float* low, const float* high, int64_t n, __m512i (&word)[Parts]) {
  split_words<Parts>(low ? load_lanes(low, n) : Vec{}, high ? load_lanes(high, n) : Vec{}, word);
}

inline void pair_words(const bf16* low, const bf16* high, int64_t n, __m512i (&word)[1]) {
  const __mmask16 mask = n >= 16 ? 0xffff : (1u << n) - 1;
  const __m512i l = low ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low)) : __m512i{};
  const __m512i h = high ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high)) : __m512i{};
  word[0] = _mm512_or_si512(l, _mm512_slli_epi32(h, 16));
}

// Collects the words of 16 rows of a tile: straight into it, or transposed once all are there.
template <int Parts, bool kTransposed>
class TileWriter {
 public:
  TileWriter(const Tiles& out, int64_t block, int64_t chunk) : out_(out), block_(block), chunk_(chunk) {}

  void put(int i, const __m512i (&word)[Parts]) {
    for (int part = 0; part < Parts; ++part) {
      if constexpr (kTransposed)
        words_[part][i] = word[part];
      else
        _mm512_store_si512(out_.at(block_, part, chunk_) + i * 64, word[part]);
    }
  }

  void finish() {
    for (int part = 0; kTransposed && part < Parts; ++part) {
      transpose_words(words_[part]);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out_.at(block_, part, chunk_) + i * 64, words_[part][i]);
    }
  }

 private:
  const Tiles& out_;
  const int64_t block_, chunk_;
  __m512i words_[Parts][16];
};

// 16 vectors of `dim` channels as a block of rows whose depth is the channels. row(i) is a pointer, or null for zeros.
// The first operand of a product has its tiles so, the second has them transposed.
template <int Parts, bool kTransposed, class Row>
inline void pack_rows_tiles(const Tiles& out, int64_t block, int64_t dim, Row row) {
  for (int64_t chunk = 0; chunk * 32 < dim; ++chunk) {
    TileWriter<Parts, kTransposed> tile(out, block, chunk);
    for (int i = 0; i < 16; ++i) {
      const auto* p = row(i);
      __m512i word[Parts] = {};
      if (p) row_words(p + chunk * 32, dim - chunk * 32, word);
      tile.put(i, word);
    }
    tile.finish();
  }
}

// 32 vectors of `dim` channels as one chunk of depth of an operand whose rows are the channels. A second operand has
// its tiles so, a first has them transposed.
template <int Parts, bool kTransposed, class Row>
inline void pack_depth_tiles(const Tiles& out, int64_t chunk, int64_t dim, Row row) {
  for (int64_t block = 0; block * 16 < dim; ++block) {
    TileWriter<Parts, kTransposed> tile(out, block, chunk);
    const int64_t at = block * 16;
    for (int i = 0; i < 16; ++i) {
      const auto *low = row(i), *high = row(i + 16);
      __m512i word[Parts];
      pair_words(low ? low + at : nullptr, high ? high + at : nullptr, dim - at, word);
      tile.put(i, word);
    }
    tile.finish();
  }
}

}  // namespace mmattn::MMATTN_ISA
