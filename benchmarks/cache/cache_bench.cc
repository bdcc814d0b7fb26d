// ./bench cache: hit ratios of the view's policy beside LRU, ARC, S3-FIFO and Belady's optimum, what host memory N tenants
// over one base take, and what a view costs a hit.
//   bench_cache [--json FILE] [--gate] [--requests N] [--base MIB] [--tenants N] [--only policy|memory|hit]
#include <algorithm>
#include <cmath>
#include <random>

#include "benchmarks/cache/policies.h"
#include "benchmarks/common/bench.h"
#include "src/cache/frame_copy.h"
#include "src/cache/impl.h"
#include "src/cache/index.h"
#include "src/cache/view.h"
#include "src/io/sim_reactor.h"

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

// A disk of any size that answers at once; its pages say their number.
class Numbers final : public Volume {
 public:
  explicit Numbers(uint64_t size) : Volume("numbers", size, {}) {}
  std::string_view layer() const override { return "numbers"; }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    for (const iovec& v : iov) {
      *static_cast<uint64_t*>(v.iov_base) = offset;
      offset += v.iov_len;
    }
    return Task<Status>::ready();
  }
  Task<Status> do_write(IoContext, uint64_t, Iov) override { return Task<Status>::ready(); }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }
};

// A hit without views: the shared index alone.
class IndexOnly final : public Volume {
 public:
  IndexOnly(Cache::Impl& c, cache::Node& n, uint64_t size) : Volume("index", size, {}), c_(c), n_(n) {}
  std::string_view layer() const override { return "index"; }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    const uint64_t page = offset / kPageSize;
    cache::FrameId f = cache::kNoFrame;
    {
      reclaim::RcuGuard rcu;
      cache::Leaf* leaf = n_.index.find(page / kLeafPages);
      if (leaf != nullptr) f = leaf->at(page % kLeafPages);
      if (f == cache::kNoFrame || !c_.store->frame(f).try_get() || leaf->at(page % kLeafPages) != f) std::abort();
    }
    cache::frame_to_iov(iov, 0, c_.store->data(f) + offset % kPageSize, iov_length(iov));
    c_.put(f);
    return Task<Status>::ready();
  }
  Task<Status> do_write(IoContext, uint64_t, Iov) override { return Task<Status>::ready(); }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }

 private:
  Cache::Impl& c_;
  cache::Node& n_;
};

struct House {
  SimReactor reactor;
  reclaim::Registry registry;
  std::vector<reclaim::GroupRef> groups;
  std::unique_ptr<Cache> cache;
  House(uint64_t capacity, uint64_t tenants) {
    for (uint64_t k = 0; k < tenants; ++k) groups.push_back(registry.create_group("t" + std::to_string(k)));
    CacheOptions o;
    o.capacity_bytes = o.max_capacity_bytes = capacity;
    o.registry = &registry;
    o.background = &reactor;
    cache = std::move(*Cache::create(o));
  }
  ~House() { (void)reactor.block_on(cache->close()); }
  void read(Volume& v, uint64_t tenant, uint64_t offset, std::vector<std::byte>& to) {
    const iovec one{to.data(), to.size()};
    IoContext ctx;
    ctx.group = GroupId{groups[tenant]->id()};
    Status s = reactor.block_on([](Volume& vol, IoContext c, uint64_t at, const iovec& one_piece) -> Task<Status> {
      co_return co_await vol.read(c, at, Iov(&one_piece, 1));
    }(v, ctx, offset, one));
    if (!s) std::abort();
  }
};

