// Arrays made by the Linux kernel (tests/vectors/md) open here with the contents the kernel had (V1).
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "src/io/reactor.h"
#include "src/volume/assemble.h"
#include "src/volume/file/file.h"
#include "src/volume/testing.h"

namespace spillway {
namespace {

namespace fs = std::filesystem;
using testing_support::read_bytes;

struct Vector {
  const char* name;
  const char* layer;
};
void PrintTo(const Vector& v, std::ostream* os) { *os << v.name; }

std::string run(const std::string& command) {
  std::string out;
  FILE* p = ::popen(command.c_str(), "r");
  SPILLWAY_ASSERT(p != nullptr);
  char buf[4096];
  while (size_t n = std::fread(buf, 1, sizeof buf, p)) out.append(buf, n);
  ::pclose(p);
  return out;
}

class MdVectors : public ::testing::TestWithParam<Vector> {
 protected:
  void SetUp() override {
    std::string t = (fs::temp_directory_path() / "spillway-md-XXXXXX").string();
    ASSERT_NE(::mkdtemp(t.data()), nullptr);
    dir = t;
    const std::string archive = fmt::format("{}/tests/vectors/md/{}.tar.xz", SPILLWAY_SOURCE_DIR, GetParam().name);
    ASSERT_EQ(std::system(fmt::format("tar -xJf {} -C {}", archive, dir).c_str()), 0);
    dir += fmt::format("/{}", GetParam().name);
    auto r = UringReactor::create(64);
    ASSERT_TRUE(r);
    reactor = std::move(*r);
  }
  void TearDown() override { fs::remove_all(fs::path(dir).parent_path()); }

  std::vector<VolumePtr> members(bool read_only) {
    std::vector<VolumePtr> v;
    for (int i = 0; fs::exists(fmt::format("{}/m{}.img", dir, i)); ++i) {
      FileOptions o;
      o.path = fmt::format("{}/m{}.img", dir, i);
      o.read_only = read_only;
      o.direct = false;
      v.push_back(open_file(fmt::format("m{}", i), std::move(o)).value());
    }
    return v;
  }
  std::string sha256(Volume& v) {
    const std::string file = dir + "/contents";
    FILE* f = std::fopen(file.c_str(), "wb");
    for (uint64_t at = 0; at < v.size();) {
      // Odd sizes, so that reads cross chunks, rows and zones in all ways.
      const size_t n = std::min<uint64_t>(v.size() - at, 196608 + 512);
      auto r = reactor->block_on(read_bytes(v, at, n));
      if (!r) {
        ADD_FAILURE() << r.error().message();
        break;
      }
      std::fwrite(r->data(), 1, n, f);
      at += n;
    }
    std::fclose(f);
    return run("sha256sum < " + file).substr(0, 64);
  }
  std::string expected() {
    std::string s;
    std::ifstream(dir + "/array.sha256") >> s;
    return s;
  }

  std::string dir;
  std::unique_ptr<UringReactor> reactor;
};

TEST_P(MdVectors, read_only_open_gives_the_kernels_contents_and_changes_nothing) {
  const std::string before = run("cat " + dir + "/m*.img | sha256sum");
  LayerSpec spec;
  spec.name = "vec";
  spec.layer = "md";
  spec.members = members(true);
  std::reverse(spec.members.begin(), spec.members.end());  // order is the superblocks' business
  spec.read_only = true;
  auto v = reactor->block_on(assemble(spec));
  ASSERT_TRUE(v) << v.error().message();
  EXPECT_EQ((*v)->layer(), GetParam().layer);
  uint64_t size = 0;
  std::ifstream(dir + "/array.size") >> size;
  EXPECT_EQ((*v)->size(), size);
  EXPECT_EQ(sha256(**v), expected());
  ASSERT_TRUE(reactor->block_on((*v)->close()));
  EXPECT_EQ(run("cat " + dir + "/m*.img | sha256sum"), before);
}

TEST_P(MdVectors, any_one_member_missing_reads_the_same_where_redundant) {
  auto all = members(true);
  for (size_t gone = 0; gone < all.size(); ++gone) {
    LayerSpec spec;
    spec.name = "vec";
    spec.layer = "md";
    spec.members = all;
    spec.members.erase(spec.members.begin() + static_cast<ptrdiff_t>(gone));
    spec.read_only = true;
    auto v = reactor->block_on(assemble(spec));
    const std::string layer = GetParam().layer;
    const bool degraded = std::string_view(GetParam().name) == "raid5-degraded";
    if (layer == "linear" || layer == "stripe" || (degraded && gone != 2)) {
      ASSERT_FALSE(v) << gone;
      continue;
    }
    ASSERT_TRUE(v) << v.error().message();
    EXPECT_EQ(sha256(**v), expected()) << "without " << gone;
    ASSERT_TRUE(reactor->block_on((*v)->close()));
  }
}

INSTANTIATE_TEST_SUITE_P(Kernel, MdVectors,
                         ::testing::Values(Vector{"linear-3", "linear"}, Vector{"raid0-2", "stripe"},
                                           Vector{"raid0-mz-alt", "stripe"}, Vector{"raid1-2", "mirror"},
                                           Vector{"raid1-bitmap", "mirror"}, Vector{"raid5-ls", "raid5"},
                                           Vector{"raid5-la", "raid5"}, Vector{"raid5-bitmap", "raid5"},
                                           Vector{"raid5-degraded", "raid5"}),
                         [](const auto& test) {
                           std::string n = test.param.name;
                           std::replace(n.begin(), n.end(), '-', '_');
                           return n;
                         });

}  // namespace
}  // namespace spillway
