// ./bench pmem: what a mapped volume costs, natively (a guest under TCG would measure TCG): processes map files of a mount
// of ours as a VMM does, beside an ext4 file mapped the same way (--dir DIR, on ext4). Needs root and /dev/fuse.
//
//   --only WORD   resident cold sequential evict flush slow fragments
//   --rounds N    of everything that is compared (default 5)
#include <fcntl.h>
#include <fmt/core.h>
#include <spillway/reclaim/reclaim.h>
#include <sys/mount.h>

#include <filesystem>
#include <memory>
#include <numeric>
#include <random>

#include "benchmarks/common/bench.h"
#include "benchmarks/pmem/mapper.h"
#include "src/cache/cache.h"
#include "src/export/fuse/pmem.h"
#include "src/image/qcow2.h"
#include "src/io/sync.h"
#include "src/volume/file/file.h"
#include "src/volume/memory/memory.h"
#include "src/volume/sim/sim.h"

namespace spillway::bench {
namespace {

using Advice = Mapper::Advice;

[[noreturn]] void die(const std::string& why) {
  std::fprintf(stderr, "bench_pmem: %s\n", why.c_str());
  std::exit(1);
}
template <class T>
T must(Result<T> r) {
  if (!r) die(r.error().message());
  return std::move(*r);
}
void must(Status s) {
  if (!s) die(s.error().message());
}
void must(bool ok, const char* what) {
  if (!ok) die(what);
}
double micros(double ns) { return ns / 1e3; }
double gib_s(uint64_t bytes, double ns) { return static_cast<double>(bytes) / static_cast<double>(kGiB) / (ns / 1e9); }

struct Bench {
  explicit Bench(Report& r) : report(r) {
    rounds = static_cast<int>(r.option("rounds", 5));
    dir = r.option("dir", "/tmp") + fmt::format("/spillway-bench-pmem-{}", ::getpid());
    for (auto& m : mappers) m = std::make_unique<Mapper>();
    std::filesystem::create_directories(dir);
    PmemMountOptions o;
    o.name = "bench";
    o.directory = dir + "/mnt";
    o.read_ahead_kb = static_cast<uint32_t>(r.option("read-ahead", PmemMountOptions{}.read_ahead_kb));
    o.max_read = static_cast<uint32_t>(r.option("max-read", PmemMountOptions{}.max_read));
    mount = must(PmemMount::start(o));
    reactor = must(UringReactor::create(64));
  }
  ~Bench() {
    for (auto& m : mappers) m.reset();
    mount->stop(false);
    std::error_code ec;
    std::filesystem::remove_all(dir, ec);
  }
  std::shared_ptr<PmemFile> add(const std::string& name, VolumePtr v, GroupId group = GroupId::kRoot) {
    PmemFileOptions o;
    o.name = name;
    o.volume = std::move(v);
    o.group = group;
    return must(mount->add(o));
  }
  void done(const std::string& name) { mount->remove(name); }
  std::string path(const std::string& name) const { return mount->directory() + "/" + name; }
  Mapper& m(size_t i = 0) { return *mappers[i]; }
  // A plain file with data in it, on ext4.
  std::string plain_file(const std::string& name, uint64_t size) {
    const std::string p = dir + "/" + name;
    Fd fd(::open(p.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600));
    must(bool(fd), "no file");
    std::vector<char> mib(kMiB, 'p');
    for (uint64_t at = 0; at < size; at += kMiB)
      must(::pwrite(fd.get(), mib.data(), kMiB, static_cast<off_t>(at)) == static_cast<ssize_t>(kMiB), "disk full");
    ::fsync(fd.get());
    return p;
  }
  VolumePtr file_volume(const std::string& p) {
    FileOptions o;
    o.path = p;
    return must(open_file("leaf", std::move(o)));
  }

