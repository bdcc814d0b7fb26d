// Pressure sources. Each is a small state machine around one descriptor or one file; see pressure.h for
// what they mean. Kernel interfaces: Documentation/accounting/psi.rst, admin-guide/cgroup-v1/memory.rst
// (event_control, pressure_level), admin-guide/cgroup-v2.rst (memory.events).
#include "spillway/reclaim/pressure.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "src/reclaim/internal.h"
#include "src/reclaim/pressure_file.h"

namespace spillway::reclaim {

std::string_view to_string(PressureLevel l) noexcept {
  static constexpr std::string_view names[] = {"none", "low", "medium", "critical"};
  return names[static_cast<std::size_t>(l) % 4];
}

// ---------------------------------------------------------------- files

UniqueFd& UniqueFd::operator=(UniqueFd&& o) noexcept {
  if (this != &o) {
    reset();
    fd_ = std::exchange(o.fd_, -1);
  }
  return *this;
}
void UniqueFd::reset() noexcept {
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

std::optional<std::string> read_text(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) return std::nullopt;
  std::string out;
  char buf[4096];
  for (;;) {
    const ssize_t n = ::read(fd.get(), buf, sizeof buf);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return std::nullopt;
    if (n == 0) return out;
    out.append(buf, static_cast<std::size_t>(n));
    if (out.size() > (1u << 20)) return std::nullopt;
  }
}

std::optional<std::uint64_t> field_of(std::string_view text, std::string_view key) {
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = text.find('\n', at);
    if (end == text.npos) end = text.size();
    const std::string_view line = text.substr(at, end - at);
    at = end + 1;
    const std::size_t pos = line.find(key);
    if (pos == line.npos || (pos != 0 && line[pos - 1] != ' ')) continue;
    std::size_t i = pos + key.size();
    if (i >= line.size() || (line[i] != ':' && line[i] != ' ')) continue;
    while (i < line.size() && (line[i] == ':' || line[i] == ' ')) ++i;
    if (i >= line.size() || line[i] < '0' || line[i] > '9') continue;
    std::uint64_t v = 0;
    for (; i < line.size() && line[i] >= '0' && line[i] <= '9'; ++i) v = v * 10 + static_cast<std::uint64_t>(line[i] - '0');
    return line.find(" kB", i) == i ? v * 1024 : v;
  }
  return std::nullopt;
}

std::optional<std::uint64_t> number_of(const std::string& path) {
  const auto t = read_text(path);
  if (!t || t->empty()) return std::nullopt;
  if (t->rfind("max", 0) == 0) return kUnlimited;
  char* end = nullptr;
  const unsigned long long v = std::strtoull(t->c_str(), &end, 10);
  if (end == t->c_str()) return std::nullopt;
  return v;
}

std::optional<std::string> base64_decode(std::string_view in) {
  std::string out;
  std::uint32_t acc = 0;
  int bits = 0;
  std::size_t pad = 0;
  for (const char c : in) {
    int v;
    if (c >= 'A' && c <= 'Z') v = c - 'A';
    else if (c >= 'a' && c <= 'z') v = c - 'a' + 26;
    else if (c >= '0' && c <= '9') v = c - '0' + 52;
    else if (c == '+') v = 62;
    else if (c == '/') v = 63;
    else if (c == '=') {
      ++pad;
      continue;
    } else if (c == '\n' || c == ' ') continue;
    else return std::nullopt;
    if (pad != 0) return std::nullopt;
    acc = acc << 6 | static_cast<std::uint32_t>(v);
    bits += 6;
    if (bits >= 8) {
      bits -= 8;
      out.push_back(static_cast<char>(acc >> bits & 0xff));
    }
  }
  if (pad > 2 || bits >= 6) return std::nullopt;
  return out;
}

