// MemoryGroup: the memcg of user space. Internally synchronised.
//
// Words and their meaning are cgroup v2's: `min` and `low` protect, `high` throttles and wakes
// background reclaim, `max` is never exceeded by `try_charge`, `weight` shares what is left.
// Usage is hierarchical: a charge counts in the group and in all its ancestors.
//
// Error bound: charges are taken in batches of `RegistryOptions::charge_batch_bytes` and kept in
// `RegistryOptions::charge_slots` stocks per group, one per thread (threads beyond that share).
// So for a group with n descendants (itself included)
//     real usage <= usage() <= real usage + n * charge_slots * charge_batch_bytes.
// `usage_exact()` drains the stocks first. `max` is compared with usage(), so the real usage never
// passes it; before `try_charge` fails, all stocks of the limiting group's subtree are drained.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "spillway/reclaim/types.h"

namespace spillway::reclaim {

class Registry;
class MemoryGroup;

/// Owning reference to a group; empty when default-made or when a lookup found nothing.
class GroupRef {
 public:
  GroupRef() noexcept = default;
  GroupRef(const GroupRef& o) noexcept;
  GroupRef(GroupRef&& o) noexcept : p_(std::exchange(o.p_, nullptr)) {}
  GroupRef& operator=(GroupRef o) noexcept {
    std::swap(p_, o.p_);
    return *this;
  }
  ~GroupRef();
  /// Another reference to a group that the caller knows to be alive (e.g. from a ScanRequest).
  static GroupRef share(MemoryGroup& g) noexcept;

  /// Hands the reference to C or to a tagged word; `adopt` takes it back.
  MemoryGroup* release() noexcept { return std::exchange(p_, nullptr); }
  static GroupRef adopt(MemoryGroup* released) noexcept { return GroupRef(released); }

  explicit operator bool() const noexcept { return p_ != nullptr; }
  MemoryGroup* get() const noexcept { return p_; }
  MemoryGroup* operator->() const noexcept { return p_; }
  MemoryGroup& operator*() const noexcept { return *p_; }
  friend bool operator==(const GroupRef& a, const GroupRef& b) noexcept { return a.p_ == b.p_; }
  void reset() noexcept { *this = GroupRef(); }

 private:
  friend class Registry;
  friend class MemoryGroup;
  friend struct GroupAccess;
  explicit GroupRef(MemoryGroup* adopted) noexcept : p_(adopted) {}
  MemoryGroup* p_ = nullptr;
};

struct GroupLimits {
  std::uint64_t min = 0;
  std::uint64_t low = 0;
  std::uint64_t high = kUnlimited;
  std::uint64_t max = kUnlimited;
  std::uint32_t weight = 100;  ///< 1..10000
};

struct ChargeOptions {
  int node = 0;
  bool may_block = true;
  TimePoint deadline = kNoDeadline;  ///< for the direct reclaim that a failing charge starts
};

struct GroupStats {
  std::uint64_t usage = 0;
  std::uint64_t charge_failures = 0;   ///< try_charge said no (cgroup v2: events "max" and "oom")
  std::uint64_t direct_reclaims = 0;   ///< try_charge had to reclaim first
  std::uint64_t high_events = 0;       ///< a charge went over `high`
  std::uint64_t low_events = 0;        ///< reclaimed below `low` because nothing else was left
  std::uint64_t reclaimed_bytes = 0;   ///< freed by shrinkers in this group
};

class MemoryGroup {
 public:
  struct State;  ///< opaque

  MemoryGroup(const MemoryGroup&) = delete;
  MemoryGroup& operator=(const MemoryGroup&) = delete;

