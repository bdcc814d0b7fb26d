// bench_qos: proportional shares on a real disk, beside no scheduler and the kernel's BFQ.
//
// Two tenants with 32 requests outstanding each, on two pinned reactors, O_DIRECT on one file. A round runs in turn:
// each tenant alone and both together without a scheduler, each alone and both together with it, for weights 100:300
// and 100:900. Shares are judged from outside: a tenant's throughput divided by what it had alone without a scheduler.
//   ratio        (strong / strong alone) / (weak / weak alone), as a part of the wanted ratio
//   utilisation  sum over tenants of throughput / alone, with the scheduler by without
//   attainable   the same without a scheduler, but with the weak tenant's outstanding requests cut so that the shares come
//                out by themselves: the strong one has 32, so no more than 32 / its share can be in flight (Little's law).
//                Where the disk's knee is beyond that, this is what exact shares cost, whoever makes them.
//   weak p99     by (total weight / own weight) * its p99 alone at the same depth
//   overhead     CPU per request through the filter above a leaf that does nothing but suspend once
// Options: --file F, --seconds N (a slice), --rounds N, --only LOAD, --bfq 0|1|2 (2: only that), --depth N (fixed),
// --model F (the calibration, made when it is not there), --calibrate SECONDS.
#include <fcntl.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "benchmarks/common/bench.h"
#include "benchmarks/qos/bfq.h"
#include "benchmarks/qos/load.h"
#include "src/qos/calibrate.h"
#include "src/qos/qos.h"
#include "src/volume/file/file.h"
#include "src/volume/linear/linear.h"
#include "src/volume/stripe/stripe.h"

