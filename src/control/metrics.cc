#include "src/control/metrics.h"

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace spillway {

using nlohmann::json;

namespace {

// Label values: backslash, quote and newline are escaped.
std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') out += "\\n";
    else out += c;
  }
  return out;
}

class Text {
 public:
  void head(const char* name, const char* type, const char* help) {
    out_ += fmt::format("# HELP spillway_{} {}\n# TYPE spillway_{} {}\n", name, help, name, type);
  }
  void value(const char* name, const std::string& labels, const json& v) {
    out_ += fmt::format("spillway_{}{} {}\n", name, labels.empty() ? "" : "{" + labels + "}", v.dump());
  }
  std::string take() { return std::move(out_); }

 private:
  std::string out_;
};

struct Metric {
  const char* key;
  const char* name;
  const char* type;
  const char* help;
};

void rows(Text& text, const json& list, const char* label, std::initializer_list<Metric> metrics) {
  for (auto& m : metrics) {
    text.head(m.name, m.type, m.help);
    for (auto& row : list)
      text.value(m.name, fmt::format("{}=\"{}\"", label, escaped(row.value("name", ""))), row.value(m.key, json(0)));
  }
}

}  // namespace

std::string prometheus_text(const json& status) {
  Text t;
  t.head("worker_restarts_total", "counter", "Times the holder started the worker again.");
  t.value("worker_restarts_total", "", status["restarts"]);
  const json& c = status["cache"];
  for (auto& m : std::initializer_list<Metric>{
           {"capacity_bytes", "cache_capacity_bytes", "gauge", "Limit of the frames."},
           {"resident_bytes", "cache_resident_bytes", "gauge", "Frames that hold data."},
           {"backed_bytes", "cache_backed_bytes", "gauge", "What the host really spends on frames."},
           {"dirty_bytes", "cache_dirty_bytes", "gauge", "Not written back yet."},
           {"hits", "cache_hits_total", "counter", "Pages found."},
           {"misses", "cache_misses_total", "counter", "Pages read from below."},
           {"reclaimed_bytes", "cache_reclaimed_bytes_total", "counter", "Evicted for pressure."},
           {"writeback_errors", "cache_writeback_errors_total", "counter", "Failed write-backs."}}) {
    t.head(m.name, m.type, m.help);
    t.value(m.name, "", c[m.key]);
  }
  rows(t, c["tenants"], "tenant",
       {{"view_bytes", "tenant_view_bytes", "gauge", "What the tenant is charged for."},
        {"entitlement_bytes", "tenant_entitlement_bytes", "gauge", "What it may hold now."},
        {"hits", "tenant_hits_total", "counter", "Pages found in its view."},
        {"misses", "tenant_misses_total", "counter", "Pages not in its view."}});
  rows(t, status["exports"], "export",
       {{"read_bytes", "export_read_bytes_total", "counter", "Bytes read by the guest."},
        {"write_bytes", "export_written_bytes_total", "counter", "Bytes written by the guest."},
        {"flushes", "export_flushes_total", "counter", "Flush requests."},
        {"errors", "export_errors_total", "counter", "Requests answered with an error."},
        {"protocol_errors", "export_protocol_errors_total", "counter", "Connections ended for what the peer sent."}});
  rows(t, status["reclaim"]["shrinkers"], "shrinker",
       {{"bytes", "shrinker_bytes", "gauge", "What could be freed."},
        {"freed_bytes", "shrinker_freed_bytes_total", "counter", "Freed by scans."},
        {"scan_calls", "shrinker_scans_total", "counter", "Scan callbacks."}});
  return t.take();
}

}  // namespace spillway
