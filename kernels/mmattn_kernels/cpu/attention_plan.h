// SPDX-License-Identifier: MIT
// What the attention kernels share: the rule of windows, how the work is cut into pieces, the memory of a thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <list>
#include <memory>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "simd.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr int64_t kMaxDim = 256;
constexpr int64_t kCacheBytes = 1 << 20;  // packed keys a run may hold: half of a common second-level cache
// Queries of a forward piece, where packing its keys again costs next to nothing: their rows and those of the output
// lie in as many pages as address caches hold, so that the next head, beside them in memory, finds the pages there.
constexpr int64_t kReach = 1024;
constexpr int64_t kRowsPerKey = 8;  // against which packing a key is next to nothing
constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();  // less than any score, and no NaN less a score

template <class T>
T* row(const Strided& s, int64_t batch, int64_t position, int64_t head) {
  return static_cast<T*>(s.data) + batch * s.batch + position * s.position + head * s.head;
}

// The natural logarithm of a sum of exponentials of base 2 that are relative to `scale` times `top`.
inline double log_sum_exp(float top, float scale, float sum) {
  return (static_cast<double>(top) * scale + std::log2(sum)) * kLn2<double>;
}

// The same in base 2, as two floats.
struct BinaryLse {
  float high, low;
  explicit BinaryLse(double lse) {
    const double binary = lse * kLog2e<double>;
    high = static_cast<float>(binary);
    low = static_cast<float>(binary - high);
  }
};

// What the queries carry of the scale, and what is left for differences of scores: its sign and its size, since a score
// scaled before the greatest is taken off is rounded once more, by its own size. All of it and 1 where it is so small
// that the log-sum-exp divided by it would be no float.
struct ScoreScale {
  float of_queries, of_differences;  // the latter in base 2, above 0
  explicit ScoreScale(float scale)
      : of_queries(scale < 0 ? -1.0f : 1.0f), of_differences(std::abs(scale) * kLog2e<float>) {
    if (of_differences < 1e-20f) of_queries = scale * kLog2e<float>, of_differences = 1.0f;
  }
};

struct Range {
  int64_t lo, hi;
};

// Queries, and the circular range of keys that they read.
struct Segment {
  Range queries;
  int64_t key_begin, key_length;
  int64_t pairs() const { return (queries.hi - queries.lo) * key_length; }
};

// The rule of windows of one direction: its segments in the order of their queries, without those that read no key.
struct Windows {
  std::vector<Segment> segments;
  std::vector<Range> unread_queries;
  int64_t q_len, k_len, longest = 0;
  int64_t step = 0;  // keys from one window to the next where all are equal, else 0

  Windows(const Attention& p, const Direction& d) : q_len(d.q_len), k_len(d.k_len) {
    p.tables.segments ? from_tables(p.tables) : equal(p);
    step = equal_step();
  }

  bool overlap() const { return longest > step; }

  // Of key `begin` on a circle that starts at `origin`.
  int64_t offset(int64_t begin, int64_t origin) const {
    return begin >= origin ? begin - origin : begin - origin + k_len;
  }

 private:
  void equal(const Attention& p) {
    const int64_t q_segment = q_len / p.frames, k_segment = k_len / p.frames;
    longest = p.window * k_segment;
    if (longest == k_len) return segments.push_back({{0, q_len}, 0, k_len});  // whose order does not matter
    segments.reserve(p.frames);
    for (int64_t i = 0; i < p.frames; ++i)  // the last segment owns the left-over positions
      segments.push_back({{i * q_segment, i + 1 == p.frames ? q_len : (i + 1) * q_segment},
                          (i + p.shift) * k_segment % k_len,
                          longest});
  }

  void from_tables(const Tables& t) {
    segments.reserve(t.segments);
    for (int64_t i = 0; i < t.segments; ++i) {
      const Range queries{t.query_bounds[i], t.query_bounds[i + 1]};
      const int64_t length = t.key_length[i], begin = length == k_len ? 0 : (t.key_begin[i] % k_len + k_len) % k_len;
      if (queries.lo == queries.hi) continue;
      if (length == 0) {
        unread_queries.push_back(queries);
        continue;
      }
      longest = std::max(longest, length);
      Segment* last = segments.empty() ? nullptr : &segments.back();
      if (last && last->queries.hi == queries.lo && last->key_begin == begin && last->key_length == length)
        last->queries.hi = queries.hi;
      else
        segments.push_back({queries, begin, length});
    }
  }