  Report& report;
  int rounds;
  std::string dir;
  std::unique_ptr<Mapper> mappers[5];
  std::shared_ptr<PmemMount> mount;
  std::unique_ptr<UringReactor> reactor;
};

// Loads from pages that are there: page tables only. The peer is an ext4 file mapped the same way. Reported beside it: ext4
// whose pages came by one fault of 4 KiB each, without the large folios (contiguous memory, fewer TLB misses) that its
// read-ahead makes; FUSE has none on kernels up to 6.18.
void resident(Bench& b) {
  constexpr uint64_t kSize = 256 * kMiB, kLoads = 4'000'000;
  auto file = b.add("resident", must(make_memory("r", kSize, 4096)));
  const std::string plain = b.plain_file("plain", kSize);
  must(b.m(0).open(b.path("resident"), kSize, Advice::kNone, true), "map");
  must(b.m(1).open(plain, kSize, Advice::kNone, true), "map");
  b.m(0).touch(0, kSize);
  b.m(1).close_and_drop();
  must(b.m(1).open(plain, kSize, Advice::kRandom, true), "map");
  b.m(1).touch(0, kSize);
  const std::string ahead = b.plain_file("ahead", kSize);
  must(b.m(2).open(ahead, kSize, Advice::kNone, true), "map");
  b.m(2).close_and_drop();
  must(b.m(2).open(ahead, kSize, Advice::kNone, true), "map");
  b.m(2).touch(0, kSize);
  std::vector<double> ours, ext4, large;
  auto load = [&](size_t i, std::vector<double>& to) {
    to.push_back(static_cast<double>(b.m(i).load_random(kSize, kLoads, 1)) / kLoads);
  };
  interleave(2 * b.rounds, {{"pmem", [&] { load(0, ours); }}, {"ext4", [&] { load(1, ext4); }}, {"ahead", [&] { load(2, large); }}});
  b.report.run("resident load", {{"ns", median(ours)}, {"ext4_ns", median(large)}, {"ext4_small_faults_ns", median(ext4)},
                                 {"spread", spread(ours)}, {"ext4_spread", spread(large)}});
  b.report.gate("resident access: time beside a mapped ext4 file", median(ours) / median(large), "<=", 1.05);
  b.m(0).close();
  b.m(1).close_and_drop();
  b.m(2).close_and_drop();
  b.done("resident");
}

// The way of one fault of 4 KiB: kernel, FUSE worker, volume, and back.
void cold(Bench& b) {
  constexpr uint64_t kSize = 128 * kMiB, kFaults = 8192;
  // Frames: a cache over memory, all of it in the tenant's view.
  reclaim::Registry registry;
  CacheOptions co;
  co.capacity_bytes = 2 * kSize;
  co.registry = &registry;
  auto cache = must(Cache::create(co));
  auto group = registry.create_group("tenant");
  must(bool(group), "no group");
  const auto id = static_cast<GroupId>(group->id());
  cache->refresh_entitlements();
  auto cached = must(cache->attach(must(make_memory("m", kSize, 4096)), CacheMode::kIsolated, "m#1"));
  must(b.reactor->block_on([](VolumePtr v, GroupId g) -> Task<Status> {
    AlignedBuffer buffer(kMiB);
    const iovec one = buffer.iov();
    IoContext c;
    c.group = g;
    for (uint64_t at = 0; at < v->size(); at += kMiB) SPILLWAY_CO_CHECK(co_await v->read(c, at, Iov(&one, 1)));
    co_return Status{};
  }(cached, id)));
  const uint64_t missed = cache->stats().misses;
  auto frames = b.add("frames", cached, id);
  auto memory = b.add("memory", must(make_memory("plain", kSize, 4096)));
  const std::string plain = b.plain_file("plain", kSize);
  struct Contestant4k {
    std::string name, path;
    PmemFile* file;
    Advice advice;
    std::vector<double> p50, p99;
  } all[] = {{"frames", b.path("frames"), frames.get(), Advice::kRandom, {}, {}},
             {"memory volume", b.path("memory"), memory.get(), Advice::kRandom, {}, {}},
             {"memory volume, read around", b.path("memory"), memory.get(), Advice::kNone, {}, {}},
             {"ext4 from disk", plain, nullptr, Advice::kRandom, {}, {}}};
  for (int round = 0; round < b.rounds; ++round)
    for (auto& c : all) {
      if (c.file != nullptr) {
        b.m().close();
        (void)c.file->evict(0, kSize);
      } else {
        must(b.m().open(c.path, kSize, c.advice, false), "map");
        b.m().close_and_drop();
      }
      must(b.m().open(c.path, kSize, c.advice, false), "map");
      auto ns = b.m().touch_random(kSize, c.file != nullptr ? kFaults : 1024, static_cast<uint64_t>(round));
      c.p50.push_back(micros(percentile(ns, 0.5)));
      c.p99.push_back(micros(percentile(ns, 0.99)));
      b.m().close();
    }
  for (auto& c : all)
    b.report.run("cold fault of 4 KiB, " + c.name, {{"p50_us", median(c.p50)}, {"p99_us", median(c.p99)}, {"spread", spread(c.p50)}});
  must(cache->stats().misses == missed, "frames were missing: this was no measure of cached frames");
  b.report.gate("cold 4 KiB fault from cached frames, p50 us", median(all[0].p50), "<=", 15);
  b.done("frames");
  b.done("memory");
  frames.reset();
  cached.reset();
  must(b.reactor->block_on(cache->close()));
}

Task<Status> read_all(VolumePtr v, uint64_t piece, uint64_t* next) {
  AlignedBuffer buffer(piece);
  const iovec one = buffer.iov();
  while (*next < v->size()) {
    const uint64_t at = *next;
    *next += piece;
    SPILLWAY_CO_CHECK(co_await v->read(IoContext{}, at, Iov(&one, 1)));
  }
  co_return Status{};
}

// Sequential loads of a cold mapping against reads of the volume itself, 1 MiB each, two at a time.
void sequential(Bench& b) {
  constexpr uint64_t kSize = 512 * kMiB;
  const std::string leaf = b.plain_file("leaf", kSize), plain = b.plain_file("plain", kSize);
  VolumePtr v = b.file_volume(leaf);
  auto file = b.add("seq", v), memory = b.add("seqmem", must(make_memory("seqmem", kSize, 4096)));
  std::vector<double> mapped, own, ext4, limit;
  interleave(b.rounds,
             {{"own", [&] {
                 uint64_t next = 0;
                 const uint64_t t = now_ns();
                 std::vector<Task<Status>> two;
                 for (int i = 0; i < 2; ++i) two.push_back(read_all(v, kMiB, &next));
                 must(b.reactor->block_on(all_of(std::move(two))));
                 own.push_back(gib_s(kSize, static_cast<double>(now_ns() - t)));
               }},
              {"memory", [&] {
                 b.m().close();
                 (void)memory->evict(0, kSize);
                 must(b.m().open(b.path("seqmem"), kSize, Advice::kNone, false), "map");
                 limit.push_back(gib_s(kSize, static_cast<double>(b.m().touch(0, kSize))));
                 b.m().close();
               }},
              {"pmem", [&] {
                 b.m().close();
                 (void)file->evict(0, kSize);
                 must(b.m().open(b.path("seq"), kSize, Advice::kNone, false), "map");
                 mapped.push_back(gib_s(kSize, static_cast<double>(b.m().touch(0, kSize))));
                 b.m().close();
               }},
              {"ext4", [&] {
                 must(b.m().open(plain, kSize, Advice::kNone, false), "map");
                 b.m().close_and_drop();
                 must(b.m().open(plain, kSize, Advice::kNone, false), "map");
                 ext4.push_back(gib_s(kSize, static_cast<double>(b.m().touch(0, kSize))));
                 b.m().close();
               }}});
  b.report.run("sequential cold read", {{"gib_s", median(mapped)}, {"volume_gib_s", median(own)}, {"ext4_gib_s", median(ext4)}, {"memory_volume_gib_s", median(limit)},
                                        {"spread", spread(mapped)}, {"volume_spread", spread(own)}});
  b.report.gate("sequential cold read beside the volume's own", median(mapped) / median(own), ">=", 0.8);
  b.done("seq");
  b.done("seqmem");
}

// How fast the host gets clean memory back, mapped and not.
void evict(Bench& b) {
  constexpr uint64_t kSize = kGiB;
  auto file = b.add("evict", must(make_memory("e", kSize, 4096)));
  std::vector<double> mapped, idle, dirty;
  for (int round = 0; round < b.rounds; ++round) {
    must(b.m().open(b.path("evict"), kSize, Advice::kNone, true), "map");
    for (auto* to : {&mapped, &dirty, &idle}) {
      b.m().touch(0, kSize);
      if (to == &dirty) b.m().dirty(0, kSize / 4096, static_cast<char>(round + 1));
      if (to == &idle) b.m().close();
      const uint64_t t = now_ns();
      const auto e = must(file->evict(0, kSize));
      to->push_back(gib_s(e.freed, static_cast<double>(now_ns() - t)));
      must(e.before >= kSize / 2 && e.freed == e.before, "not all was evicted");
    }
  }
  b.report.run("eviction", {{"clean_mapped_gib_s", median(mapped)}, {"clean_gib_s", median(idle)}, {"dirty_gib_s", median(dirty)},
                            {"spread", spread(mapped)}});
  b.report.gate("eviction of clean mapped pages, GiB/s", median(mapped), ">=", 2);
  b.done("evict");
}

// One dirty page in a large device with much of it resident, and in a small one.
void flush(Bench& b) {
  constexpr uint64_t kSmall = 64 * kMiB, kLarge = 16 * kGiB, kResident = 512 * kMiB;
  for (const bool on_disk : {false, true}) {
    VolumePtr small, large;
    if (on_disk) {
      small = b.file_volume(b.plain_file("small", kSmall));
      const std::string p = b.plain_file("large", kSmall);
      must(::truncate(p.c_str(), static_cast<off_t>(kLarge)) == 0, "truncate");
      large = b.file_volume(p);
    } else {
      small = must(make_memory("small", kSmall, 4096));
      large = must(make_memory("large", kLarge, 4096));
    }
    auto fs = b.add("small", small), fl = b.add("large", large);
    must(b.m(0).open(b.path("small"), kSmall, Advice::kNone, true), "map");
    must(b.m(1).open(b.path("large"), kLarge, Advice::kNone, true), "map");
    b.m(0).touch(0, kSmall);
    b.m(1).touch(0, on_disk ? kSmall : kResident);
    const int n = on_disk ? 40 : 400;
    std::vector<double> s, l;
    std::mt19937_64 random(7);
    auto one = [&](Mapper& m, PmemFile& f, std::vector<double>& to) {
      m.dirty(random() % (kSmall / 4096), 1, static_cast<char>(random()));
      const uint64_t t = now_ns();
      must(f.sync());
      to.push_back(micros(static_cast<double>(now_ns() - t)));
    };
    interleave(n, {{"small", [&] { one(b.m(0), *fs, s); }}, {"large", [&] { one(b.m(1), *fl, l); }}});
    const char* where = on_disk ? "file" : "memory";
    b.report.run(fmt::format("flush of 4 KiB, {} leaf", where),
                 {{"in_64M_us", median(s)}, {"in_16G_us", median(l)}, {"in_64M_p90", percentile(s, 0.9)},
                  {"in_16G_p90", percentile(l, 0.9)}});
    b.report.gate(fmt::format("flush of 4 KiB dirty in 16 GiB beside 64 MiB, {} leaf", where), median(l) / median(s), "<=",
                  1.2);
    b.m(0).close();
    b.m(1).close();
    b.done("small");
    b.done("large");
  }
}

// A disk with 10 ms seeks: who has its pages does not notice the others' faults.
void slow(Bench& b) {
  constexpr uint64_t kSize = kGiB, kHot = 32 * kMiB, kLoads = 2'000'000;
  SimOptions o;
  o.size = kSize;
  o.block_size = 4096;
  o.hdd.seek_read_ms = o.hdd.seek_write_ms = 10;
  auto file = b.add("slow", must(make_sim("slow", o)));
  must(b.m(0).open(b.path("slow"), kSize, Advice::kNone, true), "map");
  b.m(0).touch(0, kHot);
  std::vector<double> alone, beside;
  double worst = 0;
  auto measure = [&](std::vector<double>& to) {
    to.push_back(static_cast<double>(b.m(0).load_random(kHot, kLoads, 3)) / kLoads);
  };
  const uint64_t before = file->counters().reads;
  uint64_t t = now_ns();
  uint64_t busy = 0, faults = 0;
  for (int round = 0; round < b.rounds; ++round) {
    measure(alone);
    const uint64_t reads = file->counters().reads;
    t = now_ns();
    for (size_t i = 1; i < 4; ++i) {
      must(b.m(i).open(b.path("slow"), kSize, Advice::kRandom, false), "map");
      b.m(i).touch_random_until_stopped(kSize, static_cast<uint64_t>(round) * 8 + i);
    }
    do measure(beside);
    while (file->counters().reads < reads + 30);
    worst = std::max(worst, percentile(b.m(0).touch_random(kHot, 8192, 5), 0.999));
    for (size_t i = 1; i < 4; ++i) {
      b.m(i).stop();
      b.m(i).close();
    }
    busy += now_ns() - t;
    faults += file->counters().reads - reads;
  }
  b.report.run("slow disk", {{"resident_ns_alone", median(alone)}, {"resident_ns_while_others_fault", median(beside)},
                             {"p999_us", micros(worst)}, {"spread", spread(beside)}, {"reads_before", before},
                             {"ms_per_fault_of_others", faults == 0 ? 0 : static_cast<double>(busy) / 1e6 / static_cast<double>(faults)}});
  b.report.gate("resident loads while others fault on 10 ms seeks, beside alone", median(beside) / median(alone), "<=", 1.25);
  b.m(0).close();
  b.done("slow");
}

Task<Status> write_clusters(VolumePtr image, const std::vector<uint32_t>* order, size_t* next) {
  AlignedBuffer buffer(4096);
  std::memset(buffer.data(), 0x5a, 4096);
  const iovec one = buffer.iov();
  while (*next < order->size()) {
    const uint64_t at = (*order)[(*next)++];
    SPILLWAY_CO_CHECK(co_await image->write(IoContext{}, at * 4096, Iov(&one, 1)));
  }
  co_return Status{};
}

// P8: a volume in 10^5 pieces, each of 4 KiB and somewhere else, against one in one piece.
void fragments(Bench& b) {
  constexpr uint64_t kPieces = 1 << 17, kSize = kPieces * 4096, kFaults = 16384;
  VolumePtr below = must(make_memory("below", 2 * kSize, 512));
  Qcow2CreateOptions c;
  c.virtual_size = kSize;
  c.cluster_size = 4096;
  must(b.reactor->block_on(create_qcow2(below, c)));
  VolumePtr image = must(b.reactor->block_on(open_qcow2("scattered", below, {})));
  std::vector<uint32_t> order(kPieces);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(3));
  size_t next = 0;
  std::vector<Task<Status>> writers;
  for (int i = 0; i < 16; ++i) writers.push_back(write_clusters(image, &order, &next));
  must(b.reactor->block_on(all_of(std::move(writers))));
  must(b.reactor->block_on(image->flush(IoContext{})));
  auto scattered = b.add("scattered", image), whole = b.add("whole", must(make_memory("whole", kSize, 512)));
  std::vector<double> s, w;
  int64_t mappings = 0;
  auto one = [&](const char* name, PmemFile& f, std::vector<double>& to, uint64_t seed) {
    (void)f.evict(0, kSize);
    must(b.m().open(b.path(name), kSize, Advice::kRandom, false), "map");
    to.push_back(micros(percentile(b.m().touch_random(kSize, kFaults, seed), 0.5)));
    mappings = std::max(mappings, b.m().mappings());
    b.m().close();
  };
  uint64_t seed = 0;
  interleave(b.rounds, {{"scattered", [&] { one("scattered", *scattered, s, ++seed); }},
                        {"whole", [&] { one("whole", *whole, w, ++seed); }}});
  b.report.run("fault in 131072 fragments", {{"p50_us", median(s)}, {"whole_p50_us", median(w)}, {"spread", spread(s)},
                                             {"whole_spread", spread(w)}, {"mappings", mappings}});
  b.report.gate("fault in 10^5 fragments beside none (P8)", median(s) / median(w), "<=", 1.1);
  b.report.gate("mappings of the VMM for it", static_cast<double>(mappings), "<=", 1);
  b.done("scattered");
  b.done("whole");
  scattered.reset();
  must(b.reactor->block_on(image->close()));
}

int run(int argc, char** argv) {
  Report report("pmem", argc, argv);
  if (::geteuid() != 0) die("needs root (it mounts)");
  Bench b(report);
  const std::string only = report.option("only", "");
  const std::pair<const char*, void (*)(Bench&)> parts[] = {{"resident", resident}, {"cold", cold},   {"sequential", sequential},
                                                            {"evict", evict},       {"flush", flush}, {"slow", slow},
                                                            {"fragments", fragments}};
  for (auto& [name, part] : parts)
    if (only.empty() || only == name) part(b);
  return report.finish();
}

}  // namespace
}  // namespace spillway::bench

int main(int argc, char** argv) { return spillway::bench::run(argc, argv); }
