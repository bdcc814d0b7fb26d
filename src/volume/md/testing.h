// What the tests of md arrays share: disks of a virtual clock that can fail, a rig of them, a model of the contents.
#pragma once

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <functional>

#include "src/io/sim_reactor.h"
#include "src/io/sync.h"
#include "src/volume/assemble.h"
#include "src/volume/md/superblock.h"
#include "src/volume/sim/sim.h"
#include "src/volume/testing.h"

namespace spillway::md::testing_support {

using spillway::testing_support::random_bytes;
using spillway::testing_support::read_bytes;
using spillway::testing_support::write_bytes;
using Disk = std::shared_ptr<SimVolume>;

inline Disk disk(const std::string& name, uint64_t size = 2 * kMiB, uint32_t block = 512) {
  SimOptions o;
  o.size = size;
  o.block_size = block;
  o.model = "null";
  return make_sim_volume(name, o).value();
}

struct Shape {
  const char* layer;
  int disks;
  const char* layout;
  const char* consistency;
  uint64_t chunk;
  uint32_t block = 512;
};
inline void PrintTo(const Shape& s, std::ostream* os) {
  *os << s.layer << s.disks << '_' << s.layout << '_' << s.consistency << '_' << s.chunk << '_' << s.block;
}

struct Rig {
  explicit Rig(const Shape& s, uint64_t size = 2 * kMiB, SimReactor* reactor = nullptr)
      : shape(s), own(reactor == nullptr ? new SimReactor(1) : nullptr), sim(reactor == nullptr ? *own : *reactor) {
    for (int i = 0; i < s.disks; ++i) disks.push_back(disk(fmt::format("d{}", i), size, s.block));
  }
  LayerSpec spec() const {
    LayerSpec l;
    l.name = "vol";
    l.layer = shape.layer;
    l.chunk = shape.chunk;
    l.raid5_layout = shape.layout;
    l.consistency = shape.consistency;
    for (const auto& d : disks) l.members.push_back(d);
    return l;
  }
  VolumePtr open() {
    auto v = sim.block_on(assemble(spec()));
    if (!v) ADD_FAILURE() << v.error().message();
    return v ? *v : nullptr;
  }
  void close(VolumePtr& v) {
    Status s = sim.block_on(v->close());
    EXPECT_TRUE(s) << s.error().message();
    v.reset();
  }
  Shape shape;
  std::unique_ptr<SimReactor> own;
  SimReactor& sim;
  std::vector<Disk> disks;
};

// A few random requests at once, none overlapping, checked against bytes.
class Model {
 public:
  Model(uint64_t size, uint32_t block, uint64_t seed) : bytes_(size), block_(block), random_(seed) {}
  void steps(Reactor& r, Volume& v, int n) {
    for (int i = 0; i < n && !::testing::Test::HasFatalFailure(); ++i) step(r, v);
  }
  void check(Reactor& r, Volume& v) {
    auto all = r.block_on(read_bytes(v, 0, v.size()));
    ASSERT_TRUE(all) << all.error().message();
    for (uint64_t i = 0; i < bytes_.size(); ++i) ASSERT_EQ((*all)[i], bytes_[i]) << "byte " << i;
  }
  std::vector<std::byte>& bytes() { return bytes_; }

 private:
  void step(Reactor& r, Volume& v) {
    // Parts of the volume that this step's requests have to themselves.
    const uint64_t k = 1 + random_() % 4, share = align_down(v.size() / k, block_);
    std::vector<Task<Status>> tasks;
    std::vector<std::vector<std::byte>> data(k);
    std::vector<std::function<void()>> checks;
    for (uint64_t i = 0; i < k; ++i) {
      const uint64_t at = i * share + random_() % (share / block_) * block_;
      const uint64_t longest = random_() % 3 == 0 ? 400 * kKiB : 20 * kKiB;
      const uint64_t n = std::min((i + 1) * share - at, (1 + random_() % (longest / block_)) * block_);
      switch (random_() % 8) {
        case 0:
          tasks.push_back(v.write_zeroes({}, at, n, random_() % 2 == 0));
          std::fill_n(bytes_.begin() + static_cast<ptrdiff_t>(at), n, std::byte{0});
          break;
        case 1: case 2: case 3: case 4:
          data[i] = random_bytes(random_(), n);
          std::copy(data[i].begin(), data[i].end(), bytes_.begin() + static_cast<ptrdiff_t>(at));
          tasks.push_back(write_bytes(v, at, data[i], random_() % 4 == 0));
          break;
        default:
          tasks.push_back(verify(v, at, n));
      }
    }
    Status s = r.block_on(all_of(std::move(tasks)));
    ASSERT_TRUE(s) << s.error().message();
  }
  Task<Status> verify(Volume& v, uint64_t at, uint64_t n) {
    auto got = co_await read_bytes(v, at, n);
    if (!got) co_return fail(std::move(got).error());
    if (!std::equal(got->begin(), got->end(), bytes_.begin() + static_cast<ptrdiff_t>(at)))
      co_return fail(ErrorKind::kCorrupt, fmt::format("contents differ at {} + {}", at, n));
    co_return Status{};
  }
  std::vector<std::byte> bytes_;
  uint32_t block_;
  std::mt19937_64 random_;
};

inline std::string state_of(Volume& v, const std::string& member) {
  for (const auto& m : array_status(v).members)
    if (m.name == member) return m.state;
  return "-";
}

}  // namespace spillway::md::testing_support
