// The scheduler of one disk: a filter volume directly above the leaf, so that tenants share each disk by weight
// whatever is layered above (Q1), and those on different disks or regions never meet (Q2).
//
//   auto disk = make_qos(leaf, {.model = calibrated}, domain);      // stacks like any volume
//
// The way of a request:
//   free     No one waits and fewer than `depth` are in flight: it takes a slot and goes to the leaf at once. (A leaf that
//            answers without suspending is not even wrapped in a coroutine.)
//   waiting  Otherwise it waits for the end of its reactor's round (gate.h), when the *arbiter* is run: it sorts what waits
//            into the tree (sfq.h) and hands free slots to the requests whose turn it is, each resumed on its own reactor.
//
// Why not blk-iocost's way, virtual time per group against a shared clock that runs with the wall clock: there, the
// rate of the clock must be guessed right (vrate), or the disk idles or the weights fade; and shares of groups that
// use less than theirs must be donated by a periodic planner. Here the clock is the disk itself: it moves when a
// request is handed over, which happens when one completes. So an idle share is gone to others with the next
// completion, nothing is timed (no timer unless a cap delays someone), and the order is exact over all reactors.
//
// What protects what:
//   gate_     who is in flight, who waits, who is inside the arbiter. In flight, in small requests, passes `depth` by one large
//             request at most, but for a change of depth. It hands the tree, the depth control and the cost table's writer
//             side from holder to holder.
//   cells     counters per group and reactor: one writer, its reactor; readers merge (relaxed, statistics).
//
// Legal races: a statistic may be half a request old. A weight changed while a request is being queued holds from the
// next one on.
//
// Accounting: foreground and metadata go to the request's group; read-ahead to a share of its own inside that group;
// write-back to the group that dirtied the page, or to the background group "writeback" when that is the root; rebuild
// and scrub to background groups. A flush waits its turn in its group's queue like a write and is charged what it
// takes of the disk, so it neither passes what came before nor comes for free.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "src/qos/domain.h"
#include "src/qos/histogram.h"
#include "src/qos/model.h"
#include "src/volume/volume.h"

namespace spillway {

struct QosOptions {
  QosModel model;
  uint32_t depth = 0;         // start; 0 = the model's
  uint32_t depth_min = 2, depth_max = 256;
  bool adapt_depth = true;    // look for the knee while it runs
  bool adapt_cost = true;     // correct the model while it runs
};

// Who a request is charged to at the disk.
struct QosOwner {
  enum class Part : uint8_t { kOwn, kReadAhead, kBackground };
  GroupId group = GroupId::kRoot;
  Part part = Part::kOwn;
  Background background = Background::kRebuild;  // kBackground only
};

// Cumulative counters of one owner on one disk. Times in ns; subtract two for an interval.
struct QosGroupSample {
  QosOwner owner;
  uint64_t reads = 0, writes = 0, flushes = 0, others = 0;
  uint64_t read_bytes = 0, written_bytes = 0;
  uint64_t cost_ns = 0;    // device time by the model: what shares are made of
  uint64_t queue_ns = 0;   // waiting for the turn
  uint64_t device_ns = 0;  // in the leaf
  uint64_t queued = 0;     // requests that had to wait
  LatencyCounts latency;   // queue and device together
};

struct QosSample {
  std::string disk;
  uint64_t at_ns = 0;
  uint32_t depth = 0, knee = 0;
  uint64_t in_flight = 0, waiting = 0;  // in flight: as depth, in small requests (a large one counts for several)
  double model_speed = 0;  // predicted over measured in the last busy window: 1 when the model is right
  uint64_t model_updates = 0;
  std::vector<QosGroupSample> groups;  // those that ever had a request here
};

class QosVolume : public Volume {
 public:
  virtual QosSample sample() const = 0;  // any thread
  // The model with what was learned: to be stored.
  virtual QosModel model() const = 0;
  virtual std::shared_ptr<QosDomain> domain() const = 0;

 protected:
  using Volume::Volume;
};

// The part of a disk each owner is due while exactly these have work: for reports beside what they got.
std::vector<double> shares_wanted(const std::vector<QosOwner>& active, const QosGroups& groups);

// kInvalid names the option. The volume has the leaf's name, size and geometry.
Result<std::shared_ptr<QosVolume>> make_qos_volume(VolumePtr leaf, QosOptions options,
                                                   std::shared_ptr<QosDomain> groups);
Result<VolumePtr> make_qos(VolumePtr leaf, QosOptions options, std::shared_ptr<QosDomain> groups);

}  // namespace spillway
