// y [rows, outs] = x [rows, depth] · wᵀ for weights of type NUMBER that are kept in tiles (see tiles.py):
//
//     w [outs / 16, cells, 16]        a cell has four bytes of one output: a float32, or two 16-bit neighbours
//
// A register of cells has as many outputs as lanes, and is multiplied by one cell of x in all lanes. A tile is read
// from its begin to its end, and is what matrix units (AMX) take as it is.
//
// Only the first `used` rows are multiplied: the others are padding, and their y is zero.
//
// Every number of y is one sum in the order of the depth, a block of it after the other, whatever else is computed:
// a row's bits do not depend on the other rows. With bf16 weights x is rounded to bf16 where the processor
// multiplies pairs of bf16 numbers; it is read as float32 elsewhere.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "tiles.h"
#include "vector.h"

namespace ffi = xla::ffi;

namespace jaxserve {
namespace {

constexpr int kOuts = 16;  // of a tile
constexpr int64_t kPerCell = 4 / sizeof(NUMBER);
// Cells of the depth that are summed up at a time: a few tiles of them stay in the second cache. Short sums of
// float32 lose fewer digits.
constexpr int64_t kBlock = sizeof(NUMBER) == 4 ? 128 : 1024;
// And so do as many rows of x.
constexpr int64_t kRowsPerTask = 192;

using Cell = uint32_t;

// A product or a part of it: y [rows, tiles * kOuts] (+)= x [rows, cells * kPerCell] · w.
template <class Number>
struct Product {
  const Number* x;
  int64_t x_stride;
  const Cell* w;
  int64_t w_stride;  // from tile to tile
  float* y;
  int64_t y_stride;
  int64_t rows, tiles, cells;
  bool add;

  Product of(int64_t row, int64_t tile, int64_t rows, int64_t tiles) const {
    return {x + row * x_stride, x_stride, w + tile * w_stride, w_stride, y + row * y_stride + tile * kOuts, y_stride,
            rows,  tiles, cells, add};
  }
};

// ---- What a processor multiplies: a register of cells by one cell of x

// float32, as it is.
struct Singles {
  using Number = float;
  static constexpr int kRows = 6, kRegistersPerCells = 1;
  using Cells = Floats;
  static Cells load(const Cell* p) { return read<Floats>(p); }
  static Floats add(const Number* x, Cells w, Floats sum) { return fused(broadcast(*x), w, sum); }
};

// 16-bit numbers, widened to two registers of floats.
template <class Half>
struct Widened {
  using Number = float;
  static constexpr int kRows = 5, kRegistersPerCells = 2;
  struct Cells {
    Floats even, odd;
  };
  static Cells load(const Cell* p) {
    const Words cells = read<Words>(p);
    if constexpr (std::is_same_v<Half, BFloat16>) {
      return {bits_as<Floats>(cells << 16), bits_as<Floats>(cells & 0xffff0000u)};
    } else {
      const Halves even = __builtin_convertvector(cells, Halves), odd = __builtin_convertvector(cells >> 16, Halves);
      Float16 halves[2][kLanes];
      std::memcpy(halves[0], &even, sizeof even), std::memcpy(halves[1], &odd, sizeof odd);
      return {jaxserve::load(halves[0]), jaxserve::load(halves[1])};
    }
  }
  static Floats add(const Number* x, const Cells& w, Floats sum) {
    return fused(broadcast(x[1]), w.odd, fused(broadcast(x[0]), w.even, sum));
  }
};

#ifdef __AVX512BF16__
// Pairs of bf16.
struct Pairs {
  using Number = BFloat16;
  static constexpr int kRows = 6, kRegistersPerCells = 1;
  using Cells = __m512bh;
  static Cells load(const Cell* p) {
    Cells cells = read<__m512bh>(p);
    hold(cells);
    return cells;
  }
  static Floats add(const Number* x, Cells w, Floats sum) {
    return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(_mm512_set1_epi32(read<int32_t>(x))), w);
  }
};
#endif

#ifdef __AVX512BF16__
using Halved = std::conditional_t<std::is_same_v<NUMBER, BFloat16>, Pairs, Widened<NUMBER>>;
#else
using Halved = Widened<NUMBER>;
#endif
using Best = std::conditional_t<std::is_same_v<NUMBER, float>, Singles, Halved>;

// ---- Vector registers

// Tiles of y in registers: Rows rows of x by Tiles tiles of w.
template <class Unit, int Rows, int Tiles>
void multiply_tiles(const Product<typename Unit::Number>& p) {
  constexpr int kPerTile = kOuts / kLanes, kVectors = Tiles * kPerTile;
  Floats sums[Rows][kVectors] = {};
  for (int64_t k = 0; k < p.cells; ++k) {
    typename Unit::Cells cells[kVectors];
    for (int v = 0; v < kVectors; ++v)
      cells[v] = Unit::load(p.w + v / kPerTile * p.w_stride + k * kOuts + v % kPerTile * kLanes);
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < kVectors; ++v)
        sums[i][v] = Unit::add(p.x + i * p.x_stride + k * kPerCell, cells[v], sums[i][v]);
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      float* to = p.y + i * p.y_stride + v * kLanes;
      store(to, p.add ? load(to) + sums[i][v] : sums[i][v]);
    }
}

