#include "src/export/fuse/mount.h"

#include <fmt/core.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/export/fuse/pmem.h"

namespace spillway {

using fuse::FuseChannel;

namespace {

constexpr uint64_t kCacheSeconds = 86400;
constexpr size_t kHeader = sizeof(fuse_in_header) + sizeof(fuse_write_in);
constexpr size_t kInBuffer = kPageSize + fuse::kMaxWrite;
constexpr size_t kScratch = fuse::kMaxWrite + 2 * kPageSize;
constexpr int kWakeSignal = SIGURG;  // ignored by default; a handler of ours makes it interrupt read(2)
constexpr auto kRetryFirst = std::chrono::milliseconds(100);
constexpr auto kRetryMax = std::chrono::seconds(1);

void install_wake_signal() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction sa{};
    sa.sa_handler = [](int) {};
    sigaction(kWakeSignal, &sa, nullptr);
  });
}

// The thread group of a thread id, for the `pid` of a FUSE request; 0 when it is gone.
pid_t process_of(pid_t tid) {
  std::ifstream status(fmt::format("/proc/{}/status", tid));
  std::string line;
  while (std::getline(status, line))
    if (line.starts_with("Tgid:")) return std::atoi(line.c_str() + 5);
  return 0;
}

template <class T>
const T* body(const std::byte* in, size_t size) {
  return size >= sizeof(fuse_in_header) + sizeof(T) ? reinterpret_cast<const T*>(in + sizeof(fuse_in_header)) : nullptr;
}

}  // namespace

// A request as read from the device, with the buffers to serve it. The header lies so that the data of a WRITE
// begins on a page: O_DIRECT below needs that.
struct PmemMount::Call {
  Call(std::byte* b, size_t n, std::span<std::byte> s, Reactor& r) : in(b), size(n), scratch(s), reactor(r) {}
  const fuse_in_header& head() const { return *reinterpret_cast<const fuse_in_header*>(in); }
  template <class T>
  const T* args() const {
    return body<T>(in, size);
  }
  std::byte* in;
  size_t size;
  std::span<std::byte> scratch;
  Reactor& reactor;
};

struct PmemMount::Worker {
  std::unique_ptr<UringReactor> reactor;
  AlignedBuffer in{kInBuffer};
  AlignedBuffer scratch{kScratch};
  std::thread thread;
  std::atomic<bool> exited{false};
  std::byte* start() { return in.data() + kPageSize - kHeader; }
  size_t room() const { return fuse::kMaxWrite + kHeader; }
};

struct PmemMount::Held {
  AlignedBuffer buffer;
  size_t size = 0;
  uint64_t node = 0;
  std::shared_ptr<PmemFile> file;  // counted as held there; null: the file is not known yet
  std::byte* start() { return buffer.data() + kPageSize - kHeader; }
};

// ---- life ------------------------------------------------------------------------------------------------------

PmemMount::PmemMount(PmemMountOptions options, FuseChannel channel)
    : options_(std::move(options)), channel_(std::move(channel)) {}

PmemMount::~PmemMount() { stop(false); }

