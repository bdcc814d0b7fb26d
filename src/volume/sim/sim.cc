#include "src/volume/sim/sim.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <random>
#include <unordered_map>

#include <fmt/core.h>

#include "src/io/reactor.h"
#include "src/io/sync.h"

namespace spillway {
namespace {

constexpr uint64_t kChunk = 64 * kKiB;   // grain of the sparse contents
constexpr uint64_t kSector = 512;        // grain of what a crash tears
constexpr uint32_t kMaxPassed = 128;     // how often the drive may prefer others before a request's turn has come

uint64_t ns(double milliseconds) { return static_cast<uint64_t>(milliseconds * 1e6); }

enum class Op : uint8_t { kRead = SimFault::kRead, kWrite = SimFault::kWrite, kFlush = SimFault::kFlush,
                          kDiscard = SimFault::kDiscard };

// ---- contents ----------------------------------------------------------------------------------------------------

// Sparse bytes with, for a volatile cache, the stable version of what was written since the last flush.
class Contents {
 public:
  explicit Contents(bool track) : track_(track) {}

  void read(uint64_t offset, Iov iov, uint64_t length) const {
    for (uint64_t done = 0; done < length;) {
      const auto [chunk, in, n] = piece(offset + done, length - done);
      auto it = chunks_.find(chunk);
      if (it == chunks_.end()) zero_iov(iov, done, n);
      else copy_to_iov(iov, done, it->second.get() + in, n);
      done += n;
    }
  }
  void write(uint64_t offset, Iov iov, uint64_t length, bool stable) {
    remember(offset, length, stable);
    for (uint64_t done = 0; done < length;) {
      const auto [chunk, in, n] = piece(offset + done, length - done);
      copy_from_iov(own(chunk) + in, iov, done, n);
      done += n;
    }
  }
  void zero(uint64_t offset, uint64_t length) {
    remember(offset, length, false);
    for (uint64_t done = 0; done < length;) {
      const auto [chunk, in, n] = piece(offset + done, length - done);
      if (n == kChunk) chunks_.erase(chunk);
      else if (auto it = chunks_.find(chunk); it != chunks_.end()) std::memset(it->second.get() + in, 0, n);
      done += n;
    }
  }
  // A flush makes stable what was written before it was issued: it takes the memory of that at its beginning ...
  using Old = std::unordered_map<uint64_t, std::unique_ptr<std::byte[]>>;
  Old begin_flush() { return std::exchange(old_, {}); }
  // ... and gives it back when it failed. What an interval remembered first is the older truth.
  void failed_flush(Old old) {
    for (auto& [sector, bytes] : old) old_[sector] = std::move(bytes);
  }
  void crash(std::mt19937_64& random) {
    std::vector<uint64_t> sectors;  // hash order would not be replayable
    for (auto& [sector, bytes] : old_) sectors.push_back(sector);
    std::sort(sectors.begin(), sectors.end());
    for (uint64_t sector : sectors) {
      if (random() % 2 == 0) continue;
      const auto [chunk, in, n] = piece(sector * kSector, kSector);
      std::memcpy(own(chunk) + in, old_[sector].get(), n);
    }
    old_.clear();
  }
  bool allocated(uint64_t chunk) const { return chunks_.contains(chunk); }
  uint64_t bytes() const { return chunks_.size() * kChunk; }

 private:
  struct Piece {
    uint64_t chunk, in, n;
  };
  static Piece piece(uint64_t offset, uint64_t left) {
    const uint64_t in = offset % kChunk;
    return {offset / kChunk, in, std::min(left, kChunk - in)};
  }
  std::byte* own(uint64_t chunk) {
    auto& p = chunks_[chunk];
    if (!p) p = std::make_unique<std::byte[]>(kChunk);
    return p.get();
  }
  void remember(uint64_t offset, uint64_t length, bool stable) {
    if (!track_) return;
    for (uint64_t s = offset / kSector; s < (offset + length) / kSector; ++s) {
      if (stable) {
        old_.erase(s);
        continue;
      }
      auto& kept = old_[s];
      if (kept) continue;
      kept = std::make_unique<std::byte[]>(kSector);
      const auto [chunk, in, n] = piece(s * kSector, kSector);
      if (auto it = chunks_.find(chunk); it != chunks_.end()) std::memcpy(kept.get(), it->second.get() + in, n);
    }
  }

