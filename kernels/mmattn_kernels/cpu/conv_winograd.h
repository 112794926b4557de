// SPDX-License-Identifier: MIT
// Convolutions of three taps along an axis with half the products of the sum over the taps for each axis (Winograd's
// F(4, 3); Lavin and Gray, arXiv 1509.09308). Of 6 inputs d, 3 weights g and 4 outputs along an axis:
//   out = A^T [(G g) . (B^T d)],   the products summed over the in channels as 6 matrix products;
//   d_g = G^T [(A d_out) . (B^T d)],   summed over the tiles as 6 matrix products;
// in frames along both, 36 products for the 144 of 4 x 4 outputs. The polynomials behind it are evaluated at 0, +-3/4,
// +-3/2 and infinity: all of A and B is exact in fp32, and errors are half of those of the usual 0, +-1, +-2. Frames of
// few channels have F(2, 3), at 0, +-1 and infinity, with 16 products for 36 and cheaper transforms.
//
// The tiles of a group of blocks are transformed by all threads, channels shared out as well; then each thread takes
// panels of out channels, transforms their weights for itself and multiplies: transformed weights, four times as large
// as packed ones, never leave its cache. Of few channels a thread's cache holds the inputs of a block as well: there a
// group is one block, and one thread's.
#pragma once

#include "conv_plan.h"
#include "gemm.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr float kPointA = 0.75f, kPointB = 1.5f, kA2 = kPointA * kPointA, kB2 = kPointB * kPointB;
// Of G at the points +-kPointA and +-kPointB, and at 0.
constexpr float kEvenA = 1 / (2 * kA2 * (kA2 - kB2)), kOddA = 1 / (2 * kPointA * (kA2 - kB2));
constexpr float kEvenB = 1 / (2 * kB2 * (kB2 - kA2)), kOddB = 1 / (2 * kPointB * (kB2 - kA2)),
                kAtZero = 1 / (kA2 * kB2);

// B^T d, A^T m and G g along an axis, of two outputs and of four; A d_out and G^T d_u of four.
inline void transform_input(Vec (&d)[4]) {
  const Vec first = d[0] - d[2], last = d[1] - d[3], sum = d[1] + d[2], difference = d[2] - d[1];
  d[0] = first, d[1] = sum, d[2] = difference, d[3] = last;
}
inline void transform_output(const Vec (&m)[4], Vec (&out)[2]) {
  out[0] = m[0] + m[1] + m[2];
  out[1] = m[1] - m[2] - m[3];
}
inline void transform_weight(const Vec (&g)[3], Vec (&u)[4]) {
  const Vec even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
  u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
}
inline void transform_input(Vec (&d)[6]) {
  const Vec first = kA2 * kB2 * d[0] - (kA2 + kB2) * d[2] + d[4];
  const Vec last = kA2 * kB2 * d[1] - (kA2 + kB2) * d[3] + d[5];
  const Vec even_a = d[4] - kB2 * d[2], odd_a = kPointA * (d[3] - kB2 * d[1]);
  const Vec even_b = d[4] - kA2 * d[2], odd_b = kPointB * (d[3] - kA2 * d[1]);
  d[0] = first, d[5] = last;
  d[1] = even_a + odd_a, d[2] = even_a - odd_a;
  d[3] = even_b + odd_b, d[4] = even_b - odd_b;
}
inline void transform_output(const Vec (&m)[6], Vec (&out)[4]) {
  const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  out[0] = m[0] + sum_a + sum_b;
  out[1] = kPointA * difference_a + kPointB * difference_b;
  out[2] = kA2 * sum_a + kB2 * sum_b;
  out[3] = kA2 * kPointA * difference_a + kB2 * kPointB * difference_b + m[5];
}
inline void transform_weight(const Vec (&g)[3], Vec (&u)[6]) {
  const Vec even_a = kEvenA * (g[0] + kA2 * g[2]), odd_a = kOddA * g[1];
  const Vec even_b = kEvenB * (g[0] + kB2 * g[2]), odd_b = kOddB * g[1];
  u[0] = kAtZero * g[0], u[5] = g[2];
  u[1] = even_a + odd_a, u[2] = even_a - odd_a;
  u[3] = even_b + odd_b, u[4] = even_b - odd_b;
}

inline void transform_output_gradient(const Vec (&d)[4], Vec (&m)[6]) {
  const Vec even_a = d[0] + kA2 * d[2], odd_a = kPointA * (d[1] + kA2 * d[3]);
  const Vec even_b = d[0] + kB2 * d[2], odd_b = kPointB * (d[1] + kB2 * d[3]);
  m[0] = d[0], m[5] = d[3];
  m[1] = even_a + odd_a, m[2] = even_a - odd_a;
  m[3] = even_b + odd_b, m[4] = even_b - odd_b;
}
inline void transform_weight_gradient(const Vec (&u)[6], Vec (&g)[3]) {
  const Vec even_a = kEvenA * (u[1] + u[2]), odd_a = kOddA * (u[1] - u[2]);
  const Vec even_b = kEvenB * (u[3] + u[4]), odd_b = kOddB * (u[3] - u[4]);
  g[0] = kAtZero * u[0] + even_a + even_b;
  g[1] = odd_a + odd_b;
  g[2] = kA2 * even_a + kB2 * even_b + u[5];
}