Result<std::shared_ptr<PmemMount>> PmemMount::start(PmemMountOptions options) {
  install_wake_signal();
  const std::string key = "pmem/" + options.name;
  std::shared_ptr<PmemMount> m;
  if (options.store != nullptr) {
    auto kept = options.store->get(key);
    if (kept && kept->fds.size() == 1) {
      const auto state = nlohmann::json::parse(kept->blob, nullptr, false);
      auto channel = FuseChannel::adopt(std::move(kept->fds[0]), options.directory);
      if (channel && state.is_object() && state.value("directory", "") == options.directory) {
        m.reset(new PmemMount(options, std::move(*channel)));
        m->adopted_ = true;
        m->next_node_ = state.value("next", m->next_node_);
        for (const auto& f : state.value("files", nlohmann::json::array()))
          m->names_[f.value("name", "")].node = f.value("node", uint64_t{0});
        m->names_.erase("");
      } else if (!channel) {
        log(LogLevel::kWarn, "pmem", "{}: mounted anew", channel.error().message());
      }
    }
  }
  if (!m) {
    SPILLWAY_TRY(auto channel, FuseChannel::mount(options.directory, options.max_read));
    m.reset(new PmemMount(options, std::move(channel)));
    SPILLWAY_CHECK(m->save());
  }
  SPILLWAY_CHECK(m->start_workers());
  if (m->adopted_) {
    if (Status s = m->channel_.notify_resend(); !s)
      log(LogLevel::kWarn, "pmem", "{}: the kernel cannot resend what the predecessor left: {}", options.directory,
          s.error().message());
  }
  if (m->adopted_) return m;  // the limits are the mount's and stay
  fuse::BdiOptions bdi;
  bdi.read_ahead_kb = options.read_ahead_kb;
  bdi.dirty_max_bytes = options.dirty_max_bytes;
  if (Status s = m->channel_.tune(bdi); !s)
    log(LogLevel::kWarn, "pmem", "{}: writers may be slow: {}", options.directory, s.error().message());
  return m;
}

Status PmemMount::start_workers() {
  for (unsigned i = 0; i < std::max(2u, options_.workers_min); ++i) add_worker();
  if (count_ < 2) return fail(ErrorKind::kNoMemory, "pmem mount " + options_.directory + ": no workers");
  retry_thread_ = std::thread([this] { retry_loop(); });
  return ahead_.start();
}

void PmemMount::add_worker() {
  std::lock_guard lock(workers_mutex_);
  if (stopping_ || workers_.size() >= std::max(2u, options_.workers_max)) return;
  auto w = std::make_unique<Worker>();
  auto reactor = UringReactor::create(64);
  if (!reactor || !w->in || !w->scratch) {
    LOG_LIMITED(LogLevel::kWarn, "pmem", "{}: no memory for another worker", options_.directory);
    return;
  }
  w->reactor = std::move(*reactor);
  // Best effort: the daemon as a whole is locked by the host; a page fault here must not wait for our own writeback.
  ::mlock(w->in.data(), w->in.size());
  // Of the scratch memory what READs of this mount's size need (one that was adopted may have larger ones).
  ::mlock(w->scratch.data(), std::min<size_t>(kScratch, options_.max_read + 2 * kPageSize));
  Worker* raw = w.get();
  workers_.push_back(std::move(w));
  ++count_;
  raw->thread = std::thread([this, raw] { work(*raw); });
  pthread_setname_np(raw->thread.native_handle(), "fuse");
}

