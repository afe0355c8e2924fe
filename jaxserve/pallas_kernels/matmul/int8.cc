// The product of 8-bit integers (W8A8; native/tiled_product.h says how; int8.py has the scheme):
//
//     y = float(x8 · w8ᵀ) * scale of x's row * scale of w's output
//
// x is brought to 8 bits here, each row by its own largest number. Weights are kept as w8 + 128, without a sign, as
// processors multiply a signed by an unsigned byte: 128 times the sum of x8 is taken off at the end. All sums are of
// integers, modulo 2^32: exact, in any order.
//
// Only the first `used` rows are multiplied: the others are padding, and their y is zero.

#include <cmath>
#include <vector>

#include "tiled_product.h"

namespace ffi = xla::ffi;

namespace jaxserve {
namespace {

constexpr int kPerCell = 4;
constexpr uint32_t kOffset = 128;  // of the weights

// ---- What a processor multiplies: a register of cells by one cell of x

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
// Fours of bytes.
struct Fours {
  using Number = int8_t;
  using Sum = uint32_t;
  using Sums = Words;
  using Cells = Words;
  static constexpr int kPerCell = 4, kRegistersPerCells = 1;
  static constexpr int64_t kBlock = jaxserve::kBlock;
  static Cells load(const Cell* p) {
    Cells cells = read<Words>(p);
    asm("" : "+v"(cells));  // compilers like to read it again for each use
    return cells;
  }
  static Sums add(const Number* x, Cells w, Sums sum) {
#ifdef __AVX512VNNI__
    return bits_as<Words>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(w), _mm512_set1_epi32(read<int32_t>(x))));
#else
    return bits_as<Words>(_mm256_dpbusd_avx_epi32(bits_as<__m256i>(sum), bits_as<__m256i>(w), _mm256_set1_epi32(read<int32_t>(x))));
#endif
  }
};
using Best = Fours;
#else
// a + b of the products of pairs of 16-bit numbers, those of w below 2^15.
inline Words multiply_pairs(Words w, const int16_t* x) {
#if defined(__AVX512BW__)
  return bits_as<Words>(_mm512_madd_epi16(bits_as<__m512i>(w), _mm512_set1_epi32(read<int32_t>(x))));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return bits_as<Words>(_mm256_madd_epi16(bits_as<__m256i>(w), _mm256_set1_epi32(read<int32_t>(x))));
#else
  return (w & 0xffffu) * uint32_t(x[0]) + (w >> 16) * uint32_t(x[1]);
#endif
}

// Bytes widened to pairs of 16-bit numbers: sums of two products of bytes do not fit the 16 bits that AVX2 has for
// them. x has the numbers of a cell in the order 0, 2, 1, 3.
struct Widened {
  using Number = int16_t;
  using Sum = uint32_t;
  using Sums = Words;
  struct Cells {
    Words even, odd;
  };
  static constexpr int kPerCell = 4, kRegistersPerCells = 2;
  static constexpr int64_t kBlock = jaxserve::kBlock;
  static Cells load(const Cell* p) {
    const Words cells = read<Words>(p);
    return {cells & 0x00ff00ffu, cells >> 8 & 0x00ff00ffu};
  }
  static Sums add(const Number* x, const Cells& w, Sums sum) {
    return sum + multiply_pairs(w.even, x) + multiply_pairs(w.odd, x + 2);
  }
};
using Best = Widened;
#endif

#if defined(HAVE_TILES) && (defined(__AMX_INT8__) || defined(EMULATE_AMX))
#define HAVE_TILES_OF_BYTES 1
struct TilesOfBytes {
  using Number = int8_t;
  using Sum = uint32_t;
  static constexpr int kPerCell = 4;
  static constexpr int64_t kBlock = jaxserve::kBlock;
  template <int Sums, int A, int B>
  static void multiply_tile() { tile_multiply_bytes<Sums, A, B>(); }
};
#endif

// ---- x in 8 bits

struct Row {
  float scale;
  uint32_t sum;
};

// The largest absolute value, a NaN or infinity above all numbers. The bits of floats without a sign are in their order.
inline float largest_absolute(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_as<uint32_t>(x[i]) & 0x7fffffffu);
  return bits_as<float>(largest);
}

inline int32_t rounded(float x) { return int32_t(std::rint(x)); }

inline void place(const float* x, float factor, int64_t cells, int8_t* to) {
  for (int64_t i = 0; i < cells * kPerCell; ++i) to[i] = int8_t(rounded(x[i] * factor));
}
inline void place(const float* x, float factor, int64_t cells, int16_t* to) {
  for (int64_t i = 0; i < cells * kPerCell; i += kPerCell) {
    to[i] = int16_t(rounded(x[i] * factor)), to[i + 1] = int16_t(rounded(x[i + 2] * factor));
    to[i + 2] = int16_t(rounded(x[i + 1] * factor)), to[i + 3] = int16_t(rounded(x[i + 3] * factor));
  }
}