// The outputs as frames of lines; a sequence is one frame, whose lines are a dilation long and whose taps are above
// each other. The last line may end early.
struct Grid {
  int64_t frames = 1, height, width, length;
  explicit Grid(const Conv& p) : length(p.length) {
    height = p.width ? p.height : (p.length + p.dilation - 1) / p.dilation;
    width = p.width ? p.width : std::min(p.dilation, p.length);
    if (p.width) frames = p.length / (p.height * p.width);
  }
  // -1 outside of the frame.
  int64_t position(int64_t frame, int64_t y, int64_t x) const {
    if (y < 0 || x < 0 || y >= height || x >= width) return -1;
    const int64_t at = (frame * height + y) * width + x;
    return at < length ? at : -1;
  }
};

// Tiles [row, row + rows) x [column, column + columns) of some frames of a batch; `first` is the place of the first
// among the tiles of its group.
struct TileBlock {
  int64_t batch, frame, frames, row, rows, column, columns, first;
  int64_t tiles() const { return frames * rows * columns; }
};

// With kFrames 3 x 3 taps in frames, else three along the sequence; kTile outputs along an axis. Weights are those of
// the sum over the taps, FmaConv or TileConv.
template <class Weights, class T, bool kFrames, int kTile>
class WinogradConv {
 public:
  // Where the saved products outweigh the transforms, those of the weights above all.
  static bool is_faster(const Conv& p) {
    // Dot products of bf16 need no transformed weights, whose time is that of some twenty tiles.
    constexpr int64_t kFewestTiles = kTile == 2 ? 64 : kOnTiles<T> ? 32 : 16, kFewestChannels = kTile == 4 ? 96 : 32;
    constexpr double kMostProducts = 0.8;  // of those of the sum over the taps
    if (p.taps != kTaps || (p.width > 0) != kFrames) return false;
    if (kFrames && p.length % (p.height * p.width)) return false;
    const int64_t tiles = p.batch * count_tiles(Grid(p));
    const int64_t outside = kFrames ? 0 : 2 * std::min(p.dilation, p.length);  // taps that find no position
    return tiles >= kFewestTiles && p.in_channels >= kFewestChannels && p.out_channels >= kFewestChannels &&
           kPoints * tiles <= kMostProducts * p.batch * (p.length * kTaps - outside);
  }

  static void forward(const Conv& p) {
    const Coefficients coefficients(p.batch, p.in_channels);
    prepare<T>(p.norm, p.x, p.batch, p.length, p.in_channels, p.threads, coefficients);
    const Packed<Weights> packed(p);
    const Plan plan(p);
    const PerChannel bias(1, p.out_channels, 1);
    fill_bias(p, bias);
    const WinogradConv conv(p, packed.data(), coefficients, bias.at(0, 0));
    const int64_t chunks = conv.in_.chunks, pieces = plan.pieces(), groups = plan.count();
    const int64_t of_inputs = chunks * kPoints * point_of(plan.most_tiles()), of_panels = plan.panels * kPoints;
    const int64_t per_thread = std::max(plan.most_pixels() * kDepth,
                                        of_panels * (conv.in_.depth * kPanel + kLine + step_of(plan.most_of_piece())));
    const Buffer memory(p.threads * per_thread + (kShared ? 1 : p.threads) * of_inputs);
    const auto transform = [&](int64_t group, int64_t i, float* own, float* inputs) {
      const auto [blocks, count] = plan.group(group);
      conv.template transform<false>(blocks[i / chunks], i % chunks, tiles_of(blocks, blocks + count), own, inputs);
    };
    const auto multiply = [&](int64_t group, int64_t i, float* own, const float* inputs) {
      const auto [blocks, count] = plan.group(group);
      const auto [panels, range] = plan.piece(i, count);
      conv.multiply(blocks + range.begin, blocks + range.end, panels, tiles_of(blocks, blocks + count), inputs, own);
    };
#pragma omp parallel num_threads(p.threads)
    {
      float* own = memory.data() + thread_number() * per_thread;
      float* inputs = memory.data() + p.threads * per_thread + (kShared ? 0 : thread_number() * of_inputs);
      if constexpr (kShared) {
        for (int64_t group = 0; group < groups; ++group) {
#pragma omp for schedule(dynamic, 1)
          for (int64_t i = 0; i < plan.group(group).second * chunks; ++i) transform(group, i, own, inputs);
#pragma omp for schedule(dynamic, 1)
          for (int64_t i = 0; i < pieces; ++i) multiply(group, i, own, inputs);
        }
      } else {
#pragma omp for schedule(dynamic, 1)
        for (int64_t group = 0; group < groups; ++group) {
          for (int64_t i = 0; i < chunks; ++i) transform(group, i, own, inputs);
          for (int64_t i = 0; i < pieces; ++i) multiply(group, i, own, inputs);
        }
      }
    }
  }

