// SPDX-License-Identifier: MIT
// Convolution over [batch, position, channel] with its prologue and epilogue, as implicit matrix products:
//   out[l, o] = bias[o] + residual[l, o] + sum over taps k: y[l + (k - K/2) * dilation, :] . weight[o, :, k],
// y the prologue of x, zero outside the sequence. A block of output rows prepares the rows of y that its taps read
// once, in a buffer of its thread, and every tap is a matrix product on that buffer (conv_plan.h). The gradient of y is
// the same convolution with taps and channels swapped; that of the weight is, for each tap, the product of the
// transposed output gradients with the same buffer. On vectors three taps along an axis have fewer products
// (conv_winograd.h), and 3 x 3 taps those of the gradient of the weight as well.
#include "conv.h"

#include <type_traits>

#include "conv_plan.h"
#include "conv_winograd.h"
#include "gemm.h"
#if defined(__AVX512BF16__)
#include "conv_tiles.h"
#endif

namespace mmattn::MMATTN_ISA {
namespace {

// Weights are fp32 panels [panel of out channels][tap][in channel][kPanel].
class FmaWeights {
 public:
  static int64_t panels(int64_t out_channels) { return panels_of(out_channels); }
  static int64_t packed_bytes(int64_t out_channels, int64_t in_channels, int64_t taps) {
    return panels(out_channels) * kPanel * taps * in_channels * sizeof(float);
  }
  static void pack(const ConvWeights& w, void* packed) {
    w.weight_is_bf16 ? pack<bf16>(w, static_cast<float*>(packed)) : pack<float>(w, static_cast<float*>(packed));
  }
  // Whether the weights of few rows may be read where they are: of one tap, as float, whole vectors of out channels.
  static bool are_rows(const Conv& p) {
    constexpr int64_t kMostPositions = 128;
    const ConvWeights& w = p.weights;
    return !p.packed && p.taps == 1 && w.out_stride == 1 && !w.weight_is_bf16 && !w.is_bf16 &&
           p.out_channels % kLanes == 0 && p.batch * p.length <= kMostPositions;
  }
  // Of kLanes out channels from a multiple of that on.
  static Vec load_packed(const Conv& p, const void* packed, int64_t out, int64_t tap, int64_t in) {
    return load(static_cast<const float*>(packed) + ((out / kPanel * p.taps + tap) * p.in_channels + in) * kPanel +
                out % kPanel);
  }

 private:
  template <class W>
  static void pack(const ConvWeights& w, float* packed) {
    constexpr int64_t kChannels = kPackedChannels;  // of a strip of the panel that stays in the first-level cache
    const int64_t strips = (w.in_channels + kChannels - 1) / kChannels;
#pragma omp parallel for num_threads(w.threads) schedule(static) collapse(2)
    for (int64_t panel = 0; panel < panels(w.out_channels); ++panel)
      for (int64_t strip = 0; strip < strips; ++strip)
        for (int64_t j = 0; j < kPanel; j += kLanes) {
          const int64_t o = panel * kPanel + j, count = w.out_channels - o;
          const W* from = static_cast<const W*>(w.weight) + o * w.out_stride;
          for (int64_t c = strip * kChannels; c < std::min(w.in_channels, (strip + 1) * kChannels); ++c)
            for (int64_t k = 0; k < w.taps; ++k)
              store(packed + ((panel * w.taps + k) * w.in_channels + c) * kPanel + j,
                    round(strided(from + c * w.in_stride + k * w.tap_stride, w.out_stride, count), w.is_bf16));
        }
  }

  // from[0], from[stride], ...: `count` of them, at most kLanes, and zeros.
  template <class W>
  static Vec strided(const W* from, int64_t stride, int64_t count) {
    if (stride == 1 || count <= 0) return load_lanes(from, count);
    W lanes[kLanes] = {};
    if (count >= kLanes)
      for (int64_t i = 0; i < kLanes; ++i) lanes[i] = from[i * stride];
    else
      for (int64_t i = 0; i < count; ++i) lanes[i] = from[i * stride];
    return load(lanes);
  }

