// PressureMonitor: sources in, reclaim out. One thread at a time runs it: an event loop's, or its own.
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>

#include "spillway/reclaim/pressure.h"
#include "src/reclaim/pressure_file.h"

namespace spillway::reclaim {

struct PressureMonitor::Impl {
  Registry& registry;
  MonitorOptions opt;
  UniqueFd epoll, stop_fd;
  struct Entry {
    SourcePtr source;
    SourceStatus status;
    TimePoint quiet_until{};
    PressureEvent held;       // what came while quiet; acted on at quiet_until
    bool has_held = false;
  };
  mutable std::mutex m;  // guards entries against status(); only the runner changes them
  std::vector<std::unique_ptr<Entry>> entries;
  std::thread thread;

  Impl(Registry& r, MonitorOptions o)
      : registry(r),
        opt(std::move(o)),
        epoll(::epoll_create1(EPOLL_CLOEXEC)),
        stop_fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (epoll.get() < 0 || stop_fd.get() < 0) throw std::system_error(errno, std::generic_category(), "epoll");
  }

  void drop(Entry& e) {
    std::lock_guard lock(m);
    if (e.source->fd() >= 0) ::epoll_ctl(epoll.get(), EPOLL_CTL_DEL, e.source->fd(), nullptr);
    e.status.active = false;
    e.status.text += " (gone)";
    e.source.reset();
  }

  void act(const PressureEvent& e) {
    if (opt.on_event && !opt.on_event(e)) return;
    std::uint64_t target = e.target_bytes;
    if (target == 0) {
      target = opt.step_bytes << (e.level == PressureLevel::kCritical ? 4 : e.level == PressureLevel::kMedium ? 2 : 0);
    }
    if (opt.synchronous || e.group != nullptr) {
      ReclaimRequest r;
      r.group = e.group;
      r.node = e.node;
      r.reason = Reason::kPressure;
      r.target_bytes = target;
      registry.reclaim(r);
    } else {
      registry.request_background(e.node, target, Reason::kPressure);
    }
  }

  int handle(Entry& e, std::uint32_t revents, TimePoint now) {
    auto event = e.source->on_ready(now, revents);
    if (e.source->failed()) {
      drop(e);
    }
    if (event) {
      {
        std::lock_guard lock(m);
        ++e.status.events;
      }
      if (now < e.quiet_until) {
        // Too soon: remember the worst, react when the time has come.
        if (!e.has_held || event->level > e.held.level || event->target_bytes > e.held.target_bytes) e.held = *event;
        e.has_held = true;
        return 1;
      }
      e.quiet_until = now + opt.min_interval;
      act(*event);
      return 1;
    }
    return 0;
  }
};

PressureMonitor::PressureMonitor(Registry& r, MonitorOptions o) : impl_(std::make_unique<Impl>(r, std::move(o))) {}
PressureMonitor::~PressureMonitor() { stop_thread(); }

Errc PressureMonitor::add(SourceResult r) {
  auto e = std::make_unique<Impl::Entry>();
  if (!r) {
    e->status = {"unavailable", r.why, false, 0};
  } else {
    e->status = {std::string(r.source->kind()), r.source->describe(), true, 0};
    e->source = std::move(r.source);
    if (e->source->fd() >= 0) {
      epoll_event ev{};
      ev.events = ((e->source->poll_events() & POLLIN) != 0 ? EPOLLIN : 0u) |
                  ((e->source->poll_events() & POLLPRI) != 0 ? EPOLLPRI : 0u);
      ev.data.ptr = e.get();
      if (::epoll_ctl(impl_->epoll.get(), EPOLL_CTL_ADD, e->source->fd(), &ev) != 0) {
        e->status.active = false;
        e->status.text += std::string(": epoll: ") + std::strerror(errno);
        e->source.reset();
        r.error = Errc::kIo;
      }
    }
  }
  std::lock_guard lock(impl_->m);
  impl_->entries.push_back(std::move(e));
  return r.error;
}

namespace {
struct OwnCgroups {
  std::string v1, v2;
};
OwnCgroups own_cgroups() {
  OwnCgroups o;
  const auto text = read_text("/proc/self/cgroup");
  if (!text) return o;
  for (std::size_t at = 0; at < text->size();) {
    std::size_t end = text->find('\n', at);
    if (end == text->npos) end = text->size();
    const std::string line = text->substr(at, end - at);
    at = end + 1;
    const std::size_t c1 = line.find(':'), c2 = line.find(':', c1 + 1);
    if (c1 == line.npos || c2 == line.npos) continue;
    const std::string controllers = line.substr(c1 + 1, c2 - c1 - 1), path = line.substr(c2 + 1);
    if (controllers.empty()) {
      for (const char* base : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}) {
        const std::string dir = base + (path == "/" ? std::string() : path);
        if (::access((dir + "/memory.events").c_str(), R_OK) == 0) o.v2 = dir;
      }
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      const std::string dir = "/sys/fs/cgroup/memory" + (path == "/" ? std::string() : path);
      if (::access((dir + "/memory.usage_in_bytes").c_str(), R_OK) == 0) o.v1 = dir;
    }
  }
  return o;
}
}  // namespace

