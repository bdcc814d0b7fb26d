// bench_blk: vhost-user-blk against Debian 12's qemu-storage-daemon (QSD), issues 2 and 4.
//
//   bench_blk [--json FILE] [--gate] [--rounds N] [--seconds S] [--sustained S] [--size MIB] [--only null|cached|sustained|uncached]
//             [--queues] [--qcow2]
//
// Server pinned to CPU 0, client (tools/blkload on libblkio, an independent vhost-user client) to CPU 1, the contestants in
// turn, medians over the rounds. Environment: SPILLWAY_BIN (folder of spillwayd; default: this program's),
// SPILLWAY_BLKLOAD (default: what `tools/guest/guest prepare blkload` made).
// --queues: 1, 2 and 4 queues on all CPUs, and per-queue state packed against padded (B1, B2).
// --qcow2: an overlay against a raw disk in one cache; allocating writes into fresh images; lookups in 1 TiB (issue 9).
//          --only reads|writes|lookup.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

#include <atomic>
#include <filesystem>
#include <map>
#include <set>
#include <sstream>
#include <thread>

#include "benchmarks/common/bench.h"

namespace spillway::bench {
namespace {

std::string read_all(int fd) {
  std::string out;
  char buf[4096];
  for (ssize_t n; (n = ::read(fd, buf, sizeof buf)) > 0;) out.append(buf, static_cast<size_t>(n));
  return out;
}

std::string text_of(const std::string& path) {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), {}};
}

// A child process; ended (SIGTERM, then SIGKILL after 10 s) with the object.
class Child {
 public:
  // cpu -1: not pinned. `log`: stdout and stderr go there; empty: stdout is a pipe.
  Child(const std::vector<std::string>& argv, int cpu, const std::string& log = {}) {
    int out[2] = {-1, -1};
    if (log.empty() && ::pipe2(out, O_CLOEXEC) != 0) std::perror("pipe");
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (cpu >= 0) pin(cpu);
      if (log.empty()) {
        ::dup2(out[1], 1);
      } else {
        const int fd = ::open(log.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
        ::dup2(fd, 1);
        ::dup2(fd, 2);
      }
      std::vector<char*> args;
      for (auto& a : argv) args.push_back(const_cast<char*>(a.c_str()));
      args.push_back(nullptr);
      ::execvp(args[0], args.data());
      ::_exit(127);
    }
    if (log.empty()) {
      ::close(out[1]);
      out_ = out[0];
    }
  }
  Child(const Child&) = delete;
  ~Child() { end(); }
  void end() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGTERM);
    for (int i = 0; i < 1000; ++i) {
      if (::waitpid(pid_, nullptr, WNOHANG) == pid_) {
        pid_ = 0;
        return;
      }
      ::usleep(10'000);
    }
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }
  std::string output(int* status) {
    std::string all = read_all(out_);
    ::close(out_);
    ::waitpid(pid_, status, 0);
    pid_ = 0;
    return all;
  }
  pid_t pid() const { return pid_; }
  bool alive() const { return pid_ > 0 && ::waitpid(pid_, nullptr, WNOHANG) == 0; }
  // The process that does the work: the last of the chain of only children (spillwayd's holder has one, the worker).
  pid_t worker() const {
    pid_t p = pid_;
    for (;;) {
      pid_t child = 0;
      std::ifstream in("/proc/" + std::to_string(p) + "/task/" + std::to_string(p) + "/children");
      if (!(in >> child)) return p;
      p = child;
    }
  }

 private:
  pid_t pid_ = 0;
  int out_ = -1;
};

struct Load {
  std::string op = "randread";
  std::string block = "4K";
  int depth = 32;
  int queues = 1;
  int gap_us = 0;
  std::string range;  // empty: the whole disk
};

