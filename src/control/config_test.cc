#include "src/control/config.h"

#include <gtest/gtest.h>

namespace spillway {
namespace {

constexpr const char* kGood = R"([cache]
size = "64M"
[disk.d0]
path = "d0.img"
[disk.d1]
path = "d1.img"
[disk.m]
kind = "memory"
size = "1M"
[volume.fast]
layer = "stripe"
members = ["d0", "d1"]
chunk = "64K"
[volume.a]
layer = "slice"
members = ["fast"]
offset = 0
length = "64M"
[volume.b]
layer = "slice"
members = ["fast"]
offset = "64M"
length = "64M"
[group.tenant-a]
weight = 200
memory.low = "256M"
[export.vm1]
device = "virtio-blk"
volume = "a"
group = "tenant-a"
queues = 2
socket = "vm1.sock"
[export.vm2]
device = "virtio-blk"
volume = "b"
socket = "vm2.sock"
)";

std::string error_of(const std::string& text) {
  auto c = Config::parse(text, "/x/f.toml");
  return c ? "" : c.error().message();
}
std::string with(std::string_view from, std::string_view to) {
  std::string text = kGood;
  auto at = text.find(from);
  SPILLWAY_ASSERT(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

TEST(Config_good, is_read_and_dumped) {
  auto c = Config::parse(kGood, "/x/f.toml");
  ASSERT_TRUE(c) << c.error().message();
  EXPECT_EQ(c->disks.at("d0").path, "/x/d0.img");
  EXPECT_EQ(c->groups.at("tenant-a").memory_low, 256 * kMiB);
  EXPECT_EQ(c->groups.at("tenant-a").weight, 200u);
  EXPECT_EQ(c->exports.at("vm1").queues, 2u);
  EXPECT_EQ(c->host.cache_size, 64 * kMiB);
  EXPECT_EQ(c->host.control, "/x/spillwayd.sock");
  EXPECT_EQ(*c->build_order(), (std::vector<std::string>{"fast", "a", "b"}));
  EXPECT_EQ(c->data_node("a"), "fast");
  auto again = Config::parse(c->dump(), "/x/f.toml");
  ASSERT_TRUE(again) << again.error().message() << c->dump();
  EXPECT_EQ(again->dump(), c->dump());
}

TEST(Config_bad, names_file_line_and_field) {
  EXPECT_EQ(error_of(with("chunk = \"64K\"", "chunkk = \"64K\"")),
            "/x/f.toml:13: [volume.fast] chunkk: unknown key");
  EXPECT_EQ(error_of(with("chunk = \"64K\"", "chunk = \"65K\"")),
            "/x/f.toml:13: [volume.fast] chunk: must be a power of two from 4K to 1G");
  EXPECT_EQ(error_of(with("\"d1\"]", "\"d9\"]")),
            "/x/f.toml:12: [volume.fast] members: there is no volume or disk \"d9\"");
  EXPECT_EQ(error_of(with("weight = 200", "weight = 0")),
            "/x/f.toml:25: [group.tenant-a] weight: must be a number from 1 to 10000");
  EXPECT_EQ(error_of(with("group = \"tenant-a\"", "group = \"tenant-z\"")),
            "/x/f.toml:30: [export.vm1] group: there is no group \"tenant-z\"");
  EXPECT_EQ(error_of(with("vm2.sock", "vm1.sock")),
            "/x/f.toml:36: [export.vm2] socket: export \"vm1\" has the same path");
  EXPECT_NE(error_of(with("[disk.d0]", "[disk.d0")).find("/x/f.toml:3: "), std::string::npos);
  EXPECT_NE(error_of(with("[cache]", "[cash]")).find("[cash] unknown section"), std::string::npos);
  EXPECT_EQ(error_of(with("[\"d0\", \"d1\"]", "[\"d0\", \"a\"]")),
            "/x/f.toml:16: [volume.a] members: the volume contains itself");
}

TEST(Config_overlap, of_writable_exports_is_refused) {
  EXPECT_EQ(error_of(with("offset = \"64M\"", "offset = \"32M\"")),
            "/x/f.toml:35: [export.vm2] volume: \"b\" overlaps the writable export \"vm1\" at \"fast\"; make "
            "one readonly");
  EXPECT_NE(error_of(with("volume = \"b\"", "volume = \"d0\"")).find("overlaps the writable export \"vm1\""),
            std::string::npos);
  // Reading what another writes is fine through the same cached volume, and only there.
  EXPECT_EQ(error_of(with("volume = \"b\"", "volume = \"fast\"\nreadonly = true")), "");
  EXPECT_NE(error_of(with("volume = \"b\"", "volume = \"d0\"\nreadonly = true")).find("by another way"),
            std::string::npos);
  // A pmem guest's pages are its own: what others write does not reach them, what it stores is not seen by others.
  EXPECT_NE(error_of(with("device = \"virtio-blk\"\nvolume = \"b\"",
                          "device = \"virtio-pmem\"\nvolume = \"fast\"\nreadonly = true"))
                .find("virtio-pmem export can share only what nobody writes"),
            std::string::npos);
}

}  // namespace
}  // namespace spillway
