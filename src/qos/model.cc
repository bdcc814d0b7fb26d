#include "src/qos/model.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>

#include <fmt/core.h>

namespace spillway {
namespace {

constexpr std::string_view kNames[kIoKinds] = {"read-random", "read-sequential", "write-random", "write-sequential",
                                               "flush", "other"};
constexpr double kSmall = 4096, kLarge = 128 * 1024;

bool number(std::string_view text, double& out) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc{} && end == text.data() + text.size() && std::isfinite(out) && out >= 0;
}

}  // namespace

std::string_view to_string(IoKind kind) { return kNames[static_cast<size_t>(kind)]; }

size_t size_class(uint64_t bytes) {
  if (bytes <= 4096) return 0;
  return std::min<size_t>(kSizeClasses - 1, static_cast<size_t>(std::bit_width((bytes - 1) >> 12)));
}

std::string QosModel::to_text() const {
  std::string text;
  for (size_t k = 0; k < kTransferKinds; ++k)
    text += fmt::format("{}.fixed_ns {:.1f}\n{}.byte_ns {:.6f}\n", kNames[k], io[k].fixed_ns, kNames[k], io[k].byte_ns);
  text += fmt::format("flush_ns {:.1f}\nother_ns {:.1f}\ndepth {}\nunit_part {:.3f}\n", flush_ns, other_ns, depth,
                      unit_part);
  return text;
}

Result<QosModel> QosModel::parse(std::string_view text) {
  QosModel m;
  m.calibrated = true;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.empty() || line.front() == '#') continue;
    const size_t space = line.find(' ');
    double value = 0;
    if (space == std::string_view::npos || !number(line.substr(space + 1), value))
      return fail(ErrorKind::kInvalid, fmt::format("disk model: \"{}\": not \"key number\"", line));
    const std::string_view key = line.substr(0, space);
    bool known = true;
    if (key == "flush_ns") m.flush_ns = value;
    else if (key == "other_ns") m.other_ns = value;
    else if (key == "depth") m.depth = static_cast<uint32_t>(std::clamp(value, 1.0, 65536.0));
    else if (key == "unit_part") m.unit_part = std::min(value, 1.0);
    else {
      known = false;
      for (size_t k = 0; k < kTransferKinds; ++k) {
        if (!key.starts_with(kNames[k])) continue;
        const std::string_view field = key.substr(kNames[k].size());
        if (field == ".fixed_ns") m.io[k].fixed_ns = value, known = true;
        if (field == ".byte_ns") m.io[k].byte_ns = value, known = true;
      }
    }
    if (!known) return fail(ErrorKind::kInvalid, fmt::format("disk model: \"{}\" is not known", key));
  }
  return m;
}

CostTable::CostTable(const QosModel& model) : model_(model) {
  for (size_t k = 0; k < kIoKinds; ++k)
    for (size_t c = 0; c < kSizeClasses; ++c) {
      correction_[k][c].store(1, std::memory_order_relaxed);
      publish(k, c);
    }
}

void CostTable::publish(size_t kind, size_t cls) {
  const double x = correction_[kind][cls].load(std::memory_order_relaxed);
  double fixed = 0, byte = 0;
  if (kind < kTransferKinds) fixed = model_.io[kind].fixed_ns, byte = model_.io[kind].byte_ns;
  else fixed = kind == static_cast<size_t>(IoKind::kFlush) ? model_.flush_ns : model_.other_ns;
  fixed_[kind][cls].store(static_cast<float>(fixed * x), std::memory_order_relaxed);
  byte_[kind][cls].store(static_cast<float>(byte * x), std::memory_order_relaxed);
}

bool CostTable::learn(const double (&predicted)[kIoKinds][kSizeClasses], double elapsed_ns, size_t classes) {
  double all = 0, most = 0;
  size_t kind = 0, cls = 0;
  for (size_t k = 0; k < kIoKinds; ++k)
    for (size_t c = 0; c < kSizeClasses; ++c) {
      all += predicted[k][c];
      if (predicted[k][c] > most) most = predicted[k][c], kind = k, cls = c;
    }
  if (all <= 0 || most < kPure * all || kind >= kTransferKinds || cls >= classes) return false;
  const uint32_t lesson = ++lessons_[kind][cls];
  double by = elapsed_ns / all;
  if (lesson > kRough || (by > 0.5 && by < 2)) {
    // All by elapsed, not the other way round: so that the average is that of throughput, not of its inverse.
    const double error = std::clamp(1 - all / elapsed_ns, -0.75, 0.75);
    by = 1 + std::max(kGainLast, std::min(kGainFirst, 4.0 / lesson)) * error;
  }
  correct(kind, cls, correction_[kind][cls].load(std::memory_order_relaxed) * by);
  follow();
  return true;
}

void CostTable::correct(size_t kind, size_t cls, double x) {
  correction_[kind][cls].store(std::clamp(x, kLeast, kMost), std::memory_order_relaxed);
  publish(kind, cls);
}

// What nothing was learned of yet goes with what was: a guess is off by orders of magnitude more often than its ratios are.
// Without that a tenant whose kind was the first to be learned on a slow disk would pay 64 times what the others do.
void CostTable::follow() {
  if (model_.calibrated) return;  // those ratios were measured
  double sum = 0;
  int n = 0;
  for (size_t k = 0; k < kTransferKinds; ++k)
    for (size_t c = 0; c < kSizeClasses; ++c)
      if (lessons_[k][c] != 0) sum += std::log(correction_[k][c].load(std::memory_order_relaxed)), ++n;
  const double mean = std::exp(sum / n);
  for (size_t k = 0; k < kIoKinds; ++k)
    for (size_t c = 0; c < kSizeClasses; ++c)
      if (lessons_[k][c] == 0 && k != static_cast<size_t>(IoKind::kFlush)) correct(k, c, mean);
}

void CostTable::learn_slow(IoKind kind, double ns) {
  const auto k = static_cast<size_t>(kind);
  const double base = kind == IoKind::kFlush ? model_.flush_ns : model_.other_ns;
  if (base <= 0 || ns <= 0) return;
  const double now = correction(kind, 0);
  const double gain = std::max(kGainSlow, 1.0 / ++lessons_[k][0]);
  for (size_t c = 0; c < kSizeClasses; ++c) {
    lessons_[k][c] = lessons_[k][0];
    correct(k, c, now + gain * (ns / base - now));
  }
}

QosModel CostTable::current() const {
  QosModel m = model_;
  for (size_t k = 0; k < kTransferKinds; ++k) {
    const auto kind = static_cast<IoKind>(k);
    const double small = m.io[k].cost(static_cast<uint64_t>(kSmall)) * correction(kind, size_class(4096));
    const double large = m.io[k].cost(static_cast<uint64_t>(kLarge)) * correction(kind, size_class(128 * 1024));
    m.io[k].byte_ns = std::max(0.0, (large - small) / (kLarge - kSmall));
    m.io[k].fixed_ns = std::max(0.0, small - m.io[k].byte_ns * kSmall);
  }
  m.flush_ns *= correction(IoKind::kFlush, 0);
  m.other_ns *= correction(IoKind::kOther, 0);
  return m;
}

}  // namespace spillway
