// bench_qcow2: what the qcow2 layer itself costs, through the volume interface.
//
//   bench_qcow2 overhead            random reads of 4 KiB through an overlay over memory, against the memory alone
//   bench_qcow2 alloc FILE SIZE_K   allocating writes of SIZE_K KiB at queue depth 32 into a new image in FILE
//   bench_qcow2 lookup              lookups in a fully allocated image of 1 TiB (metadata only): reads per lookup
//
// One JSON line a run on stdout. Figures of a shared machine: see docs/qcow2.md for how they were taken.
#include <algorithm>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include <fmt/core.h>

#include "src/image/qcow2.h"
#include "src/image/qcow2_format.h"
#include "src/io/reactor.h"
#include "src/io/sync.h"
#include "src/volume/file/file.h"
#include "src/volume/memory/memory.h"

namespace spillway {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class T>
T must(Result<T> r) {
  if (r) return std::move(*r);
  std::fprintf(stderr, "bench_qcow2: %s\n", r.error().message().c_str());
  std::exit(1);
}
void must(Status s) {
  if (s) return;
  std::fprintf(stderr, "bench_qcow2: %s\n", s.error().message().c_str());
  std::exit(1);
}

Task<Status> random_reads(VolumePtr v, uint64_t n, uint64_t seed) {
  AlignedBuffer b(4096);
  const iovec iov = b.iov();
  std::mt19937_64 random(seed);
  const uint64_t blocks = v->size() / 4096;
  for (uint64_t i = 0; i < n; ++i) {
    Task<Status> t = v->read(IoContext{}, random() % blocks * 4096, Iov(&iov, 1));
    SPILLWAY_CO_CHECK(co_await t);
  }
  co_return Status{};
}

Task<Status> sequential_writes(VolumePtr v, uint64_t piece, uint64_t* next, uint64_t end, uint64_t stride) {
  AlignedBuffer b(piece);
  std::memset(b.data(), 0x5a, piece);
  const iovec iov = b.iov();
  while (*next < end) {
    const uint64_t at = *next;
    *next += stride;
    SPILLWAY_CO_CHECK(co_await v->write(IoContext{}, at, Iov(&iov, 1)));
  }
  co_return Status{};
}

int overhead(Reactor& r) {
  constexpr uint64_t kSize = 512 * kMiB;
  VolumePtr base = must(make_memory("base", kSize, 512));
  VolumePtr file = must(make_memory("file", 64 * kMiB, 512));
  Qcow2CreateOptions c;
  c.virtual_size = kSize;
  c.backing_file = "base";
  c.backing_format = "raw";
  must(r.block_on(create_qcow2(file, c)));
  Qcow2Options o;
  o.backing = base;
  VolumePtr image = must(r.block_on(open_qcow2("overlay", file, o)));
  uint64_t next = 0;
  must(r.block_on(sequential_writes(image, 65536, &next, kSize, 131072)));  // every other cluster is the overlay's
  next = 0;
  must(r.block_on(sequential_writes(base, 65536, &next, kSize, 65536)));
  constexpr uint64_t kReads = 2000000;
  double best[2] = {1e9, 1e9};
  for (int round = 0; round < 5; ++round)
    for (int k = 0; k < 2; ++k) {
      const double t = now();
      must(r.block_on(random_reads(k == 0 ? base : image, kReads, 7)));
      best[k] = std::min(best[k], now() - t);
    }
  fmt::print("{{\"bench\":\"qcow2-overhead\",\"raw_ns\":{:.1f},\"overlay_ns\":{:.1f},\"ratio\":{:.3f}}}\n",
             best[0] / kReads * 1e9, best[1] / kReads * 1e9, best[0] / best[1]);
  return 0;
}

int alloc(Reactor& r, const char* path, uint64_t piece) {
  FileOptions f;
  f.path = path;
  f.create_size = 4096;
  VolumePtr file = must(open_file("file", std::move(f)));
  Qcow2CreateOptions c;
  c.virtual_size = 16 * kGiB;
  must(r.block_on(create_qcow2(file, c)));
  VolumePtr image = must(r.block_on(open_qcow2("new", file, {})));
  const uint64_t end = (piece == 4096 ? 8192 : 8192) * uint64_t{65536};
  uint64_t next = 0;
  const double t = now();
  std::vector<Task<Status>> all;
  for (int i = 0; i < 32; ++i) all.push_back(sequential_writes(image, piece, &next, end, 65536));
  must(r.block_on(all_of(std::move(all))));
  must(r.block_on(image->flush(IoContext{})));
  const double took = now() - t;
  fmt::print("{{\"bench\":\"qcow2-alloc\",\"piece\":{},\"writes\":{},\"seconds\":{:.3f},\"iops\":{:.0f}}}\n", piece,
             end / 65536, took, static_cast<double>(end / 65536) / took);
  must(r.block_on(image->close()));
  return 0;
}

// A fully allocated image made of tables alone: its data clusters lie in a hole of the (memory) file.
int lookup(Reactor& r) {
  constexpr uint64_t kCluster = 65536, kClusters = kTiB / kCluster, kTables = kClusters / 8192;
  char path[] = "/tmp/bench_qcow2.XXXXXX";
  const int fd = ::mkstemp(path);
  if (fd < 0 || ::ftruncate(fd, 4096) != 0) return 1;
  FileOptions f;
  f.path = path;
  f.direct = false;
  f.fd = Fd(fd);
  VolumePtr file = must(open_file("file", std::move(f)));
  Qcow2CreateOptions c;
  c.virtual_size = kTiB;
  must(r.block_on(create_qcow2(file, c)));
  must(r.block_on(file->resize(kTiB + 4 * kGiB)));
  std::vector<std::byte> head(4096);
  iovec v{head.data(), head.size()};
  must(r.block_on(file->read(IoContext{}, 0, Iov(&v, 1))));
  const uint64_t l1_at = qcow2::load64(&head[40]);
  std::vector<std::byte> l1(kTables * 8), l2(kCluster);
  for (uint64_t t = 0; t < kTables; ++t) {
    const uint64_t at = kTiB + kGiB + t * kCluster;
    qcow2::store64(&l1[t * 8], at | qcow2::kCopied);
    for (uint64_t i = 0; i < 8192; ++i) {
      const uint64_t guest = t * 8192 + i;
      // Scattered: no two neighbours together.
      qcow2::store64(&l2[i * 8], (kGiB + (guest * 7919 % kClusters) * kCluster) | qcow2::kCopied);
    }
    v = {l2.data(), l2.size()};
    must(r.block_on(file->write(IoContext{}, at, Iov(&v, 1))));
  }
  v = {l1.data(), l1.size()};
  must(r.block_on(file->write(IoContext{}, l1_at, Iov(&v, 1))));
  Qcow2Options o;
  o.read_only = true;
  VolumePtr image = must(r.block_on(open_qcow2("tib", file, o)));
  for (uint64_t t = 0; t < kClusters; t += 512) {  // touch every slice once
    std::vector<std::byte> b(512);
    const iovec w{b.data(), b.size()};
    must(r.block_on(image->read(IoContext{}, t * kCluster, Iov(&w, 1))));
  }
  const Qcow2Stats warm = *qcow2_stats(*image);
  constexpr uint64_t kReads = 300000;
  const double t = now();
  must(r.block_on(random_reads(image, kReads, 3)));
  const double took = now() - t;
  const Qcow2Stats s = *qcow2_stats(*image);
  fmt::print("{{\"bench\":\"qcow2-lookup-1TiB\",\"l2_cache_bytes\":{},\"table_reads_per_io\":{:.6f},\"us_per_read\":{:.2f}}}\n",
             s.l2_bytes, static_cast<double>(s.l2_loads - warm.l2_loads) / kReads, took / kReads * 1e6);
  ::unlink(path);
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  using namespace spillway;
  auto reactor = UringReactor::create(256);
  if (!reactor) {
    std::fprintf(stderr, "bench_qcow2: %s\n", reactor.error().message().c_str());
    return 1;
  }
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "overhead") return overhead(**reactor);
  if (what == "lookup") return lookup(**reactor);
  if (what == "alloc" && argc == 4) return alloc(**reactor, argv[2], std::strtoull(argv[3], nullptr, 10) * 1024);
  std::fprintf(stderr, "usage: bench_qcow2 overhead | lookup | alloc FILE SIZE_K\n");
  return 2;
}
