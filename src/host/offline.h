// Work on a volume without the daemon: what `spillway volume ...` and `spillway image ...` do with --config. Opens the
// same graph as the daemon (src/host/graph.h) without cache and scheduler. Disks are locked, so a running daemon's
// writable volumes are refused, not corrupted. Blocking; each call runs its own reactor.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "src/control/config.h"
#include "src/volume/assemble.h"

namespace spillway {

// Copies [offset, offset + length) to `out_fd`; length absent: to the end. Nothing on the disks changes.
Status offline_cat(const Config& config, const std::string& name, uint64_t offset, std::optional<uint64_t> length,
                   int out_fd);
// Copies in_fd (to its end, or `length` bytes) to the volume at `offset` and flushes. Returns the bytes written.
// A piece that is no whole block is merged with what is there.
Result<uint64_t> offline_write(const Config& config, const std::string& name, uint64_t offset,
                               std::optional<uint64_t> length, int in_fd);
// Reads everything, compares redundancy; images: the consistency of their tables. Changes nothing unless `repair`.
// The text is for people; kCorrupt / kDegraded when something is wrong.
Result<std::string> offline_check(const Config& config, const std::string& name, bool repair);
Result<CreatePlan> offline_create(const Config& config, const std::string& name, CreateOptions options);
Result<ArrayStatus> offline_status(const Config& config, const std::string& name);
Result<MkfsAdvice> offline_advise(const Config& config, const std::string& name, const std::string& device);

}  // namespace spillway