namespace spillway::bench {
namespace {

constexpr uint64_t kFile = 2 * kGiB;
constexpr GroupId kWeak{1}, kStrong{2};

struct Case {
  std::string name;
  Tenant weak, strong;
  const char* fio_weak;
  const char* fio_strong;
};

Tenant tenant(GroupId g, uint32_t bytes, bool write, bool sequential) {
  Tenant t;
  t.ctx.group = g;
  t.offset = g == kWeak ? 0 : kFile / 2;
  t.length = kFile / 2;
  t.bytes = bytes;
  t.write = write;
  t.sequential = sequential;
  return t;
}

Case same(const char* name, uint32_t bytes, bool write, bool sequential, const char* fio) {
  return {name, tenant(kWeak, bytes, write, sequential), tenant(kStrong, bytes, write, sequential), fio, fio};
}

// Written data, not holes: unwritten extents read without touching the disk.
void prepare(const std::string& path) {
  struct stat st{};
  if (::stat(path.c_str(), &st) == 0 && static_cast<uint64_t>(st.st_blocks) * 512 >= kFile) return;
  std::printf("writing %s\n", path.c_str());
  std::vector<uint64_t> block(kMiB / 8);
  std::mt19937_64 random(1);
  std::ofstream out(path, std::ios::binary);
  for (uint64_t at = 0; at < kFile; at += kMiB) {
    for (auto& word : block) word = random();
    out.write(reinterpret_cast<const char*>(block.data()), kMiB);
  }
  out.flush();
  SPILLWAY_ASSERT(out.good());
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  ::fsync(fd);
  ::close(fd);
}

struct Rig {
  Report& report;
  Loads& loads;
  VolumePtr leaf;
  QosModel model;
  double slice = 0.2, warm = 0.1;
  int rounds = 12;
  uint32_t depth = 0;
};

struct Series {
  std::vector<double> ratio, use, p99, attainable, cpu, cpu_fitting;
};

// As `spillway disk calibrate` does.
void measure_disk(Rig& rig, ReactorPool& pool, double seconds) {
  const std::string stored = rig.report.option("model", "");
  if (std::ifstream in(stored); !stored.empty() && in) {
    std::stringstream text;
    text << in.rdbuf();
    rig.model = QosModel::parse(text.str()).value();
    return;
  }
  CalibrateOptions options;
  options.seconds = seconds;
  options.writes = true;
  std::atomic<bool> done{false};
  auto work = [](Rig* r, CalibrateOptions o, std::atomic<bool>* d) -> Task<void> {
    Result<Calibration> c = co_await calibrate(r->leaf, o);
    SPILLWAY_ASSERT(c.has_value());
    r->model = c->model;
    Json curve = Json::object();
    for (auto& p : c->curve) curve[std::to_string(p.depth)] = std::round(p.iops);
    Json large = Json::object();
    for (auto& p : c->large_curve) large[std::to_string(p.depth)] = std::round(p.iops);
    r->report.run("calibrate", {{"iops_by_depth", curve}, {"iops_by_depth_128K", large}, {"knee", c->model.depth},
                                {"unit_part", c->model.unit_part}, {"model", c->model.to_text()}});
    d->store(true);
  };
  pool.at(0).post([&] { pool.at(0).spawn(work(&rig, options, &done)); });
  while (!done.load()) usleep(1000);
  if (!stored.empty()) std::ofstream(stored) << rig.model.to_text();
}

void run_case(Rig& rig, const Case& c) {
  const bool mixed = c.weak.bytes != c.strong.bytes;
  auto domain = std::make_shared<QosDomain>();
  auto weights = [&](uint32_t strong) {
    SPILLWAY_ASSERT(domain->set(kWeak, {.name = "weak", .weight = 100}).has_value());
    SPILLWAY_ASSERT(domain->set(kStrong, {.name = "strong", .weight = strong}).has_value());
  };
  weights(300);
  QosOptions options;
  options.model = rig.model;
  options.depth = rig.depth;
  options.adapt_depth = rig.depth == 0;
  auto qos = make_qos_volume(rig.leaf, options, domain).value();
  struct Both {
    Outcome weak, strong;
    double cpu_ns = 0;  // per request
  };
  auto both = [&](const VolumePtr& v, uint32_t weak_depth = 32) {
    Tenant weak = c.weak;
    weak.depth = weak_depth;
    double cpu = 0;
    const auto got = rig.loads.run(v, {weak, c.strong}, rig.warm, rig.slice, &cpu);
    return Both{got[0], got[1], cpu * 1e9 / rig.slice / (got[0].ops_s + got[1].ops_s)};
  };
  auto alone = [&](const VolumePtr& v, const Tenant& t, double s) { return rig.loads.run(v, {t}, rig.warm, s)[0]; };
  // Lets the filter find the knee, and the costs of this load.
  for (int i = 0; i < 3; ++i) {
    if (mixed) alone(qos, c.weak, 0.7), alone(qos, c.strong, 0.7);
    rig.loads.run(qos, {c.weak, c.strong}, 0, 2.0);
  }
  Series by_weight[2];
  const uint32_t strong_weight[2] = {300, 900};
  for (int round = 0; round < rig.rounds; ++round) {
    // Alone before and after, so that drift within the round cancels.
    Outcome weak = alone(rig.leaf, c.weak, rig.slice), strong = alone(rig.leaf, c.strong, rig.slice);
    Outcome weak_through, strong_through;
    if (mixed) weak_through = alone(qos, c.weak, rig.slice), strong_through = alone(qos, c.strong, rig.slice);
    Both raw[2], with[2], fitting[2];
    for (int w = 0; w < 2; ++w) {
      weights(strong_weight[w]);
      const bool raw_first = (round + w) % 2 == 0;
      if (raw_first) raw[w] = both(rig.leaf);
      with[w] = both(qos);
      if (!raw_first) raw[w] = both(rig.leaf);
      if (!mixed) fitting[w] = both(rig.leaf, (32 * 100 + strong_weight[w] / 2) / strong_weight[w]);
    }
    const Outcome strong2 = alone(rig.leaf, c.strong, rig.slice), weak2 = alone(rig.leaf, c.weak, rig.slice);
    double weak_ops = (weak.ops_s + weak2.ops_s) / 2, strong_ops = (strong.ops_s + strong2.ops_s) / 2;
    if (!mixed) weak_ops = strong_ops = (weak_ops + strong_ops) / 2;  // one load: its figure alone is one figure
    const double weak_p99 = (weak.p99_us + weak2.p99_us) / 2;
    for (int w = 0; w < 2; ++w) {
      const auto use = [&](const Both& both) { return both.weak.ops_s / weak_ops + both.strong.ops_s / strong_ops; };
      const double ratio = with[w].strong.ops_s / strong_ops / (with[w].weak.ops_s / weak_ops);
      const double wanted = strong_weight[w] / 100.0;
      Series& s = by_weight[w];
      s.ratio.push_back(ratio / wanted);
      s.use.push_back(use(with[w]) / use(raw[w]));
      s.p99.push_back(with[w].weak.p99_us / (weak_p99 * (1 + wanted)));
      s.cpu.push_back(with[w].cpu_ns - raw[w].cpu_ns);
      const QosSample q = qos->sample();
      Json run = {{"round", round}, {"weak_alone_iops", weak_ops}, {"strong_alone_iops", strong_ops},
                  {"none_weak_iops", raw[w].weak.ops_s}, {"none_strong_iops", raw[w].strong.ops_s},
                  {"weak_iops", with[w].weak.ops_s}, {"strong_iops", with[w].strong.ops_s}, {"ratio", ratio},
                  {"utilisation", s.use.back()}, {"weak_p50_us", with[w].weak.p50_us},
                  {"weak_p99_us", with[w].weak.p99_us}, {"weak_p99_alone_us", weak_p99},
                  {"strong_p99_us", with[w].strong.p99_us}, {"none_p99_us", raw[w].weak.p99_us}, {"none_cpu_ns", raw[w].cpu_ns}, {"cpu_ns", with[w].cpu_ns},
                  {"depth", q.depth}, {"knee", q.knee}};
      if (mixed) {
        run["weak_alone_through_iops"] = weak_through.ops_s, run["strong_alone_through_iops"] = strong_through.ops_s;
      } else {
        s.attainable.push_back(use(fitting[w]) / use(raw[w]));
        s.cpu_fitting.push_back(with[w].cpu_ns - fitting[w].cpu_ns);
        run["attainable"] = s.attainable.back();
        run["fitting_weak_p99_us"] = fitting[w].weak.p99_us, run["fitting_strong_p99_us"] = fitting[w].strong.p99_us;
        run["fitting_cpu_ns"] = fitting[w].cpu_ns;
      }
      rig.report.run(c.name + " 100:" + std::to_string(strong_weight[w]), run);
    }
  }
  for (int w = 0; w < 2; ++w) {
    const std::string name = c.name + " 100:" + std::to_string(strong_weight[w]) + " ";
    const double ratio = median(by_weight[w].ratio);
    rig.report.gate(name + "ratio by wanted, low", ratio, ">=", 0.97);
    rig.report.gate(name + "ratio by wanted, high", ratio, "<=", 1.03);
    rig.report.gate(name + "utilisation", median(by_weight[w].use), ">=", 0.97);
    if (!mixed) {
      std::vector<double> of_attainable;
      for (size_t i = 0; i < by_weight[w].use.size(); ++i)
        of_attainable.push_back(by_weight[w].use[i] / by_weight[w].attainable[i]);
      rig.report.run(name + "attainable with these shares", {{"utilisation", median(by_weight[w].attainable)}});
      rig.report.gate(name + "utilisation by attainable", median(of_attainable), ">=", 0.97);
    }
    rig.report.gate(name + "weak p99 by its bound", median(by_weight[w].p99), "<=", 1.5);
    rig.report.run(name + "extra CPU per request", {{"ns", median(by_weight[w].cpu)}, {"beside_as_few_in_flight_ns", median(by_weight[w].cpu_fitting)}});
  }
  rig.report.run(c.name + " model", {{"text", qos->model().to_text()}});
}

// Not gated: a tenant with one request outstanding cannot be backlogged.
void report_qd1(Rig& rig) {
  auto domain = std::make_shared<QosDomain>();
  SPILLWAY_ASSERT(domain->set(kWeak, {.name = "qd32", .weight = 100}).has_value());
  SPILLWAY_ASSERT(domain->set(kStrong, {.name = "qd1", .weight = 900}).has_value());
  QosOptions options;
  options.model = rig.model;
  auto qos = make_qos_volume(rig.leaf, options, domain).value();
  Tenant deep = tenant(kWeak, 4096, false, false), one = tenant(kStrong, 4096, false, false);
  one.depth = 1;
  for (int round = 0; round < rig.rounds; ++round)
    for (const bool with : {false, true}) {
      const VolumePtr v = with ? VolumePtr(qos) : rig.leaf;
      auto got = rig.loads.run(v, {deep, one}, rig.warm, rig.slice);
      rig.report.run("QD1 (weight 900) beside QD32 (100)",
                     {{"round", round}, {"scheduler", with ? "spillway" : "none"}, {"qd1_iops", got[1].ops_s},
                      {"qd1_p50_us", got[1].p50_us}, {"qd1_p99_us", got[1].p99_us}, {"qd32_iops", got[0].ops_s}});
    }
}

// Q2 on files: two of them as disks of 2000 IOPS (a cap at each disk's root, as both files share one real disk), a
// tenant in each half of a volume above.
void report_q2(Rig& rig, const std::string& file) {
  for (const bool striped : {false, true}) {
    auto domain = std::make_shared<QosDomain>();
    SPILLWAY_ASSERT(domain->set(GroupId::kRoot, {.name = "/", .caps = {.riops = 2000}}).has_value());
    SPILLWAY_ASSERT(domain->set(kWeak, {.name = "a"}).has_value());
    SPILLWAY_ASSERT(domain->set(kStrong, {.name = "b"}).has_value());
    std::vector<VolumePtr> disks;
    for (const char* suffix : {".q2a", ".q2b"}) {
      FileOptions o;
      o.path = file + suffix;
      o.create_size = 256 * kMiB;
      disks.push_back(make_qos(open_file(suffix + 1, std::move(o)).value(), {}, domain).value());
    }
    auto volume = striped ? make_stripe("v", disks, 64 * kKiB).value() : make_linear("v", disks).value();
    Tenant a = tenant(kWeak, 4096, false, false), b = tenant(kStrong, 4096, false, false);
    a.length = b.length = volume->size() / 2;
    b.offset = volume->size() / 2;
    a.depth = 8;
    std::vector<double> alone, together;
    for (int round = 0; round < rig.rounds; ++round) {
      alone.push_back(rig.loads.run(volume, {a}, rig.warm, rig.slice)[0].ops_s);
      together.push_back(rig.loads.run(volume, {a, b}, rig.warm, rig.slice)[0].ops_s);
    }
    const double part = median(together) / median(alone);
    rig.report.run(striped ? "Q2 stripe on files" : "Q2 linear on files",
                   {{"alone_iops", median(alone)}, {"beside_a_busy_neighbour_iops", median(together)}, {"part", part}});
    if (striped) rig.report.gate("Q2 stripe couples: part of alone", part, "<=", 0.75);
    else rig.report.gate("Q2 linear: part of alone", part, ">=", 0.97);
    volume = nullptr;
    disks.clear();
    for (const char* suffix : {".q2a", ".q2b"}) ::unlink((file + suffix).c_str());
  }
}

// A leaf that suspends once and does nothing: what remains is the cost of the way there and back.
class Yield final : public Volume {
 public:
  Yield() : Volume("yield", kFile, Geometry{}) {}
  std::string_view layer() const override { return "yield"; }

