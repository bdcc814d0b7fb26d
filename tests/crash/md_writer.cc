// Makes md arrays on files with Spillway's own code, for other programs to open (tests/vm/full_md_test.py).
//
//   md_writer FILE... --layer raid5 [--chunk N] [--layout L] [--consistency C] [--fail FILE] [--grow FILE]
//             [--replace OLD NEW] [--kill] [--seed N] | --read
// Creates the array, writes all of it with a pattern, then rewrites parts. Half way: --fail: that member fails; --grow: that
// file joins a linear array; --replace: NEW (no member before) takes OLD's place. --kill: exits without closing, between
// two writes. Prints the sha256 of the contents, the size in bytes.
#include <fmt/core.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "src/base/log.h"
#include "src/io/reactor.h"
#include "src/volume/assemble.h"
#include "src/volume/file/file.h"
#include "src/volume/testing.h"

using namespace spillway;

namespace {

[[noreturn]] void die(const std::string& why) {
  fmt::print(stderr, "md_writer: {}\n", why);
  std::exit(1);
}
void check(Status s) {
  if (!s) die(s.error().message());
}

}  // namespace

int main(int argc, char** argv) {
  LayerSpec spec;
  spec.name = "made-here";
  std::string fail_member, late_name, replaced;
  bool kill = false, read = false;
  uint64_t seed = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const auto value = [&] { return i + 1 < argc ? std::string(argv[++i]) : (die(a + " needs a value"), std::string()); };
    if (a == "--layer") spec.layer = value();
    else if (a == "--chunk") spec.chunk = std::stoull(value());
    else if (a == "--layout") spec.raid5_layout = value();
    else if (a == "--consistency") spec.consistency = value();
    else if (a == "--fail") fail_member = value();
    else if (a == "--grow") late_name = value();
    else if (a == "--replace") replaced = value(), late_name = value();
    else if (a == "--seed") seed = std::stoull(value());
    else if (a == "--kill") kill = true;
    else if (a == "--read") read = true;
    else {
      FileOptions o;
      o.path = a;
      o.direct = false;
      auto v = open_file(a.substr(a.rfind('/') + 1), std::move(o));
      if (!v) die(v.error().message());
      spec.members.push_back(*v);
    }
  }
  auto reactor = UringReactor::create(256);
  if (!reactor) die(reactor.error().message());
  Reactor& r = **reactor;
  if (read) {
    spec.layer = "md";
    spec.read_only = true;
    auto v = r.block_on(assemble(spec));
    if (!v) die(v.error().message());
    fmt::print("{}\n", (*v)->size());
    std::fflush(stdout);
    FILE* p = ::popen("sha256sum | cut -c1-64", "w");
    for (uint64_t at = 0; at < (*v)->size(); at += kMiB) {
      auto data = r.block_on(testing_support::read_bytes(**v, at, std::min<uint64_t>(kMiB, (*v)->size() - at)));
      if (!data) die(data.error().message());
      std::fwrite(data->data(), 1, data->size(), p);
    }
    ::pclose(p);
    return 0;
  }
  VolumePtr late;
  for (auto it = spec.members.begin(); it != spec.members.end(); ++it)
    if ((*it)->name() == late_name) {
      late = *it;
      spec.members.erase(it);
      break;
    }
  if (!late_name.empty() && !late) die("no file " + late_name);
  auto plan = r.block_on(create_array(spec, CreateOptions{}));
  if (!plan) die(plan.error().message());
  auto v = r.block_on(assemble(spec));
  if (!v) die(v.error().message());
  std::mt19937_64 random(seed);
  std::vector<std::byte> model((*v)->size());
  const auto put = [&](uint64_t at, uint64_t n) {
    const auto data = testing_support::random_bytes(random(), n);
    check(r.block_on(testing_support::write_bytes(**v, at, data)));
    std::copy(data.begin(), data.end(), model.begin() + static_cast<ptrdiff_t>(at));
  };
  for (uint64_t at = 0; at < model.size(); at += kMiB) put(at, std::min<uint64_t>(kMiB, model.size() - at));
  for (int i = 0; i < 200; ++i) {
    if (i == 100 && !fail_member.empty()) check(r.block_on(array_control(**v)->fail_member(fail_member)));
    if (i == 100 && late && replaced.empty()) {
      check(r.block_on(grow(**v, late)));
      const uint64_t before = model.size();
      model.resize((*v)->size());
      for (uint64_t at = before; at < model.size(); at += kMiB) put(at, std::min<uint64_t>(kMiB, model.size() - at));
    } else if (i == 100 && late) {
      check(r.block_on(array_control(**v)->replace_member(replaced, late)));
    }
    const uint64_t at = random() % (model.size() / 4096) * 4096;
    put(at, std::min<uint64_t>((1 + random() % 40) * 4096, model.size() - at));
  }
  if (!replaced.empty()) r.block_on(array_control(**v)->wait_idle());
  if (!kill) check(r.block_on((*v)->close()));
  else check(r.block_on((*v)->flush({})));
  FILE* p = ::popen("sha256sum | cut -c1-64", "w");
  fmt::print("{}\n", model.size());
  std::fflush(stdout);
  std::fwrite(model.data(), 1, model.size(), p);
  ::pclose(p);
  if (kill) ::_exit(0);
  return 0;
}
