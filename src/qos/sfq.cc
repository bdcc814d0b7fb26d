#include "src/qos/sfq.h"

#include <algorithm>
#include <utility>

#include "src/base/result.h"

namespace spillway {
namespace {

// Virtual time is fixed point, cost * 2^16 / weight, in 64 bits that wrap: tags are compared by their difference.
// Live tags of one node lie close together; those of idle nodes are pulled along every 2^58 (see pop).
constexpr unsigned kShift = 16;
constexpr unsigned kSweepShift = 58;
bool before(uint64_t a, uint64_t b) { return static_cast<int64_t>(a - b) < 0; }
uint64_t later(uint64_t a, uint64_t b) { return before(a, b) ? b : a; }

// Generic cell rate algorithm: `at` is when the bucket would be in balance.
struct Bucket {
  uint64_t at = 0;
  static uint64_t interval(uint64_t amount, uint64_t per_second) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(amount) * 1'000'000'000 / per_second);
  }
  uint64_t ready(uint64_t rate) const {
    if (rate == 0) return 0;
    return at > SfqTree::kCapBurstNs ? at - SfqTree::kCapBurstNs : 0;
  }
  void charge(uint64_t amount, uint64_t rate, uint64_t now) {
    if (rate != 0) at = std::max(at, now) + interval(amount, rate);
  }
};

}  // namespace

struct SfqTree::Node {
  Node* parent = nullptr;
  uint32_t weight = 100;
  uint32_t heap_at = UINT32_MAX;  // place in the parent's heap
  uint64_t start = 0, finish = 0; // tags in the parent's virtual time
  uint64_t order = 0;             // ties: first come, first served
  uint64_t clock = 0;             // V of its own children
  uint64_t idle_since = 0;
  uint64_t served = 0;
  std::vector<Node*> heap;        // backlogged children, least start tag first
  std::vector<Node*> children;
  struct Fifo {
    SfqItem* head = nullptr;
    SfqItem* tail = nullptr;
  };
  struct Queue {
    uint32_t home = 0;
    Fifo fifo[2];                 // reads, writes
  };
  std::vector<Queue> queues;      // leaf: one for each home it ever had
  uint64_t items = 0, arrivals = 0;
  uint64_t stamp = 0;             // shares(): counted in this call
  double active_weight = 0;       // shares(): of the children counted
  bool parked = false, was_parked = false;
  uint64_t entry_at = 0;          // its place in parked_, 0 = none
  QosCaps caps;
  Bucket rbps, wbps, riops, wiops;

  bool waiting() const { return heap_at != UINT32_MAX; }
  uint64_t step(uint64_t cost) const { return (cost << kShift) / weight; }
  SfqItem* oldest(bool write) const {
    SfqItem* first = nullptr;
    for (auto& q : queues)
      if (SfqItem* head = q.fifo[write ? 1 : 0].head; head != nullptr && (first == nullptr || head->order < first->order))
        first = head;
    return first;
  }
};

SfqTree::SfqTree() {
  nodes_.push_back(std::make_unique<Node>());
  root_ = nodes_.back().get();
}
SfqTree::~SfqTree() = default;

SfqTree::Node* SfqTree::add(Node* parent, uint32_t weight) {
  SPILLWAY_ASSERT(parent->items == 0 && weight >= 1 && weight <= 10000);
  nodes_.push_back(std::make_unique<Node>());
  Node* n = nodes_.back().get();
  n->parent = parent;
  n->weight = weight;
  n->start = n->finish = parent->clock;
  parent->children.push_back(n);
  return n;
}

void SfqTree::set_weight(Node* n, uint32_t weight) {
  SPILLWAY_ASSERT(weight >= 1 && weight <= 10000);
  n->weight = weight;
}

void SfqTree::set_caps(Node* n, const QosCaps& caps, uint64_t now) {
  if (n->caps == caps) return;
  n->caps = caps;
  n->rbps = n->wbps = n->riops = n->wiops = {};
  unpark_due(now, true);
}

void SfqTree::move(Node* n, Node* parent, uint64_t now) {
  if (n->parent == parent) return;
  for (Node* p = parent; p != nullptr; p = p->parent) SPILLWAY_ASSERT(p != n);
  unpark_due(now, true);
  const bool was_waiting = n->waiting();
  if (was_waiting) deactivate(n, now);
  std::erase(n->parent->children, n);
  n->parent = parent;
  parent->children.push_back(n);
  n->start = n->finish = parent->clock;
  n->idle_since = 0;
  if (was_waiting) activate(n, now);
}

