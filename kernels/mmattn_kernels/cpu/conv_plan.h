// SPDX-License-Identifier: MIT
// How a convolution is cut into blocks of output rows, and which rows of its input a block reads.
//
// A block holds the input rows of all its taps in one buffer, where tap k of output row i is row at(i) + offset(k).
// Along the sequence at(i) is i. For a small dilation the rows are consecutive positions and taps are the dilation
// apart: neighbouring outputs share their taps, and only a margin is read twice. For a large one they are runs of
// positions a dilation apart, and taps are the length of a run apart: the taps of a run are its neighbouring runs, so
// nothing is read twice however far the taps reach.
// In frames the buffer holds whole lines with a zero after each, and a line of zeros after each frame, so that all nine
// taps of a position lie at fixed distances. Output rows are the positions where a line is a whole number of tiles, and
// else the places of the buffer, those of zeros computed in vain. Where that would be most of them, as the frames are
// small, rows are the frames of a pixel, then those of the next one: what a tap reads of a line is then consecutive,
// and nothing is computed in vain. Of one tap, a block may hold several short sequences.
#pragma once

#include <numeric>
#include <vector>

#include "conv.h"
#include "prologue.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kPackedChannels = 32;  // of the input, of a piece of the packing of weights
constexpr int64_t kRowUnit = 32;         // rows that are computed together: consecutive positions

// The places of a sequence of frames in the buffer: every line and every frame with a zero behind.
struct Frames {
  int64_t height, width, length;
  bool tiles;  // the input rows of each 16 output rows may lie anywhere; else those of all rows are consecutive
  Frames() = default;
  explicit Frames(const Conv& p)
      : height(p.height), width(p.width), length(p.length), tiles(p.is_bf16 ? kOnTiles<bf16> : kOnTiles<float>) {}

  int64_t pitch() const { return width + 1; }
  bool dense() const { return tiles && width % 16 == 0; }
  int64_t place(int64_t position) const {
    const int64_t line = position / width;
    return (line + line / height) * pitch() + position - line * width;
  }
  int64_t position(int64_t place) const {  // -1 at the zeros
    if (place < 0) return -1;
    const int64_t line = place / pitch(), column = place - line * pitch(), frame = line / (height + 1);
    if (column == width || line - frame * (height + 1) == height) return -1;
    const int64_t at = (line - frame) * width + column;
    return at < length ? at : -1;
  }
  int64_t rows() const { return dense() ? length : place(length - 1) + 1; }
};

enum class Order { positions, pixels, sequences };  // of the rows of a block: see above

struct Block {
  int64_t batch, origin, rows;  // position or place of the first row; rows by positions are a multiple of kRowUnit
  int64_t run, width;           // rows of a run, how many of them are in use
  int64_t step;                 // rows from a tap to the next, 0 if all but the middle one lie outside the sequence
  int64_t length, taps, dilation;
  Frames frames;
  Order order;

