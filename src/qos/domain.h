// QosDomain: the groups' weights and caps, one for the host, shared by all its disks. The composition root mirrors its
// memory groups into it (same GroupId) and changes it while I/O goes on: every disk takes a change over with the next
// request it queues.
//
//   domain->set(id, {.name = "tenant-a", .parent = GroupId::kRoot, .weight = 300});
//   domain->set_background(Background::kRebuild, {.weight = 20});
//
// Thread-safety: internally synchronised.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "src/base/result.h"
#include "src/base/units.h"
#include "src/qos/sfq.h"

namespace spillway {

struct QosGroup {
  std::string name;
  GroupId parent = GroupId::kRoot;
  uint32_t weight = 100;  // 1..10000, cgroup v2's io.weight
  QosCaps caps;           // per disk, cgroup v2's io.max
  // The share that a group's read-ahead has beside its foreground requests (100) when both are queued.
  uint32_t read_ahead_weight = 50;
  friend bool operator==(const QosGroup&, const QosGroup&) = default;
};

// Work that no tenant asked for. Siblings of the top-level groups.
enum class Background : uint8_t { kRebuild, kScrub, kWriteback };
inline constexpr size_t kBackgrounds = 3;

// Immutable once published.
struct QosGroups {
  uint64_t generation = 0;
  std::map<GroupId, QosGroup> groups;  // kRoot is always there
  QosGroup background[kBackgrounds];
};

class QosDomain {
 public:
  // Group ids are array indices here; greater ones are refused.
  static constexpr uint32_t kMaxGroups = 4096;

  QosDomain();
  // Creates or changes. kInvalid: weight out of range, the parent is not there, or it would make a ring.
  Status set(GroupId id, QosGroup group);
  Status set_background(Background which, QosGroup group);
  // Its requests count for the root from now on; children move to its parent. kInvalid for the root.
  Status remove(GroupId id);

  std::shared_ptr<const QosGroups> snapshot() const;
  // Grows with each change; cheap, any thread.
  uint64_t generation() const { return generation_.load(std::memory_order_acquire); }  // pairs with publish()

 private:
  void publish(std::shared_ptr<QosGroups> next);
  mutable std::mutex mutex_;
  std::shared_ptr<const QosGroups> now_;
  std::atomic<uint64_t> generation_{1};
};

}  // namespace spillway
