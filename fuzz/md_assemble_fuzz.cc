// Whole assembly of an array whose metadata was changed: patches {member, place, value} on good members, checksums of
// the superblocks made right; opened read-only and read.
#include <cstring>

#include "src/base/log.h"
#include "src/io/sim_reactor.h"
#include "src/volume/assemble.h"
#include "src/volume/md/superblock.h"

using namespace spillway;

namespace {

constexpr uint64_t kMember = kMiB + 256 * kKiB;

class Bytes final : public Volume {
 public:
  Bytes(std::string name) : Volume(std::move(name), kMember, Geometry{}), bytes(kMember) {}
  std::string_view layer() const override { return "bytes"; }
  std::vector<std::byte> bytes;

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    copy_to_iov(iov, 0, bytes.data() + offset, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_write(IoContext, uint64_t offset, Iov iov) override {
    copy_from_iov(bytes.data() + offset, iov, 0, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }
};

struct Template {
  Template() {
    set_log_level(LogLevel::kError);
    LayerSpec s;
    s.name = "fuzz";
    for (int k = 0; k < 4; ++k) {
      s.layer = k == 0 ? "stripe" : k == 1 ? "mirror" : "raid5";
      s.consistency = k == 2 ? "bitmap" : k == 3 ? "ppl" : "";
      s.chunk = 16 * kKiB;
      s.members.clear();
      std::vector<std::shared_ptr<Bytes>> disks;
      for (int i = 0; i < 3; ++i) disks.push_back(std::make_shared<Bytes>("d" + std::to_string(i)));
      for (auto& d : disks) s.members.push_back(d);
      SPILLWAY_ASSERT(sim.block_on(create_array(s, CreateOptions{.assume_clean = true})).has_value());
      for (auto& d : disks) good[k].push_back(std::vector<std::byte>(d->bytes.begin(), d->bytes.begin() + 64 * kKiB));
    }
    for (int i = 0; i < 3; ++i) disks.push_back(std::make_shared<Bytes>("d" + std::to_string(i)));
  }
  SimReactor sim;
  std::vector<std::vector<std::byte>> good[4];
  std::vector<std::shared_ptr<Bytes>> disks;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Template t;
  if (size < 1) return 0;
  const auto& good = t.good[data[0] % 4];
  const uint32_t missing = data[0] / 4 % 4;  // 3: none
  for (size_t i = 0; i < 3; ++i) std::copy(good[i].begin(), good[i].end(), t.disks[i]->bytes.begin());
  for (size_t p = 1; p + 4 <= size && p < 400; p += 4) {
    // Places within superblock, bitmap or log header.
    const uint32_t where = data[p + 1] | (data[p + 2] & 7u) << 8;
    const uint64_t at = (data[p + 2] & 0x80) != 0 ? 8192 + where : 4096 + where % 320;
    for (size_t i = 0; i < 3; ++i)
      if (data[p] % 4 == 3 || data[p] % 4 == i) t.disks[i]->bytes[at] = std::byte{data[p + 3]};
  }
  LayerSpec s;
  s.name = "fuzz";
  s.layer = "md";
  s.read_only = true;
  for (size_t i = 0; i < 3; ++i) {
    md::RawSuperblock raw;
    std::memcpy(&raw, t.disks[i]->bytes.data() + 4096, sizeof raw);
    if (raw.max_dev > 0 && raw.max_dev <= 1920) {
      std::vector<uint16_t> roles(raw.max_dev);
      std::memcpy(roles.data(), t.disks[i]->bytes.data() + 4096 + sizeof raw, 2 * roles.size());
      raw.checksum = md::superblock_checksum(raw, roles);
      std::memcpy(t.disks[i]->bytes.data() + 4096, &raw, sizeof raw);
    }
    s.members.push_back(i == missing ? nullptr : VolumePtr(t.disks[i]));
  }
  auto v = t.sim.block_on(assemble(s));
  if (!v) {
    SPILLWAY_ASSERT(v.error().message().find('\n') == std::string::npos);
    return 0;
  }
  std::vector<std::byte> buffer(64 * kKiB);
  for (uint64_t at = 0; at < (*v)->size(); at += buffer.size()) {
    const iovec iov{buffer.data(), std::min<size_t>(buffer.size(), (*v)->size() - at)};
    (void)t.sim.block_on((*v)->read({}, at, Iov(&iov, 1)));
  }
  SPILLWAY_ASSERT(t.sim.block_on((*v)->close()).has_value());
  return 0;
}
