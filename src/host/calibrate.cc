#include "src/host/calibrate.h"

#include <filesystem>
#include <fstream>
#include <sstream>

#include <fmt/core.h>

#include "src/host/graph.h"
#include "src/io/reactor.h"
#include "src/qos/calibrate.h"

namespace spillway {

static std::string model_path(const Config& config, const std::string& disk) {
  return fmt::format("{}.d/{}.model", config.file, disk);
}

Result<QosModel> stored_model(const Config& config, const std::string& disk) {
  const std::string path = model_path(config, disk);
  std::ifstream in(path);
  if (!in) return QosModel{};
  std::stringstream text;
  text << in.rdbuf();
  auto model = QosModel::parse(text.str());
  if (!model) return fail(std::move(model.error()).with_context(path));
  return model;
}

static Task<Result<Calibration>> measure(const Config& config, std::string disk, double seconds, bool writes) {
  GraphOptions options;
  options.read_only = !writes;
  Graph graph(config, std::move(options));
  auto leaf = co_await graph.open(disk);
  if (!leaf) co_return fail(leaf.error());
  CalibrateOptions how;
  how.seconds = seconds;
  how.writes = writes;
  auto result = co_await calibrate(*leaf, how);
  *leaf = nullptr;
  Status closed = co_await graph.close();
  if (result && !closed) co_return fail(closed.error());
  co_return result;
}

Result<std::string> calibrate_disk(const Config& config, const std::string& disk, double seconds, bool writes) {
  if (!config.disks.contains(disk))
    return fail(ErrorKind::kNotFound, fmt::format("{}: there is no disk \"{}\"", config.file, disk));
  SPILLWAY_TRY(auto reactor, UringReactor::create());
  SPILLWAY_TRY(const Calibration c, reactor->block_on(measure(config, disk, seconds, writes)));
  const std::string path = model_path(config, disk);
  std::error_code ec;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), ec);
  // Whole or not at all: a new file takes the old one's place.
  const std::string fresh = path + ".new";
  {
    std::ofstream out(fresh, std::ios::trunc);
    out << c.model.to_text();
    out.flush();
    if (!out) return fail(ErrorKind::kIo, fmt::format("{}: cannot be written", fresh));
  }
  std::filesystem::rename(fresh, path, ec);
  if (ec) return fail(ErrorKind::kIo, fmt::format("{}: {}", path, ec.message()));
  return c.to_text() + fmt::format("stored in {}\n", path);
}

}  // namespace spillway
