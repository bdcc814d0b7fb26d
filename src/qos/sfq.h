// The arithmetic of proportional sharing: hierarchical start-time fair queueing (Goyal 1996; SFQ(D): Jin 2004) with
// caps. Knows nothing of threads, clocks or disks; times are arguments.
//
// The tree: inner nodes are groups, leaves hold a FIFO of items. Each inner node is a server that shares what it is
// given among its backlogged children, with a virtual clock V of its own. A child has a finish tag F; when it becomes
// backlogged its start tag is S = max(V, F), the child with the least S is served next, then V = S,
// F = S + cost / weight. So a group that idled begins at V like everybody else: no burst, no penalty; and what a
// child does not use goes to its siblings first, then up.
//
// Short gaps. A group whose queue ran empty because all it has is in the device is not idle. If it comes back within
// keep_ns it keeps its lag, S = max(F, V - credit / weight): without that, a group which needs nearly all of its
// outstanding requests in flight would lose its share each time completions come in batches. `credit` is bounded,
// and so is the unfairness it can cause:
//
//   Bound: for two siblings f, g, backlogged all through an interval, with W = cost served, c = their greatest cost,
//     | W_f / w_f - W_g / w_g |  <=  (c_f + credit) / w_f + (c_g + credit) / w_g.
//   Why: while i is backlogged its tag S_i advances by exactly W_i / w_i. At any time, for every backlogged i,
//   V - credit/w_i <= S_i <= V + c_i/w_i: the left side holds when i becomes backlogged, and V moves only when the
//   least S, no less than V, is served, that is, when no backlogged S is below it; the right side because i was served
//   last with S_i <= V before the cost was added. So the spread S_f - S_g lies between -(credit/w_f + c_g/w_g) and
//   c_f/w_f + credit/w_g at either end of the interval, and its change is at most the sum of the two.
//
// Caps (io.max): a leaf whose next read and next write would both exceed a cap of its own or of a group above it is parked
// until one of them may go (GCRA with kCapBurstNs of tolerance); it is out of the way of others meanwhile. Reads and
// writes have caps of their own, so what is capped does not hold up the other: it is passed, everything else goes in
// order of arrival. What was parked comes back like a group that idled, S = max(F, V), so time under a cap earns nothing.
//
// Thread-safety: thread-confined (qos.cc: to whoever holds the arbiter).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace spillway {

// 0 = no cap. Per second, per disk, as io.max.
struct QosCaps {
  uint64_t rbps = 0, wbps = 0, riops = 0, wiops = 0;
  bool any() const { return (rbps | wbps | riops | wiops) != 0; }
  friend bool operator==(const QosCaps&, const QosCaps&) = default;
};

struct SfqItem {
  SfqItem* next_item = nullptr;
  uint64_t order = 0;  // of arrival at its leaf
  uint64_t cost = 0;   // ns of device time
  uint64_t bytes = 0;
  uint32_t home = 0;   // which reactor it came from
  bool is_write = false;
};

class SfqTree {
 public:
  struct Node;  // stable address until the tree dies
  static constexpr uint64_t kNever = UINT64_MAX;
  static constexpr uint64_t kCapBurstNs = 10'000'000;

  SfqTree();
  ~SfqTree();
  SfqTree(const SfqTree&) = delete;
  SfqTree& operator=(const SfqTree&) = delete;

  Node* root() { return root_; }
  // Weight 1..10000. A node with children takes no items, a node with items no children.
  Node* add(Node* parent, uint32_t weight);
  void set_weight(Node* n, uint32_t weight);
  void set_caps(Node* n, const QosCaps& caps, uint64_t now);
  // To another parent, with all that is below it; starts there like a group that comes back from idling.
  void move(Node* n, Node* parent, uint64_t now);

  void push(Node* leaf, SfqItem* item, uint64_t now);
  // The next item by right; null when nothing is queued or all of it is capped until next_ready(). Of that group's items it
  // takes the oldest whose home is `home` (no other CPU to wake) unless an older one has been there for more than
  // kMaxPassed arrivals: to the group it is the same service. Items of one home keep their order.
  SfqItem* pop(uint64_t now, Node** from = nullptr, uint32_t home = kAnyHome);
  static constexpr uint32_t kAnyHome = UINT32_MAX;
  static constexpr uint64_t kMaxPassed = 8;
  uint64_t next_ready() const { return parked_.empty() ? kNever : parked_.front().at; }
  uint64_t queued() const { return queued_; }
  // Whether a cap delayed this leaf since the last call.
  static bool was_capped(Node* leaf);

  // See the file's header. 0, 0 = plain SFQ.
  void set_keep(uint64_t keep_ns, uint64_t credit_cost) { keep_ns_ = keep_ns, credit_ = credit_cost; }

  // What part of the whole each of these leaves is due while they, and no others, have work.
  std::vector<double> shares(const std::vector<Node*>& leaves);

  // For reports and tests.
  static uint64_t served(const Node* n);        // cost, own and below, since ever
  static uint64_t queued_at(const Node* leaf);  // items in a leaf
  static uint32_t weight(const Node* n);
  static const Node* parent(const Node* n);

 private:
  struct Parked {
    Node* leaf;
    uint64_t at;
    uint64_t order;  // of two that are due together the one parked first comes back first
    static bool later(const Parked& a, const Parked& b) { return a.at != b.at ? a.at > b.at : a.order > b.order; }
  };
  void activate(Node* n, uint64_t now);
  void deactivate(Node* n, uint64_t now);
  void heap_insert(Node* p, Node* n);
  void heap_remove(Node* n);
  void heap_fix(Node* p, uint32_t at);
  uint64_t capped_until(Node* leaf, const SfqItem& item) const;
  // The oldest item of the leaf that no cap holds back; null, and until when, if all are.
  SfqItem* eligible(Node* leaf, uint64_t now, uint64_t* until) const;
  void park(Node* leaf, uint64_t until, uint64_t now);
  void unpark(Node* leaf, uint64_t now);
  void unpark_due(uint64_t now, bool all);
  static SfqItem* take(Node* leaf, bool write, uint32_t home);

  Node* root_ = nullptr;
  std::vector<std::unique_ptr<Node>> nodes_;
  // Heap, earliest first. An entry may outlive the parking it was made for; then it means nothing.
  std::vector<Parked> parked_;
  uint64_t queued_ = 0;
  uint64_t sequence_ = 0;
  uint64_t keep_ns_ = 0, credit_ = 0;
  uint64_t stamp_ = 0;
};

}  // namespace spillway
