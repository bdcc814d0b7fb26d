// Volume: the one interface of everything that holds blocks. Leaves (file, memory, sim), layers (linear, stripe,
// mirror, raid5, slice), filters (qos, cache) and images (raw, qcow2) all implement it and stack on each other.
//
// Public functions are the one entry: they assert the preconditions once, then call the layer's do_*.
// A request that violates them is our own mistake; whoever takes requests from outside (export, control) validates
// with `check_range` first and answers the guest with an error.
//
// Preconditions: offset and length are multiples of geometry().block_size, length > 0, [offset, offset + length)
// lies inside size(), the iov's total length is the length, no write-like call on a read-only volume.
//
// Semantics: like a disk with a volatile cache. A write is acknowledged when a later read sees it; a flush (or a
// write with `fua`) completes when every write acknowledged before it was *issued* is stable. Concurrent requests
// to one block have no order. An error is the error of that request, and only of it. A failed flush means that
// acknowledged writes may be lost and is reported to every flush that waited for it.
//
// Thread-safety: any reactor may call; the Task runs on the calling reactor. A volume keeps what it shares between
// reactors internally synchronised. Buffers must live until the Task has ended; the volume never keeps them.
// Lifetime: shared_ptr; a volume holds its members. Destroy only when no request is in flight (close() first).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/base/units.h"
#include "src/io/buffers.h"
#include "src/io/task.h"

namespace spillway {

// Why a request is made; decides which share it is accounted to at the disk (Q1) and what may be shed first.
enum class IoClass : uint8_t { kForeground, kReadAhead, kWriteback, kRebuild, kScrub, kMetadata };

// Travels with every request, by value, unchanged through the layers: cost lands where it belongs.
struct IoContext {
  GroupId group = GroupId::kRoot;
  IoClass io_class = IoClass::kForeground;
  bool fua = false;  // write, write_zeroes: stable when it completes
};

// What flows up (V3). Sizes in bytes; 0 = unknown / not applicable.
struct Geometry {
  uint32_t block_size = 512;           // logical block; power of two, 512..4096: granularity of requests
  uint32_t physical_block_size = 4096; // below this a write is a read-modify-write somewhere
  uint32_t min_io = 0;                 // chunk: smallest request that does not suffer from the layout
  uint32_t opt_io = 0;                 // full stripe (data disks x chunk)
  uint64_t independent_region = 0;     // regions of this size seek independently (linear); 0: the whole volume
  uint32_t discard_granularity = 0;    // 0: discard is not supported and fails with kUnsupported
  bool rotational = false;
  bool read_only = false;
};

struct Extent {
  enum class Kind : uint8_t { kData, kZero /* allocated, reads as zeros */, kHole /* not allocated, zeros */ };
  uint64_t offset = 0;
  uint64_t length = 0;
  Kind kind = Kind::kData;
};

class Volume {
 public:
  virtual ~Volume() = default;
  Volume(const Volume&) = delete;
  Volume& operator=(const Volume&) = delete;

  const std::string& name() const { return name_; }
  // Bytes; a multiple of block_size. Grows only (V5); any thread.
  uint64_t size() const { return size_.load(std::memory_order_acquire); }
  // Constant after construction.
  const Geometry& geometry() const { return geometry_; }

  Task<Status> read(IoContext ctx, uint64_t offset, Iov iov);
  // A read or write of this range (inside size()) comes within microseconds: what it will touch may be fetched into the CPU's
  // caches. Changes nothing and may be left out.
  virtual void expect(IoContext /*ctx*/, uint64_t /*offset*/, uint64_t /*length*/, bool /*write*/) {}
  Task<Status> write(IoContext ctx, uint64_t offset, Iov iov);
  Task<Status> flush(IoContext ctx);
  // Contents of the range become undefined-but-stable-on-read zeros or old data; here: they read as zeros or as
  // before, each block one of both. Space may be given back. kUnsupported when geometry().discard_granularity == 0.
  Task<Status> discard(IoContext ctx, uint64_t offset, uint64_t length);
  // The range reads as zeros afterwards. may_unmap: it may be deallocated.
  Task<Status> write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap);
  // Extents that cover exactly [offset, offset + length), in order, neighbours of one kind merged where cheap.
  Task<Result<std::vector<Extent>>> block_status(uint64_t offset, uint64_t length);
  // Grow to `new_size`. kUnsupported where the layer cannot; kInvalid when smaller than now or unaligned.
  Task<Status> resize(uint64_t new_size);

  // kOutOfRange / kInvalid / kReadOnly with a text that names the field: for requests that come from outside.
  Status check_range(uint64_t offset, uint64_t length, bool writes) const;

  // Called (on any thread) after the size has grown. Remove before the listener dies.
  using ResizeListener = std::function<void(uint64_t new_size)>;
  uint64_t add_resize_listener(ResizeListener fn);
  void remove_resize_listener(uint64_t id);

  // The volumes below, for walking the graph (tools, status). Stable unless a member is added or replaced.
  virtual std::vector<std::shared_ptr<Volume>> members() const { return {}; }
  // One word: "file", "stripe", ...
  virtual std::string_view layer() const = 0;
  // Lines "key: value" for a person: state, progress, counters. Any thread.
  virtual std::string to_text() const { return {}; }
  // Ends background work and makes superblocks clean. After the last request; the default does the members.
  virtual Task<Status> close();

 protected:
  Volume(std::string name, uint64_t size, Geometry geometry);

  virtual Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) = 0;
  virtual Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) = 0;
  virtual Task<Status> do_flush(IoContext ctx) = 0;
  virtual Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length);
  // Default: writes zeros from a shared zero buffer, in pieces of at most 1 MiB.
  virtual Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap);
  // Default: everything is data.
  virtual Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length);
  virtual Task<Status> do_resize(uint64_t new_size);

  // The layer's own: publishes a larger size and tells the listeners.
  void set_size(uint64_t new_size);
  Geometry& mutable_geometry() { return geometry_; }  // in constructors only

 private:
  // check_range without a word: the entry of every request of every layer.
  bool in_range(uint64_t offset, uint64_t length, bool writes) const {
    const uint64_t rest = geometry_.block_size - 1, total = size();
    return !(writes && geometry_.read_only) && length != 0 && ((offset | length) & rest) == 0 && offset <= total &&
           length <= total - offset;
  }

  std::string name_;
  std::atomic<uint64_t> size_;
  Geometry geometry_;
  std::mutex listeners_mutex_;
  uint64_t next_listener_ = 1;
  std::vector<std::pair<uint64_t, ResizeListener>> listeners_;
};

using VolumePtr = std::shared_ptr<Volume>;

}  // namespace spillway
