#include "src/control/config.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>

#include <fmt/core.h>
#include <toml++/toml.h>

namespace spillway {

Error Where::error(std::string_view key, std::string_view text, ErrorKind kind) const {
  int at = line;
  if (auto it = key_lines.find(key); it != key_lines.end()) at = it->second;
  std::string message = fmt::format("{}:{}: ", file, at);
  if (!section.empty()) message += fmt::format("[{}] ", section);
  if (!key.empty()) message += fmt::format("{}: ", key);
  message += text;
  return Error(kind, std::move(message));
}

namespace {

int line_of(const toml::node& node) { return static_cast<int>(node.source().begin.line); }

// Reads one table: every key must be asked for exactly once, what is left over is an unknown key.
class Section {
 public:
  Section(const toml::table& table, Where where, std::string folder)
      : table_(table), where_(std::move(where)), folder_(std::move(folder)) {
    for (auto&& [key, node] : table_) where_.key_lines[std::string(key.str())] = line_of(node);
  }
  const Where& where() const { return where_; }
  bool has(std::string_view key) const { return table_.contains(key); }

  Status text(std::string_view key, std::string& out) {
    const toml::node* n = take(key);
    if (n == nullptr) return {};
    auto v = n->value_exact<std::string>();
    if (!v) return wrong(key, "must be a text in quotes");
    out = *v;
    return {};
  }
  Status path(std::string_view key, std::string& out) {
    SPILLWAY_CHECK(text(key, out));
    if (!out.empty() && out[0] != '/')
      out = (std::filesystem::path(folder_) / out).lexically_normal().string();
    return {};
  }
  Status one_of(std::string_view key, std::string& out, std::initializer_list<std::string_view> words) {
    SPILLWAY_CHECK(text(key, out));
    if (!has(key)) return {};
    for (auto w : words)
      if (out == w) return {};
    std::string all;
    for (auto w : words) all += fmt::format("{}\"{}\"", all.empty() ? "" : ", ", w);
    return wrong(key, fmt::format("\"{}\" is not one of {}", out, all));
  }
  Status boolean(std::string_view key, bool& out) {
    const toml::node* n = take(key);
    if (n == nullptr) return {};
    auto v = n->value_exact<bool>();
    if (!v) return wrong(key, "must be true or false");
    out = *v;
    return {};
  }
  Status size(std::string_view key, uint64_t& out) {
    const toml::node* n = take(key);
    if (n == nullptr) return {};
    if (auto v = n->value_exact<int64_t>(); v && *v >= 0) {
      out = static_cast<uint64_t>(*v);
      return {};
    }
    auto v = n->value_exact<std::string>();
    if (!v) return wrong(key, "must be a size such as \"64K\" or a number of bytes");
    if (*v == "max") {
      out = UINT64_MAX;
      return {};
    }
    auto parsed = parse_size(*v);
    if (!parsed) return wrong(key, parsed.error().message());
    out = *parsed;
    return {};
  }
  template <class T>
  Status number(std::string_view key, T& out, uint64_t low, uint64_t high) {
    const toml::node* n = take(key);
    if (n == nullptr) return {};
    auto v = n->value_exact<int64_t>();
    if (!v || *v < 0 || static_cast<uint64_t>(*v) < low || static_cast<uint64_t>(*v) > high)
      return wrong(key, fmt::format("must be a number from {} to {}", low, high));
    out = static_cast<T>(*v);
    return {};
  }
  Status texts(std::string_view key, std::vector<std::string>& out) {
    const toml::node* n = take(key);
    if (n == nullptr) return {};
    const toml::array* a = n->as_array();
    if (a == nullptr) return wrong(key, "must be a list of names");
    for (auto&& e : *a) {
      auto v = e.value_exact<std::string>();
      if (!v) return wrong(key, "must be a list of names in quotes");
      out.push_back(*v);
    }
    return {};
  }
  Status integers(std::string_view key, std::vector<int>& out, int low, int high) {
    const toml::node* n = take(key);
    if (n == nullptr) return {};
    const toml::array* a = n->as_array();
    if (a == nullptr) return wrong(key, "must be a list of numbers");
    for (auto&& e : *a) {
      auto v = e.value_exact<int64_t>();
      if (!v || *v < low || *v > high)
        return wrong(key, fmt::format("must be a list of numbers from {} to {}", low, high));
      out.push_back(static_cast<int>(*v));
    }
    return {};
  }
  // "memory.low" may be written as a dotted key (a sub-table in TOML).
  const toml::table* sub(std::string_view key) {
    const toml::node* n = table_.get(key);
    if (n == nullptr || n->as_table() == nullptr) return nullptr;
    seen_.insert(std::string(key));
    return n->as_table();
  }
  Status finish() const {
    for (auto&& [key, node] : table_)
      if (!seen_.contains(std::string(key.str()))) return fail(where_.error(key.str(), "unknown key"));
    return {};
  }
  std::unexpected<Error> wrong(std::string_view key, std::string_view text) const {
    return fail(where_.error(key, text));
  }
  std::unexpected<Error> missing(std::string_view key) const {
    return fail(where_.error(key, "is missing"));
  }

