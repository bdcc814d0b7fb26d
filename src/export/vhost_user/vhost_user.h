// A volume offered as a virtio-blk device over a vhost-user socket.
//
// State of an export: listening -> connected (one front-end at a time) -> listening ...; stop() ends it.
// What must outlive the worker (sockets, guest memory, rings' state, in-flight logs) is kept in
// `options.store` under "vhost/<name>/": a worker that calls start_vhost_user() with the same store after its
// predecessor was killed takes over the *connected* socket, resubmits what was in flight and goes on.
//
// Thread-safety: see Export. Source: vhost-user specification (QEMU docs/interop), VIRTIO 1.3 sections 2.7, 2.8, 5.2.
#pragma once

#include <memory>

#include "src/export/export.h"

namespace spillway {

inline constexpr uint32_t kVhostMaxQueues = 16;      // ExportOptions::queues: 1..16
inline constexpr uint32_t kVhostMaxQueueSize = 1024;

// Binds (or adopts) the socket and serves it on options.reactors, which must outlive the export. Needs: name, volume,
// socket, queues, reactors; store and blocking are optional (without a store nothing survives the process; without a
// blocking pool a request whose buffers lie outside guest RAM fails alone).
// kBusy: a live process listens on the socket; kExists: the path is there and is no socket; kInvalid: options.
Result<std::unique_ptr<Export>> start_vhost_user(ExportOptions options);

}  // namespace spillway
