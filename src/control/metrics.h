// The daemon's status as Prometheus text (exposition format 0.0.4): `spillway metrics`, for a node exporter's textfile
// collector or a one-line HTTP wrapper. A pure function of the status JSON.
#pragma once

#include <string>

#include <nlohmann/json_fwd.hpp>

namespace spillway {

std::string prometheus_text(const nlohmann::json& status);

}  // namespace spillway
