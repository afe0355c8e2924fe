// Where the pool [blocks, 2, kv_heads, block_size, dim] keeps its numbers; pool.py says the same in Python.
//
// What a block has of a head's keys (or values) is made of cells of four bytes, each a float or two 16-bit
// numbers that are neighbours along the depth of the product that they are for (see product.h):
//   keys are cells [dim / n][block_size], of n numbers along dim: a lane per position,
//   values are cells [block_size / n][dim], of n positions: a lane per number.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstring>

namespace jaxserve {

template <class Number>
struct Pool {
  static constexpr int64_t kCell = 4 / sizeof(Number);

  Number* numbers;
  int64_t kv_heads, block_size, dim;

  Number* keys(int64_t block, int64_t head) const {
    return numbers + (block * 2 * kv_heads + head) * block_size * dim;
  }
  Number* values(int64_t block, int64_t head) const { return keys(block, kv_heads + head); }
  // From one row of cells to the next.
  int64_t key_stride() const { return block_size * kCell; }
  int64_t value_stride() const { return dim * kCell; }

  void write(int64_t block, int64_t head, int64_t slot, const Number* key, const Number* value) const {
    Number* to = keys(block, head) + slot * kCell;
    for (int64_t d = 0; d < dim; d += kCell, to += key_stride()) std::memcpy(to, key + d, 4);
    to = values(block, head) + slot / kCell * value_stride() + slot % kCell;
    for (int64_t d = 0; d < dim; ++d) to[d * kCell] = value[d];
  }
};

// Whole pages go back to the system, which fills one with zeros when it is touched first: to fill gigabytes here
// would take seconds.
inline void fill_with_zeros(char* begin, char* end) {
#ifdef __linux__
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  char* const first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page);
  char* const last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) / page * page);
  if (first < last && madvise(first, last - first, MADV_DONTNEED) == 0) {
    std::memset(begin, 0, first - begin);
    std::memset(last, 0, end - last);
    return;
  }
#endif
  std::memset(begin, 0, end - begin);
}

}  // namespace jaxserve
