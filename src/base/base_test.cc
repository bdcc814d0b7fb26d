#include <gtest/gtest.h>
#include <sys/mman.h>

#include "src/base/fd_store.h"
#include "src/base/result.h"
#include "src/base/units.h"

namespace spillway {

TEST(ParseSize_typical_texts, give_bytes) {
  EXPECT_EQ(*parse_size("4096"), 4096u);
  EXPECT_EQ(*parse_size("64K"), 65536u);
  EXPECT_EQ(*parse_size("1.5G"), 1536 * kMiB);
  EXPECT_EQ(*parse_size("2MiB"), 2 * kMiB);
  EXPECT_EQ(*parse_size("3 GiB"), 3 * kGiB);
  EXPECT_EQ(*parse_size("512B"), 512u);
}

TEST(ParseSize_nonsense, is_refused_by_name) {
  for (const char* bad : {"", "K", "-1", "12Q", "1KiBs", "99999999999999999999", "20000000T", "0.3", "1BB"}) {
    auto r = parse_size(bad);
    ASSERT_FALSE(r) << bad;
    EXPECT_EQ(r.error().kind(), ErrorKind::kInvalid);
    EXPECT_NE(r.error().message().find(std::string("'") + bad + "'"), std::string::npos);
  }
}

TEST(FormatSize_values, read_as_people_write) {
  EXPECT_EQ(format_size(100), "100 B");
  EXPECT_EQ(format_size(1536 * kMiB), "1.5 GiB");
  EXPECT_EQ(format_size(64 * kKiB), "64 KiB");
  EXPECT_EQ(format_size(64 * kKiB, true), "65536");
}

TEST(Error_from_errno, keeps_errno_and_text) {
  Error e = Error::from_errno(ENOSPC, "volume v: write").with_context("export x");
  EXPECT_EQ(e.kind(), ErrorKind::kNoSpace);
  EXPECT_EQ(e.to_errno(), ENOSPC);
  EXPECT_EQ(e.message(), "export x: volume v: write: No space left on device");
  Error copy = e;
  EXPECT_EQ(copy.message(), e.message());
}

TEST(MemoryFdStore_entry, survives_as_duplicates) {
  MemoryFdStore store;
  Fd m(::memfd_create("t", MFD_CLOEXEC));
  int fd = m.get();
  ASSERT_TRUE(store.put("a/1", std::span(&fd, 1), "blob"));
  m.reset();
  auto e = store.get("a/1");
  ASSERT_TRUE(e);
  EXPECT_EQ(e->blob, "blob");
  EXPECT_EQ(::ftruncate(e->fds.at(0).get(), 10), 0);
  ASSERT_TRUE(store.put("a/2", {}, ""));
  ASSERT_TRUE(store.put("b", {}, ""));
  EXPECT_EQ(store.list("a/")->size(), 2u);
  ASSERT_TRUE(store.remove("a/1"));
  EXPECT_EQ(store.get("a/1").error().kind(), ErrorKind::kNotFound);
}

}  // namespace spillway
