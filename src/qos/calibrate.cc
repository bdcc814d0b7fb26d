#include "src/qos/calibrate.h"

#include <algorithm>
#include <functional>
#include <random>

#include <fmt/core.h>

#include "src/io/reactor.h"
#include "src/io/sync.h"

namespace spillway {
namespace {

constexpr uint32_t kSmall = 4096, kLarge = 128 * 1024;
constexpr uint32_t kDepths[] = {1, 2, 4, 8, 16, 24, 32, 48, 64};
constexpr uint32_t kLargeDepths[] = {4, 8, 12, 16, 24, 32};
constexpr double kKnee = 0.97;  // of the greatest throughput
constexpr uint32_t kSamples = 64;  // blocks that writes put back

double median(std::vector<double> v) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  return v.size() % 2 == 1 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

struct Shape {
  IoKind kind = IoKind::kReadRandom;
  uint32_t bytes = kSmall;
  uint32_t depth = 32;
  bool flushing = false;  // one more loop that flushes
};

// One slice's state; outlives its loops.
struct Slice {
  Volume* leaf = nullptr;
  Shape shape;
  uint64_t until = 0, cursor = 0, blocks = 0;
  uint64_t done = 0, flushes = 0;
  std::mt19937_64* random = nullptr;
  std::vector<std::pair<uint64_t, AlignedBuffer>>* samples = nullptr;  // what writes put back
};

Task<Status> loop(Slice* s) {
  Reactor& r = Reactor::current();
  const bool write = s->shape.kind == IoKind::kWriteRandom || s->shape.kind == IoKind::kWriteSequential;
  const bool sequential = s->shape.kind == IoKind::kReadSequential || s->shape.kind == IoKind::kWriteSequential;
  AlignedBuffer buffer(write ? 0 : s->shape.bytes);
  if (!write && !buffer) co_return fail(ErrorKind::kNoMemory, "calibrate: buffer");
  while (r.now_ns() < s->until) {
    Status status;
    if (write) {
      auto& [offset, data] = (*s->samples)[sequential ? s->cursor++ % s->samples->size()
                                                      : (*s->random)() % s->samples->size()];
      const uint32_t within = s->shape.bytes < data.size()
                                  ? static_cast<uint32_t>((*s->random)() % (data.size() / s->shape.bytes)) * s->shape.bytes
                                  : 0;
      iovec iov{data.data() + within, s->shape.bytes};
      status = co_await s->leaf->write(IoContext{}, offset + within, Iov(&iov, 1));
    } else {
      const uint64_t block = (sequential ? s->cursor++ : (*s->random)()) % s->blocks;
      iovec iov{buffer.data(), s->shape.bytes};
      status = co_await s->leaf->read(IoContext{}, block * s->shape.bytes, Iov(&iov, 1));
    }
    if (!status) co_return status;
    if (r.now_ns() < s->until) ++s->done;
  }
  co_return Status{};
}

Task<Status> flusher(Slice* s) {
  Reactor& r = Reactor::current();
  while (r.now_ns() < s->until) {
    Status status = co_await s->leaf->flush(IoContext{});
    if (!status) co_return status;
    ++s->flushes;
  }
  co_return Status{};
}

struct Measured {
  double ops_s = 0, flushes_s = 0;
};

Task<Result<Measured>> measure(Slice* s, uint64_t slice_ns) {
  Reactor& r = Reactor::current();
  s->blocks = s->leaf->size() / s->shape.bytes;
  s->cursor = (*s->random)() % s->blocks;
  s->done = s->flushes = 0;
  const uint64_t begin = r.now_ns();
  s->until = begin + slice_ns;
  std::vector<Task<Status>> all;
  for (uint32_t i = 0; i < s->shape.depth; ++i) all.push_back(loop(s));
  if (s->shape.flushing) all.push_back(flusher(s));
  Status status = co_await all_of(std::move(all));
  if (!status) co_return fail(std::move(status).error());
  const double seconds = static_cast<double>(slice_ns) / 1e9;
  Measured m{static_cast<double>(s->done) / seconds, static_cast<double>(s->flushes) / seconds};
  co_return m;
}

// fixed + per byte from two sizes.
QosModel::Linear line(double small_s, double large_s) {
  const double small = 1e9 / std::max(small_s, 0.1), large = 1e9 / std::max(large_s, 0.1);
  QosModel::Linear l;
  l.byte_ns = std::max(0.0, (large - small) / (kLarge - kSmall));
  l.fixed_ns = std::max(0.0, small - l.byte_ns * kSmall);
  return l;
}

// One step beyond the first depth that is good enough: a little too deep costs latency, too shallow throughput.
uint32_t knee(const std::vector<Calibration::Point>& curve) {
  double most = 0;
  for (auto& p : curve) most = std::max(most, p.iops);
  for (size_t i = 0; i < curve.size(); ++i)
    if (curve[i].iops >= kKnee * most) return curve[std::min(i + 1, curve.size() - 1)].depth;
  return curve.back().depth;
}

Task<Status> take_samples(Slice* s) {
  const uint64_t blocks = s->leaf->size() / kLarge;
  for (uint32_t i = 0; i < kSamples; ++i) {
    AlignedBuffer data(kLarge);
    if (!data) co_return fail(ErrorKind::kNoMemory, "calibrate: buffers");
    // Consecutive in pairs of eight, the rest spread: sequential writes go along them.
    const uint64_t offset = (blocks / kSamples * (i / 8 * 8) + i % 8) * kLarge;
    iovec iov = data.iov();
    Status status = co_await s->leaf->read(IoContext{}, offset, Iov(&iov, 1));
    if (!status) co_return status;
    s->samples->emplace_back(offset, std::move(data));
  }
  co_return Status{};
}

}  // namespace

std::string Calibration::to_text() const {
  std::string text = "# 4 KiB random reads by depth:";
  for (auto& p : curve) text += fmt::format(" {}:{:.0f}/s", p.depth, p.iops);
  text += "\n# 128 KiB random reads by depth:";
  for (auto& p : large_curve) text += fmt::format(" {}:{:.0f}/s", p.depth, p.iops);
  return text + "\n" + model.to_text();
}

Task<Result<Calibration>> calibrate(VolumePtr leaf, CalibrateOptions options) {
  if (leaf->size() < 16 * kMiB)
    co_return fail(ErrorKind::kInvalid, fmt::format("calibrate {}: smaller than 16 MiB", leaf->name()));
  std::mt19937_64 random(options.seed);
  std::vector<std::pair<uint64_t, AlignedBuffer>> samples;
  Slice slice;
  slice.leaf = leaf.get();
  slice.random = &random;
  slice.samples = &samples;
  const bool writes = options.writes && !leaf->geometry().read_only;
  if (writes) {
    Status taken = co_await take_samples(&slice);
    if (!taken) co_return fail(std::move(taken).error());
  }
  std::vector<Shape> shapes;
  for (uint32_t d : kDepths) shapes.push_back({IoKind::kReadRandom, kSmall, d, false});
  const size_t first_large = shapes.size();
  for (uint32_t d : kLargeDepths) shapes.push_back({IoKind::kReadRandom, kLarge, d, false});
  const size_t first_cost = shapes.size();
  const size_t kinds = writes ? kTransferKinds : 2;
  for (size_t k = 0; k < kinds; ++k)
    for (uint32_t bytes : {kSmall, kLarge})
      shapes.push_back({static_cast<IoKind>(k), bytes, options.full_depth, false});
  if (writes) shapes.push_back({IoKind::kWriteRandom, kSmall, options.full_depth, true});
  const uint32_t rounds = std::max(1u, options.rounds);
  const auto slice_ns =
      static_cast<uint64_t>(options.seconds * 1e9 / static_cast<double>(rounds) / static_cast<double>(shapes.size()));
  std::vector<std::vector<double>> ops(shapes.size()), flushes(shapes.size());
  for (uint32_t round = 0; round < rounds; ++round)
    for (size_t i = 0; i < shapes.size(); ++i) {
      const size_t at = round % 2 == 0 ? i : shapes.size() - 1 - i;
      slice.shape = shapes[at];
      Result<Measured> m = co_await measure(&slice, slice_ns);
      if (!m) co_return fail(std::move(m).error().with_context(fmt::format("calibrate {}", leaf->name())));
      ops[at].push_back(m->ops_s);
      flushes[at].push_back(m->flushes_s);
    }
  Calibration c;
  c.model.calibrated = true;
  for (size_t i = 0; i < first_large; ++i) c.curve.push_back({shapes[i].depth, median(ops[i])});
  for (size_t i = first_large; i < first_cost; ++i) c.large_curve.push_back({shapes[i].depth, median(ops[i])});
  c.model.depth = knee(c.curve);
  for (size_t k = 0; k < kinds; ++k)
    c.model.io[k] = line(median(ops[first_cost + 2 * k]), median(ops[first_cost + 2 * k + 1]));
  // So that large requests at their knee take the whole depth: depth / large knee = 1 + part * (ratio of costs - 1).
  const double ratio = c.model.io[0].cost(kLarge) / c.model.io[0].cost(kSmall);
  const double units = static_cast<double>(c.model.depth) / knee(c.large_curve);
  c.model.unit_part = ratio > 1.1 ? std::clamp((units - 1) / (ratio - 1), 0.0, 1.0) : 1.0;
  if (writes) {
    // What the flushes left of the time, writes at their own cost; a flush is never cheaper than a write.
    const double write_ns = c.model.io[static_cast<size_t>(IoKind::kWriteRandom)].cost(kSmall);
    const double per_s = std::max(median(flushes.back()), 0.1);
    c.model.flush_ns = std::max(write_ns, (1e9 - median(ops.back()) * write_ns) / per_s);
    c.model.other_ns = write_ns;
  } else {
    c.model.io[2] = c.model.io[0];
    c.model.io[3] = c.model.io[1];
    c.model.other_ns = c.model.io[0].cost(kSmall);
  }
  co_return c;
}

}  // namespace spillway
