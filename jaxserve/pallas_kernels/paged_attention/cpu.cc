// Paged attention over the whole ragged batch: this step's keys and values are written, then rows attend.
// The pool, and what is written to it, is of type NUMBER.
//
// A task is a tile of query rows (some tokens of one sequence, with all query heads of one KV head, so that a
// key is widened once for all of them) over some splits of the context. Within a split the softmax runs online,
// a chunk of keys after the other; splits are merged in their order. Chunks and splits lie at fixed positions
// of the sequence and every number is made by the same operations in the same order, so the bits of a row do
// not depend on its tile, on the batch or on the threads: what a row may not see has a weight of exactly 0 (and the
// values are finite).

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "functions.h"
#include "parallel.h"
#include "product.h"
#include "vector.h"

namespace ffi = xla::ffi;

namespace jaxserve {
namespace {

constexpr int64_t kChunk = 64;
// Single rows are cut here into several tasks.
constexpr int64_t kSplit = 4 * kChunk;
// Rows of a tile, at most (but all heads of a token): what it works on fits the second cache.
constexpr int64_t kTileRows = 96;
// And at least as many, if there are too few tiles for the threads.
constexpr int64_t kFewRows = 24;
constexpr int64_t kRowsPerWrite = 64;
constexpr float kNever = -1e30f;

struct Batch {
  int64_t rows, heads, kv_heads, group, dim, block_size, table_width, seqs;
  int64_t width;         // dim, rounded up to whole vectors
  const float* q;        // [rows, heads, dim]
  const float* sinks;    // [heads] or null
  const float* alibi;    // [heads] or null
  const int32_t *tables, *starts, *q_lens, *q_rows, *row_seq, *row_pos;  // see meta.py
  float scale, soft_cap;
  int64_t window;
  float* out;            // [rows, heads, dim]

  int64_t first_visible(int64_t pos) const { return window ? std::max<int64_t>(0, pos - window + 1) : 0; }

  // Where the pool [blocks, 2, kv_heads, block_size, dim] has the key of a position; its value is `to_value` on.
  int64_t slot(int64_t seq, int64_t kv_head, int64_t pos) const {
    const int64_t block = tables[seq * table_width + pos / block_size];
    return ((block * 2 * kv_heads + kv_head) * block_size + pos % block_size) * dim;
  }
  int64_t to_value() const { return kv_heads * block_size * dim; }
};

// ---- A softmax under way

struct alignas(64) Line {
  float numbers[16];
};

// Memory of floats that begins with a line of the cache.
class Memory {
 public:
  float* of(int64_t count) {
    const size_t lines = (count + 15) / 16;
    if (lines_.size() < lines) lines_.resize(lines);
    return reinterpret_cast<float*>(lines_.data());
  }

 private:
  std::vector<Line> lines_;
};

// For each row: weighted values (not yet divided), the largest logit that its weights are relative to, their sum.
struct Softmax {
  float *values, *top, *mass;
  Softmax(float* memory, int64_t rows, int64_t width)
      : values(memory), top(memory + rows * width), mass(top + rows) {}
  static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2); }
};

// One that has seen nothing but `sinks` [group], if not null.
void begin(const Batch& b, const Softmax& s, int64_t rows, const float* sinks) {
  std::fill_n(s.values, rows * b.width, 0.0f);
  std::fill_n(s.mass, rows, sinks ? 1.0f : 0.0f);
  for (int64_t r = 0; r < rows; ++r) s.top[r] = sinks ? sinks[r % b.group] : kNever;
}

// What two softmaxes of the same rows have seen, the second's after the first's.
void merge(const Batch& b, const Softmax& all, const Softmax& more, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const float top = std::max(all.top[r], more.top[r]);
    const Floats keep = exp(broadcast(all.top[r] - top)), take = exp(broadcast(more.top[r] - top));
    float *to = all.values + r * b.width, *from = more.values + r * b.width;
    for (int64_t d = 0; d < b.width; d += kLanes) store(to + d, fused(load(to + d), keep, load(from + d) * take));
    all.mass[r] = std::fma(all.mass[r], keep[0], more.mass[r] * take[0]);
    all.top[r] = top;
  }
}

// ---- One tile and one split of its context

// The query heads of a KV head in some of a sequence's rows; row r is head r % group of token r / group.
struct Tile {
  int64_t seq, kv_head, token, tokens;
  int64_t rows;         // tokens * group
  int64_t first_pos;    // position of its first token

