// The shared host cache (ARCHITECTURE "Cache, and who may learn what"; S, P3-P5). A Cache owns frames in memfds that the
// holder keeps; `attach` puts it in front of a volume as a filter that looks like a volume.
//
//   auto cache = Cache::create(options);                                        // adopts what a predecessor left
//   VolumePtr v = (*cache)->attach(lower, CacheMode::kIsolated, "fast#uuid");  // same node_key = same data node
//   ... co_await (*cache)->close();                                              // everything dirty is on the leaves
//
// Semantics of the filter: a disk with a volatile write-back cache and a working flush. `ctx.fua` on a write is
// write-through. What was acknowledged is in the holder's memory (dirty frame + table entry) or on the leaf, so that a
// kill -9 of the worker loses nothing: a successor adopts it and flush brings it down.
//
// The tenant of a request is the top-level group of ctx.group. Every tenant sees a node through its own view
// (view.h); hits, misses and errors of a tenant follow from its own requests and its entitlement alone.
//
// Thread-safety: everything may be called from any thread, except create/close/destruction (one thread, in that
// order, no request in flight at destruction). Tasks run on the calling reactor.
// Lifetime: the Cache outlives the volumes that attach() gave out; the registry and the store outlive the Cache.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/base/fd_store.h"
#include "src/base/result.h"
#include "src/base/units.h"
#include "src/io/reactor.h"
#include "src/volume/volume.h"

namespace spillway::reclaim {
class Registry;
}

namespace spillway {

// Who may learn what through residency (P3, P4).
enum class CacheMode : uint8_t {
  kIsolated,  // default: a page another tenant brought in is a miss, with the device read really issued
  kTrusted,   // a resident page is a hit for everybody: tells tenants apart what others read; documented as leaking
  kNone,      // no frames for this export; still coherent with cached exports of the same node
};
Result<CacheMode> parse_cache_mode(std::string_view text);  // "isolated" "trusted" "none"
std::string_view to_string(CacheMode mode);

struct CacheOptions {
  uint64_t capacity_bytes = 256 * kMiB;
  uint64_t max_capacity_bytes = 0;       // set_capacity may grow to this; 0 = 4 x capacity (address space only)
  uint64_t dirty_bytes_max = 0;          // all tenants together, shared out like the capacity; 0 = capacity / 4
  uint64_t dirty_expire_ns = 2'000'000'000;  // background writeback begins this long after a node became dirty
  int numa_nodes = 1;                    // one memfd each; pages are interleaved by 256 KiB
  FdStore* store = nullptr;              // null: frames die with this process (tools, tests)
  reclaim::Registry* registry = nullptr; // required
  // The root group has a share from the start (an export without a group uses it); else from its first request on, which
  // changes everybody's share.
  bool root_is_tenant = false;
  // Where background writeback runs. Required for write-back; null: writes are write-through.
  Reactor* background = nullptr;
  // After pressure lowered the entitlements they grow back by 1/64 in each of these intervals.
  uint64_t grow_back_ns = 100'000'000;
  uint32_t read_ahead_max_bytes = 512 * 1024;  // 0: none
};

struct CacheTenantStats {
  uint32_t group = 0;
  std::string name;
  uint64_t hits = 0, misses = 0;       // pages; a page that is being read for this tenant counts as a hit
  uint64_t view_bytes = 0;             // what the tenant is charged for
  uint64_t entitlement_bytes = 0;      // what it may hold now
  uint64_t dirty_bytes = 0, dirty_max_bytes = 0;
  uint64_t evicted_bytes = 0;          // by its own charge
  uint64_t reclaimed_bytes = 0;        // by host pressure or a cut of the capacity
};

struct CacheNodeStats {
  std::string key;
  uint64_t resident_bytes = 0, dirty_bytes = 0;
  uint32_t views = 0;
};

struct CacheStats {
  uint64_t hits = 0, misses = 0, read_ahead = 0;  // pages
  double hit_ratio = 0;                // hits / (hits + misses), 0 without requests
  uint64_t capacity_bytes = 0;
  uint64_t resident_bytes = 0;         // frames that hold data
  uint64_t backed_bytes = 0;           // blocks of the memfds: what the host really spends
  uint64_t dirty_bytes = 0;
  uint64_t view_bytes = 0;             // sum of all views; resident < views where tenants share
  uint64_t peak_bytes = 0;             // of resident_bytes
  uint64_t reclaimed_bytes = 0;        // evicted for pressure, a shrinker scan or a cut of the capacity
  uint64_t punched_bytes = 0;          // given back to the kernel
  uint64_t metadata_bytes = 0;         // index and views (heap)
  uint64_t view_metadata_bytes = 0;    // of that: views
  uint64_t adopted_pages = 0, adopted_dirty_pages = 0;  // found in the holder's memory at start
  uint64_t writeback_bytes = 0, writeback_requests = 0, writeback_errors = 0;
  uint64_t merged_resident = 0;        // device reads issued although the page was resident (first access of a tenant)
  uint64_t joined_misses = 0;          // waited for a read that was already under way for the same tenant
  uint64_t bypassed = 0;               // pages served around the cache: own request took the room, or many reads under way
  uint64_t frame_shortage = 0;         // of those: no physical frame (by construction 0)
  std::vector<CacheTenantStats> tenants;
  std::vector<CacheNodeStats> nodes;
};

class Cache {
 public:
  // Adopts "cache/frames<N>" and "cache/table" from the store when they are there and fit, else makes new ones and puts
  // them there. Dirty frames of a node stay until a volume with the same key is attached. kInvalid, kNoMemory, errno.
  static Result<std::unique_ptr<Cache>> create(CacheOptions options);
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  // The filter in front of `lower`. node_key (1..200 bytes) names the data node for as long as its data is the same:
  // volume name and identity; equal keys share frames and must name the same `lower`. `lower` must not be written
  // around the cache. kInvalid for a bad key, or another `lower` under a key that is in use.
  Result<VolumePtr> attach(VolumePtr lower, CacheMode mode, const std::string& node_key);
  // Flushes nothing; drops the clean frames of the node and forgets its dirty ones: for a volume that was deleted.
  void forget(const std::string& node_key);

  // Physical bytes for frames, live. Lowering trims every tenant to its share at once, in the calling thread, and
  // gives the memory back to the kernel; dirty pages follow as they are written.
  void set_capacity(uint64_t bytes);
  uint64_t capacity() const;
  // After groups were made or their weights changed: shares the capacity out anew. (A tenant's first request does it too.)
  void refresh_entitlements();
  // Host pressure: takes `fraction` (0..1) of every tenant's present entitlement; it grows back by and by.
  // What the shrinker does for a whole pass. Returns bytes evicted.
  uint64_t apply_pressure(double fraction);

  CacheStats stats() const;
  std::string to_text() const;

  // Writes back everything dirty and flushes the volumes below; first error wins, the rest is still tried.
  Task<Status> flush_all();
  // flush_all, ends background work. Requests must have ended. keep: leave clean frames in the holder's memory.
  Task<Status> close();

  struct Impl;
  Impl& impl() { return *impl_; }  // for the parts of this folder and its tests

 private:
  explicit Cache(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace spillway
