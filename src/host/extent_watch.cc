#include "src/host/extent_watch.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <map>
#include <set>

#include <fmt/core.h>

#include "src/base/log.h"

namespace spillway {

std::vector<std::string> ExtentWatch::disks_below(const std::string& volume) const {
  std::set<std::string> found, seen;
  for (std::vector<std::string> todo{volume}; !todo.empty();) {
    const std::string name = todo.back();
    todo.pop_back();
    if (!seen.insert(name).second) continue;
    if (config_.disks.contains(name)) found.insert(name);
    auto v = config_.volumes.find(name);
    if (v == config_.volumes.end()) continue;
    todo.insert(todo.end(), v->second.members.begin(), v->second.members.end());
    todo.insert(todo.end(), v->second.spares.begin(), v->second.spares.end());
    if (!v->second.backing.empty()) todo.push_back(v->second.backing);
  }
  return {found.begin(), found.end()};
}

std::vector<std::string> ExtentWatch::writers_of(const std::string& disk) const {
  std::vector<std::string> exports;
  for (auto& [name, e] : config_.exports) {
    if (e.read_only) continue;
    const auto disks = disks_below(e.volume);
    if (std::find(disks.begin(), disks.end(), disk) != disks.end()) exports.push_back(name);
  }
  return exports;
}

Result<std::vector<ExtentWatch::Finding>> ExtentWatch::look_blocking() const {
  std::map<std::string, uint32_t> tenants;
  std::map<std::string, LeafUse> uses;
  std::map<std::string, std::string> disk_of_path;
  std::vector<Fd> open_files;
  for (auto& [name, e] : config_.exports) {
    const std::string tenant_name = e.group.substr(0, e.group.find('/'));
    const uint32_t tenant = tenants.emplace(tenant_name, static_cast<uint32_t>(tenants.size())).first->second;
    for (auto& disk : disks_below(e.volume)) {
      const DiskConfig& d = config_.disks.at(disk);
      if (d.kind != DiskKind::kFile) continue;
      auto [it, fresh] = uses.try_emplace(disk);
      LeafUse& use = it->second;
      if (fresh) {
        // Unsharing writes; looking does not.
        Fd fd(::open(d.path.c_str(), (config_.host.unshare && !d.read_only ? O_RDWR : O_RDONLY) | O_CLOEXEC));
        struct stat st {};
        if (!fd || ::fstat(fd.get(), &st) != 0) return fail_errno(errno, fmt::format("disk {}: {}", disk, d.path));
        use.path = d.path;
        use.fd = fd.get();
        use.device = st.st_dev;
        disk_of_path[d.path] = disk;
        open_files.push_back(std::move(fd));
      }
      auto add = [tenant](std::vector<uint32_t>& list) {
        if (std::find(list.begin(), list.end(), tenant) == list.end()) list.push_back(tenant);
      };
      add(use.readers);
      if (!e.read_only) add(use.writers);
    }
  }
  std::vector<LeafUse> files;
  for (auto& [disk, use] : uses) files.push_back(use);
  SPILLWAY_TRY(ExtentReport report, find_shared_extents(files, false));
  if (!report.shared.empty() && config_.host.unshare) {
    std::set<std::string> done;
    for (auto& s : report.shared) {
      if (!done.insert(s.path).second) continue;
      SPILLWAY_CHECK(unshare_extents(uses.at(disk_of_path.at(s.path)).fd, s.path));
      log(LogLevel::kInfo, "extents", "{}; unshared", to_text(s));
    }
    SPILLWAY_TRY(report, find_shared_extents(files, false));
  }
  std::vector<Finding> findings;
  for (auto& s : report.shared) findings.push_back({disk_of_path.at(s.path), to_text(s)});
  return findings;
}

Task<Result<std::vector<ExtentWatch::Finding>>> ExtentWatch::look() {
  auto result = co_await pool_.run([this] { return look_blocking(); });
  co_return result;
}

}  // namespace spillway
