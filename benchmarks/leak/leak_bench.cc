// bench_leak: can a tenant tell which blocks of a shared image another tenant has read (P3, P4)?
//
//   bench_leak [--json FILE] [--gate] [--runs N] [--only isolated,qsd-cached,qsd-direct,trusted] [--folder DIR]
//              [--pool FILE[,FILE...]] [--seed N]
//
// Two vhost-user clients, one a tenant, on two exports of one image: spillwayd (isolated; trusted, documented as leaking),
// two qemu-storage-daemons with the host's page cache (the control: must come out >= 0.9) and with O_DIRECT (the
// floor). In a run the victim reads a random half of 1000 blocks, the attacker reads every block once in random order
// and times it; what tells touched from untouched blocks is given as area under the ROC curve (0.5: nothing).
//
//   cold touch     one timed read of each block of a cold image
//   repeated       the same three times over with the same secret, the attacker's own copies evicted between; mean
//   flush+reload   the attacker has read every block before, flushes and evicts its own copies; then victim, then attacker
//   evict+time     the attacker has read every block, the victim touches its half, the attacker fills its own share of the
//                  cache and times what is left of the blocks: do the victim's touches keep or drop the attacker's pages?
//   warm hits      both have read every block; the victim reads its half again, then the attacker times a hit on each of its
//                  own: is a frame that both share warm in the CPU's cache? Listed, not gated (docs/threat-model.md)
//   classifier     logistic regression on everything the attacker saw of a block above the last (reads, immediate second
//                  reads, reads before and after it), trained on other runs
//
// accuracy: of a threshold half-way between the medians of calibration reads that are interleaved with the cold ones.
// Intervals: DeLong's variance, mean over runs. The gate's intervals hold together (95 % for all strategies at once).
// --pool takes the runs of earlier JSON files (--json) as well, so that a quiet minute at a time is enough.
// The device's own cache is below all of them: every block is read from the device once before, so that it knows them all.
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <sstream>

#include "benchmarks/common/bench.h"
#include "benchmarks/leak/auc.h"
#include "src/export/vhost_user/testing.h"