  Tile(const Batch& b, int64_t seq, int64_t kv_head, int64_t token, int64_t tokens)
      : seq(seq), kv_head(kv_head), token(token), tokens(tokens), rows(tokens * b.group),
        first_pos(b.starts[seq] + token) {}

  int64_t end_pos() const { return first_pos + tokens; }
  int64_t first_split(const Batch& b) const { return b.first_visible(first_pos) / kSplit; }
  int64_t end_split() const { return (end_pos() - 1) / kSplit + 1; }
  // Where its first row is in q and in the output.
  int64_t offset(const Batch& b) const {
    return ((b.q_rows[seq] + token) * b.heads + kv_head * b.group) * b.dim;
  }
};

struct Scratch {
  Memory queries, keys, values, weights, masses, part, all;
};

// Keys (or values) of a chunk, where the pool has them. Those outside [first, end) may be read, but not used.
template <class Number>
struct Chunk {
  int64_t start, first, end;
  const Number* keys[kChunk];

  Chunk(const Batch& b, const Number* pool, const Tile& t, int64_t start, int64_t first, int64_t end)
      : start(start), first(first), end(end) {
    for (int64_t i = first; i < end;) {
      const Number* key = pool + b.slot(t.seq, t.kv_head, start + i);
      for (int64_t left = b.block_size - (start + i) % b.block_size; left > 0 && i < end; --left, ++i, key += b.dim)
        keys[i] = key;
    }
    std::fill(keys, keys + first, keys[first]);
    std::fill(keys + end, keys + kChunk, keys[first]);
  }
};

// Four numbers of each of p[0], p[4], p[8]…, beginning with number d.
template <class Number>
inline Floats load_fours(const Number* const* p, int64_t d) {
  if constexpr (sizeof(Number) == 2) {
    using Fours = uint64_t __attribute__((vector_size(2 * kLanes)));
    Fours fours = {};
    for (int i = 0; i < kLanes / 4; ++i) fours[i] = read<uint64_t>(p[4 * i] + d);
    Number numbers[kLanes];
    std::memcpy(numbers, &fours, sizeof numbers);
    return load(numbers);
  } else {
    Number fours[kLanes];
    for (int i = 0; i < kLanes / 4; ++i) std::memcpy(fours + 4 * i, p[4 * i] + d, 4 * sizeof(Number));
    return load(fours);
  }
}

// Asks memory for a key or value that is needed soon: what is in its block of the pool is new to the processor.
template <class Number>
inline void prefetch(const Number* p, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(Number)) __builtin_prefetch(p + d);
}

// to [dim, kChunk]: a lane per key, so that a row of it times one number of a query adds to many logits.
template <class Number>
void widen_keys(const Batch& b, const Chunk<Number>& chunk, float* to) {
  const int64_t dim = b.dim, to_value = b.to_value();
  for (int64_t key = 0; key < chunk.end; key += kLanes) {
    const Number* const* keys = chunk.keys + key;
    for (int i = 0; i < kLanes; ++i) prefetch(keys[i] + to_value, dim);
    int64_t d = 0;
    for (; d + 4 <= dim; d += 4) {
      Floats v[4];
      for (int i = 0; i < 4; ++i) v[i] = load_fours(keys + i, d);
      transpose_fours(v);
      for (int i = 0; i < 4; ++i) store(to + (d + i) * kChunk + key, v[i]);
    }
    for (; d < dim; ++d)
      for (int i = 0; i < kLanes; ++i) to[d * kChunk + key + i] = widen(keys[i][d]);
  }
}

// to [kChunk, width], with zeros after dim; only [first, end).
template <class Number>
void widen_values(const Batch& b, const Chunk<Number>& chunk, const Chunk<Number>& next, float* to) {
  const int64_t dim = b.dim, width = b.width, to_value = b.to_value();
  for (int64_t i = chunk.first; i < chunk.end; ++i) {
    prefetch(next.keys[i], dim);
    const Number* from = chunk.keys[i] + to_value;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + i * width + d, load(from + d));
    if (d < dim) store(to + i * width + d, load_some(from + d, dim - d));
  }
}

// to [rows, dim]: the tile's queries, scaled.
void gather_queries(const Batch& b, const Tile& t, float* to) {
  const float* from = b.q + t.offset(b);
  for (int64_t i = 0; i < t.tokens; ++i, from += b.heads * b.dim)
    for (int64_t d = 0; d < b.group * b.dim; ++d) *to++ = from[d] * b.scale;
}

