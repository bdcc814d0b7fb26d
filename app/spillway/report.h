// Text for people out of the daemon's JSON. Pure functions.
#pragma once

#include <string>

#include <nlohmann/json_fwd.hpp>

namespace spillway {

struct ReportStyle {
  bool exact = false;  // bytes as plain numbers
};

std::string status_report(const nlohmann::json& status, ReportStyle style);
std::string exports_report(const nlohmann::json& exports, ReportStyle style);
std::string shrinkers_report(const nlohmann::json& shrinkers, ReportStyle style);
std::string groups_report(const nlohmann::json& groups, ReportStyle style);
std::string volumes_report(const nlohmann::json& volumes, ReportStyle style);
// One screen; `before` is the status one interval ago (null: the first).
std::string top_report(const nlohmann::json& now, const nlohmann::json& before, double seconds, ReportStyle style);

}  // namespace spillway