namespace {

SourceResult fail(Errc e, std::string why) {
  SourceResult r;
  r.error = e;
  r.why = std::move(why);
  return r;
}
SourceResult fail_errno(const std::string& what) {
  const int e = errno;
  return fail(e == ENOENT || e == EOPNOTSUPP || e == ENOTSUP ? Errc::kUnsupported : Errc::kIo,
              what + ": " + std::strerror(e));
}
template <class S, class... A>
SourceResult made(A&&... a) {
  SourceResult r;
  r.source = std::make_unique<S>(std::forward<A>(a)...);
  return r;
}

bool write_all(int fd, std::string_view s) {
  while (!s.empty()) {
    const ssize_t n = ::write(fd, s.data(), s.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    s.remove_prefix(static_cast<std::size_t>(n));
  }
  return true;
}

std::string mib(std::uint64_t b) {
  return b == kUnlimited ? "unlimited" : std::to_string(b >> 20) + " MiB";
}

// ---------------------------------------------------------------- PSI

// The kernel keeps the trigger as long as the descriptor lives and reports it as POLLPRI, at most once
// per window. POLLERR: the cgroup is gone.
class PsiSource final : public PressureSource {
 public:
  PsiSource(UniqueFd fd, std::string path, std::string trigger)
      : fd_(std::move(fd)), path_(std::move(path)), trigger_(std::move(trigger)) {}
  std::string_view kind() const noexcept override { return "psi"; }
  std::string describe() const override { return path_ + " (" + trigger_ + ")"; }
  int fd() const noexcept override { return fd_.get(); }
  std::uint32_t poll_events() const noexcept override { return POLLPRI; }
  bool failed() const noexcept override { return failed_; }
  std::optional<PressureEvent> on_ready(TimePoint, std::uint32_t revents) override {
    if ((revents & POLLERR) != 0) {
      failed_ = true;
      return std::nullopt;
    }
    if ((revents & POLLPRI) == 0) return std::nullopt;
    PressureEvent e;
    e.level = trigger_.rfind("full", 0) == 0 ? PressureLevel::kCritical : PressureLevel::kMedium;
    e.text = "stall over " + trigger_;
    return e;
  }

 private:
  UniqueFd fd_;
  std::string path_, trigger_;
  bool failed_ = false;
};

// ---------------------------------------------------------------- cgroup v1

std::optional<std::uint64_t> v1_usage(const std::string& dir) {
  const auto usage = number_of(dir + "/memory.usage_in_bytes");
  const auto stat = read_text(dir + "/memory.stat");
  if (!usage || !stat) return std::nullopt;
  // Page cache that nobody uses is not pressure: the kernel takes it first.
  const auto inactive = field_of(*stat, "total_inactive_file").value_or(0);
  return *usage > inactive ? *usage - inactive : 0;
}

SourceResult v1_register(const std::string& dir, const std::string& file, const std::string& arg,
                         UniqueFd& event, UniqueFd& watched) {
  event = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (event.get() < 0) return fail_errno("eventfd");
  watched = UniqueFd(::open((dir + "/" + file).c_str(), O_RDONLY | O_CLOEXEC));
  if (watched.get() < 0) return fail_errno(dir + "/" + file);
  UniqueFd control(::open((dir + "/cgroup.event_control").c_str(), O_WRONLY | O_CLOEXEC));
  if (control.get() < 0) return fail_errno(dir + "/cgroup.event_control");
  const std::string line =
      std::to_string(event.get()) + " " + std::to_string(watched.get()) + (arg.empty() ? "" : " " + arg);
  if (!write_all(control.get(), line)) return fail_errno(dir + "/cgroup.event_control");
  return {};
}

class CgroupV1Source final : public PressureSource {
 public:
  CgroupV1Source(UniqueFd event, UniqueFd watched, std::string dir, std::string level,
                 std::uint64_t threshold, std::uint64_t headroom)
      : event_(std::move(event)),
        watched_(std::move(watched)),
        dir_(std::move(dir)),
        level_(std::move(level)),
        threshold_(threshold),
        headroom_(headroom) {}
  std::string_view kind() const noexcept override {
    return threshold_ == 0 ? "cgroup-v1-pressure" : "cgroup-v1-threshold";
  }
  std::string describe() const override {
    return dir_ + (threshold_ == 0 ? " level " + level_ : " threshold " + mib(threshold_));
  }
  int fd() const noexcept override { return event_.get(); }
  std::uint32_t poll_events() const noexcept override { return POLLIN; }
  bool failed() const noexcept override { return failed_; }
  std::optional<PressureEvent> on_ready(TimePoint, std::uint32_t) override {
    std::uint64_t n = 0;
    if (::read(event_.get(), &n, sizeof n) != sizeof n || n == 0) return std::nullopt;
    if (::access(dir_.c_str(), F_OK) != 0) {  // removing the cgroup signals the eventfd too
      failed_ = true;
      return std::nullopt;
    }
    PressureEvent e;
    if (threshold_ != 0) {
      const auto usage = v1_usage(dir_);
      const std::uint64_t goal = threshold_ - std::min(threshold_, headroom_);
      if (!usage || *usage <= goal) return std::nullopt;  // crossed downwards, or page cache only
      e.target_bytes = *usage - goal;
      e.level = *usage > threshold_ ? PressureLevel::kMedium : PressureLevel::kLow;
      e.text = "usage " + mib(*usage) + " over " + mib(threshold_);
    } else {
      e.level = level_ == "critical" ? PressureLevel::kCritical
                : level_ == "medium" ? PressureLevel::kMedium
                                     : PressureLevel::kLow;
      e.text = "pressure level " + level_;
    }
    return e;
  }

 private:
  UniqueFd event_, watched_;
  std::string dir_, level_;
  std::uint64_t threshold_, headroom_;
  bool failed_ = false;
};

// ---------------------------------------------------------------- cgroup v2

class CgroupV2Source final : public PressureSource {
 public:
  CgroupV2Source(UniqueFd fd, std::string dir, std::uint64_t headroom)
      : fd_(std::move(fd)), dir_(std::move(dir)), headroom_(headroom) {
    changed();
  }
  std::string_view kind() const noexcept override { return "cgroup-v2-events"; }
  std::string describe() const override { return dir_ + "/memory.events"; }
  int fd() const noexcept override { return fd_.get(); }
  std::uint32_t poll_events() const noexcept override { return POLLIN; }
  bool failed() const noexcept override { return failed_; }
  std::optional<PressureEvent> on_ready(TimePoint, std::uint32_t) override {
    alignas(inotify_event) char buf[4096];
    for (;;) {
      const ssize_t n = ::read(fd_.get(), buf, sizeof buf);
      if (n <= 0) break;
    }
    if (::access(dir_.c_str(), F_OK) != 0) {
      failed_ = true;
      return std::nullopt;
    }
    const PressureLevel level = changed();
    if (level == PressureLevel::kNone) return std::nullopt;
    PressureEvent e;
    e.level = level;
    const auto high = number_of(dir_ + "/memory.high").value_or(kUnlimited);
    const auto max = number_of(dir_ + "/memory.max").value_or(kUnlimited);
    const auto current = number_of(dir_ + "/memory.current");
    const auto stat = read_text(dir_ + "/memory.stat");
    if (current && stat) {
      const std::uint64_t inactive = field_of(*stat, "inactive_file").value_or(0);
      const std::uint64_t used = *current > inactive ? *current - inactive : 0;
      const std::uint64_t limit = std::min(high, max);
      if (limit != kUnlimited) {
        const std::uint64_t goal = limit - std::min(limit, headroom_);
        if (used > goal) e.target_bytes = used - goal;
      }
      e.text = "used " + mib(used) + " of " + mib(limit);
    }
    return e;
  }

 private:
  // Which counters moved since the last look; the worst decides.
  PressureLevel changed() {
    const auto text = read_text(dir_ + "/memory.events");
    if (!text) return PressureLevel::kNone;
    static constexpr std::string_view keys[] = {"low", "high", "max", "oom"};
    static constexpr PressureLevel levels[] = {PressureLevel::kLow, PressureLevel::kMedium,
                                               PressureLevel::kCritical, PressureLevel::kCritical};
    PressureLevel worst = PressureLevel::kNone;
    for (std::size_t i = 0; i < 4; ++i) {
      const std::uint64_t v = field_of(*text, keys[i]).value_or(0);
      if (v != std::exchange(seen_[i], v)) worst = std::max(worst, levels[i]);
    }
    return worst;
  }
  UniqueFd fd_;
  std::string dir_;
  std::uint64_t headroom_;
  std::array<std::uint64_t, 4> seen_{};
  bool failed_ = false;
};

// ---------------------------------------------------------------- meminfo

class AvailableSource final : public PressureSource {
 public:
  AvailableSource(Clock& clock, int node, std::uint64_t low, std::uint64_t high, Nanoseconds interval,
                  std::string path)
      : node_(node), low_(low), high_(high), interval_(interval), path_(std::move(path)), next_(clock.now()) {}
  std::string_view kind() const noexcept override {
    return node_ == kAnyNode ? "mem-available" : "node-available";
  }
  std::string describe() const override {
    return path_ + " below " + mib(low_) + ", back to " + mib(high_);
  }
  std::uint32_t poll_events() const noexcept override { return 0; }
  TimePoint next_timer() const noexcept override { return next_; }
  bool failed() const noexcept override { return failed_; }
  std::optional<PressureEvent> on_ready(TimePoint now, std::uint32_t) override {
    if (now < next_) return std::nullopt;
    next_ = now + interval_;
    const auto text = read_text(path_);
    const auto available = text ? available_in(*text) : std::nullopt;
    if (!available) {
      failed_ = true;
      return std::nullopt;
    }
    // Hysteresis: from low up to high; between the two nothing starts.
    if (*available >= high_) below_ = false;
    if (*available < low_) below_ = true;
    if (!below_ || *available >= high_) return std::nullopt;
    PressureEvent e;
    e.level = *available < low_ / 2 ? PressureLevel::kCritical
              : *available < low_   ? PressureLevel::kMedium
                                    : PressureLevel::kLow;
    e.target_bytes = high_ - *available;
    e.node = node_;
    e.text = "available " + mib(*available);
    return e;
  }

 private:
  std::optional<std::uint64_t> available_in(const std::string& text) const {
    if (node_ == kAnyNode) return field_of(text, "MemAvailable");
    const auto free = field_of(text, "MemFree"), active = field_of(text, "Active(file)"),
               inactive = field_of(text, "Inactive(file)");
    if (!free) return std::nullopt;
    return *free + active.value_or(0) / 2 + inactive.value_or(0);
  }
  int node_;
  std::uint64_t low_, high_;
  Nanoseconds interval_;
  std::string path_;
  TimePoint next_;
  bool below_ = false, failed_ = false;
};

// ---------------------------------------------------------------- systemd's protocol

// FIFO or stream socket: whoever writes, asks; what is read is thrown away. End of file on a socket ends
// the source; a FIFO is opened for reading and writing, so it has no end.
class StreamSource final : public PressureSource {
 public:
  StreamSource(UniqueFd fd, std::string path, bool fifo) : fd_(std::move(fd)), path_(std::move(path)), fifo_(fifo) {}
  std::string_view kind() const noexcept override { return fifo_ ? "watch-fifo" : "watch-socket"; }
  std::string describe() const override { return path_; }
  int fd() const noexcept override { return fd_.get(); }
  std::uint32_t poll_events() const noexcept override { return POLLIN; }
  bool failed() const noexcept override { return failed_; }
  std::optional<PressureEvent> on_ready(TimePoint, std::uint32_t) override {
    char buf[4096];
    bool any = false;
    for (int i = 0; i < 64; ++i) {
      const ssize_t n = ::read(fd_.get(), buf, sizeof buf);
      if (n > 0) {
        any = true;
        continue;
      }
      if (n < 0 && errno == EINTR) continue;
      if (n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) failed_ = true;
      break;
    }
    if (!any) return std::nullopt;
    PressureEvent e;
    e.level = PressureLevel::kMedium;
    e.text = "asked through " + path_;
    return e;
  }

 private:
  UniqueFd fd_;
  std::string path_;
  bool fifo_, failed_ = false;
};

// ---------------------------------------------------------------- own limit

class GroupLimitSource final : public PressureSource {
 public:
  GroupLimitSource(UniqueFd fd, GroupRef g) : fd_(std::move(fd)), group_(std::move(g)) {
    GroupAccess::state(*group_).high_fd.store(fd_.get());
  }
  ~GroupLimitSource() override {
    // A charger may have read the descriptor already: it is closed after it has left RCU.
    GroupAccess::state(*group_).high_fd.store(-1);
    rcu_synchronize();
  }
  std::string_view kind() const noexcept override { return "group-limit"; }
  std::string describe() const override { return group_->path() + " high"; }
  int fd() const noexcept override { return fd_.get(); }
  std::uint32_t poll_events() const noexcept override { return POLLIN; }
  std::optional<PressureEvent> on_ready(TimePoint, std::uint32_t) override {
    std::uint64_t n = 0;
    if (::read(fd_.get(), &n, sizeof n) != sizeof n) return std::nullopt;
    const std::uint64_t high = group_->limits().high, usage = group_->usage();
    if (usage <= high) return std::nullopt;
    PressureEvent e;
    e.level = PressureLevel::kMedium;
    e.target_bytes = usage - high;
    e.group = group_.get();
    e.text = group_->path() + " over high";
    return e;
  }

 private:
  UniqueFd fd_;
  GroupRef group_;
};

}  // namespace

// ---------------------------------------------------------------- makers

SourceResult open_psi(const std::string& path, std::string_view trigger) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC));
  if (fd.get() < 0) return fail_errno(path);
  const std::string t(trigger);
  // The kernel wants the terminating zero in the same write.
  if (::write(fd.get(), t.c_str(), t.size() + 1) < 0) return fail_errno(path + ", trigger \"" + t + "\"");
  return made<PsiSource>(std::move(fd), path, t);
}

