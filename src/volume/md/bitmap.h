// The write-intent bitmap: which regions of the members may differ because a write was under way (V2).
//
// Order, the reason it exists: start_write() returns only when the bits of the region are *stable* on every member in
// use (FUA); data is written after that. A bit is cleared only by clear_idle(), after a flush of all members that
// began when no write to the region was in flight, and written without FUA: a bit that survives too long costs a
// little resync and no data.
//
// Who writes: pages of the image are written under io_ (one writer, group commit): a writer that finds its bits set in
// the image but not yet stable waits for the write in progress and does the next one for all that wait.
// Thread-safety: start_write, end_write: any reactor. The image is guarded by lock_, never across a suspension.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/io/sync.h"
#include "src/volume/md/bitmap_format.h"
#include "src/volume/volume.h"

namespace spillway::md {

class Bitmap {
 public:
  // Writes bytes of the bitmap area (offset within it, whole pages) to every member in use.
  using Writer = std::function<Task<Status>(uint64_t offset, std::span<const std::byte> bytes, bool fua)>;

  static constexpr uint64_t kPage = 4096;
  static uint64_t bytes_for(uint64_t component_size, uint64_t chunk) {
    return sizeof(RawBitmapHeader) + ((component_size + chunk - 1) / chunk + 7) / 8;
  }
  // A chunk size for which the bitmap fits `space`; at least min_chunk.
  static uint64_t choose_chunk(uint64_t component_size, uint64_t space, uint64_t min_chunk);

  Bitmap(RawBitmapHeader header, uint64_t component_size, uint64_t space);
  // Checks a header read from a member. It must cover from component_min to component_size bytes (raid5: whole chunks
  // or all that is used). `who` begins every message.
  static Status check(const RawBitmapHeader& h, uint64_t component_size, uint64_t component_min, uint64_t space,
                      const std::string& who);

  // Sets the bits that are set in `bits` (the area of a member without its header). Before the first write.
  // dirty false: the array is clean, the bits are of a member that is missing and ask for no resync.
  void merge(std::span<const std::byte> bits, bool dirty);
  void set_all();
  void set_writer(Writer w) { writer_ = std::move(w); }

  Task<Status> start_write(uint64_t first, uint64_t end);  // component bytes
  void end_write(uint64_t first, uint64_t end);
  // Regions that must be brought in sync: set at assembly, or written while the array was degraded.
  bool needs_sync(uint64_t first, uint64_t end) const;
  // First offset >= `offset` that needs sync, or component_size.
  uint64_t next_needing_sync(uint64_t offset) const;
  void synced(uint64_t first, uint64_t end);  // whole chunks inside only
  bool any_needs_sync() const { return next_needing_sync(0) < component_size_; }

  // One round of the daemon: `flush` must make all acknowledged writes stable on all members. `may_clear` false
  // (degraded): nothing is cleared; asked again after the flush, which may be what a member failed at. Returns how many
  // bits are still set.
  Task<Result<uint64_t>> clear_idle(std::function<Task<Status>()> flush, std::function<bool()> may_clear, bool all_idle);
  // Writes the header with these counters (page 0).
  Task<Status> write_header(uint64_t events, bool degraded);
  Task<Status> write_all();  // every page: a new member's copy

  uint64_t chunk() const { return header_.chunk_size; }
  uint64_t chunks() const { return chunks_; }
  uint64_t bits_set() const;
  const RawBitmapHeader& header() const { return header_; }

 private:
  bool image_bit(uint64_t c) const { return (bits()[c / 8] >> (c % 8) & 1) != 0; }
  uint8_t* bits() { return reinterpret_cast<uint8_t*>(image_.data()) + sizeof(RawBitmapHeader); }
  const uint8_t* bits() const { return reinterpret_cast<const uint8_t*>(image_.data()) + sizeof(RawBitmapHeader); }
  uint64_t page_of(uint64_t c) const { return (sizeof(RawBitmapHeader) + c / 8) / kPage; }
  Task<Status> write_pages(uint64_t first_page, uint64_t last_page, bool fua);

  struct Chunk {
    uint32_t writes = 0;      // in flight
    bool needs_sync = false;
    bool touched = false;     // since the last round of the daemon
  };
  struct Page {
    uint64_t set_version = 0;     // of the image: counts changes that must be stable before data
    uint64_t stable_version = 0;
  };
  RawBitmapHeader header_;
  const uint64_t component_size_;
  const uint64_t chunks_;
  Writer writer_;
  mutable SpinLock lock_;
  std::vector<std::byte> image_;  // header and bits, whole pages
  std::vector<Chunk> chunk_;
  std::vector<Page> page_;
  AsyncMutex io_;
};

}  // namespace spillway::md