 private:
  const toml::node* take(std::string_view key) {
    seen_.insert(std::string(key));
    return table_.get(key);
  }
  const toml::table& table_;
  Where where_;
  std::string folder_;
  std::set<std::string, std::less<>> seen_;
};

Status read_disk(Section& s, DiskConfig& d) {
  std::string kind = "file";
  SPILLWAY_CHECK(s.one_of("kind", kind, {"file", "memory", "sim"}));
  d.kind = kind == "memory" ? DiskKind::kMemory : kind == "sim" ? DiskKind::kSim : DiskKind::kFile;
  SPILLWAY_CHECK(s.size("size", d.size));
  SPILLWAY_CHECK(s.boolean("readonly", d.read_only));
  SPILLWAY_CHECK(s.boolean("scheduler", d.scheduler));
  uint64_t block = d.block_size;
  SPILLWAY_CHECK(s.size("block_size", block));
  if (block != 512 && block != 4096) return s.wrong("block_size", "must be 512 or 4096");
  d.block_size = static_cast<uint32_t>(block);
  if (d.kind == DiskKind::kFile) {
    SPILLWAY_CHECK(s.path("path", d.path));
    SPILLWAY_CHECK(s.boolean("direct", d.direct));
    if (d.path.empty()) return s.missing("path");
    if (s.has("size")) return s.wrong("size", "a file has the size it has");
    return {};
  }
  if (d.size == 0) return s.missing("size");
  if (!is_aligned(d.size, d.block_size))
    return s.wrong("size", fmt::format("must be a multiple of the block size {}", d.block_size));
  if (d.kind == DiskKind::kSim) {
    SPILLWAY_CHECK(s.one_of("model", d.model, {"hdd", "ssd", "null"}));
    SPILLWAY_CHECK(s.number("seed", d.seed, 0, INT64_MAX));
    SPILLWAY_CHECK(s.number("delay_us", d.delay_us, 0, 60'000'000));
    SPILLWAY_CHECK(s.texts("faults", d.faults));
  }
  return {};
}

Status read_volume(Section& s, VolumeConfig& v) {
  if (!s.has("layer")) return s.missing("layer");
  SPILLWAY_CHECK(
      s.one_of("layer", v.layer, {"linear", "stripe", "mirror", "raid5", "slice", "md", "qcow2"}));
  SPILLWAY_CHECK(s.texts("members", v.members));
  if (!s.has("members")) return s.missing("members");
  if (v.members.empty()) return s.wrong("members", "is empty");
  SPILLWAY_CHECK(s.boolean("readonly", v.read_only));
  const bool one = v.layer == "slice" || v.layer == "qcow2";
  if (one && v.members.size() != 1)
    return s.wrong("members", fmt::format("a {} has one member, not {}", v.layer, v.members.size()));
  if (v.layer == "stripe" && v.members.size() < 2) return s.wrong("members", "a stripe needs two or more");
  if (v.layer == "mirror" && v.members.size() < 2) return s.wrong("members", "a mirror needs two or more");
  if (v.layer == "raid5" && v.members.size() < 3) return s.wrong("members", "raid5 needs three or more");
  std::set<std::string> seen;
  for (auto& m : v.members)
    if (m != "missing" && !seen.insert(m).second)
      return s.wrong("members", fmt::format("\"{}\" is named twice", m));
  if (v.layer == "stripe" || v.layer == "raid5") {
    SPILLWAY_CHECK(s.size("chunk", v.chunk));
    if (v.chunk < kPageSize || v.chunk > 1 * kGiB || (v.chunk & (v.chunk - 1)) != 0)
      return s.wrong("chunk", "must be a power of two from 4K to 1G");
  }
  if (v.layer == "raid5")
    SPILLWAY_CHECK(s.one_of("layout", v.layout,
                            {"left-symmetric", "left-asymmetric", "right-symmetric", "right-asymmetric"}));
  if (v.layer == "mirror" || v.layer == "raid5") {
    SPILLWAY_CHECK(s.one_of("consistency", v.consistency, {"bitmap", "ppl", "resync"}));
    if (v.layer == "mirror" && v.consistency == "ppl")
      return s.wrong("consistency", "a mirror has no parity to log");
    SPILLWAY_CHECK(s.texts("spares", v.spares));
  }
  if (v.layer == "mirror" || v.layer == "raid5" || v.layer == "md") SPILLWAY_CHECK(s.boolean("force", v.force));
  if (v.layer == "linear" || v.layer == "stripe")
    SPILLWAY_CHECK(s.one_of("metadata", v.metadata, {"none", "md"}));
  if (v.layer == "slice") {
    SPILLWAY_CHECK(s.size("offset", v.offset));
    SPILLWAY_CHECK(s.size("length", v.length));
    if (s.has("length") && v.length == 0) return s.wrong("length", "must not be 0");
    if (!is_aligned(v.offset, kPageSize)) return s.wrong("offset", "must be a multiple of 4096");
    if (!is_aligned(v.length, kPageSize)) return s.wrong("length", "must be a multiple of 4096");
    if (v.length > UINT64_MAX - v.offset) return s.wrong("length", "offset + length is too large");
  }
  if (v.layer == "qcow2") {
    SPILLWAY_CHECK(s.text("backing", v.backing));
    SPILLWAY_CHECK(s.path("image_folder", v.image_folder));
    SPILLWAY_CHECK(s.text("data_file", v.data_file));
    SPILLWAY_CHECK(s.text("snapshot", v.snapshot));
    if (!v.snapshot.empty()) v.read_only = true;
  }
  return {};
}

Status read_group(Section& s, GroupConfig& g) {
  SPILLWAY_CHECK(s.number("weight", g.weight, 1, 10000));
  if (const toml::table* memory = s.sub("memory")) {
    Where w = s.where();
    w.section += ".memory";
    Section m(*memory, w, "");
    SPILLWAY_CHECK(m.size("min", g.memory_min));
    SPILLWAY_CHECK(m.size("low", g.memory_low));
    SPILLWAY_CHECK(m.size("high", g.memory_high));
    SPILLWAY_CHECK(m.size("max", g.memory_max));
    SPILLWAY_CHECK(m.finish());
  } else if (s.has("memory")) {
    return s.wrong("memory", "write memory.min, memory.low, memory.high, memory.max");
  }
  if (g.memory_min > g.memory_max) return s.wrong("memory", "min is above max");
  if (const toml::table* io = s.sub("io")) {
    Where w = s.where();
    w.section += ".io";
    Section m(*io, w, "");
    SPILLWAY_CHECK(m.size("rbps", g.rbps));
    SPILLWAY_CHECK(m.size("wbps", g.wbps));
    SPILLWAY_CHECK(m.size("riops", g.riops));
    SPILLWAY_CHECK(m.size("wiops", g.wiops));
    SPILLWAY_CHECK(m.finish());
  }
  return {};
}

Status read_export(Section& s, ExportConfig& e) {
  SPILLWAY_CHECK(s.one_of("device", e.device, {"virtio-blk", "virtio-pmem"}));
  if (e.device.empty()) return s.missing("device");
  SPILLWAY_CHECK(s.text("volume", e.volume));
  if (e.volume.empty()) return s.missing("volume");
  SPILLWAY_CHECK(s.text("group", e.group));
  SPILLWAY_CHECK(s.boolean("readonly", e.read_only));
  // A pmem file's page cache is its cache: frames as well only where somebody asks for them.
  std::string mode = e.device == "virtio-pmem" ? "none" : "isolated";
  SPILLWAY_CHECK(s.one_of("cache", mode, {"isolated", "trusted", "none"}));
  e.cache = mode == "none" ? CacheMode::kNone : mode == "trusted" ? CacheMode::kTrusted : CacheMode::kIsolated;
  SPILLWAY_CHECK(s.path("socket", e.socket));
  if (e.socket.size() >= 108) return s.wrong("socket", "a socket's path has at most 107 bytes");
  if (e.device == "virtio-blk") {
    SPILLWAY_CHECK(s.number("queues", e.queues, 1, 16));
    SPILLWAY_CHECK(s.boolean("writethrough", e.write_through));
    if (e.socket.empty()) return s.missing("socket");
  } else {
    SPILLWAY_CHECK(s.path("file", e.file));
    SPILLWAY_CHECK(s.path("trim_socket", e.trim_socket));
    if (e.socket.empty() && e.file.empty()) return s.missing("socket");
  }
  return {};
}

Status read_host(Section& s, HostConfig& h) {
  SPILLWAY_CHECK(s.path("control", h.control));
  SPILLWAY_CHECK(s.path("pmem_folder", h.pmem_folder));
  SPILLWAY_CHECK(s.integers("cpus", h.cpus, -1, 4095));
  uint32_t reactors = 0;
  SPILLWAY_CHECK(s.number("reactors", reactors, 1, 256));
  if (reactors != 0 && !h.cpus.empty()) return s.wrong("reactors", "give cpus or reactors, not both");
  if (h.cpus.empty()) h.cpus.assign(reactors != 0 ? reactors : 0, -1);
  SPILLWAY_CHECK(s.boolean("psi", h.psi));
  SPILLWAY_CHECK(s.boolean("unshare", h.unshare));
  SPILLWAY_CHECK(s.number("extent_check_s", h.extent_check_s, 0, 86400));
  return {};
}

Status read_cache(Section& s, HostConfig& h) {
  SPILLWAY_CHECK(s.size("size", h.cache_size));
  if (h.cache_size < 1 * kMiB || h.cache_size > 16 * kTiB)
    return s.wrong("size", "must be from 1M to 16T");
  SPILLWAY_CHECK(s.size("dirty", h.cache_dirty));
  if (h.cache_dirty > h.cache_size) return s.wrong("dirty", "is above size");
  SPILLWAY_CHECK(s.number("nodes", h.nodes, 1, 64));
  return {};
}

bool good_name(std::string_view name, bool path) {
  if (name.empty() || name.size() > 64 || name == "missing") return false;
  for (char c : name)
    if (!(isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.' || (path && c == '/')))
      return false;
  return name.front() != '/' && name.back() != '/' && name.find("//") == std::string_view::npos;
}

template <class T>
Status read_all(const toml::table& root, std::string_view kind, const std::string& file,
                const std::string& folder, std::map<std::string, T>& out, Status (*read)(Section&, T&)) {
  const toml::node* node = root.get(kind);
  if (node == nullptr) return {};
  Where top{file, line_of(*node), std::string(kind), {}};
  const toml::table* table = node->as_table();
  if (table == nullptr) return fail(top.error("", fmt::format("must be written as [{}.NAME]", kind)));
  for (auto&& [key, entry] : *table) {
    std::string name(key.str());
    Where where{file, line_of(entry), fmt::format("{}.{}", kind, name), {}};
    if (entry.as_table() == nullptr)
      return fail(top.error(name, fmt::format("must be written as [{}.NAME]", kind)));
    if (!good_name(name, kind == "group"))
      return fail(where.error("", "a name has letters, digits, '-', '_', '.', at most 64"));
    Section section(*entry.as_table(), where, folder);
    T item;
    item.name = name;
    item.where = section.where();
    SPILLWAY_CHECK(read(section, item));
    SPILLWAY_CHECK(section.finish());
    out.emplace(name, std::move(item));
  }
  return {};
}

Status read_table(const toml::table& root, std::string_view kind, const std::string& file,
                  const std::string& folder, HostConfig& out, Status (*read)(Section&, HostConfig&)) {
  const toml::node* node = root.get(kind);
  if (node == nullptr) return {};
  Where where{file, line_of(*node), std::string(kind), {}};
  if (node->as_table() == nullptr) return fail(where.error("", fmt::format("must be written as [{}]", kind)));
  Section section(*node->as_table(), where, folder);
  SPILLWAY_CHECK(read(section, out));
  SPILLWAY_CHECK(section.finish());
  if (out.where.line == 0) out.where = section.where();
  return {};
}

}  // namespace

Result<Config> Config::load(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  if (!in) return fail_errno(errno, fmt::format("config {}", file));
  std::stringstream text;
  text << in.rdbuf();
  if (in.bad()) return fail(ErrorKind::kIo, fmt::format("config {}: cannot be read", file));
  return parse(text.str(), file);
}

Result<Config> Config::parse(std::string_view text, const std::string& file) {
  toml::table root;
  try {
    root = toml::parse(text, file);
  } catch (const toml::parse_error& e) {
    return fail(ErrorKind::kInvalid, fmt::format("{}:{}: {}", file, e.source().begin.line, e.description()));
  }
  Config c;
  c.file = file;
  const std::string folder =
      std::filesystem::absolute(file).parent_path().lexically_normal().string();
  c.host.where.file = file;
  for (auto&& [key, node] : root) {
    static const std::set<std::string_view> kKnown{"host", "cache", "disk", "volume", "group", "export"};
    if (!kKnown.contains(key.str()))
      return fail(Where{file, line_of(node), std::string(key.str()), {}}.error("", "unknown section"));
  }
  SPILLWAY_CHECK(read_table(root, "host", file, folder, c.host, read_host));
  SPILLWAY_CHECK(read_table(root, "cache", file, folder, c.host, read_cache));
  if (c.host.control.empty()) c.host.control = folder + "/spillwayd.sock";
  if (c.host.pmem_folder.empty()) c.host.pmem_folder = folder + "/pmem";
  SPILLWAY_CHECK(read_all(root, "disk", file, folder, c.disks, read_disk));
  SPILLWAY_CHECK(read_all(root, "volume", file, folder, c.volumes, read_volume));
  SPILLWAY_CHECK(read_all(root, "group", file, folder, c.groups, read_group));
  SPILLWAY_CHECK(read_all(root, "export", file, folder, c.exports, read_export));
  SPILLWAY_CHECK(c.check_references());
  SPILLWAY_TRY([[maybe_unused]] auto order, c.build_order());
  SPILLWAY_CHECK(c.check_overlaps());
  return c;
}

Status Config::check_references() const {
  for (auto& [name, v] : volumes) {
    if (disks.contains(name))
      return fail(v.where.error("", fmt::format("\"{}\" is already the name of a disk", name)));
    auto all = v.members;
    all.insert(all.end(), v.spares.begin(), v.spares.end());
    for (auto& m : all) {
      const bool may_miss = v.layer == "mirror" || v.layer == "raid5" || v.layer == "md";
      if (m == "missing" && may_miss) continue;
      if (!has_volume(m))
        return fail(v.where.error("members", fmt::format("there is no volume or disk \"{}\"", m)));
    }
    if (!v.backing.empty() && !has_volume(v.backing))
      return fail(v.where.error("backing", fmt::format("there is no volume or disk \"{}\"", v.backing)));
    if (!v.data_file.empty() && !has_volume(v.data_file))
      return fail(v.where.error("data_file", fmt::format("there is no volume or disk \"{}\"", v.data_file)));
  }
  std::map<std::string, std::string> paths;
  for (auto& [name, d] : disks) {
    if (d.kind != DiskKind::kFile) continue;
    auto [it, fresh] = paths.emplace(d.path, name);
    if (!fresh) return fail(d.where.error("path", fmt::format("disk \"{}\" has the same path", it->second)));
  }
  std::map<std::string, std::string> sockets{{host.control, "the control socket"}};
  for (auto& [name, e] : exports) {
    if (!has_volume(e.volume))
      return fail(e.where.error("volume", fmt::format("there is no volume or disk \"{}\"", e.volume)));
    if (!e.group.empty() && !groups.contains(e.group))
      return fail(e.where.error("group", fmt::format("there is no group \"{}\"", e.group)));
    const std::pair<const char*, const std::string*> paths_of[] = {
        {"socket", &e.socket}, {"file", &e.file}, {"trim_socket", &e.trim_socket}};
    for (auto [key, path] : paths_of) {
      if (path->empty()) continue;
      auto [it, fresh] = sockets.emplace(*path, fmt::format("export \"{}\"", name));
      if (!fresh) return fail(e.where.error(key, fmt::format("{} has the same path", it->second)));
    }
  }
  for (auto& [name, g] : groups)
    if (auto slash = name.rfind('/'); slash != std::string::npos && !groups.contains(name.substr(0, slash)))
      return fail(g.where.error("", fmt::format("there is no group \"{}\"", name.substr(0, slash))));
  return {};
}

Result<std::vector<std::string>> Config::build_order() const {
  std::vector<std::string> order;
  std::map<std::string, int> state;  // 1 = being visited, 2 = done
  std::function<Status(const std::string&)> visit = [&](const std::string& name) -> Status {
    auto it = volumes.find(name);
    if (it == volumes.end()) return {};
    int& s = state[name];
    if (s == 2) return {};
    if (s == 1) return fail(it->second.where.error("members", "the volume contains itself"));
    s = 1;
    for (auto& m : it->second.members) SPILLWAY_CHECK(visit(m));
    for (auto& m : it->second.spares) SPILLWAY_CHECK(visit(m));
    if (!it->second.backing.empty()) SPILLWAY_CHECK(visit(it->second.backing));
    if (!it->second.data_file.empty()) SPILLWAY_CHECK(visit(it->second.data_file));
    state[name] = 2;
    order.push_back(name);
    return {};
  };
  for (auto& [name, v] : volumes) SPILLWAY_CHECK(visit(name));
  return order;
}

std::string Config::data_node(const std::string& name) const {
  std::string at = name;
  for (auto it = volumes.find(at); it != volumes.end() && it->second.layer == "slice"; it = volumes.find(at))
    at = it->second.members[0];
  return at;
}

// Two exports overlap when, at some volume, both use overlapping ranges. Below a volume that both reach through the
// same user the ranges are disjoint as far as they are above it, so only claims that come by different ways are
// compared. A layer other than a slice claims all of its members.
Status Config::check_overlaps() const {
  struct Claim {
    std::string node, via;
    uint64_t offset, end;
  };
  auto claims_of = [&](const ExportConfig& e) {
    std::vector<Claim> claims;
    std::function<void(const std::string&, const std::string&, uint64_t, uint64_t)> walk =
        [&](const std::string& node, const std::string& via, uint64_t offset, uint64_t end) {
          claims.push_back({node, via, offset, end});
          auto it = volumes.find(node);
          if (it == volumes.end()) return;
          const VolumeConfig& v = it->second;
          if (v.layer == "slice") {
            const uint64_t stop = v.length != 0 ? v.offset + v.length : UINT64_MAX;
            const uint64_t from = offset > UINT64_MAX - v.offset ? UINT64_MAX : v.offset + offset;
            const uint64_t to = end > stop - v.offset ? stop : v.offset + end;
            // A slice of a slice is the same way to the volume below both.
            walk(v.members[0], "", from, to);
            return;
          }
          for (auto& m : v.members)
            if (m != "missing") walk(m, node, 0, UINT64_MAX);
          for (auto& m : v.spares) walk(m, node, 0, UINT64_MAX);
          if (!v.data_file.empty()) walk(v.data_file, node, 0, UINT64_MAX);
        };
    walk(e.volume, "", 0, UINT64_MAX);
    return claims;
  };
  for (auto a = exports.begin(); a != exports.end(); ++a)
    for (auto b = std::next(a); b != exports.end(); ++b) {
      const ExportConfig &x = a->second, &y = b->second;
      if (x.read_only && y.read_only) continue;
      const bool both_write = !x.read_only && !y.read_only;
      for (auto& p : claims_of(x))
        for (auto& q : claims_of(y)) {
          if (p.node != q.node || (p.via == q.via && !p.via.empty())) continue;
          if (p.offset >= q.end || q.offset >= p.end) continue;
          const ExportConfig& later = x.where.line > y.where.line ? x : y;
          const ExportConfig& other = x.where.line > y.where.line ? y : x;
          if (both_write)
            return fail(later.where.error(
                "volume", fmt::format("\"{}\" overlaps the writable export \"{}\" at \"{}\"; make one readonly",
                                      later.volume, other.name, p.node)));
          // What a pmem guest stored, or what it has resident, nobody else's requests pass by.
          for (const ExportConfig* pmem : {&x, &y})
            if (pmem->device == "virtio-pmem")
              return fail(pmem->where.error(
                  "volume", fmt::format("\"{}\" overlaps export \"{}\" at \"{}\", and one of them writes: a virtio-pmem "
                                        "export can share only what nobody writes",
                                        pmem->volume, pmem == &x ? y.name : x.name, p.node)));
          // One writes, one reads: coherent only where both go through the same cached volume.
          const bool same_cache = data_node(x.volume) == data_node(y.volume) &&
                                  x.cache != CacheMode::kNone && y.cache != CacheMode::kNone;
          const bool no_cache = x.cache == CacheMode::kNone && y.cache == CacheMode::kNone;
          if (!same_cache && !no_cache)
            return fail(later.where.error(
                "volume", fmt::format("\"{}\" overlaps export \"{}\" at \"{}\" by another way: one would "
                                      "read what the other has not written back",
                                      later.volume, other.name, p.node)));
        }
    }
  // What lies under an overlay must not change: every block the overlay has not copied would change with it.
  for (auto& [name, v] : volumes) {
    if (v.backing.empty()) continue;
    if (const ExportConfig* w = writer_of(v.backing))
      return fail(v.where.error("backing", fmt::format("\"{}\" is written by export \"{}\"", v.backing, w->name)));
  }
  return {};
}

const ExportConfig* Config::writer_of(const std::string& name) const {
  using Reached = std::map<std::string, bool>;  // by name: true when only through slices
  std::function<void(const std::string&, bool, bool, Reached&)> walk = [&](const std::string& node, bool sliced,
                                                                           bool reading, Reached& all) {
    auto [seen, fresh] = all.emplace(node, sliced);
    if (!fresh && (seen->second == sliced || sliced)) return;
    seen->second = sliced;
    auto it = volumes.find(node);
    if (it == volumes.end()) return;
    const VolumeConfig& v = it->second;
    for (auto* list : {&v.members, &v.spares})
      for (auto& m : *list) walk(m, sliced || v.layer == "slice", reading, all);
    if (!v.data_file.empty()) walk(v.data_file, sliced, reading, all);
    if (reading && !v.backing.empty()) walk(v.backing, sliced, reading, all);
  };
  Reached read;
  walk(name, false, true, read);
  for (auto& [export_name, e] : exports) {
    if (e.read_only) continue;
    Reached written;
    walk(e.volume, false, false, written);
    for (auto& [node, sliced] : written)
      if (auto it = read.find(node); it != read.end() && node != "missing" && !(sliced && it->second)) return &e;
  }
  return nullptr;
}

std::string Config::dump() const {
  toml::table root;
  auto put_text = [](toml::table& t, const char* k, const std::string& v) {
    if (!v.empty()) t.insert_or_assign(k, v);
  };
  auto put_size = [](toml::table& t, const char* k, uint64_t v, uint64_t standard) {
    if (v == standard) return;
    if (v == UINT64_MAX) t.insert_or_assign(k, "max");
    else t.insert_or_assign(k, static_cast<int64_t>(v));
  };
  auto put_list = [](toml::table& t, const char* k, const std::vector<std::string>& v) {
    if (v.empty()) return;
    toml::array a;
    for (auto& e : v) a.push_back(e);
    t.insert_or_assign(k, std::move(a));
  };
  auto put_true = [](toml::table& t, const char* k, bool v) {
    if (v) t.insert_or_assign(k, true);
  };
  toml::table h, cache, ds, vs, gs, es;
  put_text(h, "control", host.control);
  put_text(h, "pmem_folder", host.pmem_folder);
  toml::array cpus;
  for (int c : host.cpus) cpus.push_back(c);
  if (!cpus.empty()) h.insert_or_assign("cpus", std::move(cpus));
  if (!host.psi) h.insert_or_assign("psi", false);
  put_true(h, "unshare", host.unshare);
  if (host.extent_check_s != 60) h.insert_or_assign("extent_check_s", static_cast<int64_t>(host.extent_check_s));
  cache.insert_or_assign("size", static_cast<int64_t>(host.cache_size));
  put_size(cache, "dirty", host.cache_dirty, 0);
  put_size(cache, "nodes", host.nodes, 1);
  for (auto& [name, d] : disks) {
    toml::table t;
    if (d.kind == DiskKind::kFile) {
      put_text(t, "path", d.path);
      if (!d.direct) t.insert_or_assign("direct", false);
    } else {
      t.insert_or_assign("kind", d.kind == DiskKind::kMemory ? "memory" : "sim");
      put_size(t, "size", d.size, 0);
    }
    if (d.kind == DiskKind::kSim) {
      put_text(t, "model", d.model);
      put_size(t, "seed", d.seed, 1);
      put_size(t, "delay_us", d.delay_us, 0);
      put_list(t, "faults", d.faults);
    }
    put_true(t, "readonly", d.read_only);
    if (!d.scheduler) t.insert_or_assign("scheduler", false);
    put_size(t, "block_size", d.block_size, 512);
    ds.insert_or_assign(name, std::move(t));
  }
  for (auto& [name, v] : volumes) {
    toml::table t;
    put_text(t, "layer", v.layer);
    put_list(t, "members", v.members);
    put_list(t, "spares", v.spares);
    if (v.layer == "stripe" || v.layer == "raid5") put_size(t, "chunk", v.chunk, 0);
    put_text(t, "layout", v.layout);
    put_text(t, "consistency", v.consistency);
    put_text(t, "metadata", v.metadata);
    put_size(t, "offset", v.offset, 0);
    put_size(t, "length", v.length, 0);
    put_text(t, "backing", v.backing);
    put_text(t, "image_folder", v.image_folder);
    put_text(t, "data_file", v.data_file);
    put_text(t, "snapshot", v.snapshot);
    put_true(t, "readonly", v.read_only);
    put_true(t, "force", v.force);
    vs.insert_or_assign(name, std::move(t));
  }
  for (auto& [name, g] : groups) {
    toml::table t, memory, io;
    put_size(t, "weight", g.weight, 100);
    put_size(memory, "min", g.memory_min, 0);
    put_size(memory, "low", g.memory_low, 0);
    put_size(memory, "high", g.memory_high, UINT64_MAX);
    put_size(memory, "max", g.memory_max, UINT64_MAX);
    put_size(io, "rbps", g.rbps, 0);
    put_size(io, "wbps", g.wbps, 0);
    put_size(io, "riops", g.riops, 0);
    put_size(io, "wiops", g.wiops, 0);
    if (!memory.empty()) t.insert_or_assign("memory", std::move(memory));
    if (!io.empty()) t.insert_or_assign("io", std::move(io));
    gs.insert_or_assign(name, std::move(t));
  }
  for (auto& [name, e] : exports) {
    toml::table t;
    put_text(t, "device", e.device);
    put_text(t, "volume", e.volume);
    put_text(t, "group", e.group);
    if (e.device == "virtio-blk") put_size(t, "queues", e.queues, 1);
    t.insert_or_assign("cache", std::string(to_string(e.cache)));
    put_true(t, "readonly", e.read_only);
    put_true(t, "writethrough", e.write_through);
    put_text(t, "socket", e.socket);
    put_text(t, "file", e.file);
    put_text(t, "trim_socket", e.trim_socket);
    es.insert_or_assign(name, std::move(t));
  }
  root.insert_or_assign("host", std::move(h));
  root.insert_or_assign("cache", std::move(cache));
  if (!ds.empty()) root.insert_or_assign("disk", std::move(ds));
  if (!vs.empty()) root.insert_or_assign("volume", std::move(vs));
  if (!gs.empty()) root.insert_or_assign("group", std::move(gs));
  if (!es.empty()) root.insert_or_assign("export", std::move(es));
  std::stringstream out;
  out << root << "\n";
  return out.str();
}

}  // namespace spillway