class Bench {
 public:
  Bench(int argc, char** argv) : report("blk", argc, argv) {
    rounds = static_cast<int>(report.option("rounds", 3));
    seconds = report.option("seconds", 2);
    size_mib = static_cast<int>(report.option("size", 256));
    only = report.option("only", "");
    char self[4096] = {};
    if (::readlink("/proc/self/exe", self, sizeof self - 1) < 0) std::perror("readlink");
    const auto env = [](const char* name) { const char* v = std::getenv(name); return std::string(v ? v : ""); };
    bin = env("SPILLWAY_BIN");
    if (bin.empty()) bin = std::filesystem::path(self).parent_path();
    blkload = env("SPILLWAY_BLKLOAD");
    std::string cache = env("SPILLWAY_CACHE");
    if (cache.empty()) cache = env("HOME") + "/.cache/spillway";
    if (blkload.empty()) blkload = cache + "/blkio/blkload";
    if (::access(blkload.c_str(), X_OK) != 0) {
      std::fprintf(stderr, "bench_blk: %s is missing: run tools/guest/guest prepare blkload\n", blkload.c_str());
      std::exit(2);
    }
    std::string base = report.option("folder", "/var/tmp");
    dir = base + "/spillway-bench-XXXXXX";
    if (::mkdtemp(dir.data()) == nullptr) {
      std::perror(dir.c_str());
      std::exit(2);
    }
  }
  ~Bench() { std::filesystem::remove_all(dir); }

  // Data, not holes: a hole costs a reader nothing.
  std::string data_file(const std::string& name, int mib) {
    const std::string path = dir + "/" + name;
    const int fd = ::open(path.c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0600);
    std::vector<uint64_t> block(1 << 17);
    for (int i = 0; i < mib; ++i) {
      for (auto& v : block) v = v * 6364136223846793005ull + 1442695040888963407ull + static_cast<uint64_t>(i);
      if (::write(fd, block.data(), 1 << 20) != 1 << 20) std::perror("write");
    }
    ::fsync(fd);
    ::close(fd);
    return path;
  }

