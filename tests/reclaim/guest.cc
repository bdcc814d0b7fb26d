// What needs a machine of its own (S5, S10): run inside a Debian guest by tests/vm/full_reclaim_test.py.
//
//   reclaim_guest numa             two nodes: pressure on node 1 takes from node 1 only, with memory really bound there
//   reclaim_guest cgroup2 DIR MIB  fills MIB in the cgroup v2 DIR, with the best source that there is, and lives
//   reclaim_guest plain DIR MIB    the same without reclaim: the kernel kills it
//
// Prints "key value" lines; exit 0 when all held.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <mutex>
#include <string>

#include "spillway/reclaim/reclaim.h"
#include "src/reclaim/pressure_file.h"

using namespace spillway::reclaim;
using namespace std::chrono_literals;

namespace {

constexpr std::size_t kBlock = 1u << 20;
constexpr int kBind = 2;              // MPOL_BIND
constexpr int kNodeOfAddress = 1 | 2;  // MPOL_F_NODE | MPOL_F_ADDR

[[noreturn]] void fail(const std::string& what) {
  std::printf("fail %s\n", what.c_str());
  std::exit(1);
}

/// Blocks of real memory per node; the oldest go first.
class Blocks {
 public:
  Blocks(Registry& reg, bool bind) : bind_(bind), s_(reg.alloc(ShrinkerFlags::kNumaAware, "blocks")) {
    s_.set_count([this](const ScanRequest& q) {
      std::lock_guard lock(m_);
      const auto n = have_[q.node].size();
      return n != 0 ? CountReport{n, n * kBlock, 0} : CountReport::empty();
    });
    s_.set_batch(8);
    s_.set_scan([this](const ScanRequest& q) {
      std::lock_guard lock(m_);
      ScanReport r;
      for (; r.scanned < q.nr_to_scan && !have_[q.node].empty(); ++r.scanned) {
        ::munmap(have_[q.node].front(), kBlock);
        have_[q.node].pop_front();
      }
      r.freed_objects = r.scanned;
      r.freed_bytes = r.scanned * kBlock;
      return r;
    });
    s_.register_();
  }
  void add(int node) {
    void* p = ::mmap(nullptr, kBlock, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) fail("mmap");
    const unsigned long mask = 1ul << node;
    if (bind_ && ::syscall(SYS_mbind, p, kBlock, kBind, &mask, 64ul, 0u) != 0) fail("mbind");
    std::memset(p, 1, kBlock);
    int really = 0;
    if (bind_ && (::syscall(SYS_get_mempolicy, &really, nullptr, 0ul, p, kNodeOfAddress) != 0 || really != node)) {
      fail("the block lies on node " + std::to_string(really));
    }
    {
      std::lock_guard lock(m_);
      have_[node].push_back(p);
    }
    s_.set_bit(*root_of(), node);
  }
  std::size_t size(int node) {
    std::lock_guard lock(m_);
    return have_[node].size();
  }
  void attach(GroupRef root) { root_ = std::move(root); }