// Up to Rows rows, as many tiles at a time as there are registers for.
template <class Unit, int Rows = Unit::kRows>
void multiply_rows(const Product<typename Unit::Number>& p) {
  constexpr int kMost = kRegisters * kLanes / kOuts / (Unit::kRows + Unit::kRegistersPerCells + 1);
  if constexpr (Rows > 1)
    if (p.rows < Rows) return multiply_rows<Unit, Rows - 1>(p);
  int64_t tile = 0;
  for (; tile + kMost <= p.tiles; tile += kMost) multiply_tiles<Unit, Rows, kMost>(p.of(0, tile, Rows, kMost));
  for (; tile < p.tiles; ++tile) multiply_tiles<Unit, Rows, 1>(p.of(0, tile, Rows, 1));
}

template <class Processor>
struct Vectors {
  using Number = typename Processor::Number;
  static constexpr int64_t kRowsAtOnce = Processor::kRows;
  static constexpr int64_t kRowsRead = 1;
  static void multiply(const Product<Number>& p) {
    for (int64_t row = 0; row < p.rows; row += kRowsAtOnce)
      multiply_rows<Processor>(p.of(row, 0, std::min(kRowsAtOnce, p.rows - row), p.tiles));
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

struct Tiles {
  using Number = BFloat16;
  static constexpr int64_t kRowsRead = kTileSide;  // x has rows up to a multiple of this

  static void multiply(const Product<Number>& p) {
    const TileUse use;
    int64_t row = 0;
    for (; p.rows - row > kTileSide; row += 2 * kTileSide) blocks<2, 2>(p.of(row, 0, p.rows - row, p.tiles));
    if (row < p.rows) blocks<1, 4>(p.of(row, 0, p.rows - row, p.tiles));
  }

 private:
  template <int Rows, int Outs>
  static void blocks(const Product<Number>& p) {
    int64_t tile = 0;
    for (; tile + Outs <= p.tiles; tile += Outs) block<Rows, Outs>(p.of(0, tile, p.rows, Outs));
    for (; tile < p.tiles; ++tile) block<Rows, 1>(p.of(0, tile, p.rows, 1));
  }

  // Rows x Outs tiles of y: they are tiles 0 to 3, those of x are 4 and 5, of w 6 and 7.
  template <int Rows, int Outs>
  static void block(const Product<Number>& p) {
    each<Rows * Outs>([](auto sums) { tile_zero<sums>(); });
    for (int64_t k = 0; k < p.cells; k += kTileSide) {
      each<Rows>([&](auto i) { tile_load<4 + i>(p.x + i * kTileSide * p.x_stride + k * kPerCell, p.x_stride * 2); });
      each<Outs>([&](auto j) {
        tile_load<6 + j % 2>(p.w + j * p.w_stride + k * kOuts, kTileBytes);
        each<Rows>([](auto i) { tile_multiply<i * Outs + j, 4 + i, 6 + j % 2>(); });
      });
    }
    each<Rows * Outs>([&](auto sums) {
      float made[kTileSide][kOuts];
      tile_store<sums>(made, kTileBytes);
      const int64_t first = sums / Outs * kTileSide;
      for (int64_t i = first; i < std::min<int64_t>(p.rows, first + kTileSide); ++i) {
        float* to = p.y + i * p.y_stride + sums % Outs * kOuts;
        for (int j = 0; j < kOuts; ++j) to[j] = p.add ? to[j] + made[i - first][j] : made[i - first][j];
      }
    });
  }
};
#endif

// ---- The whole product

// The rows of x as a unit reads them: of its type, whole cells, and as many rows as it reads at once.
template <class Unit>
const typename Unit::Number* prepare(ffi::ThreadPool& pool, const float* x, int64_t rows, int64_t depth, int64_t stride) {
  using Number = typename Unit::Number;
  if constexpr (std::is_same_v<Number, float>)
    if (depth == stride) return x;
  static thread_local std::vector<Number> prepared;
  prepared.resize((rows + Unit::kRowsRead - 1) / Unit::kRowsRead * Unit::kRowsRead * stride);
  Number* to = prepared.data();
  parallel_for(pool, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
      round(x + i * depth, depth, to + i * stride);
      std::fill(to + i * stride + depth, to + (i + 1) * stride, Number{});
    }
  });
  return to;
}

