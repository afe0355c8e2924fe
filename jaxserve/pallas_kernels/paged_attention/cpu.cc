// Paged attention over the whole ragged batch: this step's keys and values are written, then rows attend.
// The pool, and what is written to it, is of type NUMBER.
//
// A task is a tile of query rows (some tokens of one sequence, with all query heads of one KV head, so that a
// key is read once for all of them) over its context, split by split: products with the keys, weights, products
// with the values. Splits are merged in their order. They lie at fixed positions of the sequence and every number
// is made by the same operations in the same order, so the bits of a row do not depend on its tile, on the batch
// or on the threads: what a row may not see has a weight of exactly 0 (and the values are finite).

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "pool.h"
#include "product.h"
#include "softmax.h"
#include "vector.h"

namespace ffi = xla::ffi;

namespace jaxserve {
namespace {

constexpr int64_t kSplit = 256;
// Rows of a tile, at most (but all heads of a token): what it works on fits the second cache.
constexpr int64_t kTileRows = 96;
// And at least as many, if there are too few tiles for the threads.
constexpr int64_t kFewRows = 24;
// What products of every form have their columns in.
constexpr int64_t kWidthStep = 16;
constexpr int64_t kRowsPerWrite = 64;

constexpr int64_t down(int64_t n, int64_t step) { return n / step * step; }
constexpr int64_t up(int64_t n, int64_t step) { return down(n + step - 1, step); }

struct Batch {
  int64_t rows, heads, kv_heads, group, dim, table_width, seqs;
  int64_t width;         // dim, rounded up to kWidthStep
  const float *q, *k, *v;  // [rows, heads or kv_heads, dim]
  const float *cos, *sin;  // [rows, dim / 2] or null
  const float* sinks;    // [heads] or null
  const float* alibi;    // [heads] or null
  const int32_t *tables, *starts, *q_lens, *q_rows, *row_seq, *row_pos;  // see meta.py
  Logits logits;
  int64_t window;
  float* out;            // [rows, heads, dim]

  int64_t first_visible(int64_t pos) const { return window ? std::max<int64_t>(0, pos - window + 1) : 0; }
};

// Rounds a query or key of a row, turned by the row's angles if there are any. Pairs are (d, d + dim / 2).
template <class Number>
void turn_and_round(const Batch& b, int64_t row, const float* from, Number* to) {
  if (!b.cos) return round(from, b.dim, to);
  const int64_t half = b.dim / 2;
  const float *cos = b.cos + row * half, *sin = b.sin + row * half;
  constexpr int64_t kStep = 64;
  float first[kStep], second[kStep];
  for (int64_t begin = 0; begin < half; begin += kStep) {
    const int64_t count = std::min(kStep, half - begin);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t d = begin + i;
      first[i] = from[d] * cos[d] - from[half + d] * sin[d];
      second[i] = from[half + d] * cos[d] + from[d] * sin[d];
    }
    round(first, count, to + begin), round(second, count, to + half + begin);
  }
}

// ---- A tile of rows

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
  int64_t splits(const Batch& b) const { return end_split() - first_split(b); }
  // Where its first row is in q and in the output.
  int64_t offset(const Batch& b) const {
    return ((b.q_rows[seq] + token) * b.heads + kv_head * b.group) * b.dim;
  }
};

// A split of a tile's context, of no tile if there is none.
struct Place {
  const Tile* tile;
  int64_t split;
};

struct alignas(64) Line {
  char bytes[64];
};

