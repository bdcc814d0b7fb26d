// Birth and end of a registry, its words, its default clock.
#include "spillway/reclaim/registry.h"

#include <cstdio>
#include <cstdlib>

#include "src/reclaim/internal.h"

namespace spillway::reclaim {

std::string_view to_string(Errc e) noexcept {
  switch (e) {
    case Errc::kOk: return "ok";
    case Errc::kNoMemory: return "no memory";
    case Errc::kLimit: return "no id left";
    case Errc::kInvalid: return "invalid";
    case Errc::kState: return "wrong state";
    case Errc::kBusy: return "busy";
    case Errc::kSelfFree: return "freed from its own callback";
    case Errc::kDeadlock: return "callbacks free each other";
    case Errc::kUnsupported: return "unsupported";
    case Errc::kIo: return "system call failed";
  }
  return "?";
}
std::string_view to_string(Reason r) noexcept {
  static constexpr std::string_view names[] = {"direct", "background", "pressure",
                                               "manual", "offline",    "proactive"};
  return names[static_cast<std::size_t>(r) % kReasons];
}
std::string_view to_string(ScanStatus s) noexcept {
  static constexpr std::string_view names[] = {"progress", "empty", "busy", "stop"};
  return names[static_cast<std::size_t>(s) % 4];
}
std::string_view to_string(NotFreed r) noexcept {
  static constexpr std::string_view names[] = {"busy",    "pinned",  "dirty",    "referenced", "protected",
                                               "stopped", "skipped", "deferred", "no-block"};
  return names[static_cast<std::size_t>(r) % kNotFreedReasons];
}
std::string_view to_string(ReclaimStatus s) noexcept {
  static constexpr std::string_view names[] = {"reached", "exhausted", "deadline", "recursion"};
  return names[static_cast<std::size_t>(s) % 4];
}

namespace {
class SteadyClock final : public Clock {
 public:
  TimePoint now() noexcept override { return std::chrono::steady_clock::now(); }
};

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "spillway::reclaim: %s\n", what);
  std::abort();
}

template <class T>
T* make_array(std::size_t n) {
  auto* p = static_cast<T*>(allocate(n * sizeof(T)));
  if (p == nullptr) throw std::bad_alloc();
  for (std::size_t i = 0; i < n; ++i) new (&p[i]) T();
  return p;
}
}  // namespace

Clock& Clock::steady() noexcept {
  static SteadyClock c;
  return c;
}

void Registry::Impl::diag(Severity sev, std::string_view what, const ShrinkerImpl* s,
                          std::string_view text) noexcept {
  if (!opt.diagnostics) return;
  CallFrame frame{this, nullptr, nullptr};  // free and reclaim inside are refused, not a deadlock
  CallFrame* const outer = std::exchange(t_frame, &frame);
  try {
    const std::string label = s != nullptr ? s->label() : std::string();
    opt.diagnostics({sev, what, label, text});
  } catch (...) {
    // A diagnostics callback that throws has nobody to tell.
  }
  t_frame = outer;
}

bool Registry::Impl::Names::try_emplace_name(std::uint64_t parent, std::string_view name) noexcept {
  try {
    return set.insert(std::to_string(parent) + "/" + std::string(name)).second;
  } catch (const std::bad_alloc&) {
    return false;
  }
}
void Registry::Impl::Names::erase_name(std::uint64_t parent, std::string_view name) noexcept {
  // Short names fit the small buffer; a long one that can not be built stays reserved, harmlessly.
  try {
    set.erase(std::to_string(parent) + "/" + std::string(name));
  } catch (const std::bad_alloc&) {
  }
}


Registry::Impl::~Impl() {
  free_blocks();
  for (unsigned i = 0; records != nullptr && i < kMaxRecords; ++i) {
    if (auto* ring = records[i].ring.load()) release(ring, records[i].ring_size * sizeof(*ring));
  }
  if (records != nullptr) release(records, kMaxRecords * sizeof(WalkRecord));
  if (group_table != nullptr) release(group_table, opt.max_groups * sizeof(*group_table));
  if (node_usage != nullptr) {
    release(node_usage, usage_slots * static_cast<unsigned>(opt.nodes) * sizeof(UsageCell));
  }
  for (int n = 0; nodes != nullptr && n < opt.nodes; ++n) {
    if (nodes[n].active != nullptr) {
      release(nodes[n].active, (opt.max_groups + 63) / 64 * sizeof(std::uint64_t));
    }
  }
}

Registry::Registry(RegistryOptions o) : impl_(std::make_unique<Impl>()) {
  rcu_enable_fork();
  Impl& m = *impl_;
  m.self = this;
  o.nodes = std::clamp(o.nodes, 1, kMaxNodes);
  o.max_groups = std::clamp<std::uint32_t>(o.max_groups, 2, 65536);
  if (o.ref_shards == 0) o.ref_shards = std::min(cores(), 8u);
  o.ref_shards = std::min(o.ref_shards, 64u);
  if (o.charge_slots == 0) o.charge_slots = std::min(cores(), 16u);
  o.charge_slots = std::min(o.charge_slots, 256u);
  if (o.workers == 0) o.workers = std::min(cores(), 4u);
  o.workers = std::min(o.workers, 64u);
  if (o.time_budget.count() <= 0) o.time_budget = std::chrono::milliseconds(50);
  if (o.quarantine_after == 0) o.quarantine_after = 1;
  m.opt = std::move(o);
  m.clock = m.opt.clock != nullptr ? m.opt.clock : &Clock::steady();
  m.usage_slots = m.opt.charge_slots;
  m.nodes = std::make_unique<NodeState[]>(static_cast<std::size_t>(m.opt.nodes));
  for (int n = 0; n < m.opt.nodes; ++n) {
    m.nodes[n].active = make_array<Atomic<std::uint64_t>>((m.opt.max_groups + 63) / 64);
  }
  m.group_table = make_array<RcuPtr<MemoryGroup>>(m.opt.max_groups);
  m.group_ids.assign((m.opt.max_groups + 63) / 64, 0);
  if (m.opt.max_groups % 64 != 0) m.group_ids.back() = ~std::uint64_t{0} << (m.opt.max_groups % 64);
  m.node_usage = make_array<Impl::UsageCell>(m.usage_slots * static_cast<unsigned>(m.opt.nodes));
  m.records = make_array<WalkRecord>(kMaxRecords);
  m.root = GroupAccess::make(*this, nullptr, "");
  if (m.root == nullptr) throw std::bad_alloc();
  GroupAccess::set_id(*m.root, 0, m.next_serial++);
  m.group_ids[0] |= 1;
  m.group_table[0].store(m.root);
  m.group_limit.store(1);
  m.group_count.store(1);
}

Registry::~Registry() {
  Impl& m = *impl_;
  m.stop_threads();
  if (m.ids.size() != 0) die("a registry was destroyed before its shrinkers");
  // Groups nobody removed go with the registry; the table holds one reference to each.
  for (std::uint32_t i = m.group_limit.load(); i-- > 0;) {
    if (MemoryGroup* g = m.group_table[i].exchange(nullptr)) GroupAccess::put(g);
  }
  if (m.group_count.load() != 0) die("a registry was destroyed while there are references to its groups");
  rcu_barrier();
}

const RegistryOptions& Registry::options() const noexcept { return impl_->opt; }
Clock& Registry::clock() const noexcept { return *impl_->clock; }

}  // namespace spillway::reclaim
