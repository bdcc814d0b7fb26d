#include "benchmarks/reclaim/schemes.h"

#include <pthread.h>
#include <sched.h>

#include <list>
#include <mutex>
#include <thread>

#include "src/reclaim/internal.h"
#include "src/reclaim/pass.h"

namespace spillway::reclaim::bench {
namespace {

RegistryOptions options(unsigned shards) {
  RegistryOptions o;
  o.ref_shards = shards;
  o.time_budget = std::chrono::hours(1);  // no scheme but ours passes by a stuck callback
  return o;
}

// ---- ours

class Ours final : public Scheme {
 public:
  explicit Ours(unsigned shards) : reg_([&] {
    RegistryOptions o = options(shards);
    o.time_budget = std::chrono::milliseconds(50);
    return o;
  }()) {}
  Handle add(CountFn count, ScanFn scan) override {
    Shrinker s = reg_.alloc(ShrinkerFlags::kNone, "bench");
    s.set_count(std::move(count));
    s.set_scan(std::move(scan));
    s.register_();
    s.set_bit();
    return keep(std::move(s));
  }
  void remove(Handle h) override { take(h).free(); }
  WalkResult walk() override {
    const ReclaimResult r = reg_.reclaim({.priority = 12, .priority_end = 12});
    return {r.shrinkers, false};
  }
  Registry& registry() override { return reg_; }

 private:
  // The handle is one pointer; so is ours.
  static_assert(sizeof(Shrinker) == sizeof(Handle));
  static Handle keep(Shrinker s) {
    Handle h = RegistryAccess::impl(s);
    new (&s) Shrinker();  // the pointer owns it now
    return h;
  }
  static Shrinker take(Handle h) {
    Shrinker s;
    *reinterpret_cast<Handle*>(&s) = h;
    return s;
  }
  Registry reg_;
};

// ---- what the others share

class Base : public Scheme {
 public:
  Base() : reg_(options(1)), impl_(RegistryAccess::impl(reg_)) {}
  Registry& registry() override { return reg_; }

 protected:
  ShrinkerImpl* make_impl(CountFn count, ScanFn scan) {
    Shrinker s = reg_.alloc(ShrinkerFlags::kNone, "bench");
    s.set_count(std::move(count));
    s.set_scan(std::move(scan));
    ShrinkerImpl* p = RegistryAccess::impl(s);
    new (&s) Shrinker();
    return p;
  }
  void drop(ShrinkerImpl* p) {
    impl_.recycle(*p);
  }
  void set_bit(ShrinkerImpl* p) { impl_.set_bit(*impl_.root, 0, p->id); }

  // The library's walk over bits without references: the scheme holds its lock around.
  // `stop_after` is asked after each visit.
  template <class Stop>
  WalkResult walk_bits(Stop stop_after) {
    WalkResult out;
    ReclaimRequest req;
    req.priority = req.priority_end = 12;
    WalkRecord* rec = impl_.take_record();
    Atomic<std::uint64_t> freed{0};
    Atomic<std::uint32_t> stop{0};
    Pass pass(impl_, req, impl_.root, rec, freed, stop);
    Info* info = GroupAccess::state(*impl_.root).info[0].load();
    for (std::uint64_t bs = info != nullptr ? info->summary.load() : 0; bs != 0 && !out.bailed; bs &= bs - 1) {
      const auto b = static_cast<std::uint32_t>(std::countr_zero(bs));
      Block* block = info->blocks[b].load();
      for (std::uint64_t us = block->summary.load(); us != 0 && !out.bailed; us &= us - 1) {
        const auto u = static_cast<std::uint32_t>(std::countr_zero(us));
        Unit* unit = block->units[u].load();
        for (std::uint64_t m = unit->map.load(); m != 0 && !out.bailed; m &= m - 1) {
          const std::uint32_t bit = static_cast<std::uint32_t>(std::countr_zero(m));
          ShrinkerImpl* s = impl_.ids.lookup((b * kFan + u) * kFan + bit);
          if (s == nullptr) {
            unit->map.fetch_and(~mask(bit));
            continue;
          }
          if (!s->scan) continue;
          pass.shrink(*s, 0, *impl_.root, 0);
          ++out.visits;
          out.bailed = stop_after();
        }
      }
    }
    impl_.give_record(rec);
    return out;
  }

