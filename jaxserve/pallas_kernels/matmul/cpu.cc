// The product with weights of type NUMBER, float or one of 16 bits (native/tiled_product.h says how).
//
// With bf16 weights x is rounded to bf16 where the processor multiplies pairs of bf16 numbers; it is read as float32
// elsewhere.
//
// Only the first `used` rows are multiplied: the others are padding, and their y is zero.

#include <vector>

#include "tiled_product.h"

namespace ffi = xla::ffi;

namespace jaxserve {
namespace {

// ---- What a processor multiplies: a register of cells by one cell of x

// float32, as it is.
struct Singles {
  using Number = float;
  using Sum = float;
  using Sums = Floats;
  using Cells = Floats;
  static constexpr int kPerCell = 1, kRegistersPerCells = 1;
  static constexpr int64_t kBlock = 128;  // short sums of float32 lose fewer digits
  static Cells load(const Cell* p) { return read<Floats>(p); }
  static Sums add(const Number* x, Cells w, Sums sum) { return fused(broadcast(*x), w, sum); }
};

// 16-bit numbers, widened to two registers of floats.
template <class Half>
struct Widened {
  using Number = float;
  using Sum = float;
  using Sums = Floats;
  struct Cells {
    Floats even, odd;
  };
  static constexpr int kPerCell = 2, kRegistersPerCells = 2;
  static constexpr int64_t kBlock = jaxserve::kBlock;
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
  static Sums add(const Number* x, const Cells& w, Sums sum) {
    return fused(broadcast(x[1]), w.odd, fused(broadcast(x[0]), w.even, sum));
  }
};

#ifdef __AVX512BF16__
// Pairs of bf16.
struct Pairs {
  using Number = BFloat16;
  using Sum = float;
  using Sums = Floats;
  using Cells = __m512bh;
  static constexpr int kPerCell = 2, kRegistersPerCells = 1;
  static constexpr int64_t kBlock = jaxserve::kBlock;
  static Cells load(const Cell* p) {
    Cells cells = read<__m512bh>(p);
    hold(cells);
    return cells;
  }
  static Sums add(const Number* x, Cells w, Sums sum) {
    return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(_mm512_set1_epi32(read<int32_t>(x))), w);
  }
};
using HalvesOfBFloat16 = Pairs;
#else
using HalvesOfBFloat16 = Widened<BFloat16>;
#endif

using Halved = std::conditional_t<std::is_same_v<NUMBER, BFloat16>, HalvesOfBFloat16, Widened<NUMBER>>;
using Best = std::conditional_t<std::is_same_v<NUMBER, float>, Singles, Halved>;

#ifdef HAVE_TILES
struct TilesOfPairs {
  using Number = BFloat16;
  using Sum = float;
  static constexpr int kPerCell = 2;
  static constexpr int64_t kBlock = jaxserve::kBlock;
  template <int Sums, int A, int B>
  static void multiply_tile() { tile_multiply<Sums, A, B>(); }
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
  prepared.resize(rows_read<Unit>(rows) * stride);
  Number* to = prepared.data();
  for_rows(pool, rows, [&](int64_t row) {
    round(x + row * depth, depth, to + row * stride);
    std::fill(to + row * stride + depth, to + (row + 1) * stride, Number{});
  });
  return to;
}

constexpr int64_t kPerCell = sizeof(Cell) / sizeof(NUMBER);

using Floats32 = ffi::Buffer<ffi::F32>;
using Count = ffi::BufferR0<ffi::S32>;

// Calls body(whole) with the product of x and w [tiles, cells, kOuts, kPerCell], whose y is [rows, tiles * kOuts]; the
// rows of `y` that are padding become zeros.
template <class Body>
ffi::Error with_product(ffi::ThreadPool& pool, Floats32 x, ffi::AnyBuffer w, Count used, ffi::Result<Floats32>& y,
                        int64_t columns, const Body& body) {
  const int64_t rows = std::clamp<int64_t>(used.typed_data()[0], 0, x.dimensions()[0]);
  const int64_t depth = x.dimensions()[1], tiles = w.dimensions()[0], cells = w.dimensions()[1];
  if (ffi::ByteWidth(w.element_type()) != sizeof(NUMBER) || w.dimensions()[2] != kOuts || w.dimensions()[3] != kPerCell)
    return ffi::Error::InvalidArgument("matmul: the weights are not in tiles");
  if (depth > cells * kPerCell || y->dimensions()[1] != columns)
    return ffi::Error::InvalidArgument("matmul: wrong shapes");
  std::fill(y->typed_data() + rows * columns, y->typed_data() + y->element_count(), 0.0f);
  const auto run = [&](auto unit) {
    using Unit = decltype(unit);
    const int64_t stride = cells * kPerCell;
    body(TiledProduct<Unit>{prepare<Unit>(pool, x.typed_data(), rows, depth, stride), stride,
                            static_cast<const Cell*>(w.untyped_data()), cells * kOuts, y->typed_data(), tiles * kOuts,
                            rows, tiles, cells, false});
    return ffi::Error::Success();
  };
#ifdef HAVE_TILES
  if (std::is_same_v<NUMBER, BFloat16> && tiles_allowed()) return run(Matrices<TilesOfPairs>());
#endif
  return run(Vectors<Best>());
}

ffi::Error matmul_handler(ffi::ThreadPool pool, Floats32 x, ffi::AnyBuffer w, Count used, ffi::Result<Floats32> y) {
  return with_product(pool, x, w, used, y, w.dimensions()[0] * kOuts,
                      [&](const auto& whole) { multiply(pool, whole, [](auto...) {}); });
}

ffi::Error gated_handler(ffi::ThreadPool pool, Floats32 x, ffi::AnyBuffer w, Count used, ffi::Result<Floats32> y,
                         int32_t gate) {
  return with_product(pool, x, w, used, y, w.dimensions()[0] / 2 * kOuts, [&](const auto& whole) {
    with_activation(Gate(gate), [&](const auto& activate) {
      multiply_gated(pool, whole, y->typed_data(), [](auto...) {}, activate);
    });
  });
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(gated, jaxserve::gated_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<jaxserve::Floats32>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<jaxserve::Count>()
                                  .Ret<jaxserve::Floats32>()
                                  .Attr<int32_t>("gate"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    matmul, jaxserve::matmul_handler,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<jaxserve::Floats32>()
        .Arg<ffi::AnyBuffer>()
        .Arg<jaxserve::Count>()
        .Ret<jaxserve::Floats32>());