  bool spatial() const { return frames.width > 0; }
  int64_t offset(int64_t k) const { return spatial() ? k / 3 * frames.pitch() + k % 3 : k * step; }
  int64_t buffer_rows() const { return order != Order::positions ? rows : at(rows - 16) + 16 + offset(taps - 1); }
  // Where the buffer has the first tap of a row, whose tile begins with it; it is `row` outside of dense frames.
  int64_t at(int64_t row) const {
    if (!spatial() || !frames.dense()) return row;
    return frames.place(std::min(origin + row, length - 1)) - frames.place(origin);
  }
  // -1 where there is none.
  int64_t position(int64_t row) const {
    if (order == Order::pixels) return origin + row % run * frames.height * frames.width + row / run;
    if (order == Order::sequences) return row % length;
    if (spatial()) return frames.dense() ? origin + row : frames.position(origin + row);
    return origin + row / run * dilation + row % run;
  }
  int64_t batch_of(int64_t row) const { return order == Order::sequences ? batch + row / length : batch; }
  // Of the kRowUnit rows from `row` on, those after which none exists.
  int64_t live(int64_t row) const {
    const int64_t left = order != Order::positions ? rows - row
                         : spatial()               ? frames.rows() - origin - row
                                                   : std::min(width - row % run, length - position(row));
    return std::clamp<int64_t>(left, 0, kRowUnit);
  }
  // Whether the rows of a unit are not consecutive positions, which are cheaper to count than to look up.
  bool scattered() const { return spatial() && !frames.dense(); }
  // Whether tap k of any of `live` rows from the position `first` on lies inside the sequence.
  bool reads(int64_t first, int64_t live, int64_t k) const {
    const int64_t from = first + (k - taps / 2) * dilation;
    return spatial() || (from < length && from + live > 0);
  }
  // The rows whose tap k is read, all inside the range; those of it that read outside find zeros.
  std::pair<int64_t, int64_t> readers(int64_t k) const {
    const auto is_reader = [&](int64_t row) { return live(row) && reads(position(row), live(row), k); };
    int64_t lo = 0, hi = rows;
    while (lo < hi && !is_reader(lo)) lo += kRowUnit;
    while (lo < hi && !is_reader(hi - kRowUnit)) hi -= kRowUnit;
    return {lo, hi};
  }
  // visit(first row, end, row of the buffer that the first one reads) for all that tap k reads.
  template <class Visit>
  void each_range(int64_t k, Visit visit) const {
    if (order == Order::sequences) return visit(0, rows, 0);
    if (order == Order::positions) {
      const auto [lo, hi] = readers(k);
      if (lo < hi) visit(lo, hi, lo + offset(k));
      return;
    }
    const int64_t down = k / 3 - 1, right = k % 3 - 1, first = std::max<int64_t>(-right, 0);
    const int64_t count = frames.width - std::abs(right), to_read = (down * frames.width + right) * run;
    for (int64_t y = std::max<int64_t>(-down, 0); y < frames.height - std::max<int64_t>(down, 0); ++y) {
      const int64_t row = (y * frames.width + first) * run;
      if (count > 0) visit(row, row + count * run, row + to_read);
    }
  }
  // visit(buffer row, position or -1 for zeros) for all rows of the buffer.
  template <class Visit>
  void each_buffer_row(Visit visit) const {
    const int64_t total = buffer_rows();
    if (order != Order::positions) {
      for (int64_t r = 0; r < rows; ++r) visit(r, position(r));
      return;
    }
    if (spatial()) {
      const int64_t first = (frames.dense() ? frames.place(origin) : origin) - frames.pitch() - 1;
      for (int64_t r = 0; r < total;) {  // a line at a time
        const int64_t place = first + r, column = (place + 2 * frames.pitch()) % frames.pitch();
        const int64_t count = std::min(frames.pitch() - column, total - r), position = frames.position(place);
        for (int64_t i = 0; i < count; ++i, ++r) {
          const bool inside = position >= 0 && column + i < frames.width && position + i < length;
          visit(r, inside ? position + i : -1);
        }
      }
      return;
    }
    for (int64_t first = 0; first < total; first += run) {
      const int64_t at = origin + first / run * dilation - (step ? taps / 2 * dilation : 0);
      for (int64_t r = 0; r < std::min(run, total - first); ++r) {
        const bool inside = r < width && at + r >= 0 && at + r < length;
        visit(first + r, inside ? at + r : -1);
      }
    }
  }
};

// Blocks of whole frames by pixels, of at most `most` rows; none where that does not spare products.
inline std::vector<Block> cut_by_pixels(const Conv& p, int64_t most) {
  constexpr double kMostProducts = 0.8;  // of those of lines with zeros
  const Frames frames(p);
  const int64_t of_frame = p.height * p.width;
  std::vector<Block> blocks;
  if (!p.width || frames.tiles || of_frame > most || p.length % of_frame) return blocks;
  const int64_t read = (3 * p.height - 2) * (3 * p.width - 2);  // positions of a frame by all taps
  const int64_t all = p.length / of_frame, count = (all + most / of_frame - 1) / (most / of_frame);
  if (read * all > kMostProducts * p.taps * round_up(frames.rows(), kRowUnit)) return blocks;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = all * i / count, run = all * (i + 1) / count - first;
      blocks.push_back(
          {b, first * of_frame, run * of_frame, run, run, 0, p.length, p.taps, p.dilation, frames, Order::pixels});
    }
  return blocks;
}

