// SPDX-License-Identifier: MIT
// Group normalisation with FiLM and SiLU, forward and backward, over [batch, position, channel]:
//   y = activate((h * weight + bias) * (1 + scale) + shift),  h = (x - mean) * rstd.
// Forward reads x twice, once for the moments of its groups. Backward reads x and d_y twice: once for the sums of dz
// and dz * h over the positions, from which all parameters' gradients follow, and once to write
//   d_x = rstd * (gain * dz - S1 - h * S2),  gain = weight * (1 + scale),  S = means over the group of gain * (dz, dz *
//   h).
#include "norm.h"

#include <cstring>

#include "prologue.h"

namespace mmattn::MMATTN_ISA {
namespace {

// Positions of all batches, as many for each thread as for any other, which walks them backwards in slices of at most
// `rows`, so that it meets the last of what a walk forwards left in its cache: visit(batch, begin, end).
template <class Visit>
void each_slice_backwards(int64_t batches, int64_t length, int64_t rows, Visit visit) {
  const int64_t thread = thread_number(), threads = thread_count(), all = batches * length;
  const int64_t begin = all * thread / threads;
  for (int64_t end = all * (thread + 1) / threads, first; end > begin; end = first) {
    const int64_t batch = (end - 1) / length;
    first = std::max({begin, batch * length, end - rows});
    visit(batch, first - batch * length, end - batch * length);
  }
}

template <class T, Prologue kPrologue>
void forward(const GroupNorm& p) {
  const Coefficients coefficients(p.batch, p.channels, kEvenAndOdd<T>);
  prepare<T>(p.norm, p.x, p.batch, p.length, p.channels, p.threads, coefficients);
  const Parts parts(p.length, p.channels);
#pragma omp parallel num_threads(p.threads)
  each_slice_backwards(p.batch, p.length, parts.rows, [&](int64_t b, int64_t begin, int64_t end) {
    const int64_t channels = p.channels;
    const Maps maps(coefficients, b);
    for (int64_t l = begin; l < end; ++l) {
      const T* x = row<T>(p.x, b, l);
      T* out = row<T>(p.out, b, l);
      for (int64_t c = 0; c < channels; c += 2 * kLanes) {
        const int64_t n = channels - c;
        Pair pair = load_pair(x + c, n);
        pair.first = apply<kPrologue, kDegree<T>>(pair.first, Map(maps, c));
        pair.second = apply<kPrologue, kDegree<T>>(pair.second, Map(maps, c + kLanes));
        store_pair(out + c, pair, n);
      }
    }
  });
}

// The walk over the rows of every thread: `tensors` of them are read and written.
void tell_rows(const GroupNorm& p, int64_t tensors, const Work& work) {
  const int64_t all = p.batch * p.length;
  for (int64_t i = 0; i < p.threads; ++i)
    work.fixed("rows", 0, (all * (i + 1) / p.threads - all * i / p.threads) * p.channels * tensors);
}

template <class T, bool kSilu>
class Backward {
 public:
  explicit Backward(const GroupNorm& p)
      : p_(p),
        coefficients_(p.batch, p.channels, kEvenAndOdd<T>),
        parts_(p.length, p.channels),
        ranges_(p.channels, 1, p.batch * parts_.count, p.threads),
        partial_(p.batch * parts_.count, p.channels, 2),
        steps_(p.batch, p.channels, 2) {
    set_coefficients_from_stats(p.norm, coefficients_, p.batch, p.channels);
    std::memset(steps_.at(0, 0), 0, p.batch * 2 * steps_.padded() * sizeof(float));  // without groups, and past the end
  }

  void run() const {
    const int64_t count = p_.batch * parts_.count * ranges_.count;
#pragma omp parallel num_threads(p_.threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i)
        sum_part(i / ranges_.count, ranges_.begin(i % ranges_.count), ranges_.begin(i % ranges_.count + 1));
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p_.batch * groups(); ++i) {
        merge_sums(i / groups(), i % groups());
        set_steps(i / groups(), i % groups());
      }
      each_slice_backwards(p_.batch, p_.length, parts_.rows,
                           [&](int64_t b, int64_t begin, int64_t end) { propagate(b, begin, end); });
    }
  }

