// spillwayd: without --store-fd this process becomes the holder and starts itself again as the worker; with it, it is
// the worker. Exit codes: 0 ended as asked, 1 failed, 2 usage or config.
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/base/unix_socket.h"
#include "src/control/server.h"
#include "src/host/holder.h"
#include "src/host/host.h"

namespace spillway {
namespace {

constexpr int kExitFailed = 1, kExitUsage = 2;

int report(const Error& e, int code) {
  std::fprintf(stderr, "%s\n", e.message().c_str());
  return code;
}

// The control socket's listener outlives the worker, so that a client never finds it gone during a restart.
Result<Fd> control_listener(const Config& config, FdStore& store) {
  constexpr const char* kName = "control/listen";
  if (auto kept = store.get(kName); kept && kept->fds.size() == 1) return std::move(kept->fds[0]);
  auto fd = listen_unix(config.host.control);
  if (!fd) return fail(config.host.where.error("control", fd.error().message(), fd.error().kind()));
  const int raw = fd->get();
  SPILLWAY_CHECK(store.put(kName, std::span(&raw, 1), ""));
  return fd;
}

// Runs until a signal asks for the end.
Task<void> wait_for_signal(int signal_fd) {
  for (;;) {
    const int events = co_await Reactor::current().poll(signal_fd, POLLIN);
    if (events < 0) co_return;
    signalfd_siginfo info;
    if (::read(signal_fd, &info, sizeof info) != sizeof info) continue;
    if (info.ssi_signo == SIGHUP) continue;  // nothing is reopened: logs go to stderr
    log(LogLevel::kInfo, "spillwayd", "signal {}: stopping", info.ssi_signo);
    co_return;
  }
}

Task<Status> work(const Config& config, RemoteFdStore& store, int signal_fd) {
  SPILLWAY_CO_TRY(const uint64_t restarts, store.restarts());
  if (restarts == 0) {
    Status checked = co_await check_config(config);
    if (!checked) co_return checked;
  }
  Host::Options options;
  options.store = &store;
  options.restarts = [&store] { return store.restarts(); };
  auto listener = control_listener(config, store);
  if (!listener) co_return fail(listener.error());
  auto started = co_await Host::start(config, std::move(options));
  if (!started) {
    if (restarts == 0) ::unlink(config.host.control.c_str());  // else it is kept, and the next worker's
    co_return fail(started.error());
  }
  Host& host = **started;
  ControlServer server(std::move(*listener), [&host](const std::string& command, const nlohmann::json& args) {
    return host.command(command, args);
  });
  Reactor::current().spawn(server.run());
  SPILLWAY_CO_CHECK(store.ready());
  log(LogLevel::kInfo, "spillwayd", "ready: {} exports, control socket {}", config.exports.size(),
      config.host.control);
  co_await wait_for_signal(signal_fd);
  server.stop();
  Status stopped = co_await host.stop();
  ::unlink(config.host.control.c_str());
  co_return stopped;
}

int run_worker(const Config& config, int store_fd) {
  sigset_t mask;
  sigemptyset(&mask);
  for (int s : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&mask, s);
  ::pthread_sigmask(SIG_BLOCK, &mask, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  Fd signals(::signalfd(-1, &mask, SFD_CLOEXEC));
  ::fcntl(store_fd, F_SETFD, FD_CLOEXEC);
  RemoteFdStore store{Fd(store_fd)};
  auto reactor = UringReactor::create();
  if (!reactor) return report(reactor.error(), kExitFailed);
  Status s = (*reactor)->block_on(work(config, store, signals.get()));
  if (s) return 0;
  // What names a place in the config is the user's to mend.
  const bool config_error = s.error().message().starts_with(config.file + ":");
  return report(s.error(), config_error ? kExitUsage : kExitFailed);
}

int check_only(const Config& config) {
  auto reactor = UringReactor::create();
  if (!reactor) return report(reactor.error(), kExitFailed);
  Status s = (*reactor)->block_on(check_config(config));
  if (!s) return report(s.error(), kExitUsage);
  std::printf("%s: ok: %zu disks, %zu volumes, %zu groups, %zu exports\n", config.file.c_str(),
              config.disks.size(), config.volumes.size(), config.groups.size(), config.exports.size());
  return 0;
}

int run(int argc, char** argv) {
  CLI::App app{"Serves disks to virtual machines out of one shared host cache"};
  std::string config_file, level = "info";
  bool check = false, capabilities = false, unshare = false;
  int store_fd = -1;
  app.add_option("--config", config_file, "The TOML file, see spillway.toml(5)");
  app.add_flag("--check", check, "Look at the config and what it names, touch nothing, exit 0 or 2");
  app.add_option("--log-level", level, "debug, info, warn or error")
      ->check(CLI::IsMember({"debug", "info", "warn", "error"}));
  app.add_flag("--unshare", unshare, "Copy extents that a tenant's disk shares with another tenant's (P6)");
  app.add_flag("--print-capabilities", capabilities,
               "What this program serves, as JSON (vhost-user backend conventions)");
  app.add_option("--store-fd", store_fd)->group("");  // the holder's socket: not for people
  app.set_version_flag("--version", "spillwayd 0.1.0");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kExitUsage;
  }
  if (capabilities) {
    std::puts(R"({"type": "block", "features": ["read-only", "blk-file"]})");
    return 0;
  }
  set_log_level(level == "debug" ? LogLevel::kDebug : level == "warn" ? LogLevel::kWarn
                : level == "error" ? LogLevel::kError : LogLevel::kInfo);
  if (config_file.empty()) {
    std::fprintf(stderr, "spillwayd: --config FILE is required\n");
    return kExitUsage;
  }
  auto config = Config::load(config_file);
  if (!config) return report(config.error(), kExitUsage);
  config->host.unshare = config->host.unshare || unshare;
  if (check) return check_only(*config);
  if (store_fd >= 0) return run_worker(*config, store_fd);
  std::vector<std::string> worker{argv[0], "--config", config_file, "--log-level", level};
  if (unshare) worker.push_back("--unshare");
  return run_holder(worker);
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) { return spillway::run(argc, argv); }
