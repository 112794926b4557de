// SPDX-License-Identifier: MIT
// The convolution on AMX tiles. The rows of a block are packed after the prologue as [chunk of 32 channels][part][row] of
// 64 bytes, so the 16 rows of a tile may begin at any row, and each tap is the same buffer read from another row.
// Weights are packed as [32 out channels][tap][chunk][part][2] tiles, the order in which a product reads them.
#pragma once

#include "amx.h"
#include "conv_plan.h"

namespace mmattn::MMATTN_ISA {
namespace {

// bf16 words are pairs of neighbouring channels, fp32 words pairs (i, i + 16) of a chunk: what costs least to pack.
template <int Parts>
inline void channel_words(Vec low, Vec high, __m512i (&word)[Parts]) {
  if constexpr (Parts == 1)
    word[0] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  else
    split_words<Parts>(low, high, word);
}

template <class T>
class AmxConv {
 public:
  static constexpr int kP = kParts<T>;
  static constexpr int64_t kPairBytes = 2 * kTileBytes, kChunkBytes = kP * kPairBytes;
  static constexpr int64_t kBufferBytes = 704 << 10;   // packed rows of a block: they and a panel of weights share the L2
  static constexpr int64_t kWeightBytes = 512 << 10;   // weights that are read again and again from the L2
  static constexpr int64_t kMostRows = 448;

  static int64_t chunks(int64_t channels) { return (channels + 31) / 32; }
  static int64_t packed_bytes(int64_t out_channels, int64_t in_channels, int64_t taps) {
    return chunks(out_channels) * taps * chunks(in_channels) * kChunkBytes;
  }

  static void pack(const ConvWeights& w) {
    const int64_t pairs = chunks(w.out_channels), in_chunks = chunks(w.in_channels);
#pragma omp parallel for num_threads(w.threads) schedule(static) collapse(2)
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t chunk = 0; chunk < in_chunks; ++chunk)
        for (int64_t k = 0; k < w.taps; ++k) {
          char* at = static_cast<char*>(w.packed) + ((pair * w.taps + k) * in_chunks + chunk) * kChunkBytes;
          const Tiles tiles{at, kTileBytes, kPairBytes, 0};
          w.weight_is_bf16 ? pack_pair<bf16>(w, tiles, pair * 32, chunk * 32, k)
                           : pack_pair<float>(w, tiles, pair * 32, chunk * 32, k);
        }
  }

