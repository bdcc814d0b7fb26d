// sim: a disk that takes the time a modelled drive would take, on the clock of whatever reactor asks: virtual time
// on a SimReactor, real time elsewhere. Contents are in memory and sparse. Faults are injected from options, from
// the config (kind = "sim") or while it runs. The same seed and the same requests give the same times and faults.
//
// Models, from published data sheets:
//   "hdd"   Seagate Barracuda 7200.11 (ST31000340AS): 7200 rpm, average seek 8.5 ms read / 9.5 ms write,
//           track to track 0.8 / 1.0 ms, 105 MB/s at the outer edge, about half of it inside; NCQ of 32.
//           Seek time over the stroke x in 0..1 is t + b * sqrt(x), b such that two random positions take the average
//           (E sqrt|x - y| = 8/15). The platter turns with the clock, so order and think time matter. A request that
//           continues where the last one ended is served at media speed (read-ahead, write-back buffer).
//   "ssd"   Intel SSD DC P4510 1 TB: 77 us read and 18 us write latency, 465k / 70k IOPS at 4 KiB, 2850 / 1100 MB/s:
//           36 dies that read 16 KiB each in parallel, one link, one program back end.
//   "null"  takes no time.
//
// Thread-safety: internally synchronised; several reactors may use one disk when their clocks agree (real reactors,
// or SimReactors that a test moves forward together). The lock guards state and copies, never a suspension.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/volume/volume.h"

namespace spillway {

// One thing that goes wrong. A request is hit when its kind is in `ops` and it touches the range.
struct SimFault {
  enum class Kind : uint8_t {
    kError,    // EIO; nothing is transferred
    kNoSpace,  // ENOSPC
    kShort,    // the first half is transferred, then EIO: how a short read or write reaches the layers
    kDelay,    // takes delay_ns longer
    kStuck,    // does not complete before release_stuck()
  };
  static constexpr uint8_t kRead = 1, kWrite = 2, kFlush = 4, kDiscard = 8, kAny = 15;
  Kind kind = Kind::kError;
  uint8_t ops = kAny;
  uint64_t offset = 0;
  uint64_t length = 0;       // 0: to the end; flushes ignore the range
  uint64_t nth = 0;          // only from the nth request that would be hit on (1 = the first); 0 is 1
  uint64_t count = 0;        // that many times; 0: for ever
  double probability = 1.0;  // from the disk's seed
  uint64_t delay_ns = 0;
};

// "read error 1M+64K", "write enospc", "flush error nth=3 count=1", "any delay=20ms", "read stuck p=0.01":
// [read|write|flush|discard|any] [error|enospc|short|stuck|delay=TIME] [OFFSET+LENGTH] [nth=N] [count=N] [p=0..1].
// kInvalid names the word that is not understood.
Result<SimFault> parse_sim_fault(std::string_view text);

struct SimHdd {
  double seek_read_ms = 8.5, seek_write_ms = 9.5;            // average over random positions
  double track_read_ms = 0.8, track_write_ms = 1.0;          // shortest
  double rpm = 7200;
  double outer_mb_s = 105, inner_mb_s = 52;
  uint32_t queue_depth = 32;                                 // requests the drive chooses among
  bool reorder = true;                                       // shortest positioning time first, with aging; else FIFO
  double command_us = 50;                                    // electronics, not overlapped
};

struct SimSsd {
  double read_us = 77, write_us = 18;
  uint32_t dies = 36, die_kib = 16;
  double read_mb_s = 2850, write_mb_s = 1100;
  double program_us = 10.5;                                  // per write, in the one back end: 70k IOPS at 4 KiB
  double flush_us = 30;
};

struct SimOptions {
  uint64_t size = kGiB;         // bytes, a multiple of block_size
  uint64_t stroke = 0;          // hdd: bytes of the whole platter; 0 = size, so that a small disk seeks like a full one
  uint32_t block_size = 512;
  std::string model = "hdd";    // "hdd" | "ssd" | "null"
  SimHdd hdd;
  SimSsd ssd;
  double delay_ms = 0;          // added to every request, not occupying the drive
  uint64_t seed = 1;
  bool volatile_cache = false;  // crash() may lose sectors written since the last flush
  bool read_only = false;
  std::vector<SimFault> faults;
};

class SimVolume : public Volume {
 public:
  // What the drive has done; busy_ns is time it was working on something (hdd: exact; ssd: of the busiest part).
  struct Counters {
    uint64_t reads = 0, writes = 0, flushes = 0, discards = 0;
    uint64_t read_bytes = 0, written_bytes = 0;
    uint64_t positionings = 0;  // hdd: requests that were no continuation
    uint64_t busy_ns = 0;
    uint64_t faults = 0;
  };
  virtual Counters counters() const = 0;
  virtual uint64_t allocated_bytes() const = 0;

  // Faults while it runs. Any thread.
  virtual uint64_t inject(SimFault fault) = 0;
  virtual void clear(uint64_t id) = 0;
  virtual void clear_faults() = 0;
  // Requests that are stuck go on (and complete as they would have).
  virtual void release_stuck() = 0;
  // Dead: every request fails with EIO until revive(). Contents stay.
  virtual void kill() = 0;
  virtual void revive() = 0;
  // Power loss, for disks with volatile_cache: each 512-byte sector written since the last flush keeps its new
  // contents or falls back to what was stable, by `seed`. No request may be in flight.
  virtual void crash(uint64_t seed) = 0;

 protected:
  using Volume::Volume;
};

// kInvalid names the option.
Result<std::shared_ptr<SimVolume>> make_sim_volume(std::string name, SimOptions options);
Result<VolumePtr> make_sim(std::string name, SimOptions options);

}  // namespace spillway