  // Read off the segments, so that equal windows have one plan, and the same bits, whichever way they were given.
  int64_t equal_step() const {
    const int64_t count = segments.size();
    if (count == 0 || count > k_len || !unread_queries.empty()) return 0;
    const int64_t q_segment = q_len / count, k_segment = k_len / count;
    if (longest < k_segment) return 0;
    for (int64_t i = 0; i < count; ++i) {
      const Segment& s = segments[i];
      const int64_t begin = (segments[0].key_begin + i * k_segment) % k_len;
      if (s.queries.lo != i * q_segment || s.key_begin != begin || s.key_length != longest) return 0;
    }
    return k_segment;
  }
};

struct QueryBlock {
  int64_t segment;
  Range queries;
  int64_t share = -1;  // the first row of its share of d_q, where several pieces have one; else it is all of d_q
};

// Appends blocks of at most `rows` queries of a segment, which is split evenly in whole units.
void append_query_blocks(std::vector<QueryBlock>& blocks, const Windows& w, int64_t segment, int64_t rows,
                         int64_t unit) {
  const Range q = w.segments[segment].queries;
  const int64_t units = (q.hi - q.lo + unit - 1) / unit, count = (units * unit + rows - 1) / rows;
  for (int64_t i = 0; i < count; ++i)
    blocks.push_back(
        {segment, {q.lo + units * i / count * unit, std::min(q.hi, q.lo + units * (i + 1) / count * unit)}});
}

// Work of every batch and head: query blocks, and the circular range of keys they read, or that part of it whose
// gradients are made here. It is packed once, as keys 0..ring-1; a window is one or two plain ranges of it.
struct Piece {
  int64_t origin, ring;
  int64_t begin, end;  // among the blocks of its plan
  int64_t pairs;       // of queries and keys
};

// A window of `length` keys from `lo` on a circle of k_len, as far as it lies in [0, ring).
template <class Visit>
void each_range_of_ring(int64_t lo, int64_t length, int64_t ring, int64_t k_len, Visit visit) {
  const int64_t hi = lo + length;
  if (lo < ring) visit(Range{lo, std::min(hi, ring)});
  if (hi > k_len) visit(Range{0, std::min(hi - k_len, ring)});
}

// How one direction is computed: the same pieces for every batch and head.
struct Plan {
  const Direction* direction;
  Windows windows;
  std::vector<QueryBlock> blocks;
  std::vector<Piece> pieces;
  std::vector<Range> unread_keys;  // their gradients are zero; in backward only
  int64_t share_rows = 0;          // of one head

  Plan(const Attention& p, const Direction& d) : direction(&d), windows(p, d) {}

  void clear() {
    blocks.clear();
    pieces.clear();
    unread_keys.clear();
    share_rows = 0;
  }

  void add_piece(int64_t origin, int64_t ring, int64_t begin, int64_t end) {
    int64_t pairs = 0;
    for (int64_t i = begin; i < end; ++i)
      each_range_of_ring(windows.offset(windows.segments[blocks[i].segment].key_begin, origin),
                         windows.segments[blocks[i].segment].key_length, ring, windows.k_len, [&](Range keys) {
                           pairs += (blocks[i].queries.hi - blocks[i].queries.lo) * (keys.hi - keys.lo);
                         });
    pieces.push_back({origin, ring, begin, end, pairs});
  }

  void add_unread(int64_t lo, int64_t hi) {  // lo..hi-1, modulo the number of keys
    if (lo >= hi) return;
    const int64_t first = lo % windows.k_len, last = first + hi - lo;
    unread_keys.push_back({first, std::min(last, windows.k_len)});
    if (last > windows.k_len) unread_keys.push_back({0, last - windows.k_len});
  }
};

// One thread's piece of work.
struct Run {
  const Direction* direction;
  const Windows* windows;
  int64_t batch, head, ring, origin, pairs;
  const QueryBlock *begin, *end;
  float* shares = nullptr;  // of d_q of its head, rows of `dim` floats

  Run(const Plan& plan, const Piece& piece, int64_t batch_, int64_t head_)
      : direction(plan.direction),
        windows(&plan.windows),
        batch(batch_),
        head(head_),
        ring(piece.ring),
        origin(piece.origin),
        pairs(piece.pairs),
        begin(plan.blocks.data() + piece.begin),
        end(plan.blocks.data() + piece.end) {}

