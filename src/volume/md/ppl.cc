#include "src/volume/md/ppl.h"

#include <isa-l/crc.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

namespace spillway::md {

uint32_t crc32c_inverted(std::span<const std::byte> bytes, uint32_t seed) {
  auto* p = reinterpret_cast<unsigned char*>(const_cast<std::byte*>(bytes.data()));
  return ~crc32_iscsi(p, static_cast<int>(bytes.size()), seed);
}

uint32_t ppl_signature(const Uuid& uuid) { return crc32c_inverted(std::as_bytes(std::span(uuid))); }

static uint32_t header_checksum(RawPplHeader h) {
  h.checksum = 0;
  return crc32c_inverted(std::as_bytes(std::span(&h, 1)));
}

std::vector<std::byte> empty_ppl_header(uint32_t signature) {
  RawPplHeader h{};
  std::memset(h.reserved, 0xff, sizeof h.reserved);
  h.signature = signature;
  h.checksum = header_checksum(h);
  std::vector<std::byte> out(sizeof h);
  std::memcpy(out.data(), &h, sizeof h);
  return out;
}

std::optional<std::vector<PplEntry>> parse_ppl(std::span<const std::byte> area, uint32_t signature) {
  // Large areas are a ring of headers, each followed by its partial parity; the newest one counts.
  RawPplHeader best{};
  uint64_t best_data = 0;
  bool found = false;
  for (uint64_t at = 0; at + kPplHeaderSize <= area.size();) {
    RawPplHeader h;
    std::memcpy(&h, area.data() + at, sizeof h);
    if (h.checksum != header_checksum(h) || h.signature != signature || h.entries_count > kPplMaxEntries) break;
    if (found && h.generation < best.generation) break;
    best = h;
    found = true;
    at += kPplHeaderSize;
    best_data = at;
    for (uint32_t i = 0; i < h.entries_count; ++i) at += h.entries[i].pp_size;
  }
  if (!found) return std::nullopt;
  std::vector<PplEntry> out;
  uint64_t at = best_data;
  for (uint32_t i = 0; i < best.entries_count; ++i) {
    PplEntry e{best.entries[i], false, {}};
    if (e.raw.pp_size > area.size() - at) break;
    const auto pp = area.subspan(at, e.raw.pp_size);
    e.valid = crc32c_inverted(pp) == e.raw.checksum;
    if (e.valid) e.partial_parity.assign(pp.begin(), pp.end());
    at += e.raw.pp_size;
    out.push_back(std::move(e));
  }
  return out;
}

PplLog::PplLog(uint32_t signature, uint64_t area_size, Io io)
    : signature_(signature),
      space_(std::min<uint64_t>(align_down(area_size - kPplHeaderSize, 4096), kMiB)),
      io_(std::move(io)),
      generation_(1) {}

// Queues the request; suspends until it is part of a stable batch, or must lead one.
struct PplLog::Join {
  PplLog& log;
  Request& request;
  bool await_ready() const noexcept { return false; }
  bool await_suspend(std::coroutine_handle<> h) {
    request.handle = h;
    request.reactor = &Reactor::current();
    std::lock_guard l(log.lock_);
    if (!log.busy_) {
      log.busy_ = true;
      request.leader = true;
      return false;
    }
    log.pending_.push_back(&request);
    return true;
  }
  void await_resume() const noexcept {}
};

Task<Result<uint64_t>> PplLog::log(std::vector<Entry> entries) {
  Request mine;
  mine.entries = &entries;
  for (Entry& e : entries) {
    mine.bytes += e.partial_parity.size();
    e.raw.pp_size = static_cast<uint32_t>(e.partial_parity.size());
    e.raw.checksum = crc32c_inverted(e.partial_parity);
  }
  SPILLWAY_ASSERT(mine.bytes <= space_ && entries.size() < kPplMaxEntries);
  Join join{*this, mine};
  co_await join;
  if (mine.leader) {
    // The log is ours. Everything of the batch before is written; make it stable before its header goes.
    Status s{};
    if (dirty_) {
      s = co_await io_.flush_members();
      dirty_ = !s.has_value();
    }
    std::vector<Request*> batch{&mine};
    {
      std::lock_guard l(lock_);
      uint64_t bytes = mine.bytes, count = entries.size();
      std::vector<Request*> left;
      for (Request* r : pending_) {
        if (s && bytes + r->bytes <= space_ && count + r->entries->size() < kPplMaxEntries) {
          bytes += r->bytes;
          count += r->entries->size();
          batch.push_back(r);
        } else {
          left.push_back(r);
        }
      }
      pending_ = std::move(left);
      outstanding_ = batch.size();
    }
    if (s) s = co_await write_batch(batch);
    const uint64_t generation = generation_++;
    for (Request* r : batch) {
      r->status = s;
      r->batch = generation;
    }
    for (size_t i = 1; i < batch.size(); ++i) batch[i]->wake();
    if (!s)
      for (size_t i = 1; i < batch.size(); ++i) finish(generation);
  }
  if (!mine.status) {
    if (mine.leader) finish(mine.batch);
    co_return fail(std::move(mine.status).error());
  }
  co_return mine.batch;
}

Task<Status> PplLog::write_batch(std::vector<Request*>& batch) {
  AlignedBuffer header_page(kPplHeaderSize);
  if (!header_page) co_return fail(ErrorKind::kNoMemory, "partial parity log");
  RawPplHeader h{};
  std::memset(h.reserved, 0xff, sizeof h.reserved);
  h.signature = signature_;
  h.generation = generation_;
  std::vector<iovec> iov{header_page.iov()};
  for (Request* r : batch)
    for (Entry& e : *r->entries) {
      h.entries[h.entries_count++] = e.raw;
      if (!e.partial_parity.empty())
        iov.push_back({const_cast<std::byte*>(e.partial_parity.data()), e.partial_parity.size()});
    }
  if (!io_.in_sync()) h.entries[h.entries_count++] = RawPplEntry{0, 0, 0, 0, 1};  // no bytes: their checksum is 0
  h.checksum = header_checksum(h);
  std::memcpy(header_page.data(), &h, sizeof h);
  co_return co_await io_.write(0, iov);
}

void PplLog::finish(uint64_t) {
  Request* next = nullptr;
  {
    std::lock_guard l(lock_);
    SPILLWAY_ASSERT(outstanding_ > 0);
    if (--outstanding_ > 0) return;
    dirty_ = true;
    if (pending_.empty()) {
      busy_ = false;
      return;
    }
    next = pending_.front();
    pending_.erase(pending_.begin());
    next->leader = true;
  }
  next->wake();
}

}  // namespace spillway::md