// A row of x [depth], and zeros up to `cells`. A NaN or infinity leaves its scale no number, and so all of its y.
template <class Number>
Row quantise(const float* x, int64_t depth, int64_t cells, Number* to) {
  constexpr float kMost = 127.0f, kLeast = 1e-30f;  // keeps 1 / scale finite
  const float found = largest_absolute(x, depth), largest = found < kLeast ? kLeast : found;
  const int64_t whole = depth / kPerCell;
  place(x, kMost / largest, whole, to);
  for (int64_t cell = whole; cell < cells; ++cell) {
    float last[kPerCell] = {};
    for (int64_t i = cell * kPerCell; i < depth; ++i) last[i % kPerCell] = x[i];
    place(last, kMost / largest, 1, to + cell * kPerCell);
  }
  uint32_t sum = 0;
  for (int64_t i = 0; i < cells * kPerCell; ++i) sum += uint32_t(to[i]);
  return {largest * (1.0f / kMost), sum};
}

// ---- The whole product

// Sums that are complete become floats, in their place.
inline void scale(uint32_t* y, int64_t outs, Row row, const float* scales) {
  for (int64_t i = 0; i < outs; ++i) {
    const float value = float(int32_t(y[i] - kOffset * row.sum)) * row.scale * scales[i];
    y[i] = bits_as<uint32_t>(value);
  }
}

using Floats32 = ffi::Buffer<ffi::F32>;
using Count = ffi::BufferR0<ffi::S32>;

// Calls body(whole, finish) with the product of x and w [tiles, cells, kOuts, kPerCell], whose y is
// [rows, tiles * kOuts]; finish makes floats of a part's sums, by scales [outs]. The rows of `y` that are padding
// become zeros.
template <class Body>
ffi::Error with_product(ffi::ThreadPool& pool, Floats32 x, ffi::Buffer<ffi::U8> w, Floats32 scales, Count used,
                        ffi::Result<Floats32>& y, int64_t columns, const Body& body) {
  const int64_t rows = std::clamp<int64_t>(used.typed_data()[0], 0, x.dimensions()[0]);
  const int64_t depth = x.dimensions()[1], tiles = w.dimensions()[0], cells = w.dimensions()[1];
  const int64_t outs = scales.dimensions()[0];
  if (w.dimensions()[2] != kOuts || w.dimensions()[3] != kPerCell)
    return ffi::Error::InvalidArgument("matmul: the weights are not in tiles");
  if (depth > cells * kPerCell || outs > tiles * kOuts || y->dimensions()[1] != columns)
    return ffi::Error::InvalidArgument("matmul: wrong shapes");
  std::fill(y->typed_data() + rows * columns, y->typed_data() + y->element_count(), 0.0f);
  const auto run = [&](auto unit) {
    using Unit = decltype(unit);
    using Number = typename Unit::Number;
    static thread_local std::vector<Number> x8;
    static thread_local std::vector<Row> of_rows;
    const int64_t stride = cells * kPerCell;
    x8.resize(rows_read<Unit>(rows) * stride), of_rows.resize(rows);
    Number* to = x8.data();
    Row* found = of_rows.data();
    for_rows(pool, rows, [&](int64_t row) {
      found[row] = quantise(x.typed_data() + row * depth, depth, cells, to + row * stride);
    });
    const TiledProduct<Unit> whole{to, stride, static_cast<const Cell*>(w.untyped_data()), cells * kOuts,
                                   static_cast<uint32_t*>(y->untyped_data()), tiles * kOuts, rows, tiles, cells, false};
    body(whole, [&](int64_t row, int64_t tile, const TiledProduct<Unit>& part) {
      const int64_t first = tile * kOuts, count = std::min(part.tiles * kOuts, outs - first);
      for (int64_t i = 0; i < part.rows; ++i)
        scale(part.y + i * part.y_stride, count, found[row + i], scales.typed_data() + first);
    });
    return ffi::Error::Success();
  };
#ifdef HAVE_TILES_OF_BYTES
  if (tiles_allowed()) return run(Matrices<TilesOfBytes>());
#endif
  return run(Vectors<Best>());
}

ffi::Error matmul_handler(ffi::ThreadPool pool, Floats32 x, ffi::Buffer<ffi::U8> w, Floats32 scales, Count used,
                          ffi::Result<Floats32> y) {
  return with_product(pool, x, w, scales, used, y, w.dimensions()[0] * kOuts,
                      [&](const auto& whole, const auto& finish) { multiply(pool, whole, finish); });
}

ffi::Error gated_handler(ffi::ThreadPool pool, Floats32 x, ffi::Buffer<ffi::U8> w, Floats32 scales, Count used,
                         ffi::Result<Floats32> y, int32_t gate) {
  const auto run = [&](const auto& whole, const auto& finish) {
    with_activation(Gate(gate), [&](const auto& activate) {
      multiply_gated(pool, whole, y->typed_data(), finish, activate);
    });
  };
  return with_product(pool, x, w, scales, used, y, w.dimensions()[0] / 2 * kOuts, run);
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(gated_int8, jaxserve::gated_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<jaxserve::Floats32>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<jaxserve::Floats32>()
                                  .Arg<jaxserve::Count>()
                                  .Ret<jaxserve::Floats32>()
                                  .Attr<int32_t>("gate"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(matmul_int8, jaxserve::matmul_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<jaxserve::Floats32>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<jaxserve::Floats32>()
                                  .Arg<jaxserve::Count>()
                                  .Ret<jaxserve::Floats32>());