  std::unordered_map<uint64_t, std::unique_ptr<std::byte[]>> chunks_;
  Old old_;  // sector -> what was stable
  bool track_;
};

// ---- time --------------------------------------------------------------------------------------------------------

struct Arrival {
  Op op;
  uint64_t offset = 0, length = 0;
};

// One actuator. A request that finds it idle is served at once, others queue; whoever ends being served picks the
// next (the cheapest to reach from here and now) and wakes it. Service begins where the last one ended, whatever the
// wake-up took.
class Hdd {
 public:
  Hdd(const SimHdd& m, uint64_t stroke) : m_(m), stroke_(static_cast<double>(std::max<uint64_t>(stroke, 1))) {
    period_ = 60e9 / m.rpm;
    track_bytes_ = m.outer_mb_s * 1e6 * period_ / 1e9;
  }
  struct Request : Waiter {
    Arrival what;
    uint64_t start = 0;
    uint32_t passed = 0;
  };
  // Under the lock. True: begins at `now`. False: it is queued and will be woken with `start` set.
  bool arrive(Request* r, uint64_t now) {
    if (!busy_) {
      busy_ = true;
      r->start = now;
      return true;
    }
    queue_.push_back(r);
    return false;
  }
  // Under the lock: moves the head; the time the request ends.
  uint64_t serve(const Request& r, SimVolume::Counters& c) {
    const uint64_t took = cost(r.what, r.start, &c.positionings);
    c.busy_ns += took;
    if (r.what.op == Op::kRead || r.what.op == Op::kWrite) {
      head_ = r.what.offset + r.what.length;
      last_ = r.what.op;
    }
    return r.start + took;
  }
  // Under the lock, at the end of a service: who is next (to be woken outside the lock), or null.
  Request* next(uint64_t end) {
    if (queue_.empty()) {
      busy_ = false;
      return nullptr;
    }
    const size_t window = m_.reorder ? std::min<size_t>(queue_.size(), std::max(1u, m_.queue_depth)) : 1;
    size_t best = 0;
    if (queue_[0]->passed < kMaxPassed) {
      uint64_t least = UINT64_MAX;
      for (size_t i = 0; i < window; ++i) {
        const uint64_t c = cost(queue_[i]->what, end, nullptr);
        if (c < least) least = c, best = i;
      }
    }
    for (size_t i = 0; i < best; ++i) ++queue_[i]->passed;
    Request* r = queue_[best];
    queue_.erase(queue_.begin() + static_cast<ptrdiff_t>(best));
    r->start = end;
    return r;
  }

 private:
  double rate(uint64_t offset) const {
    const double x = std::min(1.0, static_cast<double>(offset) / stroke_);
    return (m_.outer_mb_s + (m_.inner_mb_s - m_.outer_mb_s) * x) * 1e6 / 1e9;  // bytes per ns
  }
  uint64_t cost(const Arrival& a, uint64_t at, uint64_t* positionings) const {
    double t = m_.command_us * 1e3;
    if (a.op == Op::kFlush) return static_cast<uint64_t>(t + period_);
    if (a.op == Op::kDiscard) return static_cast<uint64_t>(t);
    const double transfer = static_cast<double>(a.length) / rate(a.offset);
    if (a.offset == head_ && a.op == last_) return static_cast<uint64_t>(std::max(t, transfer));
    const bool write = a.op == Op::kWrite;
    const double track = write ? m_.track_write_ms : m_.track_read_ms;
    const double average = write ? m_.seek_write_ms : m_.seek_read_ms;
    const double distance = std::abs(static_cast<double>(a.offset) - static_cast<double>(head_)) / stroke_;
    if (distance * stroke_ >= track_bytes_)
      t += 1e6 * (track + (average - track) * 15.0 / 8.0 * std::sqrt(std::min(1.0, distance)));
    const double angle = std::fmod(static_cast<double>(a.offset), track_bytes_) / track_bytes_;
    const double turned = std::fmod(static_cast<double>(at) + t, period_) / period_;
    t += period_ * (angle >= turned ? angle - turned : angle - turned + 1.0);
    if (positionings != nullptr) ++*positionings;
    return static_cast<uint64_t>(t + transfer);
  }

