#include "app/spillway/image.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <memory>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "app/spillway/exit_code.h"
#include "src/image/qcow2.h"
#include "src/io/reactor.h"
#include "src/volume/file/file.h"

namespace spillway {
namespace {

struct Args {
  std::string file, target, format, output_format = "raw", size, backing, backing_format, cluster_size, data_file;
  std::string compression = "zlib", repair, compat = "1.1", snapshot;
  uint32_t refcount_bits = 16;
  bool json = false, extended_l2 = false, lazy = false, compress = false, data_file_raw = false, shrink = false;
};

// The image is opened as itself, or as the backing or data file of another one.
struct Opening {
  std::string path, format;
  bool read_only = true;
  std::string snapshot;
  std::vector<std::string> chain;  // canonical paths of the images above
};

Result<VolumePtr> open_path(const std::string& path, bool read_only, uint64_t create_size = 0) {
  FileOptions o;
  o.path = path;
  o.read_only = read_only;
  o.create_size = create_size;
  return open_file(path, std::move(o));
}

// What a file occupies on its disk.
uint64_t allocated_bytes(const std::string& path) {
  struct stat st {};
  return ::stat(path.c_str(), &st) == 0 ? static_cast<uint64_t>(st.st_blocks) * 512 : 0;
}

Task<Result<VolumePtr>> open_image(Opening o);

Task<Result<VolumePtr>> resolve(std::string from, std::vector<std::string> chain, ImageReference ref) {
  // Tools run with the caller's own rights on images he names: backing files may be wherever he may read, as with
  // qemu-img. The daemon keeps to the image folder.
  auto path = resolve_image_path(from, ref.name, {"/"});
  if (!path) co_return fail(path.error());
  SPILLWAY_CO_CHECK(check_chain(chain, *path));
  Opening o{*path, ref.format, !ref.writable, {}, chain};
  auto opened = co_await open_image(std::move(o));
  co_return opened;
}

Task<Result<VolumePtr>> open_image(Opening o) {
  SPILLWAY_CO_TRY(VolumePtr file, open_path(o.path, o.read_only));
  ImageFormat kind = ImageFormat::kRaw;
  if (!o.format.empty()) {
    SPILLWAY_CO_TRY(kind, parse_image_format(o.format));
  } else {
    SPILLWAY_CO_TRY(kind, co_await probe_format(file));
  }
  if (kind == ImageFormat::kRaw && !o.snapshot.empty())
    co_return fail(ErrorKind::kInvalid, fmt::format("{}: a raw image has no snapshots", o.path));
  if (kind == ImageFormat::kRaw) co_return file;
  std::error_code ec;
  const std::string canonical = std::filesystem::canonical(o.path, ec).string();
  const bool guessed = o.format.empty() && !o.chain.empty();
  std::vector<std::string> chain = o.chain;
  chain.push_back(canonical);
  Qcow2Options q;
  q.read_only = o.read_only;
  q.snapshot = o.snapshot;
  if (guessed) q.resolver = refuse_names_in_guessed();
  else q.resolver = [canonical, chain](ImageReference ref) { return resolve(canonical, chain, std::move(ref)); };
  auto image = co_await open_qcow2(o.path, file, std::move(q));
  co_return image;
}

// A name as it will stand in the header of `image`.
std::string beside(const std::string& image, const std::string& name) {
  return name[0] == '/' ? name : std::filesystem::absolute(image).parent_path().string() + "/" + name;
}

Task<Status> create(Args a) {
  if (a.format.empty()) a.format = "qcow2";
  SPILLWAY_CO_TRY(const ImageFormat kind, parse_image_format(a.format));
  if (::access(a.file.c_str(), F_OK) == 0)
    co_return fail(ErrorKind::kExists, fmt::format("{}: exists already", a.file));
  if (!a.backing.empty() && a.backing_format.empty())
    co_return fail(ErrorKind::kInvalid, "image create: --backing needs --backing-format (raw or qcow2)");
  uint64_t size = 0;
  if (!a.backing.empty()) {
    // Opened in any case: a name that leads nowhere, or back to this image, is noticed now.
    Opening o{beside(a.file, a.backing), a.backing_format, true, {}, {}};
    auto below = co_await open_image(std::move(o));
    if (!below) co_return fail(std::move(below).error().with_context("image create: backing file"));
    size = (*below)->size();
    SPILLWAY_CO_CHECK(co_await (*below)->close());
  }
  if (!a.size.empty()) {
    SPILLWAY_CO_TRY(size, parse_size(a.size));
  }
  if (size == 0) co_return fail(ErrorKind::kInvalid, "image create: a size above zero is missing");
  Qcow2CreateOptions q;
  q.virtual_size = size;
  if (!a.cluster_size.empty()) {
    SPILLWAY_CO_TRY(const uint64_t cluster, parse_size(a.cluster_size));
    q.cluster_size = static_cast<uint32_t>(std::min<uint64_t>(cluster, UINT32_MAX));
  }
  q.extended_l2 = a.extended_l2;
  q.lazy_refcounts = a.lazy;
  if (a.compression == "zstd") q.compression = Qcow2Compression::kZstd;
  q.backing_file = a.backing;
  q.backing_format = a.backing_format;
  if (!a.data_file.empty()) {
    const std::string path = beside(a.file, a.data_file);
    if (::access(path.c_str(), F_OK) != 0) {
      SPILLWAY_CO_TRY(VolumePtr data, open_path(path, false, align_up(size, 512)));
      SPILLWAY_CO_CHECK(co_await data->close());
    }
  }
  q.data_file = a.data_file;
  q.data_file_raw = a.data_file_raw;
  q.version = a.compat == "0.10" || a.compat == "v2" ? 2 : 3;
  q.refcount_bits = a.refcount_bits;
  SPILLWAY_CO_TRY(VolumePtr file, open_path(a.file, false, kind == ImageFormat::kRaw ? align_up(size, 512) : 512));
  if (kind == ImageFormat::kQcow2) {
    Status s = co_await create_qcow2(file, q);
    if (!s) {
      ::unlink(a.file.c_str());
      co_return s;
    }
  }
  co_return co_await file->close();
}

Task<Status> info(Args a) {
  SPILLWAY_CO_TRY(VolumePtr file, open_path(a.file, true));
  ImageFormat kind = ImageFormat::kRaw;
  if (!a.format.empty()) {
    SPILLWAY_CO_TRY(kind, parse_image_format(a.format));
  } else {
    SPILLWAY_CO_TRY(kind, co_await probe_format(file));
  }
  SPILLWAY_CO_TRY(const ImageInfo i, co_await image_info(file, kind));
  const uint64_t actual = allocated_bytes(a.file);
  std::fputs(a.json ? info_to_json(a.file, actual, i).c_str() : info_to_text(a.file, actual, i).c_str(), stdout);
  if (a.json) std::fputc('\n', stdout);
  co_return Status{};
}

Task<Status> check(Args a) {
  SPILLWAY_CO_TRY(VolumePtr file, open_path(a.file, a.repair.empty()));
  const Qcow2Repair repair = a.repair == "leaks" ? Qcow2Repair::kLeaks
                             : a.repair == "all" ? Qcow2Repair::kAll : Qcow2Repair::kNone;
  SPILLWAY_CO_TRY(const Qcow2CheckReport r, co_await check_qcow2(file, repair));
  std::fputs(check_to_text(r).c_str(), stdout);
  if (r.errors != 0) co_return fail(ErrorKind::kCorrupt, fmt::format("{}: {} errors", a.file, r.errors));
  co_return Status{};
}

Task<Status> map(Args a) {
  Opening o{a.file, a.format, true, a.snapshot, {}};
  SPILLWAY_CO_TRY(VolumePtr image, co_await open_image(std::move(o)));
  SPILLWAY_CO_TRY(const auto entries, co_await map_image(image, [](const Volume& v) { return allocated_bytes(v.name()); }));
  std::fputs(a.json ? map_to_json(entries).c_str() : map_to_text(entries).c_str(), stdout);
  co_return Status{};
}

Task<Status> shrink(const Args& a, VolumePtr image, uint64_t size) {
  if (!a.shrink)
    co_return fail(ErrorKind::kInvalid, fmt::format("{}: {} is smaller than its {} bytes: what lies beyond would be lost; --shrink "
                                                    "says so", a.file, size, image->size()));
  if (image->layer() == "qcow2") {
    SPILLWAY_CO_CHECK(co_await shrink_qcow2(image, size));
  } else if (size % 512 != 0) {
    co_return fail(ErrorKind::kInvalid, fmt::format("{}: size {} is no multiple of 512", a.file, size));
  } else if (::truncate(a.file.c_str(), static_cast<off_t>(size)) != 0) {
    co_return fail_errno(errno, fmt::format("{}: shrink to {}", a.file, size));
  }
  co_return co_await image->close();
}

Task<Status> resize(Args a) {
  Opening o{a.file, a.format, false, {}, {}};
  SPILLWAY_CO_TRY(VolumePtr image, co_await open_image(std::move(o)));
  uint64_t size = 0;
  const bool relative = !a.size.empty() && a.size[0] == '+';
  SPILLWAY_CO_TRY(size, parse_size(relative ? a.size.substr(1) : a.size));
  if (relative && size > UINT64_MAX - image->size())
    co_return fail(ErrorKind::kInvalid, fmt::format("{}: {} is too much to add to {} bytes", a.file, a.size, image->size()));
  if (relative) size += image->size();
  if (size < image->size()) co_return co_await shrink(a, image, size);
  Status s = co_await image->resize(size);
  if (!s) co_return s;
  co_return co_await image->close();
}

Task<Status> convert(Args a) {
  Opening from{a.file, a.format, true, a.snapshot, {}};
  SPILLWAY_CO_TRY(VolumePtr source, co_await open_image(std::move(from)));
  Args target = a;
  target.file = a.target;
  target.format = a.output_format;
  target.size = fmt::format("{}", source->size());
  target.backing.clear();
  Status made = co_await create(target);
  if (!made) co_return made;
  ConvertOptions options;
  options.compress = a.compress;
  options.target_is_zero = true;
  {
    Opening to{a.target, a.output_format, false, {}, {}};
    SPILLWAY_CO_TRY(VolumePtr out, co_await open_image(std::move(to)));
    Status copied = co_await convert_image(source, out, options);
    Status closed = co_await out->close();
    if (copied) copied = std::move(closed);
    if (!copied) {
      ::unlink(a.target.c_str());  // made above; half a copy is worth nothing
      co_return copied;
    }
  }
  co_return co_await source->close();
}

void command(CLI::App& image, const char* name, const char* help, std::shared_ptr<Args> a, int* exit_code,
             Task<Status> (*fn)(Args), const std::function<void(CLI::App&)>& options) {
  CLI::App* sub = image.add_subcommand(name, help);
  sub->add_option("FILE", a->file, "The image")->required();
  options(*sub);
  sub->callback([=] {
    auto reactor = UringReactor::create();
    if (!reactor) {
      *exit_code = report_error(reactor.error());
      return;
    }
    Status s = (*reactor)->block_on(fn(*a));
    *exit_code = s ? kExitOk : report_error(s.error());
  });
}

}  // namespace

void add_image_commands(CLI::App& app, int* exit_code) {
  CLI::App* image = app.add_subcommand("image", "Make, look at, check and convert disk images");
  image->require_subcommand(1);
  auto a = std::make_shared<Args>();
  auto format = [a](CLI::App& s) { s.add_option("-f,--format", a->format, "raw or qcow2; default: looked at"); };
  auto json = [a](CLI::App& s) { s.add_flag("--json", a->json, "qemu-img's JSON"); };
  auto snapshot = [a](CLI::App& s) {
    s.add_option("-l,--snapshot", a->snapshot, "Internal snapshot to read, by id or name; default: the active state");
  };
  auto shape = [a](CLI::App& s) {
    s.add_option("--cluster-size", a->cluster_size, "512 to 2M, default 64K");
    s.add_option("--refcount-bits", a->refcount_bits, "1 to 64, default 16");
    s.add_option("--compat", a->compat, "1.1 (v3) or 0.10 (v2)")->check(CLI::IsMember({"0.10", "1.1", "v2", "v3"}));
    s.add_flag("--extended-l2", a->extended_l2, "Subclusters");
    s.add_flag("--lazy-refcounts", a->lazy);
    s.add_option("--compression", a->compression)->check(CLI::IsMember({"zlib", "zstd"}));
    s.add_option("--data-file", a->data_file, "External data file, as it shall stand in the header; made if missing");
    s.add_flag("--data-file-raw", a->data_file_raw, "The data file reads as the image does");
  };
  command(*image, "create", "Make an empty image", a, exit_code, create, [=](CLI::App& s) {
    format(s);
    s.add_option("SIZE", a->size, "Virtual size; default: the backing file's");
    s.add_option("-b,--backing", a->backing, "Backing file, as it shall stand in the header");
    s.add_option("-F,--backing-format", a->backing_format, "raw or qcow2");
    shape(s);
  });
  command(*image, "info", "Header and snapshots", a, exit_code, info, [=](CLI::App& s) {
    format(s);
    json(s);
  });
  command(*image, "check", "Compare reference counts with the tables", a, exit_code, check, [=](CLI::App& s) {
    format(s);
    s.add_option("--repair", a->repair)->check(CLI::IsMember({"leaks", "all"}));
  });
  command(*image, "map", "Where the contents are", a, exit_code, map, [=](CLI::App& s) {
    format(s);
    json(s);
    snapshot(s);
  });
  command(*image, "resize", "Change the virtual size (+SIZE: grow by that much)", a, exit_code, resize, [=](CLI::App& s) {
    format(s);
    s.add_option("SIZE", a->size)->required();
    s.add_flag("--shrink", a->shrink, "SIZE may be smaller; what lies beyond it is lost");
  });
  command(*image, "convert", "Copy an image into a new one", a, exit_code, convert, [=](CLI::App& s) {
    format(s);
    s.add_option("TARGET", a->target)->required();
    s.add_option("-O,--output-format", a->output_format)->check(CLI::IsMember({"raw", "qcow2"}));
    s.add_flag("-c,--compress", a->compress);
    snapshot(s);
    shape(s);
  });
}

}  // namespace spillway