  template <class T>
  T* key(const Strided& s, int64_t i) const {  // null past the ring
    if (i >= ring) return nullptr;
    const int64_t position = origin + i;
    return row<T>(s, batch, position < windows->k_len ? position : position - windows->k_len, head);
  }

  int64_t row_of(const QueryBlock& block, int64_t heads) const {
    return (batch * heads + head) * direction->q_len + block.queries.lo;
  }
  double* lse(const QueryBlock& block, int64_t heads) const { return direction->lse + row_of(block, heads); }

  // Of the loss by the log-sum-exp of row `r` of a block, where there is one.
  float d_lse(const QueryBlock& block, int64_t heads, int64_t r) const {
    return direction->d_lse ? static_cast<float>(direction->d_lse[row_of(block, heads) + r]) : 0.0f;
  }

  template <class Visit>
  void each_key_range(const QueryBlock& block, Visit visit) const {
    const Segment& segment = windows->segments[block.segment];
    each_range_of_ring(windows->offset(segment.key_begin, origin), segment.key_length, ring, windows->k_len, visit);
  }

  template <class T>
  void store_d_query(const QueryBlock& block, int64_t r, const float* values, int64_t dim, float factor) const {
    if (block.share < 0)
      store_row(row<T>(direction->d_q, batch, block.queries.lo + r, head), values, dim, factor);
    else
      store_row(shares + (block.share + r) * dim, values, dim, factor);
  }
};

// Blocks of at most `panels` panels of `width` keys that cover `range`, split evenly: visit(first panel, panels).
template <class Visit>
void each_key_block(Range range, int64_t width, int64_t panels, Visit visit) {
  const int64_t first = range.lo / width, count = (range.hi + width - 1) / width - first;
  const int64_t blocks = (count + panels - 1) / panels;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = first + count * i / blocks, end = first + count * (i + 1) / blocks;
    visit(begin, end - begin);
  }
}

// What a kernel wants of its pieces. With `exclusive`, as backward needs it, no two of a head have the same key.
struct Shape {
  int64_t rows, unit, bytes_per_key;
  bool exclusive;
};

// Of windows that are equal: pieces as long as the packed keys stay in cache, but enough of them for the threads.
void cut_equally(Plan& plan, const Attention& p, const Shape& shape) {
  const Windows& w = plan.windows;
  const int64_t segments = w.segments.size();
  for (int64_t i = 0; i < segments; ++i) append_query_blocks(plan.blocks, w, i, shape.rows, shape.unit);
  const int64_t count = plan.blocks.size(), heads = p.batch * p.heads;
  const int64_t cached = kCacheBytes / shape.bytes_per_key - w.longest;
  // Windows of one segment share no key, so longer pieces would only push the keys out of the nearer caches.
  const int64_t kept = cached > 0 && w.overlap() ? std::min(cached / w.step + 1, segments) : 1;
  const int64_t wanted = (4 * p.threads + 2 * heads - 1) / (2 * heads);
  int64_t pieces = std::max((segments + kept - 1) / kept, wanted);
  if (shape.exclusive) pieces = w.overlap() ? 1 : std::min(pieces, segments);
  pieces = std::min(pieces, count);
  int64_t begin = 0;
  for (int64_t i = 1; i <= pieces; ++i) {
    int64_t cut = count * i / pieces;
    while (shape.exclusive && cut > begin && cut < count && plan.blocks[cut - 1].segment == plan.blocks[cut].segment)
      --cut;
    if (cut <= begin) continue;
    const int64_t first = plan.blocks[begin].segment, last = plan.blocks[cut - 1].segment;
    plan.add_piece(w.segments[first].key_begin, std::min(w.longest + (last - first) * w.step, w.k_len), begin, cut);
    begin = cut;
  }
  const int64_t first = w.segments[0].key_begin, last = first + w.offset(w.segments.back().key_begin, first);
  plan.add_unread(last + w.longest, first + w.k_len);
}

// The keys of the segments of some blocks as one arc: where it begins and how long it is.
struct Arc {
  int64_t origin, length;
};

// The arc of segments that are added in order.
class ArcOf {
 public:
  ArcOf(const Windows& w, int64_t segment) : w_(w), lo_(w.k_len), first_(w.segments[segment].key_begin) {
    add(segment);
  }

  void add(int64_t segment) {
    const auto [queries, begin, keys] = w_.segments[segment];
    lo_ = std::min(lo_, begin);
    hi_ = std::max(hi_, begin + keys);
    length_ = std::max(length_, w_.offset(begin, first_) + keys);
  }

