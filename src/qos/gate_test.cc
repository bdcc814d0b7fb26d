// Every interleaving of a few reactors at the gate (gate.h), up to a number of preemptions: with a switch before each of its
// atomic operations, no request is left waiting while a slot is free, the device never holds more than the depth, and only
// one is inside the arbiter. Sequentially consistent interleavings; weaker orders are the thread sanitizer's (qos_test.cc).
#include "src/qos/gate.h"

#ifndef __SANITIZE_THREAD__  // which cannot follow fibers, and has nothing to find between them
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace spillway {
namespace {

// Fibers of which one runs at a time. A schedule is the list of who went on at each step; after a run, next() is the
// schedule that differs in the last choice that has an alternative left.
class Explorer {
 public:
  // preemptions: switches away from a fiber that could have gone on. seed != 0: random schedules instead.
  Explorer(uint32_t preemptions, uint64_t seed) : most_(preemptions), random_(seed), shuffle_(seed != 0) { the = this; }
  ~Explorer() { the = nullptr; }
  static Explorer* the;

  // False: every fiber that is left waits for what never comes.
  bool run(const std::vector<std::function<void()>>& bodies) {
    fibers_.resize(bodies.size());
    for (size_t i = 0; i < bodies.size(); ++i) {
      Fiber& f = fibers_[i];
      if (!f.stack) f.stack = std::make_unique<char[]>(kStack);
      f.body = &bodies[i];
      f.ended = false;
      f.ready = nullptr;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = &home_;
      makecontext(&f.context, reinterpret_cast<void (*)()>(&Explorer::enter), 0);
    }
    at_ = 0, used_ = 0, current_ = SIZE_MAX;
    for (;;) {
      const size_t next = choose();
      if (next == SIZE_MAX) break;
      current_ = next;
      swapcontext(&home_, &fibers_[next].context);
    }
    for (auto& f : fibers_)
      if (!f.ended) return false;
    return true;
  }
  bool next() {
    if (shuffle_) return true;
    while (!choices_.empty()) {
      Choice& c = choices_.back();
      while (++c.taken < c.options.size())
        if (c.before + cost(c) <= most_) return true;
      choices_.pop_back();
    }
    return false;
  }
  void step() { swapcontext(&fibers_[current_].context, &home_); }
  // Until `ready`: not a choice meanwhile.
  void wait(std::function<bool()> ready) {
    fibers_[current_].ready = std::move(ready);
    step();
    fibers_[current_].ready = nullptr;
  }

 private:
  static constexpr size_t kStack = 64 * 1024;
  struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    const std::function<void()>* body = nullptr;
    std::function<bool()> ready;
    bool ended = false;
  };
  struct Choice {
    std::vector<uint8_t> options;  // the first costs nothing
    size_t taken = 0;
    uint32_t before = 0;           // preemptions up to here
    bool forced = false;           // the one that ran cannot go on: none of the options is a preemption
  };
  static uint32_t cost(const Choice& c) { return !c.forced && c.taken != 0 ? 1 : 0; }
  static void enter() {
    Fiber& f = the->fibers_[the->current_];
    (*f.body)();
    f.ended = true;
  }
  bool can_go(size_t i) const { return !fibers_[i].ended && (!fibers_[i].ready || fibers_[i].ready()); }
  size_t choose() {
    if (!shuffle_ && at_ < choices_.size()) {
      Choice& c = choices_[at_++];
      used_ = c.before + cost(c);
      return c.options[c.taken];
    }
    Choice c;
    c.before = used_;
    c.forced = current_ == SIZE_MAX || !can_go(current_);
    if (!c.forced) c.options.push_back(static_cast<uint8_t>(current_));
    for (size_t i = 0; i < fibers_.size(); ++i)
      if (i != current_ && can_go(i)) c.options.push_back(static_cast<uint8_t>(i));
    if (c.options.empty()) return SIZE_MAX;
    if (shuffle_) return c.options[random_() % c.options.size()];
    choices_.push_back(c);
    ++at_;
    return c.options[0];
  }

  const uint32_t most_;
  std::mt19937_64 random_;
  const bool shuffle_;
  std::vector<Fiber> fibers_;
  std::vector<Choice> choices_;
  size_t at_ = 0, current_ = SIZE_MAX;
  uint32_t used_ = 0;
  ucontext_t home_{};
};
Explorer* Explorer::the = nullptr;

template <class T>
class Stepped {
 public:
  Stepped(T v) : v_(v) {}
  T load(std::memory_order) const { return step(), v_; }
  T exchange(T v, std::memory_order) { return step(), std::exchange(v_, v); }
  T fetch_add(T v, std::memory_order) { return step(), std::exchange(v_, v_ + v); }
  bool compare_exchange_strong(T& expected, T v, std::memory_order, std::memory_order) {
    step();
    if (v_ != expected) return expected = v_, false;
    v_ = v;
    return true;
  }
  bool compare_exchange_weak(T& expected, T v, std::memory_order a, std::memory_order b) {
    return compare_exchange_strong(expected, v, a, b);
  }
  void store(T v, std::memory_order) { step(), v_ = v; }

 private:
  static void step() {
    if (Explorer::the != nullptr) Explorer::the->step();
  }
  T v_;
};

struct Shape {
  const char* name;
  std::vector<std::vector<uint32_t>> units;  // of each reactor's clients, each with one request at a time
  uint32_t depth, requests;                  // of each client
};

// Reactors with clients in closed loops above one gate, rounds as in qos.cc.
class World {
 public:
  explicit World(const Shape& shape) : shape_(shape) {}
  // Empty, or what went wrong.
  std::string run(Explorer& explorer) {
    reactors_.resize(shape_.units.size());
    std::vector<std::function<void()>> bodies;
    for (size_t i = 0; i < reactors_.size(); ++i) bodies.push_back([this, i] { reactor(reactors_[i], shape_.units[i]); });
    if (!explorer.run(bodies)) return "a request waits for ever";
    Explorer* const the = std::exchange(Explorer::the, nullptr);
    if (gate_.slots() != 0) wrong("something is left in the slots");
    Explorer::the = the;
    return wrong_;
  }

 private:
  struct Reactor;
  struct Request : GateNode {
    uint32_t units = 0, left = 0;
    Reactor* home = nullptr;
  };
  struct Reactor {
    Gate<Stepped>::Local local;
    std::deque<Request> clients;
    std::deque<Request*> device;
    std::deque<Request*> told;  // by others
    std::deque<Request*> fresh;
    uint32_t unfinished = 0;
    bool armed = false, held = false, in_round = false;
  };
  void wrong(const char* what) {
    if (wrong_.empty()) wrong_ = what;
  }

  void begin(Reactor& r, Request* q) {
    r.armed = true;
    if (gate_.take(r.local, q->units, shape_.depth)) to_device(r, q);
    else gate_.queue(r.local, q);
  }
  void to_device(Reactor& r, Request* q) {
    in_device_ += q->units;
    if (in_device_ >= shape_.depth + most_units()) wrong("more in the device than the depth");
    r.device.push_back(q);
  }
  uint32_t most_units() const {
    uint32_t most = 0;
    for (auto& r : shape_.units)
      for (uint32_t u : r) most = std::max(most, u);
    return most;
  }
  void look(Reactor& r, std::deque<Request*>& mine) {
    if (inside_) wrong("two are inside");
    inside_ = true;
    for (GateNode* n = gate_.take_list(); n != nullptr;) queue_.push_back(static_cast<Request*>(std::exchange(n, n->next_node)));
    const uint64_t taken = gate_.taken();
    uint64_t requests = 0, units = 0;
    std::vector<Request*> others;
    while (taken + units < shape_.depth && !queue_.empty()) {
      Request* q = queue_.front();
      queue_.pop_front();
      ++requests, units += q->units;
      if (q->home == &r) mine.push_back(q);
      else others.push_back(q);
    }
    gate_.hand_over(requests, units);
    for (Request* q : others) q->home->told.push_back(q);
    inside_ = false;
  }
  void arbiter(Reactor& r, bool go_on) {
    std::deque<Request*> mine;
    auto work = [&] { look(r, mine); };
    const auto ran = go_on ? gate_.go_on(1, work) : gate_.run(1, work);
    if (ran == Gate<Stepped>::Ran::kHeld) r.held = true;
    for (Request* q : mine) to_device(r, q);
  }

  void reactor(Reactor& r, const std::vector<uint32_t>& units) {
    for (uint32_t u : units) {
      r.clients.emplace_back();
      r.clients.back().units = u, r.clients.back().left = shape_.requests, r.clients.back().home = &r;
      r.fresh.push_back(&r.clients.back());
    }
    r.unfinished = static_cast<uint32_t>(units.size());
    while (r.unfinished > 0 || r.held) {
      Explorer::the->wait([&r] { return r.held || !r.told.empty() || !r.device.empty() || !r.fresh.empty(); });
      r.in_round = true;
      if (std::exchange(r.held, false)) arbiter(r, true);
      while (!r.told.empty()) {
        Request* q = r.told.front();
        r.told.pop_front();
        to_device(r, q);
      }
      if (!r.device.empty()) {
        Request* q = r.device.front();
        r.device.pop_front();
        in_device_ -= q->units;
        gate_.give_back(r.local, q->units);
        r.armed = true;
        if (--q->left > 0) r.fresh.push_back(q);
        else --r.unfinished;
      }
      while (!r.fresh.empty()) {
        Request* q = r.fresh.front();
        r.fresh.pop_front();
        begin(r, q);
      }
      if (std::exchange(r.armed, false))
        if (gate_.end_of_round(r.local)) arbiter(r, false);
      r.in_round = false;
      rest();
    }
  }
  // Nobody is in a round: what waits waits for a slot.
  void rest() {
    for (auto& r : reactors_)
      if (r.in_round || r.held) return;
    Explorer* const the = std::exchange(Explorer::the, nullptr);
    const uint64_t s = gate_.slots();
    Explorer::the = the;
    if (Gate<Stepped>::waiting(s) != 0 && Gate<Stepped>::in_device(s) < shape_.depth) wrong("a slot is free while one waits");
    if (Gate<Stepped>::waiting(s) != queue_.size()) wrong("waiting is not what is queued");
  }

  const Shape& shape_;
  Gate<Stepped> gate_;
  std::deque<Reactor> reactors_;
  std::deque<Request*> queue_;
  uint64_t in_device_ = 0;
  bool inside_ = false;
  std::string wrong_;
};

const Shape kShapes[] = {
    {"a client each, one slot", {{1}, {1}}, 1, 2},
    {"two clients each, two slots", {{1, 1}, {1, 1}}, 2, 1},
    {"three reactors, one slot", {{1}, {1}, {1}}, 1, 1},
    {"a large one", {{2, 1}, {1}}, 2, 1},
};

TEST(Gate, EveryInterleaving_leavesNobodyWaiting) {
  for (const Shape& shape : kShapes) {
    Explorer explorer(3, 0);
    uint64_t runs = 0;
    do {
      ++runs;
      World world(shape);
      const std::string wrong = world.run(explorer);
      ASSERT_EQ(wrong, "") << shape.name << ", run " << runs;
    } while (explorer.next());
    EXPECT_GT(runs, 500u) << shape.name;
    RecordProperty(shape.name, std::to_string(runs));
  }
}

// Without a limit of preemptions, and with more at once.
TEST(Gate, RandomInterleavings_leaveNobodyWaiting) {
  const Shape shape{"", {{1, 3}, {1, 1, 2}, {1, 1}, {2}}, 3, 4};
  for (uint64_t seed = 1; seed <= 3000; ++seed) {
    Explorer explorer(0, seed);
    World world(shape);
    ASSERT_EQ(world.run(explorer), "") << "seed " << seed;
  }
}

}  // namespace
}  // namespace spillway
#endif