  static Vec round(Vec x, bool to_bf16) {
    if (!to_bf16) return x;
    bf16 rounded[kLanes];
    store(rounded, x);
    return load(rounded);
  }
};

template <class T>
class FmaConv : public FmaWeights {
 public:
  static constexpr int64_t kMostRows = 192, kDepth = 256, kColumns = kPanel;
  static bool pack_first(const Conv& p, const Tasks&) { return !p.packed && !FmaWeights::are_rows(p); }

  static void forward(const Conv& p) {
    const Coefficients coefficients(p.batch, p.in_channels);
    prepare<T>(p.norm, p.x, p.batch, p.length, p.in_channels, p.threads, coefficients);
    const bool are_rows = FmaWeights::are_rows(p);
    const Packed<FmaWeights> packed(p, are_rows);
    const float* data = static_cast<const float*>(are_rows ? p.weights.weight : packed.data());
    const int64_t row = are_rows ? p.weights.in_stride : kPanel, panel = are_rows ? 1 : p.taps * p.in_channels;
    const Panels weights{data, kPanel * panel, p.in_channels * kPanel, row};
    const Tasks tasks = tasks_of<FmaConv>(p);
    const int64_t panels = FmaWeights::panels(p.out_channels), splits = tasks.splits;
    const Extent extent(tasks.blocks);
    const PerChannel bias(1, p.out_channels, 1);
    fill_bias(p, bias);
    const int64_t depths = (p.in_channels + kDepth - 1) / kDepth;
    const int64_t depth = round_up((p.in_channels + depths - 1) / depths, kLanes), stride = depth + kLanes;
    const int64_t columns = (panels + splits - 1) / splits * kPanel;
    const int64_t buffer = extent.buffer_rows * stride, per_thread = round_up(buffer + extent.rows * columns, 16) + 16;
    const Buffer memory(per_thread * p.threads);
#pragma omp parallel num_threads(p.threads)
    {
      float* own = memory.data() + thread_number() * per_thread;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < tasks.count(); ++i) {
        const int64_t split = i % splits;
        run(p, weights, bias.at(0, 0), coefficients, tasks.blocks[i / splits], panels * split / splits,
            panels * (split + 1) / splits, depth, own, own + buffer);
      }
    }
  }

 private:
  // Of weights, kPanel out channels each: where they lie, and how far from a panel, tap and in channel to the next.
  struct Panels {
    const float* data;
    int64_t panel, tap, in;
  };

  static void run(const Conv& p, const Panels& panels, const float* bias, const Coefficients& coefficients,
                  const Block& block, int64_t panel_begin, int64_t panel_end, int64_t depth, float* buffer,
                  float* sums) {
    const int64_t stride = depth + kLanes, columns = (panel_end - panel_begin) * kPanel, middle = block.taps / 2;
    for (int64_t c = 0; c < p.in_channels; c += depth) {
      const int64_t end = std::min(p.in_channels, c + depth);
      fill_rows<T>(p, block, coefficients, c, end, buffer, stride);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const int64_t vecs = vecs_of_panel(p.out_channels, panel);
        for (int64_t j = 0; j < block.taps; ++j) {
          const int64_t k = j == 0 ? middle : j <= middle ? j - 1 : j;  // the middle one first: it has every row
          const float* weights = panels.data + panel * panels.panel + k * panels.tap + c * panels.in;
          const bool is_first = c == 0 && j == 0;
          const auto multiply = [&](int64_t lo, int64_t hi, int64_t from) {
            const Gemm g{hi - lo,
                         vecs,
                         end - c,
                         {buffer + from * stride, stride, 1},
                         {weights, kLanes, panels.in},
                         {sums + lo * columns + (panel - panel_begin) * kPanel, columns}};
            is_first ? gemm<Init::zero>(g) : gemm<Init::add>(g);
          };
          if (k == middle)
            multiply(0, block.rows, block.order == Order::positions ? block.offset(k) : 0);
          else
            block.each_range(k, multiply);
        }
      }
    }
    const int64_t first = panel_begin * kPanel, last = std::min(p.out_channels, panel_end * kPanel);
    for (int64_t i = 0; i < block.rows; i += kRowUnit)
      for (int64_t r = i; r < i + block.live(i); ++r) {
        const int64_t position = block.position(r);
        if (position < 0) continue;
        const int64_t batch = block.batch_of(r);
        T* out = row<T>(p.out, batch, position);
        const T* residual = p.residual.data ? row<T>(p.residual, batch, position) : nullptr;
        for (int64_t o = first; o < last; o += kLanes) {
          Vec value = load(sums + r * columns + o - first) + load(bias + o);
          if (residual) value += load_lanes(residual + o, last - o);
          store_lanes(out + o, value, last - o);
        }
      }
  }
};

