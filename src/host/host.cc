#include "src/host/host.h"



#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/control/metrics.h"
#include "src/export/vhost_user/vhost_user.h"
#include "src/host/calibrate.h"
#include "src/host/iostat.h"
#include "src/qos/qos.h"
#include "src/volume/assemble.h"

namespace spillway {

using nlohmann::json;

namespace {

// A reactor for each CPU this process may use.
std::vector<int> default_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int n = ::sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::vector<int>(static_cast<size_t>(std::max(1, n)), -1);
}

Result<std::string> text_arg(const json& args, const char* key) {
  if (!args.contains(key) || !args[key].is_string())
    return fail(ErrorKind::kInvalid, fmt::format("argument \"{}\" is missing", key));
  return args[key].get<std::string>();
}

constexpr const char* kGroupEntries = "group/";  // in the holder: what "group set" was given since the daemon began

// Sizes and numbers arrive as typed (key=value): "64M", "300", or as JSON numbers.
Result<uint64_t> size_arg(const json& value, const char* key) {
  if (value.is_number_unsigned()) return value.get<uint64_t>();
  if (value.is_string() && value == "max") return UINT64_MAX;
  if (value.is_string()) {
    auto v = parse_size(value.get<std::string>());
    if (v) return *v;
    return fail(ErrorKind::kInvalid, fmt::format("{}: {}", key, v.error().message()));
  }
  return fail(ErrorKind::kInvalid, fmt::format("{}: must be a number or a size", key));
}

bool stands_on(const Volume& v, const VolumePtr& disk) {
  for (const VolumePtr& m : v.members())
    if (m == disk || stands_on(*m, disk)) return true;
  return false;
}

json array_json(const ArrayStatus& s) {
  json members = json::array();
  for (auto& m : s.members)
    members.push_back({{"name", m.name}, {"state", m.state}, {"role", m.role}, {"read_errors", m.read_errors},
                       {"rebuilt_bytes", m.rebuilt_bytes}});
  return {{"name", s.name}, {"layer", s.layer}, {"uuid", s.uuid}, {"metadata", s.metadata}, {"state", s.state},
          {"consistency", s.consistency}, {"layout", s.layout}, {"size", s.size}, {"chunk", s.chunk},
          {"events", s.events}, {"members", members}, {"operation", s.operation},
          {"progress_percent", s.progress_percent}, {"speed_bytes_per_second", s.speed_bytes_per_second},
          {"eta_seconds", s.eta_seconds}, {"mismatch_sectors", s.mismatch_blocks}, {"advice", s.advice},
          {"text", format_status(s)}};
}

}  // namespace

Host::Host(const Config& config, Options options) : config_(config), options_(std::move(options)) {}
Host::~Host() = default;

Task<Result<std::unique_ptr<Host>>> Host::start(const Config& config, Options options) {
  std::unique_ptr<Host> host(new Host(config, std::move(options)));
  host->started_ns_ = Reactor::current().now_ns();
  Status built = co_await host->build();
  if (!built) {
    Status stopped = co_await host->stop();
    if (!stopped) log(LogLevel::kError, "host", "stop after failed start: {}", stopped.error().message());
    co_return fail(built.error());
  }
  co_return std::move(host);
}

std::string Host::tenant_of(const std::string& group) const { return group.substr(0, group.find('/')); }

Status Host::make_groups() {
  for (auto& [name, g] : config_.groups) {
    const auto slash = name.rfind('/');
    reclaim::MemoryGroup* parent =
        slash == std::string::npos ? nullptr : groups_.at(name.substr(0, slash)).get();
    const std::string own = slash == std::string::npos ? name : name.substr(slash + 1);
    reclaim::Errc why{};
    reclaim::GroupRef ref = registry_->create_group(own, parent, &why);
    if (!ref) return fail(g.where.error("", fmt::format("group: {}", reclaim::to_string(why))));
    reclaim::GroupLimits limits;
    limits.min = g.memory_min;
    limits.low = g.memory_low;
    limits.high = g.memory_high;
    limits.max = g.memory_max;
    limits.weight = g.weight;
    ref->set_limits(limits);
    QosGroup qos;
    qos.parent = static_cast<GroupId>(parent != nullptr ? parent->id() : 0);
    qos.name = name;
    qos.weight = g.weight;
    qos.caps = {.rbps = g.rbps, .wbps = g.wbps, .riops = g.riops, .wiops = g.wiops};
    if (auto s = qos_->set(static_cast<GroupId>(ref->id()), qos); !s)
      return fail(g.where.error("", s.error().message()));
    groups_.emplace(name, std::move(ref));
  }
  return {};
}