// Logits of one row and chunk become weights, and what the row has so far becomes relative to its new top.
// `ahead`: position of the chunk's first key minus the row's; keys in [first, end) are visible.
void soften(const Batch& b, float* logits, int64_t ahead, int64_t first, int64_t end, float slope, float& top,
            float* mass, float* values) {
  constexpr int kVectors = kChunk / kLanes;
  Floats x[kVectors], most = broadcast(kNever);
  for (int i = 0; i < kVectors; ++i) {
    x[i] = load(logits + i * kLanes);
    if (b.soft_cap) x[i] = b.soft_cap * tanh(x[i] / b.soft_cap);
    const Ints keys = lane_numbers() + i * kLanes;
    if (slope) x[i] = fused(__builtin_convertvector(keys + int32_t(ahead), Floats), broadcast(slope), x[i]);
    x[i] = (keys >= int32_t(first)) & (keys < int32_t(end)) ? x[i] : broadcast(kNever);
    most = larger(x[i], most);
  }
  const float higher = largest(most);
  if (higher > top) {
    const Floats keep = exp(broadcast(top - higher));
    for (int64_t d = 0; d < b.width; d += kLanes) store(values + d, load(values + d) * keep);
    store(mass, load(mass) * keep);
    top = higher;
  }
  Floats sums = {};
  for (int i = 0; i < kVectors; ++i) {
    const Floats weights = exp(x[i] - top);
    sums += weights;
    store(logits + i * kLanes, weights);
  }
  store(mass, load(mass) + sums);
}

// The softmax of a tile's rows over one split of their context.
template <class Number>
void attend_split(const Batch& b, const Number* pool, const Tile& t, int64_t split, Scratch& scratch,
                  const Softmax& s) {
  const int64_t rows = t.rows;
  const int64_t split_first = std::max(split * kSplit, b.first_visible(t.first_pos));
  const int64_t split_end = std::min((split + 1) * kSplit, t.end_pos());
  const float* alibi = b.alibi ? b.alibi + t.kv_head * b.group : nullptr;
  const float* queries = scratch.queries.of(rows * b.dim);
  float *keys = scratch.keys.of(b.dim * kChunk), *values = scratch.values.of(kChunk * b.width);
  float *weights = scratch.weights.of(rows * kChunk), *masses = scratch.masses.of(rows * kLanes);
  begin(b, s, rows, nullptr);
  std::fill_n(masses, rows * kLanes, 0.0f);

  const auto chunk_at = [&](int64_t start) {
    return Chunk<Number>(b, pool, t, start, std::max(split_first - start, int64_t{0}),
                         std::min(split_end - start, kChunk));
  };
  Chunk<Number> next = chunk_at(split_first / kChunk * kChunk);
  for (int64_t start = next.start; start < split_end; start += kChunk) {
    const Chunk<Number> chunk = next;
    if (start + kChunk < split_end) next = chunk_at(start + kChunk);
    widen_keys(b, chunk, keys);
    const int64_t cols = (chunk.end + kLanes - 1) / kLanes * kLanes;
    multiply({queries, b.dim, keys, kChunk, b.dim, weights, kChunk, false}, rows, cols);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t pos = t.first_pos + r / b.group;
      const int64_t first = std::max(b.first_visible(pos) - start, chunk.first);
      const int64_t end = std::min(pos + 1 - start, chunk.end);
      if (first < end)
        soften(b, weights + r * kChunk, start - pos, first, end, alibi ? alibi[r % b.group] : 0.0f, s.top[r],
               masses + r * kLanes, s.values + r * b.width);
      else
        std::fill_n(weights + r * kChunk, kChunk, 0.0f);
    }
    widen_values(b, chunk, next, values);
    multiply({weights + chunk.first, kChunk, values + chunk.first * b.width, b.width, chunk.end - chunk.first,
              s.values, b.width, true},
             rows, b.width);
  }
  for (int64_t r = 0; r < rows; ++r) s.mass[r] = sum(load(masses + r * kLanes));
}

void write_out(const Batch& b, const Tile& t, const Softmax& s) {
  for (int64_t r = 0; r < t.rows; ++r) {
    float* row = b.out + t.offset(b) + (r / b.group * b.heads + r % b.group) * b.dim;
    for (int64_t d = 0; d < b.dim; ++d) row[d] = s.values[r * b.width + d] / s.mass[r];
  }
}