// What WeightGradient multiplies of a block on vectors: all rows of y and `count` channels, from `first` on, of the
// output gradient, as fp32.
template <class T>
class FmaGradientProduct {
 public:
  using Row = float;
  struct Registers {};
  static constexpr int64_t kMostRows = 192;
  static int64_t floats(const Extent& extent, int64_t columns) { return extent.rows * (columns + kLanes); }

  FmaGradientProduct(const Conv& p, const Block& block, const Row* rows, int64_t row_stride, int64_t first,
                     int64_t count, float* memory)
      : rows_(rows),
        row_stride_(row_stride),
        count_(count),
        stride_(round_up(count, kLanes) + kLanes),
        vecs_((p.in_channels + kLanes - 1) / kLanes),
        gradients_(memory) {
    for (int64_t i = 0; i < block.rows; ++i) {
      const T* d_out = gradient_row<T>(p, block, i);
      if (d_out)
        load_row(gradients_ + i * stride_, d_out + first, count, count, 1.0f);
      else
        std::memset(gradients_ + i * stride_, 0, round_up(count, kLanes) * sizeof(float));
    }
  }

  // [out channel][in channel] of a tap over the rows lo .. hi - 1, which read those of the buffer `from` on, added to
  // `to` or, with `is_first`, instead of it.
  void multiply(int64_t, int64_t lo, int64_t hi, int64_t from, float* to, int64_t to_row, bool is_first) const {
    const Gemm g{count_,
                 vecs_,
                 hi - lo,
                 {gradients_ + lo * stride_, 1, stride_},
                 {rows_ + from * row_stride_, kLanes, row_stride_},
                 {to, to_row}};
    is_first ? gemm<Init::zero>(g) : gemm<Init::add>(g);
  }

 private:
  const Row* rows_;
  const int64_t row_stride_, count_, stride_, vecs_;
  float* gradients_;
};

// Of the weight. A thread sums over the blocks of its team, for its range of out channels, into [tap][out][in]; teams
// share the blocks where the sums are small, members share the channels where they are large. Last, the teams' sums are
// added in their order. Product is FmaGradientProduct or that of conv_tiles.h.
template <class T, class Product>
class WeightGradient {
 public:
  using Row = typename Product::Row;
  static constexpr int64_t kTeamBytes = 2 << 20, kMostSumBytes = 64 << 20;

  // Pieces are teams times members; a team has its share of the blocks, a member its share of the 32-channel units.
  struct Teams {
    std::vector<Block> blocks;
    int64_t units, in_padded, sums_of_all, teams, members;

    explicit Teams(const Conv& p)
        : blocks(cut(p, Product::kMostRows)),
          units((p.out_channels + 31) / 32),
          in_padded(round_up(p.in_channels, 32) + 16),
          sums_of_all(p.taps * units * 32 * in_padded) {
      const bool share_blocks = sums_of_all * static_cast<int64_t>(sizeof(float)) <= kTeamBytes;
      teams = share_blocks ? std::min<int64_t>(p.threads, blocks.size()) : 1;
      members = std::clamp<int64_t>(p.threads / teams, 1, units);
      const double of_position = p.taps * p.in_channels * units * 32 + kOfNumber * (p.in_channels + units * 32);
      double least = time(p, blocks, teams, members);
      if (p.threads > 2 && least * p.threads > kUnevenTasks * p.batch * p.length * of_position) search(p, least);
    }

