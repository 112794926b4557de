// SPDX-License-Identifier: MIT
// Convolutions of three taps along an axis with half the products of the sum over the taps for each axis (Winograd's
// F(4, 3); Lavin and Gray, arXiv 1509.09308). Of 6 inputs d, 3 weights g and 4 outputs along an axis:
//   out = A^T [(G g) . (B^T d)],   the products summed over the in channels as 6 matrix products;
// in frames along both, 36 products for the 144 of 4 x 4 outputs. The polynomials behind it are evaluated at 0, +-3/4,
// +-3/2 and infinity: all of A and B is exact in fp32, and errors are half of those of the usual 0, +-1, +-2. Frames of
// few channels have F(2, 3), at 0, +-1 and infinity, with 16 products for 36 and cheaper transforms.
//
// The tiles of a group of blocks are transformed by all threads, channels shared out as well; then each thread takes
// panels of out channels, transforms their weights for itself and multiplies: transformed weights, four times as large
// as packed ones, never leave its cache.
#pragma once

#include "conv_plan.h"
#include "gemm.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr float kPointA = 0.75f, kPointB = 1.5f;

// B^T d, A^T m and G g along an axis, of two outputs and of four.
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
  constexpr float kA2 = kPointA * kPointA, kB2 = kPointB * kPointB;
  const Vec first = kA2 * kB2 * d[0] - (kA2 + kB2) * d[2] + d[4];
  const Vec last = kA2 * kB2 * d[1] - (kA2 + kB2) * d[3] + d[5];
  const Vec even_a = d[4] - kB2 * d[2], odd_a = kPointA * (d[3] - kB2 * d[1]);
  const Vec even_b = d[4] - kA2 * d[2], odd_b = kPointB * (d[3] - kA2 * d[1]);
  d[0] = first, d[5] = last;
  d[1] = even_a + odd_a, d[2] = even_a - odd_a;
  d[3] = even_b + odd_b, d[4] = even_b - odd_b;
}
inline void transform_output(const Vec (&m)[6], Vec (&out)[4]) {
  constexpr float kA2 = kPointA * kPointA, kB2 = kPointB * kPointB;
  const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  out[0] = m[0] + sum_a + sum_b;
  out[1] = kPointA * difference_a + kPointB * difference_b;
  out[2] = kA2 * sum_a + kB2 * sum_b;
  out[3] = kA2 * kPointA * difference_a + kB2 * kPointB * difference_b + m[5];
}
inline void transform_weight(const Vec (&g)[3], Vec (&u)[6]) {
  constexpr float kA2 = kPointA * kPointA, kB2 = kPointB * kPointB;
  const Vec even_a = 1 / (2 * kA2 * (kA2 - kB2)) * (g[0] + kA2 * g[2]), odd_a = 1 / (2 * kPointA * (kA2 - kB2)) * g[1];
  const Vec even_b = 1 / (2 * kB2 * (kB2 - kA2)) * (g[0] + kB2 * g[2]), odd_b = 1 / (2 * kPointB * (kB2 - kA2)) * g[1];
  u[0] = 1 / (kA2 * kB2) * g[0], u[5] = g[2];
  u[1] = even_a + odd_a, u[2] = even_a - odd_a;
  u[3] = even_b + odd_b, u[4] = even_b - odd_b;
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

// With kFrames 3 x 3 taps in frames, else three along the sequence; kTile outputs along an axis.
template <class T, bool kFrames, int kTile>
class WinogradConv {
 public:
  // Where the saved products outweigh the transforms, those of the weights above all.
  static bool is_faster(const Conv& p) {
    constexpr int64_t kFewestTiles = kTile == 4 ? 16 : 64, kFewestChannels = kTile == 4 ? 96 : 32;
    constexpr double kMostProducts = 0.8;  // of those of the sum over the taps
    if (p.taps != kTaps || (p.width > 0) != kFrames) return false;
    if (kFrames && p.length % (p.height * p.width)) return false;
    const int64_t tiles = p.batch * count_tiles(Grid(p));
    const int64_t outside = kFrames ? 0 : 2 * std::min(p.dilation, p.length);  // taps that find no position
    return tiles >= kFewestTiles && p.in_channels >= kFewestChannels && p.out_channels >= kFewestChannels &&
           kPoints * tiles <= kMostProducts * p.batch * (p.length * kTaps - outside);
  }

  // `packed` are the weights as FmaConv has them: panels [panel of out channels][tap][in channel][kPanel].
  static void forward(const Conv& p, const float* packed, const Coefficients& coefficients) {
    const Plan plan(p);
    const PerChannel bias(1, p.out_channels, 1);
    fill_bias(p, bias);
    const WinogradConv conv(p, plan, packed, coefficients, bias.at(0, 0));
    const Buffer memory(conv.inputs_ + conv.per_thread_ * p.threads);
    float* inputs = memory.data();
    const int64_t chunks = conv.chunks_, pieces = plan.pieces();
#pragma omp parallel num_threads(p.threads)
    {
      float* own = inputs + conv.inputs_ + thread_number() * conv.per_thread_;
      for (size_t group = 0; group + 1 < plan.groups.size(); ++group) {
        const TileBlock* blocks = plan.blocks.data() + plan.groups[group];
        const int64_t count = plan.groups[group + 1] - plan.groups[group];
        const int64_t tiles = tiles_of(blocks, blocks + count);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * chunks; ++i)
          conv.transform_inputs(blocks[i / chunks], i % chunks, tiles, own, inputs);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < pieces; ++i) {
          const auto [panels, range] = plan.piece(i, count);
          conv.multiply(blocks + range.begin, blocks + range.end, panels.begin, panels.end, tiles, inputs, own);
        }
      }
    }
  }

  static void tell(const Conv& p, const Work& work) {
    tell_prepare(p.norm, p.batch, p.length, p.in_channels, p.threads, work);
    if (!p.packed) tell_packing(p, panels_of(p.out_channels), kPanel, work);
    const Plan plan(p);
    for (size_t group = 0; group + 1 < plan.groups.size(); ++group) {
      const TileBlock* blocks = plan.blocks.data() + plan.groups[group];
      const int64_t count = plan.groups[group + 1] - plan.groups[group];
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < p.in_channels; c += depth(p))
          work.dynamic("inputs", 0, numbers_of_inputs(blocks[i]) * std::min(depth(p), p.in_channels - c));
      for (int64_t i = 0; i < plan.pieces(); ++i) {
        const auto [panels, range] = plan.piece(i, count);
        const int64_t tiles = tiles_of(blocks + range.begin, blocks + range.end);
        const int64_t columns = (panels.end - panels.begin) * kPanel;
        work.dynamic("products", products_of(p, tiles, columns), numbers_of_products(p, tiles, columns));
      }
    }
  }

 private:
  static constexpr int kInputs = kTile + 2;  // that kTile outputs read along an axis
  static constexpr int64_t kTileColumns = kFrames ? kTile : 1, kTaps = kFrames ? 9 : 3;
  static constexpr int64_t kPoints = kFrames ? kInputs * kInputs : kInputs;
  static constexpr int64_t kTiles = 64, kSmallestBlock = 4, kStrip = 8;  // of a block, and the most in a line of it
  static constexpr int64_t kPieceTiles = 256;                            // that are multiplied at a time
  static constexpr int64_t kPanels = std::max<int64_t>(1, (kFrames ? 32 : 128) / kPanel);  // by so many
  static constexpr int64_t kDepth = 64;  // in channels of a product: sums of sums are more accurate
  static constexpr int64_t kAhead = 4;   // positions whose rows are asked for before they are read
  static constexpr int64_t kLine = 16;   // floats of a line of the cache
  static constexpr int64_t kStride = kDepth + kLanes;
  static constexpr int64_t kGroupBytes = 4 << 20;  // of transformed inputs for each thread

  const Conv& p_;
  const Grid grid_;
  const float *packed_, *bias_;
  const Coefficients& coefficients_;
  const int64_t chunks_, depth_;  // of in channels, and the most of one
  int64_t inputs_, per_thread_;   // floats, of all inputs of a group

  static int64_t tile_rows(const Grid& g) { return (g.height + kTile - 1) / kTile; }
  static int64_t tile_columns(const Grid& g) { return (g.width + kTileColumns - 1) / kTileColumns; }
  static int64_t count_tiles(const Grid& g) { return g.frames * tile_rows(g) * tile_columns(g); }
  static int64_t chunks(const Conv& p) { return (p.in_channels + kDepth - 1) / kDepth; }
  static int64_t depth(const Conv& p) { return round_up((p.in_channels + chunks(p) - 1) / chunks(p), kLanes); }
  // The lines and columns of pixels that the tiles of a block read.
  static int64_t lines(const TileBlock& b) { return kTile * b.rows + 2; }
  static int64_t line(const TileBlock& b) { return kFrames ? kTile * b.columns + 2 : b.columns; }
  static int64_t pixels(const TileBlock& b) { return b.frames * lines(b) * line(b); }

  static double products_of(const Conv& p, int64_t tiles, int64_t columns) {
    return static_cast<double>(kPoints) * tiles * p.in_channels * columns;
  }
  // What is prepared, transformed and written, of which a transform's number takes a quarter of the time.
  static double numbers_of_inputs(const TileBlock& b) { return pixels(b) + kPoints / 4.0 * b.tiles(); }
  static double numbers_of_products(const Conv& p, int64_t tiles, int64_t columns) {
    return kPoints / 4.0 * (p.in_channels + tiles) * columns;
  }

  struct Range {
    int64_t begin, end;
  };

  // Blocks of tiles in groups, whose transformed inputs are there at a time, and for each group pieces of so many
  // panels and ranges of its blocks.
  struct Plan {
    std::vector<TileBlock> blocks;
    std::vector<int64_t> groups;  // where each begins, and the end
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

   private:
    Plan(const Conv& p, int64_t most, int64_t panels_of_piece)
        : blocks(cut(p, most)), all_panels(panels_of(p.out_channels)), panels(panels_of_piece) {
      const int64_t of_tile = kPoints * chunks(p) * kStride * sizeof(float);
      const int64_t total = p.batch * count_tiles(Grid(p)), fit = std::max(kTiles, kGroupBytes * p.threads / of_tile);
      const int64_t even = (total + (total + fit - 1) / fit - 1) / ((total + fit - 1) / fit);
      int64_t tiles = 0;
      groups.push_back(0);
      for (size_t i = 0; i < blocks.size(); ++i) {
        if (tiles && tiles + blocks[i].tiles() / 2 > even) groups.push_back(i), tiles = 0;
        blocks[i].first = tiles, tiles += blocks[i].tiles();
      }
      groups.push_back(blocks.size());
      ranges = std::max<int64_t>(1, (even + kPieceTiles / 2) / kPieceTiles);
    }

    int64_t most_blocks() const {
      int64_t most = 0;
      for (size_t i = 0; i + 1 < groups.size(); ++i) most = std::max(most, groups[i + 1] - groups[i]);
      return most;
    }

    // Of the threads, at most, in multiply-adds; and of one thread alone.
    double time(const Conv& p) const {
      const int64_t columns = (all_panels + panel_groups() - 1) / panel_groups() * kPanel;
      double sum = 0;
      for (size_t g = 0; g + 1 < groups.size(); ++g) {
        const int64_t count = groups[g + 1] - groups[g], each = (count + ranges - 1) / ranges;
        double most_inputs = 0;
        int64_t most_tiles = 0;
        for (int64_t i = groups[g]; i < groups[g + 1]; ++i) {
          most_inputs = std::max(most_inputs, numbers_of_inputs(blocks[i]));
          most_tiles = std::max(most_tiles, blocks[i].tiles());
        }
        sum += rounds(count * chunks(p), p.threads) * kOfNumber * most_inputs * depth(p);
        const int64_t tiles = std::min(each * most_tiles, blocks[groups[g + 1] - 1].first + most_tiles);
        sum += rounds(pieces(), p.threads) *
               (products_of(p, tiles, columns) + kOfNumber * numbers_of_products(p, tiles, columns));
      }
      return sum;
    }
    double work(const Conv& p) const {
      double sum = 0;
      int64_t tiles = 0;
      for (const TileBlock& b : blocks) sum += kOfNumber * numbers_of_inputs(b) * p.in_channels, tiles += b.tiles();
      return sum + products_of(p, tiles, p.out_channels) + kOfNumber * numbers_of_products(p, tiles, p.out_channels);
    }
    static double rounds(int64_t pieces, int64_t threads) { return (pieces + threads - 1) / threads; }
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

  WinogradConv(const Conv& p, const Plan& plan, const float* packed, const Coefficients& coefficients,
               const float* bias)
      : p_(p),
        grid_(p),
        packed_(packed),
        bias_(bias),
        coefficients_(coefficients),
        chunks_(chunks(p)),
        depth_(depth(p)) {
    int64_t most_pixels = 0, most_inputs = 0, most_tiles = 0;
    for (const TileBlock& b : plan.blocks) {
      most_pixels = std::max(most_pixels, pixels(b));
      most_inputs = std::max(most_inputs, b.first + b.tiles());
    }
    for (size_t group = 0; group + 1 < plan.groups.size(); ++group)
      for (int64_t i = 0, count = plan.groups[group + 1] - plan.groups[group]; i < plan.ranges; ++i) {
        const TileBlock* blocks = plan.blocks.data() + plan.groups[group];
        most_tiles =
            std::max(most_tiles, tiles_of(blocks + count * i / plan.ranges, blocks + count * (i + 1) / plan.ranges));
      }
    inputs_ = chunks_ * kPoints * point_of(most_inputs);
    per_thread_ = round_up(
        std::max(most_pixels * kDepth, plan.panels * kPoints * (depth_ * kPanel + kLine + step_of(most_tiles))), kLine);
  }

  static int64_t tiles_of(const TileBlock* block, const TileBlock* end) {
    return block == end ? 0 : end[-1].first + end[-1].tiles() - block->first;
  }

  // Floats from a point to the next, of a group's inputs and of a piece's products: not a multiple of a page, or all
  // points of a tile would share a set of the cache.
  static int64_t point_of(int64_t tiles) { return round_up(tiles * kStride, 1024) + 2 * kLine; }
  static int64_t step_of(int64_t tiles) { return round_up(tiles * kPanel, 1024) + kLine; }

  // Of a chunk of channels, to [chunk][point][tile of the group][kStride].
  void transform_inputs(const TileBlock& block, int64_t chunk, int64_t tiles, float* pixels, float* inputs) const {
    const int64_t begin = chunk * depth_, end = std::min(p_.in_channels, begin + depth_);
    with_prologue(p_.norm, [&](auto prologue) { prepare<decltype(prologue)::value>(block, begin, end, pixels); });
    const int64_t pitch = line(block) * kDepth, point = point_of(tiles);
    float* to = inputs + chunk * kPoints * point + block.first * kStride;
    for (int64_t f = 0; f < block.frames; ++f)
      for (int64_t i = 0; i < block.rows; ++i)
        for (int64_t j = 0; j < block.columns; ++j, to += kStride) {
          const float* from = pixels + ((f * lines(block) + kTile * i) * line(block) + kTileColumns * j) * kDepth;
          for (int64_t c = 0; c < end - begin; c += kLanes) transform_input_of_tile(from + c, pitch, to + c, point);
        }
  }

  static void transform_input_of_tile(const float* from, int64_t pitch, float* to, int64_t point) {
    Vec d[kInputs];
    if constexpr (!kFrames) {
#pragma GCC unroll 6
      for (int y = 0; y < kInputs; ++y) d[y] = load(from + y * pitch);
      transform_input(d);
#pragma GCC unroll 6
      for (int y = 0; y < kInputs; ++y) store(to + y * point, d[y]);
    } else {
      Vec lines[kInputs][kInputs];
      for (int x = 0; x < kInputs; ++x) {
#pragma GCC unroll 6
        for (int y = 0; y < kInputs; ++y) d[y] = load(from + y * pitch + x * kDepth);
        transform_input(d);
#pragma GCC unroll 6
        for (int y = 0; y < kInputs; ++y) lines[y][x] = d[y];
      }
      for (int y = 0; y < kInputs; ++y) {
        transform_input(lines[y]);
#pragma GCC unroll 6
        for (int x = 0; x < kInputs; ++x) store(to + (kInputs * y + x) * point, lines[y][x]);
      }
    }
  }

  // Channels [begin, end) of what the tiles of a block read, behind the prologue; zeros outside the frame.
  template <Prologue kPrologue>
  void prepare(const TileBlock& block, int64_t begin, int64_t end, float* to) const {
    const Maps maps(coefficients_, block.batch);
    const int64_t column = kFrames ? kTile * block.column - 1 : block.column;
    for (int64_t f = block.frame; f < block.frame + block.frames; ++f)
      for (int64_t i = 0; i < lines(block); ++i)
        for (int64_t j = 0; j < line(block); ++j, to += kDepth) {
          const int64_t position = grid_.position(f, kTile * block.row - 1 + i, column + j);
          if (position < 0) {
            std::memset(to, 0, kDepth * sizeof(float));
            continue;
          }
          const T* from = row<T>(p_.x, block.batch, position);
          prefetch(row<T>(p_.x, block.batch, std::min(position + kAhead, p_.length - 1)) + begin, end - begin);
          for (int64_t c = begin; c < end; c += kLanes)
            store(to + c - begin, apply<kPrologue, kDegree<T>>(load_lanes(from + c, end - c), Map(maps, c)));
        }
  }

  void multiply(const TileBlock* block, const TileBlock* blocks_end, int64_t panel_begin, int64_t panel_end,
                int64_t tiles, const float* inputs, float* own) const {
    if (block == blocks_end) return;
    const int64_t rows = tiles_of(block, blocks_end), count = panel_end - panel_begin, first = block->first;
    const int64_t of_panel = depth_ * kPanel, of_point = count * of_panel + kLine, step = step_of(rows);
    float *weights = own, *products = own + kPoints * of_point;  // [point][panel][in channel], [panel][point][tile]
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t begin = chunk * depth_, depth = std::min(depth_, p_.in_channels - begin);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < depth; ++c)
          transform_weights(panel_begin + i, begin + c, weights + i * of_panel + c * kPanel, of_point);
      const float* of_chunk = inputs + chunk * kPoints * point_of(tiles) + first * kStride;
      for (int64_t point = 0; point < kPoints; ++point)
        for (int64_t i = 0; i < count; ++i) {
          const Gemm g{rows,
                       vecs_of_panel(p_.out_channels, panel_begin + i),
                       depth,
                       {of_chunk + point * point_of(tiles), kStride, 1},
                       {weights + point * of_point + i * of_panel, kLanes, kPanel},
                       {products + (i * kPoints + point) * step, kPanel}};
          chunk == 0 ? gemm<Init::zero>(g) : gemm<Init::add>(g);
        }
    }
    for (; block < blocks_end; ++block)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t v = 0; v < vecs_of_panel(p_.out_channels, panel_begin + i); ++v)
          transform_outputs(*block, (panel_begin + i) * kPanel + v * kLanes,
                            products + i * kPoints * step + (block->first - first) * kPanel + v * kLanes, step);
  }

  void transform_weights(int64_t panel, int64_t channel, float* to, int64_t point) const {
    const float* from = packed_ + (panel * kTaps * p_.in_channels + channel) * kPanel;
    const int64_t tap = p_.in_channels * kPanel;
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      if constexpr (!kFrames) {
        Vec u[kInputs];
        const Vec g[3] = {load(from + v), load(from + tap + v), load(from + 2 * tap + v)};
        transform_weight(g, u);
        for (int i = 0; i < kInputs; ++i) store(to + i * point + v, u[i]);
      } else {
        Vec lines[3][kInputs], u[kInputs];
        for (int i = 0; i < 3; ++i) {
          const float* line = from + 3 * i * tap + v;
          const Vec g[3] = {load(line), load(line + tap), load(line + 2 * tap)};
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
