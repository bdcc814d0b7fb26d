// What every benchmark shares: the command line, clocks, pinning, interleaving, medians, and the report
//
//   {"bench": name, "machine": {...}, "runs": [{"name": ..., ...}], "gates": [{name, value, op, target, ok}]}
//
//   int main(int argc, char** argv) {
//     bench::Report report("qos", argc, argv);            // takes --json FILE, --gate, --help
//     const double seconds = report.option("seconds", 2.0);   // --seconds N, for this benchmark's own options
//     bench::interleave(3, {{"with", [&] { ... }}, {"without", [&] { ... }}});
//     report.run("random read", {{"kiops", 41.5}, {"contestant", "with"}});
//     report.gate("utilisation", 0.98, ">=", 0.97);
//     return report.finish();                             // prints, writes the file; 1 when --gate and one failed
//   }
//
// A machine like ours is noisy and drifts: compare contestants run in turn (interleave), in several rounds, by
// their medians, pinned. Thread-safety: Report is for one thread; the free functions are for any.
#pragma once

#include <sched.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

namespace spillway::bench {

using Json = nlohmann::ordered_json;

inline uint64_t clock_ns(clockid_t id) {
  timespec ts{};
  clock_gettime(id, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(ts.tv_nsec);
}
inline uint64_t now_ns() { return clock_ns(CLOCK_MONOTONIC); }
// CPU time, user and system together.
inline uint64_t thread_cpu_ns() { return clock_ns(CLOCK_THREAD_CPUTIME_ID); }
inline uint64_t process_cpu_ns() { return clock_ns(CLOCK_PROCESS_CPUTIME_ID); }

inline int cpus() { return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)); }

// Pins the calling thread (and those it makes later) to `cpu` modulo the CPUs there are.
inline bool pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<size_t>(cpu % std::max(1, cpus())), &set);
  return sched_setaffinity(0, sizeof set, &set) == 0;
}

// p in 0..1, linear between neighbours; 0 when there is nothing.
inline double percentile(std::vector<double> v, double p) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  const double at = p * static_cast<double>(v.size() - 1);
  const auto low = static_cast<size_t>(at);
  if (low + 1 >= v.size()) return v.back();
  return v[low] + (v[low + 1] - v[low]) * (at - static_cast<double>(low));
}
inline double median(std::vector<double> v) { return percentile(std::move(v), 0.5); }
// (max - min) / median: how much the rounds disagree.
inline double spread(const std::vector<double>& v) {
  if (v.empty()) return 0;
  const auto [low, high] = std::minmax_element(v.begin(), v.end());
  const double middle = median(v);
  return middle == 0 ? 0 : (*high - *low) / middle;
}

struct Contestant {
  std::string name;
  std::function<void()> run;
};
// Each round runs every contestant once, in turn; every other round backwards, so that drift falls on all alike.
inline void interleave(int rounds, const std::vector<Contestant>& contestants) {
  for (int r = 0; r < rounds; ++r)
    for (size_t i = 0; i < contestants.size(); ++i)
      contestants[r % 2 == 0 ? i : contestants.size() - 1 - i].run();
}

inline Json machine() {
  utsname u{};
  uname(&u);
  std::string line, cpu = "unknown", memory;
  for (std::ifstream in("/proc/cpuinfo"); std::getline(in, line);)
    if (line.starts_with("model name")) {
      cpu = line.substr(line.find(':') + 2);
      break;
    }
  for (std::ifstream in("/proc/meminfo"); std::getline(in, line);)
    if (line.starts_with("MemTotal:")) memory = line.substr(line.find_first_of("0123456789"));
  return {{"cpu", cpu}, {"cpus", cpus()}, {"memory", memory}, {"kernel", u.release}, {"compiler", __VERSION__}};
}

