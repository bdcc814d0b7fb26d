#include "benchmarks/qos/bfq.h"

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>

#include <nlohmann/json.hpp>

namespace spillway::bench {
namespace {

std::string output_of(const std::string& command) {
  std::string out;
  FILE* p = ::popen(command.c_str(), "r");
  if (p == nullptr) return out;
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, p)) > 0;) out.append(buffer, n);
  return ::pclose(p) == 0 ? out : std::string();
}

bool put(const std::string& path, const std::string& text) {
  std::ofstream f(path);
  f << text;
  return static_cast<bool>(f.flush());
}

}  // namespace

std::unique_ptr<Bfq> Bfq::create(const std::string& file, std::string* why) {
  const std::string base = "/sys/fs/cgroup/blkio";
  if (::geteuid() != 0) return *why = "not root", nullptr;
  if (output_of("command -v fio").empty()) return *why = "no fio", nullptr;
  if (::access(base.c_str(), W_OK) != 0) return *why = "no cgroup v1 blkio", nullptr;
  std::unique_ptr<Bfq> b(new Bfq);
  std::string device = output_of("losetup --find --show --direct-io=on '" + file + "' 2>/dev/null");
  if (device.empty()) return *why = "no loop device", nullptr;
  device.pop_back();
  b->device_ = device;
  if (!put("/sys/block/" + device.substr(5) + "/queue/scheduler", "bfq")) return *why = "no bfq", nullptr;
  for (int i = 0; i < 2; ++i) {
    b->groups_[i] = base + "/bench_qos." + std::to_string(::getpid()) + "." + std::to_string(i);
    if (::mkdir(b->groups_[i].c_str(), 0755) != 0 || ::access((b->groups_[i] + "/blkio.bfq.weight").c_str(), W_OK) != 0)
      return *why = "no blkio.bfq.weight", nullptr;
  }
  return b;
}

Bfq::~Bfq() {
  for (auto& g : groups_)
    if (!g.empty()) ::rmdir(g.c_str());
  if (!device_.empty()) output_of("losetup --detach " + device_);
}

std::vector<Bfq::Outcome> Bfq::run(const std::string& scheduler, const std::vector<Job>& jobs, double seconds) {
  if (!put("/sys/block/" + device_.substr(5) + "/queue/scheduler", scheduler))
    return error_ = "cannot set scheduler " + scheduler, std::vector<Outcome>{};
  std::vector<FILE*> pipes;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const Job& j = jobs[i];
    put(groups_[i] + "/blkio.bfq.weight", std::to_string(j.weight));
    char command[1024];
    std::snprintf(command, sizeof command,
                  "echo $$ > %s/tasks; exec fio --name=j --filename=%s --direct=1 --ioengine=io_uring --rw=%s --bs=%u "
                  "--iodepth=%u --offset=%llu --size=%llu --time_based --ramp_time=0.3 --runtime=%.1f --norandommap "
                  "--output-format=json 2>&1",
                  groups_[i].c_str(), device_.c_str(), j.rw.c_str(), j.bytes, j.depth,
                  static_cast<unsigned long long>(j.offset), static_cast<unsigned long long>(j.length), seconds);
    pipes.push_back(::popen(command, "r"));
  }
  std::vector<Outcome> all;
  for (FILE* p : pipes) {
    std::string text;
    char buffer[4096];
    for (size_t n; p != nullptr && (n = std::fread(buffer, 1, sizeof buffer, p)) > 0;) text.append(buffer, n);
    if (p != nullptr) ::pclose(p);
    auto parsed = nlohmann::json::parse(text.substr(std::min(text.find('{'), text.size())), nullptr, false);
    if (parsed.is_discarded()) return error_ = "fio: " + text.substr(0, 200), std::vector<Outcome>{};
    const auto& job = parsed["jobs"][0];
    const auto& part = job["read"]["iops"].get<double>() > 0 ? job["read"] : job["write"];
    all.push_back({part["iops"].get<double>(), part["clat_ns"]["percentile"]["99.000000"].get<double>() / 1e3});
  }
  return all;
}

}  // namespace spillway::bench
