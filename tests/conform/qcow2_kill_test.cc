// kill -9 of spillwayd's worker while a guest writes to a new part of a qcow2 overlay: what the guest was told is written
// is there for the successor though nobody had flushed it, its flush makes it stable, and the image is clean but for leaks.
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <filesystem>
#include <fstream>

#include "src/export/vhost_user/testing.h"
#include "src/image/testing.h"

namespace spillway {
namespace {

using vhost::testing::Client;

pid_t only_child(pid_t parent) {
  pid_t child = 0;
  std::ifstream("/proc/" + std::to_string(parent) + "/task/" + std::to_string(parent) + "/children") >> child;
  return child;
}

class Qcow2Kill : public ::testing::TestWithParam<const char*> {};

TEST_P(Qcow2Kill, Worker_Killed_NothingAcknowledgedIsLost) {
  constexpr uint64_t kSize = 64 * kMiB;
  constexpr uint32_t kLen = 8192;
  image_testing::TempDir dir;
  auto reactor = UringReactor::create(64);
  if (!reactor) GTEST_SKIP() << reactor.error().message();
  {
    ASSERT_OK(image_testing::file_volume(dir / "base.raw", false, kSize));
    VolumePtr file = *image_testing::file_volume(dir / "v.qcow2", false, 4096);
    Qcow2CreateOptions c;
    c.virtual_size = kSize;
    c.lazy_refcounts = true;
    c.backing_file = "base.raw";
    c.backing_format = "raw";
    ASSERT_OK((*reactor)->block_on(create_qcow2(file, c)));
  }
  const std::string socket = dir / "s", config = dir / "f.toml";
  std::ofstream(config) << "[host]\npsi = false\n[cache]\nsize = \"32M\"\n[disk.f]\npath = \"v.qcow2\"\n"
                        << "[volume.v]\nlayer = \"qcow2\"\nmembers = [\"f\"]\n[export.v]\ndevice = \"virtio-blk\"\nvolume = \"v\"\n"
                        << "cache = \"" << GetParam() << "\"\nsocket = \"s\"\n";
  const char* argv[] = {SPILLWAYD, "--config", config.c_str(), nullptr};
  pid_t holder = 0;
  ASSERT_EQ(::posix_spawn(&holder, SPILLWAYD, nullptr, nullptr, const_cast<char**>(argv), environ), 0);
  Client c;
  for (int i = 0; i < 2000 && !c.connect(socket); ++i) ::usleep(10'000);
  ASSERT_TRUE(c.start({}));

  // One block in each 64 KiB cluster: every write allocates. Some are written twice, the second time in place.
  std::vector<uint32_t> seeds(kSize / 65536);
  auto fill = [](std::byte* p, uint32_t seed) {
    for (uint32_t i = 0; i < kLen; i += 4) {
      const uint32_t v = seed == 0 ? 0 : seed * 2654435761u ^ i;
      std::memcpy(p + i, &v, 4);
    }
  };
  std::vector<std::byte> want(kLen);
  const uint64_t at = c.data(1, kLen);
  auto verify = [&](const char* when) {
    for (uint32_t k = 0; k < seeds.size(); ++k) {
      ASSERT_EQ(c.request(0, 0, k * 128, at, kLen), 0) << when;
      fill(want.data(), seeds[k]);
      ASSERT_EQ(std::memcmp(want.data(), c.memory() + at, kLen), 0) << when << ": cluster " << k;
    }
  };
  std::mt19937 random(7);
  uint32_t next = 1;
  for (int life = 0; life < 4; ++life) {
    for (int i = 0; i < 200; ++i) {
      const uint32_t k = random() % static_cast<uint32_t>(seeds.size());
      fill(c.memory() + at, seeds[k] = next++);
      ASSERT_EQ(c.request(0, 1, k * 128, at, kLen), 0);
      if (i == 50 && life % 2 == 1) ASSERT_EQ(c.request(0, 4, 0, 0, 0), 0);
    }
    const pid_t worker = only_child(holder);
    ASSERT_NE(worker, 0);
    ASSERT_EQ(::kill(worker, SIGKILL), 0);
    verify("after the kill");
  }
  ASSERT_EQ(c.request(0, 4, 0, 0, 0), 0);
  // Both die: what was flushed is in the files.
  const pid_t worker = only_child(holder);
  ::kill(holder, SIGKILL);
  ::kill(worker, SIGKILL);
  int status = 0;
  ::waitpid(holder, &status, 0);
  while (::kill(worker, 0) == 0) ::usleep(1000);
  auto image = (*reactor)->block_on(image_testing::Opener(dir.path()).open(dir / "v.qcow2", false));
  ASSERT_OK(image);
  for (uint32_t k = 0; k < seeds.size(); ++k) {
    std::vector<std::byte> got(kLen);
    const iovec v{got.data(), kLen};
    ASSERT_OK((*reactor)->block_on((*image)->read(IoContext{}, uint64_t{k} * 65536, Iov(&v, 1))));
    fill(want.data(), seeds[k]);
    ASSERT_EQ(std::memcmp(want.data(), got.data(), kLen), 0) << "after the end: cluster " << k;
  }
  ASSERT_OK((*reactor)->block_on((*image)->close()));
  image = fail(ErrorKind::kInvalid, "");
  auto report = (*reactor)->block_on(check_qcow2(*image_testing::file_volume(dir / "v.qcow2", true), Qcow2Repair::kNone));
  ASSERT_OK(report);
  EXPECT_EQ(report->errors, 0u) << check_to_text(*report);
}

INSTANTIATE_TEST_SUITE_P(Cache, Qcow2Kill, ::testing::Values("isolated", "none"), [](const auto& i) { return i.param; });

}  // namespace
}  // namespace spillway