 protected:
  struct Suspend {
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) const { Reactor::current().schedule(h); }
    void await_resume() const noexcept {}
  };
  static Task<Status> once() {
    co_await Suspend{};
    co_return Status{};
  }
  Task<Status> do_read(IoContext, uint64_t, Iov) override { return once(); }
  Task<Status> do_write(IoContext, uint64_t, Iov) override { return once(); }
  Task<Status> do_flush(IoContext) override { return once(); }
};

void overhead(Rig& rig, ReactorPool& one_cpu, ReactorPool& two_cpus) {
  auto leaf = std::make_shared<Yield>();
  struct Shape {
    const char* name;
    ReactorPool* pool;
    uint32_t depth;
    bool gated;
  };
  for (const Shape& s : {Shape{"uncontended, one reactor", &one_cpu, 256, true},
                         Shape{"contended, one reactor", &one_cpu, 24, true},
                         Shape{"uncontended, two reactors", &two_cpus, 256, false},
                         Shape{"contended, two reactors", &two_cpus, 24, false}}) {
    auto domain = std::make_shared<QosDomain>();
    SPILLWAY_ASSERT(domain->set(kWeak, {.name = "weak", .weight = 100}).has_value());
    SPILLWAY_ASSERT(domain->set(kStrong, {.name = "strong", .weight = 300}).has_value());
    QosOptions options;
    options.depth = s.depth;
    options.adapt_depth = options.adapt_cost = false;
    VolumePtr qos = make_qos(leaf, options, domain).value();
    Loads loads(*s.pool);
    std::vector<double> without, with;
    auto measure = [&](const VolumePtr& v, std::vector<double>& out) {
      double cpu = 0;
      auto got = loads.run(v, {tenant(kWeak, 4096, false, false), tenant(kStrong, 4096, false, false)}, 0.05, 0.4, &cpu);
      out.push_back(cpu * 1e9 / 0.4 / (got[0].ops_s + got[1].ops_s));
    };
    interleave(std::max(5, rig.rounds),
               {{"none", [&] { measure(leaf, without); }}, {"qos", [&] { measure(qos, with); }}});
    std::vector<double> extra;
    for (size_t i = 0; i < with.size(); ++i) extra.push_back(with[i] - without[i]);
    rig.report.run(std::string("CPU per request, ") + s.name,
                   {{"none_ns", median(without)}, {"spillway_ns", median(with)}, {"extra_ns", median(extra)}});
    if (s.gated)
      rig.report.gate(std::string("overhead ns CPU per request, ") + s.name, median(extra), "<=", 300);
  }
}

void run_bfq(Rig& rig, const std::string& file, const std::vector<Case>& cases, const std::string& only) {
  std::string why;
  auto bfq = Bfq::create(file, &why);
  if (!bfq) {
    rig.report.run("BFQ", {{"skipped", why}});
    return;
  }
  for (const Case& c : cases) {
    if (!c.name.starts_with(only)) continue;
    for (uint32_t strong : {300u, 900u}) {
      std::vector<double> ratio, use, p99;
      for (int round = 0; round < std::min(rig.rounds, 2); ++round) {
        const Bfq::Job a{c.fio_weak, c.weak.bytes, 32, c.weak.offset, c.weak.length, 100};
        const Bfq::Job b{c.fio_strong, c.strong.bytes, 32, c.strong.offset, c.strong.length, strong};
        auto a1 = bfq->run("none", {a}, 1), b1 = bfq->run("none", {b}, 1);
        auto raw = bfq->run("none", {a, b}, 1), with = bfq->run("bfq", {a, b}, 2);
        if (a1.empty() || b1.empty() || raw.size() < 2 || with.size() < 2) {
          rig.report.run("BFQ " + c.name, {{"failed", bfq->error()}});
          return;
        }
        const double x = with[0].ops_s / a1[0].ops_s, y = with[1].ops_s / b1[0].ops_s;
        ratio.push_back(y / x);
        use.push_back((x + y) / (raw[0].ops_s / a1[0].ops_s + raw[1].ops_s / b1[0].ops_s));
        p99.push_back(with[0].p99_us);
      }
      rig.report.run("BFQ " + c.name + " 100:" + std::to_string(strong),
                     {{"ratio", median(ratio)}, {"utilisation", median(use)}, {"weak_p99_us", median(p99)}});
    }
  }
}

int main_of(int argc, char** argv) {
  Report report("qos", argc, argv);
  const std::string file = report.option("file", "/tmp/bench_qos.dat");
  const std::string only = report.option("only", "");
  prepare(file);
  FileOptions options;
  options.path = file;
  options.buffered_fallback = false;
  auto leaf = open_file("file", std::move(options));
  if (!leaf) {
    std::fprintf(stderr, "bench_qos: %s\n", leaf.error().message().c_str());
    return 2;
  }
  auto one = ReactorPool::start({0}).value();
  auto two = ReactorPool::start({0, 1 % cpus()}).value();
  Loads loads(*two);
  Rig rig{report, loads, *leaf, {}, report.option("seconds", 0.2), 0.1,
          static_cast<int>(report.option("rounds", 12.0)), static_cast<uint32_t>(report.option("depth", 0.0))};
  const std::vector<Case> cases = {
      same("random read 4K", 4096, false, false, "randread"),
      same("random write 4K", 4096, true, false, "randwrite"),
      same("sequential read 128K", 131072, false, true, "read"),
      {"4K against 128K read", tenant(kWeak, 4096, false, false), tenant(kStrong, 131072, false, false), "randread",
       "randread"},
      {"128K against 4K read", tenant(kWeak, 131072, false, false), tenant(kStrong, 4096, false, false), "randread",
       "randread"},
  };
  if (only.empty() || only == "overhead") overhead(rig, *one, *two);
  if (only != "overhead" && only != "q2" && report.option("bfq", 0.0) < 2) measure_disk(rig, *two, report.option("calibrate", 12.0));
  // --bfq 2: nothing but that.
  for (const Case& c : cases)
    if (report.option("bfq", 0.0) < 2 && c.name.starts_with(only)) run_case(rig, c);
  if (only.empty() || only == "qd1") report_qd1(rig);
  if (only.empty() || only == "q2") report_q2(rig, file);
  if (report.option("bfq", only.empty() ? 1.0 : 0.0) != 0) run_bfq(rig, file, cases, only);
  return report.finish();
}

}  // namespace
}  // namespace spillway::bench

int main(int argc, char** argv) { return spillway::bench::main_of(argc, argv); }
