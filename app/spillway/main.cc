// spillway: the command line. `spillway <noun> <verb> [NAME] [key=value]... [--options]`.
// Talks to the daemon over its control socket; `volume ... --config F` works on the disks without it.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "app/spillway/exit_code.h"
#include "app/spillway/image.h"
#include "app/spillway/report.h"
#include "src/base/log.h"
#include "src/control/server.h"
#include "src/export/vfio_user/vmm_exec.h"
#include "src/host/calibrate.h"
#include "src/host/graph.h"
#include "src/host/offline.h"

namespace spillway {
namespace {

using nlohmann::json;

struct Cli {
  std::string socket, config, name, device = "/dev/vda";
  std::vector<std::string> pairs;
  bool as_json = false, exact = false, yes = false, dry_run = false, force = false, repair = false, latency = false, writes = false;
  double seconds = 60;
  std::string offset = "0", length;
  uint64_t interval_s = 0, count = 0;  // top, iostat; 0 = not given
  int exit_code = kExitOk;
};

// --socket, else the config's, else $SPILLWAY_SOCKET, else ./spillwayd.sock, else the system's.
Result<std::string> control_socket(const Cli& c) {
  if (!c.socket.empty()) return c.socket;
  if (!c.config.empty()) {
    SPILLWAY_TRY(Config config, Config::load(c.config));
    return config.host.control;
  }
  if (const char* env = ::getenv("SPILLWAY_SOCKET")) return std::string(env);
  if (::access("spillwayd.sock", F_OK) == 0) return std::string("spillwayd.sock");
  return std::string("/run/spillway/spillwayd.sock");
}

Result<json> arguments(const Cli& c) {
  json args = json::object();
  if (!c.name.empty()) args["name"] = c.name;
  for (auto& p : c.pairs) {
    const auto eq = p.find('=');
    if (eq == std::string::npos || eq == 0)
      return fail(ErrorKind::kInvalid, fmt::format("\"{}\": arguments are written key=value", p));
    args[p.substr(0, eq)] = p.substr(eq + 1);
  }
  return args;
}

bool is_unreachable(const Error& e) { return e.message().find("nobody listens") != std::string::npos; }

// Calls the daemon; on failure prints the error, sets the exit code and returns null.
json call(Cli& c, const std::string& command, const json& extra = json::object()) {
  auto socket = control_socket(c);
  auto args = socket ? arguments(c) : Result<json>(fail(socket.error()));
  if (!args) {
    c.exit_code = report_error(args.error());
    return nullptr;
  }
  args->update(extra);
  auto reply = control_call(*socket, command, *args);
  if (!reply) {
    c.exit_code = report_error(reply.error());
    if (is_unreachable(reply.error())) c.exit_code = kExitUnreachable;
    return nullptr;
  }
  return std::move(*reply);
}

void print(const std::string& text) { std::fwrite(text.data(), 1, text.size(), stdout); }
void print_json(const json& j) { print(j.dump(2) + "\n"); }

void show(Cli& c, const std::string& command, std::string (*report)(const json&, ReportStyle)) {
  const json j = call(c, command);
  if (j.is_null()) return;
  if (c.as_json || report == nullptr) print_json(j);
  else print(report(j, ReportStyle{c.exact}));
}

bool confirmed(const Cli& c, const std::string& question) {
  if (c.yes || c.force) return true;
  if (::isatty(STDIN_FILENO) == 0) {
    std::fprintf(stderr, "spillway: %s: say --yes to do it\n", question.c_str());
    return false;
  }
  std::fprintf(stderr, "%s [y/N] ", question.c_str());
  const int ch = std::getchar();
  return ch == 'y' || ch == 'Y';
}

Result<Config> load_config(const Cli& c) {
  if (c.config.empty()) return fail(ErrorKind::kInvalid, "--config FILE is required");
  return Config::load(c.config);
}

template <class Fn>
void with_config(Cli& c, Fn fn) {
  auto config = load_config(c);
  if (!config) {
    c.exit_code = report_error(config.error());
    if (!c.config.empty()) c.exit_code = kExitUsage;
    return;
  }
  // Work without the daemon: every array that is started for it.
  if (c.force)
    for (auto& [name, volume] : config->volumes) volume.force = true;
  Status s = fn(*config);
  if (!s) c.exit_code = report_error(s.error());
}

Status volume_cat(const Cli& c, const Config& config) {
  SPILLWAY_TRY(const uint64_t offset, parse_size(c.offset));
  std::optional<uint64_t> length;
  if (!c.length.empty()) {
    SPILLWAY_TRY(length, parse_size(c.length));
  }
  return offline_cat(config, c.name, offset, length, STDOUT_FILENO);
}

Status volume_write(const Cli& c, const Config& config) {
  SPILLWAY_TRY(const uint64_t offset, parse_size(c.offset));
  std::optional<uint64_t> length;
  if (!c.length.empty()) {
    SPILLWAY_TRY(length, parse_size(c.length));
  }
  SPILLWAY_TRY(const uint64_t written, offline_write(config, c.name, offset, length, STDIN_FILENO));
  std::fprintf(stderr, "%llu bytes written\n", static_cast<unsigned long long>(written));
  return {};
}

Status volume_create(Cli& c, const Config& config) {
  CreateOptions options;
  options.dry_run = true;
  options.force = true;
  SPILLWAY_TRY(const CreatePlan plan, offline_create(config, c.name, options));
  for (auto& line : plan.lines) print(line + "\n");
  if (c.dry_run) return {};
  if (plan.destroys && !confirmed(c, fmt::format("volume {}: what is on the members will be lost", c.name))) {
    c.exit_code = kExitFailed;
    return {};
  }
  options.dry_run = false;
  options.force = plan.destroys;
  SPILLWAY_TRY(const CreatePlan done, offline_create(config, c.name, options));
  print(fmt::format("volume {}: created, {}\n", c.name, format_size(done.array_size, c.exact)));
  return {};
}

json status_json(const ArrayStatus& s) {
  json members = json::array();
  for (auto& m : s.members) members.push_back({{"name", m.name}, {"state", m.state}, {"role", m.role}});
  return {{"name", s.name}, {"layer", s.layer}, {"uuid", s.uuid}, {"state", s.state}, {"size", s.size},
          {"chunk", s.chunk}, {"events", s.events}, {"members", members}, {"operation", s.operation},
          {"advice", s.advice}};
}

// The daemon's answer when it runs, else what the superblocks say.
void volume_status(Cli& c) {
  auto socket = control_socket(c);
  if (socket) {
    auto reply = control_call(*socket, "volume status", json{{"name", c.name}});
    if (reply) {
      print(c.as_json ? reply->dump(2) + "\n" : reply->value("text", ""));
      if (reply->value("state", "") == "degraded") c.exit_code = kExitDegraded;
      return;
    }
    if (!is_unreachable(reply.error()) || c.config.empty()) {
      c.exit_code = is_unreachable(reply.error()) ? (report_error(reply.error()), int{kExitUnreachable})
                                                  : report_error(reply.error());
      return;
    }
  }
  with_config(c, [&](const Config& config) -> Status {
    SPILLWAY_TRY(const ArrayStatus s, offline_status(config, c.name));
    print(c.as_json ? status_json(s).dump(2) + "\n" : format_status(s));
    if (s.state == "degraded") c.exit_code = kExitDegraded;
    return {};
  });
}

// fail, remove, add, replace, grow: first what would be done, then a question where something is lost, then the thing.
void volume_member(Cli& c, const std::string& command) {
  const json plan = call(c, command, json{{"dry_run", true}});
  if (plan.is_null()) return;
  const bool joins = plan.contains("lines");
  const bool destroys = joins ? plan.value("destroys", false) : command == "volume fail";
  std::string lines;
  if (joins) for (const auto& line : plan["lines"]) lines += line.get<std::string>() + "\n";
  else lines = fmt::format("{} {}: can be done\n", command, c.name);
  if (c.dry_run) {
    print(c.as_json ? plan.dump(2) + "\n" : lines);
    return;
  }
  if (destroys) {
    if (joins && !c.as_json) print(lines);
    if (!confirmed(c, fmt::format("volume {}: {}", c.name, joins ? "what is on the disk" : "a member is taken out of use"))) {
      c.exit_code = kExitFailed;
      return;
    }
  }
  const json j = call(c, command, json{{"force", destroys}});
  if (!j.is_null()) print(c.as_json ? j.dump(2) + "\n" : j.value("text", ""));
}

void top(Cli& c) {
  const uint64_t interval = c.interval_s != 0 ? c.interval_s : 2, count = c.count != 0 ? c.count : UINT64_MAX;
  json before;
  for (uint64_t i = 0; i < count; ++i) {
    if (i > 0) ::sleep(static_cast<unsigned>(interval));
    const json now = call(c, "status");
    if (now.is_null()) return;
    if (::isatty(STDOUT_FILENO) != 0) print("\033[H\033[2J");
    print(c.as_json ? now.dump() + "\n" : top_report(now, before, static_cast<double>(interval), {c.exact}) + "\n");
    std::fflush(stdout);
    before = now;
  }
}

void iostat(Cli& c) {
  // Without an interval once, since the start; with one for ever, or as often as asked.
  const uint64_t count = c.count != 0 ? c.count : c.interval_s != 0 ? UINT64_MAX : 1;
  for (uint64_t i = 0; i < count; ++i) {
    json args{{"latency", c.latency}};
    if (c.interval_s != 0) args["interval_ms"] = c.interval_s * 1000;
    const json now = call(c, "iostat", args);
    if (now.is_null()) return;
    print(c.as_json ? now.dump() + "\n" : now.value("text", ""));
    std::fflush(stdout);
  }
}

int run(int argc, char** argv) {
  ::signal(SIGPIPE, SIG_DFL);
  // Everything after vmm-exec is the VMM's own command line.
  if (argc >= 2 && std::string_view(argv[1]) == "vmm-exec")
    return vmm_exec(argv + (argc > 2 && std::string_view(argv[2]) == "--" ? 3 : 2));
  set_log_level(LogLevel::kWarn);
  Cli c;
  CLI::App app{"Storage for virtual machines out of one shared host cache"};
  app.require_subcommand(1);
  app.fallthrough();
  app.set_version_flag("--version", "spillway 0.1.0");
  app.add_option("--socket", c.socket, "The daemon's control socket");
  app.add_option("--config", c.config, "The config file: for the socket's place and for work without the daemon");
  app.add_flag("--json", c.as_json, "Machine-readable output");
  app.add_flag("-p,--exact", c.exact, "Sizes as plain bytes");
  app.add_flag("--yes", c.yes, "Do not ask");
  app.add_flag("--dry-run", c.dry_run, "Say what would be done");
  app.add_flag("--force", c.force, "As --yes; without the daemon also: write to a dirty degraded array");

  app.add_subcommand("status", "Everything on one page")->callback([&] { show(c, "status", status_report); });
  app.add_subcommand("metrics", "Counters as Prometheus text")->callback([&] {
    const json j = call(c, "metrics");
    if (j.is_string()) print(j.get<std::string>());
  });
  auto* top_command = app.add_subcommand("top", "The same, live: top [SECONDS [COUNT]]");
  auto repeated = [&](CLI::App* command) {
    command->add_option("SECONDS", c.interval_s, "Interval")->check(CLI::Range(1, 3600));
    command->add_option("COUNT", c.count, "How often; default: for ever")->check(CLI::PositiveNumber);
  };
  repeated(top_command);
  top_command->callback([&] { top(c); });
  auto* iostat_command = app.add_subcommand("iostat", "Shares of each disk: iostat [-l] [SECONDS [COUNT]]");
  iostat_command->add_flag("-l,--latency", c.latency, "With latencies");
  repeated(iostat_command);
  iostat_command->callback([&] { iostat(c); });

  auto noun = [&](const char* name, const char* help) {
    auto* n = app.add_subcommand(name, help);
    n->require_subcommand(1);
    n->fallthrough();
    return n;
  };
  auto verb = [&](CLI::App* n, const char* name, const char* help, bool named, std::function<void()> fn) {
    auto* v = n->add_subcommand(name, help);
    if (named) v->add_option("NAME", c.name)->required();
    v->add_option("key=value", c.pairs);
    v->callback(std::move(fn));
    v->fallthrough();
    return v;
  };
  auto* shrinker = noun("shrinker", "What gives memory back");
  verb(shrinker, "list", "Every shrinker with what it holds and has freed", false,
       [&] { show(c, "shrinker list", shrinkers_report); });
  verb(shrinker, "count", "Objects per group and node", true, [&] { show(c, "shrinker count", nullptr); });
  verb(shrinker, "scan", "One scan by hand: [group=G] [node=N] [nr=N]", true,
       [&] { show(c, "shrinker scan", nullptr); });
  auto* exports = noun("export", "Volumes as guests see them");
  verb(exports, "list", "Every export", false, [&] { show(c, "export list", exports_report); });
  verb(exports, "spread", "reactors=N: the first N serve the queues from now on", false,
       [&] { show(c, "export spread", exports_report); });
  auto* group = noun("group", "Tenants: memory and I/O shares");
  verb(group, "list", "Every group", false, [&] { show(c, "group list", groups_report); });
  verb(group, "set", "weight= memory.min|low|high|max= io.rbps|wbps|riops|wiops=", true,
       [&] { show(c, "group set", groups_report); });
  auto* cache = noun("cache", "The shared host cache");
  verb(cache, "set", "size=BYTES", false, [&] { show(c, "cache set", nullptr); });
  auto* reclaim = noun("reclaim", "Take memory back");
  verb(reclaim, "now", "Run all shrinkers: [bytes=N]", false, [&] { show(c, "reclaim", nullptr); });
  verb(reclaim, "trace", "The last passes", false, [&] {
    const json j = call(c, "reclaim trace");
    if (j.is_string()) print(j.get<std::string>());
  });

  auto* volume = noun("volume", "Layers and their members");
  verb(volume, "list", "Every volume", false, [&] { show(c, "volume list", volumes_report); });
  auto* cat = verb(volume, "cat", "Contents to standard output (needs --config)", true,
                   [&] { with_config(c, [&](const Config& f) { return volume_cat(c, f); }); });
  auto* write = verb(volume, "write", "Standard input to the volume (needs --config)", true,
                     [&] { with_config(c, [&](const Config& f) { return volume_write(c, f); }); });
  for (auto* v : {cat, write}) {
    v->add_option("--offset", c.offset, "Bytes");
    v->add_option("--length", c.length, "Bytes; default: to the end");
  }
  auto check = [&] {
    with_config(c, [&](const Config& f) -> Status {
      SPILLWAY_TRY(const std::string text, offline_check(f, c.name, c.repair));
      print(text);
      return {};
    });
  };
  verb(volume, "check", "Read everything, compare redundancy (needs --config)", true, check)
      ->add_flag("--repair", c.repair);
  auto* scrub = verb(volume, "scrub", "mode=check|repair|stop; with --config and no daemon: at once", true, [&, check] {
    auto socket = control_socket(c);
    auto args = arguments(c);
    if (!args) {
      c.exit_code = report_error(args.error());
      return;
    }
    if (!c.config.empty() && socket) {
      auto reply = control_call(*socket, "status", json::object());
      if (!reply && is_unreachable(reply.error())) {
        c.repair = c.repair || args->value("mode", "") == "repair";
        check();
        return;
      }
    }
    const json j = call(c, "volume scrub", c.repair ? json{{"mode", "repair"}} : json::object());
    if (!j.is_null()) print(c.as_json ? j.dump(2) + "\n" : j.value("text", ""));
  });
  scrub->add_flag("--repair", c.repair);
  verb(volume, "create", "Write superblocks on the members (needs --config)", true,
       [&] { with_config(c, [&](const Config& f) { return volume_create(c, f); }); });
  verb(volume, "status", "State, members, progress, what to do next", true, [&] { volume_status(c); });
  verb(volume, "assemble", "What the superblocks say, without starting it (needs --config)", true,
       [&] { with_config(c, [&](const Config& f) -> Status {
           SPILLWAY_TRY(const ArrayStatus s, offline_status(f, c.name));
           print(c.as_json ? status_json(s).dump(2) + "\n" : format_status(s));
           return {};
         }); });
  for (const char* name : {"fail", "remove", "add", "replace", "grow"}) {
    const std::string command = std::string("volume ") + name;
    verb(volume, name, "member=DISK (replace: with=DISK)", true, [&c, command] { volume_member(c, command); });
  }
  verb(volume, "advise", "The mkfs.xfs line that fits the geometry", true, [&] {
    auto print_advice = [&](const std::string& command, const std::string& reason) {
      print(command + "\n# " + reason + "\n");
    };
    if (c.config.empty()) {
      const json j = call(c, "volume advise");
      if (j.is_null()) return;
      if (c.as_json) print_json(j);
      else print_advice(j.value("command", ""), j.value("reason", ""));
      return;
    }
    with_config(c, [&](const Config& f) -> Status {
      SPILLWAY_TRY(const MkfsAdvice a, offline_advise(f, c.name, c.device));
      if (c.as_json)
        print_json({{"command", a.command}, {"reason", a.reason}, {"su", a.su}, {"sw", a.sw}, {"agsize", a.agsize}});
      else print_advice(a.command, a.reason);
      return {};
    });
  })->add_option("--device", c.device, "The device's name in the guest");

  auto* disk = noun("disk", "Leaves");
  auto* calibrate = verb(disk, "calibrate", "Measure an unused disk's cost model (needs --config)", true, [&] {
    with_config(c, [&](const Config& f) -> Status {
      SPILLWAY_TRY(const std::string text, calibrate_disk(f, c.name, c.seconds, c.writes));
      print(text);
      return {};
    });
  });
  calibrate->add_option("--seconds", c.seconds, "How long, default 60")->check(CLI::Range(1.0, 3600.0));
  calibrate->add_flag("--writes", c.writes, "Measure writes too, putting back what was there");
  auto* config = noun("config", "The config file");
  verb(config, "check", "Touch nothing, exit 0 or 2 (needs --config)", false, [&] {
    with_config(c, [&](const Config& f) -> Status {
      SPILLWAY_TRY(auto reactor, UringReactor::create());
      Status s = reactor->block_on(check_config(f));
      if (!s) {
        std::fprintf(stderr, "%s\n", s.error().message().c_str());
        c.exit_code = kExitUsage;
      } else {
        print(f.file + ": ok\n");
      }
      return {};
    });
  });
  verb(config, "dump", "The config as the daemon (or --config) has it", false, [&] {
    if (!c.config.empty() && c.socket.empty()) {
      with_config(c, [&](const Config& f) -> Status {
        print(f.dump());
        return {};
      });
      return;
    }
    const json j = call(c, "config dump");
    if (j.is_string()) print(j.get<std::string>());
  });
  add_image_commands(app, &c.exit_code);
  app.add_subcommand("vmm-exec", "Run a VMM so that its pmem faults stay small: vmm-exec -- COMMAND ARGS");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? kExitOk : kExitUsage;
  }
  return c.exit_code;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) { return spillway::run(argc, argv); }
