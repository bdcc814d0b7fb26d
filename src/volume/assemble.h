// assemble: the one way in for the composition root and the CLI. Takes members that are open and a description of a
// layer, gives the volume; and the management interface every volume of several members has (ArrayControl).
//
// Metadata: linear and stripe over members without md superblocks are plain layouts. Members with md 1.2 superblocks
// open as the array those describe, and the description must agree. mirror and raid5 always carry superblocks: when
// every member is blank (first MiB zero) and writable they are created on the spot (a log line says so).
// Opening read-only writes nothing to any member.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/volume/volume.h"

namespace spillway {

struct LayerSpec {
  std::string name;
  std::string layer;               // linear stripe mirror raid5 slice md
  std::vector<VolumePtr> members;  // null: missing (redundant layers start degraded)
  // Of each member, for messages about missing ones and for the order in status; may be left empty.
  std::vector<std::string> member_names;
  std::vector<VolumePtr> spares;   // mirror, raid5: taken when a member fails
  uint64_t chunk = 0;              // stripe, raid5: bytes; 0 = 64K, or as the superblock says
  std::string raid5_layout;        // left-symmetric (default) left-asymmetric right-symmetric right-asymmetric
  std::string consistency;         // bitmap (default) ppl resync; empty = as the superblock says
  std::string metadata;            // md none; empty = see above
  uint64_t offset = 0;             // slice
  uint64_t length = 0;             // slice; 0 = to the end
  bool read_only = false;          // no write to any member, whatever their state
  bool force = false;              // start a dirty degraded raid5 without PPL
  bool create_if_blank = true;
  bool background = true;          // resync and rebuild start by themselves when writable
  uint64_t rebuild_rate_min = 0;   // bytes/s left to rebuilds under foreground load; 0 = 4 MiB/s
};

// Opens (or, when blank, creates) the layer. The volume's background work runs on the reactor that calls this.
Task<Result<VolumePtr>> assemble(LayerSpec spec);

// Writes md superblocks for linear, stripe, mirror, raid5. The members' contents are lost.
struct CreatePlan {
  std::vector<std::string> lines;  // what will be done to which member, for a person
  bool destroys = false;           // a member holds something (a superblock, data in its first MiB)
  uint64_t array_size = 0;
};
struct CreateOptions {
  bool dry_run = false;            // fill the plan, write nothing
  bool force = false;              // go on where `destroys`
  bool assume_clean = false;       // mirror, raid5: the members are known to agree (all zeros), no resync
};
Task<Result<CreatePlan>> create_array(const LayerSpec& spec, CreateOptions options);

struct MemberStatus {
  std::string name;
  std::string state;  // active spare rebuilding replacing faulty missing
  int role = -1;      // slot in the array; -1: none
  uint64_t read_errors = 0;       // corrected from redundancy
  uint64_t rebuilt_bytes = 0;     // rebuilding: how far
};

struct ArrayStatus {
  std::string name, layer, uuid, metadata;   // metadata: "md 1.2" or "none"
  std::string state;                         // clean active degraded failed read-only inactive, as one word
  std::string consistency;                   // none resync bitmap ppl
  std::string layout;                        // raid5, stripe
  uint64_t size = 0, chunk = 0, events = 0;
  std::vector<MemberStatus> members;
  std::string operation;                     // idle resync rebuild check repair
  double progress_percent = 0;
  uint64_t speed_bytes_per_second = 0, eta_seconds = 0;
  uint64_t mismatch_blocks = 0;              // of the last check or repair, 512-byte sectors (as mismatch_cnt)
  std::string advice;                        // what to do next, one line
};

// What it means for a disk to join a volume (add, replace, grow). Reads its superblock and its first MiB, writes nothing.
struct JoinPlan {
  std::vector<std::string> lines;  // what will be done, for a person; first of all what is lost
  bool destroys = false;           // the disk holds something
};
Task<Result<JoinPlan>> plan_join(Volume& volume, VolumePtr disk);
// Zeroes its first MiB and the other places of md superblocks, so that nothing takes it for a member. Stable when done.
Task<Status> wipe_disk(Volume& disk);

class ArrayControl {
 public:
  virtual ~ArrayControl() = default;
  virtual ArrayStatus status() const = 0;  // any thread
  // Marks it faulty on the others, durably, and stops using it.
  virtual Task<Status> fail_member(std::string_view member) = 0;
  // Whether fail_member would be refused, and why.
  virtual Status may_fail(std::string_view member) const = 0;
  // Forgets a faulty or spare member; kBusy when it is active.
  virtual Task<Status> remove_member(std::string_view member) = 0;
  // Adds a spare; a degraded array starts to rebuild onto it. linear: appends and grows (V5).
  virtual Task<Status> add_member(VolumePtr member) = 0;
  // Fills `with` while `member` stays in use, then the two change places and `member` is faulty. Out of use already: as
  // add_member. kBusy when another replacement of it is under way. Failing `with` calls it off.
  virtual Task<Status> replace_member(std::string_view member, VolumePtr with) = 0;
  enum class Scrub : uint8_t { kCheck, kRepair };
  virtual Task<Status> start_scrub(Scrub mode) = 0;
  virtual Task<Status> stop_scrub() = 0;
  // Returns when no resync, rebuild or scrub runs.
  virtual Task<void> wait_idle() = 0;
};

// The control of a volume, or null when it has none.
ArrayControl* array_control(Volume& volume);
// The status of any volume, plain layouts and leaves included.
ArrayStatus array_status(Volume& volume);
// Like /proc/mdstat and zpool status together.
std::string format_status(const ArrayStatus& status);

// Makes linear (plain or md) longer by one member (V5).
Task<Status> grow(Volume& volume, VolumePtr member);

// What mkfs.xfs should be told, and why (V3).
struct MkfsAdvice {
  std::string command;  // "mkfs.xfs -d su=64k,sw=4,agsize=... DEVICE"
  std::string reason;
  uint64_t su = 0, sw = 0, agsize = 0;  // bytes, units, bytes; 0 = leave it to mkfs
};
MkfsAdvice advise_mkfs(const Volume& volume, std::string_view device);

}  // namespace spillway
