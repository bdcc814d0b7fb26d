#include "benchmarks/pmem/mapper.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "benchmarks/common/bench.h"

namespace spillway::bench {

namespace {
constexpr uint64_t kPage = 4096;
uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ x >> 33;
}
}  // namespace

struct Mapper::Order {
  char verb;
  uint64_t a = 0, b = 0, c = 0;
  char text[256] = {};
};
struct Mapper::Shared {
  std::atomic<bool> stop;  // relaxed: only ends a loop
  uint32_t ns[];
};

Mapper::Mapper(uint64_t samples_max) : samples_max_(samples_max) {
  void* p = ::mmap(nullptr, sizeof(Shared) + samples_max * sizeof(uint32_t), PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) std::abort();
  shared_ = static_cast<Shared*>(p);
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) std::abort();
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ < 0) std::abort();
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    // Nothing of the others' may live on here: their ends would not be seen.
    const int mine = ::dup2(pair[1], 3);
    ::syscall(SYS_close_range, 4u, ~0u, 0);
    serve(mine);
  }
  ::close(pair[1]);
  socket_ = pair[0];
}

Mapper::~Mapper() {
  shared_->stop = true;
  ::close(socket_);
  ::waitpid(pid_, nullptr, 0);
}

int64_t Mapper::call(const Order& order) {
  int64_t answer = -1;
  if (::send(socket_, &order, sizeof order, MSG_NOSIGNAL) != sizeof order ||
      ::recv(socket_, &answer, sizeof answer, 0) != sizeof answer) {
    std::fprintf(stderr, "bench_pmem: a mapping process ended\n");
    std::exit(1);
  }
  return answer;
}

bool Mapper::open(const std::string& path, uint64_t size, Advice advice, bool writable) {
  Order o{'o', size, static_cast<uint64_t>(advice), writable, {}};
  std::snprintf(o.text, sizeof o.text, "%s", path.c_str());
  return call(o) == 0;
}
void Mapper::close() { call({'x'}); }
void Mapper::close_and_drop() { call({'X'}); }
uint64_t Mapper::touch(uint64_t from, uint64_t to) { return static_cast<uint64_t>(call({'t', from, to})); }
std::vector<double> Mapper::touch_random(uint64_t space, uint64_t n, uint64_t seed) {
  const auto got = static_cast<uint64_t>(call({'r', space, std::min(n, samples_max_), seed}));
  return {shared_->ns, shared_->ns + got};
}
uint64_t Mapper::load_random(uint64_t space, uint64_t n, uint64_t seed) {
  return static_cast<uint64_t>(call({'l', space, n, seed}));
}
void Mapper::touch_random_until_stopped(uint64_t space, uint64_t seed) {
  shared_->stop = false;
  const Order o{'u', space, 0, seed, {}};
  if (::send(socket_, &o, sizeof o, MSG_NOSIGNAL) != sizeof o) std::exit(1);
}
void Mapper::stop() {
  shared_->stop = true;
  int64_t answer = 0;
  if (::recv(socket_, &answer, sizeof answer, 0) != sizeof answer) std::exit(1);
}
void Mapper::dirty(uint64_t page, uint64_t n, char value) { call({'d', page, n, static_cast<uint64_t>(value)}); }
int64_t Mapper::mappings() { return call({'m'}); }

void Mapper::serve(int socket) {
  int fd = -1;
  char* base = nullptr;
  uint64_t size = 0;
  std::string name;
  auto unmap = [&](bool drop) {
    if (base != nullptr) ::munmap(base, size);
    if (fd >= 0 && drop) {
      ::fdatasync(fd);
      ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    }
    if (fd >= 0) ::close(fd);
    base = nullptr;
    fd = -1;
  };
  Order o{};
  while (::recv(socket, &o, sizeof o, 0) == sizeof o) {
    int64_t answer = 0;
    volatile char sink = 0;
    switch (o.verb) {
      case 'o': {
        unmap(false);
        const bool writable = o.c != 0;
        fd = ::open(o.text, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
        size = o.a;
        name = o.text;
        void* p = fd < 0 ? MAP_FAILED
                         : ::mmap(nullptr, size, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
        answer = p == MAP_FAILED ? -1 : 0;
        if (p == MAP_FAILED) break;
        base = static_cast<char*>(p);
        const auto advice = static_cast<Advice>(o.b);
        if (advice != Advice::kNone)
          ::madvise(base, size, advice == Advice::kRandom ? MADV_RANDOM : MADV_SEQUENTIAL);
        break;
      }
      case 'x': unmap(false); break;
      case 'X': unmap(true); break;
      case 't': {
        const uint64_t t = now_ns();
        for (uint64_t i = o.a; i < o.b; i += kPage) sink = base[i];
        answer = static_cast<int64_t>(now_ns() - t);
        break;
      }
      case 'r': {
        // Different pages in a scattered order: an odd stride modulo a power of two visits each once.
        uint64_t pages = 1;
        while (pages * 2 <= o.a / kPage) pages *= 2;
        const uint64_t stride = mix(o.c) | 1, start = mix(o.c + 1), n = std::min(o.b, pages);
        for (uint64_t i = 0; i < n; ++i) {
          const uint64_t at = (start + i * stride) % pages * kPage;
          const uint64_t t = now_ns();
          sink = base[at];
          shared_->ns[i] = static_cast<uint32_t>(std::min<uint64_t>(now_ns() - t, UINT32_MAX));
        }
        answer = static_cast<int64_t>(n);
        break;
      }
      case 'l': {
        const uint64_t pages = o.a / kPage, t = now_ns();
        uint64_t r = o.c;
        for (uint64_t i = 0; i < o.b; ++i) {
          r = r * 6364136223846793005ULL + 1442695040888963407ULL;
          sink = base[(r >> 20) % pages * kPage];
        }
        answer = static_cast<int64_t>(now_ns() - t);
        break;
      }
      case 'u': {
        uint64_t r = o.c;
        for (; !shared_->stop.load(std::memory_order_relaxed); ++answer) {
          r = mix(r + 1);
          sink = base[r % (o.a / kPage) * kPage];
        }
        break;
      }
      case 'd':
        for (uint64_t i = 0; i < o.b; ++i) base[(o.a + i) * kPage] = static_cast<char>(o.c);
        break;
      case 'm': {
        std::ifstream maps("/proc/self/maps");
        for (std::string line; std::getline(maps, line);) answer += line.find(name) != std::string::npos;
        break;
      }
      default: break;
    }
    (void)sink;
    if (::send(socket, &answer, sizeof answer, 0) < 0) break;
  }
  ::_exit(0);
}

}  // namespace spillway::bench
