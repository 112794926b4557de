// SPDX-License-Identifier: MIT
// The convolution on tiles. The rows of a block are packed after the prologue as [chunk of 32 channels][part][row]
// of 64 bytes, so the 16 rows of a tile may begin at any row, and each tap is the same buffer read from another row.
// Weights are packed as [32 out channels][tap][chunk][part][2] tiles, the order in which a product reads them.
#pragma once

#include "conv_plan.h"
#include "tiles.h"

namespace mmattn::MMATTN_ISA {
namespace {

// Of weights. bf16 words are pairs of neighbouring channels, fp32 words pairs (i, i + 16) of a chunk: what costs least
// to pack of x.
template <int Parts>
inline void channel_words(Vec low, Vec high, __m512i (&word)[Parts]) {
  if constexpr (Parts == 1)
    word[0] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  else
    split_words<Parts>(low, high, word);
}

// p[0], p[stride], ... as many as n but at most 16, zeros after them. Every third, as the taps of three lie, comes from
// whole loads and a permutation, a fifth of the cost of a gather.
inline Vec load_strided(const float* p, int64_t stride, int64_t n) {
  if (n <= 0) return Vec{};
  if (stride == 1) return load_lanes(p, n);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  if (stride == 3 && n >= 16) {
    const __m512i third = _mm512_mullo_epi32(lane, _mm512_set1_epi32(3));
    const __m512i below_32 = _mm512_permutex2var_epi32(_mm512_loadu_si512(p), third, _mm512_loadu_si512(p + 16));
    const __mmask16 above = 0xf800;  // lanes 11 to 15 lie at 33 to 45
    const __m512i last = _mm512_maskz_loadu_epi32(0x3fff, p + 32);
    return (Vec)_mm512_mask_permutexvar_epi32(below_32, above, _mm512_sub_epi32(third, _mm512_set1_epi32(32)), last);
  }
  if (stride > INT32_MAX / 15 || stride < INT32_MIN / 15) {  // beyond the offsets of a gather
    float lanes[16] = {};
    for (int64_t i = 0; i < std::min<int64_t>(n, 16); ++i) lanes[i] = p[i * stride];
    return load(lanes);
  }
  const __mmask16 mask = n >= 16 ? 0xffff : (1u << n) - 1;
  const __m512i offset = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
  return (Vec)_mm512_mask_i32gather_epi32(__m512i{}, mask, offset, p, 4);
}

inline Vec load_strided(const bf16* p, int64_t stride, int64_t n) {
  if (n <= 0) return Vec{};
  if (stride == 1) return load_lanes(p, n);
  if (stride == 3 && n >= 16) {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i / 2 * 3);
    const __m512i last = _mm512_maskz_loadu_epi16(0x3fff, p + 32);
    return (Vec)_mm512_maskz_permutex2var_epi16(0xaaaaaaaa, _mm512_loadu_si512(p), _mm512_load_si512(index), last);
  }
  bf16 lanes[16] = {};
  for (int64_t i = 0; i < std::min<int64_t>(n, 16); ++i) lanes[i] = p[i * stride];
  return load(lanes);
}

template <class T>
class TileConv {
 public:
  static constexpr int kP = kParts<T>;
  static constexpr int64_t kPairBytes = 2 * kTileBytes, kChunkBytes = kP * kPairBytes;
  // Packed rows of a block, which share the L2 with a panel of weights.
  static constexpr int64_t kBufferBytes = 704 << 10;
  static constexpr int64_t kPanelBytes = kP == 1 ? 28 << 10 : 1 << 30;  // weights that stay in the L1 for all rows
  static constexpr int64_t kMostRows = 448;

  static constexpr int64_t kColumns = 32;
  static int64_t panels(int64_t out_channels) { return chunks(out_channels); }
  // A single block reads each weight once: packed by whoever reads it, it never leaves that thread's cache.
  static bool pack_first(const Conv& p, const Tasks& tasks) { return !p.packed && tasks.blocks.size() > 1; }

