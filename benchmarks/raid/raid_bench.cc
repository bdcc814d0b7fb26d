// ./bench raid: what the layers cost (issue 5), and with --sim what layout does to streams on seeking disks (V4).
//
//   bench_raid [--json FILE] [--gate] [--sim] [--only layers|parity|files] [--rounds N] [--mib N] [--dir D]
// Costs over memory leaves are CPU time of the one thread; the file comparison is wall time.
// --sim runs on a virtual clock: its figures are the model's, the same on every machine (plot.py draws them).
#include <fmt/core.h>
#include <isa-l/raid.h>

#include <cstring>
#include <filesystem>
#include <random>

#include "benchmarks/common/bench.h"
#include "src/base/log.h"
#include "src/io/sim_reactor.h"
#include "src/io/sync.h"
#include "src/volume/assemble.h"
#include "src/volume/file/file.h"
#include "src/volume/linear/linear.h"
#include "src/volume/memory/memory.h"
#include "src/volume/sim/sim.h"
#include "src/volume/stripe/stripe.h"

using namespace spillway;

namespace {

constexpr uint64_t kChunk = 64 * kKiB;

void must(const Status& s) {
  if (s) return;
  std::fprintf(stderr, "bench_raid: %s\n", s.error().message().c_str());
  std::exit(1);
}
template <class T>
T must(Result<T> r) {
  if (!r) must(Status(fail(std::move(r).error())));
  return std::move(*r);
}

VolumePtr memory(const std::string& name, uint64_t size) {
  VolumePtr v = must(make_memory(name, size));
  // Touch every page: page faults are no part of the comparison.
  std::vector<std::byte> ones(kMiB, std::byte{1});
  for (uint64_t at = 0; at < size; at += kMiB) {
    const iovec iov{ones.data(), std::min<uint64_t>(kMiB, size - at)};
    auto t = v->write({}, at, Iov(&iov, 1));
    SPILLWAY_ASSERT(t.is_ready());
  }
  return v;
}

// Over all of `volumes` (equal, their number a power of two), in random order. A layer is measured over the very leaves that
// are measured without it: what a page of this memory costs (its place, the host's page size) differs by more than a layer.
Task<Status> random_4k(std::vector<Volume*> volumes, bool write, uint64_t count, uint64_t seed) {
  alignas(4096) static std::byte buffer[4096];
  const iovec iov{buffer, sizeof buffer};
  const uint64_t blocks = volumes[0]->size() / 4096, mask = volumes.size() - 1;
  uint64_t x = seed;
  for (uint64_t i = 0; i < count; ++i) {
    x = x * 6364136223846793005ull + 1442695040888963407ull;
    const uint64_t at = (x >> 20) % blocks * 4096;
    Volume* const v = volumes[x >> 60 & mask];
    Status s;
    if (write) s = co_await v->write({}, at, Iov(&iov, 1));
    else s = co_await v->read({}, at, Iov(&iov, 1));
    if (!s) co_return s;
  }
  co_return Status{};
}

Task<Status> sequential(Volume* v, bool write, uint64_t bytes, uint64_t request) {
  AlignedBuffer buffer(request);
  std::memset(buffer.data(), 0x5a, request);
  const iovec iov = buffer.iov();
  const uint64_t end = v->size() / request * request;
  uint64_t at = 0;
  for (uint64_t done = 0; done < bytes; done += request, at = (at + request) % end) {
    Status s;
    if (write) s = co_await v->write({}, at, Iov(&iov, 1));
    else s = co_await v->read({}, at, Iov(&iov, 1));
    if (!s) co_return s;
  }
  co_return Status{};
}

double timed(Reactor& r, Task<Status> t) {
  const uint64_t begun = bench::thread_cpu_ns();
  must(r.block_on(std::move(t)));
  return static_cast<double>(bench::thread_cpu_ns() - begun);
}

// Of runs made in turn: round by round, so that what drifts falls out.
double median_ratio(const std::vector<double>& of, const std::vector<double>& over) {
  std::vector<double> ratio;
  for (size_t i = 0; i < of.size(); ++i) ratio.push_back(of[i] / over[i]);
  return bench::median(ratio);
}

void layers(bench::Report& report, Reactor& r, int rounds) {
  const uint64_t size = 256 * kMiB, count = 100'000;  // short rounds, many: this machine's speed changes within a second
  rounds *= 5;
  const VolumePtr a = memory("a", size / 2), b = memory("b", size / 2);
  const VolumePtr linear = must(make_linear("linear", {a, b})), stripe = must(make_stripe("stripe", {a, b}, kChunk));
  const std::vector<std::pair<std::string, std::vector<Volume*>>> all = {
      {"leaf", {a.get(), b.get()}}, {"linear", {linear.get()}}, {"stripe", {stripe.get()}}};
  for (bool write : {false, true}) {
    std::vector<std::vector<double>> ns(all.size());
    std::vector<bench::Contestant> contestants;
    for (size_t i = 0; i < all.size(); ++i)
      contestants.push_back({all[i].first, [&, i] {
                               ns[i].push_back(timed(r, random_4k(all[i].second, write, count, 1)) / static_cast<double>(count));
                             }});
    bench::interleave(rounds, contestants);
    for (size_t i = 0; i < all.size(); ++i) {
      report.run(fmt::format("4 KiB {} over memory, {}", write ? "write" : "read", all[i].first),
                 {{"ns", bench::median(ns[i])}, {"spread", bench::spread(ns[i])}});
      if (i == 0) continue;
      report.gate(fmt::format("{} over leaf, 4 KiB {}", all[i].first, write ? "write" : "read"), median_ratio(ns[i], ns[0]), "<=", 1.05);
    }
  }
}

VolumePtr raid5(Reactor& r, const std::string& name, std::vector<VolumePtr> members) {
  LayerSpec s;
  s.name = name;
  s.layer = "raid5";
  s.chunk = kChunk;
  s.consistency = "resync";
  s.members = std::move(members);
  CreateOptions o;
  o.assume_clean = o.force = true;
  must(r.block_on(create_array(s, o)));
  return must(r.block_on(assemble(s)));
}

void parity(bench::Report& report, Reactor& r, int rounds) {
  const uint64_t member = 65 * kMiB, bytes = 512 * kMiB, request = 4 * kChunk;
  rounds *= 4;
  std::vector<VolumePtr> members;
  for (int i = 0; i < 5; ++i) members.push_back(memory(fmt::format("m{}", i), member));
  VolumePtr v = raid5(r, "r5", members);
  must(r.block_on(sequential(v.get(), true, v->size(), request)));

  // The same bytes: copied to where the members would have them, and xored into a fifth place.
  AlignedBuffer target(5 * 64 * kMiB), source(request);
  std::memset(target.data(), 1, target.size());
  std::memset(source.data(), 0x5a, source.size());
  std::vector<double> ours, alone, healthy, degraded;
  const auto copy_and_xor = [&] {
    const uint64_t begun = bench::thread_cpu_ns();
    const uint64_t rows = 64 * kMiB / kChunk;
    for (uint64_t done = 0, row = 0; done < bytes; done += request, row = (row + 1) % rows) {
      void* array[5];
      for (uint64_t d = 0; d < 4; ++d) {
        std::byte* to = target.data() + d * 64 * kMiB + row * kChunk;
        std::memcpy(to, source.data() + d * kChunk, kChunk);
        array[d] = to;
      }
      array[4] = target.data() + 4 * 64 * kMiB + row * kChunk;
      SPILLWAY_ASSERT(::xor_gen(5, kChunk, array) == 0);
    }
    alone.push_back(static_cast<double>(bytes) / static_cast<double>(bench::thread_cpu_ns() - begun));
  };
  bench::interleave(rounds, {{"raid5", [&] {
                                ours.push_back(static_cast<double>(bytes) / timed(r, sequential(v.get(), true, bytes, request)));
                              }},
                             {"copy + xor", copy_and_xor}});
  report.run("full-stripe write, raid5 4+1 over memory", {{"gb_s", bench::median(ours)}, {"spread", bench::spread(ours)}});
  report.run("copy + ISA-L xor alone", {{"gb_s", bench::median(alone)}, {"spread", bench::spread(alone)}});
  report.gate("full-stripe write over copy + xor", median_ratio(ours, alone), ">=", 0.7);

  VolumePtr lost = raid5(r, "r5d", [] {
    std::vector<VolumePtr> m;
    for (int i = 0; i < 5; ++i) m.push_back(memory(fmt::format("n{}", i), 65 * kMiB));
    return m;
  }());
  must(r.block_on(sequential(lost.get(), true, lost->size(), request)));
  must(r.block_on(array_control(*lost)->fail_member("n2")));
  bench::interleave(rounds, {{"healthy", [&] {
                                healthy.push_back(static_cast<double>(bytes) / timed(r, sequential(v.get(), false, bytes, kMiB)));
                              }},
                             {"degraded", [&] {
                                degraded.push_back(static_cast<double>(bytes) / timed(r, sequential(lost.get(), false, bytes, kMiB)));
                              }}});
  report.run("sequential read, healthy", {{"gb_s", bench::median(healthy)}, {"spread", bench::spread(healthy)}});
  report.run("sequential read, degraded", {{"gb_s", bench::median(degraded)}, {"spread", bench::spread(degraded)}});
  report.gate("degraded sequential read over healthy", median_ratio(degraded, healthy), ">=", 0.8);
  must(r.block_on(v->close()));
  must(r.block_on(lost->close()));
}

// Several writers, so that the disk always has work; in turn over the range, so that it is sequential. `fresh`: each request's
// contents are copied into its buffer first, as whoever writes something new must.
Task<Status> writer(Volume* v, uint64_t* next, uint64_t end, uint64_t request, bool fresh = false) {
  AlignedBuffer buffer(request), source(fresh ? request : 4096);
  std::memset(buffer.data(), 0x5a, request);
  std::memset(source.data(), 0x5b, source.size());
  const iovec iov = buffer.iov();
  while (*next < end) {
    const uint64_t at = *next;
    *next += request;
    if (fresh) std::memcpy(buffer.data(), source.data(), request);
    Status s = co_await v->write({}, at, Iov(&iov, 1));
    if (!s) co_return s;
  }
  co_return Status{};
}

void files(bench::Report& report, Reactor& r, int rounds, const std::string& dir, uint64_t mib) {
  const std::string folder = fmt::format("{}/bench-raid-{}", dir, ::getpid());
  std::filesystem::create_directories(folder);
  const uint64_t member = mib * kMiB + kMiB;
  std::vector<VolumePtr> members;
  for (int i = 0; i < 4; ++i) {
    FileOptions o;
    o.path = fmt::format("{}/m{}", folder, i);
    o.create_size = member;
    members.push_back(must(open_file(fmt::format("m{}", i), std::move(o))));
    must(r.block_on(sequential(members.back().get(), true, member, kMiB)));  // allocated
  }
  VolumePtr v = raid5(r, "r5f", members);
  std::vector<double> ours, raw, copied, our_cpu, raw_cpu;  // GB/s; CPU time of this thread by wall time
  const auto cpu_share = [](uint64_t begun, uint64_t cpu) {
    return static_cast<double>(bench::thread_cpu_ns() - cpu) / static_cast<double>(bench::now_ns() - begun);
  };
  const auto run_raw = [&](bool fresh) {
    const uint64_t begun = bench::now_ns(), cpu = bench::thread_cpu_ns();
    uint64_t next[4];
    std::vector<Task<Status>> tasks;
    for (int i = 0; i < 4; ++i) {
      next[i] = kMiB;
      for (int k = 0; k < 4; ++k)
        tasks.push_back(writer(members[static_cast<size_t>(i)].get(), &next[i], member, kChunk * 4, fresh));
    }
    must(r.block_on(all_of(std::move(tasks))));
    for (auto& m : members) must(r.block_on(m->flush({})));
    (fresh ? copied : raw).push_back(static_cast<double>(4 * (member - kMiB)) / static_cast<double>(bench::now_ns() - begun));
    if (!fresh) raw_cpu.push_back(cpu_share(begun, cpu));
  };
  const auto run_raid = [&] {
    const uint64_t begun = bench::now_ns(), cpu = bench::thread_cpu_ns(), request = 3 * kChunk * 4;
    uint64_t next = 0;
    std::vector<Task<Status>> tasks;
    for (int k = 0; k < 8; ++k) tasks.push_back(writer(v.get(), &next, v->size() / request * request, request));
    must(r.block_on(all_of(std::move(tasks))));
    must(r.block_on(v->flush({})));
    ours.push_back(static_cast<double>(v->size() / request * request / 3 * 4) / static_cast<double>(bench::now_ns() - begun));
    our_cpu.push_back(cpu_share(begun, cpu));
  };
  bench::interleave(rounds, {{"raw", [&] { run_raw(false); }}, {"raid5", run_raid}, {"copied", [&] { run_raw(true); }}});
  report.run("sequential write to four files, raw",
             {{"gb_s", bench::median(raw)}, {"spread", bench::spread(raw)}, {"cpu", bench::median(raw_cpu)}});
  report.run("the same, each request copied into its buffer first", {{"gb_s", bench::median(copied)}, {"spread", bench::spread(copied)}});
  report.run("sequential write, raid5 3+1 over the same files, bytes that reach them",
             {{"gb_s", bench::median(ours)}, {"spread", bench::spread(ours)}, {"cpu", bench::median(our_cpu)}});
  report.gate("raid5 3+1 over raw files", median_ratio(ours, raw), ">=", 0.9);
  must(r.block_on(v->close()));
  v.reset();
  members.clear();
  std::filesystem::remove_all(folder);
}

// --- V4 on modelled disks ---

Task<Status> stream(Volume* v, uint64_t at, uint64_t request, uint64_t until_ns, bool random, uint64_t seed, uint64_t* bytes) {
  AlignedBuffer buffer(request);
  const iovec iov = buffer.iov();
  uint64_t x = seed * 2654435761u + 1;
  while (Reactor::current().now_ns() < until_ns) {
    if (random) {
      x = x * 6364136223846793005ull + 1442695040888963407ull;
      at = (x >> 20) % (v->size() / request) * request;
    }
    Status s = co_await v->read({}, at % (v->size() - request), Iov(&iov, 1));
    if (!s) co_return s;
    at = align_down((at + request) % (v->size() - request), request);
    *bytes += request;
  }
  co_return Status{};
}

double simulate(bool striped, int streams, bool random) {
  SimReactor sim(1);
  std::vector<VolumePtr> disks;
  for (int i = 0; i < 4; ++i) {
    SimOptions o;
    o.size = 64 * kGiB;
    o.model = "hdd";
    disks.push_back(must(make_sim(fmt::format("d{}", i), o)));
  }
  VolumePtr v = striped ? must(make_stripe("stripe", disks, kChunk)) : must(make_linear("linear", disks));
  const uint64_t seconds = 20, request = random ? 4096 : 4 * kChunk;
  uint64_t bytes = 0;
  std::vector<Task<Status>> tasks;
  for (int i = 0; i < streams; ++i) {
    // Streams over the whole volume; on linear the first four are on four disks.
    const uint64_t region = v->size() / 4;
    const uint64_t at = align_down(static_cast<uint64_t>(i % 4) * region + static_cast<uint64_t>(i / 4) * region / 16, request);
    tasks.push_back(stream(v.get(), at, request, seconds * 1'000'000'000, random, static_cast<uint64_t>(i + 1), &bytes));
  }
  must(sim.block_on(all_of(std::move(tasks))));
  return static_cast<double>(bytes) / static_cast<double>(sim.now_ns()) * 1e9;
}

void simulated(bench::Report& report) {
  std::vector<std::pair<double, double>> sequential_mb, iops;
  for (int streams = 1; streams <= 64; streams *= 2) {
    const double s = simulate(true, streams, false) / 1e6, l = simulate(false, streams, false) / 1e6;
    const double si = simulate(true, streams, true) / 4096, li = simulate(false, streams, true) / 4096;
    sequential_mb.emplace_back(s, l);
    iops.emplace_back(si, li);
    report.run(fmt::format("{} streams on 4 modelled disks", streams),
               {{"streams", streams}, {"stripe_mb_s", s}, {"linear_mb_s", l}, {"stripe_iops", si}, {"linear_iops", li}});
  }
  report.gate("V4: one stream, stripe over linear", sequential_mb[0].first / sequential_mb[0].second, ">=", 2.5);
  report.gate("V4: aggregate, linear with a stream a disk over stripe with one", sequential_mb[2].second / sequential_mb[0].first, ">=", 0.9);
  report.gate("V4: 64 streams, linear over stripe", sequential_mb[6].second / sequential_mb[6].first, ">=", 1.5);
  report.gate("V4: stripe, 64 streams over one", sequential_mb[6].first / sequential_mb[0].first, "<=", 0.7);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Report report("raid", argc, argv);
  set_log_level(LogLevel::kError);
  const int rounds = static_cast<int>(report.option("rounds", 5));
  if (report.option("sim", 0.0) != 0) {
    simulated(report);
    return report.finish();
  }
  bench::pin(1);
  auto reactor = must(UringReactor::create(256));
  const std::string only = report.option("only", "");
  const auto wanted = [&](const char* what) { return only.empty() || only == what; };
  if (wanted("layers")) layers(report, *reactor, rounds);
  if (wanted("parity")) parity(report, *reactor, rounds);
  if (wanted("files")) files(report, *reactor, rounds, report.option("dir", "."), static_cast<uint64_t>(report.option("mib", 128)));
  return report.finish();
}