void memory(Report& report) {
  const uint64_t base = static_cast<uint64_t>(report.option("base", 1024)) * kMiB;
  const auto most = static_cast<uint64_t>(report.option("tenants", 16));
  std::vector<std::byte> piece(256 * kKiB);
  for (uint64_t n = 1; n <= most; n *= 2) {
    // Room in every view for the whole base, as a host of that size would configure it.
    House h(n * base + base / 8, n);
    VolumePtr v = *h.cache->attach(std::make_shared<Numbers>(base), CacheMode::kIsolated, "base");
    for (uint64_t t = 0; t < n; ++t)
      for (uint64_t at = 0; at < base; at += piece.size()) h.read(*v, t, at, piece);
    const CacheStats s = h.cache->stats();
    if (s.view_bytes != n * base) std::abort();  // every tenant holds all of it
    const double pages = static_cast<double>(base / kPageSize);
    const double frames = static_cast<double>(s.backed_bytes) / static_cast<double>(base);
    const double with_state = static_cast<double>(s.backed_bytes + s.metadata_bytes) / static_cast<double>(base);
    const double per_view = static_cast<double>(s.view_metadata_bytes) / pages / static_cast<double>(n);
    report.run("memory, " + std::to_string(n) + " tenants over one base of " + std::to_string(base / kMiB) + " MiB",
               {{"frames_over_one_copy", frames}, {"with_index_and_views", with_state}, {"private_copies", n},
                {"bytes_per_page_and_view", per_view},
                {"index_bytes_per_page", static_cast<double>(s.metadata_bytes - s.view_metadata_bytes) / pages}});
    report.gate("frames for the base over one copy, " + std::to_string(n) + " tenants", frames, "<=", 1.1);
    if (n == most) report.gate("bytes per page and view (aim 2)", per_view, "<=", 2.5);
  }
}

// Random hits of 512 bytes, so that the look-up is what is measured and not the copy.
void hit(Report& report) {
  constexpr uint64_t kPages = 16384;
  constexpr int kRounds = 7, kReads = 400000;
  for (uint64_t size : {kGiB, 64 * kGiB, 1024 * kGiB}) {
    House h(256 * kMiB, 1);
    auto disk = std::make_shared<Numbers>(size);
    VolumePtr view = *h.cache->attach(disk, CacheMode::kIsolated, "base");
    // Runs of 16 pages spread over all of it.
    std::vector<uint64_t> at;
    std::vector<std::byte> piece(16 * kPageSize), small(512);
    for (uint64_t k = 0; k < kPages / 16; ++k) {
      const uint64_t run = size / (kPages / 16) * k / kPageSize * kPageSize;
      h.read(*view, 0, run, piece);
      for (uint64_t p = 0; p < 16; ++p) at.push_back(run + p * kPageSize);
    }
    std::mt19937_64 r(5);
    std::shuffle(at.begin(), at.end(), r);
    IndexOnly index(h.cache->impl(), *h.cache->impl().nodes_.front(), size);
    IoContext ctx;
    ctx.group = GroupId{h.groups[0]->id()};
    const iovec one{small.data(), small.size()};
    // On the reactor, as a queue would.
    auto measure = [&](Volume& v) {
      double ns = 0;
      h.reactor.block_on([](Volume& vol, IoContext c, const std::vector<uint64_t>& where, const iovec& to,
                            double& out) -> Task<void> {
        const uint64_t begin = thread_cpu_ns();
        for (int k = 0; k < kReads; ++k) {
          Status s = co_await vol.read(c, where[static_cast<size_t>(k) % where.size()], Iov(&to, 1));
          if (!s) std::abort();
        }
        out = static_cast<double>(thread_cpu_ns() - begin) / kReads;
      }(v, ctx, at, one, ns));
      return ns;
    };
    measure(*view);
    std::vector<double> with, without;
    interleave(kRounds, {{"view", [&] { with.push_back(measure(*view)); }}, {"index", [&] { without.push_back(measure(index)); }}});
    report.run("hit, node of " + format_size(size), {{"view_ns", median(with)}, {"index_only_ns", median(without)},
                                                   {"view_spread", spread(with)}, {"index_spread", spread(without)}});
    report.gate("ns a view adds to a hit, node of " + format_size(size), median(with) - median(without), "<=", 50);
  }
}

}  // namespace
}  // namespace spillway::bench

int main(int argc, char** argv) {
  using namespace spillway::bench;
  Report report("cache", argc, argv);
  const std::string only = report.option("only", "");
  pin(1);
  if (only.empty() || only == "memory") memory(report);
  if (only.empty() || only == "hit") hit(report);
  if (!only.empty() && only != "policy") return report.finish();
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
  return report.finish();
}
