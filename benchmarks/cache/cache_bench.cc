// ./bench cache: hit ratios of the view's policy beside LRU, ARC, S3-FIFO and Belady's optimum, and what a view costs.
#include <algorithm>
#include <cmath>
#include <random>

#include "benchmarks/cache/policies.h"
#include "benchmarks/common/bench.h"
#include "src/cache/index.h"
#include "src/cache/view.h"

namespace spillway::bench {
namespace {

using cache::kLeafPages;
using cache::ViewChunk;
using cache::ViewList;

double ours(const Trace& t, size_t capacity, uint64_t* chunks) {
  ViewList list;
  list.set_capacity(capacity);
  std::unordered_map<uint32_t, ViewChunk*> at;
  std::unordered_map<ViewChunk*, uint32_t> number;
  uint64_t hits = 0;
  for (uint32_t k : t) {
    ViewChunk*& c = at[k / kLeafPages];
    const unsigned i = k % kLeafPages;
    if (c != nullptr && c->has(i)) {
      ++hits;
      c->use(i, c->get(i));
      continue;
    }
    if (list.pages() >= capacity) {
      auto [v, p] = list.victim();
      list.evicted(*v, p);
    }
    if (c == nullptr) {
      c = new ViewChunk;
      number[c] = k / kLeafPages;
      list.add_chunk(c);
    }
    list.insert(*c, i, false);
    while (ViewChunk* d = list.take_dead()) {
      list.remove_chunk(d);
      at.erase(number[d]);
      number.erase(d);
      delete d;
    }
  }
  *chunks = list.chunks();
  while (ViewChunk* c = list.any_chunk()) {
    c->pages = 0;
    list.remove_chunk(c);
    delete c;
  }
  return static_cast<double>(hits) / static_cast<double>(t.size());
}

struct Zipf {
  std::vector<double> sum;
  Zipf(uint32_t n, double s) : sum(n) {
    double total = 0;
    for (uint32_t i = 0; i < n; ++i) sum[i] = total += 1 / std::pow(i + 1, s);
    for (auto& x : sum) x /= total;
  }
  uint32_t operator()(std::mt19937_64& r) const {
    const double u = std::uniform_real_distribution<>()(r);
    const auto rank = static_cast<uint64_t>(std::lower_bound(sum.begin(), sum.end(), u) - sum.begin());
    return static_cast<uint32_t>(rank * 2654435761u % sum.size());  // hot pages lie apart
  }
};

}  // namespace
}  // namespace spillway::bench

int main(int argc, char** argv) {
  using namespace spillway::bench;
  Report report("cache", argc, argv);
  const auto n = static_cast<size_t>(report.option("requests", 300000));
  constexpr uint32_t kPages = 40000;
  constexpr size_t kCapacity = 4000;
  std::mt19937_64 r(1);
  const Zipf strong(kPages, 1.0), weak(kPages, 0.7);
  struct Named {
    const char* name;
    Trace t;
  };
  std::vector<Named> traces{{"zipf 1.0", {}}, {"zipf 0.7", {}}, {"zipf 1.0 with scans", {}}, {"loop 1.5x", {}}, {"mixed", {}}};
  uint32_t scan = 0, loop = 0;
  for (size_t i = 0; i < n; ++i) {
    traces[0].t.push_back(strong(r));
    traces[1].t.push_back(weak(r));
    traces[2].t.push_back(i / 5000 % 3 == 2 ? kPages + scan++ : strong(r));
    traces[3].t.push_back(loop++ % (kCapacity * 3 / 2));
    const auto kind = r() % 10;
    traces[4].t.push_back(kind < 6 ? strong(r) : kind < 8 ? 2 * kPages + scan++ : 4 * kPages + static_cast<uint32_t>(i % 3000));
  }
  double worst = 1;
  uint64_t chunks = 0;
  for (auto& [name, t] : traces) {
    const double mine = ours(t, kCapacity, &chunks), l = lru(t, kCapacity), a = arc(t, kCapacity),
                 s = s3fifo(t, kCapacity), b = belady(t, kCapacity);
    report.run(name, {{"view", mine}, {"lru", l}, {"arc", a}, {"s3fifo", s}, {"belady", b}, {"chunks", chunks}});
    worst = std::min(worst, l == 0 ? 1.0 : mine / l);
  }
  report.gate("hit ratio over LRU's, worst trace", worst, ">=", 0.97);
  // A dense view: chunk (with its share of malloc), its slot in the list, its pointer in the leaf.
  const double dense = static_cast<double>(sizeof(spillway::cache::ViewChunk) + 16 + 16 + 8) / 64;
  report.run("bytes per page and view", {{"dense", dense}, {"leaf_bytes_per_page", double(sizeof(spillway::cache::Leaf)) / 64}});
  report.gate("bytes per page and view, dense", dense, "<=", 2.5);
  return report.finish();
}
