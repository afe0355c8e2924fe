// Products of small matrices, c [rows, cols] = a [rows, depth] · b [depth, cols], where b is made of cells.
//
// A cell is four bytes: one float, or two 16-bit numbers that are neighbours along the depth. A step of the depth
// is a row of cells, so a register of b has a lane per column whatever its numbers are.
// Each number of c is summed up in the order of the depth, whatever the shapes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "tiles.h"
#include "vector.h"

namespace jaxserve {

// ---- Forms: how a cell of b is multiplied, and what a is made of

// Of kLanes cells the nth number each, as floats.
inline Floats nth_of_cells(const float* p, int) { return load(p); }
inline Floats nth_of_cells(const BFloat16* p, int n) {
  const Words cells = read<Words>(p);
  return bits_as<Floats>(n ? cells & 0xffff0000u : cells << 16);
}
inline Floats nth_of_cells(const Float16* p, int n) {
  const Halves halves = __builtin_convertvector(read<Words>(p) >> (16 * n), Halves);
  Float16 numbers[kLanes];
  std::memcpy(numbers, &halves, sizeof numbers);
  return load(numbers);
}

struct NoUnit {
  ~NoUnit() {}
};

// Every number widened to a float: exact, in one or two products.
template <class T>
struct Widened {
  using Number = T;      // of b
  using Factor = float;  // of a
  static constexpr int kNumbers = 4 / sizeof(T);  // of a cell
  static constexpr int kProducts = kNumbers;
  using Unit = NoUnit;   // what a thread has while it multiplies
  // The shapes that it multiplies are multiples of these.
  static constexpr int64_t kRowStep = 1, kDepthStep = kNumbers, kColStep = kLanes;

  static Floats cells(const T* b, int product) { return nth_of_cells(b, product); }
  static Floats factor(const float* a, int product) { return broadcast(a[product]); }
  static Floats add(Floats sum, Floats factor, Floats cells) { return fused(factor, cells, sum); }
};

#ifdef __AVX512BF16__
// Pairs of bf16 numbers by pairs, in one instruction.
struct Pairs {
  using Number = BFloat16;
  using Factor = BFloat16;
  using Unit = NoUnit;
  static constexpr int kNumbers = 2, kProducts = 1;
  static constexpr int64_t kRowStep = 1, kDepthStep = kNumbers, kColStep = kLanes;

  static __m512bh cells(const BFloat16* b, int) { return read<__m512bh>(b); }
  static __m512bh factor(const BFloat16* a, int) { return bits_as<__m512bh>(_mm512_set1_epi32(read<int>(a))); }
  static Floats add(Floats sum, __m512bh factor, __m512bh cells) { return _mm512_dpbf16_ps(sum, factor, cells); }
};
#endif

#ifdef HAVE_TILES
// Pairs too, in the matrix units.
struct Tiles {
  using Number = BFloat16;
  using Factor = BFloat16;
  using Unit = TileUse;
  static constexpr int kNumbers = 2;
  static constexpr int64_t kRowStep = kTileSide, kDepthStep = 2 * kTileSide, kColStep = kTileSide;
};
#endif

// ---- What is multiplied

// Some steps of the depth: their rows of cells follow each other at the product's stride.
template <class Number>
struct Steps {
  const Number* cells;
  int64_t count;
  const Number* ahead;  // what is needed later and lies alike, or these: it is brought to the cache meanwhile
};

template <class Form>
struct Product {
  const typename Form::Factor* a;
  int64_t a_stride;
  const Steps<typename Form::Number>* b;  // `parts` of them, one after the other
  int64_t parts, b_stride;                // in numbers
  float* c;
  int64_t c_stride;
};

// ---- In vectors

// A tile of c is held in registers: its sums, and of a and b the fewer operands of a step, and one of the others.
constexpr int kProductRows = 6;
constexpr int vectors_for(int rows) { return rows == 1 ? 8 : rows <= 3 || kRegisters > 16 ? 4 : 2; }

template <class Form, int Rows, int Vectors>
void multiply_tile(const Product<Form>& p, int64_t row, int64_t col) {
  const auto* a = p.a + row * p.a_stride;
  Floats sums[Rows][Vectors] = {};
  for (int64_t part = 0; part < p.parts; ++part) {
    const auto* b = p.b[part].cells + col * Form::kNumbers;
    const auto* ahead = p.b[part].ahead + col * Form::kNumbers;
    for (int64_t step = 0; step < p.b[part].count; ++step, a += Form::kNumbers, b += p.b_stride, ahead += p.b_stride) {
      for (int j = 0; j < Vectors; ++j) __builtin_prefetch(ahead + j * kLanes * Form::kNumbers, 0, 2);
#pragma GCC unroll 2
      for (int product = 0; product < Form::kProducts; ++product) {
        const auto factor = [&](int i) { return Form::factor(a + i * p.a_stride, product); };
        const auto cells = [&](int j) { return Form::cells(b + j * kLanes * Form::kNumbers, product); };
        if constexpr (Rows < Vectors) {
          decltype(factor(0)) factors[Rows];
          for (int i = 0; i < Rows; ++i) hold(factors[i] = factor(i));
          for (int j = 0; j < Vectors; ++j) {
            auto y = cells(j);
            hold(y);
            for (int i = 0; i < Rows; ++i) sums[i][j] = Form::add(sums[i][j], factors[i], y);
          }
        } else {
          decltype(cells(0)) vectors[Vectors];
          for (int j = 0; j < Vectors; ++j) hold(vectors[j] = cells(j));
          for (int i = 0; i < Rows; ++i) {
            auto x = factor(i);
            hold(x);
            for (int j = 0; j < Vectors; ++j) sums[i][j] = Form::add(sums[i][j], x, vectors[j]);
          }
        }
      }
    }
  }
  float* c = p.c + row * p.c_stride + col;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) store(c + i * p.c_stride + j * kLanes, sums[i][j]);
}