  // Ranges that go on in order may wrap around; where others do, all keys are the arc.
  Arc arc() const {
    if (hi_ <= w_.k_len && hi_ - lo_ <= length_) return {lo_, hi_ - lo_};
    return length_ < w_.k_len ? Arc{first_, length_} : Arc{0, w_.k_len};
  }

 private:
  const Windows& w_;
  int64_t lo_, first_, hi_ = 0, length_ = 0;
};

int64_t parts_of(int64_t pairs, double most) {
  return std::max<int64_t>(1, std::ceil(pairs / most - 1e-3));
}

// The blocks from `begin` on, of so many pairs in all, as pieces of about equal work.
void cut_blocks(Plan& plan, int64_t begin, int64_t pairs, int64_t parts) {
  const Windows& w = plan.windows;
  const int64_t end = plan.blocks.size();
  int64_t seen = 0, part = 0;
  for (int64_t i = begin; i <= end; ++i) {
    int64_t own = 0, of_block = parts;
    if (i < end) {
      own = (plan.blocks[i].queries.hi - plan.blocks[i].queries.lo) * w.segments[plan.blocks[i].segment].key_length;
      of_block = (2 * seen + own) * parts / (2 * pairs);
    }
    if (i > begin && of_block != part) {
      ArcOf keys(w, plan.blocks[begin].segment);
      for (int64_t j = plan.blocks[begin].segment + 1; j <= plan.blocks[i - 1].segment; ++j) keys.add(j);
      plan.add_piece(keys.arc().origin, keys.arc().length, begin, i);
      begin = i;
    }
    part = of_block;
    seen += own;
  }
}

// Of any windows, for forward: pieces of neighbouring queries that share keys, of about `most` pairs.
void cut_queries(Plan& plan, const Shape& shape, double most) {
  const Windows& w = plan.windows;
  const int64_t segments = w.segments.size(), cached = kCacheBytes / shape.bytes_per_key;
  for (int64_t first = 0, next; first < segments; first = next) {
    ArcOf keys(w, first);
    int64_t pairs = w.segments[first].pairs(), longest = w.segments[first].key_length;
    for (next = first + 1; next < segments; ++next) {
      const Segment& segment = w.segments[next];
      const int64_t apart = keys.arc().length + segment.key_length;
      longest = std::max(longest, segment.key_length);
      keys.add(next);
      if (keys.arc().length >= apart || keys.arc().length > std::max(cached, longest)) break;
      pairs += segment.pairs();
    }
    const int64_t begin = plan.blocks.size();
    for (int64_t i = first; i < next; ++i) append_query_blocks(plan.blocks, w, i, shape.rows, shape.unit);
    const int64_t queries = w.segments[next - 1].queries.hi - w.segments[first].queries.lo;
    cut_blocks(plan, begin, pairs, std::max(parts_of(pairs, most), queries / std::max(kReach, kRowsPerKey * longest)));
  }
}

// Keys that some segment reads, and that no window leaves: an arc from `lo`, and the segments that read them.
struct Component {
  int64_t lo, hi, begin, end;
};

struct Member {
  int64_t segment, key_begin, key_end;
};

// Arcs of keys that windows share; `members` are the segments in the order of the arcs.
std::vector<Component> components(const Windows& w, std::vector<Member>& members) {
  for (size_t i = 0; i < w.segments.size(); ++i) {
    const Segment& s = w.segments[i];
    members.push_back({static_cast<int64_t>(i), s.key_begin, s.key_begin + s.key_length});
  }
  std::sort(members.begin(), members.end(), [](const Member& a, const Member& b) {
    return a.key_begin != b.key_begin ? a.key_begin < b.key_begin : a.segment < b.segment;
  });
  std::vector<Component> found;
  const int64_t count = members.size();
  for (int64_t i = 0; i < count; ++i) {
    if (found.empty() || members[i].key_begin >= found.back().hi)
      found.push_back({members[i].key_begin, members[i].key_end, i, i + 1});
    found.back().hi = std::max(found.back().hi, members[i].key_end);
    found.back().end = i + 1;
  }
  // The last may go on at key 0, and take the first ones in, whose members then follow its own.
  int64_t taken = 0;
  while (taken + 1 < static_cast<int64_t>(found.size()) && found[taken].lo < found.back().hi - w.k_len) {
    found.back().hi = std::max(found.back().hi, found[taken].hi + w.k_len);
    ++taken;
  }
  if (taken) {
    const int64_t moved = found[taken - 1].end;
    std::rotate(members.begin(), members.begin() + moved, members.end());
    for (Component& c : found) c.begin -= moved, c.end -= moved;
    found.back().end = count;
    found.erase(found.begin(), found.begin() + taken);
  }
  for (Component& c : found) c.hi = std::min(c.hi, c.lo + w.k_len);
  return found;
}

