// P6 on a real filesystem with reflinks: xfs on a loop device.
#include "src/host/extents.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

#include "src/base/fd.h"

namespace spillway {
namespace {

struct ExtentsTest : ::testing::Test {
  std::string dir, mnt;
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "needs root to mount a loop device";
    char name[] = "/tmp/spillway-extents-XXXXXX";
    dir = ::mkdtemp(name);
    mnt = dir + "/mnt";
    ::mkdir(mnt.c_str(), 0700);
    const std::string make = "truncate -s 400M " + dir + "/xfs.img && mkfs.xfs -q -m reflink=1 " + dir +
                             "/xfs.img >/dev/null 2>&1 && mount -o loop " + dir + "/xfs.img " + mnt + " 2>/dev/null";
    if (std::system(make.c_str()) != 0) {
      (void)!std::system(("rm -rf " + dir).c_str());
      dir.clear();
      GTEST_SKIP() << "no mkfs.xfs, no loop device or no xfs in this kernel";
    }
  }
  void TearDown() override {
    if (!dir.empty()) (void)!std::system(("umount " + mnt + "; rm -rf " + dir).c_str());
  }
  Fd file(const std::string& name, size_t bytes) {
    Fd fd(::open((mnt + "/" + name).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    const std::string data(bytes, 'x');
    EXPECT_EQ(::pwrite(fd.get(), data.data(), data.size(), 0), static_cast<ssize_t>(bytes));
    EXPECT_EQ(::fsync(fd.get()), 0);
    return fd;
  }
  LeafUse use(const std::string& name, const Fd& fd, std::vector<uint32_t> writers, std::vector<uint32_t> readers) {
    struct stat st {};
    EXPECT_EQ(::fstat(fd.get(), &st), 0);
    return {name, fd.get(), st.st_dev, std::move(writers), std::move(readers)};
  }
};

TEST_F(ExtentsTest, Reflink_writableForTwoTenants_isFound_andUnshared) {
  Fd a = file("a.img", 1 << 20);
  Fd b(::open((mnt + "/b.img").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ioctl(b.get(), FICLONE, a.get()), 0);
  ASSERT_EQ(::fsync(b.get()), 0);
  auto r = find_shared_extents({use("a.img", a, {1}, {1}), use("b.img", b, {2}, {2})}, false);
  ASSERT_TRUE(r) << r.error().message();
  ASSERT_EQ(r->shared.size(), 2u);
  EXPECT_EQ(r->shared[0].length, 1u << 20);
  EXPECT_NE(to_text(r->shared[0]).find("shares 1 MiB at offset 0 with"), std::string::npos);
  ASSERT_TRUE(unshare_extents(b.get(), "b.img"));
  r = find_shared_extents({use("a.img", a, {1}, {1}), use("b.img", b, {2}, {2})}, true);
  ASSERT_TRUE(r);
  EXPECT_TRUE(r->shared.empty());
}

TEST_F(ExtentsTest, Reflink_ofOneTenant_isItsOwnBusiness_butStrictSeesStrangers) {
  Fd a = file("a.img", 1 << 16);
  Fd b(::open((mnt + "/b.img").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ioctl(b.get(), FICLONE, a.get()), 0);
  auto r = find_shared_extents({use("a.img", a, {1}, {1}), use("b.img", b, {1}, {1})}, false);
  ASSERT_TRUE(r);
  EXPECT_TRUE(r->shared.empty());
  // Sharing that came later, with a file nobody serves.
  r = find_shared_extents({use("a.img", a, {1}, {1})}, true);
  ASSERT_TRUE(r);
  ASSERT_EQ(r->shared.size(), 1u);
  EXPECT_EQ(r->shared[0].with, "");
  // Read-only for both: nothing is written, so nothing can be timed.
  r = find_shared_extents({use("a.img", a, {}, {1}), use("b.img", b, {}, {2})}, false);
  ASSERT_TRUE(r);
  EXPECT_TRUE(r->shared.empty());
}

TEST_F(ExtentsTest, PlainFile_hasNoSharedExtents) {
  Fd a = file("a.img", 1 << 16);
  auto e = file_extents(a.get());
  ASSERT_TRUE(e) << e.error().message();
  ASSERT_FALSE(e->empty());
  EXPECT_FALSE((*e)[0].shared);
}

}  // namespace
}  // namespace spillway
