// y [rows, outs] = x [rows, depth] · w [outs, depth]ᵀ for weights as they are stored: of type NUMBER.
//
// Every number of y is made the same way whatever else is computed: lanes that each add up a part of the
// depth in order, then the lanes, a block of the depth after the other. So a row's bits do not depend on the
// number of rows, and partial sums are short, which makes them accurate.

#include <algorithm>
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

// y[i, j] (+)= x[i] · w[j] over `depth` numbers, for one tile.
template <int Rows, int Outs, class Weight>
void multiply_tile(const float* x, int64_t x_stride, const Weight* w, int64_t w_stride, int64_t depth, float* y,
                   int64_t y_stride, bool add) {
  Floats sums[Rows][Outs] = {};
  int64_t k = 0;
  const auto step = [&](auto load_at) {
    Floats weights[Outs];
    if constexpr (sizeof(Weight) < sizeof(float))  // from memory, and rows are too short for the processor to foresee
      for (int j = 0; j < Outs; ++j) __builtin_prefetch(w + (j + 2 * Outs) * w_stride + k);
    for (int j = 0; j < Outs; ++j) hold(weights[j] = load_at(w + j * w_stride + k));
    for (int i = 0; i < Rows; ++i) {
      Floats number = load_at(x + i * x_stride + k);
      hold(number);
      for (int j = 0; j < Outs; ++j) sums[i][j] = fused(number, weights[j], sums[i][j]);
    }
  };
  for (; k + kLanes <= depth; k += kLanes) step([](const auto* p) { return load(p); });
  if (k < depth) step([=](const auto* p) { return load_some(p, depth - k); });
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Outs; ++j) {
      float& out = y[i * y_stride + j];
      out = add ? out + sum(sums[i][j]) : sum(sums[i][j]);
    }
}

// Up to `Rows` rows of x with `outs` rows of w, over one block of the depth.
template <int Rows, class Weight>
void multiply_rows(int64_t rows, int64_t outs, const float* x, int64_t x_stride, const Weight* w, int64_t w_stride,
                   int64_t depth, float* y, int64_t y_stride, bool add) {
  if constexpr (Rows > 1)
    if (rows < Rows) return multiply_rows<Rows - 1>(rows, outs, x, x_stride, w, w_stride, depth, y, y_stride, add);
  int64_t j = 0;
  for (; j + kTileOuts <= outs; j += kTileOuts)
    multiply_tile<Rows, kTileOuts>(x, x_stride, w + j * w_stride, w_stride, depth, y + j, y_stride, add);
  for (; j < outs; ++j) multiply_tile<Rows, 1>(x, x_stride, w + j * w_stride, w_stride, depth, y + j, y_stride, add);
}

// All rows of x.
template <class Weight>
void multiply_panel(const Matrix& m, const float* x, const Weight* w, int64_t w_stride, int64_t outs, int64_t depth,
                    float* y, bool add) {
  for (int64_t i = 0; i < m.rows; i += kTileRows)
    multiply_rows<kTileRows>(m.rows - i, outs, x + i * m.depth, m.depth, w, w_stride, depth, y + i * m.outs, m.outs,
                             add);
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
        multiply_panel(m, x + k, scratch.data(), depth, outs, depth, y + first, k > 0);
      } else {
        multiply_panel(m, x + k, weights, m.depth, outs, depth, y + first, k > 0);
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