struct Step {
  int64_t at, queries;  // from here on, so many more queries read a key
};

// The keys of a component in parts of as many pairs, of whole units.
std::vector<Range> cut_keys(const Windows& w, const Component& c, const std::vector<Member>& members, int64_t parts) {
  const int64_t ring = c.hi - c.lo, unit = std::clamp<int64_t>(ring / 64, 1, 32);
  std::vector<Range> found;
  if (parts == 1) return {{0, ring}};
  std::vector<Step> steps;
  int64_t total = 0;
  for (int64_t i = c.begin; i < c.end; ++i) {
    const Segment& s = w.segments[members[i].segment];
    const int64_t rows = s.queries.hi - s.queries.lo;
    total += s.pairs();
    each_range_of_ring(w.offset(s.key_begin, c.lo % w.k_len), s.key_length, ring, w.k_len, [&](Range keys) {
      steps.push_back({keys.lo, rows});
      steps.push_back({keys.hi, -rows});
    });
  }
  std::sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.at < b.at; });
  int64_t queries = 0, seen = 0, at = 0, begin = 0, part = 1;
  for (const Step& step : steps) {
    while (part < parts && queries > 0 && seen + queries * (step.at - at) >= total * part / parts) {
      const int64_t exact = at + (total * part / parts - seen) / queries;
      const int64_t cut = std::min((exact + unit / 2) / unit * unit, ring);
      if (cut > begin) found.push_back({begin, cut}), begin = cut;
      ++part;
    }
    seen += queries * (step.at - at);
    at = step.at;
    queries += step.queries;
  }
  if (begin < ring) found.push_back({begin, ring});
  return found;
}

// Of any windows, for backward: arcs of keys with the blocks that read them, of about `most` pairs. A block that reads
// several arcs has a share of d_q from each.
void cut_keys_of_all(Plan& plan, const Shape& shape, double most) {
  const Windows& w = plan.windows;
  std::vector<Member> members;
  const std::vector<Component> all = components(w, members);
  for (size_t j = 0; j < all.size(); ++j) {
    const Component& c = all[j];
    plan.add_unread(c.hi, j + 1 < all.size() ? all[j + 1].lo : all[0].lo + w.k_len);
    std::sort(members.begin() + c.begin, members.begin() + c.end,
              [](const Member& a, const Member& b) { return a.segment < b.segment; });
    int64_t pairs = 0;
    for (int64_t i = c.begin; i < c.end; ++i) pairs += w.segments[members[i].segment].pairs();
    const int64_t first_piece = plan.pieces.size();
    for (const Range keys : cut_keys(w, c, members, parts_of(pairs, most))) {
      const int64_t origin = (c.lo + keys.lo) % w.k_len, ring = keys.hi - keys.lo, begin = plan.blocks.size();
      for (int64_t i = c.begin; i < c.end; ++i) {
        const Segment& s = w.segments[members[i].segment];
        bool reads = false;
        each_range_of_ring(w.offset(s.key_begin, origin), s.key_length, ring, w.k_len, [&](Range) { reads = true; });
        if (reads) append_query_blocks(plan.blocks, w, members[i].segment, shape.rows, shape.unit);
      }
      plan.add_piece(origin, ring, begin, plan.blocks.size());
    }
    if (plan.pieces.size() - first_piece >
        1) {  // its blocks that lie in one piece alone need no share, but cost little
      for (size_t i = plan.pieces[first_piece].begin; i < plan.blocks.size(); ++i) {
        plan.blocks[i].share = plan.share_rows;
        plan.share_rows += plan.blocks[i].queries.hi - plan.blocks[i].queries.lo;
      }
    }
  }
  if (all.empty()) plan.add_unread(0, w.k_len);
}