  SimHdd m_;
  double stroke_, period_ = 0, track_bytes_ = 0;
  bool busy_ = false;
  uint64_t head_ = 0;
  Op last_ = Op::kRead;
  std::vector<Request*> queue_;  // in order of arrival
};

// Parts that work beside each other; each is "free at" a time, so a request's end is known when it arrives.
class Ssd {
 public:
  explicit Ssd(const SimSsd& m) : m_(m), dies_(std::max(1u, m.dies), 0) {}
  uint64_t end_of(const Arrival& a, uint64_t now, SimVolume::Counters& c) {
    const auto bytes = static_cast<double>(a.length);
    switch (a.op) {
      case Op::kRead: {
        const uint64_t unit = uint64_t{std::max(1u, m_.die_kib)} * kKiB;
        uint64_t end = now;
        for (uint64_t at = 0; at < a.length; at += unit) {
          auto die = std::min_element(dies_.begin(), dies_.end());
          const auto took = static_cast<uint64_t>(m_.read_us * 1e3);
          *die = std::max(*die, now) + took;
          const double n = static_cast<double>(std::min(unit, a.length - at));
          link_ = std::max(link_, *die) + static_cast<uint64_t>(n * 1e3 / m_.read_mb_s);
          c.busy_ns += took / dies_.size();
          end = std::max(end, link_);
        }
        return end;
      }
      case Op::kWrite: {
        const auto took = static_cast<uint64_t>(m_.program_us * 1e3 + bytes * 1e3 / m_.write_mb_s);
        program_ = std::max(program_, now) + took;
        c.busy_ns += took;
        return program_ + static_cast<uint64_t>(m_.write_us * 1e3);
      }
      case Op::kFlush: return program_ = std::max(program_, now) + static_cast<uint64_t>(m_.flush_us * 1e3);
      case Op::kDiscard: return std::max(program_, now) + static_cast<uint64_t>(m_.write_us * 1e3);
    }
    return now;
  }

 private:
  SimSsd m_;
  std::vector<uint64_t> dies_;
  uint64_t link_ = 0, program_ = 0;
};

// ---- the volume --------------------------------------------------------------------------------------------------

Geometry geometry_of(const SimOptions& o) {
  Geometry g;
  g.block_size = o.block_size;
  g.physical_block_size = std::max<uint32_t>(o.block_size, 4096);
  g.discard_granularity = static_cast<uint32_t>(4096);
  g.rotational = o.model == "hdd";
  g.read_only = o.read_only;
  return g;
}

class Sim final : public SimVolume {
 public:
  Sim(std::string name, SimOptions o)
      : SimVolume(std::move(name), o.size, geometry_of(o)),
        options_(std::move(o)),
        contents_(options_.volatile_cache),
        random_(options_.seed) {
    if (options_.model == "hdd")
      hdd_ = std::make_unique<Hdd>(options_.hdd, options_.stroke != 0 ? options_.stroke : options_.size);
    else if (options_.model == "ssd")
      ssd_ = std::make_unique<Ssd>(options_.ssd);
    for (auto& f : options_.faults) inject(f);
  }

  std::string_view layer() const override { return "sim"; }
  std::string to_text() const override {
    const Counters c = counters();
    return fmt::format(
        "model: {}\nallocated: {}\nreads: {} ({})\nwrites: {} ({})\nflushes: {}\npositionings: {}\nbusy: {:.3f} s\n"
        "faults: {}\n",
        options_.model, format_size(allocated_bytes()), c.reads, format_size(c.read_bytes), c.writes,
        format_size(c.written_bytes), c.flushes, c.positionings, static_cast<double>(c.busy_ns) / 1e9, c.faults);
  }

