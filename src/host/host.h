// Host: the composition root. Builds the groups, the cache, the volume graph and the exports a config describes, and
// answers the control socket's commands.
//
// Order of the start: groups, cache (adopts what a predecessor left), disks and layers, images, exports, pressure
// sources. The stop goes the other way: pressure, exports drained, cache flushed, volumes closed.
// Thread-confined to the main reactor; the exports' reactors are its own threads.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "src/base/fd_store.h"
#include "src/cache/cache.h"
#include "src/control/config.h"
#include "src/export/export.h"
#include "src/host/extent_watch.h"
#include "src/host/graph.h"
#include "src/host/pmem.h"
#include "src/io/blocking_pool.h"
#include "src/io/reactor_pool.h"

#include <spillway/reclaim/reclaim.h>

namespace spillway {

class QosDomain;

class Host {
 public:
  struct Options {
    FdStore* store = nullptr;                       // required
    std::function<Result<uint64_t>()> restarts;     // how often the worker was restarted; null = never
  };
  // On the main reactor. An error names file, line and field; what was started has been stopped again.
  static Task<Result<std::unique_ptr<Host>>> start(const Config& config, Options options);
  ~Host();

  // One control command (docs/man/spillway.1.md). kNotFound for an unknown one.
  Task<Result<nlohmann::json>> command(const std::string& name, const nlohmann::json& args);
  // Drains and closes; first error wins. The object may be destroyed afterwards.
  Task<Status> stop();

 private:
  Host(const Config& config, Options options);
  Status make_groups();
  Task<Status> build();
  Status start_pressure();
  Task<Status> refuse_shared_extents();
  Task<void> watch_extents();
  Result<reclaim::GroupRef> group_named(const nlohmann::json& args, const char* key);
  Result<GroupId> group_id(const std::string& name);
  std::string tenant_of(const std::string& group) const;

  nlohmann::json status() const;
  nlohmann::json shrinkers() const;
  nlohmann::json exports_json() const;
  nlohmann::json groups_json() const;
  Task<Result<nlohmann::json>> volume_command(const std::string& verb, const nlohmann::json& args);
  Result<nlohmann::json> shrinker_command(const std::string& verb, const nlohmann::json& args);
  Task<Result<nlohmann::json>> volume_join(const std::string& verb, Volume& volume, const nlohmann::json& args);
  Result<nlohmann::json> group_set(const nlohmann::json& args);
  // `keep`: the holder is told too, so that it holds for the next worker. A mistake changes nothing.
  Status set_group(const nlohmann::json& args, bool keep);
  // What was set live in a former worker's time.
  Status restore_groups();

  const Config config_;
  Options options_;
  uint64_t started_ns_ = 0;
  std::unique_ptr<reclaim::Registry> registry_;
  std::map<std::string, reclaim::GroupRef> groups_;
  std::unique_ptr<ReactorPool> reactors_;
  std::unique_ptr<BlockingPool> blocking_;  // after reactors_: its threads post to them and must end first
  std::shared_ptr<QosDomain> qos_;
  std::unique_ptr<Cache> cache_;
  std::unique_ptr<Graph> graph_;
  std::unique_ptr<PmemHost> pmem_;
  std::unique_ptr<ExtentWatch> extents_;
  IoAwait* extent_timer_ = nullptr;  // the pause between two looks; null while one runs
  bool stopping_ = false;
  AsyncCounter watching_;
  std::map<std::string, std::unique_ptr<Export>> exports_;
  std::unique_ptr<reclaim::PressureMonitor> pressure_;
};

}  // namespace spillway