   private:
    // More teams with sums of their own, and smaller blocks to share.
    void search(const Conv& p, double least) {
      const int64_t most = std::min<int64_t>(p.threads, std::max<int64_t>(kMostSumBytes / 4 / sums_of_all, 1));
      for (int64_t rows = Product::kMostRows; rows >= kRowUnit; rows /= 2) {
        std::vector<Block> cut_finer = cut(p, rows);
        int64_t best = 0;
        for (int64_t t = 1; t <= std::min<int64_t>(most, cut_finer.size()); ++t)
          if (const double found = time(p, cut_finer, t, std::clamp<int64_t>(p.threads / t, 1, units)); found < least)
            least = found, best = t;
        if (best)
          blocks = std::move(cut_finer), teams = best, members = std::clamp<int64_t>(p.threads / best, 1, units);
      }
    }

    // Of the slowest, in multiply-adds.
    double time(const Conv& p, const std::vector<Block>& of, int64_t t, int64_t m) const {
      const double count = of.size(), columns = (units + m - 1) / m * 32;
      double rows = 0, prepared = 0;
      for (const Block& block : of) rows += block.rows, prepared += block.buffer_rows();
      const double share = (of.size() + t - 1) / t / count;  // of the largest team
      return share * (rows * columns * (p.taps * p.in_channels + kOfNumber) + prepared * p.in_channels * kOfNumber) +
             kOfNumber * t * p.taps * p.in_channels * p.out_channels / p.threads;
    }
  };

  static void tell(const Conv& p, const Work& work) {
    work.fixed("coefficients", 0, 2 * kOfChannel * p.in_channels * p.batch);
    const Teams plan(p);
    const int64_t count = plan.blocks.size();
    for (int64_t i = 0; i < plan.teams * plan.members; ++i) {
      const int64_t team = i / plan.members, member = i % plan.members;
      const int64_t columns = (plan.units * (member + 1) / plan.members - plan.units * member / plan.members) * 32;
      double products = 0, numbers = 0;
      for (int64_t b = count * team / plan.teams; b < count * (team + 1) / plan.teams; ++b) {
        products += products_of(p, plan.blocks[b], columns);
        numbers += plan.blocks[b].buffer_rows() * p.in_channels + plan.blocks[b].rows * columns;
      }
      work.fixed("products", products, numbers);
    }
    for (int64_t o = 0; o < p.out_channels; ++o) work.fixed("sums", 0, plan.teams * p.taps * p.in_channels);
  }

  static void run(const Conv& p) {
    const Coefficients coefficients(p.batch, p.in_channels);
    set_coefficients_from_stats(p.norm, coefficients, p.batch, p.in_channels);
    const Teams plan(p);
    const std::vector<Block>& blocks = plan.blocks;
    const int64_t count = blocks.size(), units = plan.units, teams = plan.teams, members = plan.members;
    const int64_t sums_of_all = plan.sums_of_all;
    const Extent extent(blocks);
    const Buffer sums(teams * sums_of_all);
    const WeightGradient shape(p, coefficients, extent, plan.in_padded, (units + members - 1) / members * 32);
    const Buffer memory(shape.per_thread_ * p.threads);
#pragma omp parallel num_threads(p.threads)
    {
      [[maybe_unused]] const typename Product::Registers registers{};
      float* own = memory.data() + thread_number() * shape.per_thread_;
#pragma omp for schedule(static, 1)
      for (int64_t i = 0; i < teams * members; ++i) {
        const int64_t team = i / members, member = i % members;
        const int64_t first = units * member / members * 32, end = units * (member + 1) / members * 32;
        float* own_sums = sums.data() + team * sums_of_all;
        for (int64_t b = count * team / teams; b < count * (team + 1) / teams; ++b)
          shape.add_block(blocks[b], first, end, b == count * team / teams, own, own_sums);
      }
#pragma omp for schedule(static)
      for (int64_t o = 0; o < p.out_channels; ++o) shape.write(o, sums.data(), sums_of_all, teams, units * 32, own);
    }
  }

 private:
  const Conv& p_;
  const Coefficients& coefficients_;
  const int64_t in_padded_, row_stride_, rows_, per_thread_;

