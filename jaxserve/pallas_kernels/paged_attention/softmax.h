// A softmax over contexts that come in splits. Logits are in base 2: those of the model times log2(e).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "functions.h"
#include "vector.h"

namespace jaxserve {

constexpr float kNever = -1e30f;

// For each row: weighted values (not yet divided), the largest logit that its weights are relative to, their sum.
struct Softmax {
  int64_t rows, width;
  float *values, *top, *mass;

  Softmax(float* memory, int64_t rows, int64_t width)
      : rows(rows), width(width), values(memory + front(rows)), top(memory), mass(top + rows) {}
  // With as many rows of values as products write.
  static int64_t size(int64_t rows, int64_t written, int64_t width) { return front(rows) + written * width; }
  static int64_t front(int64_t rows) { return (2 * rows + 15) / 16 * 16; }

  // Has seen nothing but the sinks of `group` heads, if not null: row r is of head r % group.
  void begin(const float* sinks, int64_t group) const {
    std::fill_n(values, rows * width, 0.0f);
    std::fill_n(mass, rows, sinks ? 1.0f : 0.0f);
    for (int64_t r = 0; r < rows; ++r) top[r] = sinks ? sinks[r % group] * kLog2E : kNever;
  }

  // Has seen what the same rows saw in another split, too, after its own.
  void add(const Softmax& more) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float highest = std::max(top[r], more.top[r]);
      const Floats keep = exp2(broadcast(top[r] - highest)), take = exp2(broadcast(more.top[r] - highest));
      float *to = values + r * width, *from = more.values + r * width;
      for (int64_t d = 0; d < width; d += kLanes) store(to + d, fused(load(to + d), keep, load(from + d) * take));
      mass[r] = std::fma(mass[r], keep[0], more.mass[r] * take[0]);
      top[r] = highest;
    }
  }
};

struct Span {
  int64_t first, end;
};

// From products of a query with keys to logits.
struct Logits {
  float scale, soft_cap;

  // `ahead`: position of the first key minus the row's.
  void finish(float* products, Span keys, int64_t ahead, float slope) const {
    for (int64_t i = keys.first; i < keys.end; i += kLanes) {
      Floats x = load(products + i) * scale;
      if (soft_cap) x = soft_cap * tanh(x / soft_cap);
      const Ints distance = lane_numbers() + int32_t(i + ahead);
      store(products + i, fused(__builtin_convertvector(distance, Floats), broadcast(slope), x));
    }
  }
};

// Hides the logits outside of `seen` in the vectors at its ends.
inline void mask_ends(float* logits, Span seen, Span vectors) {
  for (const int64_t i : {vectors.first, vectors.end - kLanes}) {
    const Ints keys = lane_numbers() + int32_t(i);
    const auto visible = (keys >= int32_t(seen.first)) & (keys < int32_t(seen.end));
    store(logits + i, visible ? load(logits + i) : broadcast(kNever));
  }
}

// weights [0, end of all): 2^(logit * factor - top), and 0 where the row sees nothing; their top and sum.
template <class Factor>
void soften(const float* logits, Span vectors, Span all, float factor, Factor* weights, float& top, float& mass) {
  Floats most = broadcast(kNever);
  for (int64_t i = vectors.first; i < vectors.end; i += kLanes) most = larger(load(logits + i), most);
  top = largest(most) * factor;
  constexpr int kTerms = sizeof(Factor) == 4 ? 6 : 4;  // enough for what is rounded
  Floats sums = {};
  for (int64_t i = vectors.first; i < vectors.end; i += kLanes) {
    const Floats x = exp2<kTerms>(fused(load(logits + i), broadcast(factor), broadcast(-top)));
    sums += x;
    store(weights + i, x);
  }
  mass = sum(sums);
  std::fill(weights + all.first, weights + vectors.first, Factor{});
  std::fill(weights + vectors.end, weights + all.end, Factor{});
}

}  // namespace jaxserve