void PmemMount::stop(bool keep) {
  if (stopped_.exchange(true)) return;
  if (!keep) {
    abort_ = true;
    retry_held();
    for (auto& file : files()) sync_last(*file);
  }
  ahead_.stop();  // before the reactors that wait for it
  // Closing a file may ask the workers: before they stop, and without a lock they take.
  for (auto& file : files()) file->detach();
  {
    std::lock_guard lock(held_mutex_);
    stopping_ = true;
    held_changed_.notify_all();
  }
  if (retry_thread_.joinable()) retry_thread_.join();
  if (!keep) {
    if (Status s = channel_.unmount(); !s) log(LogLevel::kWarn, "pmem", "{}", s.error().message());
    if (options_.store != nullptr) {
      if (auto kept = options_.store->list("pmem/" + options_.name + "/"); kept)
        for (auto& entry : *kept) (void)options_.store->remove(entry);
      (void)options_.store->remove("pmem/" + options_.name);
    }
  }
  // Out of the list before they are waited for: a worker that takes one of the requests an unmount sends (FORGET,
  // RELEASE, DESTROY) and finds itself the last idle one asks for another worker, under this lock.
  std::vector<std::unique_ptr<Worker>> last;
  {
    std::lock_guard lock(workers_mutex_);
    last.swap(workers_);
  }
  for (auto& w : last) {
    // The signal may come just before the read begins, so it is repeated until the thread has seen `stopping_`.
    while (!w->exited.load(std::memory_order_acquire)) {
      pthread_kill(w->thread.native_handle(), kWakeSignal);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    w->thread.join();
  }
  channel_.close();
}

// What the mappings still have dirty, before the file goes. Bounded: nothing is held any more for this file.
void PmemMount::sync_last(PmemFile& file) {
  if (file.read_only() || !file.fd_ready()) return;
  if (Status s = file.sync(); !s)
    log(LogLevel::kWarn, "pmem", "{}: what was stored since the last flush is lost: {}", file.name(),
        s.error().message());
}

void PmemMount::retry_held() {
  std::lock_guard lock(held_mutex_);
  retry_now_ = true;
  held_changed_.notify_all();
}

Status PmemMount::save() {
  if (options_.store == nullptr) return {};
  nlohmann::json files = nlohmann::json::array();
  for (auto& [name, n] : names_) files.push_back({{"name", name}, {"node", n.node}});
  const nlohmann::json state = {{"directory", options_.directory}, {"next", next_node_}, {"files", files}};
  const int fd = channel_.fd();
  return options_.store->put("pmem/" + options_.name, {&fd, 1}, state.dump());
}

// ---- files -----------------------------------------------------------------------------------------------------

Result<std::shared_ptr<PmemFile>> PmemMount::add(PmemFileOptions o) {
  if (o.name.empty() || o.name.size() > 200 || o.name[0] == '.' || o.name.find('/') != std::string::npos)
    return fail(ErrorKind::kInvalid, fmt::format("pmem: '{}' is no file name", o.name));
  const uint64_t size = o.volume->size();
  if (size == 0 || !is_aligned(size, kPmemAlign) || size > kPmemMaxBytes)
    return fail(ErrorKind::kInvalid, fmt::format("pmem {}: volume {} has {} bytes: must be a multiple of 2 MiB, up to {}",
                                                 o.name, o.volume->name(), size, format_size(kPmemMaxBytes)));
  o.read_only |= o.volume->geometry().read_only;
  std::shared_ptr<PmemFile> file;
  const std::string name = o.name;
  {
    std::lock_guard lock(names_mutex_);
    auto it = names_.find(name);
    if (it != names_.end() && it->second.file) return fail(ErrorKind::kExists, "pmem: a file " + name);
    uint64_t node = it != names_.end() ? it->second.node : 0;
    if (o.read_only) {
      for (auto& [other, n] : names_) {
        const bool same = n.file && n.file->options().volume == o.volume && n.file->read_only() &&
                          n.file->options().group == o.group && n.file->options().uid == o.uid &&
                          n.file->options().gid == o.gid && n.file->options().mode == o.mode;
        if (same && (node == 0 || node == n.file->node())) file = n.file;
      }
    }
    if (file) {
      node = file->node();
    } else {
      if (node == 0) node = next_node_++;
      file = std::make_shared<PmemFile>(std::move(o), node);
    }
    names_[name] = {node, file};
    SPILLWAY_CHECK(save());
  }
  retry_held();  // what waited for this file may go on
  if (!file->fd_ready()) {
    SPILLWAY_TRY(auto fd, open_file(*file, name));
    file->attach(std::move(fd), channel_.fd());
  }
  return file;
}

// The descriptor a predecessor opened, if there is one. Opening asks the workers, and a thread that waits for them
// cannot be killed (see agent.h): fine the first time, when no guest depends on a quick restart yet, not later.
Result<Fd> PmemMount::open_file(PmemFile& file, const std::string& name) {
  if (adopted_) {
    if (auto kept = options_.store->get(key_of(file)); kept && kept->fds.size() == 1) {
      for (size_t at = 0; at + sizeof(pid_t) <= kept->blob.size(); at += sizeof(pid_t)) {
        pid_t pid = 0;
        std::memcpy(&pid, kept->blob.data() + at, sizeof pid);
        file.add_opener(pid);
      }
      return std::move(kept->fds[0]);
    }
  }
  const std::string path = options_.directory + "/" + name;
  Fd fd(::open(path.c_str(), (file.read_only() ? O_RDONLY : O_RDWR) | O_CLOEXEC));
  if (!fd) {
    const int err = errno;
    remove(name);
    return fail_errno(err, "pmem: open " + path);
  }
  SPILLWAY_CHECK(save_file(file, fd.get()));
  return fd;
}

std::string PmemMount::key_of(const PmemFile& file) const { return fmt::format("pmem/{}/{}", options_.name, file.node()); }

// The descriptor, and who opened the file: a successor has to take its pages out of their page tables as well.
Status PmemMount::save_file(const PmemFile& file, int fd) {
  if (options_.store == nullptr) return {};
  std::lock_guard lock(names_mutex_);  // so that the last one to be kept is the latest
  const std::vector<pid_t> openers = file.openers();
  return options_.store->put(key_of(file), {&fd, 1},
                             {reinterpret_cast<const char*>(openers.data()), openers.size() * sizeof(pid_t)});
}

void PmemMount::remove(const std::string& name) {
  std::shared_ptr<PmemFile> file;
  bool other = false;
  {
    std::lock_guard lock(names_mutex_);
    auto it = names_.find(name);
    if (it == names_.end()) return;
    file = it->second.file;
    for (auto& [n, e] : names_) other |= n != name && e.file == file;
  }
  const bool last = file && !other;
  if (last) {
    file->give_up();
    retry_held();
    sync_last(*file);
  }
  {
    std::lock_guard lock(names_mutex_);
    names_.erase(name);
    if (Status s = save(); !s) log(LogLevel::kWarn, "pmem", "{}", s.error().message());
  }
  if (!last) return;
  ahead_.forget(*file);
  if (options_.store != nullptr) (void)options_.store->remove(key_of(*file));
  file->detach();
}

void PmemMount::settle() {
  {
    std::lock_guard lock(names_mutex_);
    if (std::erase_if(names_, [](auto& n) { return !n.second.file; }) == 0) return;
    if (Status s = save(); !s) log(LogLevel::kWarn, "pmem", "{}", s.error().message());
  }
  retry_held();
}

std::shared_ptr<PmemFile> PmemMount::file_at(uint64_t node, bool* known) const {
  std::lock_guard lock(names_mutex_);
  *known = false;
  for (auto& [name, n] : names_) {
    if (n.node != node) continue;
    *known = true;
    if (n.file) return n.file;
  }
  return nullptr;
}

std::vector<std::shared_ptr<PmemFile>> PmemMount::files() const {
  std::lock_guard lock(names_mutex_);
  std::vector<std::shared_ptr<PmemFile>> all;
  for (auto& [name, n] : names_)
    if (n.file && std::find(all.begin(), all.end(), n.file) == all.end()) all.push_back(n.file);
  return all;
}

// ---- threads ---------------------------------------------------------------------------------------------------

void PmemMount::work(Worker& w) {
  while (!stopping_.load(std::memory_order_acquire)) {
    idle_.fetch_add(1, std::memory_order_relaxed);
    const ssize_t n = ::read(channel_.fd(), w.start(), w.room());
    const int err = errno;
    const bool last_idle = idle_.fetch_sub(1, std::memory_order_relaxed) == 1;
    if (n < 0) {
      if (err == EINTR || err == ENOENT || err == EAGAIN) continue;
      if (err != ENODEV) log(LogLevel::kError, "pmem", "{}: /dev/fuse: {}", options_.directory, strerror(err));
      break;  // ENODEV: unmounted
    }
    if (static_cast<size_t>(n) < sizeof(fuse_in_header)) continue;
    if (last_idle && count_.load(std::memory_order_relaxed) < options_.workers_max) add_worker();
    requests_.fetch_add(1, std::memory_order_relaxed);
    Call call(w.start(), static_cast<size_t>(n), {w.scratch.data(), w.scratch.size()}, *w.reactor);
    if (serve(call) == Outcome::kHold) hold(call);
  }
  w.exited.store(true, std::memory_order_release);
}

void PmemMount::hold(const Call& call) {
  auto h = std::make_unique<Held>();
  h->buffer = AlignedBuffer(align_up(kPageSize - kHeader + call.size, kPageSize));
  if (!h->buffer) {  // no memory: this worker itself waits, the other ones go on
    LOG_LIMITED(LogLevel::kWarn, "pmem", "{}: no memory to hold a request", options_.directory);
    Call again = call;
    do std::this_thread::sleep_for(kRetryFirst);
    while (!stopping_ && serve(again) == Outcome::kHold);
    return;
  }
  std::memcpy(h->start(), call.in, call.size);
  h->size = call.size;
  h->node = call.head().nodeid;
  bool known = false;
  h->file = file_at(h->node, &known);
  if (h->file) h->file->request_held(true);
  held_total_.fetch_add(1, std::memory_order_relaxed);
  std::lock_guard lock(held_mutex_);
  held_.push_back(std::move(h));
  held_changed_.notify_all();
}

// One thread for all held requests of the mount: their backend fails, so there is no hurry and no parallelism to win.
void PmemMount::retry_loop() {
  auto reactor = UringReactor::create(64);
  AlignedBuffer scratch(kScratch);
  SPILLWAY_ASSERT(reactor.has_value() && bool(scratch));
  auto pause = kRetryFirst;
  std::unique_lock lock(held_mutex_);
  while (!stopping_) {
    if (held_.empty()) {
      pause = kRetryFirst;
      held_changed_.wait(lock, [this] { return stopping_ || !held_.empty(); });
      continue;
    }
    held_changed_.wait_for(lock, pause, [this] { return stopping_ || retry_now_; });
    if (stopping_) break;
    retry_now_ = false;
    pause = std::min<std::chrono::milliseconds>(pause * 2, kRetryMax);
    for (size_t left = held_.size(); left > 0 && !stopping_; --left) {
      std::unique_ptr<Held> h = std::move(held_.front());
      held_.pop_front();
      lock.unlock();
      Call call(h->start(), h->size, {scratch.data(), scratch.size()}, **reactor);
      const bool again = serve(call) == Outcome::kHold;
      if (!again && h->file) h->file->request_held(false);
      lock.lock();
      if (again) held_.push_back(std::move(h));
      else pause = kRetryFirst;
    }
  }
  for (auto& h : held_) {
    if (abort_) channel_.reply(reinterpret_cast<fuse_in_header*>(h->start())->unique, EIO);
    if (h->file) h->file->request_held(false);
  }
  held_.clear();
}

// ---- the protocol ----------------------------------------------------------------------------------------------

std::string PmemMount::name_in(const Call& call) {
  const char* text = reinterpret_cast<const char*>(call.in + sizeof(fuse_in_header));
  return {text, ::strnlen(text, call.size - sizeof(fuse_in_header))};
}

// For a file that a predecessor served and that this process has not added yet.
bool PmemMount::too_early(const Call& call) const {
  if (!adopted_ || abort_) return false;
  const fuse_in_header& h = call.head();
  switch (h.opcode) {
    case FUSE_LOOKUP: {
      std::lock_guard lock(names_mutex_);
      auto it = names_.find(name_in(call));
      return h.nodeid == fuse::kRootNode && it != names_.end() && !it->second.file;
    }
    case FUSE_READ:
    case FUSE_WRITE:
    case FUSE_FSYNC:
    case FUSE_FALLOCATE:
    case FUSE_GETATTR:
    case FUSE_SETATTR:
    case FUSE_OPEN: {
      bool known = false;
      return h.nodeid != fuse::kRootNode && !file_at(h.nodeid, &known) && known;
    }
    default: return false;
  }
}

PmemMount::Outcome PmemMount::serve(Call& call) {
  const fuse_in_header& h = call.head();
  if (too_early(call)) return Outcome::kHold;
  switch (h.opcode) {
    case FUSE_INIT: serve_init(call); break;
    case FUSE_READ:
    case FUSE_WRITE:
    case FUSE_FSYNC:
    case FUSE_FALLOCATE: return serve_data(call);
    case FUSE_LOOKUP: serve_lookup(call); break;
    case FUSE_GETATTR: serve_attr(call); break;
    case FUSE_SETATTR: serve_setattr(call); break;
    case FUSE_OPEN:
    case FUSE_OPENDIR: serve_open(call); break;
    case FUSE_READDIR: serve_readdir(call); break;
    case FUSE_STATFS: serve_statfs(call); break;
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR: channel_.reply(h.unique, 0); break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:  // a READ is finished all the same; nobody needs the answer to this
    case FUSE_DESTROY: break;
    case FUSE_CREATE:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_UNLINK:
    case FUSE_RENAME: channel_.reply(h.unique, EPERM); break;
    default:
      unknown_.fetch_add(1, std::memory_order_relaxed);
      channel_.reply(h.unique, ENOSYS);
  }
  return Outcome::kAnswered;
}

PmemMount::Outcome PmemMount::finish(const Call& call, const PmemFile& file, Status status,
                                     std::span<const iovec> payload) {
  if (status) {
    channel_.reply(call.head().unique, 0, payload);
    return Outcome::kAnswered;
  }
  const uint32_t op = call.head().opcode;
  const ErrorKind kind = status.error().kind();
  const bool ours = kind == ErrorKind::kOutOfRange || kind == ErrorKind::kInvalid || kind == ErrorKind::kReadOnly;
  if ((op == FUSE_READ || op == FUSE_WRITE) && !ours && !abort_ && !file.given_up()) {
    LOG_LIMITED(LogLevel::kWarn, "pmem", "{}: held until it succeeds: {}", options_.directory,
                status.error().message());
    return Outcome::kHold;
  }
  channel_.reply(call.head().unique, status.error().to_errno());
  return Outcome::kAnswered;
}

PmemMount::Outcome PmemMount::serve_data(Call& call) {
  const fuse_in_header& h = call.head();
  bool known = false;
  std::shared_ptr<PmemFile> file = file_at(h.nodeid, &known);
  if (!file) {
    channel_.reply(h.unique, EIO);
    return Outcome::kAnswered;
  }
  auto finish = [&](Status status, std::span<const iovec> payload = {}) {
    return this->finish(call, *file, std::move(status), payload);
  };
  if (h.opcode == FUSE_READ) {
    const auto* in = call.args<fuse_read_in>();
    if (in == nullptr || in->size > fuse::kMaxWrite) return finish(fail(ErrorKind::kInvalid));
    if (in->offset >= file->size() || in->size == 0) return finish({});
    const auto length = static_cast<uint32_t>(std::min<uint64_t>(in->size, file->size() - in->offset));
    ahead_.note(file, in->offset, length);
    if (!ahead_.empty()) {
      const ReadAhead::Found found = call.reactor.block_on(ahead_.find(*file, in->offset, length));
      if (found) {
        file->served_ahead(in->offset, length);
        return finish({}, {found.iov.data(), found.count});
      }
    }
    std::byte* at = nullptr;
    Status s = call.reactor.block_on(file->read(in->offset, length, call.scratch, &at));
    const iovec data{at, length};
    return finish(std::move(s), {&data, 1});
  }
  if (h.opcode == FUSE_WRITE) {
    const auto* in = call.args<fuse_write_in>();
    if (in == nullptr || call.size < kHeader + in->size) return finish(fail(ErrorKind::kInvalid));
    if (file->read_only()) return finish(fail(ErrorKind::kReadOnly));
    const std::span<const std::byte> data(call.in + kHeader, in->size);
    ahead_.changed(*file, in->offset, in->size);
    Status s = call.reactor.block_on(file->write(in->offset, data, call.scratch));
    ahead_.changed(*file, in->offset, in->size);
    fuse_write_out out{};
    out.size = in->size;
    const iovec answer{&out, sizeof out};
    return finish(std::move(s), {&answer, 1});
  }
  if (h.opcode == FUSE_FSYNC) return finish(call.reactor.block_on(file->flush()));
  const auto* in = call.args<fuse_fallocate_in>();
  if (in == nullptr) return finish(fail(ErrorKind::kInvalid));
  const bool punch = in->mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
  if (!punch) {
    // Space for a range inside the file: nothing to do; growing it: the size is the volume's.
    const bool inside = in->mode == 0 && in->offset + in->length <= file->size();
    channel_.reply(h.unique, inside ? 0 : EOPNOTSUPP);
    return Outcome::kAnswered;
  }
  if (file->read_only()) return finish(fail(ErrorKind::kReadOnly));
  ahead_.changed(*file, in->offset, in->length);
  Status s = call.reactor.block_on(file->punch(in->offset, in->length));
  ahead_.changed(*file, in->offset, in->length);
  return finish(std::move(s));
}

void PmemMount::serve_init(const Call& call) {
  const auto* in = call.args<fuse_init_in>();
  if (in == nullptr || in->major != FUSE_KERNEL_VERSION || in->minor < fuse::kMinorMin) {
    log(LogLevel::kError, "pmem", "{}: the kernel's FUSE protocol is too old", options_.directory);
    channel_.reply(call.head().unique, EPROTO);
    return;
  }
  const uint64_t offered = in->flags | ((in->flags & FUSE_INIT_EXT) != 0 ? uint64_t{in->flags2} << 32 : 0);
  // Not asked for: WRITEBACK_CACHE, AUTO_INVAL_DATA (research/pmem.md, rule 1).
  const uint64_t wanted = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_EXPLICIT_INVAL_DATA |
                          FUSE_PARALLEL_DIROPS | FUSE_ASYNC_DIO | FUSE_INIT_EXT | fuse::kHasResend;
  const uint64_t agreed = offered & wanted;
  fuse_init_out out{};
  out.major = FUSE_KERNEL_VERSION;
  out.minor = std::min<uint32_t>(in->minor, FUSE_KERNEL_MINOR_VERSION);
  out.max_readahead = fuse::kMaxWrite;
  out.flags = static_cast<uint32_t>(agreed);
  out.flags2 = static_cast<uint32_t>(agreed >> 32);
  out.max_background = 64;
  out.congestion_threshold = 48;
  out.max_write = fuse::kMaxWrite;
  out.time_gran = 1;
  out.max_pages = fuse::kMaxWrite / kPageSize;
  channel_.reply(call.head().unique, out);
}

fuse_attr PmemMount::attr_of(uint64_t node, const PmemFile* file) const {
  fuse_attr a{};
  a.ino = node;
  a.nlink = 1;
  a.blksize = kPageSize;
  if (file == nullptr) {
    a.mode = S_IFDIR | 0755;
    a.nlink = 2;
    return a;
  }
  a.mode = S_IFREG | (file->options().mode & 0777);
  a.uid = file->options().uid;
  a.gid = file->options().gid;
  a.size = file->size();
  a.blocks = file->size() / kSectorSize;
  return a;
}

void PmemMount::serve_lookup(const Call& call) {
  const uint64_t unique = call.head().unique;
  const std::string name = name_in(call);
  std::shared_ptr<PmemFile> file;
  {
    std::lock_guard lock(names_mutex_);
    if (auto it = names_.find(name); it != names_.end()) file = it->second.file;
  }
  if (call.head().nodeid != fuse::kRootNode || !file) {
    channel_.reply(unique, ENOENT);
    return;
  }
  fuse_entry_out out{};
  out.nodeid = file->node();
  out.generation = 1;
  // Names come and go with exports, so only the attributes are kept for long.
  out.attr_valid = kCacheSeconds;
  out.attr = attr_of(file->node(), file.get());
  channel_.reply(unique, out);
}

void PmemMount::serve_attr(const Call& call) {
  const uint64_t node = call.head().nodeid;
  bool known = false;
  const auto file = file_at(node, &known);
  if (node != fuse::kRootNode && !file) {
    channel_.reply(call.head().unique, ESTALE);
    return;
  }
  fuse_attr_out out{};
  out.attr_valid = kCacheSeconds;
  out.attr = attr_of(node, file.get());
  channel_.reply(call.head().unique, out);
}

void PmemMount::serve_setattr(const Call& call) {
  const auto* in = call.args<fuse_setattr_in>();
  bool known = false;
  const auto file = file_at(call.head().nodeid, &known);
  if (in == nullptr || !file) {
    channel_.reply(call.head().unique, EINVAL);
    return;
  }
  // Times are accepted and not kept; the size may be set to what it is (a VMM that truncates to the region's size).
  const bool size_same = (in->valid & FATTR_SIZE) == 0 || in->size == file->size();
  if ((in->valid & (FATTR_MODE | FATTR_UID | FATTR_GID)) != 0 || !size_same) {
    channel_.reply(call.head().unique, EPERM);
    return;
  }
  serve_attr(call);
}

void PmemMount::serve_open(const Call& call) {
  const fuse_in_header& h = call.head();
  fuse_open_out out{};
  bool known = false;
  const auto file = file_at(h.nodeid, &known);
  if (h.opcode == FUSE_OPEN) {
    const auto* in = call.args<fuse_open_in>();
    if (!file || in == nullptr) {
      channel_.reply(h.unique, ESTALE);
      return;
    }
    if (file->read_only() && (in->flags & O_ACCMODE) != O_RDONLY) {
      channel_.reply(h.unique, EROFS);
      return;
    }
    // Without KEEP_CACHE every open would throw the whole page cache of the file away.
    out.open_flags = FOPEN_KEEP_CACHE | FOPEN_NOFLUSH;
    const pid_t opener = process_of(static_cast<pid_t>(h.pid));
    if (opener != ::getpid() && file->fd_ready() && file->add_opener(opener))
      if (Status s = save_file(*file, file->fd()); !s)
        LOG_LIMITED(LogLevel::kWarn, "pmem", "{}", s.error().message());
  }
  channel_.reply(h.unique, out);
}

void PmemMount::serve_readdir(const Call& call) {
  const auto* in = call.args<fuse_read_in>();
  if (in == nullptr || call.head().nodeid != fuse::kRootNode) {
    channel_.reply(call.head().unique, ENOTDIR);
    return;
  }
  const size_t room = std::min<size_t>(in->size, call.scratch.size());
  size_t used = 0;
  uint64_t index = 0;
  auto put = [&](std::string_view name, uint64_t node, uint32_t type) {
    if (index++ < in->offset) return;
    const size_t size = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + name.size());
    if (used + size > room) return;
    auto* d = reinterpret_cast<fuse_dirent*>(call.scratch.data() + used);
    std::memset(static_cast<void*>(d), 0, size);
    d->ino = node;
    d->off = index;
    d->namelen = static_cast<uint32_t>(name.size());
    d->type = type;
    std::memcpy(d->name, name.data(), name.size());
    used += size;
  };
  put(".", fuse::kRootNode, S_IFDIR >> 12);
  put("..", fuse::kRootNode, S_IFDIR >> 12);
  {
    std::lock_guard lock(names_mutex_);
    for (auto& [name, n] : names_)
      if (n.file) put(name, n.node, S_IFREG >> 12);
  }
  const iovec data{call.scratch.data(), used};
  channel_.reply(call.head().unique, 0, {&data, 1});
}

void PmemMount::serve_statfs(const Call& call) {
  fuse_statfs_out out{};
  out.st.bsize = out.st.frsize = kPageSize;
  out.st.namelen = 200;
  for (const auto& f : files()) {
    out.st.blocks += f->size() / kPageSize;
    ++out.st.files;
  }
  channel_.reply(call.head().unique, out);
}

// ---- introspection ---------------------------------------------------------------------------------------------

PmemMountStats PmemMount::stats() const {
  PmemMountStats s;
  s.workers = count_;
  s.requests = requests_;
  s.unknown = unknown_;
  s.held_total = held_total_;
  s.adopted = adopted_;
  std::lock_guard lock(held_mutex_);
  s.held = held_.size();
  return s;
}

std::string PmemMount::to_text() const {
  const PmemMountStats s = stats();
  std::string text = fmt::format("mount: {} at {}{}\nworkers: {} requests {} held {} (ever {}) unknown {}\n",
                                 options_.name, options_.directory, s.adopted ? " (adopted)" : "", s.workers,
                                 s.requests, s.held, s.held_total, s.unknown);
  for (const auto& f : files()) text += f->to_text();
  return text;
}

}  // namespace spillway
