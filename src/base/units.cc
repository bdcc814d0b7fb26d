#include "src/base/units.h"

#include <charconv>
#include <cmath>

#include <fmt/core.h>

namespace spillway {

Result<uint64_t> parse_size(std::string_view text) {
  auto bad = [&](const char* why) {
    return fail(ErrorKind::kInvalid, fmt::format("size '{}': {}", text, why));
  };
  std::string_view t = text;
  double number = 0;
  uint64_t whole = 0;
  auto [wend, werr] = std::from_chars(t.data(), t.data() + t.size(), whole);
  auto [fend, ferr] = std::from_chars(t.data(), t.data() + t.size(), number, std::chars_format::fixed);
  if (ferr != std::errc{} || number < 0) return bad("not a number");
  bool integral = werr == std::errc{} && wend == fend;
  t.remove_prefix(static_cast<size_t>(fend - t.data()));
  while (!t.empty() && t.front() == ' ') t.remove_prefix(1);
  uint64_t unit = 1;
  if (!t.empty()) {
    switch (t.front()) {
      case 'k': case 'K': unit = kKiB; break;
      case 'm': case 'M': unit = kMiB; break;
      case 'g': case 'G': unit = kGiB; break;
      case 't': case 'T': unit = kTiB; break;
      case 'B': unit = 1; break;
      default: return bad("unknown unit (K, M, G, T)");
    }
    bool byte_unit = t.front() == 'B';
    t.remove_prefix(1);
    if (!byte_unit && (t == "iB" || t == "B" || t.empty())) t = {};
    if (!t.empty()) return bad("unknown unit (K, M, G, T)");
  }
  if (integral) {
    if (whole > UINT64_MAX / unit) return bad("too large");
    return whole * unit;
  }
  double bytes = number * static_cast<double>(unit);
  if (bytes >= 9.0e18) return bad("too large");
  if (bytes != std::floor(bytes)) return bad("not a whole number of bytes");
  return static_cast<uint64_t>(bytes);
}

std::string format_size(uint64_t bytes, bool exact) {
  if (exact || bytes < kKiB) return exact ? fmt::format("{}", bytes) : fmt::format("{} B", bytes);
  static constexpr const char* kNames[] = {"KiB", "MiB", "GiB", "TiB", "PiB"};
  double v = static_cast<double>(bytes) / 1024;
  int i = 0;
  while (v >= 1024 && i < 4) v /= 1024, ++i;
  return v == std::floor(v) ? fmt::format("{:.0f} {}", v, kNames[i])
                            : fmt::format("{:.1f} {}", v, kNames[i]);
}

}  // namespace spillway