  Registry reg_;
  Registry::Impl& impl_;
};

// (a) what came before: one rwlock. A walker tries, and skips the pass when a writer has it or waits; inside it
// goes to the end. `yield_to_writers` is 42c9db39's refinement: the walker looks after each shrinker whether a
// writer waits, and then ends its pass early (writers wait for one callback, walks are cut).
class RwLock final : public Base {
 public:
  explicit RwLock(bool yield_to_writers) : yield_(yield_to_writers) {
    pthread_rwlockattr_t a;
    pthread_rwlockattr_init(&a);
    pthread_rwlockattr_setkind_np(&a, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&lock_, &a);
  }
  ~RwLock() override { pthread_rwlock_destroy(&lock_); }
  Handle add(CountFn count, ScanFn scan) override {
    ShrinkerImpl* p = make_impl(std::move(count), std::move(scan));
    waiting_.fetch_add(1);
    pthread_rwlock_wrlock(&lock_);
    waiting_.fetch_sub(1);
    set_bit(p);
    pthread_rwlock_unlock(&lock_);
    return p;
  }
  void remove(Handle h) override {
    auto* p = static_cast<ShrinkerImpl*>(h);
    waiting_.fetch_add(1);
    pthread_rwlock_wrlock(&lock_);
    waiting_.fetch_sub(1);
    impl_.ids.erase(*p);
    pthread_rwlock_unlock(&lock_);
    drop(p);
  }
  WalkResult walk() override {
    if (pthread_rwlock_tryrdlock(&lock_) != 0) return {0, true};
    const WalkResult r = walk_bits([&] { return yield_ && waiting_.load(std::memory_order_relaxed) != 0; });
    pthread_rwlock_unlock(&lock_);
    return r;
  }

 private:
  const bool yield_;
  pthread_rwlock_t lock_;
  std::atomic<int> waiting_{0};
};

// (b) what f95bdb70 had: walkers inside one SRCU section, free synchronizes. Two counters per slot and a
// flip, as SRCU does; plain sleeps a millisecond (a jiffy of a 1000 Hz kernel) between looks, expedited yields.
class Srcu final : public Base {
 public:
  explicit Srcu(bool expedited) : expedited_(expedited) {}
  Handle add(CountFn count, ScanFn scan) override {
    ShrinkerImpl* p = make_impl(std::move(count), std::move(scan));
    std::lock_guard lock(m_);
    set_bit(p);
    return p;
  }
  void remove(Handle h) override {
    auto* p = static_cast<ShrinkerImpl*>(h);
    {
      std::lock_guard lock(m_);
      impl_.ids.erase(*p);
    }
    synchronize();
    drop(p);
  }
  WalkResult walk() override {
    const unsigned i = index_.load() & 1;
    Slot& s = slots_[thread_slot() % kSlots];
    s.in[i].fetch_add(1);
    const WalkResult r = walk_bits([] { return false; });
    s.out[i].fetch_add(1);
    return r;
  }