  /// Small integer, unique among groups that still have references; 0 is the root. Usable as an
  /// array index below `RegistryOptions::max_groups`; reused only after the last GroupRef is gone.
  std::uint32_t id() const noexcept { return id_; }
  /// Unique for the registry's life, never reused.
  std::uint64_t serial() const noexcept { return serial_; }
  const std::string& name() const noexcept { return name_; }
  std::string path() const;  ///< "/", "/tenant-a", "/tenant-a/vm1"
  bool is_root() const noexcept { return parent_ == nullptr; }
  /// The parent at creation (a removed group keeps it); null for the root. Lives as long as *this.
  MemoryGroup* parent() const noexcept { return parent_; }
  /// True from the beginning of `Registry::remove_group` on.
  bool dead() const noexcept;
  /// This group, or its nearest ancestor that was not removed.
  GroupRef live() noexcept;
  bool is_descendant_of(const MemoryGroup& ancestor) const noexcept;  ///< self counts
  /// The top-level group (the tenant) this one belongs to; the root for the root.
  MemoryGroup& top_level() noexcept;
  Registry& registry() const noexcept { return *registry_; }

  GroupLimits limits() const noexcept;
  /// Lowering `max` or `high` below the usage reclaims at once (in the calling thread, bounded); the
  /// limit holds for new charges in any case.
  void set_limits(const GroupLimits& l);
  void set_min(std::uint64_t bytes);
  void set_low(std::uint64_t bytes);
  void set_high(std::uint64_t bytes);
  void set_max(std::uint64_t bytes);
  void set_weight(std::uint32_t weight);

  /// Upper bound of what is charged here and below, see the error bound above.
  std::uint64_t usage() const noexcept;
  std::uint64_t usage_exact() noexcept;
  GroupStats stats() const noexcept;

  /// Charges, or says no. On failure of the limit of this group or an ancestor, reclaims from that
  /// group's subtree (Reason::kDirect) and tries again, a bounded number of times. Inside a
  /// shrinker callback it never reclaims and always succeeds, as the memory serves freeing memory.
  [[nodiscard]] bool try_charge(std::uint64_t bytes, const ChargeOptions& o = {});
  /// Charges without asking: for memory that exists already. May exceed `max`.
  void charge(std::uint64_t bytes, int node = 0) noexcept;
  /// Gives back what was charged to this group; after the group was removed this, or the same on
  /// the parent, is right.
  void uncharge(std::uint64_t bytes, int node = 0) noexcept;

  /// How much of its usage is out of reach of reclaim started at `target` (cgroup v2's effective
  /// min and low, shared among siblings by usage when a parent protects less than they claim).
  struct Protection {
    std::uint64_t min = 0;
    std::uint64_t low = 0;
  };
  Protection effective_protection(const MemoryGroup& target) const noexcept;

 private:
  friend class Registry;
  friend class GroupRef;
  friend struct GroupAccess;
  MemoryGroup() = default;
  ~MemoryGroup() = default;

  std::uint32_t id_ = 0;
  std::uint64_t serial_ = 0;
  std::string name_;
  MemoryGroup* parent_ = nullptr;
  Registry* registry_ = nullptr;
  State* state_ = nullptr;
};

/// RAII charge: uncharges what it still holds. Movable, thread-confined.
class Charge {
 public:
  Charge() noexcept = default;
  Charge(GroupRef g, std::uint64_t bytes, int node = 0) noexcept
      : group_(std::move(g)), bytes_(bytes), node_(node) {}
  Charge(Charge&& o) noexcept
      : group_(std::move(o.group_)), bytes_(std::exchange(o.bytes_, 0)), node_(o.node_) {}
  Charge& operator=(Charge&& o) noexcept {
    if (this != &o) {
      release();
      group_ = std::move(o.group_);
      bytes_ = std::exchange(o.bytes_, 0);
      node_ = o.node_;
    }
    return *this;
  }
  ~Charge() { release(); }
  std::uint64_t bytes() const noexcept { return bytes_; }
  void release() noexcept {
    if (bytes_ != 0) group_->uncharge(std::exchange(bytes_, 0), node_);
  }

 private:
  GroupRef group_;
  std::uint64_t bytes_ = 0;
  int node_ = 0;
};

/// Pure arithmetic: shares `capacity` among siblings by weight, nobody above its `max` or its
/// `demand`, nobody below min(`min`, demand) while the capacity lasts. What one does not use goes to
/// the others by weight (work-conserving). `out[i]` belongs to `in[i]`.
struct Share {
  GroupLimits limits;
  std::uint64_t demand = kUnlimited;
};
void entitlements(std::uint64_t capacity, const Share* in, std::uint64_t* out, std::size_t n);

}  // namespace spillway::reclaim