  static void forward(const Conv& p) {
    const Coefficients coefficients(p.batch, p.in_channels);
    prepare<T>(p.norm, p.x, p.batch, p.length, p.in_channels, p.threads, coefficients);
    const std::vector<Block> blocks = cut(p, kMostRows);
    const int64_t pairs = chunks(p.out_channels);
    const int64_t splits = channel_splits(blocks.size(), p.threads, pairs);
    const Extent extent(blocks);
    const int64_t in_chunks = chunks(p.in_channels);
    const int64_t most = std::max<int64_t>(kBufferBytes / (extent.buffer_rows * 64 * kP), 1);
    const int64_t depths = (in_chunks + most - 1) / most, depth = (in_chunks + depths - 1) / depths;
    const int64_t sums = depths > 1 ? extent.rows * ((pairs + splits - 1) / splits) * 32 : 0;
    const PerChannel bias(1, pairs * 32, 1);
    std::memset(bias.at(0, 0), 0, bias.padded() * sizeof(float));
    if (p.bias) std::memcpy(bias.at(0, 0), p.bias, p.out_channels * sizeof(float));
    const int64_t buffer = (extent.buffer_rows | 1) * 16 * kP * depth;
    const int64_t per_thread = round_up(buffer + sums + 32 * 32, 1024) + 16;  // no two threads at the same page offset
    const Buffer memory(per_thread * p.threads);
#pragma omp parallel num_threads(p.threads)
    {
      const TileRegisters registers;
      float* own = memory.data() + thread_number() * per_thread;
      const AmxConv conv(p, coefficients, bias.at(0, 0), depth, own, own + buffer, own + buffer + sums);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()) * splits; ++i) {
        const int64_t split = i % splits;
        conv.run(blocks[i / splits], pairs * split / splits, pairs * (split + 1) / splits);
      }
    }
  }

 private:
  const Conv& p_;
  const Coefficients& coefficients_;
  const float* bias_;
  const int64_t in_chunks_, depth_;
  char* buffer_;
  float *sums_, *tile_;

  AmxConv(const Conv& p, const Coefficients& coefficients, const float* bias, int64_t depth, float* buffer, float* sums,
          float* tile)
      : p_(p),
        coefficients_(coefficients),
        bias_(bias),
        in_chunks_(chunks(p.in_channels)),
        depth_(depth),
        buffer_(reinterpret_cast<char*>(buffer)),
        sums_(sums),
        tile_(tile) {}

  // 32 out channels of one chunk and tap. Whichever channel lies closer together in memory is read in vectors.
  template <class W>
  static void pack_pair(const ConvWeights& w, const Tiles& tiles, int64_t out, int64_t in, int64_t k) {
    const auto gather = [&](int64_t o, int64_t c, int64_t stride, int64_t n) {
      float lanes[16] = {};
      const W* p = static_cast<const W*>(w.weight) + o * w.out_stride + c * w.in_stride + k * w.tap_stride;
      for (int64_t i = 0; i < std::min<int64_t>(n, 16); ++i) {
        if constexpr (sizeof(W) == 4)
          lanes[i] = p[i * stride];
        else
          lanes[i] = to_float(p[i * stride]);
      }
      return load(lanes);
    };
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t o = out + half * 16;
      if (w.in_stride < w.out_stride) {
        TileWriter<kP, true> tile(tiles, half, 0);
        for (int i = 0; i < 16; ++i) {
          __m512i word[kP] = {};
          const int64_t n = o + i < w.out_channels ? w.in_channels - in : 0;
          channel_words<kP>(gather(o + i, in, w.in_stride, n), gather(o + i, in + 16, w.in_stride, n - 16), word);
          tile.put(i, word);
        }
        tile.finish();
      } else {
        TileWriter<kP, false> tile(tiles, half, 0);
        for (int i = 0; i < 16; ++i) {
          __m512i word[kP];
          const int64_t low = in + (kP == 1 ? 2 * i : i), high = in + (kP == 1 ? 2 * i + 1 : i + 16);
          const int64_t n = w.out_channels - o;
          split_words<kP>(gather(o, low, w.out_stride, low < w.in_channels ? n : 0),
                          gather(o, high, w.out_stride, high < w.in_channels ? n : 0), word);
          tile.put(i, word);
        }
        tile.finish();
      }
    }
  }

  static float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void run(const Block& block, int64_t pair_begin, int64_t pair_end) const {
    const int64_t group = std::max<int64_t>(kWeightBytes / (block.taps * depth_ * kChunkBytes), 1);
    for (int64_t chunk = 0; chunk < in_chunks_; chunk += depth_) {
      const int64_t chunk_end = std::min(in_chunks_, chunk + depth_);
      fill(block, chunk, chunk_end);
      for (int64_t first = pair_begin; first < pair_end; first += group)
        for (int64_t i = 0; i < block.rows; i += kRowUnit) {
          const int64_t live = block.live(i);
          if (live == 0) continue;
          for (int64_t pair = first; pair < std::min(pair_end, first + group); ++pair) {
            const bool wide = pair * 32 + 16 < p_.out_channels;
            const int64_t column = (pair - pair_begin) * 32, columns = (pair_end - pair_begin) * 32;
            float* sums = sums_ + i * columns + column;
            if (live > 16)
              wide ? product<2, 2>(block, i, live, pair, chunk, chunk_end, sums, columns)
                   : product<2, 1>(block, i, live, pair, chunk, chunk_end, sums, columns);
            else
              wide ? product<1, 2>(block, i, live, pair, chunk, chunk_end, sums, columns)
                   : product<1, 1>(block, i, live, pair, chunk, chunk_end, sums, columns);
          }
        }
    }
  }

  int64_t part_bytes(const Block& block) const { return (block.buffer_rows() | 1) * 64; }  // odd: no two in one cache set

  template <int M, int N>
  void product(const Block& block, int64_t i, int64_t live, int64_t pair, int64_t chunk, int64_t chunk_end, float* sums,
               int64_t columns) const {
    const int64_t part = part_bytes(block);
    const bool last = chunk_end == in_chunks_;
    if (last)
      for (int64_t r = 0; r < live; ++r) prefetch(out_row(block, i + r) + pair * 32, 32);
    load_c<M, N>(sums, columns, chunk > 0);
    for (int64_t k = 0; k < block.taps; ++k) {
      if (!block.reads(i, k)) continue;
      const char* a = buffer_ + (i + k * block.step) * 64;
      const char* b = static_cast<const char*>(p_.packed) + ((pair * block.taps + k) * in_chunks_ + chunk) * kChunkBytes;
      for (int64_t c = chunk; c < chunk_end; ++c, a += kP * part, b += kChunkBytes)
        multiply_chunk<kP, M, N>(a, kTileBytes, part, b, kTileBytes, kPairBytes);
    }
    if (!last) return store_c<M, N>(sums, columns);
    store_c<M, N>(tile_, 32);
    for (int64_t r = 0; r < live; ++r) {
      T* out = out_row(block, i + r) + pair * 32;
      const T* residual = p_.residual.data ? row<T>(p_.residual, block.batch, block.position(i + r)) + pair * 32 : nullptr;
      for (int v = 0; v < N; ++v) {
        const int64_t n = p_.out_channels - pair * 32 - v * 16;
        Vec value = load(tile_ + r * 32 + v * 16) + load(bias_ + pair * 32 + v * 16);
        if (residual) value += load_lanes(residual + v * 16, n);
        store_lanes(out + v * 16, value, n);
      }
    }
  }

  T* out_row(const Block& block, int64_t i) const { return row<T>(p_.out, block.batch, block.position(i)); }

  void fill(const Block& block, int64_t chunk, int64_t chunk_end) const {
    switch (prologue_of(p_.norm)) {
      case Prologue::none:
        return fill<Prologue::none>(block, chunk, chunk_end);
      case Prologue::affine:
        return fill<Prologue::affine>(block, chunk, chunk_end);
      case Prologue::silu:
        return fill<Prologue::silu>(block, chunk, chunk_end);
    }
  }

  template <Prologue kPrologue>
  void fill(const Block& block, int64_t chunk, int64_t chunk_end) const {
    const int64_t part = part_bytes(block);
    block.each_buffer_row([&](int64_t r, int64_t position) {
      char* to = buffer_ + r * 64;
      const T* x = position < 0 ? nullptr : row<T>(p_.x, block.batch, position);
      for (int64_t c = chunk; c < chunk_end; ++c, to += kP * part) {
        __m512i word[kP] = {};
        if (x) {
          const int64_t at = c * 32, n = p_.in_channels - at;
          channel_words<kP>(apply<kPrologue, kDegree<T>>(load_lanes(x + at, n), coefficients_, block.batch, at),
                            apply<kPrologue, kDegree<T>>(load_lanes(x + at + 16, n - 16), coefficients_, block.batch, at + 16), word);
        }
        for (int j = 0; j < kP; ++j) _mm512_store_si512(to + j * part, word[j]);
      }
    });
  }
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
