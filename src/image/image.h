// Images: what every image format offers to the composition root and to `spillway image ...`.
//
// An image is a Volume over other Volumes: its file (usually a *cached* leaf: the cache sits below the image), its
// backing volume (another image, or raw) and, for qcow2, an external data file. Nothing here opens a host path:
// names found inside an image go to the caller's resolver, which decides what they may reach.
//
// Raw needs no layer of its own: a raw image is its file.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "src/volume/volume.h"

namespace spillway {

enum class ImageFormat : uint8_t { kRaw, kQcow2 };
std::string_view to_string(ImageFormat format);
// "raw", "qcow2". Other names are known formats at most: kUnsupported with the name.
Result<ImageFormat> parse_image_format(std::string_view name);

// By magic: qcow2 or raw. A format named by the configuration or by the image above must always win over a guess:
// the guest of a raw image can write a qcow2 header into it.
Task<Result<ImageFormat>> probe_format(VolumePtr file);

// A name found in an image header.
struct ImageReference {
  enum class Role : uint8_t { kBacking, kDataFile };
  Role role = Role::kBacking;
  std::string name;    // as it stands in the header; relative to the folder of the image that names it
  std::string format;  // "" when the header does not say; data files are always "raw"
  bool writable = false;  // data files only: the image is being opened for writing
};
// Opens what an image names. To be shared within a tenant: the same file gives the same VolumePtr, so a base is mapped
// once for all its overlays. Two tenants get two image objects over one cached file volume: blocks are cached once
// (and seen through views), while mapping caches stay each tenant's own (P3).
// A backing volume is only read. A data file is written when the image is.
using ImageResolver = std::function<Task<Result<VolumePtr>>(ImageReference)>;

// The rule for such names: where `name`, found in the image at `image_path`, leads. The result is a canonical absolute
// path (symlinks followed) below one of `folders` (canonicalised here); anything else is refused by name, protocol
// prefixes ("nbd:", "json:", "http://") too. Blocking (realpath): call it before the I/O begins.
// kPermission: outside the folders. kNotFound: no such file. kUnsupported: a protocol.
Result<std::string> resolve_image_path(const std::string& image_path, std::string_view name,
                                       const std::vector<std::string>& folders);

// For an image whose format was guessed because the image above does not say it: names in it are refused. Whoever wrote
// the contents of a raw disk may have put a header there, and would choose what it leads to (the rule is libvirt's).
ImageResolver refuse_names_in_guessed();

// Chains longer than this are refused; so are loops (whoever implements the resolver passes the chain on).
inline constexpr size_t kMaxBackingChain = 64;
// Helper for resolvers: kInvalid with the chain in words when `path` is in it already or it is too long.
Status check_chain(const std::vector<std::string>& chain, const std::string& path);

// One row of `qemu-img map --output=json`.
struct MapEntry {
  uint64_t start = 0;
  uint64_t length = 0;
  uint32_t depth = 0;      // 0 = the image itself, 1 = its backing file, ...
  bool present = false;    // some layer of the chain says what is here
  bool zero = false;
  bool data = false;
  bool has_offset = false;
  bool compressed = false; // shown by newer qemu-img only
  uint64_t offset = 0;     // in the file of that layer
  std::string file;        // its name; for the text only
};
// Bytes that the file under an image occupies on its disk (st_blocks), for map_image.
using AllocatedBytes = std::function<uint64_t(const Volume& file)>;
// Works on any volume: an image tells layers apart, anything else is depth 0. As QEMU, an image whose refcounts count
// more than its file occupies is taken for preallocated, and its data clusters are looked up in the file: what is a hole
// there is `data` and `zero` at once. Without `allocated` that is left out.
Task<Result<std::vector<MapEntry>>> map_image(VolumePtr image, AllocatedBytes allocated = {});
std::string map_to_json(const std::vector<MapEntry>& entries);
// Compressed clusters have no place to show: "compressed".
std::string map_to_text(const std::vector<MapEntry>& entries);

struct ConvertOptions {
  bool compress = false;    // target must be a qcow2 image
  bool target_is_zero = false;  // zeros need not be written (a fresh image or file)
  std::function<void(uint64_t done, uint64_t total)> progress;
};
// Copies what `source` reads as into `target` (same size or larger) and flushes it. Zeros become holes.
Task<Status> convert_image(VolumePtr source, VolumePtr target, ConvertOptions options);
// kInvalid naming the first differing offset; a longer one must be zero beyond the other's end.
Task<Status> compare_images(VolumePtr a, VolumePtr b);

}  // namespace spillway
