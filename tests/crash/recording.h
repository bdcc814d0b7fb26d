// A leaf that remembers what a power cut could leave behind.
//
// Every write, flush and completion of every disk of one Trace gets a number from one sequence. At a cut between two
// numbers a write that was issued before is
//   certain   when it was FUA and had completed, or had completed before a flush was issued that has completed;
//   possible  otherwise: there, not there, or torn at any sector, in any combination with others.
// Requests take a seeded time, so that many are in flight at once.
// Thread-confined (one SimReactor).
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "src/io/reactor.h"
#include "src/volume/volume.h"

namespace spillway::crash {

struct Event {
  enum class Kind : uint8_t { kWrite, kFlush } kind;
  size_t disk;
  uint64_t offset = 0;
  std::vector<std::byte> data;
  bool fua = false;
  uint64_t issued = 0;
  uint64_t completed = UINT64_MAX;
};

struct Trace {
  explicit Trace(uint64_t seed) : random(seed) {}
  uint64_t next() { return ++clock; }
  uint64_t clock = 0;
  std::vector<std::unique_ptr<Event>> events;
  std::mt19937_64 random;
  bool recording = false;
};

class RecordingVolume final : public Volume {
 public:
  RecordingVolume(std::string name, uint64_t size, size_t disk, Trace* trace)
      : Volume(std::move(name), size, Geometry{}), bytes_(size), disk_(disk), trace_(trace) {}
  std::string_view layer() const override { return "recording"; }
  std::vector<std::byte>& bytes() { return bytes_; }
  // From now on every request fails; what was written stays.
  void die() { dead_ = true; }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    co_await delay();
    if (dead_) co_return fail(ErrorKind::kIo, "dead");
    copy_to_iov(iov, 0, bytes_.data() + offset, iov_length(iov));
    co_return Status{};
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    if (dead_) co_return fail(ErrorKind::kIo, "dead");
    auto own = std::make_unique<Event>();
    Event* e = own.get();
    e->kind = Event::Kind::kWrite;
    e->disk = disk_;
    e->offset = offset;
    e->data.resize(iov_length(iov));
    e->fua = ctx.fua;
    copy_from_iov(e->data.data(), iov, 0, e->data.size());
    e->issued = trace_->next();
    if (trace_->recording) trace_->events.push_back(std::move(own));
    co_await delay();
    std::memcpy(bytes_.data() + offset, e->data.data(), e->data.size());
    e->completed = trace_->next();
    co_return Status{};
  }
  Task<Status> do_flush(IoContext) override {
    if (dead_) co_return fail(ErrorKind::kIo, "dead");
    auto own = std::make_unique<Event>();
    Event* e = own.get();
    e->kind = Event::Kind::kFlush;
    e->disk = disk_;
    e->issued = trace_->next();
    if (trace_->recording) trace_->events.push_back(std::move(own));
    co_await delay();
    e->completed = trace_->next();
    co_return Status{};
  }

 private:
  IoAwait delay() { return Reactor::current().sleep_for(1000 + trace_->random() % 100'000); }
  std::vector<std::byte> bytes_;
  size_t disk_;
  Trace* trace_;
  bool dead_ = false;
};

// What is on the disks after a cut at `at`, starting from `base`.
class Cut {
 public:
  Cut(const Trace& trace, uint64_t at, size_t disks) {
    std::vector<std::vector<const Event*>> flushes(disks);
    for (const auto& e : trace.events)
      if (e->kind == Event::Kind::kFlush && e->completed <= at) flushes[e->disk].push_back(e.get());
    for (const auto& e : trace.events) {
      if (e->kind != Event::Kind::kWrite || e->issued > at) continue;
      bool certain = e->fua && e->completed <= at;
      for (const Event* f : flushes[e->disk]) certain |= e->completed < f->issued;
      writes_.push_back({e.get(), certain});
      possible_ += !certain;
    }
  }
  size_t possible() const { return possible_; }

  // choice(k): of the k-th possible write: 0 not there, 1 there, 2 torn by `random`.
  template <class Choice>
  void image(const std::vector<std::vector<std::byte>>& base, std::vector<std::vector<std::byte>>* out, Choice choice,
             std::mt19937_64& random) const {
    auto& disks = *out;
    disks = base;  // keeps the memory of the last image
    size_t k = 0;
    for (const auto& w : writes_) {
      const int how = w.certain ? 1 : choice(k++);
      if (how == 0) continue;
      std::byte* to = disks[w.event->disk].data() + w.event->offset;
      for (size_t i = 0; i < w.event->data.size(); i += 512)
        if (how == 1 || random() % 2 == 0) std::memcpy(to + i, w.event->data.data() + i, 512);
    }
  }

 private:
  struct Write {
    const Event* event;
    bool certain;
  };
  std::vector<Write> writes_;
  size_t possible_ = 0;
};

}  // namespace spillway::crash
