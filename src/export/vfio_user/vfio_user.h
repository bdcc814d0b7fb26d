// Facade: a pmem file as a PCI device for a VMM that speaks vfio-user (QEMU >= 10.1: vfio-user-pci).
//
// State of an export: listening -> connected (one client at a time) -> listening ...; stop() ends it. With a store, the
// listening and the connected socket, the device's state, the guest memory and the interrupts outlive the process: a
// successor that calls start_vfio_user_pmem with the same store and name goes on in the middle of a message.
#pragma once

#include <chrono>
#include <memory>

#include "src/export/export.h"
#include "src/export/pmem_backing.h"

namespace spillway {

struct VfioUserOptions {
  bool msix = true;  // false: INTx only, which QEMU 11.1 can hot-unplug
  std::chrono::nanoseconds stall_limit = std::chrono::seconds(5);
};

// Needs of ExportOptions: name, socket, reactors; store is optional. kBusy: somebody listens on the socket.
Result<std::unique_ptr<Export>> start_vfio_user_pmem(ExportOptions options, std::shared_ptr<PmemBacking> backing,
                                                     VfioUserOptions vfio = {});

}  // namespace spillway