 private:
  void sum_part(int64_t i, int64_t first_channel, int64_t end_channel) const {
    const int64_t b = i / parts_.count, part = i % parts_.count, channels = p_.channels;
    const int64_t x_step = p_.x.position, d_out_step = p_.d_out.position;
    const Maps maps(coefficients_, b);
    float *sums = partial_.at(i, 0), *products = partial_.at(i, 1);
    const int64_t end_of_pair = round_up(end_channel, 2 * kLanes);
    std::fill(sums + first_channel, sums + end_of_pair, 0.0f);
    std::fill(products + first_channel, products + end_of_pair, 0.0f);
    for (int64_t first = parts_.begin(part); first < parts_.end(part); first += kSliceRows) {
      const int64_t rows = std::min(kSliceRows, parts_.end(part) - first);
      for (int64_t c = first_channel; c < end_channel; c += 2 * kLanes) {
        const Map map[2] = {Map(maps, c), Map(maps, c + kLanes)};
        const T *x = row<T>(p_.x, b, first) + c, *d_out = row<T>(p_.d_out, b, first) + c;
        const int64_t n = channels - c;
        Vec sum[2] = {}, product[2] = {};
        for (int64_t r = 0; r < rows; ++r, x += x_step, d_out += d_out_step) {
          const Pair values = load_pair(x, n), d_y = load_pair(d_out, n);
          const auto add = [&](int half, Vec value, Vec d) {
            const Vec centred = value - map[half].mean;
            // In full precision: these sums are gradients of parameters, which may be of float.
            const Vec d_z = activate_backward<kSilu, 5>(centred * map[half].factor + map[half].offset, d);
            sum[half] += d_z;
            product[half] += d_z * centred;
          };
          add(0, values.first, d_y.first);
          add(1, values.second, d_y.second);
        }
        for (int half = 0; half < 2; ++half) {
          float *s = sums + c + half * kLanes, *t = products + c + half * kLanes;
          store(s, load(s) + sum[half]);
          store(t, load(t) + product[half]);
        }
      }
    }
  }

  void merge_sums(int64_t b, int64_t g) const {
    float* sums = p_.sums + b * p_.channels * 2;
    for (int64_t c = g * group_size(); c < (g + 1) * group_size(); ++c) {
      const int64_t at = coefficients_.place(c);
      double sum = 0, product = 0;
      for (int64_t part = 0; part < parts_.count; ++part) {
        sum += partial_.at(b * parts_.count + part, 0)[at];
        product += partial_.at(b * parts_.count + part, 1)[at];
      }
      const float* s = stats(b, c);
      sums[c * 2] = static_cast<float>(sum);
      sums[c * 2 + 1] = static_cast<float>((product - sum * s[2]) * s[1]);
    }
  }

  // From the merged sums.
  void set_steps(int64_t b, int64_t g) const {
    if (p_.norm.groups == 0) return;
    const float *sums = p_.sums + b * p_.channels * 2, *factor = coefficients_.factor(b);  // factor is rstd * gain
    const int64_t size = group_size();
    float *constant = steps_.at(b, 0), *slope = steps_.at(b, 1);
    double sum = 0, product = 0;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      sum += static_cast<double>(factor[coefficients_.place(c)]) * sums[c * 2];
      product += static_cast<double>(factor[coefficients_.place(c)]) * sums[c * 2 + 1];
    }
    const float* s = stats(b, g * size);
    const double mean = sum / (size * p_.length), mean_slope = product / (size * p_.length) * s[1];
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      constant[coefficients_.place(c)] = static_cast<float>(mean - s[2] * mean_slope);
      slope[coefficients_.place(c)] = static_cast<float>(mean_slope);
    }
  }

  void propagate(int64_t b, int64_t begin, int64_t end) const {
    const int64_t channels = p_.channels;
    const Maps maps(coefficients_, b);
    const float *constant = steps_.at(b, 0), *slope = steps_.at(b, 1);
    for (int64_t l = begin; l < end; ++l) {
      const T *x = row<T>(p_.x, b, l), *d_out = row<T>(p_.d_out, b, l);
      T* d_x = row<T>(p_.d_x, b, l);
      for (int64_t c = 0; c < channels; c += 2 * kLanes) {
        const int64_t n = channels - c;
        const Pair values = load_pair(x + c, n), d_y = load_pair(d_out + c, n);
        const auto step = [&](int64_t at, Vec value, Vec d) {
          const Map map(maps, at);
          const Vec centred = value - map.mean;
          // As in the sums: where the gradient cancels, as in a group of zero variance, a difference between the two
          // would be all that is left, times rstd.
          const Vec d_z = activate_backward<kSilu, 5>(centred * map.factor + map.offset, d);
          return map.factor * d_z - load(constant + at) - centred * load(slope + at);
        };
        store_pair(d_x + c, Pair{step(c, values.first, d_y.first), step(c + kLanes, values.second, d_y.second)}, n);
      }
    }
  }

  int64_t groups() const { return std::max<int64_t>(p_.norm.groups, 1); }
  int64_t group_size() const { return p_.norm.groups ? p_.channels / p_.norm.groups : p_.channels; }

  const float* stats(int64_t b, int64_t c) const {
    static constexpr float no_groups[kStats] = {0, 1, 0};
    return p_.norm.groups ? p_.norm.stats + (b * p_.norm.groups + c / group_size()) * kStats : no_groups;
  }

  const GroupNorm& p_;
  const Coefficients coefficients_;
  const Parts parts_;
  const ChannelRanges ranges_;
  const PerChannel partial_;  // sums of dz and dz * (x - mean) over each part
  const PerChannel steps_;    // constant and slope: d_x = factor * dz - constant - (x - mean) * slope
};

