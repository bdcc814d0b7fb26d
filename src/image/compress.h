// Cluster compression: raw deflate (windows of 4 KiB, as QEMU writes them; any is read) and zstd frames.
// Input is hostile: output never goes beyond what the caller gave, and must fill it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/base/result.h"
#include "src/image/qcow2.h"

namespace spillway::qcow2 {

// kCorrupt unless `in` (which may have rubbish behind the stream) decompresses to at least out.size() bytes.
Status decompress(Qcow2Compression type, std::span<const std::byte> in, std::span<std::byte> out);
// Empty when it does not get smaller than `in`.
Result<std::vector<std::byte>> compress(Qcow2Compression type, std::span<const std::byte> in);

}  // namespace spillway::qcow2
