// y [rows, outs] = x [rows, depth] · w [outs, depth]ᵀ for weights as they are stored: of type NUMBER.
//
// Every number of y is made the same way whatever else is computed: lanes that each add up a part of the
// depth in order, then the lanes, a block of the depth after the other. So a row's bits do not depend on the
// number of rows, and partial sums are short, which makes them accurate.
//
// x is read as float32, or rounded to bf16 where the processor multiplies pairs of bf16 numbers.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace ffi = xla::ffi;

namespace jaxserve {
namespace {

// A tile of y is held in registers: its sums, one column of w, one number of x.
constexpr int kTileRows = 4;
constexpr int kTileOuts = kRegisters / 4 - 1 - kRegisters / 32;
// Outputs that a thread takes at a time. Their weights, widened, stay in the second cache.
constexpr int kPanel = kTileOuts * 8;
constexpr int64_t kBlock = 2048;
// With more rows than this it pays to widen a panel of 16-bit weights once, before it is used.
constexpr int64_t kFewRows = kTileRows;

struct Matrix {
  int64_t rows, outs, depth;
};

// What a lane adds up at a time: a number of x and one of w, widened as they are read.
struct Singles {
  static constexpr int kNumbers = kLanes;
  template <class T>
  static Floats load(const T* p) { return jaxserve::load(p); }
  template <class T>
  static Floats load_some(const T* p, int64_t count) { return jaxserve::load_some(p, count); }
  static Floats add_products(Floats x, Floats w, Floats sum) { return fused(x, w, sum); }
};

#ifdef __AVX512BF16__
// Or two neighbours of each, in bf16.
struct Pairs {
  static constexpr int kNumbers = 2 * kLanes;
  static __m512bh load(const BFloat16* p) { return read<__m512bh>(p); }
  static __m512bh load_some(const BFloat16* p, int64_t count) {
    BFloat16 some[kNumbers] = {};
    std::copy(p, p + count, some);
    return load(some);
  }
  static Floats add_products(__m512bh x, __m512bh w, Floats sum) { return _mm512_dpbf16_ps(sum, x, w); }
};
#endif

// y[i, j] (+)= x[i] · w[j] over `depth` numbers, for one tile.
template <class Lanes, int Rows, int Outs, class Number, class Weight>
void multiply_tile(const Number* x, int64_t x_stride, const Weight* w, int64_t w_stride, int64_t depth, float* y,
                   int64_t y_stride, bool add) {
  Floats sums[Rows][Outs] = {};
  int64_t k = 0;
  const auto step = [&](auto load_at) {
    decltype(load_at(w)) weights[Outs];
    if constexpr (sizeof(Weight) < sizeof(float))  // from memory, and rows are too short for the processor to foresee
      for (int j = 0; j < Outs; ++j) __builtin_prefetch(w + (j + 2 * Outs) * w_stride + k);
    for (int j = 0; j < Outs; ++j) hold(weights[j] = load_at(w + j * w_stride + k));
    for (int i = 0; i < Rows; ++i) {
      auto number = load_at(x + i * x_stride + k);
      hold(number);
      for (int j = 0; j < Outs; ++j) sums[i][j] = Lanes::add_products(number, weights[j], sums[i][j]);
    }
  };
  for (; k + Lanes::kNumbers <= depth; k += Lanes::kNumbers) step([](const auto* p) { return Lanes::load(p); });
  if (k < depth) step([=](const auto* p) { return Lanes::load_some(p, depth - k); });
  const auto put = [&](int i, int j, float value) {
    float& out = y[i * y_stride + j];
    out = add ? out + value : value;
  };
#pragma GCC unroll 8
  for (int j = 0; j < Outs; ++j)
    if constexpr (Rows == 4) {
      const Four column = jaxserve::sums(sums[0][j], sums[1][j], sums[2][j], sums[3][j]);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) put(i, j, column[i]);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) put(i, j, sum(sums[i][j]));
    }
}

