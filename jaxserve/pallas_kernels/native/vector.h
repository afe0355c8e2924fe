// Vectors of floats as wide as the machine's registers, and 16-bit floats that are widened as they are read.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace jaxserve {

#ifdef __AVX512F__
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 8;  // AVX2; compilers make two of a smaller register elsewhere
constexpr int kRegisters = 16;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  // a subnormal half is counted out: XLA's threads take subnormal floats for zero
  const float value = rest < 0x400u ? float(rest) * 0x1p-24f : bits_as<float>((rest << 13) + (112u << 23));
  return bits_as<float>(bits_as<uint32_t>(value) | sign);
}

// kLanes numbers as floats.
inline Floats load(const float* p) { return read<Floats>(p); }
inline Floats load(const BFloat16* p) {
#if defined(__AVX512F__)
  return bits_as<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16));
#elif defined(__AVX2__)
  return bits_as<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(p)), 16));
#else
  return bits_as<Floats>(__builtin_convertvector(read<Halves>(p), Words) << 16);
#endif
}
inline Floats load(const Float16* p) {
#if defined(__AVX512F__)
  return bits_as<Floats>(_mm512_cvtph_ps(read<__m256i>(p)));
#elif defined(__F16C__)
  return bits_as<Floats>(_mm256_cvtph_ps(read<__m128i>(p)));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// The first `count` numbers as floats, and zeros.
template <class T>
inline Floats load_some(const T* p, int64_t count) {
  T some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load(some);
}

// a * b + c, rounded once where the processor can.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Compilers like to read a number again for each use; here they keep it in a register.
inline void hold(Floats& v) {
#ifdef __AVX2__
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}

#ifdef __AVX512BF16__
inline void hold(__m512bh& v) { asm("" : "+v"(v)); }
#endif

// The nearest bf16 numbers, the even one of two.
inline void round(const float* from, int64_t count, BFloat16* to) {
#ifdef __AVX512BF16__
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 some = count - i < kLanes ? (1u << (count - i)) - 1 : 0xffff;
    const __m512 floats = _mm512_maskz_loadu_ps(some, from + i);
    _mm256_mask_storeu_epi16(to + i, some, bits_as<__m256i>(_mm512_cvtneps_pbh(floats)));
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_as<uint32_t>(from[i]);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);
    to[i].bits = uint16_t((from[i] == from[i] ? rounded : bits | 0x400000u) >> 16);  // a NaN stays one
  }
#endif
}
inline void round(const float* from, int64_t count, float* to) { std::memcpy(to, from, 4 * count); }
inline void round(const float* from, int64_t count, Float16* to) {
  for (int64_t i = 0; i < count; ++i) {
#ifdef __F16C__
    to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
#else
    constexpr uint32_t kInfinity = 0x7f800000u, kTooLarge = 0x47800000u, kNormal = 0x38800000u;
    constexpr float kHalf = 0.5f;  // its last digit is the smallest that a subnormal half has
    const uint32_t bits = bits_as<uint32_t>(from[i]), sign = bits & 0x80000000u, size = bits ^ sign;
    const uint32_t half = size >= kTooLarge ? (size > kInfinity ? 0x7e00u : 0x7c00u)
                          : size < kNormal ? bits_as<uint32_t>(bits_as<float>(size) + kHalf) - bits_as<uint32_t>(kHalf)
                                           : (size - (112u << 23) + 0xfffu + (size >> 13 & 1)) >> 13;
    to[i].bits = uint16_t(sign >> 16 | half);
#endif
  }
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
// Rounded to the nearest, the even one of two.
inline void store(BFloat16* p, Floats v) {
#ifdef __AVX512BF16__
  const auto rounded = _mm512_cvtneps_pbh(v);
#else
  const Words bits = bits_as<Words>(v), up = bits + 0x7fffu + (bits >> 16 & 1);
  const Halves rounded = __builtin_convertvector((v == v ? up : bits | 0x400000u) >> 16, Halves);  // a NaN stays one
#endif
  std::memcpy(p, &rounded, sizeof rounded);
}

inline Floats broadcast(float x) { return x - Floats{}; }

inline Ints lane_numbers() {
  Ints lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

using Four = float __attribute__((vector_size(16)));

// Four lanes: sums of every fourth, by halves.
inline Four sums_of_fourths(Floats v) {
#if defined(__AVX512DQ__)
  // with a mask of all: gcc 12 warns of its own header for the forms without one
  const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, v, 0), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#else
  for (int half = kLanes / 2; half > 2; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return Four{v[0], v[1], v[2], v[3]};
#endif
}

// The sum of the lanes, by halves: the same order everywhere.
inline float sum(Floats v) {
  const Four fourths = sums_of_fourths(v);
  return (fourths[0] + fourths[2]) + (fourths[1] + fourths[3]);
}

// The sums of the lanes of four vectors, in the same order.
inline Four sums(Floats a, Floats b, Floats c, Floats d) {
  const Four v[] = {sums_of_fourths(a), sums_of_fourths(b), sums_of_fourths(c), sums_of_fourths(d)};
#ifdef __SSE__
  const Four ab = _mm_unpacklo_ps(v[0], v[1]), cd = _mm_unpacklo_ps(v[2], v[3]);
  const Four ab_high = _mm_unpackhi_ps(v[0], v[1]), cd_high = _mm_unpackhi_ps(v[2], v[3]);
  const Four even = ab + ab_high, odd = cd + cd_high;  // lanes 0 and 2, lanes 1 and 3, of a, b and of c, d
  return _mm_add_ps(_mm_movelh_ps(even, odd), _mm_movehl_ps(odd, even));
#else
  Four result;
  for (int i = 0; i < 4; ++i) result[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
  return result;
#endif
}

inline float largest(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// Picks two lanes of a and then two of b from every four lanes: the numbers of lanes in the order of the result,
// two bits each, lowest first.
template <int Lanes>
inline Floats pick(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_shuffle_ps(a, b, Lanes);
#elif defined(__AVX2__)
  return _mm256_shuffle_ps(a, b, Lanes);
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = (i % 4 < 2 ? a : b)[i / 4 * 4 + (Lanes >> i % 4 * 2 & 3)];
  return v;
#endif
}

// Every four lanes of four vectors are a square of numbers; this transposes them all.
inline void transpose_fours(Floats (&v)[4]) {
  constexpr int kLow = 0b01'00'01'00, kHigh = 0b11'10'11'10, kEven = 0b10'00'10'00, kOdd = 0b11'01'11'01;
  const Floats a = pick<kLow>(v[0], v[1]), b = pick<kLow>(v[2], v[3]);
  const Floats c = pick<kHigh>(v[0], v[1]), d = pick<kHigh>(v[2], v[3]);
  v[0] = pick<kEven>(a, b), v[1] = pick<kOdd>(a, b), v[2] = pick<kEven>(c, d), v[3] = pick<kOdd>(c, d);
}

}  // namespace jaxserve
