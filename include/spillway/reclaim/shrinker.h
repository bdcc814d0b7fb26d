// Shrinker: the RAII handle of the three-verb interface (S1).
//
//     Shrinker s = registry.alloc(ShrinkerFlags::kGroupAware, "my-cache");   // inactive
//     s.set_count(...); s.set_scan(...);                                      // fill in
//     s.register_();                                                          // active
//     s.free();                                                               // or the destructor
//
// States: allocated -> registered -> gone, or allocated -> gone. There is nothing else.
// The handle is thread-confined (one owner), except `set_bit`, which any thread may call between
// alloc and the start of free.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "spillway/reclaim/group.h"
#include "spillway/reclaim/types.h"

namespace spillway::reclaim {

struct ShrinkerImpl;

class Shrinker {
 public:
  Shrinker() noexcept = default;
  Shrinker(Shrinker&& o) noexcept : impl_(std::exchange(o.impl_, nullptr)) {}
  Shrinker& operator=(Shrinker&& o) noexcept {
    if (this != &o) {
      destroy();
      impl_ = std::exchange(o.impl_, nullptr);
    }
    return *this;
  }
  /// Frees. Where free() would refuse, as inside the shrinker's own callback, that is reported ("self-free")
  /// and the shrinker goes with the last reference, as soon as the callback has returned.
  ~Shrinker() { destroy(); }

  explicit operator bool() const noexcept { return impl_ != nullptr; }

  // Filling in: between alloc and register_, by one thread. Afterwards kState and no effect.
  Errc set_count(CountFn fn);
  Errc set_scan(ScanFn fn);
  Errc set_seeks(unsigned seeks);  ///< cost to recreate an object, default 2; 0 = no cost at all
  Errc set_batch(unsigned batch);  ///< objects per scan call, 0 = default 128
  Errc set_private_data(void* p);
  /// A callback that takes longer is "stuck" for its (group, node): others pass it by until it
  /// returns; again and again leads to quarantine. Default from RegistryOptions.
  Errc set_time_budget(Nanoseconds budget);
  void* private_data() const noexcept;

  /// Makes it active. Fails only for a handle that is empty, incomplete or registered already.
  Errc register_();

  /// S3: when this returns kOk no callback runs and none will start; the owner may destroy its data.
  /// Works on a never-registered shrinker alike. Waits only for callbacks of *this* shrinker.
  /// kSelfFree, kDeadlock (callbacks of this registry that free each other), kState (inside a diagnostics
  /// callback): nothing happened, the shrinker is still registered.
  Errc free();

  std::uint32_t id() const noexcept;
  std::string name() const;  ///< "name-id"
  Errc rename(std::string_view name);

  /// The adder's half of the empty protocol: call it after an object became visible to `count` for
  /// (group, node), at least whenever the number there went from zero to one. Lock-free; cheap when
  /// the bit is set already. A shrinker that is not group-aware (NUMA-aware) passes the root (0).
  /// Full ordering: a walk that clears the bit afterwards sees the object (see docs/concurrency.md).
  void set_bit(MemoryGroup& group, int node = 0) noexcept;
  /// The same for the root group and node 0.
  void set_bit() noexcept;

 private:
  friend class Registry;
  friend struct RegistryAccess;
  explicit Shrinker(ShrinkerImpl* i) noexcept : impl_(i) {}
  void destroy() noexcept;
  ShrinkerImpl* impl_ = nullptr;
};

}  // namespace spillway::reclaim
