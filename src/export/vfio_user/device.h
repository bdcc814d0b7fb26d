// PmemDevice: the virtio-pmem device behind one vfio-user socket: ties the PCI model, the DMA table, the request queue,
// the interrupts and the flusher together. Knows nothing of sockets.
//
// The request queue. A flush is popped, waits for the flusher, and is answered in the order it came. So everything
// below the used index is done, and a ring that is attached again (new worker, new memory table) begins there; doing a
// flush twice is harmless. What was pending before is forgotten: outcomes find their requests by ticket, or not at all.
//
// Hostile guest: a ring or answer outside mapped memory breaks the queue (DEVICE_NEEDS_RESET) and nothing else.
//
// Thread-confined to one reactor.
#pragma once

#include <chrono>
#include <deque>
#include <memory>

#include "src/export/vfio_user/dma.h"
#include "src/export/vfio_user/flusher.h"
#include "src/export/vfio_user/message.h"
#include "src/export/vfio_user/pci.h"
#include "src/io/reactor.h"
#include "src/virtio/pmem.h"
#include "src/virtio/virtqueue.h"

namespace spillway::vfio {

struct DeviceCounters {
  uint64_t flushes = 0, errors = 0, bad_requests = 0, resets = 0, broken = 0, interrupts = 0, stalled = 0;
};

// A reply: what goes after the header, and the descriptors with it.
struct Answer {
  int error = 0;
  std::vector<std::byte> body;
  int fd = -1;  // the device's own, not to be closed
};

class PmemDevice {
 public:
  struct Options {
    std::string name;
    FdStore* store = nullptr;
    bool msix = true;
    // A flush fails when the backend has been failing for this long; the data stays and is tried on.
    std::chrono::nanoseconds stall_limit = std::chrono::seconds(5);
  };

  // `state` outlives the device. adopted: it is a predecessor's.
  PmemDevice(Options options, std::shared_ptr<PmemBacking> backing, DeviceState& state, bool adopted,
             Reactor& reactor);
  ~PmemDevice();
  Status adopt();  // after construction, when adopted: DMA table, interrupts, ring

  // Handles one request; `fds` came with it.
  Answer handle(const Request& request, std::vector<Fd> fds);
  // The client is gone: forgets memory, interrupts and virtio state.
  void disconnect();

  const DeviceCounters& counters() const { return counters_; }
  uint64_t flush_runs() const { return flusher_->runs(); }
  std::string to_text() const;

 private:
  struct Pending {
    uint16_t id, slots;
    virtio::PmemRequest request;
    uint64_t ticket;                // of the flusher; 0: needs no flush
    bool ok;
    DmaTable::SnapshotPtr memory;   // keeps `request.answer` mapped
  };
  Answer region_info(const RegionInfo& info) const;
  Answer irq_info(const IrqInfo& info) const;
  Answer set_irqs(const SetIrqs& request, std::vector<Fd> fds);
  Answer reset();
  void apply(const Effect& effect);
  void attach_queue();
  void detach_queue();
  void process();
  void flush_done(uint64_t upto, bool ok);
  void complete_ready();
  void interrupt_queue();
  void interrupt_config();
  void raise(uint16_t vector, uint8_t isr_bit);
  void break_queue(const std::string& why);
  void watch();
  static Task<void> watch_loop(Reactor& reactor, std::weak_ptr<PmemDevice*> self);
  void save_irqs();

  const Options options_;
  std::shared_ptr<PmemBacking> backing_;
  DeviceState& state_;
  Reactor& reactor_;
  PciModel pci_;
  DmaTable dma_;
  DmaTable::SnapshotPtr memory_;  // the one the queue is attached to
  std::unique_ptr<virtio::Virtqueue> queue_;
  std::unique_ptr<virtio::Chain> chain_;
  std::deque<Pending> pending_;
  std::shared_ptr<PmemDevice*> self_;  // weak references to it outlive the device
  std::shared_ptr<Flusher> flusher_;
  bool watching_ = false;
  IoAwait* nap_ = nullptr;  // of watch_loop
  Fd msix_[kMsixVectors];
  Fd intx_;
  bool intx_masked_ = false;
  DeviceCounters counters_;
};

}  // namespace spillway::vfio
