// SPDX-License-Identifier: MIT
// The Python module mmattn_kernels._cpu. It knows no torch: tensors arrive as pointers, sizes and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "attention.h"
#include "conv.h"
#include "hash.h"
#include "norm.h"
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;
using namespace mmattn;

namespace {

using Matrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // pointer and strides, see Strided

struct InstructionSet {
  const char* name;
  void (*attention_forward)(const Attention&);
  void (*attention_backward)(const Attention&);
  void (*attention_work)(const Attention&, bool, const Work&);
  void (*group_norm_forward)(const GroupNorm&);
  void (*group_norm_backward)(const GroupNorm&);
  void (*group_norm_work)(const GroupNorm&, bool, const Work&);
  void (*parameter_gradients)(const ParameterGradients&);
  void (*sum)(const Sum&);
  int64_t (*conv_packed_bytes)(int64_t, int64_t, int64_t, bool);
  void (*conv_pack)(const ConvWeights&, void*);
  void (*conv_forward)(const Conv&);
  void (*conv_weight_gradient)(const Conv&);
  void (*column_sums)(const Tokens&, int64_t, int64_t, int64_t, bool, float*, int);
  void (*conv_work)(const Conv&, ConvLoop, const Work&);
  ContentHash (*content_hash)(const void*, int64_t, const HashKey&, int);
};

#if defined(MMATTN_HAS_AMX)
bool have_amx() {
#if defined(__linux__)
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool cpu = (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
  // The kernel hands out the tile registers on request: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
  return cpu && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

#define MMATTN_SET(isa)                                                                                             \
  InstructionSet {                                                                                                  \
    #isa, isa::attention_forward, isa::attention_backward, isa::attention_work, isa::group_norm_forward,            \
        isa::group_norm_backward, isa::group_norm_work, isa::parameter_gradients, isa::sum, isa::conv_packed_bytes, \
        isa::conv_pack, isa::conv_forward, isa::conv_weight_gradient, isa::column_sums, isa::conv_work,             \
        isa::content_hash                                                                                           \
  }

// What this CPU runs, slowest first.
std::vector<InstructionSet> detect() {
  std::vector<InstructionSet> sets{MMATTN_SET(portable)};
#if defined(MMATTN_HAS_AVX2)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return sets;
  sets.push_back(MMATTN_SET(avx2));
#endif
#if defined(MMATTN_HAS_AVX512)
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return sets;
  sets.push_back(MMATTN_SET(avx512));
#endif
#if defined(MMATTN_HAS_AVX512_BF16)
  if (!__builtin_cpu_supports("avx512bf16")) return sets;
  sets.push_back(MMATTN_SET(avx512_bf16));
#endif
#if defined(MMATTN_HAS_AMX)
  if (have_amx()) sets.push_back(MMATTN_SET(amx));
#endif
  return sets;
}

const std::vector<InstructionSet>& sets() {
  static const std::vector<InstructionSet> found = detect();
  return found;
}

InstructionSet& active() {
  static InstructionSet set = sets().back();
  return set;
}

void use_instruction_set(const std::string& name) {
  std::string known;
  for (const InstructionSet& set : sets()) {
    if (name == set.name) {
      active() = set;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(set.name);
  }
  throw py::value_error("instruction set is '" + name + "'; this CPU and build run " + known);
}

// Of `most` threads those that pay: what one is given takes at least as long as to wake it and to wait for it.
int threads_for(double operations, int most) {
  constexpr double kLeast = 1e6;  // some 10 us
  return static_cast<int>(std::clamp<double>(operations / kLeast, 1, most));
}

Strided strided(const Matrix& m) {
  return {reinterpret_cast<void*>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m)};
}

// Each direction: (q, k, v, out[, d_out, d_q, d_k, d_v]), pointers to lse and d_lse, q_len, k_len.
using DirectionArgs = std::tuple<std::vector<Matrix>, uintptr_t, uintptr_t, int64_t, int64_t>;

// Of equal windows: segments, window, shift. Of others: pointers to query_bounds, key_begin and key_length, segments.
using EqualArgs = std::tuple<int64_t, int64_t, int64_t>;
using TableArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>;
using WindowArgs = std::variant<EqualArgs, TableArgs>;

// A call's arguments, and the values of its tables: whoever writes to the memory meanwhile changes nothing.
struct AttentionCall {
  Attention p{};
  std::vector<int32_t> bounds, begins, lengths;

  AttentionCall(const std::vector<DirectionArgs>& directions, const WindowArgs& windows, int64_t batch, int64_t heads,
                int64_t dim, float scale, bool is_bf16, int threads) {
    p.batch = batch;
    p.heads = heads;
    p.dim = dim;
    p.scale = scale;
    p.is_bf16 = is_bf16;
    p.threads = threads;
    for (const auto& [matrices, lse, d_lse, q_len, k_len] : directions) {
      Direction& d = p.directions.emplace_back();
      Strided* const fields[] = {&d.q, &d.k, &d.v, &d.out, &d.d_out, &d.d_q, &d.d_k, &d.d_v};
      for (size_t j = 0; j < matrices.size(); ++j) *fields[j] = strided(matrices[j]);
      d.lse = reinterpret_cast<double*>(lse);
      d.d_lse = reinterpret_cast<const double*>(d_lse);
      d.q_len = q_len;
      d.k_len = k_len;
    }
    if (const auto* tables = std::get_if<TableArgs>(&windows))
      read(*tables);
    else
      std::tie(p.frames, p.window, p.shift) = std::get<EqualArgs>(windows);
  }
  AttentionCall(const AttentionCall&) = delete;
  AttentionCall& operator=(const AttentionCall&) = delete;

 private:
  void read(const TableArgs& tables) {
    const auto [query_bounds, key_begin, key_length, segments] = tables;
    const auto copy = [](uintptr_t from, int64_t count) {
      const auto* values = reinterpret_cast<const int32_t*>(from);
      return std::vector<int32_t>(values, values + count);
    };
    bounds = copy(query_bounds, segments + 1);
    begins = copy(key_begin, segments);
    lengths = copy(key_length, segments);
    for (const Direction& d : p.directions) {
      for (int64_t i = 0; i <= segments; ++i) {
        const int64_t least = i ? bounds[i - 1] : 0, most = i ? d.q_len : 0;
        refuse("query_bounds", i, bounds[i], i == segments ? d.q_len : least, most);
      }
      for (int64_t i = 0; i < segments; ++i) refuse("key_length", i, lengths[i], 0, d.k_len);
    }
    p.tables = {bounds.data(), begins.data(), lengths.data(), segments};
  }

  static void refuse(const char* name, int64_t at, int64_t value, int64_t least, int64_t most) {
    if (least <= value && value <= most) return;
    throw py::value_error(std::string(name) + "[" + std::to_string(at) + "] is " + std::to_string(value) +
                          "; expected " + std::to_string(least) + ".." + std::to_string(most));
  }
};

template <void (*InstructionSet::*kKernel)(const Attention&)>
void run(const std::vector<DirectionArgs>& directions, const WindowArgs& windows, int64_t batch, int64_t heads,
         int64_t dim, float scale, bool is_bf16, int threads) {
  const AttentionCall call(directions, windows, batch, heads, dim, scale, is_bf16, threads);
  const auto kernel = active().*kKernel;
  py::gil_scoped_release release;
  kernel(call.p);
}

// The pieces of the loops of a call: see work.h.
struct Told {
  int threads;  // of the call, at most as many as it was given
  std::vector<std::tuple<std::string, bool, double, double>> pieces;

  Work work() {
    return {this, [](void* to, const char* loop, bool is_static, double products, double numbers) {
              static_cast<Told*>(to)->pieces.emplace_back(loop, is_static, products, numbers);
            }};
  }
  py::tuple result() const { return py::make_tuple(threads, pieces); }
};

py::tuple attention_work(bool backward, const std::vector<DirectionArgs>& directions, const WindowArgs& windows,
                         int64_t batch, int64_t heads, int64_t dim, bool is_bf16, int threads) {
  const AttentionCall call(directions, windows, batch, heads, dim, 1.0f, is_bf16, threads);
  Told told{threads, {}};
  active().attention_work(call.p, backward, told.work());
  return told.result();
}

using TokensArgs = std::tuple<uintptr_t, int64_t, int64_t>;  // pointer and strides, see Tokens

using ParameterArgs = std::tuple<uintptr_t, int64_t, bool>;  // pointer, batch stride, whether bf16

// Weight, bias, scale and shift, stats, groups, eps, silu: see Norm.
using NormArgs = std::tuple<std::array<ParameterArgs, 4>, uintptr_t, int64_t, float, bool>;

Tokens tokens(const TokensArgs& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

using RowsArgs = std::pair<uintptr_t, std::array<int64_t, 4>>;  // pointer and strides, see Rows

Rows rows(const RowsArgs& args) {
  return {reinterpret_cast<void*>(args.first), args.second};
}

float* floats(uintptr_t p) {
  return reinterpret_cast<float*>(p);
}

Parameter parameter(const ParameterArgs& args) {
  return {reinterpret_cast<void*>(std::get<0>(args)), std::get<1>(args), std::get<2>(args)};
}

Norm norm(const NormArgs& args) {
  const auto& [p, stats, groups, eps, silu] = args;
  return {parameter(p[0]), parameter(p[1]), parameter(p[2]), parameter(p[3]), floats(stats), groups, eps, silu};
}

GroupNorm group_norm(const TokensArgs& x, const NormArgs& args, int64_t batch, int64_t length, int64_t channels,
                     bool is_bf16, int threads) {
  GroupNorm p{};
  p.x = tokens(x);
  p.norm = norm(args);
  p.batch = batch;
  p.length = length;
  p.channels = channels;
  p.is_bf16 = is_bf16;
  p.threads = threads_for(32.0 * static_cast<double>(batch * length * channels), threads);
  return p;
}

GroupNorm group_norm_call(const TokensArgs& x, const TokensArgs& out, const NormArgs& args, int64_t batch,
                          int64_t length, int64_t channels, bool is_bf16, int threads) {
  GroupNorm p = group_norm(x, args, batch, length, channels, is_bf16, threads);
  p.out = tokens(out);
  return p;
}

void group_norm_forward(const TokensArgs& x, const TokensArgs& out, const NormArgs& args, int64_t batch, int64_t length,
                        int64_t channels, bool is_bf16, int threads) {
  const GroupNorm p = group_norm_call(x, out, args, batch, length, channels, is_bf16, threads);
  py::gil_scoped_release release;
  active().group_norm_forward(p);
}

GroupNorm group_norm_gradient(const TokensArgs& x, const TokensArgs& d_out, const TokensArgs& d_x, const NormArgs& args,
                              uintptr_t sums, int64_t batch, int64_t length, int64_t channels, bool is_bf16,
                              int threads) {
  GroupNorm p = group_norm(x, args, batch, length, channels, is_bf16, threads);
  p.d_out = tokens(d_out);
  p.d_x = tokens(d_x);
  p.sums = floats(sums);
  return p;
}

void group_norm_backward(const TokensArgs& x, const TokensArgs& d_out, const TokensArgs& d_x, const NormArgs& args,
                         uintptr_t sums, int64_t batch, int64_t length, int64_t channels, bool is_bf16, int threads) {
  const GroupNorm p = group_norm_gradient(x, d_out, d_x, args, sums, batch, length, channels, is_bf16, threads);
  py::gil_scoped_release release;
  active().group_norm_backward(p);
}

py::tuple group_norm_work(bool backward, int64_t groups, int64_t batch, int64_t length, int64_t channels, bool is_bf16,
                          int threads) {
  NormArgs args{};
  std::get<2>(args) = groups;
  const GroupNorm p = group_norm({}, args, batch, length, channels, is_bf16, threads);
  Told told{p.threads, {}};
  active().group_norm_work(p, backward, told.work());
  return told.result();
}

// Pointer, whether bf16, strides of (out channel, in channel, tap), numbers of them.
using WeightArgs = std::tuple<uintptr_t, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

int64_t conv_packed_bytes(int64_t out_channels, int64_t in_channels, int64_t taps, bool is_bf16) {
  return active().conv_packed_bytes(out_channels, in_channels, taps, is_bf16);
}

ConvWeights weights(const WeightArgs& args, bool is_bf16, int threads) {
  const auto& [weight, weight_is_bf16, out_stride, in_stride, tap_stride, out_channels, in_channels, taps] = args;
  ConvWeights w{};
  w.weight = reinterpret_cast<void*>(weight);
  w.weight_is_bf16 = weight_is_bf16;
  w.out_stride = out_stride;
  w.in_stride = in_stride;
  w.tap_stride = tap_stride;
  w.out_channels = out_channels;
  w.in_channels = in_channels;
  w.taps = taps;
  w.is_bf16 = is_bf16;
  w.threads = threads_for(32.0 * static_cast<double>(out_channels * in_channels * taps), threads);
  return w;
}

void conv_pack(const WeightArgs& args, bool is_bf16, uintptr_t packed, int threads) {
  const ConvWeights w = weights(args, is_bf16, threads);
  py::gil_scoped_release release;
  active().conv_pack(w, reinterpret_cast<void*>(packed));
}

// Batch, length, in channels, out channels, taps, dilation, height, width, bf16, threads.
using ConvSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, int>;

Conv conv(const TokensArgs& x, const TokensArgs& out, const NormArgs& args, const ConvSizes& sizes) {
  const auto& [batch, length, in_channels, out_channels, taps, dilation, height, width, is_bf16, threads] = sizes;
  Conv p{};
  p.x = tokens(x);
  p.out = tokens(out);
  p.norm = norm(args);
  p.batch = batch;
  p.length = length;
  p.in_channels = in_channels;
  p.out_channels = out_channels;
  p.taps = taps;
  p.dilation = std::min(dilation, length);  // taps farther than that read zeros, however far
  p.height = height;
  p.width = width;
  p.is_bf16 = is_bf16;
  p.threads = threads_for(2.0 * static_cast<double>(batch * length * in_channels * out_channels * taps), threads);
  return p;
}

// Of one tap without a norm and FiLM, sequences that follow one another are a single one: short ones share its blocks.
void join_sequences(Conv& p) {
  const Norm& norm = p.norm;
  if (p.taps != 1 || norm.groups || norm.scale.data || norm.shift.data) return;
  for (const Tokens& t : {p.x, p.out, p.residual})
    if (t.data && t.batch != t.position * p.length) return;
  p.length *= p.batch;
  p.batch = 1;
}

Conv conv_call(const TokensArgs& x, const TokensArgs& out, const TokensArgs& residual, uintptr_t packed,
               const ParameterArgs& bias, const NormArgs& args, const ConvSizes& sizes) {
  Conv p = conv(x, out, args, sizes);
  p.residual = tokens(residual);
  p.packed = reinterpret_cast<void*>(packed);
  p.bias = parameter(bias);
  join_sequences(p);
  return p;
}

void conv_forward(const TokensArgs& x, const TokensArgs& out, const TokensArgs& residual, uintptr_t packed,
                  const ParameterArgs& bias, const NormArgs& args, const ConvSizes& sizes) {
  const Conv p = conv_call(x, out, residual, packed, bias, args, sizes);
  py::gil_scoped_release release;
  active().conv_forward(p);
}

// Of the gradients those with a place: of x, with the sums of a prologue if it has one; of the weight; of the bias.
struct ConvGradients {
  Conv of_x{}, of_weight{};
  GroupNorm of_prologue{};
  float* of_bias;

  ConvGradients(const TokensArgs& x, const TokensArgs& d_out, const TokensArgs& d_x, uintptr_t sums,
                const WeightArgs& weight, uintptr_t d_weight, uintptr_t d_bias, const NormArgs& args,
                const ConvSizes& sizes)
      : of_weight(conv(x, d_out, args, sizes)), of_bias(floats(d_bias)) {
    const auto& [pointer, weight_is_bf16, out_stride, in_stride, tap_stride, out_channels, in_channels, taps] = weight;
    const auto& [batch, length, all_in, all_out, all_taps, dilation, height, width, is_bf16, threads] = sizes;
    of_weight.d_weight = reinterpret_cast<void*>(d_weight);
    of_weight.d_weight_is_bf16 = weight_is_bf16;
    of_x = conv(d_out, d_x, NormArgs{},
                {batch, length, out_channels, in_channels, taps, dilation, height, width, is_bf16, threads});
    if (of_x.out.data) {
      // The gradient of y is the convolution with channels swapped and taps in reverse.
      const uintptr_t last_tap = pointer + (taps - 1) * tap_stride * (weight_is_bf16 ? 2 : 4);
      const WeightArgs reverse{last_tap,    weight_is_bf16, in_stride,    out_stride,
                               -tap_stride, in_channels,    out_channels, taps};
      of_x.weights = weights(reverse, is_bf16, of_x.threads);
    }
    join_sequences(of_x);
    join_sequences(of_weight);
    if (sums) of_prologue = group_norm_gradient(x, d_x, d_x, args, sums, batch, length, in_channels, is_bf16, threads);
  }

  void run() const {
    if (of_x.out.data) active().conv_forward(of_x);
    if (of_prologue.sums) active().group_norm_backward(of_prologue);
    if (of_weight.d_weight) active().conv_weight_gradient(of_weight);
    const Conv& p = of_weight;
    if (of_bias) active().column_sums(p.out, p.batch, p.length, p.out_channels, p.is_bf16, of_bias, of_x.threads);
  }
};

void conv_backward(const TokensArgs& x, const TokensArgs& d_out, const TokensArgs& d_x, uintptr_t sums,
                   const WeightArgs& weight, uintptr_t d_weight, uintptr_t d_bias, const NormArgs& args,
                   const ConvSizes& sizes) {
  const ConvGradients p(x, d_out, d_x, sums, weight, d_weight, d_bias, args, sizes);
  py::gil_scoped_release release;
  p.run();
}

// Of the forward call with a packed weight; of the gradient of y, whose weight is not; of the weight's and the bias's.
py::tuple conv_work(const std::string& what, int64_t groups, const ConvSizes& sizes) {
  const auto& [batch, length, in_channels, out_channels, taps, dilation, height, width, is_bf16, threads] = sizes;
  NormArgs args{};
  std::get<2>(args) = groups;
  Conv p = conv({}, {}, args, sizes);
  ConvLoop loop = ConvLoop::forward;
  if (what == "forward")
    p.packed = &p;
  else if (what == "d_x")
    p = conv({}, {}, {}, {batch, length, out_channels, in_channels, taps, dilation, height, width, is_bf16, threads});
  else if (what == "d_weight")
    loop = ConvLoop::weight_gradient;
  else if (what == "d_bias")
    loop = ConvLoop::column_sums;
  else
    throw py::value_error("what is '" + what + "'; expected forward, d_x, d_weight or d_bias");
  p.out.data = &p;  // not the memory of x
  join_sequences(p);
  Told told{p.threads, {}};
  active().conv_work(p, loop, told.work());
  return told.result();
}

// Of a norm's weight and bias, scale and shift to d_weight, d_bias, d_scale and d_shift: see ParameterGradients.
ParameterGradients parameter_gradients_call(const std::array<ParameterArgs, 4>& of, uintptr_t sums,
                                            const std::array<uintptr_t, 4>& to, int64_t batch, int64_t channels,
                                            int64_t film_batch) {
  const Norm given{parameter(of[0]), parameter(of[1]), parameter(of[2]), parameter(of[3]), nullptr, 0, 0.0f, false};
  const auto place = [&](int i) { return reinterpret_cast<void*>(to[i]); };
  return {given, floats(sums), place(0), place(1), place(2), place(3), batch, channels, film_batch};
}

void parameter_gradients(const std::array<ParameterArgs, 4>& of, uintptr_t sums, const std::array<uintptr_t, 4>& to,
                         int64_t batch, int64_t channels) {
  active().parameter_gradients(parameter_gradients_call(of, sums, to, batch, channels, channels));
}

// Drawn once in each process, so that no content is unlucky twice.
const HashKey& hash_key() {
  static const HashKey key = [] {
    std::random_device device;
    const auto word = [&] { return static_cast<uint64_t>(device()) << 32 | device(); };
    HashKey drawn;
    for (uint64_t& part : drawn.block) part = word();
    for (uint64_t& point : drawn.chain) point = word() >> 4;
    return drawn;
  }();
  return key;
}

std::pair<uint64_t, uint64_t> content_hash(uintptr_t pointer, int64_t bytes, int threads) {
  const HashKey& key = hash_key();
  py::gil_scoped_release release;
  const ContentHash hash = active().content_hash(reinterpret_cast<const void*>(pointer), bytes, key, threads);
  return {hash.words[0], hash.words[1]};
}

// The same of many ranges of memory, each by one thread.
std::vector<std::pair<uint64_t, uint64_t>> content_hashes(const std::vector<std::pair<uintptr_t, int64_t>>& ranges,
                                                          int threads) {
  const HashKey& key = hash_key();
  const auto kernel = active().content_hash;
  const auto count = static_cast<int64_t>(ranges.size());
  std::vector<std::pair<uint64_t, uint64_t>> found(ranges.size());
  py::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) {
    const ContentHash hash = kernel(reinterpret_cast<const void*>(ranges[i].first), ranges[i].second, key, 1);
    found[i] = {hash.words[0], hash.words[1]};
  }
  return found;
}

// Every pointer of a call, in one order.
template <typename F>
void each_pointer(Norm& norm, const F& f) {
  for (Parameter* p : {&norm.weight, &norm.bias, &norm.scale, &norm.shift}) f(p->data);
  f(norm.stats);
}

template <typename F>
void each_pointer(Conv& p, const F& f) {
  for (Tokens* t : {&p.x, &p.out, &p.residual}) f(t->data);
  f(p.packed);
  f(p.weights.weight);
  f(p.bias.data);
  f(p.d_weight);
  each_pointer(p.norm, f);
}

template <typename F>
void each_pointer(GroupNorm& p, const F& f) {
  for (Tokens* t : {&p.x, &p.out, &p.d_out, &p.d_x}) f(t->data);
  f(p.sums);
  each_pointer(p.norm, f);
}

template <typename F>
void each_pointer(Attention& p, const F& f) {
  for (Direction& d : p.directions) {
    for (Strided* s : {&d.q, &d.k, &d.v, &d.out, &d.d_out, &d.d_q, &d.d_k, &d.d_v}) f(s->data);
    f(d.lse);
    f(d.d_lse);
  }
}

template <typename F>
void each_pointer(ConvGradients& p, const F& f) {
  each_pointer(p.of_x, f);
  each_pointer(p.of_weight, f);
  each_pointer(p.of_prologue, f);
  f(p.of_bias);
}

template <typename F>
void each_pointer(ParameterGradients& p, const F& f) {
  each_pointer(p.norm, f);
  f(p.sums);
  for (void** to : {&p.d_weight, &p.d_bias, &p.d_scale, &p.d_shift}) f(*to);
}

template <typename F>
void each_pointer(Sum& p, const F& f) {
  f(p.to.data);
  for (Rows& term : p.terms) f(term.data);
}

template <typename T>
struct Backward {
  T call;
};

template <typename T, typename F>
void each_pointer(Backward<T>& p, const F& f) {
  each_pointer(p.call, f);
}

void run_call(const Conv& p) {
  active().conv_forward(p);
}

void run_call(const GroupNorm& p) {
  active().group_norm_forward(p);
}

void run_call(const Attention& p) {
  active().attention_forward(p);
}

void run_call(const ConvGradients& p) {
  p.run();
}

void run_call(const Backward<GroupNorm>& p) {
  active().group_norm_backward(p.call);
}

void run_call(const Backward<Attention>& p) {
  active().attention_backward(p.call);
}

void run_call(const ParameterGradients& p) {
  active().parameter_gradients(p);
}

void run_call(const Sum& p) {
  active().sum(p);
}

// Calls of kernels in their order, with offsets within blocks of memory instead of pointers, so that the same
// calls run on other blocks: see mmattn_kernels/cpu/plan.py.
class Plan {
 public:
  // Where the memory of the calls lies as they are added: begin, bytes, block, offset within that.
  using Range = std::tuple<uintptr_t, int64_t, int, int64_t>;

  explicit Plan(std::vector<Range> ranges) : ranges_(std::move(ranges)) {}

  void conv_forward(const TokensArgs& x, const TokensArgs& out, const TokensArgs& residual, uintptr_t packed,
                    const ParameterArgs& bias, const NormArgs& args, const ConvSizes& sizes) {
    add(conv_call(x, out, residual, packed, bias, args, sizes));
  }

  void group_norm_forward(const TokensArgs& x, const TokensArgs& out, const NormArgs& args, int64_t batch,
                          int64_t length, int64_t channels, bool is_bf16, int threads) {
    add(group_norm_call(x, out, args, batch, length, channels, is_bf16, threads));
  }

  void attention_forward(const std::vector<DirectionArgs>& directions, const EqualArgs& windows, int64_t batch,
                         int64_t heads, int64_t dim, float scale, bool is_bf16, int threads) {
    add(AttentionCall(directions, windows, batch, heads, dim, scale, is_bf16, threads).p);
  }

  void conv_backward(const TokensArgs& x, const TokensArgs& d_out, const TokensArgs& d_x, uintptr_t sums,
                     const WeightArgs& weight, uintptr_t d_weight, uintptr_t d_bias, const NormArgs& args,
                     const ConvSizes& sizes) {
    add(ConvGradients(x, d_out, d_x, sums, weight, d_weight, d_bias, args, sizes));
  }

  void group_norm_backward(const TokensArgs& x, const TokensArgs& d_out, const TokensArgs& d_x, const NormArgs& args,
                           uintptr_t sums, int64_t batch, int64_t length, int64_t channels, bool is_bf16, int threads) {
    const GroupNorm p = group_norm_gradient(x, d_out, d_x, args, sums, batch, length, channels, is_bf16, threads);
    add(Backward<GroupNorm>{p});
  }

  void attention_backward(const std::vector<DirectionArgs>& directions, const EqualArgs& windows, int64_t batch,
                          int64_t heads, int64_t dim, float scale, bool is_bf16, int threads) {
    add(Backward<Attention>{AttentionCall(directions, windows, batch, heads, dim, scale, is_bf16, threads).p});
  }

  void parameter_gradients(const std::array<ParameterArgs, 4>& of, uintptr_t sums, const std::array<uintptr_t, 4>& to,
                           int64_t batch, int64_t channels, int64_t film_batch) {
    add(parameter_gradients_call(of, sums, to, batch, channels, film_batch));
  }

  // Pointers and strides of what is written and of each term; sizes of their dimensions: see Sum.
  void sum(const RowsArgs& to, const std::vector<RowsArgs>& terms, const std::array<int64_t, 5>& sizes, float scale,
           bool is_bf16, int threads) {
    if (terms.size() > Sum::kMost)
      throw py::value_error("a sum has more than " + std::to_string(Sum::kMost) + " terms");
    Sum p{};
    p.to = rows(to);
    std::transform(terms.begin(), terms.end(), p.terms.begin(), rows);
    std::copy(sizes.begin(), sizes.end() - 1, p.sizes.begin());
    p.channels = sizes.back();
    p.scale = scale;
    p.is_bf16 = is_bf16;
    const double elements = std::accumulate(sizes.begin(), sizes.end(), 1.0, std::multiplies<>());
    p.threads = threads_for(16 * elements, threads);
    add(p);
  }

  // The blocks that the calls read or write.
  std::set<int> blocks() const {
    std::set<int> found;
    for (const auto& [call, places] : calls_)
      for (const auto& [block, offset] : places)
        if (block >= 0) found.insert(block);
    return found;
  }

  // `shifts`: of the random-shift attentions in their order, in the place of those they were added with; or none.
  void run(const std::vector<uintptr_t>& blocks, const std::vector<int64_t>& shifts) const {
    check(shifts);
    if (blocks.size() < num_blocks_)
      throw py::value_error(std::to_string(blocks.size()) + " blocks; expected " + std::to_string(num_blocks_));
    py::gil_scoped_release release;
    auto shift = shifts.begin();
    for (const auto& [call, places] : calls_)
      std::visit(
          [&, place = places.begin()](auto p) mutable {
            each_pointer(p, [&](auto*& pointer) {
              const auto [block, offset] = *place++;
              pointer = block < 0 ? nullptr : reinterpret_cast<std::decay_t<decltype(pointer)>>(blocks[block] + offset);
            });
            if (Attention* attention = shifted(p); attention && shift != shifts.end()) attention->shift = *shift++;
            run_call(p);
          },
          call);
  }

 private:
  using Call = std::variant<Conv, GroupNorm, Attention, ConvGradients, Backward<GroupNorm>, Backward<Attention>,
                            ParameterGradients, Sum>;
  using Place = std::pair<int, int64_t>;  // block, offset; a block below 0 is no memory

  // The random-shift attention of a call, or of the gradient of one; null of another call.
  template <typename T>
  static Attention* shifted(T& call) {
    Attention* p = nullptr;
    if constexpr (std::is_same_v<T, Attention>) p = &call;
    if constexpr (std::is_same_v<T, Backward<Attention>>) p = &call.call;
    return p && p->directions.size() == 2 ? p : nullptr;
  }

  void check(const std::vector<int64_t>& shifts) const {
    if (shifts.empty()) return;
    if (shifts.size() != largest_shifts_.size())
      throw py::value_error(std::to_string(shifts.size()) + " shifts; expected " +
                            std::to_string(largest_shifts_.size()));
    for (size_t i = 0; i < shifts.size(); ++i)
      if (shifts[i] < 0 || shifts[i] > largest_shifts_[i])
        throw py::value_error("shift is " + std::to_string(shifts[i]) + "; expected 0.." +
                              std::to_string(largest_shifts_[i]));
  }

  template <typename T>
  void add(T p) {
    if (const Attention* attention = shifted(p)) largest_shifts_.push_back(attention->frames - attention->window);
    std::vector<Place> places;
    each_pointer(p, [&](auto* pointer) { places.push_back(find(reinterpret_cast<uintptr_t>(pointer))); });
    calls_.emplace_back(std::move(p), std::move(places));
  }

  Place find(uintptr_t pointer) {
    if (!pointer) return {-1, 0};
    for (const auto& [begin, bytes, block, offset] : ranges_)
      if (begin <= pointer && pointer < begin + bytes) {
        num_blocks_ = std::max(num_blocks_, static_cast<size_t>(block) + 1);
        return {block, offset + static_cast<int64_t>(pointer - begin)};
      }
    throw py::value_error("a call reads or writes memory that is in none of the ranges");
  }

  std::vector<Range> ranges_;
  size_t num_blocks_ = 0;                // that the calls read or write: those below
  std::vector<int64_t> largest_shifts_;  // of the random-shift attentions, in their order
  std::vector<std::pair<Call, std::vector<Place>>> calls_;
};

// How modules of torch, and all that lie in them, were found: their classes, the attributes that are plain values, the
// names of their parameters and modules, and how much there is in each other dictionary. Nothing of it keeps a module
// or a parameter alive.
class Modules {
 public:
  explicit Modules(const std::vector<py::object>& roots) {
    for (const py::object& root : roots) roots_.push_back(node(root, 0));
  }

  // The parameters of modules in their order, and the modules that have them, if all are as those were found.
  py::object parameters(const std::vector<py::object>& roots) const {
    py::list parameters, owners;
    if (roots.size() != roots_.size()) return py::none();
    for (size_t i = 0; i < roots.size(); ++i)
      if (!is_same(roots_[i], roots[i], parameters, owners)) return py::none();
    return py::make_tuple(parameters, owners);
  }

 private:
  enum class Kind { value, other, parameters, modules, dictionary };
  struct Node;
  struct Attribute {
    Kind kind;
    py::object name, value;
    std::vector<std::pair<py::object, bool>> parameters;  // name, and whether there is one
    std::vector<std::pair<py::object, Node>> modules;     // without a class where there is none
    Py_ssize_t size;                                      // of a dictionary
  };
  struct Node {
    py::object kind;
    std::vector<Attribute> attributes;
  };

  static py::object kind_of(py::handle module) {
    return py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())));
  }
  static py::dict attributes_of(py::handle module) {
    PyObject* found = PyObject_GenericGetDict(module.ptr(), nullptr);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::dict>(found);
  }
  static bool is_called(py::handle name, const char* text) {
    return PyUnicode_Check(name.ptr()) && PyUnicode_CompareWithASCIIString(name.ptr(), text) == 0;
  }
  static bool is_value(py::handle x) {
    if (PyTuple_CheckExact(x.ptr())) {
      for (py::handle item : py::reinterpret_borrow<py::tuple>(x))
        if (!is_value(item)) return false;
      return true;
    }
    return x.is_none() || PyBool_Check(x.ptr()) || PyLong_CheckExact(x.ptr()) || PyFloat_CheckExact(x.ptr()) ||
           PyUnicode_CheckExact(x.ptr());
  }