// The most that one thread gets, over the average, where each takes the next run as it becomes free.
double imbalance(const Plan& plan, const Attention& p) {
  struct Load {
    int64_t pairs;
    bool operator<(const Load& other) const { return pairs > other.pairs; }  // the least is the heap's first
  };
  std::vector<Load> loads(p.threads, Load{0});
  int64_t total = 0, most = 0;
  for (const Piece& piece : plan.pieces)
    for (int64_t i = 0; i < p.batch * p.heads; ++i) {
      std::pop_heap(loads.begin(), loads.end());
      loads.back().pairs += piece.pairs;
      most = std::max(most, loads.back().pairs);
      total += piece.pairs;
      std::push_heap(loads.begin(), loads.end());
    }
  return total ? static_cast<double>(most) * p.threads / total : 1.0;
}

constexpr double kEven = 1.08;   // an imbalance that is not worth smaller pieces
constexpr double kUneven = 1.1;  // one that is
constexpr int64_t kFinest = 16;  // pieces a thread, at most

// Of one direction, whatever others the call has: its results are those of a call of its own.
void cut(Plan& plan, const Attention& p, const Shape& shape) {
  if (plan.windows.step) {
    cut_equally(plan, p, shape);
    if (p.threads == 1 || imbalance(plan, p) <= kUneven) return;
  }
  int64_t pairs = 0;
  for (const Segment& s : plan.windows.segments) pairs += s.pairs() * p.batch * p.heads;
  for (int64_t grain = 1;; ++grain) {
    const double most = static_cast<double>(std::max<int64_t>(pairs, 1)) / (p.threads * grain);
    plan.clear();
    shape.exclusive ? cut_keys_of_all(plan, shape, most) : cut_queries(plan, shape, most);
    // Small ones last, to fill the gaps that large ones leave.
    std::stable_sort(plan.pieces.begin(), plan.pieces.end(),
                     [](const Piece& a, const Piece& b) { return a.pairs > b.pairs; });
    if (p.threads == 1 || grain == kFinest || imbalance(plan, p) <= kEven) return;
  }
}

template <class Kernel>
std::list<Plan> make_plans(const Attention& p) {
  const Shape shape{Kernel::kQueryRows, Kernel::kRowUnit, Kernel::bytes_per_key(p.dim), Kernel::kExclusive};
  std::list<Plan> plans;
  for (const Direction& d : p.directions) cut(plans.emplace_back(p, d), p, shape);
  return plans;
}

// Into how many ranges of queries the shares of a head are cut for their sum, so that no thread is without.
int64_t slices_of(const Plan& plan, const Attention& p) {
  const int64_t heads = p.batch * p.heads;
  return plan.share_rows ? (4 * p.threads + heads - 1) / heads : 1;
}

// A pair costs two products of `dim` numbers forward and five backward, a key as many packings, of which backward has
// two gradients written, and a query what is read and written of its row.
template <class Kernel>
void tell_work(const Attention& p, const Work& work) {
  const std::list<Plan> plans = make_plans<Kernel>(p);
  const double of_pair = (Kernel::kExclusive ? 5 : 2) * p.dim, of_row = (Kernel::kExclusive ? 4 : 2) * p.dim;
  for (const Plan& plan : plans)
    for (const Piece& piece : plan.pieces) {
      int64_t rows = 0;
      for (int64_t i = piece.begin; i < piece.end; ++i) rows += plan.blocks[i].queries.hi - plan.blocks[i].queries.lo;
      for (int64_t i = 0; i < p.batch * p.heads; ++i)
        work.dynamic("pieces", piece.pairs * of_pair, piece.ring * of_pair + rows * of_row);
    }
  for (const Plan& plan : plans) {
    if (!plan.share_rows) continue;
    const int64_t slices = slices_of(plan, p);
    for (int64_t i = 0; i < p.batch * p.heads * slices; ++i)
      work.fixed("sums of shares", 0, static_cast<double>(plan.share_rows * p.dim) / slices);
  }
}

// What no piece writes: of queries that read no key, of keys that no query reads.
template <class T, bool kBackward>
void fill_unread(const Plan& plan, const Attention& p, int64_t batch, int64_t head) {
  const Direction& d = *plan.direction;
  const auto zero = [&](const Strided& s, Range rows) {
    for (int64_t i = rows.lo; i < rows.hi; ++i) std::memset(row<T>(s, batch, i, head), 0, p.dim * sizeof(T));
  };
  for (const Range queries : plan.windows.unread_queries) {
    zero(kBackward ? d.d_q : d.out, queries);
    double* const lse = d.lse + (batch * p.heads + head) * d.q_len;
    if (!kBackward) std::fill(lse + queries.lo, lse + queries.hi, -std::numeric_limits<double>::infinity());
  }
  for (const Range keys : plan.unread_keys)
    if (kBackward) zero(d.d_k, keys), zero(d.d_v, keys);
}

