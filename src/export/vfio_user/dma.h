// DmaTable: which parts of the guest's address space the client has shown us, and where they are here.
//
// Only memory that cannot raise SIGBUS and cannot wait for us is mapped: a memfd sealed against shrinking (what QEMU's
// memory-backend-memfd makes). Everything else (ROM and our own BAR come without a descriptor; files) is accepted, as
// the protocol wants, and is an address that no ring may use.
//
// Thread-confined to the device's reactor; snapshots (GuestMemory) are immutable and keep their mappings alive.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "src/base/fd.h"
#include "src/base/fd_store.h"
#include "src/export/vfio_user/protocol.h"
#include "src/virtio/guest_memory.h"

namespace spillway::vfio {

class DmaTable {
 public:
  // A snapshot of the table with everything it points to.
  struct Snapshot;
  using SnapshotPtr = std::shared_ptr<const Snapshot>;
  struct Mapping;

  // `store` keeps every entry as "<prefix><hex address>"; null: nothing survives.
  DmaTable(FdStore* store, std::string prefix) : store_(store), prefix_(std::move(prefix)) {}

  // Takes over what a predecessor kept.
  Status adopt();
  // Replaces an entry of exactly this range; kExists when it overlaps another, kBusy when the table is full.
  Status map(const DmaMap& request, Fd fd);
  // Removes all entries inside the range; kInvalid when it cuts one in two.
  Status unmap(uint64_t address, uint64_t size);
  void clear();

  SnapshotPtr snapshot() const { return snapshot_; }
  size_t entries() const { return entries_.size(); }
  size_t unmapped() const;  // entries we may not touch

 private:
  struct Entry {
    DmaMap request;
    std::shared_ptr<Mapping> mapping;  // null: not ours to touch
  };
  Status insert(const DmaMap& request, Fd fd);
  Status rebuild();
  std::string key(uint64_t address) const;

  FdStore* store_;
  std::string prefix_;
  std::vector<Entry> entries_;
  SnapshotPtr snapshot_;
};

struct DmaTable::Mapping {
  std::byte* base = nullptr;
  uint64_t length = 0;
  ~Mapping();
};

struct DmaTable::Snapshot {
  virtio::GuestMemory memory;
  std::vector<std::shared_ptr<Mapping>> keep;
  // The guest address behind a pointer of this snapshot; false when there is none.
  bool guest_address(const std::byte* p, uint64_t* address) const;
};

}  // namespace spillway::vfio
