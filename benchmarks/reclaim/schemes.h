// Ways to protect a shrinker between lookup and callback, behind one interface. Every scheme pays for the
// same duties: it allocates the library's own ShrinkerImpl with name and statistics, takes an id in the same
// id table, sets a bit in the root group's unit tree, and runs the same visit (arithmetic, statistics, trace).
// They differ in how a walk holds what it calls and what `free` waits for.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "spillway/reclaim/reclaim.h"

namespace spillway::reclaim::bench {

struct WalkResult {
  std::uint64_t visits = 0;
  bool bailed = false;  // ended early, or did not start, because of register or free
};

class Scheme {
 public:
  using Handle = void*;
  virtual ~Scheme() = default;
  virtual Handle add(CountFn count, ScanFn scan) = 0;  // alloc, register, set the bit
  virtual void remove(Handle h) = 0;                   // nothing runs in it when this returns
  virtual WalkResult walk() = 0;                       // one pass at priority 12 over the root group
  virtual Registry& registry() = 0;
};

/// rwlock, rwlock-yield, srcu, srcu-expedited, mutex, rcu-list, ours-1 (one reference count), ours (one per core)
std::unique_ptr<Scheme> make_scheme(const std::string& name);
const std::vector<std::string>& scheme_names();

}  // namespace spillway::reclaim::bench
