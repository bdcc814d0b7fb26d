// A client may shorten the file behind memory it gave us; touching that memory then raises SIGBUS, which would take
// every tenant down. So guarded ranges get private zero pages instead, and the owner learns of it and ends that client.
//
// Lock-free table of ranges: the handler runs in the middle of any instruction. A slot's `length` is published last
// (release) and read first (acquire) by the handler.
#pragma once

#include <cstddef>

namespace spillway::vhost {

// Returns a slot, or -1 when the table (1024 ranges) is full: then the range is unguarded and must be refused.
// The first call installs the handler; a SIGBUS elsewhere goes on to the handler that was there before.
int guard_range(void* base, size_t length);
void unguard_range(int slot);
// A page of the range had to be replaced.
bool range_torn(int slot);

}  // namespace spillway::vhost