// ---- The batch

// A tile with all of its context, or a tile of a single row with one split.
struct Task {
  static constexpr int64_t kAll = -1;
  Tile tile;
  int64_t split = kAll;
  int64_t first_part = 0;  // the row's parts are kept from here on
  int64_t counter = 0;     // tells how many of them are there
};

// Tasks that take long come first.
struct Plan {
  std::vector<Task> tasks;
  int64_t parts = 0, counters = 0;

  Plan(const Batch& b, int64_t threads) {
    int64_t tokens = std::max<int64_t>(1, kTileRows / b.group);
    while (tokens > 1 && tokens * b.group > kFewRows && b.rows / tokens * b.kv_heads < 4 * threads) tokens /= 2;
    for (int64_t seq = b.seqs - 1; seq >= 0; --seq) {  // sequences of several rows are last in a batch
      const int64_t count = b.q_lens[seq];
      if (count == 1) add_single(b, seq);
      if (count <= 1) continue;
      for (int64_t token = (count - 1) / tokens * tokens; token >= 0; token -= tokens)
        for (int64_t head = 0; head < b.kv_heads; ++head)
          tasks.push_back({Tile(b, seq, head, token, std::min(tokens, count - token))});
    }
  }

 private:
  void add_single(const Batch& b, int64_t seq) {
    for (int64_t head = 0; head < b.kv_heads; ++head, ++counters) {
      const Tile tile(b, seq, head, 0, 1);
      const int64_t first_part = parts;
      for (int64_t split = tile.first_split(b); split < tile.end_split(); ++split, ++parts)
        tasks.push_back({tile, split, first_part, counters});
    }
  }
};

template <class Number>
class Attention {
 public:
  Attention(const Batch& b, const Number* pool, const Plan& plan)
      : b_(b), pool_(pool), part_size_(Softmax::size(b.group, b.width)),
        parts_(new float[plan.parts * part_size_]), done_(new std::atomic<int64_t>[plan.counters]) {
    for (int64_t i = 0; i < plan.counters; ++i) done_[i] = 0;
  }

  void run(const Task& task) {
    static thread_local Scratch scratch;
    const Tile& t = task.tile;
    gather_queries(b_, t, scratch.queries.of(t.rows * b_.dim));
    const int64_t splits = t.end_split() - t.first_split(b_);
    const int64_t size = Softmax::size(t.rows, b_.width);
    const Softmax all(scratch.all.of(size), t.rows, b_.width);
    if (task.split == Task::kAll) {
      const Softmax part(scratch.part.of(size), t.rows, b_.width);
      begin(t, all);
      for (int64_t i = 0; i < splits; ++i) {
        attend_split(b_, pool_, t, t.first_split(b_) + i, scratch, part);
        merge(b_, all, part, t.rows);
      }
    } else {
      attend_split(b_, pool_, t, task.split, scratch, part_of(task, task.split - t.first_split(b_)));
      if (done_[task.counter].fetch_add(1, std::memory_order_acq_rel) + 1 < splits) return;
      begin(t, all);
      for (int64_t i = 0; i < splits; ++i) merge(b_, all, part_of(task, i), t.rows);
    }
    write_out(b_, t, all);
  }

 private:
  void begin(const Tile& t, const Softmax& all) {
    jaxserve::begin(b_, all, t.rows, b_.sinks ? b_.sinks + t.kv_head * b_.group : nullptr);
  }
  Softmax part_of(const Task& task, int64_t i) {
    return {parts_.get() + (task.first_part + i) * part_size_, b_.group, b_.width};
  }

  const Batch& b_;
  const Number* pool_;
  int64_t part_size_;
  std::unique_ptr<float[]> parts_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;
};

// Puts k and v [rows, kv_heads, dim] where the pool has the positions of the rows, and zeros the output of padding.
template <class Number>
void write_row(const Batch& b, int64_t row, const Number* k, const Number* v, Number* pool) {
  if (b.row_pos[row] < 0) {
    std::fill_n(b.out + row * b.heads * b.dim, b.heads * b.dim, 0.0f);
    return;
  }
  for (int64_t head = 0; head < b.kv_heads; ++head) {
    Number* to = pool + b.slot(b.row_seq[row], head, b.row_pos[row]);
    const int64_t from = (row * b.kv_heads + head) * b.dim;
    std::copy_n(k + from, b.dim, to);
    std::copy_n(v + from, b.dim, to + b.to_value());
  }
}