// Memory that begins with a line of the cache, and is kept for the next task.
class Memory {
 public:
  template <class T>
  T* of(int64_t count) {
    const size_t lines = (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
    if (lines_.size() < lines) lines_.resize(lines);
    return reinterpret_cast<T*>(lines_.data());
  }

 private:
  std::vector<Line> lines_;
};

struct Scratch {
  Memory queries, keys, values, tail, logits, weights, part, all;
};

// to [rows, depth]: the tile's queries, with zeros after dim.
template <class Factor>
void gather_queries(const Batch& b, const Tile& t, int64_t depth, Factor* to) {
  const float* from = b.q + t.offset(b);
  for (int64_t r = 0; r < t.rows; ++r, to += depth) {
    const int64_t token = r / b.group;
    turn_and_round(b, b.q_rows[t.seq] + t.token + token, from + (token * b.heads + r % b.group) * b.dim, to);
    std::fill(to + b.dim, to + depth, Factor{});
  }
}

void write_out(const Batch& b, const Tile& t, const Softmax& s) {
  for (int64_t r = 0; r < t.rows; ++r) {
    float* row = b.out + t.offset(b) + (r / b.group * b.heads + r % b.group) * b.dim;
    const float share = 1.0f / s.mass[r];
    for (int64_t d = 0; d < b.dim; ++d) row[d] = s.values[r * s.width + d] * share;
  }
}

// ---- One tile and one split of its context

// A tile's keys and values in one split: where the pool has them if its shape is one that products take, or
// else copied and padded. Positions count from the split's first.
template <class Form>
class Context {
 public:
  using Number = typename Form::Number;
  // Products take whole steps of positions (as columns of keys, as depth of values) and of dim.
  static constexpr int64_t kStep = std::max(Form::kDepthStep, Form::kColStep);

  Span used;    // that some row may see
  Span padded;  // in whole steps

  Context(const Batch& b, const Pool<Number>& pool, const Tile& t, int64_t split, const Place& next, Scratch& scratch)
      : pool_(pool), table_(b.tables + t.seq * b.table_width + split * kSplit / pool.block_size),
        offset_(split * kSplit % pool.block_size), head_(t.kv_head) {
    used.first = std::max<int64_t>(b.first_visible(t.first_pos) - split * kSplit, 0);
    used.end = std::min(t.end_pos() - split * kSplit, kSplit);
    padded = {down(used.first, kStep), up(used.end, kStep)};
    if (pool.block_size % kStep == 0 && pool.dim % kStep == 0 && pool.dim == b.width)
      find(b, next, scratch);
    else
      copy(b, scratch);
  }

  struct Keys {
    Steps<Number> steps;
    int64_t stride;
    Span columns;
  };
  int64_t key_parts() const { return key_parts_; }
  const Keys& keys(int64_t part) const { return keys_[part]; }
  int64_t value_parts() const { return value_parts_; }
  const Steps<Number>* values() const { return values_; }
  int64_t value_stride() const { return value_stride_; }

 private:
  static constexpr int64_t kCell = Pool<Number>::kCell;

  // Calls body(block, its slot, span) for what each block has of some positions.
  template <class Body>
  void for_blocks(Span positions, const Body& body) const {
    for (int64_t i = positions.first; i < positions.end;) {
      const int64_t slot = (offset_ + i) % pool_.block_size;
      const int64_t end = std::min(i + pool_.block_size - slot, positions.end);
      body(table_[(offset_ + i) / pool_.block_size], slot, Span{i, end});
      i = end;
    }
  }

  void find(const Batch& b, const Place& next, Scratch& scratch) {
    for_blocks(padded, [&](int64_t block, int64_t slot, Span span) {
      const Number* cells = pool_.keys(block, head_) + slot * kCell;
      keys_[key_parts_++] = {{cells, pool_.dim / kCell, cells}, pool_.key_stride(), span};
    });
    value_stride_ = pool_.value_stride();
    const int64_t whole = down(used.end, Form::kDepthStep);
    for_blocks({padded.first, whole}, [&](int64_t block, int64_t slot, Span span) {
      const Number* cells = pool_.values(block, head_) + slot / kCell * value_stride_;
      values_[value_parts_++] = {cells, (span.end - span.first) / kCell, cells};
    });
    for (int64_t i = 0; i < value_parts_; ++i) {
      keys_[i].steps.ahead = values_[i].cells;
      if (!next.tile) continue;
      const int64_t begin = std::max(next.split * kSplit, b.first_visible(next.tile->first_pos));
      const int64_t block = begin / pool_.block_size + i;
      if (block * pool_.block_size < next.tile->end_pos())
        values_[i].ahead = pool_.keys(b.tables[next.tile->seq * b.table_width + block], next.tile->kv_head);
    }
    if (whole == used.end) return;
    // what is after the end may be anything, which a weight of 0 does not hide
    Number* tail = scratch.tail.of<Number>(Form::kDepthStep * pool_.dim);
    copy_values({whole, used.end}, Form::kDepthStep, tail);
    values_[value_parts_++] = {tail, Form::kDepthStep / kCell, tail};
  }

