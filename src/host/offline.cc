#include "src/host/offline.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include <fmt/core.h>

#include "src/host/graph.h"
#include "src/image/qcow2.h"
#include "src/io/reactor.h"

namespace spillway {

namespace {

constexpr uint64_t kPiece = 1 * kMiB;

// Opens the graph, runs `work` on the volume, closes; the first error wins.
template <class T, class Work>
Task<Result<T>> with_volume(const Config& config, std::string name, GraphOptions options, Work work) {
  if (!config.has_volume(name))
    co_return fail(ErrorKind::kNotFound, fmt::format("{}: there is no volume or disk \"{}\"", config.file, name));
  Graph graph(config, std::move(options));
  Result<T> result = fail(ErrorKind::kCanceled);
  auto volume = co_await graph.open(name);
  if (volume) result = co_await work(*volume);
  else result = fail(volume.error());
  volume = VolumePtr{};
  Status closed = co_await graph.close();
  if (result && !closed) result = fail(closed.error());
  co_return result;
}

template <class T>
Result<T> run(Task<Result<T>> task) {
  auto reactor = UringReactor::create();
  if (!reactor) return fail(reactor.error());
  return (*reactor)->block_on(std::move(task));
}

GraphOptions reading() {
  GraphOptions o;
  o.read_only = true;
  o.create_if_blank = false;
  o.background = false;
  return o;
}
GraphOptions writing() {
  GraphOptions o;
  o.background = false;
  return o;
}

Status write_all(int fd, const std::byte* data, size_t size) {
  while (size > 0) {
    const ssize_t n = ::write(fd, data, size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail_errno(errno, "output");
    data += n;
    size -= static_cast<size_t>(n);
  }
  return {};
}

Result<size_t> read_full(int fd, std::byte* data, size_t size) {
  size_t done = 0;
  while (done < size) {
    const ssize_t n = ::read(fd, data + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail_errno(errno, "input");
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return done;
}

Task<Status> read_at(Volume& volume, uint64_t offset, std::byte* data, uint64_t length) {
  iovec v{data, static_cast<size_t>(length)};
  IoContext ctx;
  co_return co_await volume.read(ctx, offset, Iov(&v, 1));
}

Task<Result<uint64_t>> cat(VolumePtr volume, uint64_t offset, std::optional<uint64_t> length, int out) {
  const uint64_t size = volume->size();
  if (offset > size) co_return fail(ErrorKind::kOutOfRange, fmt::format("offset {}: beyond the end at {}", offset, size));
  const uint64_t end = length ? offset + *length : size;
  if (end > size || end < offset)
    co_return fail(ErrorKind::kOutOfRange, fmt::format("offset {} length {}: beyond the end at {}", offset, *length, size));
  const uint32_t block = volume->geometry().block_size;
  AlignedBuffer buffer(kPiece + 4096);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, "buffer");
  for (uint64_t at = offset; at < end;) {
    const uint64_t from = align_down(at, block);
    const uint64_t to = std::min(align_up(std::min(end, at + kPiece), block), size);
    Status s = co_await read_at(*volume, from, buffer.data(), to - from);
    if (!s) co_return fail(s.error());
    const uint64_t stop = std::min(to, end);
    SPILLWAY_CO_CHECK(write_all(out, buffer.data() + (at - from), stop - at));
    at = stop;
  }
  co_return end - offset;
}

Task<Result<uint64_t>> write_from(VolumePtr volume, uint64_t offset, std::optional<uint64_t> length, int in) {
  const uint64_t size = volume->size();
  const uint32_t block = volume->geometry().block_size;
  AlignedBuffer buffer(kPiece + 4096);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, "buffer");
  if (volume->geometry().read_only)
    co_return fail(ErrorKind::kReadOnly, fmt::format("volume {}: is read-only", volume->name()));
  uint64_t at = offset, left = length.value_or(UINT64_MAX);
  IoContext ctx;
  while (left > 0) {
    const uint64_t from = align_down(at, block);
    const uint64_t head = at - from;
    SPILLWAY_CO_TRY(const size_t got, read_full(in, buffer.data() + head, std::min(left, kPiece - head)));
    if (got == 0) break;
    if (at + got > size)
      co_return fail(ErrorKind::kOutOfRange, fmt::format("offset {} length {}: beyond the end at {}", at, got, size));
    const uint64_t to = align_up(at + got, block);
    // The blocks at both ends that are not wholly covered keep what else is in them.
    std::byte edge[4096];
    if (head != 0) {
      Status s = co_await read_at(*volume, from, edge, block);
      if (!s) co_return fail(s.error());
      std::memcpy(buffer.data(), edge, head);
    }
    if (to != at + got) {
      Status s = co_await read_at(*volume, to - block, edge, block);
      if (!s) co_return fail(s.error());
      const uint64_t used = at + got - (to - block);
      std::memcpy(buffer.data() + (at + got - from), edge + used, block - used);
    }
    iovec v{buffer.data(), static_cast<size_t>(to - from)};
    Status s = co_await volume->write(ctx, from, Iov(&v, 1));
    if (!s) co_return fail(s.error());
    at += got;
    left -= got;
  }
  if (length && left > 0)
    co_return fail(ErrorKind::kInvalid, fmt::format("input ended after {} of {} bytes", at - offset, *length));
  Status flushed = co_await volume->flush(ctx);
  if (!flushed) co_return fail(flushed.error());
  co_return at - offset;
}

Task<Result<std::string>> check_volume(VolumePtr volume, bool repair) {
  std::string text;
  if (ArrayControl* array = array_control(*volume)) {
    if (array->status().consistency != "none") {
      Status s = co_await array->start_scrub(repair ? ArrayControl::Scrub::kRepair : ArrayControl::Scrub::kCheck);
      if (!s) co_return fail(s.error());
      co_await array->wait_idle();
    }
    const ArrayStatus st = array->status();
    text = format_status(st);
    if (st.mismatch_blocks != 0 && !repair)
      co_return fail(ErrorKind::kCorrupt, fmt::format("{}\nvolume {}: {} sectors differ from their redundancy", text,
                                                      volume->name(), st.mismatch_blocks));
    if (st.state == "degraded") co_return fail(ErrorKind::kDegraded, text);
  }
  AlignedBuffer buffer(kPiece);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, "buffer");
  for (uint64_t at = 0; at < volume->size(); at += kPiece) {
    Status s = co_await read_at(*volume, at, buffer.data(), std::min(kPiece, volume->size() - at));
    if (!s) co_return fail(std::move(s.error()).with_context(fmt::format("offset {}", at)));
  }
  text += fmt::format("volume {}: {} read without an error\n", volume->name(), format_size(volume->size()));
  co_return text;
}

Task<Result<std::string>> check_image(VolumePtr file, bool repair) {
  auto report = co_await check_qcow2(file, repair ? Qcow2Repair::kAll : Qcow2Repair::kNone);
  if (!report) co_return fail(report.error());
  std::string text = check_to_text(*report);
  if (report->errors != 0) co_return fail(ErrorKind::kCorrupt, text);
  co_return text;
}

// The members of a layer, opened, and its description: as Graph does it, for create.
Task<Result<CreatePlan>> create(const Config& config, std::string name, CreateOptions options) {
  auto it = config.volumes.find(name);
  if (it == config.volumes.end())
    co_return fail(ErrorKind::kNotFound, fmt::format("{}: there is no volume \"{}\"", config.file, name));
  const VolumeConfig& v = it->second;
  if (v.layer == "slice" || v.layer == "qcow2" || v.layer == "md")
    co_return fail(v.where.error("layer", fmt::format("a {} has no superblock to create", v.layer)));
  GraphOptions graph_options = writing();
  graph_options.read_only = options.dry_run;
  Graph graph(config, std::move(graph_options));
  LayerSpec spec;
  spec.name = name;
  spec.layer = v.layer;
  for (auto& m : v.members) {
    spec.member_names.push_back(m);
    if (m == "missing") {
      spec.members.push_back(nullptr);
      continue;
    }
    SPILLWAY_CO_TRY(VolumePtr member, co_await graph.open(m));
    spec.members.push_back(std::move(member));
  }
  for (auto& m : v.spares) {
    SPILLWAY_CO_TRY(VolumePtr member, co_await graph.open(m));
    spec.spares.push_back(std::move(member));
  }
  spec.chunk = v.chunk;
  spec.raid5_layout = v.layout;
  spec.consistency = v.consistency;
  spec.metadata = "md";
  auto plan = co_await create_array(spec, options);
  spec = LayerSpec{};
  Status closed = co_await graph.close();
  if (plan && !closed) co_return fail(closed.error());
  if (!plan) co_return fail(v.where.error("members", plan.error().message(), plan.error().kind()));
  co_return std::move(*plan);
}

}  // namespace

Status offline_cat(const Config& config, const std::string& name, uint64_t offset, std::optional<uint64_t> length,
                   int out_fd) {
  auto r = run(with_volume<uint64_t>(config, name, reading(), [=](VolumePtr v) { return cat(v, offset, length, out_fd); }));
  if (!r) return fail(r.error());
  return {};
}

Result<uint64_t> offline_write(const Config& config, const std::string& name, uint64_t offset,
                               std::optional<uint64_t> length, int in_fd) {
  return run(with_volume<uint64_t>(config, name, writing(),
                                   [=](VolumePtr v) { return write_from(v, offset, length, in_fd); }));
}

Result<std::string> offline_check(const Config& config, const std::string& name, bool repair) {
  auto it = config.volumes.find(name);
  if (it != config.volumes.end() && it->second.layer == "qcow2")
    return run(with_volume<std::string>(config, it->second.members[0], repair ? writing() : reading(),
                                        [=](VolumePtr v) { return check_image(v, repair); }));
  return run(with_volume<std::string>(config, name, repair ? writing() : reading(),
                                      [=](VolumePtr v) { return check_volume(v, repair); }));
}

Result<CreatePlan> offline_create(const Config& config, const std::string& name, CreateOptions options) {
  return run(create(config, name, options));
}

static Task<Result<ArrayStatus>> status_of(VolumePtr v) { co_return array_status(*v); }
Result<ArrayStatus> offline_status(const Config& config, const std::string& name) {
  return run(with_volume<ArrayStatus>(config, name, reading(), status_of));
}

static Task<Result<MkfsAdvice>> advice_of(VolumePtr v, std::string device) { co_return advise_mkfs(*v, device); }
Result<MkfsAdvice> offline_advise(const Config& config, const std::string& name, const std::string& device) {
  return run(with_volume<MkfsAdvice>(config, name, reading(), [=](VolumePtr v) { return advice_of(v, device); }));
}

}  // namespace spillway
