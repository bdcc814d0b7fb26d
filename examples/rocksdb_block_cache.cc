// RocksDB's block cache as a shrinker. usage: rocksdb_block_cache DIR load | run [--reclaim] SCANS CACHE_MIB
//
// RocksDB sizes its LRU cache once; under a cgroup limit that is either too small most of the time or fatal
// some of the time. Here the cache is as large as it likes, and pressure shrinks it: count says what may go
// (usage less pinned), scan lowers the capacity by what is asked, which evicts at once. When the pressure is
// over, the capacity grows back at a bounded rate (GrowthGovernor).
#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/table.h>

#include <malloc.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>

#include <spillway/reclaim/reclaim.h>

namespace sr = spillway::reclaim;
using namespace std::chrono_literals;

namespace {

constexpr int kKeys = 300'000;
constexpr int kScan = 2000;
constexpr std::size_t kValue = 1000;

class BlockCacheShrinker {
 public:
  BlockCacheShrinker(sr::Registry& reg, std::shared_ptr<rocksdb::Cache> cache, std::size_t most)
      : reg_(reg),
        cache_(std::move(cache)),
        governor_({.floor_bytes = 8u << 20, .ceiling_bytes = most, .rate_bytes_per_s = 8u << 20, .hold = 2s},
                  reg.clock().now()),
        shrinker_(reg.alloc(sr::ShrinkerFlags::kNone, "rocksdb-block-cache")) {
    shrinker_.set_count([this](const sr::ScanRequest&) { return count(); });
    shrinker_.set_scan([this](const sr::ScanRequest& q) { return scan(q); });
    shrinker_.register_();
    shrinker_.set_bit();  // it always has something: count never says EMPTY
  }
  /// Between requests: take up what the governor allows again.
  void grow() {
    std::lock_guard lock(m_);
    cache_->SetCapacity(governor_.limit(reg_.clock().now()));
  }

 private:
  static constexpr std::size_t kBlock = 4096;  // an "object": RocksDB's default block
  sr::CountReport count() const {
    const std::size_t used = cache_->GetUsage(), pinned = cache_->GetPinnedUsage();
    const std::size_t free = used > pinned ? used - pinned : 0;
    return {free / kBlock, free, pinned, false};
  }
  sr::ScanReport scan(const sr::ScanRequest& q) {
    std::lock_guard lock(m_);
    const std::size_t before = cache_->GetUsage();
    // Pinned bytes came and went since count (their iterators): the cache knows what it could evict.
    governor_.on_pressure(reg_.clock().now(), before, q.nr_to_scan * kBlock);
    cache_->SetCapacity(governor_.limit(reg_.clock().now()));
    const std::size_t after = cache_->GetUsage();
    const std::size_t freed = before > after ? before - after : 0;
    if (freed != 0) malloc_trim(0);  // the cgroup counts pages, not blocks
    return {q.nr_to_scan, std::min<std::uint64_t>(freed / kBlock, q.nr_to_scan), freed};
  }

  sr::Registry& reg_;
  std::mutex m_;
  std::shared_ptr<rocksdb::Cache> cache_;
  sr::GrowthGovernor governor_;  // guarded by m_
  sr::Shrinker shrinker_;
};

std::string key_of(int i) {
  char k[32];
  std::snprintf(k, sizeof k, "key%09d", i);
  return k;
}

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

rocksdb::DB* open(const std::string& dir, std::shared_ptr<rocksdb::Cache> cache) {
  rocksdb::Options o;
  o.create_if_missing = true;
  o.compression = rocksdb::kNoCompression;
  o.write_buffer_size = 8u << 20;
  o.use_direct_reads = true;  // so that the page cache is not a second, invisible block cache
  rocksdb::BlockBasedTableOptions t;
  t.block_cache = std::move(cache);
  o.table_factory.reset(rocksdb::NewBlockBasedTableFactory(t));
  rocksdb::DB* db = nullptr;
  const auto s = rocksdb::DB::Open(o, dir, &db);
  if (!s.ok()) fail(s.ToString());
  return db;
}

int load(const std::string& dir) {
  std::unique_ptr<rocksdb::DB> db(open(dir, rocksdb::NewLRUCache(8u << 20)));
  std::mt19937 rng(1);
  std::string value(kValue, 'v');
  for (int i = 0; i < kKeys; ++i) {
    for (std::size_t k = 0; k < kValue; k += 8) std::memcpy(&value[k], &i, sizeof i);
    if (!db->Put({}, key_of(i), value).ok()) fail("put");
  }
  db->Flush({});
  return 0;
}

int run(const std::string& dir, bool reclaim, int scans, std::size_t cache_bytes) {
  sr::Registry reg;
  auto cache = rocksdb::NewLRUCache(cache_bytes);
  std::unique_ptr<rocksdb::DB> db(open(dir, cache));
  std::unique_ptr<BlockCacheShrinker> shrinker;
  sr::PressureMonitor monitor(reg, {.step_bytes = 8u << 20, .synchronous = true});
  if (reclaim) {
    shrinker = std::make_unique<BlockCacheShrinker>(reg, cache, cache_bytes);
    monitor.open_best();
    monitor.start_thread();
  }
  // Range scans from random keys, each value checked: 2 MB a scan, so some hundred cover the data set.
  std::mt19937 rng(2);
  std::uint64_t read = 0;
  for (int n = 0; n < scans; ++n) {
    const int from = static_cast<int>(rng() % (kKeys - kScan));
    std::unique_ptr<rocksdb::Iterator> it(db->NewIterator({}));
    it->Seek(key_of(from));
    for (int k = from; k < from + kScan; ++k, ++read, it->Next()) {
      if (!it->Valid() || it->key() != key_of(k) || it->value().size() != kValue ||
          std::memcmp(it->value().data(), &k, sizeof k) != 0) {
        fail("wrong value for " + key_of(k));
      }
    }
    if (shrinker) shrinker->grow();
  }
  monitor.stop_thread();
  std::printf("%llu values read, block cache %zu MiB\n", static_cast<unsigned long long>(read), cache->GetUsage() >> 20);
  if (reclaim) std::printf("%s%s", monitor.to_text().c_str(), reg.to_text().c_str());
  shrinker.reset();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[2], "load") == 0) return load(argv[1]);
  const bool reclaim = argc > 3 && std::strcmp(argv[3], "--reclaim") == 0;
  if (argc < 5 + reclaim || std::strcmp(argv[2], "run") != 0) {
    fail("usage: rocksdb_block_cache DIR load | DIR run [--reclaim] SCANS CACHE_MIB");
  }
  return run(argv[1], reclaim, std::atoi(argv[3 + reclaim]), std::strtoull(argv[4 + reclaim], nullptr, 10) << 20);
}