 private:
  static constexpr unsigned kSlots = 8;
  struct alignas(64) Slot {
    std::atomic<std::uint64_t> in[2]{}, out[2]{};
  };
  bool drained(unsigned i) {
    std::uint64_t in = 0, out = 0;
    for (auto& s : slots_) out += s.out[i].load();
    for (auto& s : slots_) in += s.in[i].load();
    return in == out;
  }
  void synchronize() {
    std::lock_guard lock(gp_);
    for (int phase = 0; phase < 2; ++phase) {
      const unsigned old = index_.fetch_add(1) & 1;
      if (!expedited_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      while (!drained(old)) {
        if (expedited_) sched_yield();
        else std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
  }
  const bool expedited_;
  std::mutex m_, gp_;
  std::atomic<unsigned> index_{0};
  Slot slots_[kSlots];
};

// (g) bcachefs-tools' shim: one mutex, held over the callbacks.
class OneMutex final : public Base {
 public:
  Handle add(CountFn count, ScanFn scan) override {
    ShrinkerImpl* p = make_impl(std::move(count), std::move(scan));
    std::lock_guard lock(m_);
    set_bit(p);
    return p;
  }
  void remove(Handle h) override {
    auto* p = static_cast<ShrinkerImpl*>(h);
    {
      std::lock_guard lock(m_);
      impl_.ids.erase(*p);
    }
    drop(p);
  }
  WalkResult walk() override {
    std::lock_guard lock(m_);
    return walk_bits([] { return false; });
  }

 private:
  std::mutex m_;
};

// (d) one RCU list with reference counts: the global walk of v2. It walks what is registered, not bits.
class RcuList final : public Base {
 public:
  ~RcuList() override { rcu_barrier(); }
  Handle add(CountFn count, ScanFn scan) override {
    auto* n = new Node;
    n->s = make_impl(std::move(count), std::move(scan));
    n->s->done.store(ShrinkerImpl::kOpen, std::memory_order_relaxed);
    n->s->live_shards.store(1, std::memory_order_relaxed);
    n->s->refs(0).store(1, std::memory_order_release);
    set_bit(n->s);
    std::lock_guard lock(m_);
    Node* first = head_.load();
    n->next.store(first);
    if (first != nullptr) first->prev = n;
    head_.store(n);
    return n;
  }
  void remove(Handle h) override {
    auto* n = static_cast<Node*>(h);
    ShrinkerImpl* s = n->s;
    s->put(0);
    s->wait_done();
    {
      std::lock_guard lock(m_);
      Node* next = n->next.load();
      if (n->prev != nullptr) n->prev->next.store(next);
      else head_.store(next);
      if (next != nullptr) next->prev = n->prev;
      impl_.ids.erase(*s);
    }
    n->retire();  // the block with it: a reader of this list does not look again after its try_get
  }
  WalkResult walk() override {
    WalkResult out;
    ReclaimRequest req;
    req.priority = req.priority_end = 12;
    WalkRecord* rec = impl_.take_record();
    Atomic<std::uint64_t> freed{0};
    Atomic<std::uint32_t> stop{0};
    Pass pass(impl_, req, impl_.root, rec, freed, stop);
    rcu().lock();
    for (Node* n = head_.load(); n != nullptr; n = n->next.load()) {
      if (!n->s->try_get(0)) continue;
      rcu().unlock();
      pass.shrink(*n->s, 0, *impl_.root, 0);
      ++out.visits;
      rcu().lock();  // before the put, so that n stays linked in until we have read its next
      n->s->put(0);
    }
    rcu().unlock();
    impl_.give_record(rec);
    return out;
  }

 private:
  struct Node : RcuObject<Node> {
    ShrinkerImpl* s = nullptr;
    RcuPtr<Node> next;
    Node* prev = nullptr;  // guarded by m_
    ~Node() {
      if (s != nullptr) s->reg->recycle(*s);
    }
  };
  std::mutex m_;
  RcuPtr<Node> head_;
};

}  // namespace

const std::vector<std::string>& scheme_names() {
  static const std::vector<std::string> names = {"rwlock", "rwlock-yield", "srcu",   "srcu-expedited",
                                                 "mutex",  "rcu-list",     "ours-1", "ours"};
  return names;
}

std::unique_ptr<Scheme> make_scheme(const std::string& name) {
  if (name == "rwlock") return std::make_unique<RwLock>(false);
  if (name == "rwlock-yield") return std::make_unique<RwLock>(true);
  if (name == "srcu") return std::make_unique<Srcu>(false);
  if (name == "srcu-expedited") return std::make_unique<Srcu>(true);
  if (name == "mutex") return std::make_unique<OneMutex>();
  if (name == "rcu-list") return std::make_unique<RcuList>();
  if (name == "ours-1") return std::make_unique<Ours>(1);
  return std::make_unique<Ours>(0);
}

}  // namespace spillway::reclaim::bench
