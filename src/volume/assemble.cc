#include "src/volume/assemble.h"

#include <fmt/core.h>

#include <utility>

#include "src/volume/linear/linear.h"
#include "src/volume/slice/slice.h"
#include "src/volume/stripe/stripe.h"

namespace spillway {
namespace {

constexpr uint64_t kDefaultChunk = 64 * kKiB;

Result<VolumePtr> assemble_plain(LayerSpec& spec) {
  for (size_t i = 0; i < spec.members.size(); ++i)
    if (!spec.members[i])
      return fail(ErrorKind::kNotFound,
                  fmt::format("volume {}: member {} is missing and a {} has no redundancy", spec.name,
                              i < spec.member_names.size() ? spec.member_names[i] : std::to_string(i), spec.layer));
  if (spec.layer == "linear") return make_linear(spec.name, std::move(spec.members));
  return make_stripe(spec.name, std::move(spec.members), spec.chunk != 0 ? spec.chunk : kDefaultChunk);
}

}  // namespace

Task<Result<VolumePtr>> assemble(LayerSpec spec) {
  if (spec.layer == "slice") {
    if (spec.members.size() != 1 || !spec.members[0])
      co_return fail(ErrorKind::kInvalid, fmt::format("volume {}: a slice has exactly one member", spec.name));
    co_return make_slice(spec.name, spec.members[0], spec.offset, spec.length);
  }
  if (spec.layer == "linear" || spec.layer == "stripe") co_return assemble_plain(spec);
  co_return fail(ErrorKind::kUnsupported, fmt::format("volume {}: layer \"{}\"", spec.name, spec.layer));
}

}  // namespace spillway
