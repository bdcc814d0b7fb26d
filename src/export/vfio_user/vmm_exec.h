// `spillway vmm-exec -- VMM ARGS`: runs a VMM under a seccomp filter that refuses madvise(MADV_HUGEPAGE).
//
// QEMU asks for huge pages on every memory range it maps, also on a BAR; on a FUSE file that turns each cold fault
// into a read-ahead of 4 MiB (research/pmem.md). Refused, as on a kernel without huge pages, a fault reads 4 KiB or
// what the volume's read_ahead_kb says. The filter is inherited and cannot be taken off; nothing else is filtered.
#pragma once

#include "src/base/result.h"

namespace spillway {

// Installs the filter in this process (and its children).
Status refuse_huge_pages();
// Installs the filter and executes argv[0] (looked up in PATH); returns only on failure, with an exit status:
// 126 it could not be run, 127 not found, 2 no command given.
int vmm_exec(char* const argv[]);

}  // namespace spillway
