// y [rows, outs] = x [rows, depth] · wᵀ for weights that are kept in tiles (see matmul/tiles.py):
//
//     w [outs / 16, cells, 16]        a cell has four bytes of one output: neighbours along the depth
//
// A register of cells has as many outputs as lanes, and is multiplied by one cell of x in all lanes. A tile is read
// from its begin to its end, and is what matrix units (AMX) take as it is.
//
// Every number of y is one sum in the order of the depth, a block of it after the other, whatever else is computed:
// a row's bits do not depend on the other rows.
//
// What is multiplied is a Unit's business. It has
//     Number          of x; a cell of w meets kPerCell of them
//     Sum, Sums       of y: one, and a register of them
//     Cells           kRegistersPerCells registers: what load(Cell*) makes of one of w
//     add(x, w, sums) the sums, and in each lane the product of a cell of x and one of w
//     kBlock          cells of the depth that are summed up at a time
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "functions.h"
#include "parallel.h"
#include "tiles.h"
#include "vector.h"

namespace jaxserve {

constexpr int kOuts = 16;  // of a tile
// A few tiles of so many cells of the depth stay in the second cache, and so do as many rows of x.
constexpr int64_t kBlock = 1024;
constexpr int64_t kRowsPerTask = 192;

using Cell = uint32_t;

// A product or a part of it: y [rows, tiles * kOuts] (+)= x [rows, cells * kPerCell] · w.
template <class Unit>
struct TiledProduct {
  const typename Unit::Number* x;
  int64_t x_stride;
  const Cell* w;
  int64_t w_stride;  // from tile to tile
  typename Unit::Sum* y;
  int64_t y_stride;
  int64_t rows, tiles, cells;
  bool add;

  TiledProduct of(int64_t row, int64_t tile, int64_t rows, int64_t tiles) const {
    return {x + row * x_stride, x_stride, w + tile * w_stride, w_stride, y + row * y_stride + tile * kOuts, y_stride,
            rows,  tiles, cells, add};
  }
};

// ---- Vector registers

inline void store(uint32_t* p, Words v) { std::memcpy(p, &v, sizeof v); }

// Tiles of y in registers: Rows rows of x by Tiles tiles of w.
template <class Unit, int Rows, int Tiles>
void multiply_tiles(const TiledProduct<Unit>& p) {
  using Sums = typename Unit::Sums;
  constexpr int kPerTile = kOuts / kLanes, kVectors = Tiles * kPerTile;
  Sums sums[Rows][kVectors] = {};
  for (int64_t k = 0; k < p.cells; ++k) {
    typename Unit::Cells cells[kVectors];
    for (int v = 0; v < kVectors; ++v)
      cells[v] = Unit::load(p.w + v / kPerTile * p.w_stride + k * kOuts + v % kPerTile * kLanes);
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < kVectors; ++v)
        sums[i][v] = Unit::add(p.x + i * p.x_stride + k * Unit::kPerCell, cells[v], sums[i][v]);
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      typename Unit::Sum* to = p.y + i * p.y_stride + v * kLanes;
      store(to, p.add ? read<Sums>(to) + sums[i][v] : sums[i][v]);
    }
}

// Registers hold the sums of some rows by some tiles, the cells of these tiles, and one of x. So many tiles there may
// be beside `rows` rows, of which six are a task ...
template <class Unit>
constexpr int tiles_at_once(int rows) {
  const int most = (kRegisters - 1) * kLanes / kOuts / (rows + Unit::kRegistersPerCells);
  return most >= 6 ? 6 : most >= 3 ? 3 : 1;
}
// ... and so many rows beside three tiles, or the one that fewer registers have room for.
template <class Unit>
constexpr int rows_at_once() {
  constexpr int kTiles = kRegisters < 32 ? 1 : 3;
  return std::min(8, (kRegisters - 1) * kLanes / kOuts / kTiles - Unit::kRegistersPerCells);
}

// Up to Rows rows, as many tiles at a time as there are registers for.
template <class Unit, int Rows = rows_at_once<Unit>()>
void multiply_rows(const TiledProduct<Unit>& p) {
  constexpr int kMost = tiles_at_once<Unit>(Rows);
  if constexpr (Rows > 1)
    if (p.rows < Rows) return multiply_rows<Unit, Rows - 1>(p);
  int64_t tile = 0;
  for (; tile + kMost <= p.tiles; tile += kMost) multiply_tiles<Unit, Rows, kMost>(p.of(0, tile, Rows, kMost));
  for (; tile < p.tiles; ++tile) multiply_tiles<Unit, Rows, 1>(p.of(0, tile, Rows, 1));
}

