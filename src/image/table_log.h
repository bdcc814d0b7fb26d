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
// Whoever is about to change a table reserves the records for it first, so a change is never made that the log has no
// room for.
//
// Thread-safety: reserve, append, half_full, begin_cycle: under the image's owner mutex. end_cycle, clear: one at a time (flush mutex).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
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
  static constexpr uint64_t kRecords = 256 * 1024;  // a half; 6 MiB, used as needed and given back

  // `memory`: an empty memfd, or one that a predecessor has used; mapped, not kept. kInvalid: something else.
  static Result<std::unique_ptr<TableLog>> open(int memory);
  ~TableLog();
  TableLog(const TableLog&) = delete;

  // Records that may be appended. An empty one is of no log and swallows them. What is left goes back with it, on any
  // thread.
  class Room {
   public:
    Room() = default;
    Room(Room&& o) noexcept : log_(std::exchange(o.log_, nullptr)), left_(std::exchange(o.left_, 0)) {}
    Room& operator=(Room&& o) noexcept {
      give_back();
      log_ = std::exchange(o.log_, nullptr);
      left_ = std::exchange(o.left_, 0);
      return *this;
    }
    ~Room() { give_back(); }
    void append(const Record& r) {
      if (log_ == nullptr) return;
      SPILLWAY_ASSERT(left_ > 0);
      --left_;
      log_->append(r);
    }
    uint64_t left() const { return left_; }
    void give_back() {
      if (left_ > 0) log_->reserved_.fetch_sub(std::exchange(left_, 0), std::memory_order_relaxed);
    }

   private:
    friend class TableLog;
    TableLog* log_ = nullptr;
    uint64_t left_ = 0;
  };

  // In the order they were made.
  std::vector<Record> records() const;
  // For n records. It holds when the other half becomes the active one meanwhile. False: only a flush cycle makes room
  // (two of them when the one before has failed).
  bool reserve(uint64_t n, Room& room);
  bool half_full() const;
  void begin_cycle();
  void end_cycle();
  void clear();

 private:
  struct Half {
    alignas(4096) std::atomic<uint64_t> count;
    alignas(4096) Record records[kRecords];
  };
  struct Memory {
    uint64_t magic;
    std::atomic<uint32_t> active;
    Half halves[2];
  };
  explicit TableLog(Memory* m) : memory_(m) {}
  static void empty(Half& h);
  void append(const Record& r);
  const Half& active() const { return memory_->halves[memory_->active.load(std::memory_order_relaxed)]; }

  Memory* const memory_;
  // In this process only: what was reserved and not appended was not changed either. count of the active half + reserved_
  // <= kRecords. Relaxed: it grows under the owner mutex, and what shrinks it makes room only.
  std::atomic<uint64_t> reserved_{0};
};

}  // namespace spillway::qcow2
