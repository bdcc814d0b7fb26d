// Extents that two files share on disk (P6): reflink clones and in-line deduplication make a later copy-on-write a timing
// oracle between their writers. A file's extents are asked for with FIEMAP; what is shared and with whom is decided here.
//
// Thread-safety: free functions; they block (FIEMAP syncs the file first): call them on a BlockingPool.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace spillway {

struct FileExtent {
  uint64_t logical = 0, physical = 0, length = 0;  // bytes
  bool shared = false;                             // FIEMAP_EXTENT_SHARED: some other file has it too
};

// All extents of a file. kUnsupported: the filesystem cannot tell (block devices, tmpfs, network filesystems).
Result<std::vector<FileExtent>> file_extents(int fd);

// A leaf file as the exports see it: who may write it. `tenant` = top-level group.
struct LeafUse {
  std::string path;
  int fd = -1;
  uint64_t device = 0;             // st_dev
  std::vector<uint32_t> writers;   // tenants with a writable export over it
  std::vector<uint32_t> readers;   // tenants with any export over it
};

struct SharedExtent {
  std::string path;                // the file that a tenant may write
  std::string with;                // the other file, or empty: a file we do not serve
  uint64_t offset = 0, length = 0; // in `path`
};

// Shared extents of files that a tenant may write and that another tenant can reach through another file (or, with
// `strict`, that anybody shares). Files on a filesystem that cannot tell are listed in `unknown`.
struct ExtentReport {
  std::vector<SharedExtent> shared;
  std::vector<std::string> unknown;
};
Result<ExtentReport> find_shared_extents(const std::vector<LeafUse>& files, bool strict);

// Gives the file extents of its own (FALLOC_FL_UNSHARE_RANGE) where they are shared. kNoSpace when there is no room.
Status unshare_extents(int fd, const std::string& path);

// One line for a person: "disk a.img shares 64 KiB at 0 with b.img: ..."
std::string to_text(const SharedExtent& s);

}  // namespace spillway
