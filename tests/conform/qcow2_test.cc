// qcow2 against QEMU: images made by others (vectors, qemu-img) read as they must, images that we wrote are clean and
// the same for qemu-img, and the same operations give the same contents as qemu-io's. Skips what needs qemu-img where
// it is not installed.
#include <algorithm>

#include <nlohmann/json.hpp>

#include "src/image/testing.h"
#include "src/io/sync.h"

namespace spillway {
namespace {

using namespace image_testing;

std::string sha256_file(const std::string& path) { return shell("sha256sum " + path).substr(0, 64); }

Task<Status> write_out(VolumePtr v, std::string path) {
  SPILLWAY_CO_TRY(const std::vector<std::byte> data, co_await read_all(v));
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(data.data()), static_cast<long>(data.size()));
  co_return Status{};
}

std::string without_space(std::string s) {
  std::erase_if(s, [](char c) { return c == ' ' || c == '\n'; });
  return s;
}

// QEMU splits data clusters where the file below has holes ("data" and "zero" at once), if it guesses that the image was
// preallocated. Taken back here: what is data stays data, and neighbours join.
std::string joined(const std::string& json) {
  std::string t;
  nlohmann::json last;
  auto out = [&] {
    if (!last.is_null()) t += last.dump() + "\n";
  };
  for (nlohmann::json e : nlohmann::json::parse(json)) {
    if (e["data"]) e["zero"] = false;
    const bool joins = !last.is_null() && last["data"] == e["data"] && last["zero"] == e["zero"] &&
                       last["depth"] == e["depth"] && last["present"] == e["present"] &&
                       last.contains("offset") == e.contains("offset") &&
                       (!e.contains("offset") || e["offset"].get<uint64_t>() == last["offset"].get<uint64_t>() +
                                                                                   last["length"].get<uint64_t>());
    if (joins) {
      last["length"] = last["length"].get<uint64_t>() + e["length"].get<uint64_t>();
    } else {
      out();
      last = e;
    }
  }
  out();
  return t;
}

class Qcow2Conform : public ::testing::Test {
 protected:
  void SetUp() override {
    auto r = UringReactor::create(256);
    if (!r) GTEST_SKIP() << "no io_uring: " << r.error().message();
    reactor = std::move(*r);
  }
  VolumePtr open(const std::string& path, bool read_only, Qcow2Options options = {}) {
    auto v = reactor->block_on(opener.open(path, read_only, options));
    EXPECT_TRUE(v.has_value()) << v.error().message();
    return v ? *v : nullptr;
  }
  // Contents and map as qemu-img has them.
  void expect_same_as_qemu(const std::string& path, Qcow2Options options = {}, const std::string& extra = "") {
    VolumePtr v = open(path, true, options);
    ASSERT_NE(v, nullptr);
    ASSERT_OK(reactor->block_on(write_out(v, path + ".ours")));
    int code = 0;
    const std::string out = shell("qemu-img convert -O raw " + extra + " " + path + " " + path + ".theirs", &code);
    ASSERT_EQ(code, 0) << out;
    EXPECT_EQ(shell("cmp " + path + ".ours " + path + ".theirs"), "") << path;
    if (extra.empty()) {
      auto map = reactor->block_on(map_image(v));
      ASSERT_OK(map);
      EXPECT_EQ(joined(map_to_json(*map)), joined(shell("qemu-img map --output=json " + path))) << path;
    }
  }
  void expect_clean(const std::string& path) {
    int code = 0;
    const std::string out = shell("qemu-img check " + path, &code);
    EXPECT_EQ(code, 0) << path << ": " << out;
  }
  TempDir dir;
  std::unique_ptr<UringReactor> reactor;
  Opener opener{dir.path()};
};

TEST_F(Qcow2Conform, Vectors_ReadAsTheManifestSays) {
  int code = 0;
  ASSERT_EQ(shell("tar xf " QCOW2_VECTORS "/images.tar.xz -C " + dir.path(), &code), "");
  ASSERT_EQ(code, 0);
  std::ifstream manifest(QCOW2_VECTORS "/MANIFEST.txt");
  std::string line;
  int seen = 0;
  while (std::getline(manifest, line)) {
    if (line.starts_with("#")) continue;
    std::istringstream in(line);
    std::string name, sha;
    uint64_t size = 0;
    in >> name >> size >> sha;
    if (!name.ends_with(".qcow2")) continue;
    const std::string path = dir / name;
    VolumePtr v = open(path, true);
    ASSERT_NE(v, nullptr);
    EXPECT_EQ(v->size(), size) << name;
    ASSERT_OK(reactor->block_on(write_out(v, path + ".raw")));
    EXPECT_EQ(sha256_file(path + ".raw"), sha) << name;
    auto map = reactor->block_on(map_image(v));
    ASSERT_OK(map);
    std::ifstream want(path.substr(0, path.size() - 6) + ".map.json");
    const std::string expected((std::istreambuf_iterator<char>(want)), {});
    EXPECT_EQ(without_space(map_to_json(*map)), without_space(expected)) << name;
    ++seen;
  }
  EXPECT_GE(seen, 5);
}

struct Made {
  const char* name;
  const char* options;
  bool backing;
};
constexpr Made kMade[] = {
    {"v2", "compat=0.10", false},
    {"v2_backing", "compat=0.10", true},
    {"c512", "cluster_size=512", true},
    {"c4k", "cluster_size=4k,refcount_bits=1", false},
    {"c2m", "cluster_size=2M,refcount_bits=64", true},
    {"ext", "extended_l2=on", true},
    {"ext16k", "extended_l2=on,cluster_size=16k", false},
    {"ext2m", "extended_l2=on,cluster_size=2M,refcount_bits=8", true},
    {"lazy", "lazy_refcounts=on", true},
    {"zstd", "compression_type=zstd", true},
};
class Qcow2Made : public Qcow2Conform, public ::testing::WithParamInterface<Made> {
 protected:
  static constexpr uint64_t kSize = 12 * kMiB + 3 * 512;
  void make_base() {
    shell("qemu-img create -f raw " + (dir / "base.raw") + " 9M");
    shell("qemu-io -f raw -c 'write -P 17 0 3M' -c 'write -P 18 5M 1M' -c 'write -P 19 9212416 4096' " + (dir / "base.raw"));
  }
  std::string create(const std::string& name) {
    const Made& m = GetParam();
    int code = 0;
    const std::string out =
        shell(fmt::format("qemu-img create -f qcow2 -o {} {} {} {}", m.options, m.backing ? "-F raw -b base.raw" : "",
                          dir / name, kSize),
              &code);
    EXPECT_EQ(code, 0) << out;
    return dir / name;
  }
  // The same operations for both: text for qemu-io, calls for us.
  struct Op {
    enum Kind { kWrite, kZero, kZeroUnmap, kDiscard, kFlush } kind;
    uint64_t offset, length;
    int value;
  };
  std::vector<Op> operations(uint64_t seed, int n) {
    std::mt19937_64 random(seed);
    std::vector<Op> all;
    for (int i = 0; i < n; ++i) {
      const uint64_t at = random() % (kSize / 512) * 512;
      const uint64_t most[] = {512, 4096, 65536, 65536, 1 << 20};
      const uint64_t length = std::min<uint64_t>(align_up(random() % most[random() % 5] + 1, 512), kSize - at);
      const uint64_t k = random() % 10;
      // qemu-io's discard leaves what is old or zero to the format; whole clusters only are comparable.
      all.push_back({k < 6 ? Op::kWrite : k == 6 ? Op::kZero : k == 7 ? Op::kZeroUnmap : k == 8 ? Op::kDiscard : Op::kFlush,
                     at, length, static_cast<int>(random() % 255 + 1)});
      if (all.back().kind == Op::kDiscard) {
        all.back().offset = align_down(at, 2 * kMiB);
        all.back().length = 2 * kMiB;
        if (all.back().offset + all.back().length > kSize) all.back().offset -= 2 * kMiB;
      }
    }
    return all;
  }
  static std::string to_qemu_io(const std::vector<Op>& ops, bool discards) {
    std::string t;
    for (const Op& o : ops) switch (o.kind) {
        case Op::kWrite: t += fmt::format("write -P {} {} {}\n", o.value, o.offset, o.length); break;
        case Op::kZero: t += fmt::format("write -z {} {}\n", o.offset, o.length); break;
        case Op::kZeroUnmap: t += fmt::format("write -z -u {} {}\n", o.offset, o.length); break;
        case Op::kDiscard:
          if (discards) t += fmt::format("discard {} {}\n", o.offset, o.length);
          break;
        case Op::kFlush: t += "flush\n"; break;
      }
    return t;
  }
  Task<Status> apply(VolumePtr v, std::vector<Op> ops, bool discards) {
    for (const Op& o : ops) {
      Status s{};
      switch (o.kind) {
        case Op::kWrite: s = co_await write_at(v, o.offset, filled(o.length, o.value)); break;
        case Op::kZero: s = co_await v->write_zeroes(IoContext{}, o.offset, o.length, false); break;
        case Op::kZeroUnmap: s = co_await v->write_zeroes(IoContext{}, o.offset, o.length, true); break;
        case Op::kDiscard:
          if (discards) s = co_await v->discard(IoContext{}, o.offset, o.length);
          break;
        case Op::kFlush: s = co_await v->flush(IoContext{}); break;
      }
      if (!s) co_return s;
    }
    co_return Status{};
  }
};

TEST_P(Qcow2Made, SameSeededOperations_AsQemuIo_SameContents_CleanForQemuImg) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img and qemu-io are not installed";
  make_base();
  const std::string ours = create("ours.qcow2"), theirs = create("theirs.qcow2");
  // v2 over a backing file cannot hide it: there a discard may do nothing.
  const bool discards = !std::string(GetParam().options).starts_with("compat=0.10");
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    const auto ops = operations(seed, 60);
    std::ofstream(dir / "ops") << to_qemu_io(ops, discards);
    int code = 0;
    const std::string out = shell("qemu-io -d unmap -f qcow2 " + theirs + " < " + (dir / "ops"), &code);
    ASSERT_EQ(code, 0) << out;
    VolumePtr v = open(ours, false);
    ASSERT_NE(v, nullptr);
    ASSERT_OK(reactor->block_on(apply(v, ops, discards)));
    ASSERT_OK(reactor->block_on(v->close()));
    v.reset();
    opener.shared_.clear();
    expect_clean(ours);
    const std::string compared = shell("qemu-img compare " + ours + " " + theirs, &code);
    EXPECT_EQ(code, 0) << GetParam().name << " seed " << seed << ": " << compared;
    // And what QEMU wrote, we read as it does.
    expect_same_as_qemu(theirs);
    expect_same_as_qemu(ours);
    opener.shared_.clear();
  }
}