SourceResult open_cgroup_v1_pressure(const std::string& dir, std::string_view level) {
  UniqueFd event, watched;
  SourceResult r = v1_register(dir, "memory.pressure_level", std::string(level), event, watched);
  if (r.error != Errc::kOk) return r;
  return made<CgroupV1Source>(std::move(event), std::move(watched), dir, std::string(level), 0u, 0u);
}

SourceResult open_cgroup_v1_threshold(const std::string& dir, std::uint64_t threshold, std::uint64_t headroom) {
  if (threshold == 0) return fail(Errc::kInvalid, "threshold 0");
  UniqueFd event, watched;
  SourceResult r = v1_register(dir, "memory.usage_in_bytes", std::to_string(threshold), event, watched);
  if (r.error != Errc::kOk) return r;
  return made<CgroupV1Source>(std::move(event), std::move(watched), dir, std::string(), threshold, headroom);
}

SourceResult open_cgroup_v2_events(const std::string& dir, std::uint64_t headroom) {
  const std::string file = dir + "/memory.events";
  if (::access(file.c_str(), R_OK) != 0) return fail_errno(file);
  UniqueFd fd(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  if (fd.get() < 0) return fail_errno("inotify");
  if (::inotify_add_watch(fd.get(), file.c_str(), IN_MODIFY) < 0) return fail_errno(file);
  // A cgroup that is removed tells its own watchers nothing; its parent's are told (seen on Linux 6.1).
  const std::size_t slash = dir.find_last_of('/', dir.find_last_not_of('/'));
  if (slash != dir.npos && slash != 0) ::inotify_add_watch(fd.get(), dir.substr(0, slash).c_str(), IN_DELETE | IN_ONLYDIR);
  return made<CgroupV2Source>(std::move(fd), dir, headroom);
}

SourceResult open_mem_available(Clock& clock, std::uint64_t low, std::uint64_t high, Nanoseconds interval,
                                const std::string& meminfo) {
  if (low > high || interval.count() <= 0) return fail(Errc::kInvalid, "low above high, or no interval");
  const auto text = read_text(meminfo);
  if (!text || !field_of(*text, "MemAvailable")) return fail(Errc::kUnsupported, meminfo + ": no MemAvailable");
  return made<AvailableSource>(clock, kAnyNode, low, high, interval, meminfo);
}

SourceResult open_node_available(Clock& clock, int node, std::uint64_t low, std::uint64_t high,
                                 Nanoseconds interval, const std::string& meminfo) {
  if (low > high || interval.count() <= 0 || node < 0) return fail(Errc::kInvalid, "bad watermarks");
  const std::string path =
      meminfo.empty() ? "/sys/devices/system/node/node" + std::to_string(node) + "/meminfo" : meminfo;
  const auto text = read_text(path);
  if (!text || !field_of(*text, "MemFree")) return fail(Errc::kUnsupported, path + ": no MemFree");
  return made<AvailableSource>(clock, node, low, high, interval, path);
}

SourceResult open_memory_pressure_env() {
  const char* watch = std::getenv("MEMORY_PRESSURE_WATCH");
  const char* write = std::getenv("MEMORY_PRESSURE_WRITE");
  if (watch == nullptr || *watch == 0) return fail(Errc::kUnsupported, "MEMORY_PRESSURE_WATCH is not set");
  return open_memory_pressure(watch, write != nullptr ? write : "");
}

SourceResult open_memory_pressure(const std::string& watch, const std::string& write_base64) {
  if (watch == "/dev/null") return fail(Errc::kUnsupported, "MEMORY_PRESSURE_WATCH says off");
  const auto payload = base64_decode(write_base64);
  if (!payload) return fail(Errc::kInvalid, "MEMORY_PRESSURE_WRITE is not base64");
  if (watch.empty() || watch[0] != '/') return fail(Errc::kInvalid, "MEMORY_PRESSURE_WATCH is no absolute path");
  struct stat st {};
  if (::stat(watch.c_str(), &st) != 0) return fail_errno(watch);
  if (S_ISREG(st.st_mode)) {
    std::string trigger = payload->empty() ? "some 200000 2000000" : *payload;
    while (!trigger.empty() && trigger.back() == '\0') trigger.pop_back();
    return open_psi(watch, trigger);
  }
  UniqueFd fd;
  if (S_ISFIFO(st.st_mode)) {
    fd = UniqueFd(::open(watch.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC));
    if (fd.get() < 0) return fail_errno(watch);
    // The protocol writes to the other side; a FIFO opened both ways would read it back, so it is
    // written only where somebody else is: to sockets. Nothing is lost, FIFO writers ignore it.
  } else if (S_ISSOCK(st.st_mode)) {
    sockaddr_un addr{};
    addr.sun_family = AF_UNIX;
    if (watch.size() >= sizeof addr.sun_path) return fail(Errc::kInvalid, watch + ": too long for a socket");
    std::memcpy(addr.sun_path, watch.c_str(), watch.size() + 1);
    fd = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (fd.get() < 0) return fail_errno("socket");
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&addr), sizeof addr) != 0) return fail_errno(watch);
    if (!payload->empty() && ::send(fd.get(), payload->data(), payload->size(), MSG_NOSIGNAL) < 0) {
      return fail_errno(watch);
    }
    ::fcntl(fd.get(), F_SETFL, O_NONBLOCK);
  } else {
    return fail(Errc::kUnsupported, watch + ": neither PSI file, FIFO nor socket");
  }
  return made<StreamSource>(std::move(fd), watch, S_ISFIFO(st.st_mode));
}

