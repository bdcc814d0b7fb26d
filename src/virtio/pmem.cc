#include "src/virtio/pmem.h"

#include <cstring>

namespace spillway::virtio {

PmemRequest parse_pmem(const Chain& chain) {
  PmemRequest request;
  const Iov out = chain.out();
  if (chain.outside || out.empty() || out.front().iov_len < sizeof(uint32_t)) return request;
  request.answer = static_cast<std::byte*>(out.front().iov_base);
  uint32_t type = 0;
  if (copy_from_iov(&type, chain.in(), 0, sizeof type) != sizeof type) return request;
  asm volatile("" : "+r"(type));
  request.flush = type == 0;  // VIRTIO_PMEM_REQ_TYPE_FLUSH
  return request;
}

uint32_t answer_pmem(const PmemRequest& request, bool ok) {
  if (request.answer == nullptr) return 0;
  const uint32_t ret = ok ? 0 : UINT32_MAX;  // VIRTIO_PMEM_RESP_TYPE_OK / _EIO
  std::memcpy(request.answer, &ret, sizeof ret);
  return sizeof ret;
}

}  // namespace spillway::virtio