  void copy(const Batch& b, Scratch& scratch) {
    const int64_t depth = up(pool_.dim, Form::kDepthStep), count = padded.end - padded.first;
    Number* keys = scratch.keys.of<Number>(depth * count);
    keys_[key_parts_++] = {{keys, depth / kCell, keys}, count * kCell, padded};
    std::fill_n(keys, depth * count, Number{});
    for_blocks(used, [&](int64_t block, int64_t slot, Span span) {
      const Number* from = pool_.keys(block, head_) + slot * kCell;
      Number* to = keys + (span.first - padded.first) * kCell;
      for (int64_t d = 0; d < pool_.dim; d += kCell, from += pool_.key_stride(), to += count * kCell)
        std::copy_n(from, (span.end - span.first) * kCell, to);
    });
    value_stride_ = b.width * kCell;
    Number* values = scratch.values.of<Number>(count * b.width);
    copy_values({padded.first, used.end}, count, values);
    values_[value_parts_++] = {values, count / kCell, values};
  }

  // The values of some positions, with zeros up to `count` of them and up to the stride.
  void copy_values(Span positions, int64_t count, Number* to) const {
    std::fill_n(to, count / kCell * value_stride_, Number{});
    for_blocks(positions, [&](int64_t block, int64_t slot, Span span) {
      for (int64_t i = span.first; i < span.end; ++i, ++slot) {
        const int64_t at = i - positions.first;
        const Number* from = pool_.values(block, head_) + slot / kCell * pool_.value_stride() + slot % kCell;
        Number* row = to + at / kCell * value_stride_ + at % kCell;
        for (int64_t d = 0; d < pool_.dim; ++d) row[d * kCell] = from[d * kCell];
      }
    });
  }

