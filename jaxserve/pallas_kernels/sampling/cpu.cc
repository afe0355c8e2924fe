// A token for each row of logits [rows, vocab], and how likely it is.
//
// A row is worked on by one thread, so its token depends on nothing else. Filters are thresholds: what they keep is
// every logit from some number on, and equal logits stay together.

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "functions.h"
#include "parallel.h"
#include "threefry.h"
#include "vector.h"

namespace ffi = xla::ffi;

namespace jaxserve {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Neighbours whose weights are summed up before one of them is looked for.
constexpr int64_t kGroup = 128;
// Smaller temperatures, which floats may flush to zero, draw the same tokens.
constexpr float kLeastTemperature = 1e-30f;

// What a thread works with, kept for the next row.
struct Scratch {
  std::vector<float> tops, weights, sums;
  std::vector<std::pair<float, float>> members;
  std::vector<int32_t> ids;
};

Scratch& scratch() {
  static thread_local Scratch kept;
  return kept;
}

// Only one at a time in a thread.
struct Row {
  const float* logits;
  int64_t vocab;
  std::vector<float>& tops;  // the largest of each group
  float top;                 // of all
  int64_t best = 0;          // the first of the largest

  Row(const float* logits, int64_t vocab) : logits(logits), vocab(vocab), tops(scratch().tops) {
    tops.clear();
    for (int64_t begin = 0; begin < vocab; begin += kGroup) tops.push_back(largest_of(begin, end_of(begin)));
    top = *std::max_element(tops.begin(), tops.end());
    for (int64_t i = 0, begin = 0; begin < vocab; ++i, begin += kGroup)
      if (tops[i] == top) {
        const float* found = std::find(logits + begin, logits + end_of(begin), top);
        if (found != logits + end_of(begin)) best = found - logits;  // or none is a number
        return;
      }
  }

  int64_t end_of(int64_t begin) const { return std::min(begin + kGroup, vocab); }

  // body(i, logit) for those from `floor` on that are not -infinity.
  template <class Body>
  void for_logits(float floor, const Body& body) const {
    for (int64_t begin = 0; begin < vocab; begin += kGroup)
      if (tops[begin / kGroup] >= floor)
        for (int64_t i = begin; i < end_of(begin); ++i)
          if (logits[i] >= floor && logits[i] > -kInfinity) body(i, logits[i]);
  }

  // What at least `count` logits are not below, near to the largest such number if they are few.
  float bound(int64_t count) const {
    if (count > int64_t(tops.size())) return -kInfinity;
    std::vector<float>& sorted = scratch().sums;
    sorted = tops;
    std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<>());
    return sorted[count - 1];
  }

 private:
  float largest_of(int64_t begin, int64_t end) const {
    Floats most = broadcast(-kInfinity);
    for (; begin + kLanes <= end; begin += kLanes) most = larger(load(logits + begin), most);
    float found = largest(most);
    for (; begin < end; ++begin) found = logits[begin] > found ? logits[begin] : found;
    return found;
  }
};

// to[i] = e^((logit - top) * slope), and zeros up to whole registers. The largest is 1; -infinity gives exactly 0.
void exponentials(const Row& row, float slope, std::vector<float>& to) {
  to.resize((row.vocab + kGroup - 1) / kGroup * kGroup);
  for (int64_t i = 0; i < row.vocab; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, row.vocab - i);
    const Floats x = count < kLanes ? load_some(row.logits + i, count) : load(row.logits + i);
    store(&to[i], exp2(larger((x - row.top) * (slope * kLog2E), broadcast(-200.0f))));
  }
  std::fill(to.begin() + row.vocab, to.end(), 0.0f);
}

