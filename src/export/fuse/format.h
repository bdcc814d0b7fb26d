// Words of the kernel's FUSE protocol that Debian 12's <linux/fuse.h> (7.38) does not have yet.
// Source: Linux include/uapi/linux/fuse.h, 7.41.
#pragma once

#include <linux/fuse.h>

namespace spillway::fuse {

// INIT: the kernel understands FUSE_NOTIFY_RESEND (6.9 and later).
inline constexpr uint64_t kHasResend = 1ULL << 39;
// Ask the kernel to queue again every request that was read from the device and never answered.
inline constexpr int kNotifyResend = 7;
// Set in `unique` of a request that was sent before; the answer carries it back unchanged.
inline constexpr uint64_t kUniqueResend = 1ULL << 63;

// The first protocol minor whose INIT reply has the layout of fuse_init_out.
inline constexpr uint32_t kMinorMin = 31;
inline constexpr uint32_t kMaxWrite = 1024 * 1024;
inline constexpr uint64_t kRootNode = FUSE_ROOT_ID;

}  // namespace spillway::fuse