  static void tell(const Conv& p, const Work& work) {
    tell_prepare(p.norm, p.batch, p.length, p.in_channels, p.threads, work);
    if (!p.packed) tell_packing(p, Weights::panels(p.out_channels), Weights::kColumns, work);
    const Plan plan(p);
    for (int64_t group = 0; group < plan.count(); ++group) {
      const auto [blocks, count] = plan.group(group);
      if (!kShared) {
        const int64_t tiles = blocks->tiles(), columns = plan.all_panels * kPanel;
        work.dynamic("blocks", products_of(tiles, p.in_channels, columns),
                     numbers_of<false>(*blocks) * p.in_channels + numbers_of_products(p, tiles, columns));
        continue;
      }
      tell_transforms<false>(blocks, count, Chunks(p.in_channels), work);
      for (int64_t i = 0; i < plan.pieces(); ++i) {
        const auto [panels, range] = plan.piece(i, count);
        const int64_t tiles = tiles_of(blocks + range.begin, blocks + range.end);
        const int64_t columns = (panels.end - panels.begin) * kPanel;
        work.dynamic("products", products_of(tiles, p.in_channels, columns), numbers_of_products(p, tiles, columns));
      }
    }
  }

  // Of the weight, in frames; along the sequence, and of few channels, the transforms would outweigh the products.
  static void weight_gradient(const Conv& p) {
    static_assert(kFrames && kTile == 4);
    const Coefficients coefficients(p.batch, p.in_channels);
    set_coefficients_from_stats(p.norm, coefficients, p.batch, p.in_channels);
    const GradientPlan plan(p);
    const WinogradConv conv(p, nullptr, coefficients, nullptr);
    const int64_t in_chunks = conv.in_.chunks, chunks = in_chunks + conv.out_.chunks;
    const int64_t of_inputs = in_chunks * kPoints * point_of(plan.most_tiles());
    const int64_t of_gradients = conv.out_.chunks * kPoints * point_of(plan.most_tiles());
    const int64_t per_thread =
        round_up(std::max({plan.most_pixels() * kDepth, kPoints * sums_of(plan.rows), p.in_channels * kTaps}), kLine);
    const Buffer memory(p.threads * per_thread + of_inputs + of_gradients), sums(kTaps * sums_of_tap(p));
#pragma omp parallel num_threads(p.threads)
    {
      float* own = memory.data() + thread_number() * per_thread;
      float *inputs = memory.data() + p.threads * per_thread, *gradients = inputs + of_inputs;
      for (int64_t group = 0; group < plan.count(); ++group) {
        const auto [blocks, count] = plan.group(group);
        const int64_t tiles = tiles_of(blocks, blocks + count);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * chunks; ++i)
          if (const int64_t chunk = i % chunks; chunk < in_chunks)
            conv.template transform<false>(blocks[i / chunks], chunk, tiles, own, inputs);
          else
            conv.template transform<true>(blocks[i / chunks], chunk - in_chunks, tiles, own, gradients);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < plan.pieces(); ++i)
          conv.add_products(plan.piece(i), tiles, inputs, gradients, own, sums.data(), group == 0);
      }
#pragma omp for schedule(static)
      for (int64_t o = 0; o < p.out_channels; ++o)
        write_weight_gradient(p, o, sums.data() + o * padded(p.in_channels), sums_of_tap(p), own);
    }
  }

  static void tell_weight_gradient(const Conv& p, const Work& work) {
    work.fixed("coefficients", 0, 2 * kOfChannel * p.in_channels * p.batch);
    const GradientPlan plan(p);
    for (int64_t group = 0; group < plan.count(); ++group) {
      const auto [blocks, count] = plan.group(group);
      tell_transforms<false>(blocks, count, plan.in, work);
      tell_transforms<true>(blocks, count, plan.out, work);
      for (int64_t i = 0; i < plan.pieces(); ++i) {
        const Piece piece = plan.piece(i);
        const int64_t sums = piece.rows * (plan.in.end(piece.chunk) - plan.in.begin(piece.chunk));
        work.dynamic("products", products_of(plan.tiles(group), sums, 1), kPoints / 4.0 * sums);
      }
    }
    for (int64_t o = 0; o < p.out_channels; ++o) work.fixed("sums", 0, kTaps * p.in_channels);
  }

 private:
  static constexpr int kInputs = kTile + 2;  // that kTile outputs read along an axis
  static constexpr int64_t kTileColumns = kFrames ? kTile : 1, kTaps = kFrames ? 9 : 3;
  static constexpr int64_t kPoints = kFrames ? kInputs * kInputs : kInputs;
  static constexpr bool kShared = kTile == 4;                            // transformed inputs, among threads
  static constexpr int64_t kTiles = 64, kSmallestBlock = 4, kStrip = 8;  // of a block, and the most in a line of it
  static constexpr int64_t kPieceTiles = 256;                            // that are multiplied at a time
  static constexpr int64_t kPanels = std::max<int64_t>(1, (kFrames ? 32 : 128) / kPanel);  // by so many
  static constexpr int64_t kDepth = 64;  // in channels of a product: sums of sums are more accurate
  static constexpr int64_t kAhead = 4;   // positions whose rows are asked for before they are read
  static constexpr int64_t kLine = 16;   // floats of a line of the cache
  static constexpr int64_t kStride = kDepth + kLanes;
  static constexpr int64_t kGroupBytes = 4 << 20;  // of transforms for each thread
  static constexpr int64_t kGradientTiles = 64;    // of a product that is added to the gradient of transformed weights

  struct Range {
    int64_t begin, end;
  };

  // Channels that are transformed at a time, at most kDepth.
  struct Chunks {
    int64_t channels, chunks, depth;
    explicit Chunks(int64_t n)
        : channels(n), chunks((n + kDepth - 1) / kDepth), depth(round_up((n + chunks - 1) / chunks, kLanes)) {}
    int64_t begin(int64_t chunk) const { return chunk * depth; }
    int64_t end(int64_t chunk) const { return std::min(channels, (chunk + 1) * depth); }
  };

  const Conv& p_;
  const Grid grid_;
  const void* packed_;
  const float* bias_;
  const Coefficients& coefficients_;
  const Chunks in_, out_;

  static int64_t tile_rows(const Grid& g) { return (g.height + kTile - 1) / kTile; }
  static int64_t tile_columns(const Grid& g) { return (g.width + kTileColumns - 1) / kTileColumns; }
  static int64_t count_tiles(const Grid& g) { return g.frames * tile_rows(g) * tile_columns(g); }
  // The lines and columns of pixels that the tiles of a block read, or whose gradients they read.
  template <bool kGradients>
  static int64_t lines(const TileBlock& b) {
    return kTile * b.rows + (kGradients ? 0 : 2);
  }
  template <bool kGradients>
  static int64_t line(const TileBlock& b) {
    return kFrames ? kTile * b.columns + (kGradients ? 0 : 2) : b.columns;
  }
  template <bool kGradients>
  static int64_t pixels(const TileBlock& b) {
    return b.frames * lines<kGradients>(b) * line<kGradients>(b);
  }
  static int64_t tiles_of(const TileBlock* block, const TileBlock* end) {
    return block == end ? 0 : end[-1].first + end[-1].tiles() - block->first;
  }

  static double products_of(int64_t tiles, int64_t in_channels, int64_t columns) {
    return static_cast<double>(kPoints) * tiles * in_channels * columns;
  }
  // Of a channel, what is prepared, transformed and written, of which a transform's number takes a quarter of the time.
  template <bool kGradients>
  static double numbers_of(const TileBlock& b) {
    return pixels<kGradients>(b) + kPoints / 4.0 * b.tiles();
  }
  static double numbers_of_products(const Conv& p, int64_t tiles, int64_t columns) {
    return kPoints / 4.0 * (p.in_channels + tiles) * columns;
  }
  template <bool kGradients>
  static void tell_transforms(const TileBlock* blocks, int64_t count, const Chunks& chunks, const Work& work) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < chunks.chunks; ++c)
        work.dynamic("transforms", 0, numbers_of<kGradients>(blocks[i]) * (chunks.end(c) - chunks.begin(c)));
  }
  static double rounds(int64_t pieces, int64_t threads) { return (pieces + threads - 1) / threads; }

  // Blocks of tiles in groups, whose transforms are there at a time.
  struct Groups {
    std::vector<TileBlock> blocks;
    std::vector<int64_t> begins;  // of each group, and the end of the last
    TileBlock largest{};          // block

    // Blocks of at most `most` tiles; groups of `fit` at most, about, or with 0 of a block each.
    Groups(const Conv& p, int64_t most, int64_t fit) : blocks(cut(p, most)) {
      const int64_t total = p.batch * count_tiles(Grid(p)), groups = fit ? (total + fit - 1) / fit : 1;
      const int64_t even = fit ? (total + groups - 1) / groups : 0;
      int64_t tiles = 0;
      for (size_t i = 0; i < blocks.size(); ++i) {
        if (i == 0 || tiles + blocks[i].tiles() / 2 > even) begins.push_back(i), tiles = 0;
        blocks[i].first = tiles, tiles += blocks[i].tiles();
        if (blocks[i].tiles() > largest.tiles()) largest = blocks[i];
      }
      begins.push_back(blocks.size());
    }

    int64_t count() const { return begins.size() - 1; }
    std::pair<const TileBlock*, int64_t> group(int64_t i) const {
      return {blocks.data() + begins[i], begins[i + 1] - begins[i]};
    }
    int64_t tiles(int64_t i) const { return tiles_of(blocks.data() + begins[i], blocks.data() + begins[i + 1]); }
    int64_t most_tiles() const {
      return most([&](int64_t i) { return tiles(i); });
    }
    int64_t most_blocks() const {
      return most([&](int64_t i) { return begins[i + 1] - begins[i]; });
    }
    int64_t most_pixels() const {
      int64_t most = 0;
      for (const TileBlock& b : blocks) most = std::max(most, pixels<false>(b));
      return most;
    }
    template <class Count>
    int64_t most(Count count_of) const {
      int64_t most = 0;
      for (int64_t i = 0; i < count(); ++i) most = std::max(most, count_of(i));
      return most;
    }
    // Of the largest blocks in every round, in multiply-adds.
    template <bool kGradients>
    double time_of_transforms(int64_t group, const Chunks& chunks, int64_t threads) const {
      const int64_t pieces = (begins[group + 1] - begins[group]) * chunks.chunks;
      return rounds(pieces, threads) * kOfNumber * numbers_of<kGradients>(largest) * chunks.depth;
    }
  };

  // For each group pieces of so many panels and ranges of its blocks.
  struct Plan : Groups {
    int64_t all_panels, panels, ranges;

    explicit Plan(const Conv& p) : Plan(p, kTiles, kPanels) {
      double least = time(p);
      const double even = kUnevenTasks * work(p) / p.threads;
      for (int64_t tiles = kTiles; tiles >= kSmallestBlock && least > even; tiles /= 2)
        for (int64_t of_piece = kPanels; of_piece > 0; of_piece /= 2)
          for (Plan other(p, tiles, of_piece); other.ranges <= other.most_blocks(); ++other.ranges) {
            if (const double found = other.time(p); found < least) least = found, *this = other;
            if (other.pieces() > 8 * p.threads) break;
          }
    }

    int64_t panel_groups() const { return (all_panels + panels - 1) / panels; }
    int64_t pieces() const { return panel_groups() * ranges; }
    // Its panels, and which of the `count` blocks of a group. Neighbours read the same inputs.
    std::pair<Range, Range> piece(int64_t i, int64_t count) const {
      const int64_t range = i / panel_groups(), group = i % panel_groups();
      return {{all_panels * group / panel_groups(), all_panels * (group + 1) / panel_groups()},
              {count * range / ranges, count * (range + 1) / ranges}};
    }
    int64_t most_of_piece() const {
      return this->most([&](int64_t i) {
        const auto [blocks, count] = this->group(i);
        int64_t most = 0;
        for (int64_t r = 0; r < ranges; ++r)
          most = std::max(most, tiles_of(blocks + count * r / ranges, blocks + count * (r + 1) / ranges));
        return most;
      });
    }

   private:
    Plan(const Conv& p, int64_t most, int64_t panels_of_piece)
        : Groups(p, most, kShared ? fit(p) : 0), all_panels(panels_of(p.out_channels)), panels(panels_of_piece) {
      ranges = std::max<int64_t>(1, (this->most_tiles() + kPieceTiles / 2) / kPieceTiles);
    }
    static int64_t fit(const Conv& p) {
      const int64_t of_tile = kPoints * Chunks(p.in_channels).chunks * kStride * sizeof(float);
      return std::max(kTiles, kGroupBytes * p.threads / of_tile);
    }

    // Of the threads, at most, in multiply-adds; and of one thread alone.
    double time(const Conv& p) const {
      const Chunks in(p.in_channels);
      const int64_t columns = (all_panels + panel_groups() - 1) / panel_groups() * kPanel;
      double sum = 0;
      for (int64_t i = 0; i < this->count(); ++i) {
        const int64_t each = (this->group(i).second + ranges - 1) / ranges, all = this->tiles(i);
        const int64_t tiles = std::min(each * this->largest.tiles(), all), threads = kShared ? p.threads : 1;
        const double of_piece =
            products_of(tiles, in.channels, columns) + kOfNumber * numbers_of_products(p, tiles, columns);
        sum += this->template time_of_transforms<false>(i, in, threads) + rounds(pieces(), threads) * of_piece;
      }
      return kShared ? sum : sum / this->count() * rounds(this->count(), p.threads);
    }
    double work(const Conv& p) const {
      double sum = 0;
      int64_t tiles = 0;
      for (const TileBlock& b : this->blocks)
        sum += kOfNumber * numbers_of<false>(b) * p.in_channels, tiles += b.tiles();
      const int64_t columns = p.out_channels;
      return sum + products_of(tiles, p.in_channels, columns) + kOfNumber * numbers_of_products(p, tiles, columns);
    }
  };

  // Of a gradient: a chunk of in channels, and out channels of a chunk, `rows` from `row` on.
  struct Piece {
    int64_t chunk, out_chunk, row, rows;
  };
  struct GradientPlan : Groups {
    Chunks in, out;
    int64_t rows;  // out channels of a piece, at most

    explicit GradientPlan(const Conv& p) : GradientPlan(p, kTiles, kDepth) {
      double least = time(p.threads);
      const double even = kUnevenTasks * time(1) / p.threads;
      for (int64_t tiles = kTiles; tiles >= kSmallestBlock && least > even; tiles /= 2)
        for (int64_t of_piece = kDepth; of_piece >= 4; of_piece /= 2)
          if (GradientPlan other(p, tiles, of_piece); other.time(p.threads) < least)
            least = other.time(p.threads), *this = other;
    }

    int64_t splits() const { return (out.depth + rows - 1) / rows; }  // of a chunk of out channels
    int64_t pieces() const { return in.chunks * out.chunks * splits(); }
    // Neighbours read the same gradients.
    Piece piece(int64_t i) const {
      const int64_t chunk = i % in.chunks, split = i / in.chunks % splits(), out_chunk = i / in.chunks / splits();
      const int64_t row = out.begin(out_chunk) + split * rows;
      return {chunk, out_chunk, row, std::clamp<int64_t>(out.end(out_chunk) - row, 0, rows)};
    }

   private:
    GradientPlan(const Conv& p, int64_t most, int64_t rows_of_piece)
        : Groups(p, most, fit(p)), in(p.in_channels), out(p.out_channels), rows(rows_of_piece) {}
    static int64_t fit(const Conv& p) {
      const int64_t chunks = Chunks(p.in_channels).chunks + Chunks(p.out_channels).chunks;
      return std::max<int64_t>(kTiles, kGroupBytes * p.threads / (kPoints * chunks * kStride * sizeof(float)));
    }
    double time(int64_t threads) const {
      double sum = 0;
      for (int64_t i = 0; i < this->count(); ++i) {
        const double of_sum = products_of(this->tiles(i), 1, 1) + kOfNumber * kPoints / 4.0;
        sum += this->template time_of_transforms<false>(i, in, threads) +
               this->template time_of_transforms<true>(i, out, threads) +
               rounds(pieces(), threads) * of_sum * std::min(rows, out.depth) * in.depth;
      }
      return sum;
    }
  };

  // Rectangles of at most `most` tiles, in frames as square as that allows: the pixels at a border are prepared for
  // both sides of it.
  static std::vector<TileBlock> cut(const Conv& p, int64_t most) {
    const Grid grid(p);
    const int64_t rows = tile_rows(grid), columns = tile_columns(grid);
    const int64_t tall = std::min(rows, std::max<int64_t>(1, most / std::min(columns, kStrip)));
    const int64_t wide = std::min(columns, std::max<int64_t>(1, most / tall));
    const int64_t strips = (rows + tall - 1) / tall, parts = (columns + wide - 1) / wide;
    const int64_t together = strips * parts > 1 ? 1 : std::max<int64_t>(1, most / (rows * columns));
    std::vector<TileBlock> blocks;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t f = 0; f < grid.frames; f += together)
        for (int64_t i = 0; i < strips; ++i)
          for (int64_t j = 0; j < parts; ++j) {
            const int64_t row = rows * i / strips, column = columns * j / parts;
            blocks.push_back({b, f, std::min(together, grid.frames - f), row, rows * (i + 1) / strips - row, column,
                              columns * (j + 1) / parts - column, 0});
          }
    return blocks;
  }

  WinogradConv(const Conv& p, const void* packed, const Coefficients& coefficients, const float* bias)
      : p_(p),
        grid_(p),
        packed_(packed),
        bias_(bias),
        coefficients_(coefficients),
        in_(p.in_channels),
        out_(p.out_channels) {}

  // Floats from a point to the next, of a group's transforms, a piece's products and its gradients of transformed
  // weights: not a multiple of a page, or all points of a tile would share a set of the cache.
  static int64_t point_of(int64_t tiles) { return round_up(tiles * kStride, 1024) + 2 * kLine; }
  static int64_t step_of(int64_t tiles) { return round_up(tiles * kPanel, 1024) + kLine; }
  static int64_t sums_of(int64_t rows) { return rows * kDepth + kLine; }
  // In channels from a row of the gradient of the weight to the next, and from a tap.
  static int64_t padded(int64_t channels) { return round_up(channels, 32) + kLine; }
  static int64_t sums_of_tap(const Conv& p) { return p.out_channels * padded(p.in_channels) + kLine; }

  // Of a chunk of in channels, or of out channels of the output gradient, to [chunk][point][tile of the
  // group][kStride].
  template <bool kGradients>
  void transform(const TileBlock& block, int64_t chunk, int64_t tiles, float* pixels, float* to) const {
    const Chunks& chunks = kGradients ? out_ : in_;
    const int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
    if constexpr (kGradients)
      fill<true, Prologue::none>(block, begin, end, pixels);
    else
      with_prologue(p_.norm, [&](auto prologue) { fill<false, decltype(prologue)::value>(block, begin, end, pixels); });
    const int64_t pitch = line<kGradients>(block), point = point_of(tiles);
    to += chunk * kPoints * point + block.first * kStride;
    for (int64_t f = 0; f < block.frames; ++f)
      for (int64_t i = 0; i < block.rows; ++i)
        for (int64_t j = 0; j < block.columns; ++j, to += kStride) {
          const int64_t first = (f * lines<kGradients>(block) + kTile * i) * pitch + kTileColumns * j;
          for (int64_t c = 0; c < end - begin; c += kLanes)
            transform_tile<kGradients>(pixels + first * kDepth + c, pitch * kDepth, to + c, point);
        }
  }

  template <bool kGradients>
  static void transform_tile(const float* from, int64_t pitch, float* to, int64_t point) {
    constexpr int kSide = kGradients ? kTile : kInputs;
    Vec lines[kInputs][kFrames ? kSide : 1];
    for (int x = 0; x < (kFrames ? kSide : 1); ++x) {
      Vec d[kSide], m[kInputs];
#pragma GCC unroll 6
      for (int y = 0; y < kSide; ++y) d[y] = load(from + y * pitch + x * kDepth);
      to_points<kGradients>(d, m);
#pragma GCC unroll 6
      for (int y = 0; y < kInputs; ++y) lines[y][x] = m[y];
    }
    for (int y = 0; y < kInputs; ++y) {
      if constexpr (!kFrames) {
        store(to + y * point, lines[y][0]);
      } else {
        Vec m[kInputs];
        to_points<kGradients>(lines[y], m);
#pragma GCC unroll 6
        for (int x = 0; x < kInputs; ++x) store(to + (kInputs * y + x) * point, m[x]);
      }
    }
  }
  template <bool kGradients, int kSide>
  static void to_points(const Vec (&d)[kSide], Vec (&m)[kInputs]) {
    if constexpr (kGradients) {
      transform_output_gradient(d, m);
    } else {
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) m[i] = d[i];
      transform_input(m);
    }
  }

  // Channels [begin, end) of what the tiles of a block read, behind the prologue; zeros outside the frame.
  template <bool kGradients, Prologue kPrologue>
  void fill(const TileBlock& block, int64_t begin, int64_t end, float* to) const {
    const Tokens& rows = kGradients ? p_.out : p_.x;
    const Maps maps(coefficients_, block.batch);
    const int64_t margin = kGradients ? 0 : 1, column = kFrames ? kTile * block.column - margin : block.column;
    for (int64_t f = block.frame; f < block.frame + block.frames; ++f)
      for (int64_t i = 0; i < lines<kGradients>(block); ++i)
        for (int64_t j = 0; j < line<kGradients>(block); ++j, to += kDepth) {
          const int64_t position = grid_.position(f, kTile * block.row - margin + i, column + j);
          if (position < 0) {
            std::memset(to, 0, kDepth * sizeof(float));
            continue;
          }
          const T* from = row<T>(rows, block.batch, position);
          prefetch(row<T>(rows, block.batch, std::min(position + kAhead, p_.length - 1)) + begin, end - begin);
          for (int64_t c = begin; c < end; c += kLanes) {
            const Vec x = load_lanes(from + c, end - c);
            if constexpr (kPrologue == Prologue::none)
              store(to + c - begin, x);
            else
              store(to + c - begin, apply<kPrologue, kDegree<T>>(x, Map(maps, c)));
          }
        }
  }

  void multiply(const TileBlock* block, const TileBlock* blocks_end, Range panels, int64_t tiles, const float* inputs,
                float* own) const {
    if (block == blocks_end) return;
    const int64_t rows = tiles_of(block, blocks_end), count = panels.end - panels.begin, first = block->first;
    const int64_t of_panel = in_.depth * kPanel, of_point = count * of_panel + kLine, step = step_of(rows);
    float *weights = own, *products = own + kPoints * of_point;  // [point][panel][in channel], [panel][point][tile]
    for (int64_t chunk = 0; chunk < in_.chunks; ++chunk) {
      const int64_t begin = in_.begin(chunk), depth = in_.end(chunk) - begin;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < depth; ++c)
          transform_weights(panels.begin + i, begin + c, weights + i * of_panel + c * kPanel, of_point);
      const float* of_chunk = inputs + chunk * kPoints * point_of(tiles) + first * kStride;
      for (int64_t point = 0; point < kPoints; ++point)
        for (int64_t i = 0; i < count; ++i) {
          const Gemm g{rows,
                       vecs_of_panel(p_.out_channels, panels.begin + i),
                       depth,
                       {of_chunk + point * point_of(tiles), kStride, 1},
                       {weights + point * of_point + i * of_panel, kLanes, kPanel},
                       {products + (i * kPoints + point) * step, kPanel}};
          chunk == 0 ? gemm<Init::zero>(g) : gemm<Init::add>(g);
        }
    }
    for (; block < blocks_end; ++block)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t v = 0; v < vecs_of_panel(p_.out_channels, panels.begin + i); ++v)
          transform_outputs(*block, (panels.begin + i) * kPanel + v * kLanes,
                            products + i * kPoints * step + (block->first - first) * kPanel + v * kLanes, step);
  }

  void transform_weights(int64_t panel, int64_t channel, float* to, int64_t point) const {
    for (int64_t v = 0; v < vecs_of_panel(p_.out_channels, panel) * kLanes; v += kLanes) {
      const auto weight = [&](int64_t tap) {
        return Weights::load_packed(p_, packed_, panel * kPanel + v, tap, channel);
      };
      if constexpr (!kFrames) {
        Vec u[kInputs];
        const Vec g[3] = {weight(0), weight(1), weight(2)};
        transform_weight(g, u);
        for (int i = 0; i < kInputs; ++i) store(to + i * point + v, u[i]);
      } else {
        Vec lines[3][kInputs], u[kInputs];
        for (int i = 0; i < 3; ++i) {
          const Vec g[3] = {weight(3 * i), weight(3 * i + 1), weight(3 * i + 2)};
          transform_weight(g, lines[i]);
        }
        for (int x = 0; x < kInputs; ++x) {
          const Vec g[3] = {lines[0][x], lines[1][x], lines[2][x]};
          transform_weight(g, u);
          for (int y = 0; y < kInputs; ++y) store(to + (kInputs * y + x) * point + v, u[y]);
        }
      }
    }
  }

  // Of a group, to or onto sums [tap][out channel][in channel].
  void add_products(const Piece& piece, int64_t tiles, const float* inputs, const float* gradients, float* own,
                    float* sums, bool is_first) const {
    const int64_t begin = in_.begin(piece.chunk), vecs = (in_.end(piece.chunk) - begin + kLanes - 1) / kLanes;
    const int64_t point = point_of(tiles), step = sums_of(piece.rows);
    inputs += piece.chunk * kPoints * point;
    gradients += piece.out_chunk * kPoints * point + piece.row - out_.begin(piece.out_chunk);
    for (int64_t i = 0; i < kPoints; ++i)
      for (int64_t tile = 0; tile < tiles; tile += kGradientTiles) {
        const Gemm g{piece.rows,
                     vecs,
                     std::min(kGradientTiles, tiles - tile),
                     {gradients + i * point + tile * kStride, 1, kStride},
                     {inputs + i * point + tile * kStride, kLanes, kStride},
                     {own + i * step, kDepth}};
        tile == 0 ? gemm<Init::zero>(g) : gemm<Init::add>(g);
      }
    for (int64_t r = 0; r < piece.rows; ++r)
      for (int64_t c = 0; c < vecs * kLanes; c += kLanes)
        add_weight_gradient(own + r * kDepth + c, step, sums + (piece.row + r) * padded(p_.in_channels) + begin + c,
                            is_first);
  }

  void add_weight_gradient(const float* from, int64_t step, float* to, bool is_first) const {
    const int64_t tap = sums_of_tap(p_);
    Vec lines[3][kInputs], g[3];
    for (int x = 0; x < kInputs; ++x) {
      Vec u[kInputs];
#pragma GCC unroll 6
      for (int y = 0; y < kInputs; ++y) u[y] = load(from + (kInputs * y + x) * step);
      transform_weight_gradient(u, g);
      for (int y = 0; y < 3; ++y) lines[y][x] = g[y];
    }
    for (int y = 0; y < 3; ++y) {
      transform_weight_gradient(lines[y], g);
      for (int x = 0; x < 3; ++x, to += tap) store(to, is_first ? g[x] : load(to) + g[x]);
    }
  }

  // One vector of out channels, from `first` on, of all tiles of a block.
  void transform_outputs(const TileBlock& block, int64_t first, const float* products, int64_t step) const {
    for (int64_t f = block.frame; f < block.frame + block.frames; ++f)
      for (int64_t i = block.row; i < block.row + block.rows; ++i)
        for (int64_t j = block.column; j < block.column + block.columns; ++j, products += kPanel) {
          Vec lines[kTile][kFrames ? kInputs : 1];
          for (int x = 0; x < (kFrames ? kInputs : 1); ++x) {
            Vec m[kInputs], out[kTile];
#pragma GCC unroll 6
            for (int y = 0; y < kInputs; ++y) m[y] = load(products + (kFrames ? kInputs * y + x : y) * step);
            transform_output(m, out);
#pragma GCC unroll 4
            for (int y = 0; y < kTile; ++y) lines[y][x] = out[y];
          }
          for (int y = 0; y < kTile; ++y) {
            Vec out[kTileColumns];
            if constexpr (kFrames)
              transform_output(lines[y], out);
            else
              out[0] = lines[y][0];
            for (int x = 0; x < kTileColumns; ++x) {
              const int64_t position = grid_.position(f, kTile * i + y, kTileColumns * j + x);
              if (position >= 0) write(block.batch, position, first, out[x]);
            }
          }
        }
  }

  void write(int64_t batch, int64_t position, int64_t first, Vec value) const {
    const int64_t left = p_.out_channels - first;
    value += load(bias_ + first);
    if (p_.residual.data) value += load_lanes(row<T>(p_.residual, batch, position) + first, left);
    store_lanes(row<T>(p_.out, batch, position) + first, value, left);
  }
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
