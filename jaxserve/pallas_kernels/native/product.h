// Products of small float32 matrices. Each number is summed up in the order of the depth, whatever their shapes.
#pragma once

#include <cstdint>
#include <iterator>

#include "vector.h"

namespace jaxserve {

// c [rows, cols] (+)= a [rows, depth] · b [depth, cols]
struct Product {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride, depth;
  float* c;
  int64_t c_stride;
  bool add;
};

// A tile of c is held in registers: its sums, and of a and b the fewer operands of a step, and one of the others.
constexpr int kProductRows = 6;
constexpr int vectors_for(int rows) { return rows == 1 ? 8 : rows <= 3 || kRegisters > 16 ? 4 : 2; }

template <int Rows, int Vectors>
void multiply_tile(const Product& p, int64_t row, int64_t col) {
  const float *a = p.a + row * p.a_stride, *b = p.b + col;
  float* c = p.c + row * p.c_stride + col;
  Floats sums[Rows][Vectors] = {};
  if (p.add)
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) sums[i][j] = load(c + i * p.c_stride + j * kLanes);
  for (int64_t k = 0; k < p.depth; ++k) {
    const auto number = [&](int i) { return broadcast(a[i * p.a_stride + k]); };
    const auto vector = [&](int j) { return load(b + k * p.b_stride + j * kLanes); };
    if constexpr (Rows < Vectors) {
      Floats numbers[Rows];
      for (int i = 0; i < Rows; ++i) hold(numbers[i] = number(i));
      for (int j = 0; j < Vectors; ++j) {
        Floats y = vector(j);
        hold(y);
        for (int i = 0; i < Rows; ++i) sums[i][j] = fused(numbers[i], y, sums[i][j]);
      }
    } else {
      Floats vectors[Vectors];
      for (int j = 0; j < Vectors; ++j) hold(vectors[j] = vector(j));
      for (int i = 0; i < Rows; ++i) {
        Floats x = number(i);
        hold(x);
        for (int j = 0; j < Vectors; ++j) sums[i][j] = fused(x, vectors[j], sums[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) store(c + i * p.c_stride + j * kLanes, sums[i][j]);
}

// `Rows` rows of c, as many vectors at a time as registers hold, then what is left.
template <int Rows, int Vectors = vectors_for(Rows)>
void multiply_rows(const Product& p, int64_t row, int64_t col, int64_t cols) {
  for (; col + Vectors * kLanes <= cols; col += Vectors * kLanes) multiply_tile<Rows, Vectors>(p, row, col);
  if constexpr (Vectors > 1)
    if (col < cols) multiply_rows<Rows, Vectors / 2>(p, row, col, cols);
}

// cols is a number of whole vectors.
inline void multiply(const Product& p, int64_t rows, int64_t cols) {
  using Multiply = void (*)(const Product&, int64_t, int64_t, int64_t);
  static constexpr Multiply of_rows[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                         multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};
  static_assert(std::size(of_rows) == kProductRows);
  int64_t tiles = (rows + kProductRows - 1) / kProductRows;
  for (int64_t row = 0, step; row < rows; row += step, --tiles) {  // 7 rows as 4 and 3, not as 6 and 1
    step = (rows - row + tiles - 1) / tiles;
    of_rows[step - 1](p, row, 0, cols);
  }
}

}  // namespace jaxserve
