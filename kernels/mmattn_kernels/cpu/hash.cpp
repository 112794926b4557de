// SPDX-License-Identifier: MIT
// Universal hashing of all bytes at the speed at which they are read. A block of 4 KB is hashed with NH (Black, Halevi,
// Krawczyk, Krovetz, Rogaway: UMAC, 1999) under two keys of which one is the other one shifted (its Toeplitz form):
//   NH(m) = sum over pairs: (m[2i] + key[2i] mod 2^32) * (m[2i+1] + key[2i+1] mod 2^32) mod 2^64,
// and the blocks' hashes are the coefficients of a polynomial modulo the prime 2^61 - 1, evaluated at a random point.
// For a key drawn at random, two contents of one length that differ in whatever way have equal hashes with a
// probability of at most (2^-29 + n 2^-61)^2 for n blocks: below 2^-56 up to a terabyte.
#include "hash.h"

#include <cstring>

#include "memory.h"
#include "simd.h"

namespace mmattn::MMATTN_ISA {
namespace {

constexpr uint64_t kPrime = (uint64_t{1} << 61) - 1;

uint64_t reduce(uint64_t x) {
  x = (x & kPrime) + (x >> 61);
  return x >= kPrime ? x - kPrime : x;
}

// h * at + word modulo the prime, of numbers below it.
uint64_t chain(uint64_t h, uint64_t at, uint64_t word) {
  const unsigned __int128 product = static_cast<unsigned __int128>(h) * at + word;
  return reduce((static_cast<uint64_t>(product) & kPrime) + static_cast<uint64_t>(product >> 61));
}

#if defined(__AVX512F__)
using Words = __m512i;
inline Words read(const char* p) {
  return _mm512_loadu_si512(p);
}
inline Words add_product(Words sum, Words data, Words key) {
  const Words both = _mm512_add_epi32(data, key);
  return _mm512_add_epi64(sum, _mm512_mul_epu32(both, _mm512_srli_epi64(both, 32)));
}
#elif defined(__AVX2__)
using Words = __m256i;
inline Words read(const char* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Words add_product(Words sum, Words data, Words key) {
  const Words both = _mm256_add_epi32(data, key);
  return _mm256_add_epi64(sum, _mm256_mul_epu32(both, _mm256_srli_epi64(both, 32)));
}
#else
using Words = uint64_t;
inline Words read(const char* p) {
  Words word;
  std::memcpy(&word, p, sizeof word);
  return word;
}
inline Words add_product(Words sum, Words data, Words key) {
  const uint32_t low = static_cast<uint32_t>(data) + static_cast<uint32_t>(key);
  const uint32_t high = static_cast<uint32_t>(data >> 32) + static_cast<uint32_t>(key >> 32);
  return sum + static_cast<uint64_t>(low) * high;
}
#endif

inline uint64_t total(Words sums) {
  uint64_t words[sizeof sums / 8], sum = 0;
  std::memcpy(words, &sums, sizeof sums);
  for (const uint64_t word : words) sum += word;
  return sum;
}

void hash_block(const char* data, const HashKey& key, uint64_t* to) {
  const char* keys = reinterpret_cast<const char*>(key.block);
  Words first{}, second{};
  for (int64_t i = 0; i < kHashBlock; i += sizeof(Words)) {
    const Words words = read(data + i);
    first = add_product(first, words, read(keys + i));
    second = add_product(second, words, read(keys + i + kHashShift));
  }
  to[0] = reduce(total(first));
  to[1] = reduce(total(second));
}

}  // namespace

ContentHash content_hash(const void* data, int64_t bytes, const HashKey& key, int threads) {
  constexpr int64_t kShared = 128 << 10;  // bytes from which on a second thread pays
  const char* from = static_cast<const char*>(data);
  const int64_t blocks = bytes / kHashBlock, left = bytes % kHashBlock;
  const Buffer memory((blocks + 1) * 4);
  uint64_t* hashes = reinterpret_cast<uint64_t*>(memory.data());
#pragma omp parallel for num_threads(threads) schedule(static) if (bytes >= kShared)
  for (int64_t i = 0; i < blocks; ++i) hash_block(from + i * kHashBlock, key, hashes + i * 2);
  char padded[kHashBlock] = {};
  if (left) std::memcpy(padded, from + blocks * kHashBlock, left);
  hash_block(padded, key, hashes + blocks * 2);
  ContentHash result{};
  for (int64_t i = 0; i <= blocks; ++i)
    for (int j = 0; j < 2; ++j) result.words[j] = chain(result.words[j], key.chain[j], hashes[i * 2 + j]);
  return result;
}

}  // namespace mmattn::MMATTN_ISA