template <class Unit>
struct Vectors : Unit {
  static constexpr int64_t kRowsRead = 1, kTilesPerTask = 6;
  static void multiply(const TiledProduct<Vectors>& p) {
    constexpr int64_t kAtOnce = rows_at_once<Unit>();
    for (int64_t row = 0; row < p.rows; row += kAtOnce)
      multiply_rows(p.of(row, 0, std::min(kAtOnce, p.rows - row), p.tiles));
  }
};

// ---- Matrix units

#ifdef HAVE_TILES
template <int... I, class Body>
void each(std::integer_sequence<int, I...>, const Body& body) {
  (body(std::integral_constant<int, I>()), ...);
}
// body(0), body(1) ... with numbers that the compiler knows.
template <int Count, class Body>
void each(const Body& body) {
  each(std::make_integer_sequence<int, Count>(), body);
}

// Unit has Number, Sum, kPerCell, kBlock and multiply_tile<Sums, A, B>(), which multiplies tiles.
template <class Unit>
struct Matrices : Unit {
  static constexpr int64_t kRowsRead = kTileSide;  // x has rows up to a multiple of this
  static constexpr int64_t kTilesPerTask = 4;

  static void multiply(const TiledProduct<Matrices>& p) {
    const TileUse use;
    int64_t row = 0;
    for (; p.rows - row > kTileSide; row += 2 * kTileSide) blocks<2, 2>(p.of(row, 0, p.rows - row, p.tiles));
    if (row < p.rows) blocks<1, 4>(p.of(row, 0, p.rows - row, p.tiles));
  }

 private:
  template <int Rows, int Outs>
  static void blocks(const TiledProduct<Matrices>& p) {
    int64_t tile = 0;
    for (; tile + Outs <= p.tiles; tile += Outs) block<Rows, Outs>(p.of(0, tile, p.rows, Outs));
    for (; tile < p.tiles; ++tile) block<Rows, 1>(p.of(0, tile, p.rows, 1));
  }

  // Rows x Outs tiles of y: they are tiles 0 to 3, those of x are 4 and 5, of w 6 and 7.
  template <int Rows, int Outs>
  static void block(const TiledProduct<Matrices>& p) {
    each<Rows * Outs>([](auto sums) { tile_zero<sums>(); });
    const int64_t x_bytes = p.x_stride * sizeof *p.x;
    for (int64_t k = 0; k < p.cells; k += kTileSide) {
      each<Rows>([&](auto i) { tile_load<4 + i>(p.x + i * kTileSide * p.x_stride + k * Unit::kPerCell, x_bytes); });
      each<Outs>([&](auto j) {
        tile_load<6 + j % 2>(p.w + j * p.w_stride + k * kOuts, kTileBytes);
        constexpr int out = j;
        each<Rows>([](auto i) { Unit::template multiply_tile<i * Outs + out, 4 + i, 6 + out % 2>(); });
      });
    }
    each<Rows * Outs>([&](auto sums) {
      typename Unit::Sum made[kTileSide][kOuts];
      tile_store<sums>(made, kTileBytes);
      const int64_t first = sums / Outs * kTileSide;
      for (int64_t i = first; i < std::min<int64_t>(p.rows, first + kTileSide); ++i) {
        auto* to = p.y + i * p.y_stride + sums % Outs * kOuts;
        for (int j = 0; j < kOuts; ++j) to[j] = p.add ? to[j] + made[i - first][j] : made[i - first][j];
      }
    });
  }
};
#endif

// ---- The whole product

// How many rows of x have to be there, for a unit that reads some at once.
template <class Unit>
int64_t rows_read(int64_t rows) {
  return (rows + Unit::kRowsRead - 1) / Unit::kRowsRead * Unit::kRowsRead;
}

// prepare(row) for all rows, many of them at a time.
template <class Prepare>
void for_rows(xla::ffi::ThreadPool& pool, int64_t rows, const Prepare& prepare) {
  parallel_for(pool, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    for (int64_t row = task * kRowsPerTask; row < std::min(rows, (task + 1) * kRowsPerTask); ++row) prepare(row);
  });
}