// `Rows` rows of c, as many vectors at a time as registers hold, then what is left.
template <class Form, int Rows, int Vectors = vectors_for(Rows)>
void multiply_rows(const Product<Form>& p, int64_t row, int64_t col, int64_t cols) {
  for (; col + Vectors * kLanes <= cols; col += Vectors * kLanes) multiply_tile<Form, Rows, Vectors>(p, row, col);
  if constexpr (Vectors > 1)
    if (col < cols) multiply_rows<Form, Rows, Vectors / 2>(p, row, col, cols);
}

// rows, cols and the depth are multiples of the form's steps.
template <class Form>
void multiply(const Product<Form>& p, int64_t rows, int64_t cols) {
  using Multiply = void (*)(const Product<Form>&, int64_t, int64_t, int64_t);
  static constexpr Multiply of_rows[] = {multiply_rows<Form, 1>, multiply_rows<Form, 2>, multiply_rows<Form, 3>,
                                         multiply_rows<Form, 4>, multiply_rows<Form, 5>, multiply_rows<Form, 6>};
  static_assert(std::size(of_rows) == kProductRows);
  int64_t tiles = (rows + kProductRows - 1) / kProductRows;
  for (int64_t row = 0, step; row < rows; row += step, --tiles) {  // 7 rows as 4 and 3, not as 6 and 1
    step = (rows - row + tiles - 1) / tiles;
    of_rows[step - 1](p, row, 0, cols);
  }
}

#ifdef HAVE_TILES

// ---- In the matrix units

// Of c as many tiles as this: 0 to 3 are its sums, 4 and 5 are of a, 6 and 7 of b.
template <int Rows, int Cols>
void multiply_some(const Product<Tiles>& p, int64_t row, int64_t col) {
  const BFloat16* a = p.a + row * p.a_stride;
  const int64_t a_bytes = p.a_stride * sizeof *a, b_bytes = p.b_stride * sizeof *a, c_bytes = p.c_stride * sizeof(float);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t part = 0; part < p.parts; ++part) {
    const BFloat16* b = p.b[part].cells + col * Tiles::kNumbers;
    for (int64_t step = 0; step < p.b[part].count; step += kTileSide) {
      tile_load<4>(a, a_bytes);
      tile_load<6>(b, b_bytes);
      tile_multiply<0, 4, 6>();
      if constexpr (Cols == 2) {
        tile_load<7>(b + Tiles::kColStep * Tiles::kNumbers, b_bytes);
        tile_multiply<1, 4, 7>();
      }
      if constexpr (Rows == 2) {
        tile_load<5>(a + Tiles::kRowStep * p.a_stride, a_bytes);
        tile_multiply<2, 5, 6>();
        if constexpr (Cols == 2) tile_multiply<3, 5, 7>();
      }
      a += Tiles::kDepthStep;
      b += kTileSide * p.b_stride;
    }
  }
  float *c = p.c + row * p.c_stride + col, *below = c + Tiles::kRowStep * p.c_stride;
  tile_store<0>(c, c_bytes);
  if constexpr (Cols == 2) tile_store<1>(c + Tiles::kColStep, c_bytes);
  if constexpr (Rows == 2) tile_store<2>(below, c_bytes);
  if constexpr (Rows == 2 && Cols == 2) tile_store<3>(below + Tiles::kColStep, c_bytes);
}

template <int Rows>
void multiply_tiles(const Product<Tiles>& p, int64_t row, int64_t cols) {
  int64_t col = 0;
  for (; col + 2 * Tiles::kColStep <= cols; col += 2 * Tiles::kColStep) multiply_some<Rows, 2>(p, row, col);
  if (col < cols) multiply_some<Rows, 1>(p, row, col);
}

template <>
inline void multiply(const Product<Tiles>& p, int64_t rows, int64_t cols) {
  int64_t row = 0;
  for (; row + 2 * Tiles::kRowStep <= rows; row += 2 * Tiles::kRowStep) multiply_tiles<2>(p, row, cols);
  if (row < rows) multiply_tiles<1>(p, row, cols);
}

#endif

}  // namespace jaxserve