Result<GroupId> Host::group_id(const std::string& name) {
  if (name.empty()) return GroupId::kRoot;
  auto it = groups_.find(name);
  if (it == groups_.end()) return fail(ErrorKind::kNotFound, fmt::format("there is no group \"{}\"", name));
  return static_cast<GroupId>(it->second->id());
}

Task<Status> Host::build() {
  reclaim::RegistryOptions registry;
  registry.nodes = static_cast<int>(config_.host.nodes);
  registry.diagnostics = [](const reclaim::Diagnostic& d) {
    LOG_LIMITED(LogLevel::kWarn, "reclaim", "{} {}: {}", d.what, d.shrinker, d.text);
  };
  registry_ = std::make_unique<reclaim::Registry>(registry);
  qos_ = std::make_shared<QosDomain>();
  SPILLWAY_CO_CHECK(make_groups());
  SPILLWAY_CO_CHECK(restore_groups());
  if (auto e = registry_->start_background(); e != reclaim::Errc::kOk)
    co_return fail(ErrorKind::kNoMemory, fmt::format("reclaim threads: {}", reclaim::to_string(e)));
  blocking_ = std::make_unique<BlockingPool>(4);
  auto cpus = config_.host.cpus;
  if (cpus.empty()) cpus = default_cpus();
  SPILLWAY_CO_TRY(reactors_, ReactorPool::start(cpus));

  CacheOptions cache;
  cache.capacity_bytes = config_.host.cache_size;
  cache.dirty_bytes_max = config_.host.cache_dirty;
  cache.numa_nodes = static_cast<int>(config_.host.nodes);
  cache.store = options_.store;
  cache.registry = registry_.get();
  cache.background = &Reactor::current();
  for (auto& [name, e] : config_.exports) cache.root_is_tenant |= e.group.empty();
  auto made = Cache::create(cache);
  if (!made) co_return fail(config_.host.where.error("size", made.error().message(), made.error().kind()));
  cache_ = std::move(*made);

  pmem_ = std::make_unique<PmemHost>(config_.host.pmem_folder, options_.store, registry_.get());
  GraphOptions graph;
  graph.registry = registry_.get();
  if (options_.restarts)  // requests of a killed predecessor hold its disks for some milliseconds more
    if (auto r = options_.restarts(); r && *r > 0) graph.lock_wait_ms = 5000;
  graph.wrap_disk = [this](VolumePtr leaf, const DiskConfig& disk) -> Result<VolumePtr> {
    QosOptions options;
    SPILLWAY_TRY(options.model, stored_model(config_, disk.name));
    return make_qos(std::move(leaf), options, qos_);
  };
  graph.wrap_node = [this](VolumePtr node, CacheMode mode, const std::string& key) -> Result<VolumePtr> {
    return cache_->attach(std::move(node), mode, key);
  };
  graph.image_log = [this](const std::string& key) -> Result<Fd> {
    const std::string name = "qcow2/" + key;
    if (auto kept = options_.store->get(name); kept && kept->fds.size() == 1) return std::move(kept->fds[0]);
    Fd fresh(::memfd_create("spillway-qcow2-log", MFD_CLOEXEC));
    if (!fresh) return fail_errno(errno, "image log");
    const int fd = fresh.get();
    SPILLWAY_CHECK(options_.store->put(name, std::span(&fd, 1), ""));
    return fresh;
  };
  graph_ = std::make_unique<Graph>(config_, std::move(graph));
  SPILLWAY_CO_TRY(auto order, config_.build_order());
  for (auto& name : order) {
    // An image is opened where an export or another image uses it: two openings would be two owners.
    if (config_.volumes.at(name).layer == "qcow2") continue;
    auto opened = co_await graph_->open(name);
    if (!opened) co_return fail(opened.error());
  }
  SPILLWAY_CO_CHECK(co_await refuse_shared_extents());
  for (auto& [name, e] : config_.exports) {
    auto volume = co_await graph_->open_cached(e.volume, e.cache, tenant_of(e.group));
    if (!volume) co_return fail(volume.error());
    if (!e.read_only && (*volume)->geometry().read_only)
      co_return fail(e.where.error("volume", fmt::format("\"{}\" is read-only; say readonly = true", e.volume)));
    ExportOptions o;
    o.name = name;
    o.volume = *volume;
    o.group = *group_id(e.group);
    o.socket = e.socket;
    o.queues = e.queues;
    o.read_only = e.read_only;
    o.trusted_flush = !e.write_through;
    o.store = options_.store;
    o.reactors = reactors_.get();
    o.blocking = blocking_.get();
    if (e.device == "virtio-blk") {
      auto started = start_vhost_user(std::move(o));
      if (!started)
        co_return fail(e.where.error("socket", started.error().message(), started.error().kind()));
      exports_.emplace(name, std::move(*started));
    } else {
      auto started = pmem_->start(e, std::move(o), tenant_of(e.group));
      if (!started)
        co_return fail(e.where.error(e.socket.empty() ? "file" : "socket", started.error().message(),
                                     started.error().kind()));
      for (auto& part : *started) exports_.emplace(part->name(), std::move(part));
    }
  }
  pmem_->settle();
  cache_->refresh_entitlements();
  if (config_.host.extent_check_s != 0) {
    watching_.add();
    Reactor::current().spawn(watch_extents());
  }
  co_return start_pressure();
}