  Counters counters() const override {
    Hold hold(lock_);
    return counters_;
  }
  uint64_t allocated_bytes() const override {
    Hold hold(lock_);
    return contents_.bytes();
  }
  uint64_t inject(SimFault fault) override {
    Hold hold(lock_);
    faults_.push_back({next_fault_, 0, 0, fault});
    return next_fault_++;
  }
  void clear(uint64_t id) override {
    Hold hold(lock_);
    std::erase_if(faults_, [id](auto& f) { return f.id == id; });
  }
  void clear_faults() override {
    Hold hold(lock_);
    faults_.clear();
  }
  void release_stuck() override {
    WaiterList all;
    {
      Hold hold(lock_);
      all = stuck_.take();
    }
    all.wake_all();
  }
  void kill() override {
    Hold hold(lock_);
    dead_ = true;
  }
  void revive() override {
    Hold hold(lock_);
    dead_ = false;
  }
  void crash(uint64_t seed) override {
    SPILLWAY_ASSERT(options_.volatile_cache);
    Hold hold(lock_);
    std::mt19937_64 random(seed);
    contents_.crash(random);
  }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    return perform(Op::kRead, offset, iov_length(iov), iov, false);
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    return perform(Op::kWrite, offset, iov_length(iov), iov, ctx.fua);
  }
  Task<Status> do_flush(IoContext) override { return perform(Op::kFlush, 0, 0, {}, false); }
  Task<Status> do_discard(IoContext, uint64_t offset, uint64_t length) override {
    return perform(Op::kDiscard, offset, length, {}, false);
  }
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override {
    std::vector<Extent> all;
    Hold hold(lock_);
    for (uint64_t at = offset; at < offset + length;) {
      const uint64_t end = std::min(offset + length, align_down(at, kChunk) + kChunk);
      const auto kind = contents_.allocated(at / kChunk) ? Extent::Kind::kData : Extent::Kind::kHole;
      if (!all.empty() && all.back().kind == kind) all.back().length += end - at;
      else all.push_back({at, end - at, kind});
      at = end;
    }
    return Task<Result<std::vector<Extent>>>::ready(std::move(all));
  }
  Task<Status> do_resize(uint64_t new_size) override {
    set_size(new_size);
    return Task<Status>::ready();
  }

 private:
  struct Hold {
    explicit Hold(SpinLock& l) : lock(l) { lock.lock(); }
    ~Hold() { lock.unlock(); }
    Hold(const Hold&) = delete;
    SpinLock& lock;
  };
  struct Armed {
    uint64_t id, seen, hits;
    SimFault fault;
  };
  // What the faults do to one request.
  struct Verdict {
    int error = 0;
    bool half = false, stuck = false;
    uint64_t delay_ns = 0;
  };

  // Under the lock.
  Verdict judge(Op op, uint64_t offset, uint64_t length) {
    Verdict v;
    for (auto& a : faults_) {
      const SimFault& f = a.fault;
      if ((f.ops & static_cast<uint8_t>(op)) == 0) continue;
      const uint64_t end = f.length == 0 ? UINT64_MAX : f.offset + f.length;
      if (op != Op::kFlush && (offset >= end || offset + length <= f.offset)) continue;
      if (++a.seen < f.nth) continue;
      if (f.count != 0 && a.hits >= f.count) continue;
      if (f.probability < 1.0 && std::generate_canonical<double, 53>(random_) >= f.probability) continue;
      ++a.hits;
      ++counters_.faults;
      switch (f.kind) {
        case SimFault::Kind::kError: v.error = EIO; break;
        case SimFault::Kind::kNoSpace: v.error = ENOSPC; break;
        case SimFault::Kind::kShort: v.error = EIO, v.half = true; break;
        case SimFault::Kind::kDelay: v.delay_ns += f.delay_ns; break;
        case SimFault::Kind::kStuck: v.stuck = true; break;
      }
    }
    if (dead_) v.error = EIO, v.half = false;
    return v;
  }
  void count(Op op, uint64_t length) {
    switch (op) {
      case Op::kRead: ++counters_.reads, counters_.read_bytes += length; break;
      case Op::kWrite: ++counters_.writes, counters_.written_bytes += length; break;
      case Op::kFlush: ++counters_.flushes; break;
      case Op::kDiscard: ++counters_.discards; break;
    }
  }