// How many tiles a task takes: what is read well at once, or one less if that divides the work more evenly.
int64_t tiles_per_task(int64_t tiles, int64_t threads) {
  const auto longest = [&](int64_t each) { return ((tiles + each - 1) / each + threads - 1) / threads * each; };
  return longest(3) < longest(4) ? 3 : 4;
}

template <class Unit>
void multiply(ffi::ThreadPool& pool, const float* x, int64_t rows, int64_t depth, const Cell* w, int64_t tiles,
              int64_t cells, float* y) {
  const int64_t stride = cells * kPerCell;
  const Product<typename Unit::Number> whole{
      prepare<Unit>(pool, x, rows, depth, stride), stride, w, cells * kOuts, y, tiles * kOuts, rows, tiles, cells, false};
  const int64_t each = tiles_per_task(tiles, pool.num_threads());
  const int64_t panels = (tiles + each - 1) / each, chunks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(pool, panels * chunks, [&](int64_t task) {
    const int64_t row = task / panels * kRowsPerTask, tile = task % panels * each;
    auto part = whole.of(row, tile, std::min(kRowsPerTask, rows - row), std::min(each, tiles - tile));
    for (int64_t done = 0; done < cells; done += part.cells) {
      part.cells = std::min(kBlock, cells - done);
      part.add = done > 0;
      Unit::multiply(part);
      part.x += part.cells * kPerCell, part.w += part.cells * kOuts;
    }
  });
}

// w [tiles, cells, kOuts, kPerCell], y [rows, tiles * kOuts]
ffi::Error matmul_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::BufferR0<ffi::S32> used,
                          ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = std::clamp<int64_t>(used.typed_data()[0], 0, x.dimensions()[0]);
  const int64_t depth = x.dimensions()[1], tiles = w.dimensions()[0], cells = w.dimensions()[1];
  if (ffi::ByteWidth(w.element_type()) != sizeof(NUMBER) || w.dimensions()[2] != kOuts || w.dimensions()[3] != kPerCell)
    return ffi::Error::InvalidArgument("matmul: the weights are not in tiles");
  if (depth > cells * kPerCell || y->dimensions()[1] != tiles * kOuts)
    return ffi::Error::InvalidArgument("matmul: wrong shapes");
  std::fill(y->typed_data() + rows * tiles * kOuts, y->typed_data() + y->element_count(), 0.0f);
  const auto run = [&](auto unit) {
    multiply<decltype(unit)>(pool, x.typed_data(), rows, depth, static_cast<const Cell*>(w.untyped_data()), tiles, cells,
                             y->typed_data());
  };
#ifdef HAVE_TILES
  if (std::is_same_v<NUMBER, BFloat16> && tiles_allowed()) {
    run(Tiles());
    return ffi::Error::Success();
  }
#endif
  run(Vectors<Best>());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    matmul, jaxserve::matmul_handler,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::BufferR0<ffi::S32>>()
        .Ret<ffi::Buffer<ffi::F32>>());
