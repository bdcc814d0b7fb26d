#include "src/host/pmem.h"

#include <fmt/core.h>

namespace spillway {

Result<std::shared_ptr<PmemMount>> PmemHost::mount_of(const std::string& tenant) {
  if (auto it = mounts_.find(tenant); it != mounts_.end()) return it->second;
  PmemMountOptions o;
  o.name = tenant.empty() ? "root" : tenant;
  o.directory = folder_ + "/" + o.name;
  o.store = store_;
  SPILLWAY_TRY(auto mount, PmemMount::start(std::move(o)));
  mounts_.emplace(tenant, mount);
  return mount;
}

Result<std::vector<std::unique_ptr<Export>>> PmemHost::start(const ExportConfig& config, ExportOptions options,
                                                             const std::string& tenant) {
  SPILLWAY_TRY(auto mount, mount_of(tenant));
  std::vector<std::unique_ptr<Export>> parts;
  PmemOptions pmem;
  pmem.mount = mount;
  pmem.link = config.file;
  SPILLWAY_TRY(auto file, start_fuse_pmem(options, pmem));
  if (!config.socket.empty())
    return fail(ErrorKind::kUnsupported, fmt::format("export {}: vfio-user is not built in yet", config.name));
  if (!config.trim_socket.empty())
    return fail(ErrorKind::kUnsupported, fmt::format("export {}: trim_socket is not built in yet", config.name));
  parts.push_back(std::move(file));
  return parts;
}

void PmemHost::stop(bool keep) {
  for (auto& [name, mount] : mounts_) mount->stop(keep);
  mounts_.clear();
}

std::string PmemHost::to_text() const {
  std::string text;
  for (auto& [name, mount] : mounts_) text += mount->to_text();
  return text;
}

}  // namespace spillway
