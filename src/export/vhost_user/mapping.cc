#include "src/export/vhost_user/mapping.h"

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <fmt/core.h>

#include "src/base/units.h"
#include "src/export/vhost_user/sigbus.h"

namespace spillway::vhost {

Result<Mapping> Mapping::create(int fd, uint64_t offset, uint64_t size) {
  struct stat st {};
  struct statfs fs {};
  if (::fstat(fd, &st) != 0 || ::fstatfs(fd, &fs) != 0) return fail_errno(errno, "stat of a memory descriptor");
  const uint64_t end = offset + size;
  if (size == 0 || end < size) return fail(ErrorKind::kInvalid, "memory region: empty or wraps around");
  const bool regular = S_ISREG(st.st_mode);
  if (regular && static_cast<uint64_t>(st.st_size) < end)
    return fail(ErrorKind::kInvalid, fmt::format("memory region ends at {:#x} of a file of {:#x} bytes", end,
                                                 static_cast<uint64_t>(st.st_size)));
  const bool huge = fs.f_type == HUGETLBFS_MAGIC;
  const uint64_t page = huge ? static_cast<uint64_t>(fs.f_bsize) : kPageSize;
  const uint64_t from = align_down(offset, page);
  Mapping m;
  m.length_ = align_up(end - from, page);
  void* base = ::mmap(nullptr, m.length_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                      static_cast<off_t>(from));
  if (base == MAP_FAILED)
    return fail_errno(errno, fmt::format("map of a memory region of {:#x} bytes", size));
  m.base_ = base;
  m.data_ = static_cast<std::byte*>(base) + (offset - from);
  m.size_ = size;
  m.blocking_ = !huge && !(regular && fs.f_type == TMPFS_MAGIC);
  m.guard_ = guard_range(base, m.length_);
  if (m.guard_ < 0) return fail(ErrorKind::kNoMemory, "too many memory regions in this process");
  ::madvise(base, m.length_, MADV_DONTDUMP);
  return m;
}

Mapping::~Mapping() {
  unguard_range(guard_);
  if (base_ != nullptr) ::munmap(base_, length_);
}

bool Mapping::torn() const { return range_torn(guard_); }

}  // namespace spillway::vhost