// Up to `Rows` rows of x with `outs` rows of w, over one block of the depth.
template <class Lanes, int Rows, class Number, class Weight>
void multiply_rows(int64_t rows, int64_t outs, const Number* x, int64_t x_stride, const Weight* w, int64_t w_stride,
                   int64_t depth, float* y, int64_t y_stride, bool add) {
  if constexpr (Rows > 1)
    if (rows < Rows)
      return multiply_rows<Lanes, Rows - 1>(rows, outs, x, x_stride, w, w_stride, depth, y, y_stride, add);
  int64_t j = 0;
  for (; j + kTileOuts <= outs; j += kTileOuts)
    multiply_tile<Lanes, Rows, kTileOuts>(x, x_stride, w + j * w_stride, w_stride, depth, y + j, y_stride, add);
  for (; j < outs; ++j)
    multiply_tile<Lanes, Rows, 1>(x, x_stride, w + j * w_stride, w_stride, depth, y + j, y_stride, add);
}

// All rows of x.
template <class Lanes, class Number, class Weight>
void multiply_panel(const Matrix& m, const Number* x, const Weight* w, int64_t w_stride, int64_t outs, int64_t depth,
                    float* y, bool add) {
  for (int64_t i = 0; i < m.rows; i += kTileRows)
    multiply_rows<Lanes, kTileRows>(m.rows - i, outs, x + i * m.depth, m.depth, w, w_stride, depth, y + i * m.outs,
                                    m.outs, add);
}

template <class Weight>
void widen_panel(const Weight* w, int64_t w_stride, int64_t outs, int64_t depth, float* to) {
  for (int64_t j = 0; j < outs; ++j) {
    const Weight* from = w + j * w_stride;
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) store(to + j * depth + k, load(from + k));
    for (; k < depth; ++k) to[j * depth + k] = widen(from[k]);
  }
}

template <class Weight>
void multiply(ffi::ThreadPool& pool, const Matrix& m, const float* x, const Weight* w, float* y) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<Weight, BFloat16>) {
    std::vector<BFloat16> rounded(m.rows * m.depth);
    round(x, m.rows * m.depth, rounded.data());
    parallel_for(pool, (m.outs + kPanel - 1) / kPanel, [&](int64_t panel) {
      const int64_t first = panel * kPanel, outs = std::min<int64_t>(kPanel, m.outs - first);
      for (int64_t k = 0; k < m.depth; k += kBlock)
        multiply_panel<Pairs>(m, rounded.data() + k, w + first * m.depth + k, m.depth, outs,
                              std::min(kBlock, m.depth - k), y + first, k > 0);
    });
    return;
  }
#endif
  const bool widened = sizeof(Weight) < sizeof(float) && m.rows > kFewRows;
  parallel_for(pool, (m.outs + kPanel - 1) / kPanel, [&](int64_t panel) {
    static thread_local std::vector<float> scratch;
    const int64_t first = panel * kPanel, outs = std::min<int64_t>(kPanel, m.outs - first);
    for (int64_t k = 0; k < m.depth; k += kBlock) {
      const int64_t depth = std::min(kBlock, m.depth - k);
      const Weight* weights = w + first * m.depth + k;
      if (widened) {
        scratch.resize(kPanel * kBlock);
        widen_panel(weights, m.depth, outs, depth, scratch.data());
        multiply_panel<Singles>(m, x + k, scratch.data(), depth, outs, depth, y + first, k > 0);
      } else {
        multiply_panel<Singles>(m, x + k, weights, m.depth, outs, depth, y + first, k > 0);
      }
    }
  });
}

ffi::Error matmul_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                          ffi::ResultBuffer<ffi::F32> y) {
  const Matrix m{x.dimensions()[0], w.dimensions()[0], w.dimensions()[1]};
  if (x.dimensions()[1] != m.depth || m.depth == 0) return ffi::Error::InvalidArgument("matmul: wrong shapes");
  if (ffi::ByteWidth(w.element_type()) != sizeof(NUMBER)) return ffi::Error::InvalidArgument("matmul: wrong type");
  multiply(pool, m, x.typed_data(), static_cast<const NUMBER*>(w.untyped_data()), y->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    matmul, jaxserve::matmul_handler,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::F32>>());
