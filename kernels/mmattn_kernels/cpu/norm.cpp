// SPDX-License-Identifier: MIT
// Group normalisation with FiLM and SiLU, forward and backward, over [batch, position, channel]:
//   y = activate((h * weight + bias) * (1 + scale) + shift),  h = (x - mean) * rstd.
// Forward reads x twice, once for the moments of its groups. Backward reads x and d_y twice: once for the sums of dz
// and dz * h over the positions, from which all parameters' gradients follow, and once to write
//   d_x = rstd * (gain * dz - S1 - h * S2),  gain = weight * (1 + scale),  S = means over the group of gain * (dz, dz *
//   h).
#include "norm.h"

#include "prologue.h"

namespace mmattn::MMATTN_ISA {
namespace {

// Work on parts of the positions: each thread walks its share backwards, so that it meets the last of what a walk
// forwards left in its cache.
template <class Visit>
void each_part_backwards(int64_t count, Visit visit) {
  const int64_t thread = thread_number(), threads = thread_count();
  for (int64_t i = count * (thread + 1) / threads; i-- > count * thread / threads;) visit(i);
}

template <class T, Prologue kPrologue>
void forward(const GroupNorm& p) {
  const Coefficients coefficients(p.batch, p.channels, kEvenAndOdd<T>);
  prepare<T>(p.norm, p.x, p.batch, p.length, p.channels, p.threads, coefficients);
  const Parts parts(p.length, p.channels);
#pragma omp parallel num_threads(p.threads)
  each_part_backwards(p.batch * parts.count, [&](int64_t i) {
    const int64_t b = i / parts.count, part = i % parts.count, channels = p.channels;
    const Maps maps(coefficients, b);
    for (int64_t l = parts.begin(part); l < parts.end(part); ++l) {
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

template <class T, bool kSilu>
void backward(const GroupNorm& p) {
  const Norm& norm = p.norm;
  const Coefficients coefficients(p.batch, p.channels, kEvenAndOdd<T>);
  const int64_t groups = norm.groups, channels = p.channels, size = groups ? channels / groups : channels;
  const float no_groups[kStats] = {0, 1, 0};
  const auto stats = [&](int64_t b, int64_t c) {
    return groups ? norm.stats + (b * groups + c / size) * kStats : no_groups;
  };
  set_coefficients_from_stats(norm, coefficients, p.batch, channels);
  const Parts parts(p.length, channels);
  const int64_t padded = coefficients.padded(), count = p.batch * parts.count;
  const PerChannel partial(count, channels, 2);  // sums of dz and dz * (x - mean) over each part
  const PerChannel steps(p.batch, channels,
                         2);  // constant and slope: d_x = factor * dz - constant - (x - mean) * slope
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = i / parts.count, part = i % parts.count, x_step = p.x.position, d_out_step = p.d_out.position;
      const Maps maps(coefficients, b);
      float *sums = partial.at(i, 0), *products = partial.at(i, 1);
      std::memset(sums, 0, padded * sizeof(float));
      std::memset(products, 0, padded * sizeof(float));
      for (int64_t first = parts.begin(part); first < parts.end(part); first += kSliceRows) {
        const int64_t rows = std::min(kSliceRows, parts.end(part) - first);
        for (int64_t c = 0; c < channels; c += 2 * kLanes) {
          const Map map[2] = {Map(maps, c), Map(maps, c + kLanes)};
          const T *x = row<T>(p.x, b, first) + c, *d_out = row<T>(p.d_out, b, first) + c;
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
#pragma omp for schedule(static)
    for (int64_t b = 0; b < p.batch; ++b) {
      float* sums = p.sums + b * channels * 2;
      const float* factor = coefficients.factor(b);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = coefficients.place(c);
        double sum = 0, product = 0;
        for (int64_t part = 0; part < parts.count; ++part) {
          sum += partial.at(b * parts.count + part, 0)[at];
          product += partial.at(b * parts.count + part, 1)[at];
        }
        const float* s = stats(b, c);
        sums[c * 2] = static_cast<float>(sum);
        sums[c * 2 + 1] = static_cast<float>((product - sum * s[2]) * s[1]);
      }
      float *constant = steps.at(b, 0), *slope = steps.at(b, 1);
      std::memset(constant, 0, padded * sizeof(float));
      std::memset(slope, 0, padded * sizeof(float));
      for (int64_t g = 0; g < groups; ++g) {
        double sum = 0, product = 0;  // factor is rstd * gain
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
          sum += static_cast<double>(factor[coefficients.place(c)]) * sums[c * 2];
          product += static_cast<double>(factor[coefficients.place(c)]) * sums[c * 2 + 1];
        }
        const float* s = stats(b, g * size);
        const double mean = sum / (size * p.length), mean_slope = product / (size * p.length) * s[1];
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
          constant[coefficients.place(c)] = static_cast<float>(mean - s[2] * mean_slope);
          slope[coefficients.place(c)] = static_cast<float>(mean_slope);
        }
      }
    }
    each_part_backwards(count, [&](int64_t i) {
      const int64_t b = i / parts.count, part = i % parts.count, n_channels = channels;
      const Maps maps(coefficients, b);
      const float *constant = steps.at(b, 0), *slope = steps.at(b, 1);
      for (int64_t l = parts.begin(part); l < parts.end(part); ++l) {
        const T *x = row<T>(p.x, b, l), *d_out = row<T>(p.d_out, b, l);
        T* d_x = row<T>(p.d_x, b, l);
        for (int64_t c = 0; c < n_channels; c += 2 * kLanes) {
          const int64_t n = n_channels - c;
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
    });
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
    p.is_bf16 ? backward<bf16, true>(p) : backward<float, true>(p);
  else
    p.is_bf16 ? backward<bf16, false>(p) : backward<float, false>(p);
}

}  // namespace mmattn::MMATTN_ISA