class Report {
 public:
  Report(std::string name, int argc, char** argv) : name_(std::move(name)) {
    for (int i = 1; i < argc; ++i) {
      const std::string_view a = argv[i];
      if (a == "--gate") gate_ = true;
      else if (a == "--json" && i + 1 < argc) json_ = argv[++i];
      else if (a == "--help") {
        std::printf("usage: bench_%s [--json FILE] [--gate] [--OPTION VALUE]...\n", name_.c_str());
        std::exit(0);
      } else if (a.starts_with("--") && i + 1 < argc && std::string_view(argv[i + 1]).substr(0, 2) != "--") {
        options_.emplace_back(a.substr(2), argv[i + 1]);
        ++i;
      } else if (a.starts_with("--")) {
        options_.emplace_back(a.substr(2), "1");
      } else {
        std::fprintf(stderr, "bench_%s: what is \"%s\"?\n", name_.c_str(), argv[i]);
        std::exit(2);
      }
    }
  }

  bool gating() const { return gate_; }
  double option(std::string_view key, double otherwise) {
    const std::string* v = find(key);
    return v == nullptr ? otherwise : std::atof(v->c_str());
  }
  std::string option(std::string_view key, const char* otherwise) {
    const std::string* v = find(key);
    return v == nullptr ? otherwise : *v;
  }

  // Printed at once and kept for the file.
  void run(const std::string& what, Json fields) {
    Json entry = {{"name", what}};
    entry.update(fields);
    std::string text = what + ":";
    for (const auto& [key, value] : fields.items()) text += " " + key + "=" + short_form(value);
    std::printf("%s\n", text.c_str());
    std::fflush(stdout);
    runs_.push_back(std::move(entry));
  }

  // For the file only: raw values too many to print.
  void record(const std::string& what, Json fields) {
    Json entry = {{"name", what}};
    entry.update(fields);
    runs_.push_back(std::move(entry));
  }

  // op: one of < <= > >= ==. A value that is not a number fails.
  bool gate(const std::string& what, double value, const std::string& op, double target) {
    const bool ok = op == "<" ? value < target : op == "<=" ? value <= target : op == ">" ? value > target
                  : op == ">=" ? value >= target : op == "==" ? value == target : false;
    std::printf("gate %-4s %s: %.4g %s %.4g\n", ok ? "ok" : "FAIL", what.c_str(), value, op.c_str(), target);
    std::fflush(stdout);
    Json v = std::isfinite(value) ? Json(value) : Json(nullptr);
    gates_.push_back({{"name", what}, {"value", std::move(v)}, {"op", op}, {"target", target}, {"ok", ok}});
    if (!ok) ++failed_;
    return ok;
  }

  // The exit code. Nothing measured (an --only that names no case) is an error, not a pass.
  int finish() {
    if (runs_.empty() && gates_.empty()) {
      std::fprintf(stderr, "bench_%s: no case fits these options\n", name_.c_str());
      return 2;
    }
    const Json all = {{"bench", name_}, {"machine", machine()}, {"runs", runs_}, {"gates", gates_}};
    if (!json_.empty()) {
      std::ofstream out(json_);
      out << all.dump(1) << '\n';
      if (!out.flush()) {
        std::fprintf(stderr, "bench_%s: cannot write %s\n", name_.c_str(), json_.c_str());
        return 2;
      }
    }
    std::printf("%zu gates, %d failed\n", gates_.size(), failed_);
    return gate_ && failed_ > 0 ? 1 : 0;
  }

 private:
  const std::string* find(std::string_view key) const {
    for (const auto& [k, v] : options_)
      if (k == key) return &v;
    return nullptr;
  }
  static std::string short_form(const Json& v) {
    if (!v.is_number_float()) return v.is_string() ? v.get<std::string>() : v.dump();
    char text[32];
    std::snprintf(text, sizeof text, "%.5g", v.get<double>());
    return text;
  }

  std::string name_, json_;
  bool gate_ = false;
  int failed_ = 0;
  std::vector<std::pair<std::string, std::string>> options_;
  Json runs_ = Json::array(), gates_ = Json::array();
};

}  // namespace spillway::bench