Errc PressureMonitor::open_best() {
  if (add(open_memory_pressure_env()) == Errc::kOk) return Errc::kOk;
  const OwnCgroups own = own_cgroups();
  if (!own.v2.empty()) {
    const bool psi = add(open_psi(own.v2 + "/memory.pressure")) == Errc::kOk;
    if ((add(open_cgroup_v2_events(own.v2)) == Errc::kOk) || psi) return Errc::kOk;
  } else {
    add({nullptr, Errc::kUnsupported, "no cgroup v2 memory controller here"});
  }
  if (!own.v1.empty()) {
    const auto limit = number_of(own.v1 + "/memory.limit_in_bytes").value_or(kUnlimited);
    bool any = add(open_cgroup_v1_pressure(own.v1, "medium")) == Errc::kOk;
    if (limit < (std::uint64_t{1} << 60)) {
      any |= add(open_cgroup_v1_threshold(own.v1, limit - limit / 10, limit / 20)) == Errc::kOk;
      if (any) return Errc::kOk;  // a limit of our own: what the rest of the machine does matters less
    }
  }
  if (add(open_psi()) == Errc::kOk) return Errc::kOk;
  const auto meminfo = read_text("/proc/meminfo");
  const std::uint64_t total = meminfo ? field_of(*meminfo, "MemTotal").value_or(0) : 0;
  return add(open_mem_available(impl_->registry.clock(), total / 20, total / 10));
}

int PressureMonitor::fd() const noexcept { return impl_->epoll.get(); }

TimePoint PressureMonitor::next_timer() const noexcept {
  TimePoint t = kNoDeadline;
  for (const auto& e : impl_->entries) {
    if (e->source) t = std::min(t, e->source->next_timer());
    if (e->has_held) t = std::min(t, e->quiet_until);
  }
  return t;
}

int PressureMonitor::on_ready() {
  epoll_event ev[32];
  const int n = ::epoll_wait(impl_->epoll.get(), ev, 32, 0);
  const TimePoint now = impl_->registry.clock().now();
  int events = 0;
  for (int i = 0; i < n; ++i) {
    auto* e = static_cast<Impl::Entry*>(ev[i].data.ptr);
    if (e == nullptr || !e->source) continue;
    const std::uint32_t revents = ((ev[i].events & EPOLLIN) != 0 ? POLLIN : 0u) |
                                  ((ev[i].events & EPOLLPRI) != 0 ? POLLPRI : 0u) |
                                  ((ev[i].events & EPOLLERR) != 0 ? POLLERR : 0u) |
                                  ((ev[i].events & EPOLLHUP) != 0 ? POLLHUP : 0u);
    events += impl_->handle(*e, revents, now);
  }
  for (std::size_t i = 0; i < impl_->entries.size(); ++i) {
    Impl::Entry& e = *impl_->entries[i];
    if (e.source && e.source->next_timer() <= now) events += impl_->handle(e, 0, now);
    if (e.has_held && now >= e.quiet_until) {
      e.has_held = false;
      e.quiet_until = now + impl_->opt.min_interval;
      impl_->act(e.held);
    }
  }
  return events;
}

int PressureMonitor::wait(Nanoseconds timeout) {
  const TimePoint now = impl_->registry.clock().now();
  const TimePoint timer = next_timer();
  if (timer != kNoDeadline) timeout = std::min(timeout, std::max(Nanoseconds(0), timer - now));
  // Round up: waking a moment early would only mean to sleep again.
  const auto ms = std::min<std::int64_t>((timeout.count() + 999'999) / 1'000'000, 3'600'000);
  pollfd p{impl_->epoll.get(), POLLIN, 0};
  ::poll(&p, 1, static_cast<int>(ms));
  return on_ready();
}

Errc PressureMonitor::start_thread() {
  if (impl_->thread.joinable()) return Errc::kState;
  try {
    impl_->thread = std::thread([this] {
      for (;;) {
        const TimePoint timer = next_timer();
        int ms = -1;
        if (timer != kNoDeadline) {
          const auto left = std::max(Nanoseconds(0), timer - impl_->registry.clock().now());
          ms = static_cast<int>(std::min<std::int64_t>((left.count() + 999'999) / 1'000'000, 3'600'000));
        }
        pollfd p[2] = {{impl_->epoll.get(), POLLIN, 0}, {impl_->stop_fd.get(), POLLIN, 0}};
        ::poll(p, 2, ms);
        if (p[1].revents != 0) return;
        on_ready();
      }
    });
  } catch (const std::system_error&) {
    return Errc::kNoMemory;
  }
  return Errc::kOk;
}

void PressureMonitor::stop_thread() {
  if (!impl_->thread.joinable()) return;
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(impl_->stop_fd.get(), &one, sizeof one);
  impl_->thread.join();
  std::uint64_t drained;
  [[maybe_unused]] const ssize_t d = ::read(impl_->stop_fd.get(), &drained, sizeof drained);
}

std::vector<SourceStatus> PressureMonitor::status() const {
  std::lock_guard lock(impl_->m);
  std::vector<SourceStatus> out;
  for (const auto& e : impl_->entries) out.push_back(e->status);
  return out;
}

std::string PressureMonitor::to_text() const {
  std::string out;
  for (const SourceStatus& s : status()) {
    out += "source " + s.kind + ": " + s.text + (s.active ? ", active" : ", not used") + ", events " +
           std::to_string(s.events) + "\n";
  }
  return out;
}

}  // namespace spillway::reclaim