 private:
  MemoryGroup* root_of() const { return root_.get(); }
  const bool bind_;
  std::mutex m_;
  std::deque<void*> have_[2];  // guarded by m_
  GroupRef root_;
  Shrinker s_;
};

std::uint64_t node_field(int node, const char* key) {
  const auto text = read_text("/sys/devices/system/node/node" + std::to_string(node) + "/meminfo");
  return text ? field_of(*text, key).value_or(0) : 0;
}

int numa() {
  if (node_field(1, "MemTotal") == 0) fail("there is no node 1");
  Registry reg({.nodes = 2});
  Blocks blocks(reg, true);
  blocks.attach(reg.root());
  if (reg.start_background() != Errc::kOk) fail("threads");
  PressureMonitor mon(reg, {.min_interval = 1ms});
  const std::uint64_t total = node_field(1, "MemTotal"), low = total / 4, high = total / 3;
  for (int n : {0, 1}) {
    // Node 0 is never as short as that; its source is there to show that it keeps quiet.
    const std::uint64_t mark = n == 0 ? 4u << 20 : low;
    if (mon.add(open_node_available(reg.clock(), n, mark, n == 0 ? mark : high, 5ms)) != Errc::kOk) fail(mon.to_text());
  }
  constexpr std::size_t kQuiet = 16;
  for (std::size_t i = 0; i < kQuiet; ++i) blocks.add(0);
  const std::uint64_t steps = total / kBlock * 3 / 2;  // once and a half of the node goes through it
  for (std::uint64_t i = 0; i < steps; ++i) {
    blocks.add(1);
    mon.on_ready();
    // A node's thread does the work; whoever fills the node waits while it is short.
    for (int k = 0; node_field(1, "MemFree") < low / 2; ++k) {
      if (k == 10'000) fail("node 1 stays short\n" + mon.to_text() + reg.to_text());
      mon.wait(5ms);
    }
  }
  reg.stop_background();
  std::printf("%s%s", mon.to_text().c_str(), reg.to_text().c_str());
  std::printf("node0_blocks %zu\nnode1_blocks %zu\nnode1_through %llu\nnode0_runs %llu\nnode1_runs %llu\nnode1_freed %llu\n",
              blocks.size(0), blocks.size(1), static_cast<unsigned long long>(steps),
              static_cast<unsigned long long>(reg.background_stats(0).runs),
              static_cast<unsigned long long>(reg.background_stats(1).runs),
              static_cast<unsigned long long>(reg.background_stats(1).freed_bytes));
  if (blocks.size(0) != kQuiet) fail("node 0 lost blocks to node 1's pressure");
  if (reg.background_stats(0).runs != 0 || reg.background_stats(1).runs == 0) fail("the wrong node's thread ran");
  if (reg.background_stats(1).freed_bytes < total / 2) fail("too little came from node 1");
  return 0;
}

int cgroup2(const std::string& dir, std::uint64_t mib, bool reclaim) {
  { std::ofstream(dir + "/cgroup.procs") << ::getpid() << std::flush; }
  Registry reg;
  Blocks blocks(reg, false);
  blocks.attach(reg.root());
  PressureMonitor mon(reg, {.step_bytes = 4u << 20, .min_interval = 1ns, .synchronous = true});
  if (reclaim && mon.open_best() != Errc::kOk) fail(mon.to_text());
  std::uint64_t events = 0;
  for (std::uint64_t i = 0; i < mib; ++i) {
    blocks.add(0);
    if (reclaim) events += static_cast<std::uint64_t>(mon.on_ready());
  }
  std::printf("%s%s", mon.to_text().c_str(), reg.to_text().c_str());
  std::printf("events %llu\nfreed_mib %llu\n", static_cast<unsigned long long>(events),
              static_cast<unsigned long long>(reg.totals().freed_bytes >> 20));
  if (!reclaim) return 0;
  if (events == 0 || reg.totals().freed_bytes == 0) fail("no event, or nothing freed");
  // The cgroup goes: its sources must say so, and not spin.
  { std::ofstream("/sys/fs/cgroup/cgroup.procs") << ::getpid() << std::flush; }
  if (::rmdir(dir.c_str()) != 0) fail("rmdir " + dir);
  for (int i = 0; i < 20; ++i) mon.wait(50ms);
  for (const SourceStatus& s : mon.status()) {
    if (s.active) fail("still active after its cgroup has gone: " + s.text);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "numa") return numa();
  if (argc == 4 && (what == "cgroup2" || what == "plain")) return cgroup2(argv[2], std::strtoull(argv[3], nullptr, 10), what == "cgroup2");
  std::fprintf(stderr, "usage: reclaim_guest numa | cgroup2 DIR MIB | plain DIR MIB\n");
  return 2;
}
