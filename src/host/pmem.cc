#include "src/host/pmem.h"

#include <fmt/core.h>
#include <sys/mount.h>

#include <algorithm>

#include "src/export/fuse/trim.h"
#include "src/export/vfio_user/vfio_user.h"
#include "src/export/vhost_user/vhost_user.h"

namespace spillway {

namespace {

// The parts of one virtio-pmem export under its one name: the file, and what serves it to a VMM.
class PmemExport final : public Export {
 public:
  PmemExport(std::string name, std::unique_ptr<FusePmemExport> file, std::unique_ptr<Export> device,
             std::unique_ptr<Export> trim)
      : name_(std::move(name)), file_(std::move(file)), device_(std::move(device)), trim_(std::move(trim)) {}

  const std::string& name() const override { return name_; }
  std::string_view transport() const override { return device_ ? device_->transport() : file_->transport(); }
  ExportStats stats() const override {
    ExportStats s = file_->stats();
    if (!device_) return s;
    const ExportStats d = device_->stats();
    s.connected = d.connected;
    s.flushes = d.flushes;
    s.errors += d.errors;
    s.connections = d.connections;
    s.protocol_errors = d.protocol_errors;
    return s;
  }
  std::string to_text() const override {
    std::string text = file_->to_text();
    if (device_) text += device_->to_text();
    if (trim_) text += "trim disk:\n" + trim_->to_text();
    return text;
  }
  Task<void> stop(bool keep) override {
    if (trim_) co_await trim_->stop(keep);
    if (device_) co_await device_->stop(keep);
    co_await file_->stop(keep);
  }

 private:
  const std::string name_;
  std::unique_ptr<FusePmemExport> file_;
  std::unique_ptr<Export> device_, trim_;
};

}  // namespace

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
  PmemOptions pmem;
  pmem.mount = mount;
  pmem.link = config.file;
  SPILLWAY_TRY(auto file, start_fuse_pmem(options, pmem));
  if (registry_ != nullptr) {
    if (!shrinker_) shrinker_ = PmemShrinker::create(*registry_);
    if (!shrinker_) return fail(ErrorKind::kNoMemory, "pmem: no shrinker id left");
    shrinker_->add(file->file());
  }
  std::unique_ptr<Export> trim, device;
  if (!config.trim_socket.empty()) {
    if (config.read_only)
      return fail(ErrorKind::kInvalid, fmt::format("export {}: trim_socket on a read-only export", config.name));
    ExportOptions o = options;
    o.name = config.name + "-trim";
    o.volume = make_trim_volume(file->file(), options.blocking);
    o.socket = config.trim_socket;
    o.queues = 1;
    SPILLWAY_TRY(trim, start_vhost_user(std::move(o)));
  }
  // Last: once it listens nothing can fail any more.
  if (!config.socket.empty()) {
    SPILLWAY_TRY(device, start_vfio_user_pmem(options, file->backing()));
  }
  std::vector<std::unique_ptr<Export>> parts;
  parts.push_back(std::make_unique<PmemExport>(config.name, std::move(file), std::move(device), std::move(trim)));
  return parts;
}

void PmemHost::settle() {
  for (auto& [name, mount] : mounts_) mount->settle();
  if (store_ == nullptr) return;
  auto kept = store_->list("pmem/");
  if (!kept) return;
  for (auto& key : *kept) {
    const std::string tenant = key.substr(5, key.find('/', 5) - 5);
    if (std::any_of(mounts_.begin(), mounts_.end(), [&](auto& m) { return m.second->name() == tenant; })) continue;
    (void)store_->remove(key);  // the last copy of /dev/fuse: the kernel aborts the connection
    ::umount2((folder_ + "/" + tenant).c_str(), MNT_FORCE | MNT_DETACH);
  }
}

void PmemHost::stop(bool keep) {
  shrinker_.reset();
  for (auto& [name, mount] : mounts_) mount->stop(keep);
  mounts_.clear();
}

std::string PmemHost::to_text() const {
  std::string text;
  for (auto& [name, mount] : mounts_) text += mount->to_text();
  return text;
}

}  // namespace spillway