// d_q of some queries of one head from its shares, in the order of the pieces.
template <class T>
void add_shares(const Plan& plan, const Attention& p, float* shares, int64_t batch, int64_t head, Range queries) {
  struct Owner {
    int64_t row;  // the share that the others are added to
  };
  std::vector<Owner> owners(queries.hi - queries.lo, Owner{-1});
  const auto add = [&](int64_t query, int64_t share) {
    int64_t& owner = owners[query - queries.lo].row;
    float* const to = shares + owner * p.dim;
    const float* const from = shares + share * p.dim;
    for (int64_t c = 0; owner >= 0 && c < p.dim; ++c) to[c] += from[c];
    if (owner < 0) owner = share;
  };
  for (const QueryBlock& block : plan.blocks)
    for (int64_t i = std::max(block.queries.lo, queries.lo);
         block.share >= 0 && i < std::min(block.queries.hi, queries.hi); ++i)
      add(i, block.share + i - block.queries.lo);
  for (int64_t i = queries.lo; i < queries.hi; ++i)
    if (const int64_t owner = owners[i - queries.lo].row; owner >= 0)
      store_row(row<T>(plan.direction->d_q, batch, i, head), shares + owner * p.dim, p.dim, 1.0f);
}

// Kernel(p, longest ring, scratch) takes its memory from scratch; kernel.run(run) computes one run.
template <class Kernel>
void run_all(const Attention& p) {
  using T = typename Kernel::Element;
  const std::list<Plan> plans = make_plans<Kernel>(p);
  const int64_t heads = p.batch * p.heads;
  std::vector<Run> runs;
  int64_t longest = 0, share_rows = 0;
  for (const Plan& plan : plans) share_rows += plan.share_rows * heads;
  const std::unique_ptr<Buffer> shares(share_rows ? new Buffer(share_rows * p.dim) : nullptr);
  float* shares_of_plan = shares ? shares->data() : nullptr;
  for (const Plan& plan : plans) {
    for (const Piece& piece : plan.pieces) {
      longest = std::max(longest, piece.ring);
      for (int64_t i = 0; i < heads; ++i) {
        runs.emplace_back(plan, piece, i / p.heads, i % p.heads);
        if (plan.share_rows) runs.back().shares = shares_of_plan + i * plan.share_rows * p.dim;
      }
    }
    if (plan.share_rows) shares_of_plan += heads * plan.share_rows * p.dim;
  }
  // Of many runs a thread takes neighbours, which lie side by side in memory: the heads of a segment, the next segment.
  const int64_t chunk = std::max<int64_t>(runs.size() / (64 * p.threads), 1);
  Scratch counter(nullptr);
  Kernel(p, longest, counter);
  const int64_t per_thread = round_up(counter.used(), 1024);
  const Buffer memory(per_thread * p.threads);
#pragma omp parallel num_threads(p.threads)
  {
    Scratch scratch(memory.data() + thread_number() * per_thread);
    const Kernel kernel(p, longest, scratch);
#pragma omp for schedule(dynamic, chunk)
    for (size_t i = 0; i < runs.size(); ++i) kernel.run(runs[i]);
  }
  shares_of_plan = shares ? shares->data() : nullptr;
  for (const Plan& plan : plans) {
    if (!plan.share_rows && plan.windows.unread_queries.empty() && plan.unread_keys.empty()) continue;
    const int64_t slices = slices_of(plan, p), q_len = plan.direction->q_len;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t j = 0; j < heads * slices; ++j) {
      const int64_t i = j / slices, slice = j % slices;
      if (slice == 0) fill_unread<T, Kernel::kExclusive>(plan, p, i / p.heads, i % p.heads);
      if (plan.share_rows)
        add_shares<T>(plan, p, shares_of_plan + i * plan.share_rows * p.dim, i / p.heads, i % p.heads,
                      {q_len * slice / slices, q_len * (slice + 1) / slices});
    }
    if (plan.share_rows) shares_of_plan += heads * plan.share_rows * p.dim;
  }
}

}  // namespace
}  // namespace mmattn::MMATTN_ISA