  WeightGradient(const Conv& p, const Coefficients& coefficients, const Extent& extent, int64_t in_padded,
                 int64_t columns)
      : p_(p),
        coefficients_(coefficients),
        in_padded_(in_padded),
        row_stride_(round_up(p.in_channels, 32) + 16),
        rows_(round_up(extent.buffer_rows * row_stride_ * sizeof(Row) / sizeof(float) + 16, 16)),
        per_thread_(std::max(rows_ + Product::floats(extent, columns), round_up(p.in_channels * p.taps, 16)) + 16) {}

  void add_block(const Block& block, int64_t first, int64_t end, bool is_first, float* own, float* sums) const {
    Row* rows = reinterpret_cast<Row*>(own);
    fill_rows<T>(p_, block, coefficients_, 0, p_.in_channels, rows, row_stride_);
    const int64_t out_rows = round_up(p_.out_channels, 32), count = std::min(end, p_.out_channels) - first;
    const Product product(p_, block, rows, row_stride_, first, count, own + rows_);
    for (int64_t k = 0; k < block.taps; ++k) {
      float* to = sums + (k * out_rows + first) * in_padded_;
      bool is_empty = is_first;
      block.each_range(k, [&](int64_t lo, int64_t hi, int64_t from) {
        product.multiply(k, lo, hi, from, to, in_padded_, is_empty);
        is_empty = false;
      });
      if (is_empty) std::memset(to, 0, (end - first) * in_padded_ * sizeof(float));
    }
  }

  // The teams' sums of one out channel, added in their order, from [tap][in] to [in][tap].
  void write(int64_t o, float* sums, int64_t sums_of_all, int64_t teams, int64_t out_rows, float* own) const {
    const int64_t channels = p_.in_channels, taps = p_.taps;
    const auto row_of = [&](int64_t k, int64_t team) {
      return sums + team * sums_of_all + (k * out_rows + o) * in_padded_;
    };
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t team = 1; team < teams; ++team)
        for (int64_t c = 0; c < channels; c += kLanes)
          store(row_of(k, 0) + c, load(row_of(k, 0) + c) + load(row_of(k, team) + c));
    write_weight_gradient(p_, o, row_of(0, 0), out_rows * in_padded_, own);
  }
};

#if defined(__AVX512BF16__)
template <class T>
using ConvOf = std::conditional_t<kOnTiles<T>, TileConv<T>, FmaConv<T>>;
template <class T>
using GradientProductOf = std::conditional_t<kOnTiles<T>, TileGradientProduct<T>, FmaGradientProduct<T>>;
#else
template <class T>
using ConvOf = FmaConv<T>;
template <class T>
using GradientProductOf = FmaGradientProduct<T>;
#endif

template <class T>
void sums_of_columns(const Tokens& t, int64_t batch, int64_t length, int64_t channels, float* out, int threads) {
  const Parts parts(length, channels);
  const ChannelRanges ranges(channels, 1, batch * parts.count, threads);
  const PerChannel partial(batch * parts.count, channels, 1);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < batch * parts.count * ranges.count; ++j) {
      const int64_t i = j / ranges.count, first_channel = ranges.begin(j % ranges.count);
      const int64_t end_channel = ranges.begin(j % ranges.count + 1);
      float* sums = partial.at(i, 0);
      std::fill(sums + first_channel, sums + round_up(end_channel, kLanes), 0.0f);
      const int64_t begin = parts.begin(i % parts.count), end = parts.end(i % parts.count);
      for (int64_t first = begin; first < end; first += kSliceRows)
        for (int64_t c = first_channel; c < end_channel; c += kLanes) {
          Vec sum{};
          for (int64_t l = first; l < std::min(end, first + kSliceRows); ++l)
            sum += load_lanes(row<T>(t, i / parts.count, l) + c, channels - c);
          store(sums + c, load(sums + c) + sum);
        }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t i = 0; i < batch * parts.count; ++i) total += partial.at(i, 0)[c];
      out[c] = static_cast<float>(total);
    }
  }
}

#if defined(__AMX_BF16__)
constexpr bool kHasFewerProducts = false;  // tiles are faster
#else
constexpr bool kHasFewerProducts = true;
#endif
template <class T>
using InFrames = WinogradConv<ConvOf<T>, T, true, 4>;

