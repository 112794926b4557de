// SPDX-License-Identifier: MIT
// The 3 x 3 convolution of frames with 16 products for each 2 x 2 outputs where the sum over the taps has 36
// (Winograd's F(2x2, 3x3); Lavin and Gray, arXiv 1509.09308). Of 4 x 4 inputs d, 3 x 3 weights g and 2 x 2 outputs:
//   out = A^T [(G g G^T) . (B^T d B)] A,   the products summed over the in channels as 16 matrix products.
// The transforms only add, but for halves of weights. A block is a rectangle of tiles of 2 x 2 outputs.
#pragma once

#include "conv_plan.h"
#include "gemm.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int kPoints = 16;  // of the transforms: products of a tile and a pair of channels

// Tiles [row, row + rows) x [column, column + columns) of some frames of a batch.
struct TileBlock {
  int64_t batch, frame, frames, row, rows, column, columns;
  int64_t tiles() const { return frames * rows * columns; }
  // The lines and columns of pixels of a frame that they read.
  int64_t lines() const { return 2 * rows + 2; }
  int64_t line() const { return 2 * columns + 2; }
  int64_t pixels() const { return frames * lines() * line(); }
};

// B^T d of four rows, A^T m of four, G g of three.
inline void transform_input(Vec (&d)[4]) {
  const Vec d1 = d[1], d2 = d[2];
  d[0] -= d2;
  d[1] = d1 + d2;
  d[2] = d2 - d1;
  d[3] = d1 - d[3];
}
inline void transform_output(const Vec (&m)[4], Vec (&out)[2]) {
  out[0] = m[0] + m[1] + m[2];
  out[1] = m[1] - m[2] - m[3];
}
inline void transform_weight(const Vec (&g)[3], Vec (&u)[4]) {
  const Vec sum = 0.5f * (g[0] + g[2]), half = 0.5f * g[1];
  u[0] = g[0];
  u[1] = sum + half;
  u[2] = sum - half;
  u[3] = g[2];
}

template <class T>
class WinogradConv {
 public:
  // Where the saved products outweigh the transforms, those of the weights above all.
  static bool is_faster(const Conv& p) {
    constexpr int64_t kPositions = 256, kChannels = 32;
    return p.width > 1 && p.height > 1 && p.length % (p.height * p.width) == 0 && p.length >= kPositions &&
           p.in_channels >= kChannels && p.out_channels >= kChannels;
  }

