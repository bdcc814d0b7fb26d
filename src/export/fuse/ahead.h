// ReadAhead: what a mount reads before the kernel asks for it, so that a sequential scan of a cold mapping goes at the
// volume's speed: the kernel's own window is kept small, because a random fault pays for all of it.
//
// A stream is a run of requests of at least 64 KiB (the kernel's own read-ahead at work), each near the end of the last. A
// quarter of what it has run so far, up to 2 MiB, is read ahead in pieces of 256 KiB, several at a time, on a reactor and
// thread of this object's own. A request that lies in pieces is answered from their memory; a piece that has been
// answered in full goes. So the pages are nowhere twice for longer than it takes the kernel to ask.
//
//   piece: reading (in_flight_ and pieces_) -> ready (pieces_) -> gone; from any state stale, which is gone for find()
//   stale: changed() takes overlapping pieces away at the beginning *and* at the end of a write or punch. One that began
//          before the end may have read the old bytes; one that begins after it reads the new ones. In between nobody asks:
//          the kernel keeps pages under writeback in its cache.
//
// Bounded: kPieces of kPiece a mount, in one piece of memory (8 MiB) that is touched as streams need it; when all are taken the
// oldest that nobody reads goes.
//
// Thread-safety: internally synchronised; `mutex_` is never held over I/O or a suspension. find() runs on a worker's
// reactor, which must outlive stop() (the thread here posts to it); forget() and stop() block.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "src/export/fuse/file.h"
#include "src/io/buffers.h"
#include "src/io/reactor.h"
#include "src/io/sync.h"

namespace spillway {

class ReadAhead {
 public:
  static constexpr uint64_t kPiece = 256 * kKiB;
  static constexpr size_t kPieces = 32;
  static constexpr uint64_t kAheadMax = 2 * kMiB;
  static constexpr uint64_t kStreamMin = 64 * kKiB;

  struct Piece;
  // The bytes of a request, in one piece or two, which stay while this lives. False: not read ahead.
  struct Found {
    std::array<std::shared_ptr<Piece>, 2> pieces;
    std::array<iovec, 2> iov{};
    unsigned count = 0;
    explicit operator bool() const { return count != 0; }
  };

  ~ReadAhead() { stop(); }
  Status start();
  // Waits for what is under way. Nothing is read ahead or found any more.
  void stop();

  // Notes a request of the kernel and begins to read what is expected next. Cheap for short ones.
  void note(const std::shared_ptr<PmemFile>& file, uint64_t offset, uint64_t length);
  // True: find() would find nothing. One word, for faults of one page.
  bool empty() const { return there_.load(std::memory_order_relaxed) == 0; }
  // Waits for pieces that are still being read.
  Task<Found> find(const PmemFile& file, uint64_t offset, uint64_t length);
  // Bytes of the volume change now, or have just changed.
  void changed(const PmemFile& file, uint64_t offset, uint64_t length);
  // Drops everything of the file and waits until none of it is under way: its volume may go.
  void forget(const PmemFile& file);

 private:
  // The memory, and which parts of it are free. A lock of its own: a piece may end under mutex_, or not.
  struct Slots {
    AlignedBuffer memory;
    std::mutex mutex;
    std::vector<std::byte*> free;
    std::byte* take();  // null: none
    void give(std::byte* p);
  };
  struct Stream {
    std::shared_ptr<PmemFile> file;
    uint64_t next = 0, run = 0, ahead = 0;  // end of the last request; bytes so far; end of what has been asked for
    uint64_t used = 0;                      // clock_ of the last request
  };
  void begin_piece(const std::shared_ptr<PmemFile>& file, uint64_t offset);
  Task<void> read(std::shared_ptr<Piece> piece);
  std::shared_ptr<Piece> piece_at(const PmemFile& file, uint64_t offset) const;
  template <class Goes>
  void erase_pieces(Goes goes);

  Slots slots_;  // first: pieces end before it
  std::mutex mutex_;
  std::condition_variable ended_;
  std::array<Stream, 8> streams_;
  std::deque<std::shared_ptr<Piece>> pieces_;      // oldest first
  std::vector<std::shared_ptr<Piece>> in_flight_;
  uint64_t clock_ = 0;
  bool running_ = false;
  std::atomic<size_t> there_{0};  // pieces_.size(); relaxed: who misses a piece reads the volume
  std::unique_ptr<UringReactor> reactor_;
  std::thread thread_;
};

}  // namespace spillway
