// rcutorture for shrinkers: usage: reclaim_soak [--seconds] [SECONDS (10)] [SEED]. Register, free, groups, re-parenting, lists,
// charges, parallel passes and manual scans at random on all cores, with allocation failures (1 in 64) and
// false low memory (1 in 100) throughout. Each shrinker's data is poisoned when free returns; callbacks check
// it. A watcher reports a reader or a pass that stalls for 10 s. Ends with every sum at zero, or aborts.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "spillway/reclaim/reclaim.h"
#include "src/reclaim/atomic.h"

using namespace spillway::reclaim;

namespace {

constexpr unsigned kAlive = 0x600dcafe, kPoison = 0xdeadbeef;

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "soak: %s\n", what);
  std::abort();
}

struct Obj : LruItem {
  std::atomic<unsigned> magic{kAlive};
};

struct Cache {
  std::atomic<unsigned> magic{kAlive};
  std::atomic<int> inside{0};
  Registry& reg;
  std::unique_ptr<ListLru> lru;
  Shrinker s;
  std::atomic<long> live{0};

  explicit Cache(Registry& r) : reg(r) {}
  bool start(std::mt19937& rng) {
    lru = std::make_unique<ListLru>(reg);
    s = reg.alloc(ShrinkerFlags::kGroupAware | ShrinkerFlags::kNumaAware, "soak");
    if (!s) return false;
    lru->attach(&s);
    s.set_batch(static_cast<unsigned>(rng() % 64));
    s.set_seeks(static_cast<unsigned>(rng() % 4));
    s.set_count([this](const ScanRequest& q) {
      if (magic != kAlive) die("count after free");
      return lru->count(q);
    });
    s.set_scan([this](const ScanRequest& q) {
      if (magic != kAlive) die("scan after free");
      ++inside;
      std::vector<Obj*> dead;
      std::uint64_t n = 0;
      auto r = lru->walk(q, [&](LruItem& i, ListLru::Walker& w) {
        if (++n % 7 == 0) return LruVerdict::kRotate;
        if (n % 11 == 0) return LruVerdict::kSkip;
        w.isolate(i, 64);
        dead.push_back(static_cast<Obj*>(&i));
        return LruVerdict::kRemoved;
      });
      for (Obj* o : dead) {
        if (o->magic.exchange(kPoison) != kAlive) die("object taken twice");
        delete o;
        --live;
      }
      --inside;
      return r;
    });
    return s.register_() == Errc::kOk;
  }
  void add(MemoryGroup& g, int node) {
    auto* o = new Obj;
    ++live;
    if (!lru->add(*o, g, node, 64)) die("add");
  }
  // Frees what is left by hand: reclaim everything until it is gone.
  void stop() {
    for (int i = 0; live != 0; ++i) {
      reg.reclaim({.priority = 0});
      if (i > 100'000) die("objects are lost: the bits do not lead to them");
    }
    if (s.free() != Errc::kOk) die("free");
    if (inside != 0) die("a callback runs after free");
    magic = kPoison;
  }
};

thread_local unsigned t_faults = 0;
thread_local bool t_faulty = false;
bool fault(std::size_t) { return t_faulty && ++t_faults % 64 == 0; }

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--seconds") == 0) {  // as ./test --soak says it
    ++argv;
    --argc;
  }
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : std::random_device()();
  std::printf("soak: %.0f s, seed %u\n", seconds, seed);
  set_allocation_fault(fault);
  {
    std::atomic<unsigned> fake{0};
    Registry reg({.nodes = 2, .max_groups = 4096, .ref_shards = 2, .charge_batch_bytes = 1024, .workers = 2,
                  .fake_low_memory = [&] { return ++fake % 100 == 0; }});
    if (reg.start_background() != Errc::kOk) die("threads");
    std::atomic<bool> end{false};
    std::atomic<std::uint64_t> ops{0}, passes{0}, heartbeat[8] = {};
    std::vector<std::thread> pool;
    for (int w = 0; w < 2; ++w) {
      pool.emplace_back([&, w] {  // attach, fill, detach
        t_faulty = true;
        std::mt19937 rng(seed + static_cast<unsigned>(w));
        while (!end) {
          ++heartbeat[w];
          Cache c(reg);
          try {
            if (!c.start(rng)) continue;
          } catch (const std::bad_alloc&) {
            continue;
          }
          GroupRef top = reg.create_group("t" + std::to_string(w));
          if (!top) top = reg.find_group("t" + std::to_string(w));
          if (!top) top = reg.root();
          GroupRef g = reg.create_group("g", top.get());
          if (!g) g = top;
          for (int i = 0; i < 300; ++i) {
            c.add(*g, static_cast<int>(rng() % 2));
            if (rng() % 8 == 0 && g->try_charge(100, {.node = static_cast<int>(rng() % 2)})) g->uncharge(100);
            if (i == 150 && !g->is_root() && g != top) reg.remove_group(*g);
          }
          if (rng() % 4 == 0) reg.scan(c.s.id(), *top, 0, 10);
          if (rng() % 16 == 0) reg.list();
          c.stop();
          if (!top->is_root()) reg.remove_group(*top);
          ++ops;
        }
      });
    }
    for (int w = 2; w < 4; ++w) {
      pool.emplace_back([&, w] {  // pressure
        std::mt19937 rng(seed + static_cast<unsigned>(w));
        while (!end) {
          ++heartbeat[w];
          reg.reclaim({.node = static_cast<int>(rng() % 3) - 1, .target_bytes = rng() % 100'000,
                       .may_block = true, .parallel = rng() % 4 == 0});
          if (rng() % 32 == 0) reg.request_background(kAnyNode, 4096);
          ++passes;
        }
      });
    }
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    std::uint64_t seen[4] = {};
    auto last_look = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      if (std::chrono::steady_clock::now() - last_look < std::chrono::seconds(60)) continue;
      last_look = std::chrono::steady_clock::now();
      for (int w = 0; w < 4; ++w) {
        const std::uint64_t now = heartbeat[w];
        if (now == seen[w]) die("a thread has stalled for a minute");
        seen[w] = now;
      }
    }
    end = true;
    for (auto& t : pool) t.join();
    reg.stop_background();
    if (reg.root()->usage_exact() != 0) die("charges are left over");
    std::printf("soak: %llu attach/detach, %llu passes\n%s", static_cast<unsigned long long>(ops.load()),
                static_cast<unsigned long long>(passes.load()), to_text(rcu_status()).c_str());
    if (ops == 0 || passes == 0) die("nothing was done");
  }
  std::printf("soak: ok\n");
}