template <class Number>
void write_and_attend(ffi::ThreadPool& threads, const Batch& b, ffi::AnyBuffer k, ffi::AnyBuffer v, void* stored) {
  Number* pool = static_cast<Number*>(stored);
  const auto *keys = static_cast<const Number*>(k.untyped_data()), *values = static_cast<const Number*>(v.untyped_data());
  parallel_for(threads, (b.rows + kRowsPerWrite - 1) / kRowsPerWrite, [&](int64_t i) {
    const int64_t end = std::min(b.rows, (i + 1) * kRowsPerWrite);
    for (int64_t row = i * kRowsPerWrite; row < end; ++row) write_row(b, row, keys, values, pool);
  });
  const Plan plan(b, threads.num_threads());
  Attention<Number> attention(b, pool, plan);
  parallel_for(threads, plan.tasks.size(), [&](int64_t i) { attention.run(plan.tasks[i]); });
}

using Numbers = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;

ffi::Error paged_attention_handler(ffi::ThreadPool threads, Numbers q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                   ffi::AnyBuffer pool_before, Numbers sinks, Numbers alibi, Indices tables,
                                   Indices starts, Indices q_lens, Indices q_rows, Indices row_seq, Indices row_pos,
                                   ffi::Result<Numbers> out, ffi::Result<ffi::AnyBuffer> pool, float scale,
                                   float soft_cap, int32_t window) {
  if (pool->untyped_data() != pool_before.untyped_data())
    return ffi::Error::Internal("paged attention: the pool is not written in place");
  const auto shape = pool->dimensions();  // [num_blocks, 2, kv_heads, block_size, dim]
  for (ffi::AnyBuffer numbers : {k, v, pool_before})
    if (ffi::ByteWidth(numbers.element_type()) != sizeof(NUMBER))
      return ffi::Error::InvalidArgument("paged attention: wrong type");
  for (ffi::AnyBuffer rows : {k, v})
    if (rows.dimensions()[0] != q.dimensions()[0] || rows.dimensions()[1] != shape[2] ||
        rows.dimensions()[2] != shape[4] || q.dimensions()[1] % shape[2] != 0)
      return ffi::Error::InvalidArgument("paged attention: wrong shapes");
  Batch b;
  b.rows = q.dimensions()[0], b.heads = q.dimensions()[1];
  b.kv_heads = shape[2], b.block_size = shape[3], b.dim = shape[4];
  b.group = b.heads / b.kv_heads;
  b.width = (b.dim + kLanes - 1) / kLanes * kLanes;
  b.seqs = tables.dimensions()[0], b.table_width = tables.dimensions()[1];
  b.q = q.typed_data(), b.out = out->typed_data();
  b.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  b.alibi = alibi.element_count() ? alibi.typed_data() : nullptr;
  b.tables = tables.typed_data(), b.starts = starts.typed_data(), b.q_lens = q_lens.typed_data();
  b.q_rows = q_rows.typed_data(), b.row_seq = row_seq.typed_data(), b.row_pos = row_pos.typed_data();
  b.scale = scale, b.soft_cap = soft_cap, b.window = window;
  write_and_attend<NUMBER>(threads, b, k, v, pool->untyped_data());
  return ffi::Error::Success();
}

// A pool of zeros. Its whole pages go back to the system, which fills a page with zeros when it is touched first:
// to fill gigabytes here would take seconds.
ffi::Error empty_pool_handler(ffi::Result<ffi::AnyBuffer> pool) {
  char* const begin = static_cast<char*>(pool->untyped_data());
  char* const end = begin + pool->size_bytes();
#ifdef __linux__
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  char* const first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page);
  char* const last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) / page * page);
  if (first < last && madvise(first, last - first, MADV_DONTNEED) == 0) {
    std::memset(begin, 0, first - begin);
    std::memset(last, 0, end - last);
    return ffi::Error::Success();
  }
#endif
  std::memset(begin, 0, end - begin);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(empty_pool, jaxserve::empty_pool_handler, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, jaxserve::paged_attention_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Indices>()
                                  .Arg<jaxserve::Indices>()
                                  .Arg<jaxserve::Indices>()
                                  .Arg<jaxserve::Indices>()
                                  .Arg<jaxserve::Indices>()
                                  .Arg<jaxserve::Indices>()
                                  .Ret<jaxserve::Numbers>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int32_t>("window"));