Task<Status> Host::refuse_shared_extents() {
  extents_ = std::make_unique<ExtentWatch>(config_, *blocking_);
  SPILLWAY_CO_TRY(auto found, co_await extents_->look());
  if (found.empty()) co_return Status{};
  co_return fail(config_.disks.at(found[0].disk).where.error("path", found[0].text + " (--unshare copies them)"));
}

// Sharing can come later (cp --reflink of a running disk). Then the exports that write the disk end: what they would
// tell each other by the time of a copy-on-write is worse than a disk that is gone.
Task<void> Host::watch_extents() {
  while (!stopping_) {
    IoAwait pause = Reactor::current().sleep_for(uint64_t{config_.host.extent_check_s} * 1'000'000'000);
    extent_timer_ = &pause;
    co_await pause;
    extent_timer_ = nullptr;
    if (stopping_) break;
    auto found = co_await extents_->look();
    if (!found) {
      log(LogLevel::kWarn, "extents", "{}", found.error().message());
      continue;
    }
    for (auto& f : *found)
      for (auto& name : extents_->writers_of(f.disk)) {
        auto it = exports_.find(name);
        if (it == exports_.end()) continue;
        log(LogLevel::kError, "extents", "{}: export {} ends; `unshare = true` in [host] would copy them", f.text, name);
        std::unique_ptr<Export> ended = std::move(it->second);
        exports_.erase(it);
        co_await ended->stop(false);
      }
  }
  watching_.done();
}

// systemd's variables when they are set, else the best the host offers. A machine without any source is served all
// the same: the status says so, and the cache keeps to its own limit.
Status Host::start_pressure() {
  reclaim::MonitorOptions options;
  options.on_event = [](const reclaim::PressureEvent& e) {
    LOG_LIMITED(LogLevel::kInfo, "pressure", "{} {}", reclaim::to_string(e.level), e.text);
    return true;
  };
  pressure_ = std::make_unique<reclaim::PressureMonitor>(*registry_, options);
  if (config_.host.psi || ::getenv("MEMORY_PRESSURE_WATCH") != nullptr) {
    if (auto e = pressure_->open_best(); e != reclaim::Errc::kOk)
      log(LogLevel::kWarn, "pressure", "no source of memory pressure: {}", reclaim::to_string(e));
    if (auto e = pressure_->start_thread(); e != reclaim::Errc::kOk)
      return fail(ErrorKind::kNoMemory, fmt::format("pressure thread: {}", reclaim::to_string(e)));
  }
  return {};
}

Task<Status> Host::stop() {
  Status first{};
  auto keep_first = [&](Status s) {
    if (!s && first) first = std::move(s);
  };
  stopping_ = true;
  if (extent_timer_ != nullptr) Reactor::current().cancel(*extent_timer_);
  co_await watching_.wait_idle();
  if (pressure_) pressure_->stop_thread();
  for (auto& [name, e] : exports_) co_await e->stop(false);
  exports_.clear();
  if (pmem_) pmem_->stop(false);
  if (cache_) keep_first(co_await cache_->flush_all());
  // Images hold cached volumes, the cache's filters hold the layers: images first, then the cache, then the rest.
  if (graph_) keep_first(co_await graph_->close());
  if (cache_) keep_first(co_await cache_->close());
  if (registry_) registry_->stop_background();
  pmem_.reset();
  graph_.reset();
  cache_.reset();
  blocking_.reset();  // its threads post to reactors: they end first
  reactors_.reset();
  pressure_.reset();
  groups_.clear();
  registry_.reset();
  co_return first;
}

json Host::shrinkers() const {
  json list = json::array();
  for (auto& s : registry_->list()) {
    json not_freed = json::object();
    for (size_t i = 0; i < s.not_freed.size(); ++i)
      if (s.not_freed[i] != 0)
        not_freed[std::string(reclaim::to_string(static_cast<reclaim::NotFreed>(i)))] = s.not_freed[i];
    uint64_t objects = 0, bytes = 0, pinned = 0;
    for (auto& row : registry_->counts(s.id))
      for (auto& n : row.nodes) {
        objects += n.objects;
        bytes += n.bytes;
        pinned += n.pinned_bytes;
      }
    list.push_back({{"id", s.id}, {"name", s.name}, {"registered", s.registered},
                    {"quarantined", s.quarantined}, {"objects", objects}, {"bytes", bytes},
                    {"pinned_bytes", pinned}, {"count_calls", s.count_calls}, {"scan_calls", s.scan_calls},
                    {"scanned", s.scanned}, {"freed_objects", s.freed_objects}, {"freed_bytes", s.freed_bytes},
                    {"busy", s.busy}, {"stops", s.stops}, {"skipped", s.skipped}, {"overruns", s.overruns},
                    {"time_ms", static_cast<double>(s.time_total.count()) / 1e6},
                    {"time_max_ms", static_cast<double>(s.time_max.count()) / 1e6},
                    {"last_status", std::string(reclaim::to_string(s.last_status))},
                    {"not_freed", not_freed}});
  }
  return list;
}

json Host::exports_json() const {
  json list = json::array();
  for (auto& [name, e] : exports_) {
    const ExportStats s = e->stats();
    json j{{"name", name}, {"transport", std::string(e->transport())}, {"connected", s.connected},
           {"reads", s.reads}, {"writes", s.writes}, {"flushes", s.flushes}, {"discards", s.discards},
           {"read_bytes", s.read_bytes}, {"write_bytes", s.write_bytes}, {"errors", s.errors},
           {"connections", s.connections}, {"protocol_errors", s.protocol_errors}};
    if (auto c = config_.exports.find(name); c != config_.exports.end()) {
      j["device"] = c->second.device;
      j["volume"] = c->second.volume;
      j["group"] = c->second.group;
      j["socket"] = c->second.socket;
      j["queues"] = c->second.queues;
      j["readonly"] = c->second.read_only;
      j["cache"] = std::string(to_string(c->second.cache));
    }
    list.push_back(std::move(j));
  }
  return list;
}

json Host::groups_json() const {
  json list = json::array();
  for (auto& g : registry_->groups()) {
    const auto limits = g->limits();
    const auto stats = g->stats();
    auto limit = [](uint64_t v) { return v == UINT64_MAX ? json("max") : json(v); };
    list.push_back({{"name", g->is_root() ? "/" : g->path().substr(1)}, {"id", g->id()},
                    {"weight", limits.weight}, {"usage", stats.usage}, {"memory.min", limits.min},
                    {"memory.low", limits.low}, {"memory.high", limit(limits.high)},
                    {"memory.max", limit(limits.max)}, {"reclaimed_bytes", stats.reclaimed_bytes},
                    {"charge_failures", stats.charge_failures}, {"direct_reclaims", stats.direct_reclaims}});
  }
  return list;
}

json Host::status() const {
  const CacheStats c = cache_->stats();
  json tenants = json::array();
  for (auto& t : c.tenants)
    tenants.push_back({{"name", t.name}, {"group", t.group}, {"hits", t.hits}, {"misses", t.misses},
                       {"view_bytes", t.view_bytes}, {"entitlement_bytes", t.entitlement_bytes},
                       {"dirty_bytes", t.dirty_bytes}, {"evicted_bytes", t.evicted_bytes},
                       {"reclaimed_bytes", t.reclaimed_bytes}});
  const auto totals = registry_->totals();
  double callbacks_ms = 0;
  for (auto& s : registry_->list()) callbacks_ms += static_cast<double>(s.time_total.count()) / 1e6;
  json sources = json::array();
  for (auto& s : pressure_->status())
    sources.push_back({{"kind", s.kind}, {"text", s.text}, {"active", s.active}, {"events", s.events}});
  uint64_t restarts = 0;
  if (options_.restarts)
    if (auto r = options_.restarts()) restarts = *r;
  json volumes = json::array();
  for (auto& v : graph_->opened())
    volumes.push_back({{"name", v->name()}, {"layer", std::string(v->layer())}, {"size", v->size()},
                       {"text", v->to_text()}});
  return {
      {"schema", 1},
      {"pid", ::getpid()},
      {"holder_pid", ::getppid()},
      {"uptime_ms", (Reactor::current().now_ns() - started_ns_) / 1'000'000},
      {"restarts", restarts},
      {"config", config_.file},
      {"cache",
       {{"capacity_bytes", c.capacity_bytes}, {"resident_bytes", c.resident_bytes},
        {"backed_bytes", c.backed_bytes}, {"dirty_bytes", c.dirty_bytes}, {"view_bytes", c.view_bytes},
        {"peak_bytes", c.peak_bytes}, {"reclaimed_bytes", c.reclaimed_bytes},
        {"punched_bytes", c.punched_bytes}, {"metadata_bytes", c.metadata_bytes}, {"hits", c.hits},
        {"misses", c.misses}, {"read_ahead", c.read_ahead}, {"hit_ratio", c.hit_ratio},
        {"adopted_pages", c.adopted_pages}, {"adopted_dirty_pages", c.adopted_dirty_pages},
        {"writeback_bytes", c.writeback_bytes}, {"writeback_errors", c.writeback_errors},
        {"bypassed", c.bypassed}, {"tenants", tenants}}},
      {"reclaim",
       {{"passes", totals.groups}, {"calls", totals.calls}, {"freed_bytes", totals.freed_bytes},
        {"freed_objects", totals.freed_objects},
        {"duration_ms", callbacks_ms}, {"shrinkers", shrinkers()}}},
      {"pressure", sources},
      {"groups", groups_json()},
      {"exports", exports_json()},
      {"volumes", volumes},
  };
}

Result<json> Host::shrinker_command(const std::string& verb, const json& args) {
  if (verb == "list") return shrinkers();
  SPILLWAY_TRY(std::string name, text_arg(args, "name"));
  reclaim::ShrinkerStats found;
  for (auto& s : registry_->list())
    if (s.name == name || s.name.substr(0, s.name.rfind('-')) == name || std::to_string(s.id) == name) found = s;
  if (found.name.empty()) return fail(ErrorKind::kNotFound, fmt::format("there is no shrinker \"{}\"", name));
  if (verb == "count") {
    json rows = json::array();
    for (auto& row : registry_->counts(found.id)) {
      json nodes = json::array();
      for (size_t i = 0; i < row.nodes.size(); ++i)
        nodes.push_back({{"objects", row.nodes[i].objects}, {"bytes", row.nodes[i].bytes},
                         {"pinned_bytes", row.nodes[i].pinned_bytes},
                         {"deferred", i < row.deferred.size() ? row.deferred[i] : 0}});
      rows.push_back({{"group", row.group_path}, {"nodes", nodes}});
    }
    return json{{"name", found.name}, {"groups", rows}};
  }
  if (verb == "scan") {
    uint64_t node = 0, nr = 1024;
    if (args.contains("node")) {
      SPILLWAY_TRY(node, size_arg(args["node"], "node"));
    }
    if (args.contains("nr")) {
      SPILLWAY_TRY(nr, size_arg(args["nr"], "nr"));
    }
    reclaim::GroupRef group = registry_->root();
    if (args.contains("group")) {
      const std::string path = args["group"].is_string() ? args["group"].get<std::string>() : std::string();
      group = path == "/" ? registry_->root() : registry_->find_group(path);
      if (!group) return fail(ErrorKind::kNotFound, fmt::format("there is no group \"{}\"", path));
    }
    if (node >= config_.host.nodes) return fail(ErrorKind::kInvalid, fmt::format("node: there is no node {}", node));
    reclaim::ScanReport report;
    const auto e = registry_->scan(found.id, *group, static_cast<int>(node), nr, &report);
    if (e != reclaim::Errc::kOk)
      return fail(ErrorKind::kBusy, fmt::format("shrinker {}: {}", found.name, reclaim::to_string(e)));
    return json{{"name", found.name}, {"scanned", report.scanned}, {"freed_objects", report.freed_objects},
                {"freed_bytes", report.freed_bytes},
                {"status", std::string(reclaim::to_string(report.status))}};
  }
  return fail(ErrorKind::kNotFound, fmt::format("there is no command \"shrinker {}\"", verb));
}

Result<json> Host::group_set(const json& args) {
  SPILLWAY_CHECK(set_group(args, true));
  cache_->refresh_entitlements();
  return groups_json();
}

Status Host::set_group(const json& args, bool keep) {
  SPILLWAY_TRY(std::string name, text_arg(args, "name"));
  auto it = groups_.find(name);
  if (it == groups_.end()) return fail(ErrorKind::kNotFound, fmt::format("there is no group \"{}\"", name));
  reclaim::GroupLimits limits = it->second->limits();
  QosGroup qos = qos_->snapshot()->groups.at(static_cast<GroupId>(it->second->id()));
  // First all values are read, then all are set: a mistake in one changes nothing.
  for (auto& [key, value] : args.items()) {
    if (key == "name") continue;
    SPILLWAY_TRY(uint64_t v, size_arg(value, key.c_str()));
    if (key == "weight") {
      if (v < 1 || v > 10000) return fail(ErrorKind::kInvalid, "weight: must be from 1 to 10000");
      limits.weight = static_cast<uint32_t>(v);
      qos.weight = static_cast<uint32_t>(v);
    } else if (key == "memory.min") limits.min = v;
    else if (key == "memory.low") limits.low = v;
    else if (key == "memory.high") limits.high = v;
    else if (key == "memory.max") limits.max = v;
    else if (key == "io.rbps") qos.caps.rbps = v == UINT64_MAX ? 0 : v;  // "max": none
    else if (key == "io.wbps") qos.caps.wbps = v == UINT64_MAX ? 0 : v;
    else if (key == "io.riops") qos.caps.riops = v == UINT64_MAX ? 0 : v;
    else if (key == "io.wiops") qos.caps.wiops = v == UINT64_MAX ? 0 : v;
    else return fail(ErrorKind::kInvalid, fmt::format("{}: unknown key of a group", key));
  }
  if (keep && options_.store != nullptr) {
    const std::string entry = std::string(kGroupEntries) + name;
    json all = args;
    if (auto kept = options_.store->get(entry)) {
      all = json::parse(kept->blob, nullptr, false);
      if (!all.is_object()) all = json::object();
      all.update(args);
    }
    SPILLWAY_CHECK(options_.store->put(entry, {}, all.dump()));
  }
  SPILLWAY_CHECK(qos_->set(static_cast<GroupId>(it->second->id()), qos));
  it->second->set_limits(limits);
  return {};
}

Status Host::restore_groups() {
  if (options_.store == nullptr) return {};
  SPILLWAY_TRY(auto entries, options_.store->list(kGroupEntries));
  for (auto& entry : entries) {
    SPILLWAY_TRY(auto kept, options_.store->get(entry));
    const json args = json::parse(kept.blob, nullptr, false);
    Status set = args.is_object() ? set_group(args, false) : fail(ErrorKind::kInvalid, "not an object");
    if (set) continue;
    // The config has changed: that group is no more.
    log(LogLevel::kWarn, "host", "{}: what was set live is dropped: {}", entry, set.error().message());
    SPILLWAY_CHECK(options_.store->remove(entry));
  }
  return {};
}

// A disk joins a volume. Nothing that is in use elsewhere does, and nothing that holds something without "force".
Task<Result<json>> Host::volume_join(const std::string& verb, Volume& volume, const json& args) {
  const std::string name = volume.name();
  SPILLWAY_CO_TRY(const std::string member, text_arg(args, "member"));
  std::string disk_name = member;
  if (verb == "replace") {
    SPILLWAY_CO_TRY(disk_name, text_arg(args, "with"));
  }
  for (const auto& [other, v] : config_.volumes)
    if (other != name)
      for (const auto* list : {&v.members, &v.spares})
        if (std::find(list->begin(), list->end(), disk_name) != list->end())
          co_return fail(ErrorKind::kBusy, fmt::format("{} is a member of volume {}", disk_name, other));
  for (const auto& [other, e] : config_.exports)
    if (e.volume == disk_name) co_return fail(ErrorKind::kBusy, fmt::format("{} is export {}", disk_name, other));
  ArrayControl* array = array_control(volume);
  if (verb != "grow" && array == nullptr)
    co_return fail(ErrorKind::kUnsupported, fmt::format("volume {}: a {} has no members to manage", name, volume.layer()));
  SPILLWAY_CO_TRY(VolumePtr disk, co_await graph_->open(disk_name));
  // What the running volumes say counts more than the file: members come and go.
  for (const auto& v : graph_->opened())
    if (v != disk && stands_on(*v, disk))
      co_return fail(ErrorKind::kExists, v->name() == name ? fmt::format("volume {}: {} is a member already", name, disk_name)
                                                           : fmt::format("{} is in use by volume {}", disk_name, v->name()));
  auto plan = co_await plan_join(volume, disk);
  if (!plan) co_return fail(std::move(plan).error());
  if (args.value("dry_run", false)) co_return json{{"lines", plan->lines}, {"destroys", plan->destroys}};
  if (plan->destroys && !args.value("force", false))
    co_return fail(ErrorKind::kExists, fmt::format("volume {}: {}; --yes does it", name, plan->lines.front()));
  if (plan->destroys) {
    if (disk->geometry().read_only) co_return fail(ErrorKind::kReadOnly, fmt::format("{} is read-only", disk_name));
    Status wiped = co_await wipe_disk(*disk);
    if (!wiped) co_return fail(std::move(wiped).error());
  }
  Status done{};  // (no co_await inside ?: , GCC 12 evaluates both sides)
  if (verb == "grow") done = co_await grow(volume, disk);
  else if (verb == "add") done = co_await array->add_member(disk);
  else done = co_await array->replace_member(member, disk);
  if (!done) co_return fail(std::move(done).error());
  json reply = array_json(array_status(volume));
  const auto& v = config_.volumes.at(name);
  if (std::find(v.members.begin(), v.members.end(), disk_name) == v.members.end() &&
      std::find(v.spares.begin(), v.spares.end(), disk_name) == v.spares.end())
    reply["text"] = reply["text"].get<std::string>() +
                    fmt::format("  config: put \"{}\" into members of [volume.{}] in {} before the next start\n", disk_name, name,
                                config_.file);
  co_return reply;
}

Task<Result<json>> Host::volume_command(const std::string& verb, const json& args) {
  if (verb == "list") {
    json list = json::array();
    for (auto& v : graph_->opened())
      list.push_back({{"name", v->name()}, {"layer", std::string(v->layer())}, {"size", v->size()}});
    co_return list;
  }
  SPILLWAY_CO_TRY(std::string name, text_arg(args, "name"));
  if (!config_.has_volume(name))
    co_return fail(ErrorKind::kNotFound, fmt::format("there is no volume or disk \"{}\"", name));
  SPILLWAY_CO_TRY(VolumePtr volume, co_await graph_->open(name));
  if (verb == "status") co_return array_json(array_status(*volume));
  if (verb == "advise") {
    auto a = advise_mkfs(*volume, "/dev/vda");
    co_return json{{"command", a.command}, {"reason", a.reason}, {"su", a.su}, {"sw", a.sw}, {"agsize", a.agsize}};
  }
  if (verb == "add" || verb == "replace" || verb == "grow") co_return co_await volume_join(verb, *volume, args);
  ArrayControl* array = array_control(*volume);
  if (array == nullptr)
    co_return fail(ErrorKind::kUnsupported, fmt::format("volume {}: a {} has no members to manage", name,
                                                        volume->layer()));
  Status done{};
  if (verb == "scrub") {
    const std::string mode = args.value("mode", "check");
    if (mode == "stop") done = co_await array->stop_scrub();
    else if (mode == "check") done = co_await array->start_scrub(ArrayControl::Scrub::kCheck);
    else if (mode == "repair") done = co_await array->start_scrub(ArrayControl::Scrub::kRepair);
    else co_return fail(ErrorKind::kInvalid, "mode: must be check, repair or stop");
  } else {
    SPILLWAY_CO_TRY(std::string member, text_arg(args, "member"));
    const bool dry_run = args.value("dry_run", false);
    if (verb == "fail") {
      done = array->may_fail(member);
      if (done && !dry_run) done = co_await array->fail_member(member);
    } else if (verb == "remove") {
      if (!dry_run) done = co_await array->remove_member(member);
    } else co_return fail(ErrorKind::kNotFound, fmt::format("there is no command \"volume {}\"", verb));
  }
  if (!done) co_return fail(done.error());
  co_return array_json(array_status(*volume));
}

Task<Result<json>> Host::command(const std::string& name, const json& args) {
  const auto space = name.find(' ');
  const std::string noun = name.substr(0, space);
  const std::string verb = space == std::string::npos ? "" : name.substr(space + 1);
  if (name == "status") co_return status();
  if (name == "metrics") co_return json(prometheus_text(status()));
  if (noun == "shrinker") co_return shrinker_command(verb, args);
  if (name == "export list") co_return exports_json();
  if (name == "export spread") {
    if (!args.contains("reactors")) co_return fail(ErrorKind::kInvalid, "argument \"reactors\" is missing");
    SPILLWAY_CO_TRY(const uint64_t n, size_arg(args["reactors"], "reactors"));
    if (n == 0 || n > reactors_->size())
      co_return fail(ErrorKind::kInvalid, fmt::format("reactors: 1 to {}", reactors_->size()));
    std::vector<std::string> names;  // exports may end meanwhile
    for (auto& [export_name, e] : exports_) names.push_back(export_name);
    for (auto& export_name : names)
      if (auto it = exports_.find(export_name); it != exports_.end())
        SPILLWAY_CO_CHECK(co_await it->second->spread(static_cast<uint32_t>(n)));
    co_return exports_json();
  }
  if (name == "group list") co_return groups_json();
  if (name == "group set") co_return group_set(args);
  if (name == "config dump") co_return json(config_.dump());
  if (name == "iostat") {
    // interval_ms: the difference of two samples that far apart; without it, everything since the start.
    std::vector<QosSample> before;
    if (args.contains("interval_ms")) {
      SPILLWAY_CO_TRY(const uint64_t ms, size_arg(args["interval_ms"], "interval_ms"));
      before = iostat_sample(*graph_);
      co_await Reactor::current().sleep_for(std::min<uint64_t>(ms, 3'600'000) * 1'000'000);
    }
    const auto now = iostat_sample(*graph_);
    if (before.empty())  // since the start: nothing had been counted then
      for (auto& disk : now) {
        QosSample start;
        start.disk = disk.disk;
        start.at_ns = started_ns_;
        before.push_back(std::move(start));
      }
    co_return iostat_json(now, before, *qos_->snapshot(), args.value("latency", false));
  }
  if (noun == "volume") {
    auto result = co_await volume_command(verb, args);
    co_return result;
  }
  if (name == "cache set") {
    if (!args.contains("size")) co_return fail(ErrorKind::kInvalid, "argument \"size\" is missing");
    SPILLWAY_CO_TRY(uint64_t bytes, size_arg(args["size"], "size"));
    if (bytes < 1 * kMiB) co_return fail(ErrorKind::kInvalid, "size: must be at least 1M");
    cache_->set_capacity(bytes);
    co_return status()["cache"];
  }
  if (name == "reclaim") {
    uint64_t bytes = UINT64_MAX;
    if (args.contains("bytes")) {
      SPILLWAY_CO_TRY(bytes, size_arg(args["bytes"], "bytes"));
    }
    reclaim::ReclaimRequest request;
    request.reason = reclaim::Reason::kManual;
    request.target_bytes = bytes;
    const auto r = co_await blocking_->run([this, request] { return registry_->reclaim(request); });
    co_return json{{"status", std::string(reclaim::to_string(r.status))}, {"freed_bytes", r.freed_bytes},
                   {"text", reclaim::to_text(r)}};
  }
  if (name == "reclaim trace") co_return json(registry_->trace_text());
  if (name == "reclaim text") co_return json(registry_->to_text());
  co_return fail(ErrorKind::kNotFound, fmt::format("there is no command \"{}\"", name));
}

}  // namespace spillway
