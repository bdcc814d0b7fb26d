// What a request costs a disk: nanoseconds of device time, that is, the inverse of the throughput the disk reaches
// with nothing but such requests at full depth. fixed + per byte, for reads and writes, random and sequential, and a
// correction per size class that is learned while the disk is busy with (almost) nothing else.
//
// Only ratios matter for shares: a disk that gets slower all round changes nothing. So mixed load teaches nothing
// (it has one equation for many unknowns) and is used for reports only.
//
// QosModel is a value. CostTable: one writer (the arbiter), read by all reactors while it changes; each entry is an
// atomic of its own, a reader may see some entries older than others.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

#include "src/base/result.h"

namespace spillway {

enum class IoKind : uint8_t { kReadRandom, kReadSequential, kWriteRandom, kWriteSequential, kFlush, kOther };
inline constexpr size_t kIoKinds = 6;
inline constexpr size_t kTransferKinds = 4;
std::string_view to_string(IoKind kind);

// 4 KiB and less, 8, 16, ... 1 MiB, more.
inline constexpr size_t kSizeClasses = 10;
size_t size_class(uint64_t bytes);

struct QosModel {
  struct Linear {
    double fixed_ns = 0;
    double byte_ns = 0;
    double cost(uint64_t bytes) const { return fixed_ns + byte_ns * static_cast<double>(bytes); }
  };
  // Of a disk nobody calibrated: the figures of a middling SATA SSD. Corrected online.
  Linear io[kTransferKinds] = {{10'000, 1.9}, {3'000, 1.9}, {12'000, 2.1}, {4'000, 2.1}};
  double flush_ns = 500'000;
  double other_ns = 20'000;  // discard, write_zeroes
  uint32_t depth = 32;       // the knee: in-flight requests beyond which throughput does not grow

  // Of the depth a request takes 1 + unit_part * (its cost / a small one's - 1) small ones. Cost alone (1) would be right if
  // latency grew as cost does; the way to the device is the same for all, so large requests need more in flight than that.
  double unit_part = 0.5;

  // Measured on this disk with small requests, which need the most depth: the search for the knee while it runs, where
  // larger ones may be at work, then stays above kDepthFloor of `depth`. Parsed models are calibrated ones.
  bool calibrated = false;
  static constexpr double kDepthFloor = 0.8;

  // "key value" lines; parse names the line it does not understand. Round-trips.
  std::string to_text() const;
  static Result<QosModel> parse(std::string_view text);
};

class CostTable {
 public:
  explicit CostTable(const QosModel& model);
  // ns, at least 1. Any thread.
  uint64_t cost(IoKind kind, size_t cls, uint64_t bytes) const {
    const auto k = static_cast<size_t>(kind);
    const float f = fixed_[k][cls].load(std::memory_order_relaxed), b = byte_[k][cls].load(std::memory_order_relaxed);
    return 1 + static_cast<uint64_t>(f + b * static_cast<float>(bytes));
  }
  // What of a cost is correction, so that windows can be compared across corrections.
  double correction(IoKind kind, size_t cls) const { 
    return correction_[static_cast<size_t>(kind)][cls].load(std::memory_order_relaxed);
  }
  // An interval of `elapsed_ns`, the device well filled, in which `predicted_ns[kind][class]` was completed. Learns when
  // one class, less than `classes`, is kPure of it. Returns whether it did.
  bool learn(const double (&predicted_ns)[kIoKinds][kSizeClasses], double elapsed_ns, size_t classes = kSizeClasses);
  // What one flush (or discard) took of the disk: its device time by the requests that shared the device meanwhile.
  void learn_slow(IoKind kind, double ns);
  QosModel current() const;  // any thread: the corrections at 4 and 128 KiB folded in

 private:
  static constexpr double kPure = 0.97, kLeast = 1.0 / 4096, kMost = 4096;
  // Of the error. The first lessons count much, later ones average over some seconds of load: throughput alone is noisy,
  // and a share is no more exact than the costs are.
  static constexpr double kGainFirst = 0.2, kGainLast = 0.025, kGainSlow = 0.1;
  static constexpr uint32_t kRough = 4;  // as many lessons may correct a guess that is off by a factor of two or more at once
  void publish(size_t kind, size_t cls);
  void correct(size_t kind, size_t cls, double x);
  void follow();

  QosModel model_;
  uint32_t lessons_[kIoKinds][kSizeClasses] = {};
  std::atomic<double> correction_[kIoKinds][kSizeClasses];
  std::atomic<float> fixed_[kIoKinds][kSizeClasses];
  std::atomic<float> byte_[kIoKinds][kSizeClasses];
};

}  // namespace spillway