template <class Way>
struct Type {
  using type = Way;
};
// visit(Type<WinogradConv>) with the one that is faster than the sum over the taps, and whether there is one.
template <class T, class Visit>
bool with_fewer_products(const Conv& p, Visit visit) {
  if constexpr (kHasFewerProducts)
    if (InFrames<T>::is_faster(p)) return visit(Type<InFrames<T>>{}), true;
  if constexpr (!kOnTiles<T>) {  // dot products of bf16 are as fast as half the products
    using InSmallFrames = WinogradConv<ConvOf<T>, T, true, 2>;
    using AlongSequence = WinogradConv<ConvOf<T>, T, false, 4>;
    if (InSmallFrames::is_faster(p)) return visit(Type<InSmallFrames>{}), true;
    if (AlongSequence::is_faster(p)) return visit(Type<AlongSequence>{}), true;
  }
  return false;
}

template <class T>
void forward_of(const Conv& p) {
  if (!with_fewer_products<T>(p, [&](auto way) { decltype(way)::type::forward(p); })) ConvOf<T>::forward(p);
}
template <class T>
void tell_forward_of(const Conv& p, const Work& work) {
  if (!with_fewer_products<T>(p, [&](auto way) { decltype(way)::type::tell(p, work); }))
    tell_forward<ConvOf<T>>(p, work);
}

template <class T>
void weight_gradient_of(const Conv& p) {
  if constexpr (kHasFewerProducts)
    if (InFrames<T>::is_faster(p)) return InFrames<T>::weight_gradient(p);
  WeightGradient<T, GradientProductOf<T>>::run(p);
}
template <class T>
void tell_weight_gradient_of(const Conv& p, const Work& work) {
  if constexpr (kHasFewerProducts)
    if (InFrames<T>::is_faster(p)) return InFrames<T>::tell_weight_gradient(p, work);
  WeightGradient<T, GradientProductOf<T>>::tell(p, work);
}

void tell_sums_of_columns(const Conv& p, const Work& work) {
  const Parts parts(p.length, p.out_channels);
  tell_parts("parts", p.batch, parts, ChannelRanges(p.out_channels, 1, p.batch * parts.count, p.threads), 1, work);
  for (int64_t c = 0; c < p.out_channels; ++c) work.fixed("sums", 0, p.batch * parts.count);
}

}  // namespace

int64_t conv_packed_bytes(int64_t out_channels, int64_t in_channels, int64_t taps, bool is_bf16) {
  return is_bf16 ? ConvOf<bf16>::packed_bytes(out_channels, in_channels, taps)
                 : ConvOf<float>::packed_bytes(out_channels, in_channels, taps);
}
void conv_pack(const ConvWeights& w, void* packed) {
  w.is_bf16 ? ConvOf<bf16>::pack(w, packed) : ConvOf<float>::pack(w, packed);
}
void conv_forward(const Conv& p) {
  p.is_bf16 ? forward_of<bf16>(p) : forward_of<float>(p);
}
void conv_weight_gradient(const Conv& p) {
  p.is_bf16 ? weight_gradient_of<bf16>(p) : weight_gradient_of<float>(p);
}

void conv_work(const Conv& p, ConvLoop what, const Work& work) {
  switch (what) {
    case ConvLoop::forward:
      return p.is_bf16 ? tell_forward_of<bf16>(p, work) : tell_forward_of<float>(p, work);
    case ConvLoop::weight_gradient:
      return p.is_bf16 ? tell_weight_gradient_of<bf16>(p, work) : tell_weight_gradient_of<float>(p, work);
    case ConvLoop::column_sums:
      return tell_sums_of_columns(p, work);
  }
}

void column_sums(const Tokens& t, int64_t batch, int64_t length, int64_t channels, bool is_bf16, float* out,
                 int threads) {
  is_bf16 ? sums_of_columns<bf16>(t, batch, length, channels, out, threads)
          : sums_of_columns<float>(t, batch, length, channels, out, threads);
}

}  // namespace mmattn::MMATTN_ISA
