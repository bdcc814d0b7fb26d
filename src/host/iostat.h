// iostat: what each disk's scheduler has counted, per group: shares wanted and got, rates, times.
// Pure functions but for the reading of counters; any thread.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "src/host/graph.h"
#include "src/qos/qos.h"

namespace spillway {

// One sample of every scheduled disk.
std::vector<QosSample> iostat_sample(const Graph& graph);
// The interval between two samples; `before` empty: since the start of the worker.
//   {"disks": [{"name", "depth", "knee", "groups": [{"name", "share_wanted", "share_got", "reads_s", ...}]}], "text"}
// share_wanted: what shares_wanted (qos.h) says of those that used the disk in the interval, background work and read-ahead
// among them. Times in microseconds.
nlohmann::json iostat_json(const std::vector<QosSample>& now, const std::vector<QosSample>& before,
                           const QosGroups& groups, bool latency);

}  // namespace spillway