// A call of its own, so that no compiler contracts it with an addition: where a transform or a lazy sign is in the way
// torch computes these gradients, to the same bits.
[[gnu::noinline]] float product(float a, float b) {
  return a * b;
}

// One number of a parameter's gradient, in the parameter's dtype.
void put(void* to, const Parameter& like, int64_t at, float number) {
  if (!to) return;
  if (!like.is_bf16) {
    static_cast<float*>(to)[at] = number;
    return;
  }
  bf16 rounded[kLanes];
  store(rounded, broadcast(number));
  static_cast<bf16*>(to)[at] = rounded[0];
}

template <class T>
void sum_rows(const Sum& p) {
  const auto [first, second, third, fourth] = p.sizes;
  int count = 0;
  while (count < Sum::kMost && p.terms[count].data) ++count;
  const bool is_copy = count == 1 && p.scale == 1.0f;  // to the bit, of whatever is not a number
#pragma omp parallel for num_threads(p.threads) collapse(3)
  for (int64_t i = 0; i < first; ++i)
    for (int64_t j = 0; j < second; ++j)
      for (int64_t k = 0; k < third; ++k)
        for (int64_t l = 0; l < fourth; ++l) {
          const auto row = [&](const Rows& of) {
            const auto& s = of.strides;
            return static_cast<T*>(of.data) + i * s[0] + j * s[1] + k * s[2] + l * s[3];
          };
          T* to = row(p.to);
          if (is_copy) {
            std::memcpy(to, row(p.terms[0]), p.channels * sizeof(T));
            continue;
          }
          for (int64_t c = 0; c < p.channels; c += kLanes) {
            const int64_t n = p.channels - c;
            Vec sum = count ? load_lanes(row(p.terms[0]) + c, n) : broadcast(0.0f);
            for (int term = 1; term < count; ++term) sum += load_lanes(row(p.terms[term]) + c, n);
            store_lanes(to + c, sum * p.scale, n);
          }
        }
}

}  // namespace

void group_norm_forward(const GroupNorm& p) {
  if (p.norm.silu)
    p.is_bf16 ? forward<bf16, Prologue::silu>(p) : forward<float, Prologue::silu>(p);
  else
    p.is_bf16 ? forward<bf16, Prologue::affine>(p) : forward<float, Prologue::affine>(p);
}

void group_norm_backward(const GroupNorm& p) {
  if (p.norm.silu)
    p.is_bf16 ? Backward<bf16, true>(p).run() : Backward<float, true>(p).run();
  else
    p.is_bf16 ? Backward<bf16, false>(p).run() : Backward<float, false>(p).run();
}

void group_norm_work(const GroupNorm& p, bool backward, const Work& work) {
  if (!backward) {
    tell_prepare(p.norm, p.batch, p.length, p.channels, p.threads, work);
    return tell_rows(p, 2, work);
  }
  const Parts parts(p.length, p.channels);
  const int64_t groups = std::max<int64_t>(p.norm.groups, 1);
  work.fixed("coefficients", 0, 2 * kOfChannel * p.channels * p.batch);
  tell_parts("sums", p.batch, parts, ChannelRanges(p.channels, 1, p.batch * parts.count, p.threads), 2, work);
  for (int64_t i = 0; i < p.batch * groups; ++i)
    work.fixed("merges", 0, (2 * parts.count + kOfChannel) * p.channels / groups);
  tell_rows(p, 3, work);
}

// With z the argument of the activation and h the normalised x: z = (h * weight + bias) * (1 + scale) + shift, of which
// the sums over the positions are those of dz and dz * h.
void parameter_gradients(const ParameterGradients& p) {
  const Norm& norm = p.norm;
  const bool is_normalised = norm.weight.data && norm.bias.data;
  for (int64_t c = 0; c < p.channels; ++c) {
    float d_weight = 0, d_bias = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const float* sums = p.sums + (b * p.channels + c) * 2;
      const float d_z = sums[0], d_z_h = sums[1];
      const float gain = 1.0f + value(norm.scale, b, c, 0.0f);
      d_weight += product(d_z_h, gain);
      d_bias += product(d_z, gain);
      const float weight = value(norm.weight, 0, c, 1.0f), bias = value(norm.bias, 0, c, 0.0f);
      put(p.d_scale, norm.scale, b * p.film_batch + c,
          is_normalised ? product(d_z_h, weight) + product(d_z, bias) : d_z_h);
      put(p.d_shift, norm.shift, b * p.film_batch + c, d_z);
    }
    put(p.d_weight, norm.weight, c, d_weight);
    put(p.d_bias, norm.bias, c, d_bias);
  }
}

void sum(const Sum& p) {
  p.is_bf16 ? sum_rows<bf16>(p) : sum_rows<float>(p);
}

}  // namespace mmattn::MMATTN_ISA