// ---- the heap of backlogged children -------------------------------------------------------------------------------

void SfqTree::heap_fix(Node* p, uint32_t at) {
  auto& h = p->heap;
  auto less = [&](uint32_t a, uint32_t b) {
    return h[a]->start != h[b]->start ? before(h[a]->start, h[b]->start) : h[a]->order < h[b]->order;
  };
  auto swap = [&](uint32_t a, uint32_t b) {
    std::swap(h[a], h[b]);
    h[a]->heap_at = a;
    h[b]->heap_at = b;
  };
  while (at > 0 && less(at, (at - 1) / 2)) {
    swap(at, (at - 1) / 2);
    at = (at - 1) / 2;
  }
  for (;;) {
    uint32_t least = at;
    for (uint32_t c = 2 * at + 1; c <= 2 * at + 2 && c < h.size(); ++c)
      if (less(c, least)) least = c;
    if (least == at) return;
    swap(at, least);
    at = least;
  }
}

void SfqTree::heap_insert(Node* p, Node* n) {
  n->order = ++sequence_;
  n->heap_at = static_cast<uint32_t>(p->heap.size());
  p->heap.push_back(n);
  heap_fix(p, n->heap_at);
}

void SfqTree::heap_remove(Node* n) {
  auto& h = n->parent->heap;
  const uint32_t at = std::exchange(n->heap_at, UINT32_MAX);
  Node* last = h.back();
  h.pop_back();
  if (last == n) return;
  h[at] = last;
  last->heap_at = at;
  heap_fix(n->parent, at);
}

// n has something to be served; so then have all above it.
void SfqTree::activate(Node* n, uint64_t now) {
  for (; n->parent != nullptr && !n->waiting(); n = n->parent) {
    const uint64_t v = n->parent->clock;
    if (!before(n->finish, v)) n->start = n->finish;
    else if (keep_ns_ != 0 && now - n->idle_since <= keep_ns_) {
      n->start = later(n->finish, v - n->step(credit_));
    } else {
      n->start = v;
    }
    heap_insert(n->parent, n);
  }
}

void SfqTree::deactivate(Node* n, uint64_t now) {
  for (; n->parent != nullptr && n->waiting(); n = n->parent) {
    heap_remove(n);
    n->idle_since = now;
    n->finish = n->start;
    if (!n->parent->heap.empty()) return;
  }
}

// ---- items -------------------------------------------------------------------------------------------------------

void SfqTree::push(Node* leaf, SfqItem* item, uint64_t now) {
  SPILLWAY_ASSERT(leaf->children.empty() && leaf->parent != nullptr);
  item->next_item = nullptr;
  item->order = ++leaf->arrivals;
  auto queue = std::find_if(leaf->queues.begin(), leaf->queues.end(), [&](auto& q) { return q.home == item->home; });
  if (queue == leaf->queues.end()) queue = leaf->queues.insert(queue, {item->home, {}});
  auto& fifo = queue->fifo[item->is_write ? 1 : 0];
  const bool first = leaf->parked && leaf->oldest(item->is_write) == nullptr;
  (fifo.head == nullptr ? fifo.head : fifo.tail->next_item) = item;
  fifo.tail = item;
  ++leaf->items;
  ++queued_;
  if (!leaf->parked) {
    activate(leaf, now);
  } else if (first) {  // parked for what the other queue holds; this may be free to go
    uint64_t until = 0;
    if (eligible(leaf, now, &until) != nullptr) unpark(leaf, now);
  }
}

uint64_t SfqTree::capped_until(Node* leaf, const SfqItem& item) const {
  uint64_t at = 0;
  for (Node* n = leaf; n != nullptr; n = n->parent) {
    if (!n->caps.any()) continue;
    const uint64_t t = item.is_write ? std::max(n->wbps.ready(n->caps.wbps), n->wiops.ready(n->caps.wiops))
                                     : std::max(n->rbps.ready(n->caps.rbps), n->riops.ready(n->caps.riops));
    at = std::max(at, t);
  }
  return at;
}

SfqItem* SfqTree::eligible(Node* leaf, uint64_t now, uint64_t* until) const {
  *until = kNever;
  SfqItem* heads[2] = {leaf->oldest(false), leaf->oldest(true)};
  if (heads[0] == nullptr || (heads[1] != nullptr && heads[1]->order < heads[0]->order)) std::swap(heads[0], heads[1]);
  for (SfqItem* head : heads) {
    if (head == nullptr) continue;
    const uint64_t at = capped_until(leaf, *head);
    if (at <= now) return head;
    *until = std::min(*until, at);
  }
  return nullptr;
}