  static int64_t chunks(int64_t channels) { return (channels + 31) / 32; }
  static int64_t packed_bytes(int64_t out_channels, int64_t in_channels, int64_t taps) {
    return chunks(out_channels) * taps * chunks(in_channels) * kChunkBytes;
  }

  static void pack(const ConvWeights& w, void* packed) {
    const int64_t pairs = chunks(w.out_channels), in_chunks = chunks(w.in_channels);
#pragma omp parallel for num_threads(w.threads) schedule(static) collapse(2)
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t chunk = 0; chunk < in_chunks; ++chunk)
        for (int64_t k = 0; k < w.taps; ++k)
          pack_chunk(w, pair, chunk, k,
                     static_cast<char*>(packed) + ((pair * w.taps + k) * in_chunks + chunk) * kChunkBytes);
  }

  // Of 16 out channels from a multiple of that on.
  static Vec load_packed(const Conv& p, const void* packed, int64_t out, int64_t tap, int64_t in) {
    static_assert(kP == 1);
    const int64_t chunk = (out / 32 * p.taps + tap) * chunks(p.in_channels) + in / 32;
    const __m512i pairs = _mm512_load_si512(static_cast<const char*>(packed) + chunk * kChunkBytes +
                                            out % 32 / 16 * kTileBytes + in % 32 / 2 * 64);
    return (Vec)(in % 2 ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(pairs, 16));
  }

