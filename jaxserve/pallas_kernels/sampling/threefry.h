// Random numbers from counters: Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", 2011), keyed and turned into floats as jax.random does, to the bit.

#pragma once

#include <cstdint>
#include <cstring>

namespace jaxserve {

struct Key {
  uint32_t a = 0, b = 0;
};

inline uint32_t rotate_left(uint32_t x, int by) { return x << by | x >> (32 - by); }

// The two words of a counter, scrambled under a key.
inline Key threefry(const Key& key, Key x) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key.a, key.b, key.a ^ key.b ^ 0x1BD11BDA};
  x = {x.a + keys[0], x.b + keys[1]};
  for (uint32_t i = 0; i < 5; ++i) {
    for (const int by : kRotations[i % 2]) {
      x.a += x.b;
      x.b = rotate_left(x.b, by) ^ x.a;
    }
    x = {x.a + keys[(i + 1) % 3], x.b + keys[(i + 2) % 3] + i + 1};
  }
  return x;
}

// jax.random.fold_in
inline Key fold_in(const Key& key, uint32_t word) { return threefry(key, {0, word}); }

// jax.random.uniform: a float in [0, 1).
inline float uniform(const Key& key) {
  const Key words = threefry(key, {0, 0});
  const uint32_t bits = (words.a ^ words.b) >> 9 | 0x3F800000;  // of a number in [1, 2)
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number - 1.0f;
}

}  // namespace jaxserve