// Blocks of whole sequences of one tap, of at most `most` rows; none where they are long.
inline std::vector<Block> cut_by_sequences(const Conv& p, int64_t most) {
  const Frames frames(p);
  std::vector<Block> blocks;
  if (p.batch == 1 || frames.tiles || p.length > kRowUnit) return blocks;
  const int64_t of_block = most / p.length, count = (p.batch + of_block - 1) / of_block;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = p.batch * i / count, rows = (p.batch * (i + 1) / count - first) * p.length;
    blocks.push_back({first, 0, rows, rows, rows, 0, p.length, p.taps, p.dilation, frames, Order::sequences});
  }
  return blocks;
}

// Blocks of at most `most` rows, at least as many as threads where the sequence is long enough to share.
inline std::vector<Block> cut(const Conv& p, int64_t most) {
  constexpr int64_t kWholeRun = int64_t{1} << 40;
  const Frames frames(p);
  const bool spatial = p.width > 0;
  const int64_t length = p.length, dilation = p.dilation, taps = p.taps, total = spatial ? frames.rows() : length;
  const int64_t runs = (length + dilation - 1) / dilation, span = std::min(dilation, length);
  const int64_t padded_span = round_up(span, kRowUnit);
  // Rows computed in vain by runs, against rows prepared twice without them, at about a quarter of the cost.
  const int64_t runs_of_block = std::min(runs, most / kRowUnit);
  const double vain = static_cast<double>(padded_span) / span - 1;
  const double with_runs = vain + (runs_of_block < runs ? 0.25 * (taps - 1) / runs_of_block : 0);
  const double without = 0.25 * (taps - 1) * std::min(dilation, length) / std::min(most, length);
  std::vector<Block> blocks = p.taps == 1 ? cut_by_sequences(p, most) : cut_by_pixels(p, most);
  if (!blocks.empty()) return blocks;
  Block block{};
  block.length = length, block.taps = taps, block.dilation = dilation, block.frames = frames;
  if (!spatial && taps > 1 && with_runs < without) {
    int64_t run = std::max(std::min(most / runs_of_block / kRowUnit * kRowUnit, padded_span), kRowUnit);
    const int64_t groups = (runs + runs_of_block - 1) / runs_of_block;
    while (run > kRowUnit && (padded_span + run - 1) / run * groups * p.batch < p.threads) run -= kRowUnit;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t r = 0; r < span; r += run) {
          const int64_t first = runs * g / groups, count = runs * (g + 1) / groups - first;
          block.batch = b, block.origin = first * dilation + r, block.rows = count * run;
          block.run = run, block.width = std::min(run, span - r), block.step = run;
          blocks.push_back(block);
        }
    return blocks;
  }
  int64_t count = (total + most - 1) / most;
  // Weights still to be packed are packed by whoever reads them: in a single block, each once.
  if (count >= p.threads || (p.packed && total >= 192 * p.threads))
    count = round_up(count * p.batch, p.threads) / p.batch;
  const int64_t units = (total + kRowUnit - 1) / kRowUnit;
  count = std::min(count, units);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = units * i / count * kRowUnit, end = units * (i + 1) / count * kRowUnit;
      block.batch = b, block.origin = first, block.rows = end - first;
      block.run = block.width = kWholeRun, block.step = dilation < length ? dilation : 0;
      blocks.push_back(block);
    }
  return blocks;
}

// The output gradient of a row of the block; null where there is none.
template <class T>
const T* gradient_row(const Conv& p, const Block& block, int64_t i) {
  if (!block.spatial() && i % block.run >= block.width) return nullptr;
  const int64_t position = block.position(i);
  return position < 0 || position >= block.length ? nullptr : row<T>(p.out, block.batch_of(i), position);
}

