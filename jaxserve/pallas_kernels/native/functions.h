// exp and tanh of vectors of floats, to one or two units in the last place.
#pragma once

#include "vector.h"

namespace jaxserve {

// exp(x) for x up to 88; 0 below -87, where floats begin to lose digits. exp(0) is exactly 1.
inline Floats exp(Floats x) {
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits; ln 2 is in two
  // parts, the first short enough for n times it to be exact.
  const Floats shifted = fused(x, broadcast(0x1.715476p0f), broadcast(0x1.8p23f));
  const Floats n = shifted - 0x1.8p23f;
  const Floats r = fused(n, broadcast(-0x1.7f7d1cp-20f), fused(n, broadcast(-0x1.62e4p-1f), x));
  // exp(r) by its minimax polynomial for |r| <= ln 2 / 2, off by at most 3e-9 of it
  Floats p = broadcast(0x1.6a2434p-10f);
  for (const float c : {0x1.1239e2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f, 1.0f, 1.0f})
    p = fused(p, r, broadcast(c));
  // times 2^n: n is added to the exponent
  const Floats scaled = bits_as<Floats>(bits_as<Words>(p) + (bits_as<Words>(shifted) << 23));
  return x >= -87.0f ? scaled : x < -87.0f ? Floats{} : x;  // a NaN is neither
}

inline Floats tanh(Floats x) {
  const Words sign = bits_as<Words>(x) & 0x80000000u;
  const Floats size = bits_as<Floats>(bits_as<Words>(x) ^ sign);
  const Floats e = exp(-2.0f * size);
  const Floats far = (1.0f - e) / (1.0f + e);
  // near 0 the difference would lose digits: x + x^3 p(x^2), off by at most 5e-9 of it for |x| <= 0.625
  const Floats square = size * size;
  Floats p = broadcast(-0.0057011093f);
  for (const float c : {0.020635754f, -0.05373874f, 0.13331431f, -0.3333328f}) p = fused(p, square, broadcast(c));
  const Floats near = fused(size * square, p, size);
  return bits_as<Floats>(bits_as<Words>(size < 0.625f ? near : far) | sign);
}

}  // namespace jaxserve
