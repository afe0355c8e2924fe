// exp2 and tanh of vectors of floats.
#pragma once

#include "vector.h"

namespace jaxserve {

// 2^x, for x below 128; exactly 0 below -126, where floats begin to lose digits, and exactly 1 at 0.
// `Terms` of a polynomial: 6 make an error of about a unit in the last place, 4 one of 3e-6 of the result.
template <int Terms = 6>
inline Floats exp2(Floats x) {
  static_assert(Terms == 4 || Terms == 6);
  // minimax of 2^r for |r| <= 1/2, highest power first
  constexpr float kFour[] = {0x1.3a02cep-7f, 0x1.c9fc46p-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f, 1.0f};
  constexpr float kSix[] = {0x1.4211eep-13f, 0x1.5f3e88p-10f, 0x1.3b2d2ep-7f, 0x1.c6aee8p-5f,
                            0x1.ebfbdcp-3f,  0x1.62e430p-1f,  1.0f};
  const float* terms = Terms == 4 ? kFour : kSix;
  const auto polynomial = [&](Floats r) {
    Floats p = broadcast(terms[0]);
    for (int i = 1; i <= Terms; ++i) p = fused(p, r, broadcast(terms[i]));
    return p;
  };
#ifdef __AVX512F__
  const Floats n = _mm512_roundscale_ps(x, 0);
  return _mm512_scalef_ps(polynomial(x - n), n);
#else
  // adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits, from where it goes to the exponent
  const Floats shifted = x + 0x1.8p23f;
  const Floats p = polynomial(x - (shifted - 0x1.8p23f));
  const Floats scaled = bits_as<Floats>(bits_as<Words>(p) + (bits_as<Words>(shifted) << 23));
  return x >= -126.0f ? scaled : x < -126.0f ? Floats{} : x;  // a NaN is neither
#endif
}

constexpr float kLog2E = 0x1.715476p0f;

inline Floats tanh(Floats x) {
  const Words sign = bits_as<Words>(x) & 0x80000000u;
  const Floats size = bits_as<Floats>(bits_as<Words>(x) ^ sign);
  const Floats e = exp2(-2.0f * kLog2E * size);
  const Floats far = (1.0f - e) / (1.0f + e);
  // near 0 the difference would lose digits: x + x^3 p(x^2), off by at most 5e-9 of it for |x| <= 0.625
  const Floats square = size * size;
  Floats p = broadcast(-0.0057011093f);
  for (const float c : {0.020635754f, -0.05373874f, 0.13331431f, -0.3333328f}) p = fused(p, square, broadcast(c));
  const Floats near = fused(size * square, p, size);
  return bits_as<Floats>(bits_as<Words>(size < 0.625f ? near : far) | sign);
}

}  // namespace jaxserve