// Of an out channel: sums [tap][in channel], the taps `tap` floats apart, to [in][tap]. `own` has memory for a row.
inline void write_weight_gradient(const Conv& p, int64_t o, const float* sums, int64_t tap, float* own) {
  const int64_t channels = p.in_channels, taps = p.taps, n = channels * taps;
  float* to = p.d_weight_is_bf16 ? own : static_cast<float*>(p.d_weight) + o * n;
  if (taps == 3) {  // a loop the compiler turns into vectors
    const float *a = sums, *b = sums + tap, *d = sums + 2 * tap;
    for (int64_t c = 0; c < channels; ++c) {
      to[c * 3] = a[c];
      to[c * 3 + 1] = b[c];
      to[c * 3 + 2] = d[c];
    }
  } else {
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t c = 0; c < channels; ++c) to[c * taps + k] = sums[k * tap + c];
  }
  if (p.d_weight_is_bf16) store_row(static_cast<bf16*>(p.d_weight) + o * n, own, n, 1.0f);
}

// What the blocks need at most.
struct Extent {
  int64_t rows = 0, buffer_rows = 0;
  explicit Extent(const std::vector<Block>& blocks) {
    for (const Block& b : blocks) {
      rows = std::max(rows, b.rows);
      buffer_rows = std::max(buffer_rows, b.buffer_rows());
    }
  }
};

inline void fill_bias(const Conv& p, const PerChannel& to) {
  for (int64_t o = 0; o < to.padded(); ++o) to.at(0, 0)[o] = o < p.out_channels ? value(p.bias, 0, o, 0.0f) : 0.0f;
}

// The weights as the caller has packed them, or packed for this call.
template <class Weights>
class Packed {
 public:
  explicit Packed(const Conv& p, bool is_needless = false)
      : own_(p.packed || is_needless ? 0 : Weights::packed_bytes(p.out_channels, p.in_channels, p.taps) / 4),
        data_(p.packed ? p.packed : own_.data()) {
    if (!p.packed && !is_needless) Weights::pack(p.weights, own_.data());
  }
  const void* data() const { return data_; }

 private:
  Buffer own_;
  const void* data_;
};

// Into how many ranges of output channels each of `blocks` blocks is split, so that no thread waits long for the
// others.
// A block that is written over its own input must not be read by another.
inline int64_t channel_splits(const Conv& p, int64_t blocks, int64_t most) {
  if (blocks >= 4 * p.threads || p.out.data == p.x.data) return 1;
  return std::clamp<int64_t>(p.threads / std::gcd<int64_t>(blocks, p.threads), 1, most);
}

// Each block and range of output channels is a piece, which prepares all of the block's rows.
struct Tasks {
  std::vector<Block> blocks;
  int64_t splits;
  int64_t count() const { return blocks.size() * splits; }
};

constexpr double kUnevenTasks = 1.1;  // over the mean, from which on another cut is looked for
constexpr double kOfNumber = 16;      // multiply-adds that take as long as a number of the prologue or the epilogue

// Multiply-adds of a block with `columns` output channels: a range of rows for each tap.
inline double products_of(const Conv& p, const Block& block, int64_t columns) {
  int64_t rows = 0;
  for (int64_t k = 0; k < block.taps; ++k)
    block.each_range(k, [&](int64_t lo, int64_t hi, int64_t) { rows += hi - lo; });
  return static_cast<double>(rows) * p.in_channels * columns;
}

// About how long the threads take, in multiply-adds, where each takes the next piece as it becomes free.
template <class Kernel>
double time_of(const Conv& p, const Tasks& tasks) {
  const int64_t panels = Kernel::panels(p.out_channels), rounds = (tasks.count() + p.threads - 1) / p.threads;
  const double columns = static_cast<double>(panels) * Kernel::kColumns / tasks.splits;
  const double most_columns = (panels + tasks.splits - 1) / tasks.splits * Kernel::kColumns;
  double most_rows = 0, rows = 0, prepared = 0;
  for (const Block& block : tasks.blocks) {
    most_rows = std::max<double>(most_rows, block.rows);
    rows += block.rows;
    prepared += block.buffer_rows();
  }
  const double of_row = p.taps * p.in_channels + kOfNumber, count = tasks.blocks.size();
  const double mean = (rows * columns * of_row + prepared * p.in_channels * kOfNumber) / count;
  return rounds * mean + (most_rows * most_columns - rows / count * columns) * of_row;
}

