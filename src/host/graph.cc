#include "src/host/graph.h"

#include <algorithm>
#include <filesystem>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/base/unix_socket.h"
#include "src/image/qcow2.h"
#include "src/volume/assemble.h"
#include "src/volume/file/file.h"
#include "src/volume/memory/memory.h"
#include "src/volume/sim/sim.h"
#include "src/volume/slice/slice.h"

namespace spillway {

namespace {

// The field of a volume's section that an assembly error is about.
std::string_view field_of(const VolumeConfig& v, const std::string& message) {
  if (v.layer == "slice") return message.find("length") != std::string::npos ? "length" : "offset";
  for (std::string_view key : {"chunk", "layout", "consistency", "metadata", "force"})
    if (message.find(key) != std::string::npos && v.where.key_lines.contains(key)) return key;
  return "members";
}

Error at(const Where& where, std::string_view key, const Error& e) {
  return where.error(key, e.message(), e.kind());
}

Result<VolumePtr> open_leaf(const DiskConfig& d, const GraphOptions& options) {
  switch (d.kind) {
    case DiskKind::kFile: {
      FileOptions f;
      f.path = d.path;
      f.read_only = d.read_only || options.read_only;
      f.direct = d.direct;
      f.lock = options.lock;
      f.lock_wait_ms = options.lock_wait_ms;
      f.block_size = d.where.key_lines.contains("block_size") ? d.block_size : 0;
      return open_file(d.name, std::move(f));
    }
    case DiskKind::kMemory: return make_memory(d.name, d.size, d.block_size);
    case DiskKind::kSim: {
      SimOptions s;
      s.size = d.size;
      s.block_size = d.block_size;
      s.model = d.model;
      s.delay_ms = static_cast<double>(d.delay_us) / 1000;
      s.seed = d.seed;
      s.read_only = d.read_only;
      for (auto& text : d.faults) {
        SPILLWAY_TRY(SimFault fault, parse_sim_fault(text));
        s.faults.push_back(fault);
      }
      return make_sim(d.name, std::move(s));
    }
  }
  return fail(ErrorKind::kUnsupported, "disk kind");
}

}  // namespace

Task<Result<VolumePtr>> Graph::open_disk(const DiskConfig& d) {
  auto leaf = open_leaf(d, options_);
  if (!leaf) {
    const std::string_view key = d.kind == DiskKind::kFile ? "path" : d.faults.empty() ? "size" : "faults";
    co_return fail(at(d.where, key, leaf.error()));
  }
  opened_.push_back(*leaf);
  if (!options_.wrap_disk || !d.scheduler) co_return *leaf;
  auto wrapped = options_.wrap_disk(*leaf, d);
  if (!wrapped) co_return fail(at(d.where, "", wrapped.error()));
  opened_.push_back(*wrapped);
  co_return *wrapped;
}

Task<Result<VolumePtr>> Graph::open_layer(const VolumeConfig& v) {
  LayerSpec spec;
  spec.name = v.name;
  spec.layer = v.layer;
  for (auto& m : v.members) {
    spec.member_names.push_back(m);
    if (m == "missing") {
      spec.members.push_back(nullptr);
      continue;
    }
    auto member = co_await open(m);
    if (!member) {
      // A redundant layer starts without a member that cannot be opened; the others need all of theirs.
      const bool redundant = v.layer == "mirror" || v.layer == "raid5" || v.layer == "md";
      if (!redundant || !config_.disks.contains(m)) co_return member;
      log(LogLevel::kWarn, "host", "volume {}: {}: starts without it", v.name, member.error().message());
      spec.members.push_back(nullptr);
      continue;
    }
    spec.members.push_back(*member);
  }
  for (auto& m : v.spares) {
    SPILLWAY_CO_TRY(VolumePtr spare, co_await open(m));
    spec.spares.push_back(std::move(spare));
  }
  const bool chunk_given = v.where.key_lines.contains("chunk");
  spec.chunk = chunk_given ? v.chunk : 0;
  spec.raid5_layout = v.layout;
  spec.consistency = v.consistency;
  spec.metadata = v.metadata;
  spec.offset = v.offset;
  spec.length = v.length;
  spec.read_only = v.read_only || options_.read_only;
  spec.force = v.force;
  spec.create_if_blank = options_.create_if_blank;
  spec.background = options_.background;
  auto volume = co_await assemble(std::move(spec));
  if (!volume) {
    const std::string message = volume.error().message();
    co_return fail(at(v.where, field_of(v, message), volume.error()));
  }
  co_return *volume;
}

Task<Result<VolumePtr>> Graph::open(std::string name) {
  if (auto it = plain_.find(name); it != plain_.end()) co_return it->second;
  Result<VolumePtr> opened = fail(ErrorKind::kNotFound, fmt::format("there is no volume or disk \"{}\"", name));
  if (auto d = config_.disks.find(name); d != config_.disks.end()) {
    opened = co_await open_disk(d->second);
  } else if (auto v = config_.volumes.find(name); v != config_.volumes.end()) {
    if (v->second.layer == "qcow2") opened = co_await open_image(v->second, nullptr, "");
    else opened = co_await open_layer(v->second);
    if (opened) opened_.push_back(*opened);
  }
  if (opened) plain_.emplace(name, *opened);
  co_return opened;
}

Task<Result<VolumePtr>> Graph::open_cached(std::string name, CacheMode mode, std::string tenant) {
  auto v = config_.volumes.find(name);
  const bool image = v != config_.volumes.end() && v->second.layer == "qcow2";
  const bool slice = v != config_.volumes.end() && v->second.layer == "slice";
  // Tenants share data nodes; an image object (its mapping cache) is one tenant's own (P3).
  Key key{name, std::string(to_string(mode)), image ? tenant : ""};
  if (auto it = cached_.find(key); it != cached_.end()) co_return it->second;
  Result<VolumePtr> opened = VolumePtr{};
  if (image) {
    opened = co_await open_image(v->second, &mode, tenant);
    if (opened) opened_.push_back(*opened);
  } else if (slice) {
    auto below = co_await open_cached(v->second.members[0], mode, tenant);
    if (!below) co_return below;
    opened = make_slice(name, *below, v->second.offset, v->second.length);
    if (!opened) {
      const std::string message = opened.error().message();
      co_return fail(at(v->second.where, field_of(v->second, message), opened.error()));
    }
  } else {
    opened = co_await open(name);
    if (opened && options_.wrap_node) opened = options_.wrap_node(*opened, mode, name);
  }
  if (opened) cached_.emplace(key, *opened);
  co_return opened;
}

std::string Graph::path_of(const std::string& name) const {
  auto d = config_.disks.find(name);
  return d != config_.disks.end() && d->second.kind == DiskKind::kFile ? d->second.path : std::string();
}

Task<Result<VolumePtr>> Graph::open_image(const VolumeConfig& v, const CacheMode* mode, std::string tenant) {
  const std::string member = v.members[0];
  Result<VolumePtr> file = VolumePtr{};
  if (mode != nullptr) file = co_await open_cached(member, *mode, tenant);
  else file = co_await open(member);
  if (!file) co_return file;
  Qcow2Options q;
  q.read_only = v.read_only || options_.read_only || (*file)->geometry().read_only;
  q.registry = options_.registry;
  const std::string path = path_of(member);
  if (!v.backing.empty()) {
    Result<VolumePtr> backing = VolumePtr{};
    if (mode != nullptr) backing = co_await open_cached(v.backing, *mode, tenant);
    else backing = co_await open(v.backing);
    if (!backing) co_return backing;
    q.backing = *backing;
  }
  if (!v.data_file.empty()) {
    Result<VolumePtr> data = VolumePtr{};
    if (mode != nullptr) data = co_await open_cached(v.data_file, *mode, tenant);
    else data = co_await open(v.data_file);
    if (!data) co_return data;
    q.data_file = *data;
  }
  q.snapshot = v.snapshot;
  std::vector<std::string> folders;
  if (!v.image_folder.empty()) folders.push_back(v.image_folder);
  else if (!path.empty()) folders.push_back(std::filesystem::path(path).parent_path().string());
  // An image on a layer has no folder of its own: names in it lead nowhere unless image_folder says so.
  const std::string from = !path.empty() ? path : v.image_folder.empty() ? "" : v.image_folder + "/" + v.name;
  if (!from.empty()) q.resolver = resolver(from, mode, tenant, folders, {from});
  Fd log;
  if (!q.read_only && v.snapshot.empty() && options_.image_log) {
    // By the file, not the name: a log must never be replayed into another image.
    auto kept = options_.image_log(path.empty() ? "volume/" + v.name : path);
    if (!kept) co_return fail(at(v.where, "members", kept.error()));
    log = std::move(*kept);
    q.log_fd = log.get();
  }
  auto image = co_await open_qcow2(v.name, *file, std::move(q));
  if (!image) {
    const std::string message = image.error().message();
    const bool reference = message.find("backing") != std::string::npos && !v.backing.empty();
    const bool snapshot = !v.snapshot.empty() && message.find("snapshot") != std::string::npos;
    co_return fail(at(v.where, reference ? "backing" : snapshot ? "snapshot" : "members", image.error()));
  }
  co_return *image;
}

ImageResolver Graph::resolver(std::string image_path, const CacheMode* mode, std::string tenant,
                              std::vector<std::string> folders, std::vector<std::string> chain) {
  std::optional<CacheMode> kept;
  if (mode != nullptr) kept = *mode;
  struct Resolve {
    Graph* graph;
    std::string image_path;
    std::optional<CacheMode> mode;
    std::string tenant;
    std::vector<std::string> folders, chain;
    static Task<Result<VolumePtr>> run(Resolve r, ImageReference ref) {
      auto path = resolve_image_path(r.image_path, ref.name, r.folders);
      if (!path) co_return fail(path.error());
      Status chain_ok = check_chain(r.chain, *path);
      if (!chain_ok) co_return fail(chain_ok.error());
      // What is written is the config's choice, never the image's: it could name its neighbour, or a shared base.
      if (ref.writable)
        co_return fail(ErrorKind::kPermission,
                       fmt::format("{}: an image may not choose what is written; say data_file = \"DISK\"", *path));
      auto opened = co_await r.graph->open_image_file(*path, ref.format, r.mode ? &*r.mode : nullptr, r.tenant,
                                                      r.folders, r.chain);
      co_return opened;
    }
  };
  Resolve resolve{this, std::move(image_path), kept, std::move(tenant), std::move(folders), std::move(chain)};
  return [resolve](ImageReference ref) { return Resolve::run(resolve, std::move(ref)); };
}

// An image file that another image names: one volume for each file, whoever names it. A [disk] with that path serves,
// else a read-only disk is implied.
Task<Result<VolumePtr>> Graph::open_image_file(std::string path, std::string format, const CacheMode* mode,
                                               std::string tenant, std::vector<std::string> folders,
                                               std::vector<std::string> chain) {
  std::string name;
  for (auto& [disk_name, d] : config_.disks) {
    std::error_code ec;
    if (d.kind == DiskKind::kFile && std::filesystem::equivalent(d.path, path, ec)) name = disk_name;
  }
  if (const ExportConfig* w = name.empty() ? nullptr : config_.writer_of(name))
    co_return fail(ErrorKind::kBusy, fmt::format("{} is written by export \"{}\"", path, w->name));
  Result<VolumePtr> file = VolumePtr{};
  const std::string mode_word = mode != nullptr ? std::string(to_string(*mode)) : "";
  if (!name.empty()) {
    if (mode != nullptr) file = co_await open_cached(name, *mode, tenant);
    else file = co_await open(name);
  } else {
    const Key file_key{"file:" + path, mode_word, ""};
    if (auto it = cached_.find(file_key); it != cached_.end()) {
      file = it->second;
    } else {
      auto below = plain_.find("file:" + path);
      if (below == plain_.end()) {
        DiskConfig& d = implied_disks_[path];
        d.name = path;
        d.path = path;
        d.read_only = true;
        d.where = Where{config_.file, 0, "image " + path, {}};
        file = co_await open_disk(d);
        if (!file) co_return file;
        plain_.emplace("file:" + path, *file);
      } else {
        file = below->second;
      }
      if (mode != nullptr && options_.wrap_node) file = options_.wrap_node(*file, *mode, "file:" + path);
      if (file) cached_.emplace(file_key, *file);
    }
  }
  if (!file) co_return file;
  if (format == "raw") co_return file;
  if (format.empty()) {
    auto probed = co_await probe_format(*file);
    if (!probed) co_return fail(probed.error());
    if (*probed == ImageFormat::kRaw) co_return file;
  } else {
    auto known = parse_image_format(format);
    if (!known) co_return fail(known.error());
  }
  const Key key{"image:" + path, mode_word, tenant};
  if (auto it = cached_.find(key); it != cached_.end()) co_return it->second;
  Qcow2Options q;
  q.read_only = true;
  q.registry = options_.registry;
  chain.push_back(path);
  if (!format.empty()) q.resolver = resolver(path, mode, tenant, folders, chain);
  else q.resolver = refuse_names_in_guessed();
  auto image = co_await open_qcow2(path, *file, std::move(q));
  if (!image) co_return image;
  opened_.push_back(*image);
  cached_.emplace(key, *image);
  co_return *image;
}

Task<Status> Graph::close() {
  Status first{};
  for (auto it = opened_.rbegin(); it != opened_.rend(); ++it) {
    Status s = co_await (*it)->close();
    if (!s && first) first = std::move(s);
  }
  cached_.clear();
  plain_.clear();
  opened_.clear();
  co_return first;
}

Task<Status> check_config(const Config& config) {
  Status control = check_listen_unix(config.host.control);
  if (!control) co_return fail(at(config.host.where, "control", control.error()));
  for (auto& [name, e] : config.exports) {
    const std::pair<const char*, const std::string*> sockets[] = {{"socket", &e.socket},
                                                                  {"trim_socket", &e.trim_socket}};
    for (auto [key, path] : sockets) {
      if (path->empty()) continue;
      Status s = check_listen_unix(*path);
      if (!s) co_return fail(at(e.where, key, s.error()));
    }
  }
  GraphOptions options;
  options.read_only = true;
  options.lock = true;
  options.create_if_blank = false;
  options.background = false;
  Graph graph(config, std::move(options));
  Status first{};
  for (auto& [name, d] : config.disks) {
    auto disk = co_await graph.open(name);
    bool needed = true;  // a missing member of a redundant volume is a warning at the start, not an error
    for (auto& [vname, v] : config.volumes)
      if ((v.layer == "mirror" || v.layer == "raid5" || v.layer == "md") &&
          std::find(v.members.begin(), v.members.end(), name) != v.members.end())
        needed = false;
    if (!disk && needed && first) first = fail(disk.error());
  }
  auto order = config.build_order();
  if (first && order)
    for (auto& name : *order) {
      // Arrays with superblocks are assembled when they are started: on blank disks there is nothing to look at yet.
      bool redundant = false;
      for (std::vector<std::string> todo{name}; !todo.empty() && !redundant;) {
        const std::string at_name = todo.back();
        todo.pop_back();
        auto it = config.volumes.find(at_name);
        if (it == config.volumes.end()) continue;
        redundant = it->second.layer == "mirror" || it->second.layer == "raid5" || it->second.layer == "md";
        todo.insert(todo.end(), it->second.members.begin(), it->second.members.end());
      }
      if (redundant) continue;
      auto opened = co_await graph.open(name);
      if (!opened && first) first = fail(opened.error());
    }
  Status closed = co_await graph.close();
  if (first && !closed) first = std::move(closed);
  co_return first;
}

}  // namespace spillway