  const Pool<Number>& pool_;
  const int32_t* table_;
  int64_t offset_, head_;
  int64_t key_parts_ = 0, value_parts_ = 0, value_stride_ = 0;
  Keys keys_[kSplit / kStep + 1];
  Steps<Number> values_[kSplit / kStep + 2];
};

// The weights of a tile's rows for one split, from the products of their queries with its keys.
template <class Factor>
void weigh(const Batch& b, const Tile& t, int64_t split, Span vectors, float* logits, Factor* weights,
           const Softmax& s) {
  const float* alibi = b.alibi ? b.alibi + t.kv_head * b.group : nullptr;
  const bool plain = !alibi && !b.logits.soft_cap && b.logits.scale > 0;
  for (int64_t r = 0; r < t.rows; ++r, logits += kSplit, weights += kSplit) {
    const int64_t pos = t.first_pos + r / b.group, start = split * kSplit;
    const Span seen = {std::max<int64_t>(b.first_visible(pos) - start, 0), std::min(pos + 1 - start, kSplit)};
    if (seen.first >= seen.end) {
      s.top[r] = kNever, s.mass[r] = 0.0f;
      std::fill(weights + vectors.first, weights + vectors.end, Factor{});
      continue;
    }
    const Span mine = {down(seen.first, kLanes), up(seen.end, kLanes)};
    if (!plain) b.logits.finish(logits, mine, start - pos, alibi ? alibi[r % b.group] : 0.0f);
    mask_ends(logits, seen, mine);
    soften(logits, mine, vectors, (plain ? b.logits.scale : 1.0f) * kLog2E, weights, s.top[r], s.mass[r]);
  }
}

// The softmax of a tile's rows over one split of their context.
template <class Form>
void attend_split(const Batch& b, const Pool<typename Form::Number>& pool, const Tile& t, int64_t split,
                  const Place& next, Scratch& scratch, const Softmax& s) {
  using Factor = typename Form::Factor;
  const Context<Form> context(b, pool, t, split, next, scratch);
  const int64_t rows = up(t.rows, Form::kRowStep), depth = up(b.dim, Form::kDepthStep);
  const Factor* queries = scratch.queries.of<Factor>(rows * depth);
  float* logits = scratch.logits.of<float>(rows * kSplit);
  Factor* weights = scratch.weights.of<Factor>(rows * kSplit);
  for (int64_t i = 0; i < context.key_parts(); ++i) {
    const auto& keys = context.keys(i);
    multiply<Form>({queries, depth, &keys.steps, 1, keys.stride, logits + keys.columns.first, kSplit}, rows,
                   keys.columns.end - keys.columns.first);
  }
  weigh(b, t, split, context.padded, logits, weights, s);
  multiply<Form>({weights + context.padded.first, kSplit, context.values(), context.value_parts(),
                  context.value_stride(), s.values, s.width},
                 rows, b.width);
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

  // Where a task begins.
  Place place(const Batch& b, size_t task) const {
    if (task >= tasks.size()) return {nullptr, 0};
    const Task& t = tasks[task];
    return {&t.tile, t.split == Task::kAll ? t.tile.first_split(b) : t.split};
  }

  Plan(const Batch& b, int64_t threads) {
    threads = std::max<int64_t>(1, threads);
    int64_t tokens = std::max<int64_t>(1, kTileRows / b.group);
    while (tokens > 1 && tokens * b.group > kFewRows && b.rows / tokens * b.kv_heads < 4 * threads) tokens /= 2;
    int64_t splits = 0;  // of all single rows
    for (int64_t seq = 0; seq < b.seqs; ++seq)
      if (b.q_lens[seq] == 1) splits += Tile(b, seq, 0, 0, 1).splits(b) * b.kv_heads;
    for (int64_t seq = b.seqs - 1; seq >= 0; --seq) {  // sequences of several rows are last in a batch
      const int64_t count = b.q_lens[seq];
      if (count == 1) add_single(b, seq, splits / (4 * threads));
      if (count <= 1) continue;
      for (int64_t token = down(count - 1, tokens); token >= 0; token -= tokens)
        for (int64_t head = 0; head < b.kv_heads; ++head)
          tasks.push_back({Tile(b, seq, head, token, std::min(tokens, count - token))});
    }
  }

 private:
  // A context of more than `most` splits would keep a thread busy when the others are done.
  void add_single(const Batch& b, int64_t seq, int64_t most) {
    for (int64_t head = 0; head < b.kv_heads; ++head) {
      const Tile tile(b, seq, head, 0, 1);
      if (tile.splits(b) <= std::max<int64_t>(most, 1)) {
        tasks.push_back({tile});
        continue;
      }
      const int64_t first_part = parts;
      for (int64_t split = tile.first_split(b); split < tile.end_split(); ++split, ++parts)
        tasks.push_back({tile, split, first_part, counters});
      ++counters;
    }
  }
};

template <class Form>
class Attention {
 public:
  using Number = typename Form::Number;

  Attention(const Batch& b, const Pool<Number>& pool, const Plan& plan)
      : b_(b), pool_(pool), part_size_(Softmax::size(b.group, up(b.group, Form::kRowStep), b.width)),
        parts_(new float[plan.parts * part_size_]), done_(new std::atomic<int64_t>[plan.counters]) {
    for (int64_t i = 0; i < plan.counters; ++i) done_[i] = 0;
  }

