#include "src/image/compress.h"

#include <zlib.h>
#include <zstd.h>

namespace spillway::qcow2 {
namespace {

Status inflate_raw(std::span<const std::byte> in, std::span<std::byte> out) {
  z_stream z{};
  if (inflateInit2(&z, -15) != Z_OK) return fail(ErrorKind::kNoMemory, "zlib: no memory");
  z.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data()));
  z.avail_in = static_cast<uInt>(in.size());
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = static_cast<uInt>(out.size());
  const int r = inflate(&z, Z_FINISH);
  const bool whole = z.avail_out == 0 && (r == Z_STREAM_END || r == Z_BUF_ERROR || r == Z_OK);
  inflateEnd(&z);
  if (!whole) return fail(ErrorKind::kCorrupt, "zlib data is damaged or too short");
  return {};
}

Status unzstd(std::span<const std::byte> in, std::span<std::byte> out) {
  ZSTD_DCtx* ctx = ZSTD_createDCtx();
  if (ctx == nullptr) return fail(ErrorKind::kNoMemory, "zstd: no memory");
  // A frame that asks for a larger window than a cluster can need is refused by the library.
  ZSTD_DCtx_setParameter(ctx, ZSTD_d_windowLogMax, 23);
  ZSTD_inBuffer i{in.data(), in.size(), 0};
  ZSTD_outBuffer o{out.data(), out.size(), 0};
  size_t r = 1;
  while (o.pos < o.size) {
    const size_t before_in = i.pos, before_out = o.pos;
    r = ZSTD_decompressStream(ctx, &o, &i);
    if (ZSTD_isError(r) || (i.pos == before_in && o.pos == before_out)) break;
  }
  ZSTD_freeDCtx(ctx);
  if (ZSTD_isError(r) || o.pos < o.size) return fail(ErrorKind::kCorrupt, "zstd data is damaged or too short");
  return {};
}

}  // namespace

Status decompress(Qcow2Compression type, std::span<const std::byte> in, std::span<std::byte> out) {
  return type == Qcow2Compression::kZstd ? unzstd(in, out) : inflate_raw(in, out);
}

Result<std::vector<std::byte>> compress(Qcow2Compression type, std::span<const std::byte> in) {
  std::vector<std::byte> out(in.size());
  if (type == Qcow2Compression::kZstd) {
    const size_t n = ZSTD_compress(out.data(), out.size(), in.data(), in.size(), 3);
    out.resize(ZSTD_isError(n) || n >= in.size() ? 0 : n);
    return out;
  }
  z_stream z{};
  // Window of 4 KiB: readers need no more (format).
  if (deflateInit2(&z, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) != Z_OK)
    return fail(ErrorKind::kNoMemory, "zlib: no memory");
  z.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data()));
  z.avail_in = static_cast<uInt>(in.size());
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = static_cast<uInt>(out.size());
  const int r = deflate(&z, Z_FINISH);
  const size_t n = out.size() - z.avail_out;
  deflateEnd(&z);
  out.resize(r != Z_STREAM_END || n >= in.size() ? 0 : n);
  return out;
}

}  // namespace spillway::qcow2
