// SPDX-License-Identifier: MIT
// One vector type and its few operations for every instruction set. A source that includes this file is compiled
// once per instruction set, each time with MMATTN_ISA naming the namespace its code lives in.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mmattn::MMATTN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t WordVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

// log2(e) and ln(2).
template <class T>
constexpr T kLog2e = static_cast<T>(1.44269504088896340736L);
template <class T>
constexpr T kLn2 = static_cast<T>(0.693147180559945309417L);

struct bf16 {
  uint16_t bits;
};

// Whether products of this dtype are made on tiles (tiles.h).
template <class T>
constexpr bool kOnTiles =
#if defined(__AMX_BF16__)
    true;
#elif defined(__AVX512BF16__)
    sizeof(T) == 2;
#else
    false;
#endif

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) {
  std::memcpy(p, &v, sizeof v);
}

inline Vec broadcast(float x) {
  return x - Vec{};
}

inline Vec load(const bf16* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  return (Vec)(__builtin_convertvector(half, WordVec) << 16);
}

// Round to nearest even; a NaN stays one (the rounding carry could turn its mantissa into infinity).
inline void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &half, sizeof half);
#else
  const WordVec bits = (WordVec)v;
  const WordVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVec chosen = v != v ? WordVec{} + 0x7fc0 : rounded;
  const HalfVec half = __builtin_convertvector(chosen, HalfVec);
  std::memcpy(p, &half, sizeof half);
#endif
}

inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX512F__)
inline Vec min(Vec a, Vec b) {
  return _mm512_min_ps(a, b);
}
#endif

inline float reduce_add(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

inline float reduce_max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

inline Vec lane_numbers() {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// Lanes outside [lo, hi) become `fill`.
inline Vec keep_lanes(Vec v, int64_t lo, int64_t hi, float fill) {
  const Vec lane = lane_numbers();
  const IntVec keep = (lane >= static_cast<float>(lo)) & (lane < static_cast<float>(hi));
  return keep ? v : broadcast(fill);
}

#if defined(__AVX512BW__)
inline __m512i interleave(__m512i halves) {  // (0..31) -> (0, 16, 1, 17, ...)
  return _mm512_permutexvar_epi16(_mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0),
                                  halves);
}
#endif

// 2^x by a minimax polynomial of 2^f / 2^f on f = x - floor(x); relative error 7.5e-8 at degree 5, 7.5e-5 at degree 3,
// which bf16 cannot see. Zero below 2^-126, so a masked score adds nothing.
template <int Degree = 5>
inline Vec exp2(Vec x) {
  static_assert(Degree == 3 || Degree == 5);
  const auto polynomial = [](Vec f) {
    if constexpr (Degree == 3) {
      Vec p = broadcast(0.07802452f) * f + 0.22606716f;
      p = p * f + 0.69583356f;
      return p * f + 0.9999252f;
    } else {
      Vec p = broadcast(0.0018775767f) * f + 0.00898934f;
      p = p * f + 0.055826318f;
      p = p * f + 0.24015361f;
      p = p * f + 0.6931531f;
      return p * f + 0.99999994f;
    }
  };
#if defined(__AVX512F__)
  // scalef rounds its exponent down itself
  return _mm512_scalef_ps(polynomial(_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)), x);
#else
  const Vec floor_limit = broadcast(-126.0f), ceiling = broadcast(127.0f);
  const Vec clamped = x < floor_limit ? floor_limit : (x > ceiling ? ceiling : x);
  IntVec floored = __builtin_convertvector(clamped, IntVec);
  floored += __builtin_convertvector(floored, Vec) > clamped;  // a true comparison is -1
  const IntVec exponent = (floored + 127) << 23;
  const Vec power = polynomial(clamped - __builtin_convertvector(floored, Vec)) * (Vec)exponent;
  const Vec bounded = x < floor_limit ? Vec{} : power;
  return x != x ? x : bounded;
#endif
}

// 1 / (1 + e^-x) within 2^-22 at degree 5 and 2^-13 at degree 3.
template <int Degree = 5>
inline Vec sigmoid(Vec x) {
  const Vec exponent = x * -kLog2e<float>;
#if defined(__AVX512F__)
  if constexpr (Degree == 3) return _mm512_rcp14_ps(1.0f + exp2<3>(exponent));
  // Newton's step needs a finite number: below 2^126, whose reciprocal is still normal. The NaN this loses comes back
  // by the factor x.
  const Vec y = 1.0f + exp2(min(exponent, broadcast(126.0f)));
  const Vec r = _mm512_rcp14_ps(y);
  return r * (2.0f - y * r);
#else
  return 1.0f / (1.0f + exp2<Degree>(exponent));
#endif
}

// Asks for n elements ahead of their use, to be read or written: rows of one head lie too far apart for the hardware to
// foresee the next.
template <class T>
inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; p != nullptr && i < n; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}

// The first n of kLanes elements; lanes past them are zero.
template <class T>
inline Vec load_lanes(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  if (n <= 0) return Vec{};
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps((1u << n) - 1, p);
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << n) - 1, p)), 16);
#endif
#endif
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_lanes(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// dst[0:n] = factor * src[0:n], zero up to `padded`.
template <class T>
inline void load_row(float* dst, const T* src, int64_t n, int64_t padded, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i) * factor);
  if (i < n) {
    T tail[kLanes] = {};
    std::memcpy(tail, src + i, (n - i) * sizeof(T));
    store(dst + i, load(tail) * factor);
    i += kLanes;
  }
  for (; i < padded; i += kLanes) store(dst + i, Vec{});
}

// dst[0:n] = factor * src[0:n]
template <class T>
inline void store_row(T* dst, const float* src, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i) * factor);
  if (i < n) {
    float padded[kLanes] = {};
    std::memcpy(padded, src + i, (n - i) * sizeof(float));
    T tail[kLanes];
    store(tail, load(padded) * factor);
    std::memcpy(dst + i, tail, (n - i) * sizeof(T));
  }
}

}  // namespace mmattn::MMATTN_ISA
