// RAID 5 arithmetic: where a row's parity and data chunks lie. Pure functions.
// Source: the four layouts of Linux md (drivers/md/raid5.c), checked against ../shared/vectors/md/model.py.
#pragma once

#include <cstdint>
#include <string_view>

namespace spillway::md {

enum class Raid5Layout : uint32_t { kLeftAsymmetric = 0, kRightAsymmetric = 1, kLeftSymmetric = 2, kRightSymmetric = 3 };

constexpr uint32_t parity_disk(Raid5Layout layout, uint32_t disks, uint64_t row) {
  const uint32_t k = static_cast<uint32_t>(row % disks);
  const bool left = layout == Raid5Layout::kLeftAsymmetric || layout == Raid5Layout::kLeftSymmetric;
  return left ? disks - 1 - k : k;
}
// data: 0 .. disks - 2
constexpr uint32_t data_disk(Raid5Layout layout, uint32_t disks, uint64_t row, uint32_t data) {
  const uint32_t p = parity_disk(layout, disks, row);
  const bool symmetric = layout == Raid5Layout::kLeftSymmetric || layout == Raid5Layout::kRightSymmetric;
  return symmetric ? (p + 1 + data) % disks : data + (data >= p);
}
constexpr std::string_view to_string(Raid5Layout l) {
  switch (l) {
    case Raid5Layout::kLeftAsymmetric: return "left-asymmetric";
    case Raid5Layout::kRightAsymmetric: return "right-asymmetric";
    case Raid5Layout::kLeftSymmetric: return "left-symmetric";
    case Raid5Layout::kRightSymmetric: return "right-symmetric";
  }
  return "?";
}
constexpr bool parse_raid5_layout(std::string_view text, Raid5Layout* out) {
  for (uint32_t i = 0; i < 4; ++i)
    if (to_string(static_cast<Raid5Layout>(i)) == text) {
      *out = static_cast<Raid5Layout>(i);
      return true;
    }
  return false;
}

}  // namespace spillway::md