TEST_P(Qcow2Made, Snapshots_AreListedAndRead_AndKeptByWrites) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img and qemu-io are not installed";
  if (std::string(GetParam().options).find("refcount_bits=1") != std::string::npos &&
      std::string(GetParam().options).find("refcount_bits=16") == std::string::npos)
    GTEST_SKIP() << "one-bit refcounts cannot share";
  make_base();
  const std::string path = create("snap.qcow2");
  shell("qemu-io -f qcow2 -c 'write -P 33 0 1M' -c 'write -P 34 4M 100k' " + path);
  ASSERT_EQ(shell("qemu-img snapshot -c first " + path), "");
  shell("qemu-io -f qcow2 -c 'write -P 35 512k 1M' " + path);
  {
    VolumePtr v = open(path, false);
    ASSERT_NE(v, nullptr);
    ASSERT_OK(reactor->block_on(apply(v, operations(9, 40), true)));
    ASSERT_OK(reactor->block_on(v->close()));
  }
  opener.shared_.clear();
  expect_clean(path);
  expect_same_as_qemu(path);
  Qcow2Options o;
  o.snapshot = "first";
  expect_same_as_qemu(path, o, "-l first");
  auto info = reactor->block_on(image_info(*file_volume(path, true), ImageFormat::kQcow2));
  ASSERT_OK(info);
  ASSERT_EQ(info->snapshots.size(), 1u);
  EXPECT_EQ(info->snapshots[0].name, "first");
}