// The largest t for which the weights of logits >= t sum up to `target`; only logits >= `floor` count. -infinity if
// they all do not. Logits are counted in buckets first, and of one bucket they are sorted.
template <class Weight>
float threshold(const Row& row, float floor, double target, const Weight& weight) {
  constexpr int kBuckets = 4096;
  float least = row.top;
  row.for_logits(floor, [&](int64_t, float x) { least = std::min(least, x); });
  const float range = row.top - least, scale = range > 1e-30f ? kBuckets / range : 0.0f;
  const auto bucket_of = [&](float x) {
    const float bucket = (row.top - x) * scale;
    return bucket < kBuckets ? int(bucket) : kBuckets - 1;
  };

  std::array<float, kBuckets> masses = {};
  row.for_logits(floor, [&](int64_t i, float x) { masses[bucket_of(x)] += weight(i); });
  double sum = 0;
  int chosen = 0;
  while (chosen < kBuckets && sum + masses[chosen] < target) sum += masses[chosen++];
  if (chosen == kBuckets) return -kInfinity;

  auto& members = scratch().members;
  members.clear();
  row.for_logits(floor, [&](int64_t i, float x) {
    if (bucket_of(x) == chosen) members.emplace_back(x, weight(i));
  });
  std::sort(members.begin(), members.end(), std::greater<>());
  for (size_t i = 0; i < members.size(); ++i) {
    sum += members[i].second;
    if (sum >= target) return members[i].first;
  }
  return members.empty() ? -kInfinity : members.back().first;
}

// That of the `count` largest.
float threshold(const Row& row, float floor, int64_t count) {
  return threshold(row, std::max(floor, row.bound(count)), double(count), [](int64_t) { return 1.0f; });
}

float sum(const float* p, int64_t count) {
  Floats sums = {};
  for (int64_t i = 0; i < count; i += kLanes) sums += load(p + i);
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sums[i];
  return total;
}

struct Filters {
  float temperature;  // 0 for greedy
  float top_p, min_p;
  int32_t top_k;  // 0 for all
};

// What filters keep of a row's weights; the others become zeros.
void filter(const Row& row, const Filters& f, float temperature, std::vector<float>& weights) {
  float floor = row.top + temperature * std::log(f.min_p);
  const auto drop = [&] {
    if (floor > -kInfinity)
      for (int64_t i = 0; i < row.vocab; ++i) weights[i] = row.logits[i] >= floor ? weights[i] : 0.0f;
  };
  if (f.top_k > 0 && f.top_k < row.vocab)
    floor = std::max(floor, threshold(row, floor, f.top_k));
  drop();
  if (f.top_p < 1.0f) {
    floor = std::max(floor, row.top - 88.0f * temperature);  // what is below weighs nothing, but would spread buckets
    double total = 0;
    for (size_t i = 0; i < weights.size(); i += kGroup) total += sum(&weights[i], kGroup);
    floor = std::max(floor, threshold(row, floor, f.top_p * total, [&](int64_t i) { return weights[i]; }));
    drop();
  }
}

// The first of `count` numbers at which their running sum exceeds `goal`, else the last; only of those above 0.
template <class Number>
int64_t first_above(const Number& number, int64_t count, double& goal) {
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const double x = number(i);
    if (x <= 0) continue;
    last = i;
    if (x > goal) return i;
    goal -= x;
  }
  if (last >= 0) goal += number(last);
  return last;
}

// A token of the row's filtered distribution, at quantile u.
int64_t draw(const Row& row, const Filters& f, float u) {
  if (!(f.temperature > 0.0f)) return row.best;
  const float temperature = std::max(f.temperature, kLeastTemperature);
  auto& weights = scratch().weights;
  exponentials(row, 1.0f / temperature, weights);
  filter(row, f, temperature, weights);

  const int64_t groups = weights.size() / kGroup;
  auto& sums = scratch().sums;
  sums.resize(groups);
  for (int64_t i = 0; i < groups; ++i) sums[i] = sum(&weights[i * kGroup], kGroup);
  double goal = u * std::accumulate(sums.begin(), sums.end(), 0.0);
  const int64_t group = first_above([&](int64_t i) { return sums[i]; }, groups, goal);
  if (group < 0) return row.best;
  return group * kGroup + first_above([&](int64_t i) { return weights[group * kGroup + i]; }, kGroup, goal);
}

struct Likelihood {
  float* own;       // logprob of the token, natural
  int32_t* rank;    // 1 for the likeliest
  int32_t* ids;     // [top] the likeliest tokens, of equal ones the first
  float* logprobs;  // [top]
};