  static Node node(py::handle module, int depth) {
    constexpr int kDeepest = 100;
    if (depth > kDeepest) throw py::value_error("modules lie more than 100 deep in one another");
    Node found{kind_of(module), {}};
    for (const auto& [name, value] : attributes_of(module)) {
      Attribute attribute{Kind::other, py::reinterpret_borrow<py::object>(name), {}, {}, {}, 0};
      if (is_value(value)) {
        attribute.kind = Kind::value;
        attribute.value = py::reinterpret_borrow<py::object>(value);
      } else if (PyDict_Check(value.ptr())) {
        const auto entries = py::reinterpret_borrow<py::dict>(value);
        attribute.kind = is_called(name, "_parameters") ? Kind::parameters
                         : is_called(name, "_modules")  ? Kind::modules
                                                        : Kind::dictionary;
        attribute.size = PyDict_Size(value.ptr());
        for (const auto& [key, entry] : entries) {
          auto own_key = py::reinterpret_borrow<py::object>(key);
          if (attribute.kind == Kind::parameters) attribute.parameters.emplace_back(own_key, !entry.is_none());
          if (attribute.kind == Kind::modules)
            attribute.modules.emplace_back(own_key, entry.is_none() ? Node{} : node(entry, depth + 1));
        }
      }
      found.attributes.push_back(std::move(attribute));
    }
    return found;
  }