  std::unique_ptr<Child> serve(const std::vector<std::string>& argv, const std::string& socket, int cpu) {
    ::unlink(socket.c_str());
    auto child = std::make_unique<Child>(argv, cpu, dir + "/log");
    for (int i = 0; i < 1000; ++i) {
      struct stat st {};
      if (::stat(socket.c_str(), &st) == 0) break;
      if (i == 999 || !child->alive()) {
        std::fprintf(stderr, "bench_blk: %s does not serve:\n%s\n", argv[0].c_str(), text_of(dir + "/log").c_str());
        std::exit(2);
      }
      ::usleep(10'000);
    }
    ::usleep(200'000);
    return child;
  }
  std::unique_ptr<Child> qsd(const std::string& node, int queues, int cpu, const std::string& socket) {
    return serve({"qemu-storage-daemon", "--blockdev", node, "--export",
                  "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=" + socket +
                      ",writable=on,num-queues=" + std::to_string(queues)},
                 socket, cpu);
  }
  std::unique_ptr<Child> null_server(int queues, int cpu, const std::string& cpus, const std::string& socket) {
    return serve({bin + "/blk_server", socket, "null", "1G", std::to_string(queues), cpus}, socket, cpu);
  }
  std::unique_ptr<Child> daemon(const std::string& name, const std::string& config, int cpu, const std::string& socket) {
    const std::string file = dir + "/" + name + ".toml";
    std::ofstream(file) << config;
    return serve({bin + "/spillwayd", "--config", file}, socket, cpu);
  }

  Json run(const Load& load, const std::string& socket, pid_t server, double secs, const std::string& pins) {
    std::vector<std::string> argv{blkload, "-s", socket, "-o", load.op, "-b", load.block, "-q", std::to_string(load.depth),
                                  "-n", std::to_string(load.queues), "-t", std::to_string(secs), "-w", "0.5",
                                  "-p", std::to_string(server), "--seed", "7"};
    if (!pins.empty()) argv.insert(argv.end(), {"--pin", pins});
    if (!load.range.empty()) argv.insert(argv.end(), {"-r", load.range});
    if (load.gap_us > 0) argv.insert(argv.end(), {"--gap", std::to_string(load.gap_us)});
    Child client(argv, -1);
    int status = 0;
    const std::string out = client.output(&status);
    Json j = Json::parse(out, nullptr, false);
    if (j.is_discarded() || status != 0) {
      std::fprintf(stderr, "bench_blk: blkload failed: %s\n", out.c_str());
      std::exit(2);
    }
    return j;
  }

  struct Samples {
    std::vector<double> kiops, p50, p99, cpu, mb;
    void add(const Json& j) {
      kiops.push_back(j["iops"].get<double>() / 1e3);
      p50.push_back(j["lat_us"]["p50"]);
      p99.push_back(j["lat_us"]["p99"]);
      cpu.push_back(j["server_cpu_s_per_mio"]);
      mb.push_back(j["mb_s"]);
    }
  };
  void print(const std::string& what, const std::string& who, const Samples& s) {
    report.run(what, {{"contestant", who}, {"kiops", median(s.kiops)}, {"spread", spread(s.kiops)},
                      {"p50_us", median(s.p50)}, {"p99_us", median(s.p99)}, {"cpu_s_per_million", median(s.cpu)},
                      {"mb_s", median(s.mb)}, {"rounds", s.kiops.size()}});
  }
  bool wanted(const std::string& what) const { return only.empty() || what == only; }

  Report report;
  int rounds = 3, size_mib = 256;
  double seconds = 2;
  std::string only, dir, bin, blkload;
};

struct Server {
  std::string name, socket;
  std::unique_ptr<Child> child;
};

// One scenario for all servers in turn; medians by name.
std::map<std::string, Bench::Samples> compare(Bench& b, const std::string& what, const std::vector<Server*>& servers,
                                              const Load& load, double secs, int rounds) {
  std::map<std::string, Bench::Samples> all;
  std::vector<Contestant> turns;
  for (Server* s : servers)
    turns.push_back({s->name, [&b, &all, s, load, secs] {
                       all[s->name].add(b.run(load, s->socket, s->child->worker(), secs, "1"));
                     }});
  interleave(rounds, turns);
  for (Server* s : servers) b.print(what, s->name, all[s->name]);
  return all;
}

double ratio(const std::vector<double>& a, const std::vector<double>& b) {
  const double below = median(b);
  return below > 0 ? median(a) / below : 0;
}

std::string cached_config(const std::string& disk, const std::string& socket, int mib, const char* mode, int dirty_mib) {
  return "[host]\nreactors = 1\npsi = false\ncontrol = \"" + socket + ".control\"\n[cache]\nsize = \"" + std::to_string(mib) + "M\"\ndirty = \"" + std::to_string(dirty_mib) +
         "M\"\n[disk.d]\npath = \"" + disk + "\"\n[export.v]\ndevice = \"virtio-blk\"\nvolume = \"d\"\nqueues = 1\ncache = \"" +
         mode + "\"\nsocket = \"" + socket + "\"\n";
}

uint64_t rss_kib(pid_t p) {
  std::ifstream in("/proc/" + std::to_string(p) + "/status");
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("RssAnon:")) return std::strtoull(line.c_str() + 8, nullptr, 10);
  return 0;
}

// What the kernel backs of the frame table, which is a memfd of the worker: not in its private memory.
uint64_t table_kib(pid_t p) {
  std::error_code ignored;
  for (const auto& e : std::filesystem::directory_iterator("/proc/" + std::to_string(p) + "/fd", ignored)) {
    struct stat st {};
    if (std::filesystem::read_symlink(e.path(), ignored).string().starts_with("/memfd:spillway-cache-table") &&
        ::stat(e.path().c_str(), &st) == 0)
      return static_cast<uint64_t>(st.st_blocks) / 2;
  }
  return 0;
}

// Private memory for one more connected queue: 16 queues against 1, each of which has served a full ring.
void queue_memory(Bench& b) {
  uint64_t kib[2];
  for (int k = 0; k < 2; ++k) {
    const int n = k == 0 ? 1 : 16;
    Server s{"spillway", b.dir + "/m.sock", nullptr};
    s.child = b.null_server(n, 0, "0", s.socket);
    b.run({.depth = 32, .queues = n}, s.socket, s.child->worker(), 0.3, "1");
    kib[k] = rss_kib(s.child->worker());
  }
  b.report.run("memory of a connected queue", {{"kib", (static_cast<double>(kib[1]) - static_cast<double>(kib[0])) / 15}});
}

void against_qsd(Bench& b) {
  auto& gate = b.report;
  if (b.wanted("null")) {
    Server ours{"spillway", b.dir + "/a.sock", nullptr}, qsd{"qsd", b.dir + "/b.sock", nullptr};
    ours.child = b.null_server(1, 0, "0", ours.socket);
    qsd.child = b.qsd("driver=null-co,node-name=n,size=1073741824,read-zeroes=off", 1, 0, qsd.socket);
    auto r = compare(b, "null 4K randread QD32", {&ours, &qsd}, {}, b.seconds, b.rounds);
    gate.gate("null QD32 IOPS, ratio to QSD", ratio(r["spillway"].kiops, r["qsd"].kiops), ">=", 2.5);
  }
  if (b.wanted("cached")) {
    // QSD's page-cached file both ways: with its worker threads (the default; here they share its one CPU) and with io_uring
    // (no threads). Each ratio is to the better of the two. A file each: direct and cached writes to one collide.
    Server ours{"spillway", b.dir + "/a.sock", nullptr}, threads{"qsd threads", b.dir + "/b.sock", nullptr},
        uring{"qsd io_uring", b.dir + "/c.sock", nullptr};
    const std::vector<Server*> all{&ours, &threads, &uring};
    ours.child = b.daemon("cached", cached_config(b.data_file("cached", b.size_mib), ours.socket, b.size_mib * 2, "isolated", 128),
                          0, ours.socket);
    const uint64_t before_kib = rss_kib(ours.child->worker());
    threads.child = b.qsd("driver=file,node-name=n,filename=" + b.data_file("threads", b.size_mib), 1, 0, threads.socket);
    uring.child = b.qsd("driver=file,aio=io_uring,node-name=n,filename=" + b.data_file("uring", b.size_mib), 1, 0, uring.socket);
    for (Server* s : all)  // warm
      b.run({.op = "read", .block = "128K", .depth = 8}, s->socket, s->child->worker(), 1 + b.size_mib / 400.0, "1");
    const auto to_best = [](auto& r, auto of, bool more) {
      const double a = median(of(r["qsd threads"])), c = median(of(r["qsd io_uring"]));
      const double best = more ? std::max(a, c) : std::min(a, c);
      return best > 0 ? median(of(r["spillway"])) / best : 0;
    };
    const auto kiops = [](const Bench::Samples& s) { return s.kiops; };
    const auto cpu = [](const Bench::Samples& s) { return s.cpu; };
    const auto p50 = [](const Bench::Samples& s) { return s.p50; };
    const auto mb = [](const Bench::Samples& s) { return s.mb; };
    auto r = compare(b, "cached 4K randread QD32", all, {}, b.seconds, b.rounds);
    gate.gate("cached QD32 IOPS, ratio to QSD", to_best(r, kiops, true), ">=", 2.5);
    gate.gate("cached QD32 CPU per I/O, ratio to QSD", to_best(r, cpu, false), "<=", 0.5);
    r = compare(b, "cached 4K randread QD1 after 1 ms gaps", all, {.depth = 1, .gap_us = 1000}, b.seconds, b.rounds);
    gate.gate("cached QD1 p50 after gaps, ratio to QSD", to_best(r, p50, false), "<=", 0.6);
    compare(b, "cached 4K randread QD1", all, {.depth = 1}, b.seconds, b.rounds);
    r = compare(b, "cached 128K read QD8", all, {.op = "read", .block = "128K", .depth = 8}, b.seconds, b.rounds);
    gate.gate("cached 128K sequential read, ratio to QSD", to_best(r, mb, true), ">=", 1.2);
    r = compare(b, "4K randwrite QD32 within the dirty limit", all, {.op = "randwrite", .range = "64M"}, b.seconds, b.rounds);
    gate.gate("4K random writes within the limit, ratio to QSD", to_best(r, kiops, true), ">=", 5);
    // What the worker holds beside the frames: all of it and the frame table, so an upper bound of index and metadata.
    const uint64_t grown_kib = rss_kib(ours.child->worker()) - before_kib, in_table_kib = table_kib(ours.child->worker());
    b.report.run("memory", {{"worker_kib_before", before_kib}, {"grown_kib", grown_kib}, {"frame_table_kib", in_table_kib},
                            {"cached_mib", b.size_mib},
                            {"kib_per_cached_gib", static_cast<double>(grown_kib + in_table_kib) * 1024 / b.size_mib}});
    gate.gate("index and metadata, percent of what is cached",
              static_cast<double>(grown_kib + in_table_kib) / (b.size_mib * 1024.0) * 100, "<=", 1.2);
    queue_memory(b);
    // Idle: two servers, nothing to do.
    const auto cpu_of = [](pid_t p) {
      std::string s = text_of("/proc/" + std::to_string(p) + "/stat");
      unsigned long long user = 0, system = 0;
      std::sscanf(s.c_str() + s.rfind(')') + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user, &system);
      return static_cast<double>(user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
    };
    ::sleep(10);  // the writes before have to reach the disk first
    const double before = cpu_of(ours.child->worker());
    ::sleep(5);
    gate.gate("idle CPU seconds in 5 s", cpu_of(ours.child->worker()) - before, "<=", 0.02);
  }
  if (b.wanted("sustained")) {
    const std::string file = b.data_file("sustained", 512);
    Server ours{"spillway", b.dir + "/a.sock", nullptr}, qsd{"qsd", b.dir + "/b.sock", nullptr};
    ours.child = b.daemon("sustained", cached_config(file, ours.socket, 512, "isolated", 64), 0, ours.socket);
    qsd.child = b.qsd("driver=file,aio=io_uring,node-name=n,filename=" + b.data_file("sustained-qsd", 512), 1, 0, qsd.socket);
    auto r = compare(b, "4K randwrite sustained, working set 4x the limit", {&ours, &qsd}, {.op = "randwrite", .range = "256M"},
                     b.report.option("sustained", 60), 1);
    gate.gate("sustained 4K random writes, ratio to QSD", ratio(r["spillway"].kiops, r["qsd"].kiops), ">=", 1);
  }
  if (b.wanted("uncached")) {
    const std::string file = b.data_file("uncached", b.size_mib);
    Server ours{"spillway", b.dir + "/a.sock", nullptr}, qsd{"qsd", b.dir + "/b.sock", nullptr};
    ours.child = b.daemon("uncached", cached_config(file, ours.socket, 64, "none", 32), 0, ours.socket);
    qsd.child = b.qsd("driver=file,locking=off,node-name=n,cache.direct=on,aio=io_uring,filename=" + file, 1, 0, qsd.socket);
    std::vector<double> raw;
    std::map<std::string, Bench::Samples> r;
    auto fio = [&] {
      Child c({"fio", "--name=raw", "--filename=" + file, "--ioengine=io_uring", "--iodepth=32", "--rw=randread", "--bs=4k",
               "--direct=1", "--time_based", "--runtime=" + std::to_string(std::max(1, static_cast<int>(b.seconds))),
               "--output-format=json"}, 0);
      int status = 0;
      Json j = Json::parse(c.output(&status), nullptr, false);
      if (!j.is_discarded()) raw.push_back(j["jobs"][0]["read"]["iops"].get<double>() / 1e3);
    };
    std::vector<Contestant> turns{{"raw", fio}};
    for (Server* s : {&ours, &qsd})
      turns.push_back({s->name, [&, s] { r[s->name].add(b.run({}, s->socket, s->child->worker(), b.seconds, "1")); }});
    interleave(b.rounds, turns);
    b.print("uncached 4K randread QD32", "spillway", r["spillway"]);
    b.print("uncached 4K randread QD32", "qsd", r["qsd"]);
    b.report.run("uncached 4K randread QD32", {{"contestant", "raw io_uring"}, {"kiops", median(raw)}, {"spread", spread(raw)}});
    gate.gate("uncached QD32 IOPS, ratio to QSD", ratio(r["spillway"].kiops, r["qsd"].kiops), ">=", 1.3);
    gate.gate("uncached QD32 CPU per I/O, ratio to QSD", ratio(r["spillway"].cpu, r["qsd"].cpu), "<=", 0.8);
    gate.gate("uncached QD32 IOPS, ratio to raw io_uring", ratio(r["spillway"].kiops, raw), ">=", 0.9);
  }
}

// B1: what a queue's owner writes for each request, for queues side by side in memory or in lines of their own.
struct PackedState {
  std::atomic<uint64_t> position{0}, reads{0}, bytes{0};
};
struct alignas(128) PaddedState : PackedState {};

template <class State>
double owners(int queues, double seconds) {
  std::vector<State> states(static_cast<size_t>(queues));
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> total{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < queues; ++i)
    threads.emplace_back([&, i] {
      pin(i);
      State& s = states[static_cast<size_t>(i)];
      uint64_t n = 0;
      while (!stop.load(std::memory_order_relaxed)) {
        for (int k = 0; k < 64; ++k, ++n) {
          s.position.store(s.position.load(std::memory_order_relaxed) + 1, std::memory_order_release);
          s.reads.store(s.reads.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
          s.bytes.store(s.bytes.load(std::memory_order_relaxed) + 4096, std::memory_order_relaxed);
        }
      }
      total.fetch_add(n);
    });
  ::usleep(static_cast<useconds_t>(seconds * 1e6));
  stop = true;
  for (auto& t : threads) t.join();
  return static_cast<double>(total.load()) / seconds / 1e6;
}

void queues(Bench& b) {
  std::map<int, std::pair<std::vector<double>, std::vector<double>>> layout;
  for (int r = 0; r < b.rounds; ++r)
    for (int n : {1, 2, 4}) {
      layout[n].first.push_back(owners<PackedState>(n, 0.5));
      layout[n].second.push_back(owners<PaddedState>(n, 0.5));
    }
  for (auto& [n, v] : layout)
    b.report.run("per-queue state, updates of " + std::to_string(n) + " owners",
                 {{"packed_millions_s", median(v.first)}, {"padded_millions_s", median(v.second)},
                  {"padded_to_packed", ratio(v.second, v.first)}});
  b.report.gate("two owners, padded to packed", ratio(layout[2].second, layout[2].first), ">=", 1.5);
  // The whole server: reactors and client threads share the CPUs here, so growth is bounded by the machine.
  std::string cpus;
  for (int i = 0; i < bench::cpus(); ++i) cpus += (i ? "," : "") + std::to_string(i);
  Server ours{"spillway", b.dir + "/a.sock", nullptr}, qsd{"qsd", b.dir + "/b.sock", nullptr};
  ours.child = b.null_server(4, -1, cpus, ours.socket);
  qsd.child = b.qsd("driver=null-co,node-name=n,size=1073741824,read-zeroes=off", 4, -1, qsd.socket);
  for (int n : {1, 2, 4}) {
    std::map<std::string, Bench::Samples> all;
    std::vector<Contestant> turns;
    for (Server* s : {&ours, &qsd})
      turns.push_back({s->name, [&, s] {
                         all[s->name].add(b.run({.queues = n}, s->socket, s->child->worker(), b.seconds, ""));
                       }});
    interleave(b.rounds, turns);
    for (Server* s : {&ours, &qsd}) b.print("null 4K randread QD32, " + std::to_string(n) + " queues", s->name, all[s->name]);
  }
}

int run_to_end(const std::string& command) {
  int status = 0;
  Child c({"sh", "-c", command}, -1);
  c.output(&status);
  return status;
}

// An overlay that has every other cluster of its own, and a raw disk: one daemon, one cache, two exports.
void qcow2_reads(Bench& b) {
  const std::string base = b.data_file("base", b.size_mib), plain = b.data_file("raw", b.size_mib), image = b.dir + "/overlay.qcow2";
  std::ofstream script(b.dir + "/script");
  for (int at = 0; at < b.size_mib * 1024; at += 128) script << "write -q -P 7 " << at << "k 64k\n";
  script.close();
  if (run_to_end("qemu-img create -q -f qcow2 -F raw -b " + base + " " + image + " && qemu-io -f qcow2 " + image + " < " + b.dir +
                 "/script") != 0) {
    std::fprintf(stderr, "bench_blk: qemu-img or qemu-io failed\n");
    std::exit(2);
  }
  const std::string raw = b.dir + "/raw.sock", overlay = b.dir + "/overlay.sock";
  const std::string config =
      "[host]\nreactors = 1\npsi = false\ncontrol = \"" + b.dir + "/control\"\n[cache]\nsize = \"" + std::to_string(3 * b.size_mib) +
      "M\"\n[disk.raw]\npath = \"" + plain + "\"\n[disk.f]\npath = \"" + image +
      "\"\n[volume.v]\nlayer = \"qcow2\"\nmembers = [\"f\"]\n[export.raw]\ndevice = \"virtio-blk\"\nvolume = \"raw\"\n" +
      "socket = \"" + raw + "\"\n[export.overlay]\ndevice = \"virtio-blk\"\nvolume = \"v\"\nsocket = \"" + overlay + "\"\n";
  auto daemon = b.daemon("qcow2", config, 0, overlay);
  const std::pair<const char*, std::string> exports[] = {{"raw", raw}, {"overlay", overlay}};
  for (auto& [name, socket] : exports)
    b.run({.op = "read", .block = "128K", .depth = 8}, socket, daemon->worker(), 2 + b.size_mib / 200.0, "1");
  for (int depth : {32, 1}) {
    std::map<std::string, Bench::Samples> all;
    std::vector<Contestant> turns;
    for (auto& [name, socket] : exports)
      turns.push_back({name, [&, n = std::string(name), s = socket] {
                         all[n].add(b.run({.depth = depth}, s, daemon->worker(), b.seconds, "1"));
                       }});
    interleave(b.rounds, turns);
    const std::string what = "qcow2 cached 4K randread QD" + std::to_string(depth);
    for (auto& [name, socket] : exports) b.print(what, name, all[name]);
    if (depth == 32)
      b.report.gate("overlay, cached QD32 IOPS, ratio to raw in the same cache", ratio(all["overlay"].kiops, all["raw"].kiops), ">=", 0.9);
  }
}

// Until the disk below `folder` does nothing any more: what a contestant left (writeback; with the mount option `discard` also
// the blocks of the file that was removed, one discard a fragment, long after the journal is written) is not the next one's.
// At most 30 s.
void settle(const std::string& folder) {
  struct stat st {};
  if (::stat(folder.c_str(), &st) != 0) return;
  ::sync();
  std::string last;
  for (int i = 0, same = 0; i < 300 && same < 5; ++i) {
    ::usleep(100'000);
    std::ifstream in("/proc/diskstats");
    std::string now;
    for (std::string line; std::getline(in, line);) {
      std::istringstream f(line);
      unsigned major_nr = 0, minor_nr = 0;
      std::string name;
      uint64_t v[15] = {};  // reads, .., writes at 4, in flight at 8, discards at 11
      f >> major_nr >> minor_nr >> name;
      for (uint64_t& n : v) f >> n;
      if (major_nr == major(st.st_dev) && minor_nr == minor(st.st_dev))
        now = std::to_string(v[0]) + " " + std::to_string(v[4]) + " " + std::to_string(v[11]) + (v[8] != 0 ? " busy" : "");
    }
    same = now == last && !now.ends_with("busy") ? same + 1 : 0;
    last = std::move(now);
  }
}

// Each run into a fresh image; random clusters of a large one, so that nearly every write allocates. Cached by us against
// cached by the kernel, and past all caches against the same.
void qcow2_writes(Bench& b) {
  const std::string image = b.dir + "/fresh.qcow2", socket = b.dir + "/w.sock";
  auto ours = [&](const char* mode) {
    return b.daemon("alloc", "[host]\nreactors = 1\npsi = false\ncontrol = \"" + socket + ".control\"\n[cache]\nsize = \"6G\"\ndirty = \"4G\"\n" +
                    "[disk.f]\npath = \"" + image + "\"\n[volume.v]\nlayer = \"qcow2\"\nmembers = [\"f\"]\n[export.v]\ndevice = \"virtio-blk\"\n" +
                    "volume = \"v\"\ncache = \"" + mode + "\"\nsocket = \"" + socket + "\"\n", 0, socket);
  };
  auto qsd = [&](const char* how) {
    return b.qsd(std::string("driver=qcow2,node-name=n,file.driver=file,file.locking=off,") + how + "file.filename=" + image, 1, 0, socket);
  };
  struct Kind {
    const char* name;
    std::function<std::unique_ptr<Child>()> serve;
  };
  const Kind kinds[] = {{"spillway cached", [&] { return ours("isolated"); }},
                        {"qsd page cache", [&] { return qsd(""); }},
                        {"spillway uncached", [&] { return ours("none"); }},
                        {"qsd direct io_uring", [&] { return qsd("file.cache.direct=on,file.aio=io_uring,"); }}};
  for (const char* block : {"4K", "64K"}) {
    std::map<std::string, Bench::Samples> all;
    std::vector<Contestant> turns;
    for (const Kind& k : kinds)
      turns.push_back({k.name, [&, block] {
                         if (run_to_end("qemu-img create -q -f qcow2 " + image + " 16G") != 0) std::exit(2);
                         settle(b.dir);
                         auto server = k.serve();
                         all[k.name].add(b.run({.op = "randwrite", .block = block}, socket, server->worker(), b.seconds, "1"));
                         ::unlink(image.c_str());
                       }});
    interleave(b.rounds, turns);
    const std::string what = std::string("qcow2 allocating ") + block + " writes QD32";
    for (const Kind& k : kinds) b.print(what, k.name, all[k.name]);
    b.report.gate(what + ", cached, ratio to QSD", ratio(all["spillway cached"].kiops, all["qsd page cache"].kiops), ">=", 1.5);
    b.report.gate(what + ", uncached, ratio to QSD", ratio(all["spillway uncached"].kiops, all["qsd direct io_uring"].kiops), ">=", 1.5);
  }
}

void qcow2(Bench& b) {
  if (b.wanted("reads")) qcow2_reads(b);
  if (b.wanted("writes")) qcow2_writes(b);
  if (b.wanted("lookup")) {
    int status = 0;
    Child lookup({b.bin + "/bench_qcow2", "lookup"}, 0);
    const Json j = Json::parse(lookup.output(&status), nullptr, false);
    if (j.is_discarded() || status != 0) {
      std::fprintf(stderr, "bench_blk: bench_qcow2 lookup failed\n");
      std::exit(2);
    }
    b.report.run("qcow2 lookup, 1 TiB fully allocated, scattered", j);
    b.report.gate("table reads per I/O with an L2 cache of 128 MiB", j["table_reads_per_io"], "<=", 0);
    b.report.gate("bytes of L2 tables held, against the 128 MiB stated", j["l2_cache_bytes"], "<=", 128.0 * 1024 * 1024);
  }
}

}  // namespace
}  // namespace spillway::bench

int main(int argc, char** argv) {
  using namespace spillway::bench;
  ::signal(SIGPIPE, SIG_IGN);
  Bench b(argc, argv);
  if (b.report.option("queues", 0.0) != 0) queues(b);
  else if (b.report.option("qcow2", 0.0) != 0) qcow2(b);
  else against_qsd(b);
  return b.report.finish();
}