void logprobs(const Row& row, int64_t token, int64_t top, const Likelihood& to) {
  auto& weights = scratch().weights;
  auto& ids = scratch().ids;
  exponentials(row, 1.0f, weights);
  double total = 0;
  for (size_t i = 0; i < weights.size(); i += kGroup) total += sum(&weights[i], kGroup);
  const float log = row.top + float(std::log(total));
  const float own = row.logits[token];
  *to.own = own - log;
  *to.rank = 1;
  row.for_logits(own, [&](int64_t, float x) { *to.rank += x > own; });

  ids.clear();
  row.for_logits(threshold(row, -kInfinity, top), [&](int64_t i, float) { ids.push_back(int32_t(i)); });
  const auto likelier = [&](int32_t a, int32_t b) {
    return row.logits[a] != row.logits[b] ? row.logits[a] > row.logits[b] : a < b;
  };
  const auto found = std::min<int64_t>(top, ids.size());
  std::partial_sort(ids.begin(), ids.begin() + found, ids.end(), likelier);
  // if there are too few, the first of all others follow
  for (int32_t id = 0; int64_t(ids.size()) < top; ++id)
    if (!(row.logits[id] > -kInfinity)) ids.push_back(id);
  for (int64_t i = 0; i < top; ++i) {
    to.ids[i] = ids[i];
    to.logprobs[i] = i < found ? row.logits[ids[i]] - log : -kInfinity;
  }
}

using Numbers = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;
using Seeds = ffi::Buffer<ffi::U32>;

ffi::Error uniform_handler(Seeds seeds, Indices sample_indices, Indices positions, ffi::Result<Numbers> u) {
  const int64_t rows = seeds.dimensions()[0];
  for (int64_t i = 0; i < rows; ++i) {
    Key key;
    const uint32_t* seed = seeds.typed_data() + 2 * i;
    for (const uint32_t word :
         {seed[0], seed[1], uint32_t(sample_indices.typed_data()[i]), uint32_t(positions.typed_data()[i])})
      key = fold_in(key, word);
    u->typed_data()[i] = uniform(key);
  }
  return ffi::Error::Success();
}

ffi::Error sample_handler(ffi::ThreadPool pool, Numbers logits, Numbers temperature, Numbers top_p, Numbers min_p,
                          Indices top_k, Numbers u, ffi::Result<Indices> tokens) {
  const int64_t rows = logits.dimensions()[0], vocab = logits.dimensions()[1];
  parallel_for(pool, rows, [&](int64_t i) {
    const Row row(logits.typed_data() + i * vocab, vocab);
    const Filters filters = {temperature.typed_data()[i], top_p.typed_data()[i], min_p.typed_data()[i],
                             top_k.typed_data()[i]};
    tokens->typed_data()[i] = int32_t(draw(row, filters, u.typed_data()[i]));
  });
  return ffi::Error::Success();
}

ffi::Error logprobs_handler(ffi::ThreadPool pool, Numbers logits, Indices tokens, ffi::Result<Numbers> own,
                            ffi::Result<Indices> ranks, ffi::Result<Indices> ids, ffi::Result<Numbers> top) {
  const int64_t rows = logits.dimensions()[0], vocab = logits.dimensions()[1], count = ids->dimensions()[1];
  parallel_for(pool, rows, [&](int64_t i) {
    const int64_t token = std::clamp<int64_t>(tokens.typed_data()[i], 0, vocab - 1);
    logprobs(Row(logits.typed_data() + i * vocab, vocab), token, count,
             {own->typed_data() + i, ranks->typed_data() + i, ids->typed_data() + i * count,
              top->typed_data() + i * count});
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(uniform, jaxserve::uniform_handler,
                              ffi::Ffi::Bind()
                                  .Arg<jaxserve::Seeds>()
                                  .Arg<jaxserve::Indices>()
                                  .Arg<jaxserve::Indices>()
                                  .Ret<jaxserve::Numbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(sample, jaxserve::sample_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Indices>()
                                  .Arg<jaxserve::Numbers>()
                                  .Ret<jaxserve::Indices>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobs, jaxserve::logprobs_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<jaxserve::Numbers>()
                                  .Arg<jaxserve::Indices>()
                                  .Ret<jaxserve::Numbers>()
                                  .Ret<jaxserve::Indices>()
                                  .Ret<jaxserve::Indices>()
                                  .Ret<jaxserve::Numbers>());