  static bool is_same(const Node& then, py::handle module, py::list& parameters, py::list& owners) {
    if (!then.kind || module.is_none()) return !then.kind && module.is_none();
    if (reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())) != then.kind.ptr()) return false;
    const py::dict now = attributes_of(module);
    if (static_cast<size_t>(PyDict_Size(now.ptr())) != then.attributes.size()) return false;
    auto attribute = then.attributes.begin();
    for (const auto& [name, value] : now) {
      if (name.ptr() != attribute->name.ptr() || !is_same(*attribute, value, module, parameters, owners)) return false;
      ++attribute;
    }
    return true;
  }

  static bool is_same(const Attribute& then, py::handle value, py::handle module, py::list& parameters,
                      py::list& owners) {
    if (then.kind == Kind::value) return value.ptr() == then.value.ptr();
    if (then.kind == Kind::other) return !is_value(value) && !PyDict_Check(value.ptr());
    if (!PyDict_Check(value.ptr()) || PyDict_Size(value.ptr()) != then.size) return false;
    size_t at = 0;
    if (then.kind == Kind::parameters) {
      for (const auto& [name, parameter] : py::reinterpret_borrow<py::dict>(value)) {
        const auto& [then_name, is_there] = then.parameters[at++];
        if (name.ptr() != then_name.ptr() || parameter.is_none() == is_there) return false;
        if (is_there) parameters.append(parameter);
      }
      if (at) owners.append(module);
    } else if (then.kind == Kind::modules) {
      for (const auto& [name, inner] : py::reinterpret_borrow<py::dict>(value)) {
        const auto& [then_name, then_inner] = then.modules[at++];
        if (name.ptr() != then_name.ptr() || !is_same(then_inner, inner, parameters, owners)) return false;
      }
    }
    return true;
  }

  std::vector<Node> roots_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of mmattn; see mmattn_kernels/cpu.";
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const InstructionSet& set : sets()) names.push_back(set.name);
    return names;
  });
  m.def("instruction_set", [] { return std::string(active().name); });
  m.def("use_instruction_set", &use_instruction_set);
  m.def("attention_forward", &run<&InstructionSet::attention_forward>);
  m.def("attention_backward", &run<&InstructionSet::attention_backward>);
  m.def("attention_work", &attention_work);
  m.def("group_norm_forward", &group_norm_forward);
  m.def("group_norm_backward", &group_norm_backward);
  m.def("group_norm_work", &group_norm_work);
  m.def("conv_packed_bytes", &conv_packed_bytes);
  m.def("conv_pack", &conv_pack);
  m.def("conv_forward", &conv_forward);
  m.def("conv_backward", &conv_backward);
  m.def("conv_work", &conv_work);
  m.def("parameter_gradients", &parameter_gradients);
  m.def("content_hash", &content_hash);
  m.def("content_hashes", &content_hashes);
  py::class_<Modules>(m, "Modules").def(py::init<std::vector<py::object>>()).def("parameters", &Modules::parameters);
  py::class_<Plan>(m, "Plan")
      .def(py::init<std::vector<Plan::Range>>())
      .def("conv_forward", &Plan::conv_forward)
      .def("group_norm_forward", &Plan::group_norm_forward)
      .def("attention_forward", &Plan::attention_forward)
      .def("conv_backward", &Plan::conv_backward)
      .def("group_norm_backward", &Plan::group_norm_backward)
      .def("attention_backward", &Plan::attention_backward)
      .def("parameter_gradients", &Plan::parameter_gradients)
      .def("sum", &Plan::sum)
      .def("blocks", &Plan::blocks)
      .def("run", &Plan::run, py::arg("blocks"), py::arg("shifts") = std::vector<int64_t>{});
}