namespace spillway::bench {
namespace {

constexpr uint64_t kKiB = 1024, kMiB = 1024 * kKiB;
constexpr size_t kBlocks = 1000, kCalibration = 100;
constexpr uint64_t kSpacing = 64 * kKiB;                       // between blocks: beyond any read-around
constexpr uint64_t kEvictAt = 96 * kMiB, kEvictBytes = 20 * kMiB;
constexpr uint64_t kImageBytes = kEvictAt + kEvictBytes;
constexpr uint64_t kCacheBytes = 32 * kMiB;                    // 16 MiB a tenant
constexpr int kRepeats = 3;
const char* const kStrategies[] = {"cold touch", "repeated", "flush+reload", "evict+time", "classifier", "warm hits"};
constexpr double kTogether = 2.576;                            // 99 %: five of them at 95 % (Bonferroni)

[[noreturn]] void die(const std::string& why) {
  std::fprintf(stderr, "bench_leak: %s\n", why.c_str());
  std::exit(2);
}

// A server process on CPU 0; ended with the object.
class Server {
 public:
  Server(const std::vector<std::string>& argv, const std::string& socket, const std::string& log,
         const std::string& cgroup_procs = {}) {
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      pin(0);
      if (!cgroup_procs.empty()) std::ofstream(cgroup_procs) << ::getpid() << std::flush;
      const int fd = ::open(log.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
      ::dup2(fd, 1);
      ::dup2(fd, 2);
      std::vector<char*> args;
      for (auto& a : argv) args.push_back(const_cast<char*>(a.c_str()));
      args.push_back(nullptr);
      ::execvp(args[0], args.data());
      ::_exit(127);
    }
    struct stat st {};
    for (int i = 0; ::stat(socket.c_str(), &st) != 0; ++i) {
      if (i == 1000 || ::waitpid(pid_, nullptr, WNOHANG) == pid_) die(argv[0] + " does not serve, see " + log);
      ::usleep(10'000);
    }
    ::usleep(200'000);
  }
  Server(const Server&) = delete;
  ~Server() {
    ::kill(pid_, SIGTERM);
    for (int i = 0; i < 1000; ++i) {
      if (::waitpid(pid_, nullptr, WNOHANG) == pid_) return;
      ::usleep(10'000);
    }
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }

 private:
  pid_t pid_;
};

// A guest: one queue, one request at a time, spinning for the answer as an attacker would.
class Guest {
 public:
  explicit Guest(const std::string& socket) {
    if (!client_.connect(socket)) die("cannot connect to " + socket);
    if (!client_.start({.inflight = false})) die("handshake on " + socket);
  }
  double read(uint64_t offset, uint32_t length = 4096) { return request(0, offset / 512, length); }
  void flush() { request(4, 0, 0); }
  void scan(uint64_t offset, uint64_t length, int times) {
    constexpr uint32_t kPiece = 128 * kKiB;
    for (uint64_t at = offset; at < offset + length; at += kPiece)
      for (int k = 0; k < times; ++k) read(at, kPiece);
  }
  // All of its own share of a cache that resists scans: everything twice, two times over.
  void evict_own() {
    for (int k = 0; k < 2; ++k) scan(kEvictAt, kEvictBytes, 2);
  }

 private:
  double request(uint32_t type, uint64_t sector, uint32_t length) {
    auto& ring = client_.rings[0].ring;
    const uint64_t begin = now_ns();
    client_.submit(0, 0, type, sector, client_.data(0, 0), length);
    for (uint64_t spins = 0; !ring.take(); ++spins)
      if (spins % 65536 == 65535 && now_ns() - begin > 20'000'000'000) die("no answer within 20 s");
    const auto took = static_cast<double>(now_ns() - begin);
    if (type == 0 && client_.status(0) != 0) die("a read failed");
    return took;
  }
  vhost::testing::Client client_;
};

struct Trace {
  std::vector<bool> secret = std::vector<bool>(kBlocks);
  // By block. first[r]: timed reads; second: at once after; before, after: the reads beside it in time.
  std::vector<std::vector<double>> first, second, before, after;
  std::vector<double> reload, kept, warm;
  double accuracy = 0;
  explicit Trace() {
    for (auto* v : {&first, &second, &before, &after}) v->assign(kRepeats, std::vector<double>(kBlocks));
    reload.resize(kBlocks);
    kept.resize(kBlocks);
    warm.resize(kBlocks);
  }
};

std::vector<size_t> shuffled(std::mt19937_64& r) {
  std::vector<size_t> order(kBlocks);
  for (size_t i = 0; i < kBlocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), r);
  return order;
}

// One way of serving the image to two tenants.
struct Setup {
  std::string name;
  std::vector<std::unique_ptr<Server>> servers;
  std::unique_ptr<Guest> victim, attacker;
  int image_fd = -1;            // page cache below: what it holds of the image is dropped where tenants cannot evict it
  std::string cgroup;

  ~Setup() {
    victim.reset();
    attacker.reset();
    servers.clear();
    if (image_fd >= 0) ::close(image_fd);
    if (!cgroup.empty()) ::rmdir(cgroup.c_str());
  }
  void cool(bool victim_too) {
    if (image_fd >= 0) {
      ::posix_fadvise(image_fd, 0, 0, POSIX_FADV_DONTNEED);
      return;
    }
    attacker->evict_own();
    if (victim_too) victim->evict_own();
  }
  void touch(const Trace& t, std::mt19937_64& r) {
    for (size_t i : shuffled(r))
      if (t.secret[i]) victim->read(i * kSpacing);
  }
};

// The attacker's timed pass: every block once, and once more at once.
void probe(Setup& s, Trace& t, int repeat, std::mt19937_64& r, std::vector<double>* hits, std::vector<double>* misses) {
  std::vector<double> in_time;
  const auto order = shuffled(r);
  size_t spare = 0;
  for (size_t k = 0; k < kBlocks; ++k) {
    const size_t i = order[k];
    in_time.push_back(t.first[repeat][i] = s.attacker->read(i * kSpacing));
    t.second[repeat][i] = s.attacker->read(i * kSpacing);
    if (hits != nullptr && k % (kBlocks / kCalibration) == 0) {
      hits->push_back(s.attacker->read(i * kSpacing));
      misses->push_back(s.attacker->read((kBlocks + spare++) * kSpacing));  // a block that nobody touches
    }
  }
  for (size_t k = 0; k < kBlocks; ++k) {
    t.before[repeat][order[k]] = in_time[k == 0 ? k : k - 1];
    t.after[repeat][order[k]] = in_time[k + 1 == kBlocks ? k : k + 1];
  }
}

Trace one_run(Setup& s, uint64_t seed) {
  std::mt19937_64 r(seed);
  Trace t;
  for (size_t k = 0; k < kBlocks; ++k) t.secret[k] = k < kBlocks / 2;
  std::shuffle(t.secret.begin(), t.secret.end(), r);
  std::vector<double> hits, misses;
  s.cool(true);
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    if (repeat != 0) s.cool(false);
    s.touch(t, r);
    probe(s, t, repeat, r, repeat == 0 ? &hits : nullptr, &misses);
  }
  const double threshold = (median(hits) + median(misses)) / 2;
  size_t right = 0;
  for (size_t i = 0; i < kBlocks; ++i) right += (t.first[0][i] < threshold) == t.secret[i];
  t.accuracy = static_cast<double>(right) / kBlocks;

  for (size_t i : shuffled(r)) s.attacker->read(i * kSpacing);
  for (int k = 0; k < 16; ++k) s.attacker->flush();
  s.cool(false);
  s.touch(t, r);
  for (size_t i : shuffled(r)) t.reload[i] = s.attacker->read(i * kSpacing);

  s.cool(true);
  for (size_t i : shuffled(r)) s.attacker->read(i * kSpacing);
  s.touch(t, r);
  // The page cache of the control is one for both, and holds what the daemons themselves allocate since it was limited.
  s.attacker->scan(kEvictAt, s.image_fd >= 0 ? kEvictBytes : kCacheBytes / 2, 1);
  for (size_t i : shuffled(r)) t.kept[i] = s.attacker->read(i * kSpacing);

  s.cool(true);
  for (Guest* g : {s.attacker.get(), s.victim.get()})
    for (int k = 0; k < 2; ++k)
      for (size_t i : shuffled(r)) g->read(i * kSpacing);
  // Through more than the CPU's second-level cache, and not more than there is room for in the view.
  for (int k = 0; k < 2; ++k) s.attacker->scan(kEvictAt, kCacheBytes / 4, 1);
  s.touch(t, r);
  for (size_t i : shuffled(r)) t.warm[i] = s.attacker->read(i * kSpacing);
  return t;
}

std::vector<double> faster(const std::vector<double>& latency) {
  std::vector<double> score;
  for (double x : latency) score.push_back(-x);
  return score;
}

std::vector<std::vector<double>> features(const Trace& t) {
  std::vector<std::vector<double>> rows(kBlocks);
  auto add = [&](const std::vector<double>& v) {
    const auto s = normal_scores(v);
    for (size_t i = 0; i < kBlocks; ++i) rows[i].push_back(s[i]);
  };
  for (int k = 0; k < kRepeats; ++k)
    for (auto* v : {&t.first[k], &t.second[k], &t.before[k], &t.after[k]}) add(*v);
  add(t.reload);
  add(t.kept);
  return rows;
}

// Per strategy, one AUC a run. The classifier of a run is trained on the other ones of this invocation.
std::map<std::string, std::vector<Auc>> judge(const std::vector<Trace>& runs) {
  std::map<std::string, std::vector<Auc>> out;
  std::vector<std::vector<std::vector<double>>> rows;
  for (const Trace& t : runs) rows.push_back(features(t));
  for (size_t k = 0; k < runs.size(); ++k) {
    const Trace& t = runs[k];
    std::vector<double> mean(kBlocks, 0);
    for (auto& pass : t.first) {
      const auto s = normal_scores(pass);
      for (size_t i = 0; i < kBlocks; ++i) mean[i] += s[i];
    }
    out["cold touch"].push_back(auc(faster(t.first[0]), t.secret));
    out["repeated"].push_back(auc(faster(mean), t.secret));
    out["flush+reload"].push_back(auc(faster(t.reload), t.secret));
    out["evict+time"].push_back(auc(faster(t.kept), t.secret));
    out["warm hits"].push_back(auc(faster(t.warm), t.secret));
    if (runs.size() < 2) continue;
    std::vector<std::vector<double>> train;
    std::vector<bool> label;
    for (size_t o = 0; o < runs.size(); ++o) {
      if (o == k) continue;
      train.insert(train.end(), rows[o].begin(), rows[o].end());
      label.insert(label.end(), runs[o].secret.begin(), runs[o].secret.end());
    }
    Classifier c;
    c.train(train, label);
    std::vector<double> score;
    for (auto& row : rows[k]) score.push_back(c.score(row));
    out["classifier"].push_back(auc(score, t.secret));
  }
  return out;
}

class Bench {
 public:
  Bench(int argc, char** argv) : report_("leak", argc, argv) {
    runs_ = static_cast<size_t>(report_.option("runs", 10));
    seed_ = static_cast<uint64_t>(report_.option("seed", static_cast<double>(now_ns() % 1'000'000'007)));
    only_ = report_.option("only", "isolated,trusted,qsd-cached,qsd-direct");
    char self[4096] = {};
    if (::readlink("/proc/self/exe", self, sizeof self - 1) < 0) die("readlink");
    const char* bin = std::getenv("SPILLWAY_BIN");
    bin_ = bin != nullptr ? std::string(bin) : std::filesystem::path(self).parent_path().string();
    dir_ = report_.option("folder", "/var/tmp") + "/spillway-leak-XXXXXX";
    if (::mkdtemp(dir_.data()) == nullptr) die(dir_);
    image_ = dir_ + "/image";
    make_image();
  }
  ~Bench() { std::filesystem::remove_all(dir_); }

  int main() {
    for (std::string file, list = report_.option("pool", ""); take(list, file);) read_pool(file);
    for (std::string name, list = only_; take(list, name);) {
      auto setup = make(name);
      std::vector<Trace> traces;
      for (size_t k = 0; k < runs_; ++k) traces.push_back(one_run(*setup, seed_ * 1000 + k));
      setup.reset();
      keep(name, traces);
    }
    gates();
    return report_.finish();
  }

 private:
  static bool take(std::string& list, std::string& head) {
    if (list.empty()) return false;
    const auto comma = list.find(',');
    head = list.substr(0, comma);
    list = comma == std::string::npos ? "" : list.substr(comma + 1);
    return true;
  }

  // Data, not holes; then once from the device.
  void make_image() {
    const int fd = ::open(image_.c_str(), O_CREAT | O_RDWR | O_TRUNC | O_DIRECT, 0600);
    if (fd < 0) die(image_);
    auto* block = static_cast<uint64_t*>(std::aligned_alloc(4096, kMiB));
    std::mt19937_64 r(seed_);
    for (uint64_t at = 0; at < kImageBytes; at += kMiB) {
      for (size_t k = 0; k < kMiB / 8; ++k) block[k] = r();
      if (::pwrite(fd, block, kMiB, static_cast<off_t>(at)) != static_cast<ssize_t>(kMiB)) die(image_ + ": write");
    }
    ::fsync(fd);
    for (uint64_t at = 0; at < kImageBytes; at += kMiB)
      if (::pread(fd, block, kMiB, static_cast<off_t>(at)) != static_cast<ssize_t>(kMiB)) die(image_ + ": read");
    std::free(block);
    ::close(fd);
  }

  std::unique_ptr<Setup> make(const std::string& name) {
    auto s = std::make_unique<Setup>();
    s->name = name;
    const std::string a = dir_ + "/a.sock", v = dir_ + "/v.sock";
    ::unlink(a.c_str());
    ::unlink(v.c_str());
    if (name == "isolated" || name == "trusted") {
      std::ofstream(dir_ + "/leak.toml")
          << "[host]\nreactors = 1\npsi = false\ncontrol = \"" << dir_ << "/control\"\n[cache]\nsize = \""
          << kCacheBytes / kMiB << "M\"\n[disk.base]\npath = \"" << image_
          << "\"\n[group.attacker]\nweight = 100\n[group.victim]\nweight = 100\n"
          << "[export.a]\ndevice = \"virtio-blk\"\nvolume = \"base\"\ngroup = \"attacker\"\nreadonly = true\ncache = \""
          << name << "\"\nsocket = \"" << a << "\"\n"
          << "[export.v]\ndevice = \"virtio-blk\"\nvolume = \"base\"\ngroup = \"victim\"\nreadonly = true\ncache = \""
          << name << "\"\nsocket = \"" << v << "\"\n";
      s->servers.push_back(std::make_unique<Server>(
          std::vector<std::string>{bin_ + "/spillwayd", "--config", dir_ + "/leak.toml"}, v, dir_ + "/log"));
    } else if (name == "qsd-cached" || name == "qsd-direct") {
      const bool direct = name == "qsd-direct";
      s->image_fd = ::open(image_.c_str(), O_RDONLY | O_CLOEXEC);
      if (!direct) limit_page_cache(*s);
      for (const std::string& socket : {a, v})
        s->servers.push_back(std::make_unique<Server>(
            std::vector<std::string>{"qemu-storage-daemon", "--blockdev",
                                     "driver=file,locking=off,read-only=on,node-name=n,filename=" + image_ +
                                         (direct ? ",cache.direct=on,aio=io_uring" : ""),
                                     "--export", "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=" + socket},
            socket, dir_ + "/log", s->cgroup.empty() ? "" : s->cgroup + "/cgroup.procs"));
      if (!s->cgroup.empty()) squeeze(*s);
    } else {
      die("--only: isolated, trusted, qsd-cached or qsd-direct, not \"" + name + "\"");
    }
    s->attacker = std::make_unique<Guest>(a);
    s->victim = std::make_unique<Guest>(v);
    return s;
  }

  // For the control's evict+time: as much page cache for both daemons as Spillway's cache has. cgroup v1.
  void limit_page_cache(Setup& s) {
    const std::string path = "/sys/fs/cgroup/memory/spillway-leak-" + std::to_string(::getpid());
    if (::mkdir(path.c_str(), 0755) == 0) s.cgroup = path;
    else std::fprintf(stderr, "bench_leak: no memory cgroup: the control's evict+time has no memory pressure\n");
  }
  void squeeze(Setup& s) {
    uint64_t usage = 0;
    std::ifstream(s.cgroup + "/memory.usage_in_bytes") >> usage;
    std::ofstream(s.cgroup + "/memory.limit_in_bytes") << usage + kCacheBytes / 2;
  }

  void keep(const std::string& name, const std::vector<Trace>& traces) {
    std::vector<double> accuracy, hit, miss;
    for (const Trace& t : traces) {
      accuracy.push_back(t.accuracy);
      hit.push_back(median(t.second[0]) / 1e3);
      miss.push_back(median(t.first[0]) / 1e3);
    }
    report_.run(name, {{"runs", traces.size()}, {"accuracy", median(accuracy)}, {"first_read_us", median(miss)},
                       {"second_read_us", median(hit)}, {"warm_hit_us", median(traces[0].warm) / 1e3}, {"seed", seed_}});
    // Each thing the classifier sees, by itself: where a signal comes from.
    static const char* const kNames[] = {"first", "second", "read before", "read after"};
    for (size_t f = 0; f < 4 * kRepeats + 2; ++f) {
      std::vector<Auc> by_run;
      for (const Trace& t : traces) {
        std::vector<double> one;
        for (auto& row : features(t)) one.push_back(-row[f]);
        by_run.push_back(auc(one, t.secret));
      }
      const Pooled p = pool(by_run, 1.96);
      const std::string what = f == 4 * kRepeats ? "reload" : f > 4 * kRepeats ? "evict+time"
                             : std::string(kNames[f % 4]) + " " + std::to_string(f / 4);
      report_.run(name + ", feature " + what, {{"auc", p.mean}, {"half_width_95", p.half_width}});
    }
    for (auto& [strategy, all] : judge(traces)) {
      auto& sink = pooled_[name][strategy];
      sink.insert(sink.end(), all.begin(), all.end());
    }
  }

  void read_pool(const std::string& file) {
    std::ifstream in(file);
    const Json all = Json::parse(in, nullptr, false);
    if (all.is_discarded() || !all.contains("runs")) die(file + ": not a result of this benchmark");
    for (const Json& run : all["runs"]) {
      if (!run.contains("auc_runs")) continue;
      auto& sink = pooled_[run["setup"]][run["strategy"]];
      for (const Json& v : run["auc_runs"]) sink.push_back({v[0], v[1]});
    }
  }

  void gates() {
    for (auto& [setup, strategies] : pooled_) {
      for (const char* strategy : kStrategies) {
        const auto& all = strategies[strategy];
        if (all.empty()) continue;
        const Pooled one = pool(all, 1.96), together = pool(all, kTogether);
        Json values = Json::array();
        for (const Auc& a : all) values.push_back({a.value, a.variance});
        const std::string what = setup + ", " + strategy;
        report_.run(what, {{"auc", one.mean}, {"half_width_95", one.half_width},
                           {"half_width_95_together", together.half_width}, {"runs", all.size()}});
        report_.record(what + ", by run", {{"setup", setup}, {"strategy", strategy}, {"auc_runs", std::move(values)}});
        if (std::string_view(strategy) == "warm hits") continue;
        if (setup == "isolated") {
          report_.gate(what + ": distance of the AUC from 0.5, in half widths",
                       std::abs(together.mean - 0.5) / together.half_width, "<=", 1);
          report_.gate(what + ": interval's low end", together.mean - together.half_width, ">=", 0.47);
          report_.gate(what + ": interval's high end", together.mean + together.half_width, "<=", 0.53);
          report_.gate(what + ": runs", static_cast<double>(all.size()), ">=", 10);
        } else if (setup == "qsd-cached") {
          report_.gate(what + " (control)", one.mean, ">=", 0.9);
        }
      }
    }
  }

  Report report_;
  size_t runs_ = 10;
  uint64_t seed_ = 1;
  std::string only_, bin_, dir_, image_;
  std::map<std::string, std::map<std::string, std::vector<Auc>>> pooled_;
};

}  // namespace
}  // namespace spillway::bench

int main(int argc, char** argv) {
  spillway::bench::pin(1);
  return spillway::bench::Bench(argc, argv).main();
}