  // What comes `next` is brought to the cache if it can be.
  void run(const Task& task, const Place& next, Scratch& scratch) {
    const typename Form::Unit unit;
    const Tile& t = task.tile;
    const int64_t rows = up(t.rows, Form::kRowStep), depth = up(b_.dim, Form::kDepthStep);
    gather_queries(b_, t, depth, scratch.queries.of<typename Form::Factor>(rows * depth));
    const int64_t first = t.first_split(b_), splits = t.splits(b_), size = Softmax::size(t.rows, rows, b_.width);
    const Softmax all(scratch.all.of<float>(size), t.rows, b_.width);
    if (task.split == Task::kAll) {
      const Softmax part(scratch.part.of<float>(size), t.rows, b_.width);
      begin(t, all);
      for (int64_t i = 0; i < splits; ++i) {
        attend_split<Form>(b_, pool_, t, first + i, i + 1 < splits ? Place{&t, first + i + 1} : next, scratch, part);
        all.add(part);
      }
    } else {
      attend_split<Form>(b_, pool_, t, task.split, next, scratch, part_of(task, task.split - first));
      if (done_[task.counter].fetch_add(1, std::memory_order_acq_rel) + 1 < splits) return;
      begin(t, all);
      for (int64_t i = 0; i < splits; ++i) all.add(part_of(task, i));
    }
    write_out(b_, t, all);
  }

 private:
  void begin(const Tile& t, const Softmax& all) const {
    all.begin(b_.sinks ? b_.sinks + t.kv_head * b_.group : nullptr, b_.group);
  }
  Softmax part_of(const Task& task, int64_t i) const {
    return {parts_.get() + (task.first_part + i) * part_size_, b_.group, b_.width};
  }

  const Batch& b_;
  const Pool<Number>& pool_;
  int64_t part_size_;
  std::unique_ptr<float[]> parts_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;
};

// Puts keys and values where the pool has the positions of the rows, and zeros the output of padding.
template <class Number>
void write_row(const Batch& b, const Pool<Number>& pool, int64_t row, Scratch& scratch) {
  const int64_t pos = b.row_pos[row];
  if (pos < 0) {
    std::fill_n(b.out + row * b.heads * b.dim, b.heads * b.dim, 0.0f);
    return;
  }
  const int64_t block = b.tables[b.row_seq[row] * b.table_width + pos / pool.block_size];
  Number *key = scratch.keys.of<Number>(b.dim), *value = scratch.values.of<Number>(b.dim);
  for (int64_t head = 0; head < b.kv_heads; ++head) {
    const int64_t from = (row * b.kv_heads + head) * b.dim;
    turn_and_round(b, row, b.k + from, key);
    round(b.v + from, b.dim, value);
    pool.write(block, head, pos % pool.block_size, key, value);
  }
}

// No row attends before all are written: what another sequence writes may be in a block that it shares.
template <class Form>
void write_and_attend(ffi::ThreadPool& threads, const Batch& b, const Pool<typename Form::Number>& pool) {
  const Plan plan(b, threads.num_threads());
  Attention<Form> attention(b, pool, plan);
  const int64_t writes = (b.rows + kRowsPerWrite - 1) / kRowsPerWrite;
  std::atomic<int64_t> written{0};
  // items are begun in their order, so those that are waited for are under way
  parallel_for(threads, writes + plan.tasks.size(), [&](int64_t i) {
    static thread_local Scratch scratch;
    if (i < writes) {
      const int64_t end = std::min(b.rows, (i + 1) * kRowsPerWrite);
      for (int64_t row = i * kRowsPerWrite; row < end; ++row) write_row(b, pool, row, scratch);
      written.fetch_add(1, std::memory_order_release);
      return;
    }
    while (written.load(std::memory_order_acquire) < writes) std::this_thread::yield();
    attention.run(plan.tasks[i - writes], plan.place(b, i - writes + threads.num_threads()), scratch);
  });
}

// Numbers that are not `exact` may be rounded to the pool's type: queries, which mostly are of it, and weights.
template <class Number>
void compute(ffi::ThreadPool& threads, const Batch& b, const Pool<Number>& pool, [[maybe_unused]] bool exact) {
#ifdef HAVE_TILES
  if constexpr (std::is_same_v<Number, BFloat16>)
    if (!exact && tiles_allowed()) return write_and_attend<Tiles>(threads, b, pool);
#endif
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<Number, BFloat16>)
    if (!exact) return write_and_attend<Pairs>(threads, b, pool);
#endif
  write_and_attend<Widened<Number>>(threads, b, pool);
}

