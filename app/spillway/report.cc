#include "app/spillway/report.h"

#include <algorithm>
#include <vector>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "src/base/units.h"

namespace spillway {

using nlohmann::json;

namespace {

// A table with columns as wide as their widest cell; the first column is left-aligned, the others right.
class Table {
 public:
  explicit Table(std::vector<std::string> head) { rows_.push_back(std::move(head)); }
  void row(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  std::string text() const {
    std::vector<size_t> width(rows_[0].size(), 0);
    for (auto& r : rows_)
      for (size_t i = 0; i < r.size(); ++i) width[i] = std::max(width[i], r[i].size());
    std::string out;
    for (auto& r : rows_) {
      std::string line;
      for (size_t i = 0; i < r.size(); ++i)
        line += i == 0 ? fmt::format("{:<{}}", r[i], width[i]) : fmt::format("  {:>{}}", r[i], width[i]);
      while (!line.empty() && line.back() == ' ') line.pop_back();
      out += line + "\n";
    }
    return out;
  }

 private:
  std::vector<std::vector<std::string>> rows_;
};

uint64_t num(const json& j, const char* key) {
  auto it = j.find(key);
  return it != j.end() && it->is_number() ? it->get<uint64_t>() : 0;
}
std::string count(const json& j, const char* key) { return fmt::format("{}", num(j, key)); }

struct Sizes {
  ReportStyle style;
  std::string of(uint64_t v) const { return format_size(v, style.exact); }
  std::string of(const json& j, const char* key) const {
    auto it = j.find(key);
    if (it != j.end() && it->is_string()) return it->get<std::string>();
    return of(num(j, key));
  }
};

std::string cache_lines(const json& c, Sizes s) {
  return fmt::format("cache: {} of {} resident, {} dirty, peak {}, {:.1f} % hits ({} hits, {} misses)\n"
                     "       {} reclaimed, {} given back to the host, {} metadata\n",
                     s.of(c, "resident_bytes"), s.of(c, "capacity_bytes"), s.of(c, "dirty_bytes"),
                     s.of(c, "peak_bytes"), c.value("hit_ratio", 0.0) * 100, num(c, "hits"), num(c, "misses"),
                     s.of(c, "reclaimed_bytes"), s.of(c, "punched_bytes"), s.of(c, "metadata_bytes"));
}

std::string tenants_table(const json& tenants, Sizes s) {
  if (tenants.empty()) return "";
  Table t({"tenant", "view", "may hold", "dirty", "hits", "misses", "reclaimed"});
  for (auto& x : tenants)
    t.row({x.value("name", "?"), s.of(x, "view_bytes"), s.of(x, "entitlement_bytes"), s.of(x, "dirty_bytes"),
           count(x, "hits"), count(x, "misses"), s.of(x, "reclaimed_bytes")});
  return t.text();
}

}  // namespace

std::string exports_report(const json& exports, ReportStyle style) {
  Sizes s{style};
  Table t({"export", "transport", "volume", "group", "connected", "read", "written", "flushes", "errors"});
  for (auto& e : exports) {
    const std::string group = e.value("group", "");
    t.row({e.value("name", "?"), e.value("transport", "?"), e.value("volume", ""), group.empty() ? "/" : group,
           e.value("connected", false) ? "yes" : "no", s.of(e, "read_bytes"), s.of(e, "write_bytes"),
           count(e, "flushes"), count(e, "errors")});
  }
  return t.text();
}

std::string shrinkers_report(const json& shrinkers, ReportStyle style) {
  Sizes s{style};
  Table t({"shrinker", "objects", "bytes", "pinned", "scans", "freed", "time ms", "last", "stayed because"});
  for (auto& x : shrinkers) {
    std::string why;
    for (auto& [k, v] : x["not_freed"].items()) why += fmt::format("{}{} {}", why.empty() ? "" : ", ", k, v.get<uint64_t>());
    t.row({x.value("name", "?") + (x.value("quarantined", false) ? " (quarantined)" : ""), count(x, "objects"),
           s.of(x, "bytes"), s.of(x, "pinned_bytes"), count(x, "scan_calls"), s.of(x, "freed_bytes"),
           fmt::format("{:.1f}", x.value("time_ms", 0.0)), x.value("last_status", ""), why});
  }
  return t.text();
}

std::string groups_report(const json& groups, ReportStyle style) {
  Sizes s{style};
  Table t({"group", "weight", "usage", "min", "low", "high", "max", "reclaimed"});
  for (auto& g : groups)
    t.row({g.value("name", "?"), count(g, "weight"), s.of(g, "usage"), s.of(g, "memory.min"), s.of(g, "memory.low"),
           s.of(g, "memory.high"), s.of(g, "memory.max"), s.of(g, "reclaimed_bytes")});
  return t.text();
}

std::string volumes_report(const json& volumes, ReportStyle style) {
  Sizes s{style};
  Table t({"volume", "layer", "size"});
  for (auto& v : volumes) t.row({v.value("name", "?"), v.value("layer", "?"), s.of(v, "size")});
  return t.text();
}

std::string status_report(const json& st, ReportStyle style) {
  Sizes s{style};
  std::string out = fmt::format("spillwayd {}: up {} s, {} restarts, {}\n", num(st, "pid"), num(st, "uptime_ms") / 1000,
                                num(st, "restarts"), st.value("config", ""));
  out += cache_lines(st["cache"], s);
  std::string sources;
  for (auto& p : st["pressure"])
    sources += fmt::format("pressure: {}{}: {} ({} events)\n", p.value("kind", "?"),
                           p.value("active", false) ? "" : " (not used)", p.value("text", ""), num(p, "events"));
  out += sources.empty() ? "pressure: no source is watched\n" : sources;
  const json& r = st["reclaim"];
  out += fmt::format("reclaim: {} passes, {} freed, {:.1f} ms\n\n", num(r, "passes"), s.of(r, "freed_bytes"),
                     r.value("duration_ms", 0.0));
  out += tenants_table(st["cache"]["tenants"], s) + "\n" + exports_report(st["exports"], style) + "\n" +
         shrinkers_report(r["shrinkers"], style);
  return out;
}

std::string top_report(const json& now, const json& before, double seconds, ReportStyle style) {
  Sizes s{style};
  std::string out = fmt::format("spillwayd {}   up {} s   restarts {}\n", num(now, "pid"), num(now, "uptime_ms") / 1000,
                                num(now, "restarts"));
  out += cache_lines(now["cache"], s) + "\n" + tenants_table(now["cache"]["tenants"], s) + "\n";
  Table t({"export", "read/s", "written/s", "reads/s", "writes/s", "flushes/s", "errors"});
  for (auto& e : now["exports"]) {
    json old = json::object();
    if (before.is_object())
      for (auto& b : before["exports"])
        if (b["name"] == e["name"]) old = b;
    auto rate = [&](const char* key) {
      const uint64_t a = num(old, key), b = num(e, key);
      return old.empty() || b < a || seconds <= 0 ? 0.0 : static_cast<double>(b - a) / seconds;
    };
    t.row({e.value("name", "?"), s.of(static_cast<uint64_t>(rate("read_bytes"))),
           s.of(static_cast<uint64_t>(rate("write_bytes"))), fmt::format("{:.0f}", rate("reads")),
           fmt::format("{:.0f}", rate("writes")), fmt::format("{:.0f}", rate("flushes")), count(e, "errors")});
  }
  return out + t.text() + "\n" + shrinkers_report(now["reclaim"]["shrinkers"], style);
}

}  // namespace spillway