  static void forward(const Conv& p) {
    const Coefficients coefficients(p.batch, p.in_channels, kEvenAndOdd<T>);
    prepare<T>(p.norm, p.x, p.batch, p.length, p.in_channels, p.threads, coefficients);
    const Tasks tasks = tasks_of<TileConv>(p);
    const int64_t pairs = chunks(p.out_channels), splits = tasks.splits;
    const bool pack_first = TileConv::pack_first(p, tasks);
    const Buffer packed(pack_first ? packed_bytes(p.out_channels, p.in_channels, p.taps) / 4 : 0);
    if (pack_first) pack(p.weights, packed.data());
    const Extent extent(tasks.blocks);
    const int64_t in_chunks = chunks(p.in_channels);
    const int64_t most = std::max<int64_t>(kBufferBytes / (extent.buffer_rows * 64 * kP), 1);
    const int64_t depths = (in_chunks + most - 1) / most, depth = (in_chunks + depths - 1) / depths;
    const int64_t columns = (pairs + splits - 1) / splits * 32;
    const int64_t sums = extent.rows * (depths > 1 ? columns : 32);
    const PerChannel bias(1, pairs * 32, 1);
    fill_bias(p, bias);
    const int64_t buffer = (extent.buffer_rows | 1) * 16 * kP * depth;
    const int64_t most_chunks = std::min(depth, panel_chunks(p.taps));
    const int64_t panel = p.packed || pack_first ? 0 : p.taps * most_chunks * kChunkBytes / 4;
    const int64_t per_thread = round_up(buffer + sums + 32 * 32 + panel, 1024) + 16;  // not all at the same page offset
    const Buffer memory(per_thread * p.threads);
#pragma omp parallel num_threads(p.threads)
    {
      const TileRegisters registers;
      float* own = memory.data() + thread_number() * per_thread;
      const char* weights = static_cast<const char*>(pack_first ? packed.data() : p.packed);
      const TileConv conv(p, weights, coefficients, bias.at(0, 0), depth, own, own + buffer, own + buffer + sums);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < tasks.count(); ++i) {
        const int64_t split = i % splits;
        conv.run(tasks.blocks[i / splits], pairs * split / splits, pairs * (split + 1) / splits);
      }
    }
  }

 private:
  const Conv& p_;
  const char* weights_;  // packed, or null
  const Coefficients& coefficients_;
  const float* bias_;
  const int64_t in_chunks_, depth_;
  char* buffer_;
  float *sums_, *tile_;

  TileConv(const Conv& p, const char* weights, const Coefficients& coefficients, const float* bias, int64_t depth,
           float* buffer, float* sums, float* tile)
      : p_(p),
        weights_(weights),
        coefficients_(coefficients),
        bias_(bias),
        in_chunks_(chunks(p.in_channels)),
        depth_(depth),
        buffer_(reinterpret_cast<char*>(buffer)),
        sums_(sums),
        tile_(tile) {}

  static int64_t panel_chunks(int64_t taps) { return std::max<int64_t>(kPanelBytes / (taps * kChunkBytes), 1); }

  static void pack_chunk(const ConvWeights& w, int64_t pair, int64_t chunk, int64_t k, char* to) {
    const Tiles tiles{to, kTileBytes, kPairBytes, 0};
    w.weight_is_bf16 ? pack_pair<bf16>(w, tiles, pair * 32, chunk * 32, k)
                     : pack_pair<float>(w, tiles, pair * 32, chunk * 32, k);
  }

  // 32 out channels of one chunk and tap. Whichever channel lies closer together in memory is read in vectors.
  template <class W>
  static void pack_pair(const ConvWeights& w, const Tiles& tiles, int64_t out, int64_t in, int64_t k) {
    const auto gather = [&](int64_t o, int64_t c, int64_t stride, int64_t n) {
      return load_strided(static_cast<const W*>(w.weight) + o * w.out_stride + c * w.in_stride + k * w.tap_stride,
                          stride, n);
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

  // The panel of weights of 32 out channels and a few chunks stays in the L1 while all rows pass it; what the chunks
  // before have summed waits in `sums_`, for one pair of tiles, or for all where the packed rows come in several
  // depths.
  void run(const Block& block, int64_t pair_begin, int64_t pair_end) const {
    const bool is_one_depth = depth_ == in_chunks_;
    const int64_t columns = is_one_depth ? 32 : (pair_end - pair_begin) * 32;
    const int64_t most = panel_chunks(block.taps);
    for (int64_t first = 0; first < in_chunks_; first += depth_) {
      const int64_t end = std::min(in_chunks_, first + depth_), panels = (end - first + most - 1) / most;
      fill(block, first, end);
      for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
        const bool wide = pair * 32 + 16 < p_.out_channels;
        float* sums = sums_ + (is_one_depth ? 0 : (pair - pair_begin) * 32);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t chunk = first + (end - first) * panel / panels,
                        next = first + (end - first) * (panel + 1) / panels;
          const Panel at{weights_of(block, pair, chunk, next),
                         (weights_ ? in_chunks_ : next - chunk) * kChunkBytes,
                         pair,
                         first,
                         chunk,
                         next};
          for (int64_t i = 0; i < block.rows; i += kRowUnit) {
            const int64_t live = block.live(i);
            if (live == 0) continue;
            if (live > 16)
              wide ? product<2, 2>(block, i, live, at, sums + i * columns, columns)
                   : product<2, 1>(block, i, live, at, sums + i * columns, columns);
            else
              wide ? product<1, 2>(block, i, live, at, sums + i * columns, columns)
                   : product<1, 1>(block, i, live, at, sums + i * columns, columns);
          }
        }
      }
    }
  }

  // Chunks [chunk, next) of a pair's weights, of the depth that begins at `first`; taps are `tap` bytes apart.
  struct Panel {
    const char* weights;
    int64_t tap, pair, first, chunk, next;
  };

  const char* weights_of(const Block& block, int64_t pair, int64_t chunk, int64_t next) const {
    if (weights_) return weights_ + (pair * block.taps * in_chunks_ + chunk) * kChunkBytes;
    char* to = reinterpret_cast<char*>(tile_ + 32 * 32);
    for (int64_t k = 0; k < block.taps; ++k)
      for (int64_t c = chunk; c < next; ++c)
        pack_chunk(p_.weights, pair, c, k, to + (k * (next - chunk) + c - chunk) * kChunkBytes);
    return to;
  }

  // An odd number of lines, so that no two parts begin in one cache set.
  int64_t part_bytes(const Block& block) const { return (block.buffer_rows() | 1) * 64; }

  template <int M, int N>
  void product(const Block& block, int64_t i, int64_t live, const Panel& at, float* sums, int64_t columns) const {
    const int64_t part = part_bytes(block);
    const bool last = at.next == in_chunks_;
    const int64_t position = block.position(i);
    if (last && !block.scattered())
      for (int64_t r = 0; r < live; ++r) prefetch(row<T>(p_.out, block.batch, position + r) + at.pair * 32, 32);
    const int64_t first = block.at(i), a_block = (block.at(i + 16) - first) * 64;
    const auto each = [&](auto visit) {
      for (int64_t k = 0; k < block.taps; ++k) {
        if (!block.reads(position, live, k)) continue;
        const char* a = buffer_ + (at.chunk - at.first) * kP * part + (first + block.offset(k)) * 64;
        const char* b = at.weights + k * at.tap;
        for (int64_t c = at.chunk; c < at.next; ++c, a += kP * part, b += kChunkBytes) visit(a, b);
      }
    };
    const Sums c{at.chunk > 0 ? sums : nullptr, columns, last ? tile_ : sums, last ? 32 : columns};
    sum_chunks<kP, M, N, false>(c, {a_block, part}, {kTileBytes, kPairBytes}, each);
    if (last) finish<N>(block, i, position, live, at.pair);
  }

  template <int N>
  void finish(const Block& block, int64_t i, int64_t first, int64_t live, int64_t pair) const {
    const int64_t at = pair * 32, n = p_.out_channels - at;
    if (!block.scattered() && n >= N * 16) {
      T* out = row<T>(p_.out, block.batch, first) + at;
      if (!p_.residual.data) return finish_rows<N>(live, at, out, [](Vec sum, int64_t, int) { return sum; });
      const T* residual = row<T>(p_.residual, block.batch, first) + at;
      const int64_t stride = p_.residual.position;
      return finish_rows<N>(live, at, out,
                            [=](Vec sum, int64_t r, int v) { return sum + load(residual + r * stride + v * 16); });
    }
    for (int64_t r = 0; r < live; ++r) {
      const int64_t position = block.position(i + r);
      if (position < 0) continue;
      T* out = row<T>(p_.out, block.batch, position) + at;
      for (int v = 0; v < N; ++v) {
        Vec value = load(tile_ + r * 32 + v * 16) + load(bias_ + at + v * 16);
        if (p_.residual.data) value += load_lanes(row<T>(p_.residual, block.batch, position) + at + v * 16, n - v * 16);
        store_lanes(out + v * 16, value, n - v * 16);
      }
    }
  }

  // Of consecutive rows and whole vectors. In few instructions, so that the processor is through them while the tiles
  // of the next rows are multiplied.
  template <int N, class Add>
  void finish_rows(int64_t live, int64_t at, T* out, Add add) const {
    const int64_t stride = p_.out.position;
    const float* sums = tile_;
    const Vec bias[2] = {load(bias_ + at), load(bias_ + at + 16)};
    for (int64_t r = 0; r < live; ++r) {
      Vec value[2];
      for (int v = 0; v < N; ++v) value[v] = add(load(sums + r * 32 + v * 16) + bias[v], r, v);
      if constexpr (kP == 1 && N == 2) {  // one store of a whole line
        const __m512bh words = _mm512_cvtne2ps_pbh(value[1], value[0]);
        std::memcpy(out + r * stride, &words, sizeof words);
      } else {
        for (int v = 0; v < N; ++v) store(out + r * stride + v * 16, value[v]);
      }
    }
  }

  void fill(const Block& block, int64_t chunk, int64_t chunk_end) const {
    with_prologue(p_.norm, [&](auto prologue) { fill<decltype(prologue)::value>(block, chunk, chunk_end); });
  }

  template <Prologue kPrologue>
  void fill(const Block& block, int64_t chunk, int64_t chunk_end) const {
    const Maps maps(coefficients_, block.batch);
    const int64_t part = part_bytes(block), begin = chunk * 32, end = std::min(chunk_end * 32, p_.in_channels);
    block.each_buffer_row([&, maps, part, begin, end](int64_t r, int64_t position) {
      char* to = buffer_ + r * 64;
      const T* x = position < 0 ? nullptr : row<T>(p_.x, block.batch, position);
      for (int64_t c = begin; c < end; c += 32, to += kP * part) {
        __m512i word[kP] = {};
        const int64_t n = end - c;
        if (x && kP == 1 && kPrologue == Prologue::none) {
          word[0] = _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, x + c);
        } else if (x) {
          Pair pair = load_pair(x + c, n);
          pair.first = apply<kPrologue, kDegree<T>>(pair.first, Map(maps, c));
          pair.second = apply<kPrologue, kDegree<T>>(pair.second, Map(maps, c + 16));
          split_words<kP>(pair.first, pair.second, word);
        }
        for (int j = 0; j < kP; ++j) _mm512_store_si512(to + j * part, word[j]);
      }
    });
  }
};