  struct Stuck : Waiter {
    explicit Stuck(Sim& s) : sim(s) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) {
      handle = h;
      reactor = &Reactor::current();
      Hold hold(sim.lock_);
      sim.stuck_.push(this);
    }
    void await_resume() const noexcept {}
    Sim& sim;
  };
  // Waits for the actuator.
  struct Turn : Hdd::Request {
    explicit Turn(Sim& s) : sim(s) {}
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h) {
      handle = h;
      reactor = &Reactor::current();
      Hold hold(sim.lock_);
      return !sim.hdd_->arrive(this, reactor->now_ns());
    }
    void await_resume() const noexcept {}
    Sim& sim;
  };

  Task<Status> perform(Op op, uint64_t offset, uint64_t length, Iov iov, bool fua) {
    Reactor& reactor = Reactor::current();
    Verdict v;
    Contents::Old flushed;
    {
      Hold hold(lock_);
      count(op, length);
      v = judge(op, offset, length);
      if (op == Op::kFlush) flushed = contents_.begin_flush();
    }
    if (v.stuck) {
      Stuck stuck(*this);
      co_await stuck;
    }
    const uint64_t extra = v.delay_ns + ns(options_.delay_ms);
    if (hdd_) {
      Turn turn(*this);
      turn.what = {op, offset, length};
      co_await turn;
      uint64_t end = 0;
      {
        Hold hold(lock_);
        end = hdd_->serve(turn, counters_);
      }
      co_await reactor.sleep_until(end);
      Hdd::Request* next = nullptr;
      {
        Hold hold(lock_);
        next = hdd_->next(end);
      }
      if (next != nullptr) next->wake();
      if (extra > 0) co_await reactor.sleep_for(extra);
    } else if (ssd_) {
      uint64_t end = 0;
      {
        Hold hold(lock_);
        end = ssd_->end_of({op, offset, length}, reactor.now_ns(), counters_);
      }
      co_await reactor.sleep_until(end + extra);
    } else if (extra > 0) {
      co_await reactor.sleep_for(extra);
    }
    co_return finish(op, offset, length, iov, fua, v, std::move(flushed));
  }

  Status finish(Op op, uint64_t offset, uint64_t length, Iov iov, bool fua, const Verdict& v,
                Contents::Old flushed) {
    Hold hold(lock_);
    const int error = dead_ ? EIO : v.error;
    const uint64_t moved = error == 0 ? length : v.half && !dead_ ? align_down(length / 2, kSector) : 0;
    switch (op) {
      case Op::kRead: contents_.read(offset, iov, moved); break;
      case Op::kWrite: contents_.write(offset, iov, moved, fua && error == 0); break;
      case Op::kDiscard: contents_.zero(offset, moved); break;
      case Op::kFlush:
        if (error != 0) contents_.failed_flush(std::move(flushed));
        break;
    }
    if (error == 0) return {};
    static constexpr const char* kNames[] = {"read", "write", "flush", "discard"};
    return fail_errno(error, fmt::format("sim {}: {} {} at {}", name(),
                                         kNames[std::countr_zero(static_cast<unsigned>(op))], length, offset));
  }

  const SimOptions options_;
  mutable SpinLock lock_;
  // Under lock_:
  Contents contents_;
  std::unique_ptr<Hdd> hdd_;
  std::unique_ptr<Ssd> ssd_;
  std::mt19937_64 random_;
  std::vector<Armed> faults_;
  WaiterList stuck_;
  Counters counters_;
  uint64_t next_fault_ = 1;
  bool dead_ = false;
};