TEST_P(Qcow2Made, Compressed_ByQemu_ReadsTheSame_AlsoAfterRewriting) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img and qemu-io are not installed";
  make_base();
  const std::string path = dir / "packed.qcow2";
  int code = 0;
  const std::string out = shell(fmt::format("qemu-img convert -c -f raw -O qcow2 -o {} {} {}", GetParam().options,
                                            dir / "base.raw", path), &code);
  if (code != 0) GTEST_SKIP() << out;
  expect_same_as_qemu(path);
  {
    VolumePtr v = open(path, false);
    ASSERT_NE(v, nullptr);
    auto ops = operations(4, 30);
    std::erase_if(ops, [&](const Op& op) { return op.offset + op.length > v->size(); });
    ASSERT_OK(reactor->block_on(apply(v, ops, true)));
    ASSERT_OK(reactor->block_on(v->close()));
  }
  expect_clean(path);
  expect_same_as_qemu(path);
}

INSTANTIATE_TEST_SUITE_P(All, Qcow2Made, ::testing::ValuesIn(kMade),
                         [](const auto& p) { return std::string(p.param.name); });

TEST_F(Qcow2Conform, OurCreateResizeConvert_AreQemusToo) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img and qemu-io are not installed";
  struct Case { uint32_t version, cluster, bits; bool extended, lazy, compress; Qcow2Compression kind; };
  const Case cases[] = {{3, 65536, 16, false, false, true, Qcow2Compression::kZlib},
                        {2, 4096, 16, false, false, false, Qcow2Compression::kZlib},
                        {3, 512, 64, false, true, true, Qcow2Compression::kZstd},
                        {3, 65536, 1, true, false, false, Qcow2Compression::kZlib},
                        {3, 2097152, 8, true, false, true, Qcow2Compression::kZstd}};
  shell("truncate -s 20M " + (dir / "src.raw"));
  shell("qemu-io -f raw -c 'write -P 5 0 2M' -c 'write -P 6 7M 100k' " + (dir / "src.raw"));
  int n = 0;
  for (const Case& c : cases) {
    const std::string path = dir / fmt::format("new{}.qcow2", n++);
    {
      VolumePtr file = *file_volume(path, false, 512);
      Qcow2CreateOptions o;
      o.virtual_size = 20 * kMiB;
      o.version = c.version;
      o.cluster_size = c.cluster;
      o.refcount_bits = c.bits;
      o.extended_l2 = c.extended;
      o.lazy_refcounts = c.lazy;
      o.compression = c.kind;
      ASSERT_OK(reactor->block_on(create_qcow2(file, o)));
      auto image = reactor->block_on(open_qcow2("new", file, {}));
      ASSERT_OK(image);
      ConvertOptions how;
      how.compress = c.compress && c.bits > 1;
      how.target_is_zero = true;
      ASSERT_OK(reactor->block_on(convert_image(*file_volume(dir / "src.raw", true), *image, how)));
      ASSERT_OK(reactor->block_on((*image)->resize(120 * kMiB)));
      ASSERT_OK(reactor->block_on(write_at(*image, 110 * kMiB, filled(2 * kMiB, 4))));
      ASSERT_OK(reactor->block_on(shrink_qcow2(*image, 100 * kMiB)));
      ASSERT_OK(reactor->block_on((*image)->close()));
      image = reactor->block_on(open_qcow2("new", file, {}));
      ASSERT_OK(image);
      ASSERT_OK(reactor->block_on(write_at(*image, 99 * kMiB, filled(4096, 3))));
      ASSERT_OK(reactor->block_on((*image)->close()));
    }
    expect_clean(path);
    expect_same_as_qemu(path);
    shell("qemu-io -f raw -c 'write -P 3 99M 4k' " + (dir / "src.raw"));
  }
}

