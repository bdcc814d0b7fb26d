// Sizes as people type and read them, and the small id types everybody shares.
#pragma once

#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

#include "src/base/result.h"

namespace spillway {

inline constexpr uint64_t kKiB = 1024, kMiB = 1024 * kKiB, kGiB = 1024 * kMiB, kTiB = 1024 * kGiB;
inline constexpr uint32_t kSectorSize = 512;
inline constexpr uint32_t kPageSize = 4096;

// The memory group (= cgroup-like node of the tree of tenants) a request is accounted to. Given out by the
// composition root; 0 is the root group and always exists. Small and dense: usable as an array index.
enum class GroupId : uint32_t { kRoot = 0 };

// A data node: what the cache keys by (one bottom volume under the cache). Small and dense.
enum class NodeId : uint32_t {};

// "64K", "1.5G", "4096", "2MiB": K/M/G/T are powers of 1024. kInvalid names the text.
Result<uint64_t> parse_size(std::string_view text);
// "1.5 GiB"; exact = plain bytes.
std::string format_size(uint64_t bytes, bool exact = false);

constexpr uint64_t align_down(uint64_t v, uint64_t to) { return v / to * to; }
constexpr uint64_t align_up(uint64_t v, uint64_t to) { return (v + to - 1) / to * to; }
constexpr bool is_aligned(uint64_t v, uint64_t to) { return v % to == 0; }

}  // namespace spillway