void SfqTree::park(Node* leaf, uint64_t until, uint64_t now) {
  leaf->parked = leaf->was_parked = true;
  deactivate(leaf, now);
  if (leaf->entry_at != 0 && leaf->entry_at <= until) return;  // that one will look again, and park it again
  leaf->entry_at = until;
  parked_.push_back({leaf, until, ++sequence_});
  std::push_heap(parked_.begin(), parked_.end(), Parked::later);
}

void SfqTree::unpark(Node* leaf, uint64_t now) {
  leaf->parked = false;
  leaf->idle_since = 0;
  activate(leaf, now);
}

void SfqTree::unpark_due(uint64_t now, bool all) {
  while (!parked_.empty() && (all || parked_.front().at <= now)) {
    std::pop_heap(parked_.begin(), parked_.end(), Parked::later);
    const Parked entry = parked_.back();
    parked_.pop_back();
    if (entry.leaf->entry_at == entry.at) entry.leaf->entry_at = 0;
    if (entry.leaf->parked) unpark(entry.leaf, now);
  }
}

SfqItem* SfqTree::take(Node* leaf, bool write, uint32_t home) {
  const SfqItem* oldest = leaf->oldest(write);
  Node::Queue* from = nullptr;
  for (auto& q : leaf->queues) {
    const SfqItem* head = q.fifo[write ? 1 : 0].head;
    if (head == nullptr) continue;
    if (head == oldest && from == nullptr) from = &q;
    if (q.home == home && head->order - oldest->order <= kMaxPassed) from = &q;
  }
  auto& fifo = from->fifo[write ? 1 : 0];
  SfqItem* item = fifo.head;
  fifo.head = item->next_item;
  --leaf->items;
  return item;
}

SfqItem* SfqTree::pop(uint64_t now, Node** from, uint32_t home) {
  unpark_due(now, false);
  while (!root_->heap.empty()) {
    Node* leaf = root_;
    while (!leaf->heap.empty()) leaf = leaf->heap.front();
    uint64_t until = 0;
    SfqItem* item = eligible(leaf, now, &until);
    if (item == nullptr) {
      park(leaf, until, now);
      continue;
    }
    item = take(leaf, item->is_write, home);
    --queued_;
    for (Node* n = leaf; n != nullptr; n = n->parent) {
      n->served += item->cost;
      if (n->caps.any()) {
        auto& bps = item->is_write ? n->wbps : n->rbps;
        auto& iops = item->is_write ? n->wiops : n->riops;
        bps.charge(item->bytes, item->is_write ? n->caps.wbps : n->caps.rbps, now);
        iops.charge(1, item->is_write ? n->caps.wiops : n->caps.riops, now);
      }
      Node* p = n->parent;
      if (p == nullptr) break;
      const uint64_t v = later(p->clock, n->start);
      if ((v ^ p->clock) >> kSweepShift != 0)
        for (Node* c : p->children)
          if (!c->waiting() && before(c->finish, v)) c->finish = v;
      p->clock = v;
      n->finish = n->start + n->step(item->cost);
      if (n->items > 0 || !n->heap.empty()) {
        n->start = n->finish;
        n->order = ++sequence_;
        heap_fix(p, n->heap_at);
      } else {
        heap_remove(n);
        n->idle_since = now;
      }
    }
    if (from != nullptr) *from = leaf;
    return item;
  }
  return nullptr;
}

std::vector<double> SfqTree::shares(const std::vector<Node*>& leaves) {
  ++stamp_;
  root_->active_weight = 0;
  for (Node* leaf : leaves)
    for (Node* n = leaf; n->parent != nullptr && n->stamp != stamp_; n = n->parent) {
      n->stamp = stamp_;
      if (n->parent->parent != nullptr && n->parent->stamp != stamp_) n->parent->active_weight = 0;
      n->parent->active_weight += n->weight;
    }
  std::vector<double> all;
  for (Node* leaf : leaves) {
    double share = 1;
    for (Node* n = leaf; n->parent != nullptr; n = n->parent) share *= n->weight / n->parent->active_weight;
    all.push_back(share);
  }
  return all;
}

bool SfqTree::was_capped(Node* leaf) { return std::exchange(leaf->was_parked, leaf->parked); }
uint64_t SfqTree::served(const Node* n) { return n->served; }
uint64_t SfqTree::queued_at(const Node* leaf) { return leaf->items; }
uint32_t SfqTree::weight(const Node* n) { return n->weight; }
const SfqTree::Node* SfqTree::parent(const Node* n) { return n->parent; }

}  // namespace spillway
