// The matrix units of x86 (AMX): tiles of up to 16 rows of 64 bytes, multiplied 16 x 16 x 32 bf16 numbers or 64 bytes at
// a time.
//
// Compiled with -DEMULATE_AMX the same calls are played in plain C++, so that what is built from them is tested on
// every processor.
#pragma once

#if defined(__AMX_BF16__) || defined(EMULATE_AMX)
#define HAVE_TILES 1

#include <cstdint>
#include <cstring>

#include "vector.h"

#ifndef EMULATE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jaxserve {

constexpr int kTileSide = 16;
constexpr int kTileBytes = 64;

#ifdef EMULATE_AMX

inline bool tiles_allowed() { return true; }

struct EmulatedTile {
  alignas(64) uint8_t rows[kTileSide][kTileBytes];
};
inline thread_local EmulatedTile emulated_tiles[8];

struct TileUse {
  ~TileUse() {}
};

template <int Tile>
void tile_zero() { std::memset(&emulated_tiles[Tile], 0, sizeof(EmulatedTile)); }
template <int Tile>
void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < kTileSide; ++r)
    std::memcpy(emulated_tiles[Tile].rows[r], static_cast<const char*>(from) + r * stride, kTileBytes);
}
template <int Tile>
void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < kTileSide; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, emulated_tiles[Tile].rows[r], kTileBytes);
}
// sums [16, 16] += a [16, 32] · b [16, 16, 2], pairs along the depth
template <int Sums, int A, int B>
void tile_multiply() {
  for (int i = 0; i < kTileSide; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum = read<float>(emulated_tiles[Sums].rows[i] + 4 * j);
      for (int k = 0; k < 16; ++k)
        for (int p = 0; p < 2; ++p)
          sum += widen(read<BFloat16>(emulated_tiles[A].rows[i] + 4 * k + 2 * p)) *
                 widen(read<BFloat16>(emulated_tiles[B].rows[k] + 4 * j + 2 * p));
      std::memcpy(emulated_tiles[Sums].rows[i] + 4 * j, &sum, sizeof sum);
    }
}
// sums [16, 16] += a [16, 64] · b [16, 16, 4], bytes, of which those of a have a sign
template <int Sums, int A, int B>
void tile_multiply_bytes() {
  for (int i = 0; i < kTileSide; ++i)
    for (int j = 0; j < 16; ++j) {
      uint32_t sum = read<uint32_t>(emulated_tiles[Sums].rows[i] + 4 * j);
      for (int k = 0; k < 16; ++k)
        for (int p = 0; p < 4; ++p)
          sum += uint32_t(read<int8_t>(emulated_tiles[A].rows[i] + 4 * k + p) *
                          emulated_tiles[B].rows[k][4 * j + p]);
      std::memcpy(emulated_tiles[Sums].rows[i] + 4 * j, &sum, sizeof sum);
    }
}

#else

// Whether the system lets this process use them: it has to be asked, once.
inline bool tiles_allowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// While one lives, its thread has eight tiles of whole size.
class TileUse {
 public:
  TileUse() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = kTileBytes, config.rows[i] = kTileSide;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileUse() { asm volatile("tilerelease"); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
};

// In assembly, in order: the compiler's own intrinsics do not tell what memory they touch (gcc 12).
template <int Tile>
void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(Tile)); }
template <int Tile>
void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
}
// sums [16, 16] += a [16, 32] · b [16, 16, 2], pairs along the depth
template <int Sums, int A, int B>
void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
}
// sums [16, 16] += a [16, 64] · b [16, 16, 4], bytes, of which those of a have a sign
template <int Sums, int A, int B>
void tile_multiply_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
}

#endif

}  // namespace jaxserve

#endif