SourceResult open_group_limit(GroupRef group) {
  if (!group) return fail(Errc::kInvalid, "no group");
  if (GroupAccess::state(*group).high_fd.load() >= 0) return fail(Errc::kState, "the group is watched already");
  UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (fd.get() < 0) return fail_errno("eventfd");
  return made<GroupLimitSource>(std::move(fd), std::move(group));
}

// ---------------------------------------------------------------- grow-back

GrowthGovernor::GrowthGovernor(const Options& o, TimePoint now) noexcept
    : o_(o), limit_(o.ceiling_bytes), hold_(o.hold), last_pressure_(now), last_growth_(now) {}

// A cut: to what is used now less what is to be given back. `hold` doubles when the limit had grown
// since the last pressure and it came back within four holds after that growth began.
void GrowthGovernor::on_pressure(TimePoint now, std::uint64_t usage, std::uint64_t give_back) noexcept {
  limit(now);
  if (grew_ && now - last_pressure_ < 4 * hold_) hold_ = std::min(2 * hold_, o_.hold_max);
  const std::uint64_t from = std::min(usage, limit_);
  limit_ = std::max(o_.floor_bytes, from > give_back ? from - give_back : 0);
  last_pressure_ = last_growth_ = now;
  grew_ = false;
}

std::uint64_t GrowthGovernor::limit(TimePoint now) noexcept {
  if (now - last_pressure_ < hold_) {
    last_growth_ = now;
    return limit_;
  }
  const TimePoint from = std::max(last_growth_, last_pressure_ + hold_);
  if (now > from && limit_ < o_.ceiling_bytes) {
    const auto grown = static_cast<unsigned __int128>((now - from).count()) * o_.rate_bytes_per_s / 1'000'000'000;
    if (grown == 0) return limit_;
    limit_ = grown > o_.ceiling_bytes - limit_ ? o_.ceiling_bytes : limit_ + static_cast<std::uint64_t>(grown);
    grew_ = true;
  }
  last_growth_ = now;
  // A calm of eight holds: the hold may shrink again.
  if (hold_ > o_.hold && now - last_pressure_ > 8 * hold_) {
    hold_ = std::max(o_.hold, hold_ / 2);
    last_pressure_ = now - hold_;
  }
  return limit_;
}

}  // namespace spillway::reclaim
