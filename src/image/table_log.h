// TableLog: the table changes of an image that were acknowledged but are not in its file yet, kept in memory that
// outlives the process (a memfd in the holder). A guest that was told "written" goes on when the worker is killed: the
// data is in the cache's frames or on the disk, and what maps it is here until a flush cycle has written the tables.
//
// Two halves. Changes go to the active one; a flush cycle begins by making the other one active (collect) and ends by
// emptying the half it has written. Replayed in order, the last change of an entry wins; replaying what is in the file
// already changes nothing.
//
// Kill -9 can come between any two stores: a record is there when the count includes it; switching and emptying are one
// store each. (Stores of a killed process are seen in program order; the compiler is held by the atomics.)
//
// Thread-safety: append, begin_cycle: under the image's owner mutex. end_cycle, clear: one at a time (flush mutex).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "src/base/result.h"

namespace spillway::qcow2 {

class TableLog {
 public:
  struct Record {
    uint64_t where = 0;  // guest cluster, or kL1Record | index of an L1 entry
    uint64_t entry = 0;
    uint64_t bitmap = 0;  // with subclusters
  };
  static constexpr uint64_t kL1Record = uint64_t{1} << 63;
  static constexpr uint64_t kRecords = 64 * 1024;  // a half; 1.5 MiB, used as needed

  // `memory`: an empty memfd, or one that a predecessor has used; mapped, not kept. kInvalid: something else.
  static Result<std::unique_ptr<TableLog>> open(int memory);
  ~TableLog();
  TableLog(const TableLog&) = delete;

  // In the order they were made.
  std::vector<Record> records() const;
  // False: no room. Whoever made the change must not acknowledge it before a flush cycle has written it.
  bool append(const Record& r);
  bool full() const { return full_.load(std::memory_order_relaxed); }
  void begin_cycle();
  void end_cycle();
  void clear();

 private:
  struct Half {
    std::atomic<uint64_t> count;
    Record records[kRecords];
  };
  struct Memory {
    uint64_t magic;
    std::atomic<uint32_t> active;
    Half halves[2];
  };
  explicit TableLog(Memory* m) : memory_(m) {}

  Memory* const memory_;
  std::atomic<bool> full_{false};
};

}  // namespace spillway::qcow2