  // `packed` are the weights as FmaConv has them: panels [panel of out channels][tap][in channel][kPanel].
  static void forward(const Conv& p, const float* packed, const Coefficients& coefficients) {
    const Plan plan(p);
    const int64_t panels = panels_of(p.out_channels), splits = plan.splits;
    const Buffer weights(panels * kPoints * p.in_channels * kPanel);
    int64_t pixels = 0;
    for (const TileBlock& b : plan.blocks) pixels = std::max(pixels, b.pixels());
    const PerChannel bias(1, p.out_channels, 1);
    fill_bias(p, bias);
    const WinogradConv conv(p, weights.data(), coefficients, bias.at(0, 0), pixels);
    const Buffer memory(conv.per_thread_ * p.threads);
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < panels * p.in_channels; ++i)
        conv.transform_weights(packed, weights.data(), i / p.in_channels, i % p.in_channels);
      float* own = memory.data() + thread_number() * conv.per_thread_;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < plan.count(); ++i) {
        const int64_t split = i % splits;
        conv.run(plan.blocks[i / splits], panels * split / splits, panels * (split + 1) / splits, own);
      }
    }
  }

  static void tell(const Conv& p, const Work& work) {
    tell_prepare(p.norm, p.batch, p.length, p.in_channels, p.threads, work);
    const int64_t panels = panels_of(p.out_channels);
    if (!p.packed) tell_packing(p, panels, kPanel, work);
    for (int64_t i = 0; i < panels * p.in_channels; ++i) work.fixed("weights", 0, kPoints * kPanel / kOfNumber);
    const Plan plan(p);
    for (const TileBlock& block : plan.blocks)
      for (int64_t split = 0; split < plan.splits; ++split) {
        const int64_t columns = (panels * (split + 1) / plan.splits - panels * split / plan.splits) * kPanel;
        work.dynamic("products", products_of(p, block, columns), numbers_of(p, block, columns));
      }
  }

 private:
  static constexpr int64_t kTiles = 64, kFewestTiles = 8, kStrip = 8;  // of a block, and the most lines of them
  static constexpr int64_t kChannels = 64;                             // whose prepared pixels are there at a time

  const Conv& p_;
  const float *weights_, *bias_;  // weights as [panel][point][in channel][kPanel]
  const Coefficients& coefficients_;
  const int64_t stride_, pixels_, inputs_, per_thread_;  // floats of a tile's inputs at one point, of all of a thread

  WinogradConv(const Conv& p, const float* weights, const Coefficients& coefficients, const float* bias, int64_t pixels)
      : p_(p),
        weights_(weights),
        bias_(bias),
        coefficients_(coefficients),
        stride_(round_up(p.in_channels, kLanes) + kLanes),
        pixels_(pixels * kChannels),
        inputs_(kPoints * kTiles * stride_),
        per_thread_(round_up(pixels_ + inputs_ + kPoints * kTiles * kPanel, 16)) {}

  static double products_of(const Conv& p, const TileBlock& block, int64_t columns) {
    return static_cast<double>(kPoints) * block.tiles() * p.in_channels * columns;
  }
  // What is prepared, transformed and written, of which a transform's number takes a quarter of the time.
  static double numbers_of(const Conv& p, const TileBlock& block, int64_t columns) {
    return static_cast<double>(block.pixels() + kPoints / 4 * block.tiles()) * p.in_channels +
           kPoints / 4 * block.tiles() * columns;
  }

  // Each block and range of output channels is a piece, which transforms all of the block's inputs.
  struct Plan {
    std::vector<TileBlock> blocks;
    int64_t splits = 1;
    int64_t count() const { return blocks.size() * splits; }

    // Smaller blocks, and ranges of channels, where threads would else wait long for the others.
    explicit Plan(const Conv& p) : blocks(cut(p, kTiles)) {
      if (count() >= 4 * p.threads) return;
      double least = time(p);
      for (int64_t tiles = kTiles; tiles >= kFewestTiles; tiles /= 2)
        for (Plan other(cut(p, tiles)); other.splits <= panels_of(p.out_channels); ++other.splits)
          if (const double found = other.time(p); found < least)
            least = found, blocks = other.blocks, splits = other.splits;
    }

   private:
    explicit Plan(std::vector<TileBlock> of) : blocks(std::move(of)) {}

    // Of the threads, at most, in multiply-adds.
    double time(const Conv& p) const {
      const int64_t columns = (panels_of(p.out_channels) + splits - 1) / splits * kPanel;
      double most = 0;
      for (const TileBlock& block : blocks)
        most = std::max(most, products_of(p, block, columns) + kOfNumber * numbers_of(p, block, columns));
      return most * ((count() + p.threads - 1) / p.threads);
    }
  };

  // Rectangles of at most `most` tiles (kStrip or more), as square as that allows: the pixels at a border are prepared
  // for both sides of it.
  static std::vector<TileBlock> cut(const Conv& p, int64_t most) {
    const int64_t frames = p.length / (p.height * p.width), rows = (p.height + 1) / 2, columns = (p.width + 1) / 2;
    const int64_t strips = (rows + kStrip - 1) / kStrip, strip = (rows + strips - 1) / strips;
    const int64_t piece = most / strip, pieces = (columns + piece - 1) / piece;
    const int64_t together = strips * pieces > 1 ? 1 : most / (rows * columns);
    std::vector<TileBlock> blocks;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t f = 0; f < frames; f += together)
        for (int64_t i = 0; i < strips; ++i)
          for (int64_t j = 0; j < pieces; ++j) {
            const int64_t row = rows * i / strips, column = columns * j / pieces;
            blocks.push_back({b, f, std::min(together, frames - f), row, rows * (i + 1) / strips - row, column,
                              columns * (j + 1) / pieces - column});
          }
    return blocks;
  }

  void transform_weights(const float* packed, float* to, int64_t panel, int64_t channel) const {
    const float* from = packed + (panel * 9 * p_.in_channels + channel) * kPanel;
    to += (panel * kPoints * p_.in_channels + channel) * kPanel;
    const int64_t step = p_.in_channels * kPanel;
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      Vec lines[3][4], point[4];
      for (int i = 0; i < 3; ++i) {
        const Vec g[3] = {load(from + (3 * i) * step + v), load(from + (3 * i + 1) * step + v),
                          load(from + (3 * i + 2) * step + v)};
        transform_weight(g, lines[i]);
      }
      for (int j = 0; j < 4; ++j) {
        const Vec column[3] = {lines[0][j], lines[1][j], lines[2][j]};
        transform_weight(column, point);
        for (int i = 0; i < 4; ++i) store(to + (4 * i + j) * step + v, point[i]);
      }
    }
  }

  void run(const TileBlock& block, int64_t panel_begin, int64_t panel_end, float* own) const {
    float *pixels = own, *inputs = own + pixels_, *products = inputs + inputs_;
    for (int64_t c = 0; c < p_.in_channels; c += kChannels) {
      const int64_t end = std::min(p_.in_channels, c + kChannels);
      with_prologue(p_.norm, [&](auto prologue) { prepare_pixels<decltype(prologue)::value>(block, c, end, pixels); });
      transform_inputs(block, c, end, pixels, inputs);
    }
    const int64_t tiles = block.tiles();
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t vecs = vecs_of_panel(p_.out_channels, panel);
      for (int64_t i = 0; i < kPoints; ++i)
        gemm<Init::zero>({tiles,
                          vecs,
                          p_.in_channels,
                          {inputs + i * tiles * stride_, stride_, 1},
                          {weights_ + (panel * kPoints + i) * p_.in_channels * kPanel, kLanes, kPanel},
                          {products + i * tiles * kPanel, kPanel}});
      for (int64_t v = 0; v < vecs; ++v) transform_outputs(block, panel * kPanel + v * kLanes, products + v * kLanes);
    }
  }

  // Channels [c, end) of what the tiles of a block read, behind the prologue; zeros outside the frame.
  template <Prologue kPrologue>
  void prepare_pixels(const TileBlock& block, int64_t c, int64_t end, float* to) const {
    const Maps maps(coefficients_, block.batch);
    for (int64_t f = block.frame; f < block.frame + block.frames; ++f)
      for (int64_t i = 0; i < block.lines(); ++i)
        for (int64_t j = 0; j < block.line(); ++j, to += kChannels) {
          const int64_t y = 2 * block.row - 1 + i, x = 2 * block.column - 1 + j;
          if (y < 0 || x < 0 || y >= p_.height || x >= p_.width) {
            std::memset(to, 0, kChannels * sizeof(float));
            continue;
          }
          const T* from = row<T>(p_.x, block.batch, (f * p_.height + y) * p_.width + x);
          for (int64_t k = c; k < end; k += kLanes)
            store(to + k - c, apply<kPrologue, kDegree<T>>(load_lanes(from + k, end - k), Map(maps, k)));
        }
  }

  void transform_inputs(const TileBlock& block, int64_t c, int64_t end, const float* pixels, float* inputs) const {
    const int64_t line = block.line() * kChannels, tiles = block.tiles();
    int64_t tile = 0;
    for (int64_t f = 0; f < block.frames; ++f)
      for (int64_t i = 0; i < block.rows; ++i)
        for (int64_t j = 0; j < block.columns; ++j, ++tile) {
          const float* from = pixels + ((f * block.lines() + 2 * i) * block.line() + 2 * j) * kChannels;
          float* to = inputs + tile * stride_ + c;
          for (int64_t k = 0; k < end - c; k += kLanes) {
            Vec d[4][4];
#pragma GCC unroll 4
            for (int y = 0; y < 4; ++y) {
#pragma GCC unroll 4
              for (int x = 0; x < 4; ++x) d[y][x] = load(from + y * line + x * kChannels + k);
              transform_input(d[y]);
            }
#pragma GCC unroll 4
            for (int x = 0; x < 4; ++x) {
              Vec column[4] = {d[0][x], d[1][x], d[2][x], d[3][x]};
              transform_input(column);
#pragma GCC unroll 4
              for (int y = 0; y < 4; ++y) store(to + (4 * y + x) * tiles * stride_ + k, column[y]);
            }
          }
        }
  }

  // One vector of out channels, from `first` on, of all tiles of a block.
  void transform_outputs(const TileBlock& block, int64_t first, const float* products) const {
    const int64_t step = block.tiles() * kPanel, left = p_.out_channels - first;
    const Vec bias = load(bias_ + first);
    for (int64_t f = block.frame; f < block.frame + block.frames; ++f)
      for (int64_t i = block.row; i < block.row + block.rows; ++i)
        for (int64_t j = block.column; j < block.column + block.columns; ++j, products += kPanel) {
          Vec lines[2][4];
#pragma GCC unroll 4
          for (int x = 0; x < 4; ++x) {
            const Vec m[4] = {load(products + x * step), load(products + (4 + x) * step),
                              load(products + (8 + x) * step), load(products + (12 + x) * step)};
            Vec sums[2];
            transform_output(m, sums);
            lines[0][x] = sums[0], lines[1][x] = sums[1];
          }
          for (int y = 0; y < 2 && 2 * i + y < p_.height; ++y) {
            Vec out[2];
            transform_output(lines[y], out);
            for (int x = 0; x < 2 && 2 * j + x < p_.width; ++x) {
              const int64_t position = (f * p_.height + 2 * i + y) * p_.width + 2 * j + x;
              Vec value = out[x] + bias;
              if (p_.residual.data) value += load_lanes(row<T>(p_.residual, block.batch, position) + first, left);
              store_lanes(row<T>(p_.out, block.batch, position) + first, value, left);
            }
          }
        }
  }
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