// Where the usual cut leaves threads without work for long: fewer rows a block, more ranges of channels.
template <class Kernel>
Tasks tasks_of(const Conv& p) {
  const int64_t panels = Kernel::panels(p.out_channels), positions = p.batch * p.length;
  Tasks best{cut(p, Kernel::kMostRows), 0};
  best.splits = channel_splits(p, best.blocks.size(), panels);
  double least = time_of<Kernel>(p, best);
  const double of_position = p.out_channels * (p.taps * p.in_channels + kOfNumber) + p.in_channels * kOfNumber;
  if (p.threads > 2 && least * p.threads > kUnevenTasks * positions * of_position) {
    for (int64_t rows = Kernel::kMostRows; rows >= kRowUnit && positions <= rows * 4 * p.threads; rows -= kRowUnit) {
      Tasks tasks{cut(p, rows), 1};
      for (; tasks.splits <= (p.out.data == p.x.data ? 1 : panels); ++tasks.splits)
        if (const double time = time_of<Kernel>(p, tasks); time < least) least = time, best = tasks;
    }
  }
  // Small ones last, to fill the gaps that large ones leave.
  std::stable_sort(best.blocks.begin(), best.blocks.end(),
                   [](const Block& a, const Block& b) { return a.rows > b.rows; });
  return best;
}

inline void tell_packing(const Conv& p, int64_t panels, int64_t columns, const Work& work) {
  for (int64_t i = 0; i < panels; ++i)
    for (int64_t c = 0; c < p.in_channels; c += kPackedChannels)
      work.fixed("packing", 0, std::min(kPackedChannels, p.in_channels - c) * p.taps * columns);
}

template <class Kernel>
void tell_forward(const Conv& p, const Work& work) {
  tell_prepare(p.norm, p.batch, p.length, p.in_channels, p.threads, work);
  const Tasks tasks = tasks_of<Kernel>(p);
  const int64_t panels = Kernel::panels(p.out_channels), of_panel = p.taps * p.in_channels * Kernel::kColumns;
  const bool pack_first = Kernel::pack_first(p, tasks);
  if (pack_first) tell_packing(p, panels, Kernel::kColumns, work);
  for (const Block& block : tasks.blocks)
    for (int64_t split = 0; split < tasks.splits; ++split) {
      const int64_t own = panels * (split + 1) / tasks.splits - panels * split / tasks.splits;
      const int64_t columns = own * Kernel::kColumns;
      const double packed = p.packed || pack_first ? 0 : own * of_panel;
      work.dynamic("products", products_of(p, block, columns),
                   block.buffer_rows() * p.in_channels + block.rows * columns + packed);
    }
}

// y of channels [begin, end) of all rows of a block's buffer, `stride` numbers apart, zero up to whole vectors.
template <Prologue kPrologue, class T, class Out>
void fill_rows(const Conv& p, const Block& block, const Coefficients& coefficients, int64_t begin, int64_t end, Out* to,
               int64_t stride) {
  block.each_buffer_row([&](int64_t r, int64_t position) {
    const int64_t batch = block.batch_of(r);
    const Maps maps(coefficients, batch);
    Out* out = to + r * stride;
    if (position < 0) {
      std::memset(static_cast<void*>(out), 0, round_up(end - begin, kLanes) * sizeof(Out));
      return;
    }
    const T* x = row<T>(p.x, batch, position);
    for (int64_t c = begin; c < end; c += kLanes, out += kLanes)
      store(out, apply<kPrologue, kDegree<T>>(load_lanes(x + c, end - c), Map(maps, c)));
  });
}

template <class T, class Out>
void fill_rows(const Conv& p, const Block& block, const Coefficients& coefficients, int64_t begin, int64_t end, Out* to,
               int64_t stride) {
  with_prologue(p.norm, [&](auto prologue) {
    fill_rows<decltype(prologue)::value, T>(p, block, coefficients, begin, end, to, stride);
  });
}

}  // namespace
}  // namespace mmattn::MMATTN_ISA
