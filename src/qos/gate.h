// Where the reactors that submit to one disk meet: how many requests are in the device and how many wait, the list of those
// that wait, and who gives slots to them. Nobody waits for anybody here, and a reactor that is busy touches what it shares
// with others once a round, not once a request.
//
//   slots      in the device | waiting << 32. take() adds only while nobody waits; end_of_round() publishes what a
//              reactor's round changed with one addition; the arbiter moves from waiting to in the device.
//   Local      a reactor's own: slots its completions gave back in this round (its next requests take them again, as long
//              as nobody waits), and requests that found no slot. Both are published at the end of the round.
//   arbiter    a piece of work, not a thread and not a lock: who brings work adds one to it. Who found 0 does the work;
//              all others go on at once, because the one inside looks again before it leaves.
//
// Why nothing sleeps while a slot is free and a request waits, once the rounds are over: every slot given back and every
// request queued is published by an addition to the one word `slots`, and who sees after its own addition that somebody
// waits runs the arbiter. Of a request queued and a slot given back the later in the word's order sees both. It either gets
// in, or the one inside has yet to look again (run()). tests: gate_test.cc goes through the interleavings.
//
// Atomic is a parameter for that test only. Thread-safety: Local and what takes one: its reactor. run(), and what it calls:
// any thread. The arbiter's: whoever is inside run().
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

namespace spillway {

struct GateNode {
  GateNode* next_node = nullptr;
};

class GateList {
 public:
  void push(GateNode* n) {
    n->next_node = nullptr;
    (head_ == nullptr ? head_ : tail_->next_node) = n;
    tail_ = n;
  }
  GateNode* pop() {
    GateNode* n = head_;
    if (n != nullptr) head_ = n->next_node;
    return n;
  }

 private:
  GateNode* head_ = nullptr;
  GateNode* tail_ = nullptr;
};

template <template <class> class Atomic = std::atomic>
class Gate {
 public:
  struct Local {
    uint32_t spare = 0;   // given back, in `slots` still
    uint32_t queued = 0;  // newest, ..., oldest; not in `slots` yet
    GateNode* newest = nullptr;
    GateNode* oldest = nullptr;
  };
  static constexpr uint64_t kWaiting = uint64_t{1} << 32;
  static uint64_t in_device(uint64_t slots) { return slots & (kWaiting - 1); }
  static uint64_t waiting(uint64_t slots) { return slots >> 32; }
  uint64_t slots() const { return slots_.load(std::memory_order_relaxed); }  // a moment's view

  // A slot at once: when nobody waits, this reactor's own included, and fewer than `depth` are in the device.
  bool take(Local& here, uint32_t units, uint32_t depth) {
    if (here.queued != 0) return false;
    uint64_t s = slots_.load(std::memory_order_relaxed);
    while (s - here.spare < depth) {
      if (here.spare >= units) {
        here.spare -= units;
        return true;
      }
      if (slots_.compare_exchange_weak(s, s + (units - here.spare), std::memory_order_relaxed, std::memory_order_relaxed)) {
        here.spare = 0;
        return true;
      }
    }
    return false;
  }
  // After either of these the reactor owes an end_of_round().
  void give_back(Local& here, uint32_t units) { here.spare += units; }
  void queue(Local& here, GateNode* n) {
    n->next_node = here.newest;
    if (here.newest == nullptr) here.oldest = n;
    here.newest = n;
    ++here.queued;
  }
  // Publishes. True: run() is due.
  bool end_of_round(Local& here) {
    if (here.spare == 0 && here.queued == 0) return false;
    const uint64_t change = here.queued * kWaiting - here.spare;
    // Counted before it is in the list, so what is in the list is counted.
    // acq_rel, as everything that changes `slots` for good: the later of two sees what the earlier one published.
    const uint64_t after = slots_.fetch_add(change, std::memory_order_acq_rel) + change;
    if (here.queued != 0) {
      GateNode* head = inbox_.load(std::memory_order_relaxed);
      do here.oldest->next_node = head;
      while (!inbox_.compare_exchange_weak(head, here.newest, std::memory_order_release, std::memory_order_relaxed));
    }
    here = {};
    return waiting(after) != 0;
  }

  enum class Ran : uint8_t {
    kDone,       // it was us, and nothing is left to look at
    kElsewhere,  // somebody is inside, and will look
    kHeld,       // others kept bringing work for `rounds`: we are still inside and have to go on() soon
  };
  template <class Work>
  Ran run(uint32_t rounds, Work&& work) {
    // acquire: what the last one inside left; release: what we published, for the one who is inside.
    if (arbiter_.fetch_add(1, std::memory_order_acq_rel) != 0) return Ran::kElsewhere;
    return inside(1, rounds, work);
  }
  template <class Work>
  Ran go_on(uint32_t rounds, Work&& work) {
    return inside(arbiter_.load(std::memory_order_acquire), rounds, work);
  }

  // ---- the arbiter's -----------------------------------------------------------------------------------------------
  // All that was published, in order of arrival of each reactor.
  GateNode* take_list() {
    GateNode* list = inbox_.exchange(nullptr, std::memory_order_acquire);
    GateNode* ordered = nullptr;
    while (list != nullptr) {
      GateNode* n = std::exchange(list, list->next_node);
      n->next_node = ordered;
      ordered = n;
    }
    return ordered;
  }
  // In the device. While the holder has one that waits (of a list it took) others only give back.
  uint64_t taken() const { return in_device(slots_.load(std::memory_order_acquire)); }
  // Before any of these requests is told: it might end, and be given back, before it was counted.
  void hand_over(uint64_t requests, uint64_t units) {
    if (requests != 0) slots_.fetch_add(units - requests * kWaiting, std::memory_order_acq_rel);
  }

 private:
  template <class Work>
  Ran inside(uint64_t seen, uint32_t rounds, Work&& work) {
    for (uint32_t round = 0;; ++round) {
      work();
      if (arbiter_.compare_exchange_strong(seen, 0, std::memory_order_acq_rel, std::memory_order_acquire))
        return Ran::kDone;
      if (round == rounds) return Ran::kHeld;
    }
  }

  alignas(64) Atomic<uint64_t> slots_{0};
  alignas(64) Atomic<GateNode*> inbox_{nullptr};
  Atomic<uint64_t> arbiter_{0};
};

}  // namespace spillway