Status check(const std::string& name, const SimOptions& o) {
  auto bad = [&](std::string what) { return fail(ErrorKind::kInvalid, fmt::format("sim {}: {}", name, what)); };
  if (o.model != "hdd" && o.model != "ssd" && o.model != "null")
    return bad(fmt::format("model \"{}\": hdd, ssd or null", o.model));
  if (o.block_size < 512 || o.block_size > 4096 || (o.block_size & (o.block_size - 1)) != 0)
    return bad(fmt::format("block_size {}: 512, 1024, 2048 or 4096", o.block_size));
  if (o.size == 0 || !is_aligned(o.size, o.block_size))
    return bad(fmt::format("size {}: not whole blocks of {}", o.size, o.block_size));
  if (o.stroke != 0 && o.stroke < o.size) return bad(fmt::format("stroke {}: less than size", o.stroke));
  if (o.delay_ms < 0 || o.delay_ms > 1e6) return bad(fmt::format("delay_ms {}: 0 to 1000000", o.delay_ms));
  const SimHdd& h = o.hdd;
  if (!(h.rpm > 0 && h.outer_mb_s > 0 && h.inner_mb_s > 0 && h.track_read_ms >= 0 && h.track_write_ms >= 0 &&
        h.seek_read_ms >= h.track_read_ms && h.seek_write_ms >= h.track_write_ms && h.command_us >= 0))
    return bad("hdd: a figure is out of range");
  const SimSsd& s = o.ssd;
  if (!(s.read_us >= 0 && s.write_us >= 0 && s.program_us >= 0 && s.flush_us >= 0 && s.read_mb_s > 0 &&
        s.write_mb_s > 0))
    return bad("ssd: a figure is out of range");
  return {};
}

template <class T>
bool number(std::string_view text, T& out) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc{} && end == text.data() + text.size();
}

bool duration(std::string_view text, uint64_t& out) {
  double value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || !(value >= 0) || value > 1e9) return false;
  const std::string_view unit = text.substr(static_cast<size_t>(end - text.data()));
  if (unit == "us") out = static_cast<uint64_t>(value * 1e3);
  else if (unit == "ms") out = static_cast<uint64_t>(value * 1e6);
  else if (unit == "s") out = static_cast<uint64_t>(value * 1e9);
  else return false;
  return true;
}

bool fault_word(std::string_view w, SimFault& f) {
  using Kind = SimFault::Kind;
  static constexpr std::pair<std::string_view, uint8_t> kOps[] = {
      {"read", SimFault::kRead}, {"write", SimFault::kWrite}, {"flush", SimFault::kFlush},
      {"discard", SimFault::kDiscard}, {"any", SimFault::kAny}};
  for (auto& [name, mask] : kOps)
    if (w == name) return f.ops = mask, true;
  static constexpr std::pair<std::string_view, Kind> kKinds[] = {
      {"error", Kind::kError}, {"enospc", Kind::kNoSpace}, {"short", Kind::kShort}, {"stuck", Kind::kStuck}};
  for (auto& [name, kind] : kKinds)
    if (w == name) return f.kind = kind, true;
  if (w.starts_with("delay=")) return f.kind = Kind::kDelay, duration(w.substr(6), f.delay_ns);
  if (w.starts_with("nth=")) return number(w.substr(4), f.nth);
  if (w.starts_with("count=")) return number(w.substr(6), f.count);
  if (w.starts_with("p=")) return number(w.substr(2), f.probability) && f.probability >= 0 && f.probability <= 1;
  const size_t plus = w.find('+');
  if (plus == std::string_view::npos) return false;
  auto offset = parse_size(w.substr(0, plus)), length = parse_size(w.substr(plus + 1));
  if (!offset || !length || *length == 0 || *offset > UINT64_MAX - *length) return false;
  f.offset = *offset;
  f.length = *length;
  return true;
}

}  // namespace

Result<SimFault> parse_sim_fault(std::string_view text) {
  SimFault f;
  size_t words = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = text.find_first_not_of(' ', at);
    if (begin == std::string_view::npos) break;
    at = std::min(text.find(' ', begin), text.size());
    const std::string_view word = text.substr(begin, at - begin);
    if (!fault_word(word, f))
      return fail(ErrorKind::kInvalid, fmt::format("sim fault \"{}\": \"{}\" is not understood", text, word));
    ++words;
  }
  if (words == 0) return fail(ErrorKind::kInvalid, "sim fault: empty");
  return f;
}

Result<std::shared_ptr<SimVolume>> make_sim_volume(std::string name, SimOptions options) {
  SPILLWAY_CHECK(check(name, options));
  return std::make_shared<Sim>(std::move(name), std::move(options));
}

Result<VolumePtr> make_sim(std::string name, SimOptions options) {
  SPILLWAY_TRY(auto sim, make_sim_volume(std::move(name), std::move(options)));
  return VolumePtr(std::move(sim));
}

}  // namespace spillway