TEST_F(Qcow2Conform, ExternalDataFile_SameAsQemu) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img and qemu-io are not installed";
  for (const char* raw : {"off", "on"}) {
    const std::string path = dir / (std::string("ext-") + raw + ".qcow2"), data = dir / (std::string("data-") + raw);
    int code = 0;
    const std::string out = shell(fmt::format("cd {} && qemu-img create -f qcow2 -o data_file={},data_file_raw={} {} 8M",
                                              dir.path(), data, raw, path), &code);
    ASSERT_EQ(code, 0) << out;
    shell("qemu-io -f qcow2 -c 'write -P 33 0 1M' -c 'write -P 34 4M 100k' " + path);
    {
      VolumePtr v = open(path, false);
      ASSERT_NE(v, nullptr);
      ASSERT_OK(reactor->block_on(write_at(v, 512 * 1024, filled(kMiB, 66))));
      ASSERT_OK(reactor->block_on(write_at(v, 6 * kMiB + 512, filled(512, 67))));
      ASSERT_OK(reactor->block_on(v->write_zeroes(IoContext{}, 4 * kMiB, 512, true)));
      ASSERT_OK(reactor->block_on(v->discard(IoContext{}, 64 * 1024, 128 * 1024)));
      ASSERT_OK(reactor->block_on(v->close()));
    }
    expect_clean(path);
    VolumePtr v = open(path, true);
    ASSERT_OK(reactor->block_on(write_out(v, path + ".ours")));
    shell("qemu-img convert -O raw " + path + " " + path + ".theirs");
    EXPECT_EQ(shell("cmp " + path + ".ours " + path + ".theirs"), "");
    if (std::string(raw) == "on") {
      EXPECT_EQ(shell("cmp -n 8388608 " + path + ".ours " + data), "");
    }
  }
}

TEST_F(Qcow2Conform, BackingChain_LoopsAndOutsideNames_Refused) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img and qemu-io are not installed";
  shell("qemu-img create -f qcow2 " + (dir / "a.qcow2") + " 1M");
  shell("qemu-img create -f qcow2 -F qcow2 -b a.qcow2 " + (dir / "b.qcow2") + " 1M");
  shell("qemu-img rebase -u -F qcow2 -b b.qcow2 " + (dir / "a.qcow2"));
  auto loop = reactor->block_on(opener.open(dir / "b.qcow2", true));
  ASSERT_FALSE(loop.has_value());
  EXPECT_NE(loop.error().message().find("loop"), std::string::npos) << loop.error().message();
  shell("qemu-img rebase -u -F raw -b /etc/passwd " + (dir / "a.qcow2"));
  auto outside = reactor->block_on(opener.open(dir / "a.qcow2", true));
  ASSERT_FALSE(outside.has_value());
  EXPECT_EQ(outside.error().kind(), ErrorKind::kPermission) << outside.error().message();
}

}  // namespace
}  // namespace spillway