// What WeightGradient multiplies of a block on tiles: all rows of y and `count` channels, from `first` on, of the
// output gradient, the rows as depth.
template <class T>
class TileGradientProduct {
 public:
  using Row = T;
  using Registers = TileRegisters;
  static constexpr int64_t kMostRows = 512;
  static int64_t floats(const Extent& extent, int64_t columns) {
    return (columns + kInGroup) / 16 * (extent.rows / 32 * kTileFloats + 16) + 16;
  }

  TileGradientProduct(const Conv& p, const Block& block, const Row* rows, int64_t row_stride, int64_t first,
                      int64_t count, float* memory)
      : p_(p), block_(block), rows_(rows), row_stride_(row_stride), out_blocks_((count + 15) / 16) {
    const int64_t chunks = block.rows / 32;
    char* packed = reinterpret_cast<char*>(memory);
    const int64_t block_bytes = kTileBytes * kP * chunks + 64;  // 64 more: rows of tiles begin in different cache sets
    left_ = {packed, block_bytes, kTileBytes, kTileBytes * kP};
    right_ = {packed + round_up(out_blocks_ * block_bytes, 64), block_bytes, kTileBytes, kTileBytes * kP};
    for (int64_t c = 0; c < chunks; ++c) {
      const auto row_of = [&](int64_t i) {
        const T* d_out = gradient_row<T>(p, block, i);
        return d_out ? d_out + first : nullptr;
      };
      for (int64_t i = c * 32 + 32; i < std::min(c * 32 + 64, block.rows); ++i)
        if (const T* next = row_of(i)) prefetch(next, count);
      pack_depth_tiles<kP, true>(left_, c, count, [&](int64_t i) { return row_of(c * 32 + i); });
    }
  }

