#include "src/host/iostat.h"

#include <algorithm>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace spillway {

using nlohmann::json;

std::vector<QosSample> iostat_sample(const Graph& graph) {
  std::vector<QosSample> all;
  for (auto& v : graph.opened())
    if (auto* disk = dynamic_cast<QosVolume*>(v.get())) all.push_back(disk->sample());
  return all;
}

namespace {

std::string name_of(const QosOwner& owner, const QosGroups& groups) {
  if (owner.part == QosOwner::Part::kBackground) {
    static constexpr const char* kNames[] = {"(rebuild)", "(scrub)", "(writeback)"};
    return kNames[static_cast<size_t>(owner.background)];
  }
  auto it = groups.groups.find(owner.group);
  std::string name = owner.group == GroupId::kRoot ? "/" : it == groups.groups.end() ? "(gone)" : it->second.name;
  return owner.part == QosOwner::Part::kReadAhead ? name + " read-ahead" : name;
}

}  // namespace

json iostat_json(const std::vector<QosSample>& now, const std::vector<QosSample>& before, const QosGroups& groups,
                 bool latency) {
  json disks = json::array();
  std::string text;
  for (auto& disk : now) {
    const QosSample* old = nullptr;
    for (auto& b : before)
      if (b.disk == disk.disk) old = &b;
    const double seconds = std::max(1e-9, static_cast<double>(disk.at_ns - (old != nullptr ? old->at_ns : 0)) / 1e9);
    std::vector<QosGroupSample> rows;
    std::vector<QosOwner> active;  // as rows
    double cost = 0;
    for (auto& g : disk.groups) {
      QosGroupSample d = g;
      if (old != nullptr)
        for (auto& o : old->groups) {
          if (o.owner.group != g.owner.group || o.owner.part != g.owner.part ||
              o.owner.background != g.owner.background)
            continue;
          d.reads -= o.reads, d.writes -= o.writes, d.flushes -= o.flushes, d.others -= o.others;
          d.read_bytes -= o.read_bytes, d.written_bytes -= o.written_bytes;
          d.cost_ns -= o.cost_ns, d.queue_ns -= o.queue_ns, d.device_ns -= o.device_ns, d.queued -= o.queued;
          d.latency = g.latency.since(o.latency);
        }
      if (d.reads + d.writes + d.flushes + d.others == 0) continue;
      cost += static_cast<double>(d.cost_ns);
      active.push_back(d.owner);
      rows.push_back(std::move(d));
    }
    text += fmt::format("{}: depth {} (knee {}), {} in flight, {} waiting\n", disk.disk, disk.depth, disk.knee,
                        disk.in_flight, disk.waiting);
    text += fmt::format("  {:<24} {:>6} {:>6} {:>9} {:>9} {:>9} {:>9}{}\n", "group", "want", "got", "reads/s", "writes/s",
                        "MB/s r", "MB/s w", latency ? "  queue us  device us    p50 us    p99 us" : "");
    json list = json::array();
    const std::vector<double> wanted = shares_wanted(active, groups);
    for (size_t i = 0; i < rows.size(); ++i) {
      const QosGroupSample& d = rows[i];
      const auto n = static_cast<double>(d.reads + d.writes + d.flushes + d.others);
      const double want = wanted[i];
      const double got = cost > 0 ? static_cast<double>(d.cost_ns) / cost : 0;
      json j{{"name", name_of(d.owner, groups)},
             {"share_wanted", want},
             {"share_got", got},
             {"reads_per_s", static_cast<double>(d.reads) / seconds},
             {"writes_per_s", static_cast<double>(d.writes) / seconds},
             {"flushes_per_s", static_cast<double>(d.flushes) / seconds},
             {"read_mb_per_s", static_cast<double>(d.read_bytes) / seconds / 1e6},
             {"write_mb_per_s", static_cast<double>(d.written_bytes) / seconds / 1e6},
             {"queue_us", static_cast<double>(d.queue_ns) / n / 1e3},
             {"device_us", static_cast<double>(d.device_ns) / n / 1e3},
             {"p50_us", static_cast<double>(d.latency.percentile(0.5)) / 1e3},
             {"p99_us", static_cast<double>(d.latency.percentile(0.99)) / 1e3}};
      text += fmt::format("  {:<24} {:>5.1f}% {:>5.1f}% {:>9.0f} {:>9.0f} {:>9.1f} {:>9.1f}",
                          j["name"].get<std::string>(), want * 100, got * 100,
                          j["reads_per_s"].get<double>(), j["writes_per_s"].get<double>(),
                          j["read_mb_per_s"].get<double>(), j["write_mb_per_s"].get<double>());
      if (latency)
        text += fmt::format(" {:>9.1f} {:>10.1f} {:>9.1f} {:>9.1f}", j["queue_us"].get<double>(),
                            j["device_us"].get<double>(), j["p50_us"].get<double>(), j["p99_us"].get<double>());
      text += "\n";
      list.push_back(std::move(j));
    }
    disks.push_back({{"name", disk.disk}, {"depth", disk.depth}, {"knee", disk.knee}, {"in_flight", disk.in_flight},
                     {"waiting", disk.waiting}, {"seconds", seconds}, {"groups", list}});
  }
  return {{"disks", disks}, {"text", text}};
}

}  // namespace spillway