// How many tiles a task takes: as many as a unit likes best, or half of them if that divides the work more evenly.
template <class Unit>
int64_t tiles_per_task(int64_t tiles, int64_t threads) {
  constexpr int64_t kMost = Unit::kTilesPerTask;
  threads = std::max<int64_t>(1, threads);
  const auto longest = [&](int64_t each) { return ((tiles + each - 1) / each + threads - 1) / threads * each; };
  return longest(kMost / 2) < longest(kMost) ? kMost / 2 : kMost;
}

// One part over all of its depth, a block after the other.
template <class Unit>
void multiply_part(TiledProduct<Unit> part) {
  const int64_t cells = part.cells;
  for (int64_t done = 0; done < cells; done += part.cells) {
    part.cells = std::min(Unit::kBlock, cells - done);
    part.add = done > 0;
    Unit::multiply(part);
    part.x += part.cells * Unit::kPerCell, part.w += part.cells * kOuts;
  }
}

// body(row, tile, rows, tiles) for parts of so many rows and tiles.
template <class Unit, class Body>
void for_parts(xla::ffi::ThreadPool& pool, int64_t rows, int64_t tiles, const Body& body) {
  const int64_t each = tiles_per_task<Unit>(tiles, pool.num_threads());
  const int64_t panels = (tiles + each - 1) / each, chunks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(pool, panels * chunks, [&](int64_t task) {
    const int64_t row = task / panels * kRowsPerTask, tile = task % panels * each;
    body(row, tile, std::min(kRowsPerTask, rows - row), std::min(each, tiles - tile));
  });
}

// Calls finish(row, tile, part) with each part of y that is complete.
template <class Unit, class Finish>
void multiply(xla::ffi::ThreadPool& pool, const TiledProduct<Unit>& whole, const Finish& finish) {
  for_parts<Unit>(pool, whole.rows, whole.tiles, [&](int64_t row, int64_t tile, int64_t rows, int64_t tiles) {
    const auto part = whole.of(row, tile, rows, tiles);
    multiply_part(part);
    finish(row, tile, part);
  });
}

// y [rows, tiles / 2 * kOuts] = activate(gate) * up, where the first half of the tiles gives the gate and the other
// half what passes it. Both are worked out a part at a time and never written down; finish is called with them.
template <class Unit, class Finish, class Activate>
void multiply_gated(xla::ffi::ThreadPool& pool, const TiledProduct<Unit>& whole, float* y, const Finish& finish,
                    const Activate& activate) {
  const int64_t half = whole.tiles / 2, y_stride = half * kOuts;
  for_parts<Unit>(pool, whole.rows, half, [&](int64_t row, int64_t tile, int64_t rows, int64_t tiles) {
    static thread_local std::vector<typename Unit::Sum> sums;
    const int64_t outs = tiles * kOuts;
    sums.resize(2 * rows * outs);
    for (int i = 0; i < 2; ++i) {
      auto part = whole.of(row, i * half + tile, rows, tiles);
      part.y = sums.data() + i * rows * outs, part.y_stride = outs;
      multiply_part(part);
      finish(row, i * half + tile, part);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < outs; j += kLanes) {
        const Floats gate = read<Floats>(&sums[i * outs + j]), up = read<Floats>(&sums[(rows + i) * outs + j]);
        store(y + (row + i) * y_stride + tile * kOuts + j, activate(gate) * up);
      }
  });
}

// What a gate may be, by the number that Python calls it (cpu.py).
enum class Gate : int32_t { kSilu, kGeluTanh, kRelu };

// body(activate) with the function of a gate.
template <class Body>
void with_activation(Gate gate, const Body& body) {
  switch (gate) {
    case Gate::kSilu:
      return body([](Floats x) {
        const Floats power = -kLog2E * x;
        return x / (1.0f + exp2(power > 126.0f ? broadcast(126.0f) : power));
      });
    case Gate::kGeluTanh:
      return body([](Floats x) { return 0.5f * x * (1.0f + tanh(0.79788456f * fused(0.044715f * x * x, x, x))); });
    case Gate::kRelu: return body([](Floats x) { return larger(Floats{}, x); });
  }
}

}  // namespace jaxserve