  // [out channel][in channel] of tap k over the rows lo .. hi - 1, added to `to` or, with `is_first`, instead of it.
  void multiply(int64_t k, int64_t lo, int64_t hi, int64_t, float* to, int64_t to_row, bool is_first) const {
    const int64_t stride = row_stride_;
    const Tiles a{left_.at(0, 0, lo / 32), left_.block, left_.part, left_.chunk};
    const Tiles b{right_.at(0, 0, lo / 32), right_.block, right_.part, right_.chunk};
    for (int64_t at = 0; at < p_.in_channels; at += kInGroup) {
      const int64_t group = std::min(kInGroup, p_.in_channels - at);
      for (int64_t c = lo / 32; c < hi / 32; ++c) {
        const Row* low = rows_ + (block_.at(c * 32) + block_.offset(k)) * stride + at;
        const Row* high = rows_ + (block_.at(c * 32 + 16) + block_.offset(k)) * stride + at;
        pack_depth_tiles<kP, false>(right_, c, group,
                                    [&](int64_t i) { return i < 16 ? low + i * stride : high + (i - 16) * stride; });
      }
      tile_gemm<kP>(out_blocks_, 0, (group + 15) / 16, (hi - lo) / 32, a, b, to + at, to_row, !is_first);
    }
  }

 private:
  static constexpr int kP = kParts<T>;
  static constexpr int64_t kTileFloats = kP == 1 ? 256 : 768;  // of 16 x 32 numbers in all their parts
  // In channels packed at a time, to be read from the cache by all out channels.
  static constexpr int64_t kInGroup = 64;

  const Conv& p_;
  const Block& block_;
  const Row* rows_;
  const int64_t row_stride_, out_blocks_;
  Tiles left_, right_;
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
