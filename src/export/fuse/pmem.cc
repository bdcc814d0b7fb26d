#include "src/export/fuse/pmem.h"

#include <fmt/core.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/base/log.h"
#include "src/io/blocking_pool.h"

namespace spillway {

namespace {

class FuseExport final : public FusePmemExport {
 public:
  FuseExport(std::string name, std::shared_ptr<PmemMount> mount, std::shared_ptr<PmemFile> file, std::string link,
             BlockingPool* blocking)
      : name_(std::move(name)), link_(std::move(link)), mount_(std::move(mount)), file_(std::move(file)),
        blocking_(blocking) {}
  ~FuseExport() override { end(false); }

  const std::string& name() const override { return name_; }
  std::string_view transport() const override { return "fuse-pmem"; }
  std::shared_ptr<PmemBacking> backing() const override { return file_; }
  std::shared_ptr<PmemFile> file() const override { return file_; }
  std::string to_text() const override { return file_->to_text(); }
  ExportStats stats() const override {
    const PmemCounters& c = file_->counters();
    ExportStats s;
    s.connected = file_->fd_ready();
    s.reads = c.reads;
    s.read_bytes = c.read_bytes;
    s.writes = c.writes;
    s.write_bytes = c.write_bytes;
    s.flushes = c.flushes;
    s.errors = c.errors;
    s.discards = c.punches;
    return s;
  }
  Task<void> stop(bool keep) override {
    if (keep || blocking_ == nullptr) {
      end(keep);
      co_return;
    }
    co_await blocking_->run([this] {  // writes back what is dirty
      end(false);
      return true;
    });
  }

 private:
  void end(bool keep) {
    if (ended_) return;
    ended_ = true;
    if (keep) return;  // the name stays for the successor; the mount's owner stops it with keep as well
    if (!link_.empty()) ::unlink(link_.c_str());
    mount_->remove(name_);
  }
  const std::string name_, link_;
  std::shared_ptr<PmemMount> mount_;
  std::shared_ptr<PmemFile> file_;
  BlockingPool* blocking_;
  bool ended_ = false;
};

// A link of an earlier life is replaced; anything else in its place is the user's and stays.
Status make_link(const std::string& target, const std::string& link) {
  struct stat st{};
  if (::lstat(link.c_str(), &st) == 0) {
    if (!S_ISLNK(st.st_mode)) return fail(ErrorKind::kExists, "pmem: " + link + " exists and is no symbolic link");
    if (::unlink(link.c_str()) != 0) return fail_errno(errno, "pmem: replace " + link);
  }
  if (::symlink(target.c_str(), link.c_str()) != 0) return fail_errno(errno, "pmem: link " + link);
  return {};
}

}  // namespace

Result<std::unique_ptr<FusePmemExport>> start_fuse_pmem(ExportOptions options, PmemOptions pmem) {
  SPILLWAY_ASSERT(pmem.mount && options.volume);
  PmemFileOptions f;
  f.name = options.name;
  f.volume = options.volume;
  f.group = options.group;
  f.read_only = options.read_only;
  f.uid = pmem.uid;
  f.gid = pmem.gid;
  f.mode = pmem.mode;
  f.punch_min_bytes = pmem.punch_min_bytes;
  SPILLWAY_TRY(auto file, pmem.mount->add(std::move(f)));
  if (!pmem.link.empty()) {
    if (Status s = make_link(pmem.mount->directory() + "/" + options.name, pmem.link); !s) {
      pmem.mount->remove(options.name);
      return std::unexpected(std::move(s).error());
    }
  }
  return std::make_unique<FuseExport>(options.name, pmem.mount, std::move(file), pmem.link,
                                      options.blocking);
}

}  // namespace spillway
