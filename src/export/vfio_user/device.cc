#include "src/export/vfio_user/device.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "src/base/log.h"

namespace spillway::vfio {

namespace {

template <class T>
void append(std::vector<std::byte>& out, const T& value) {
  const auto* p = reinterpret_cast<const std::byte*>(&value);
  out.insert(out.end(), p, p + sizeof value);
}

Answer refuse(int error) {
  Answer a;
  a.error = error;
  return a;
}

}  // namespace

PmemDevice::PmemDevice(Options options, std::shared_ptr<PmemBacking> backing, DeviceState& state, bool adopted,
                       Reactor& reactor)
    : options_(std::move(options)),
      backing_(std::move(backing)),
      state_(state),
      reactor_(reactor),
      pci_(state, backing_->size(), options_.msix),
      dma_(options_.store, "vfio/" + options_.name + "/dma/"),
      chain_(std::make_unique<virtio::Chain>()),
      self_(std::make_shared<PmemDevice*>(this)) {
  if (!adopted) PciModel::init(state_, backing_->size(), options_.msix);
  Reactor* home = &reactor_;
  std::weak_ptr<PmemDevice*> weak = self_;
  flusher_ = std::make_shared<Flusher>(backing_, [home, weak](uint64_t upto, bool ok) {
    home->post([weak, upto, ok] {
      if (auto self = weak.lock()) (*self)->flush_done(upto, ok);
    });
  });
}

PmemDevice::~PmemDevice() {
  if (nap_ != nullptr) reactor_.cancel(*nap_);
}

Status PmemDevice::adopt() {
  SPILLWAY_CHECK(dma_.adopt());
  if (options_.store != nullptr) {
    if (auto kept = options_.store->get("vfio/" + options_.name + "/irq"); kept) {
      // The blob says which descriptor is which: '0', '1' for vectors, 'i' for INTx.
      for (size_t i = 0; i < kept->fds.size() && i < kept->blob.size(); ++i) {
        const char c = kept->blob[i];
        if (c == 'i') intx_ = std::move(kept->fds[i]);
        else if (c >= '0' && c < static_cast<char>('0' + kMsixVectors)) msix_[c - '0'] = std::move(kept->fds[i]);
      }
    }
  }
  attach_queue();
  process();
  if (queue_) interrupt_queue();  // the predecessor may have published and not told
  return {};
}

void PmemDevice::save_irqs() {
  if (options_.store == nullptr) return;
  std::vector<int> fds;
  std::string which;
  for (uint32_t i = 0; i < kMsixVectors; ++i) {
    if (!msix_[i]) continue;
    fds.push_back(msix_[i].get());
    which.push_back(static_cast<char>('0' + i));
  }
  if (intx_) {
    fds.push_back(intx_.get());
    which.push_back('i');
  }
  if (Status s = options_.store->put("vfio/" + options_.name + "/irq", fds, which); !s)
    LOG_LIMITED(LogLevel::kWarn, "vfio-user", "{}: {}", options_.name, s.error().message());
}

// ---- requests of the client ------------------------------------------------------------------------------------

Answer PmemDevice::handle(const Request& request, std::vector<Fd> fds) {
  Answer a;
  if (auto* refused = std::get_if<Refused>(&request)) return refuse(refused->error);
  if (auto* m = std::get_if<DmaMap>(&request)) {
    log(LogLevel::kDebug, "vfio-user", "{}: dma map {:#x}+{:#x} flags {} offset {:#x} fds {}", options_.name, m->address,
        m->size, m->flags, m->offset, fds.size());
    const Status s = dma_.map(*m, fds.empty() ? Fd() : std::move(fds[0]));
    if (!s) {
      LOG_LIMITED(LogLevel::kWarn, "vfio-user", "{}: {}", options_.name, s.error().message());
      return refuse(s.error().to_errno());
    }
    attach_queue();
    process();
    return a;
  }
  if (auto* u = std::get_if<DmaUnmap>(&request)) {
    log(LogLevel::kDebug, "vfio-user", "{}: dma unmap {:#x}+{:#x} flags {}", options_.name, u->address, u->size, u->flags);
    if (u->flags == kUnmapAll) {
      dma_.clear();
    } else if (Status s = dma_.unmap(u->address, u->size); !s) {
      LOG_LIMITED(LogLevel::kWarn, "vfio-user", "{}: {}", options_.name, s.error().message());
      return refuse(s.error().to_errno());
    }
    attach_queue();
    process();
    append(a.body, *u);
    return a;
  }
  if (std::holds_alternative<GetInfo>(request)) {
    append(a.body, DeviceInfo{sizeof(DeviceInfo), kDeviceReset | kDevicePci, kRegionCount, kIrqCount});
    return a;
  }
  if (auto* g = std::get_if<GetRegionInfo>(&request)) return region_info(g->info);
  if (auto* g = std::get_if<GetIrqInfo>(&request)) return irq_info(g->info);
  if (auto* s = std::get_if<SetIrqs>(&request)) return set_irqs(*s, std::move(fds));
  if (auto* r = std::get_if<RegionRead>(&request)) {
    append(a.body, r->at);
    a.body.resize(sizeof r->at + r->at.count);
    if (!pci_.read(r->at.region, r->at.offset, std::span(a.body).subspan(sizeof r->at))) return refuse(EINVAL);
    return a;
  }
  if (auto* w = std::get_if<RegionWrite>(&request)) {
    Effect effect;
    if (!pci_.write(w->at.region, w->at.offset, w->data, effect)) return refuse(EINVAL);
    apply(effect);
    append(a.body, w->at);
    return a;
  }
  if (std::holds_alternative<Reset>(request)) return reset();
  return refuse(EPROTO);  // VERSION is the server's
}

Answer PmemDevice::region_info(const RegionInfo& asked) const {
  Answer a;
  const uint64_t size = pci_.region_size(asked.index);
  RegionInfo info{sizeof(RegionInfo), 0, asked.index, 0, size, 0};
  if (size != 0) info.flags = kRegionRead | kRegionWrite;
  if (asked.index != 2) {
    append(a.body, info);
    return a;
  }
  info.flags |= kRegionMmap;
  // A power of two may be larger than the file behind it: then only the file's part is mapped.
  const bool sparse = backing_->size() != size;
  if (sparse) {
    info.flags |= kRegionCaps;
    info.argsz = sizeof(RegionInfo) + sizeof(SparseMmap);
  }
  const bool whole = asked.argsz >= info.argsz;
  if (sparse) info.cap_offset = sizeof(RegionInfo);  // QEMU checks it in the short answer as well
  append(a.body, info);
  if (sparse && whole) append(a.body, SparseMmap{1, 1, 0, 1, 0, 0, backing_->size()});
  if (whole) a.fd = backing_->fd();  // one descriptor, with the complete answer only
  return a;
}

Answer PmemDevice::irq_info(const IrqInfo& asked) const {
  IrqInfo info{sizeof(IrqInfo), 0, asked.index, 0};
  if (asked.index == kIrqMsix && options_.msix) {
    info.flags = kIrqEventfd | kIrqNoResize;
    info.count = kMsixVectors;
  } else if (asked.index == kIrqIntx && !options_.msix) {
    info.flags = kIrqEventfd | kIrqMaskable | kIrqAutomasked;
    info.count = 1;
  } else if (asked.index != kIrqMsix && asked.index != kIrqIntx) {
    return refuse(EINVAL);
  }
  Answer a;
  append(a.body, info);
  return a;
}

Answer PmemDevice::set_irqs(const SetIrqs& r, std::vector<Fd> fds) {
  const IrqSet& s = r.set;
  const uint32_t count = s.index == kIrqMsix ? kMsixVectors : 1;
  const bool ours = (s.index == kIrqMsix && options_.msix) || (s.index == kIrqIntx && !options_.msix);
  if (!ours || s.start > count || s.count > count - s.start) return refuse(EINVAL);
  auto fd_of = [&](uint32_t i) -> Fd& { return s.index == kIrqMsix ? msix_[i] : intx_; };
  const uint32_t data = s.flags & kSetDataMask, action = s.flags & kSetActionMask;
  if (action == kSetMask || action == kSetUnmask) {
    if (s.index != kIrqIntx) return refuse(EINVAL);  // MSI-X is masked in its table
    if (data == kSetDataEventfd) return refuse(ENOTSUP);
    intx_masked_ = action == kSetMask;
    if (!intx_masked_ && state_.isr != 0) raise(kNoVector, 0);
    return {};
  }
  if (data == kSetDataEventfd) {
    for (uint32_t i = 0; i < s.count; ++i) fd_of(s.start + i) = i < fds.size() ? std::move(fds[i]) : Fd();
    save_irqs();
  } else if (data == kSetDataNone && s.count == 0) {
    for (uint32_t i = 0; i < count; ++i) fd_of(i).reset();
    save_irqs();
  } else {  // a loop-back test of the client
    for (uint32_t i = 0; i < s.count; ++i) {
      const uint64_t one = 1;
      if ((data == kSetDataNone || r.bools[i] != std::byte{0}) && fd_of(s.start + i))
        (void)!::write(fd_of(s.start + i).get(), &one, sizeof one);
    }
  }
  return {};
}

Answer PmemDevice::reset() {
  ++counters_.resets;
  detach_queue();
  pci_.reset_virtio();
  std::memset(state_.msix, 0, sizeof state_.msix);
  return {};
}

void PmemDevice::disconnect() {
  (void)reset();
  dma_.clear();
  for (Fd& fd : msix_) fd.reset();
  intx_.reset();
  save_irqs();
  PciModel::init(state_, backing_->size(), options_.msix);
}

// ---- the request queue -----------------------------------------------------------------------------------------

void PmemDevice::apply(const Effect& effect) {
  if (effect.reset) {
    ++counters_.resets;
    detach_queue();
  }
  if (effect.queue) attach_queue();
  if (effect.kick || effect.queue) process();
}

void PmemDevice::detach_queue() {
  pending_.clear();
  queue_.reset();
  memory_.reset();
}

// (Re)attaches the ring to the memory table as it is now, at the used index. Not attached while the ring lies in memory
// that the client has not shown (yet): it may come with the next DMA_MAP.
void PmemDevice::attach_queue() {
  const QueueState& q = state_.queue;
  const bool live = q.enabled && (state_.status & kStatusDriverOk) != 0 &&
                    (state_.status & (kStatusNeedsReset | kStatusFailed)) == 0;
  detach_queue();
  if (!live || !dma_.snapshot()) return;
  const virtio::GuestMemory& memory = dma_.snapshot()->memory;
  const auto areas = virtio::RingAreas::of(q.size, false);
  virtio::RingConfig config;
  config.size = q.size;
  config.desc = memory.translate_guest(q.desc, areas.desc, virtio::RingAreas::kDescAlign);
  config.driver = memory.translate_guest(q.driver, areas.driver, virtio::RingAreas::driver_align(false));
  config.device = memory.translate_guest(q.device, areas.device, virtio::RingAreas::kDeviceAlign);
  if (config.desc == nullptr || config.driver == nullptr || config.device == nullptr) return;
  // used.idx: what is below it has been answered. A guest that forges it only confuses itself.
  const uint16_t used = __atomic_load_n(reinterpret_cast<uint16_t*>(config.device + 2), __ATOMIC_ACQUIRE);
  config.next_avail = config.next_used = used;
  queue_ = std::make_unique<virtio::Virtqueue>();
  memory_ = dma_.snapshot();
  if (Status s = queue_->start(config, &memory_->memory); !s) {
    break_queue(s.error().message());
    return;
  }
  queue_->arm();
}

void PmemDevice::break_queue(const std::string& why) {
  LOG_LIMITED(LogLevel::kWarn, "vfio-user", "{}: request queue broken: {}", options_.name, why);
  ++counters_.broken;
  detach_queue();
  state_.status |= kStatusNeedsReset;
  interrupt_config();
}

void PmemDevice::process() {
  while (queue_) {
    switch (queue_->pop(*chain_)) {
      case virtio::Virtqueue::Pop::kBroken: break_queue(queue_->reason()); return;
      case virtio::Virtqueue::Pop::kEmpty:
        if (queue_->arm()) continue;
        complete_ready();
        return;
      case virtio::Virtqueue::Pop::kChain: break;
    }
    Pending p{chain_->id, chain_->slots, virtio::parse_pmem(*chain_), 0, false, memory_};
    if (p.request.flush) {
      ++counters_.flushes;
      p.ticket = flusher_->request();
    } else {
      ++counters_.bad_requests;
    }
    pending_.push_back(std::move(p));
    watch();
  }
}

// An outcome belongs to all pending requests with a ticket up to `upto`.
void PmemDevice::flush_done(uint64_t upto, bool ok) {
  for (Pending& p : pending_) {
    if (p.ticket == 0 || p.ticket > upto) continue;
    p.ticket = 0;
    p.ok = ok;
    if (!ok) ++counters_.errors;
  }
  complete_ready();
}

void PmemDevice::complete_ready() {
  bool any = false;
  while (queue_ && !pending_.empty() && pending_.front().ticket == 0) {
    const Pending p = std::move(pending_.front());
    pending_.pop_front();
    queue_->push(p.id, p.slots, virtio::answer_pmem(p.request, p.ok));
    any = true;
  }
  if (any && queue_->publish()) interrupt_queue();
}

// While flushes wait: fail them once the backend has been failing for too long. The data is not given up, the write
// backs are tried on; the guest learns that its fsync did not hold.
void PmemDevice::watch() {
  if (watching_) return;
  watching_ = true;
  reactor_.spawn(watch_loop(reactor_, self_));
}

Task<void> PmemDevice::watch_loop(Reactor& reactor, std::weak_ptr<PmemDevice*> weak) {
  for (;;) {
    uint64_t pause = 0;
    if (auto alive = weak.lock()) pause = static_cast<uint64_t>((*alive)->options_.stall_limit.count()) / 8;
    if (pause == 0) co_return;
    IoAwait nap = reactor.sleep_for(pause);
    if (auto alive = weak.lock()) (*alive)->nap_ = &nap;
    co_await nap;
    auto self = weak.lock();
    if (!self) co_return;
    PmemDevice& d = **self;
    d.nap_ = nullptr;
    if (d.pending_.empty()) {
      d.watching_ = false;
      co_return;
    }
    if (d.backing_->stalled() < d.options_.stall_limit) continue;
    ++d.counters_.stalled;
    d.flush_done(UINT64_MAX, false);
  }
}

// ---- interrupts ------------------------------------------------------------------------------------------------

void PmemDevice::raise(uint16_t vector, uint8_t isr_bit) {
  state_.isr |= isr_bit;
  const uint64_t one = 1;
  const Fd* fd = nullptr;
  if (!options_.msix) fd = intx_masked_ ? nullptr : &intx_;
  else if (vector < kMsixVectors) fd = &msix_[vector];
  if (fd == nullptr || !*fd) return;
  if (!options_.msix) intx_masked_ = true;  // automasked until the client says otherwise
  ++counters_.interrupts;
  (void)!::write(fd->get(), &one, sizeof one);
}

void PmemDevice::interrupt_queue() { raise(state_.queue.vector, 1); }
void PmemDevice::interrupt_config() { raise(state_.config_vector, 2); }

std::string PmemDevice::to_text() const {
  return fmt::format(
      "device: status {:#x} queue {} pending {} dma regions {} ({} not touched)\n"
      "flushes: {} in {} runs, {} failed, {} times stalled; bad requests {} resets {} broken {} interrupts {}\n",
      state_.status, queue_ ? "running" : "stopped", pending_.size(), dma_.entries(), dma_.unmapped(),
      counters_.flushes, flusher_->runs(), counters_.errors, counters_.stalled, counters_.bad_requests, counters_.resets,
      counters_.broken, counters_.interrupts);
}

}  // namespace spillway::vfio