using Numbers = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;

ffi::Error paged_attention_handler(ffi::ThreadPool threads, Numbers q, Numbers k, Numbers v,
                                   ffi::AnyBuffer pool_before, Numbers cos, Numbers sin, Numbers sinks, Numbers alibi,
                                   Indices tables, Indices starts, Indices q_lens, Indices q_rows, Indices row_seq,
                                   Indices row_pos,
                                   ffi::Result<Numbers> out, ffi::Result<ffi::AnyBuffer> written, float scale,
                                   float soft_cap, int32_t window, bool exact) {
  if (written->untyped_data() != pool_before.untyped_data())
    return ffi::Error::Internal("paged attention: the pool is not written in place");
  const auto shape = written->dimensions();  // [num_blocks, 2, kv_heads, block_size, dim]
  if (ffi::ByteWidth(pool_before.element_type()) != sizeof(NUMBER))
    return ffi::Error::InvalidArgument("paged attention: wrong type");
  const int64_t angles = q.dimensions()[0] * (shape[4] / 2);
  for (const Numbers& turns : {cos, sin})
    if (turns.element_count() && (int64_t(turns.element_count()) != angles || shape[4] % 2))
      return ffi::Error::InvalidArgument("paged attention: wrong rotation");
  for (const Numbers& rows : {k, v})
    if (rows.dimensions()[0] != q.dimensions()[0] || rows.dimensions()[1] != shape[2] ||
        rows.dimensions()[2] != shape[4] || q.dimensions()[1] % shape[2] != 0)
      return ffi::Error::InvalidArgument("paged attention: wrong shapes");
  const Pool<NUMBER> pool{static_cast<NUMBER*>(written->untyped_data()), shape[2], shape[3], shape[4]};
  if (pool.block_size % pool.kCell || pool.dim % pool.kCell)
    return ffi::Error::InvalidArgument("paged attention: block and head size of a 16-bit pool must be even");
  Batch b;
  b.rows = q.dimensions()[0], b.heads = q.dimensions()[1];
  b.kv_heads = pool.kv_heads, b.dim = pool.dim;
  b.group = b.heads / b.kv_heads;
  b.width = up(b.dim, kWidthStep);
  b.seqs = tables.dimensions()[0], b.table_width = tables.dimensions()[1];
  b.q = q.typed_data(), b.k = k.typed_data(), b.v = v.typed_data(), b.out = out->typed_data();
  b.cos = cos.element_count() ? cos.typed_data() : nullptr, b.sin = sin.typed_data();
  b.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  b.alibi = alibi.element_count() ? alibi.typed_data() : nullptr;
  b.tables = tables.typed_data(), b.starts = starts.typed_data(), b.q_lens = q_lens.typed_data();
  b.q_rows = q_rows.typed_data(), b.row_seq = row_seq.typed_data(), b.row_pos = row_pos.typed_data();
  b.logits = {scale, soft_cap}, b.window = window;
  compute(threads, b, pool, exact);
  return ffi::Error::Success();
}

ffi::Error empty_pool_handler(ffi::Result<ffi::AnyBuffer> pool) {
  char* const begin = static_cast<char*>(pool->untyped_data());
  fill_with_zeros(begin, begin + pool->size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(empty_pool, jaxserve::empty_pool_handler, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, jaxserve::paged_attention_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Numbers>()
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
                                  .Attr<int32_t>("window")
                                  .Attr<bool>("exact"));
