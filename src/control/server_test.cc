#include "src/control/server.h"

#include <gtest/gtest.h>

#include <thread>

#include <nlohmann/json.hpp>

#include "src/base/unix_socket.h"

namespace spillway {
namespace {

using nlohmann::json;

Task<Result<json>> answer(const std::string& command, const json& args) {
  if (command == "echo") co_return args;
  co_return fail(ErrorKind::kNotFound, "no command " + command);
}

TEST(ControlServer_requests, are_answered_or_refused) {
  const std::string path = testing::TempDir() + "/spillway-control-test.sock";
  auto reactor = UringReactor::create(64);
  ASSERT_TRUE(reactor);
  auto listener = listen_unix(path);
  ASSERT_TRUE(listener) << listener.error().message();
  EXPECT_EQ(check_listen_unix(path).error().kind(), ErrorKind::kBusy);
  ControlServer server(std::move(*listener), answer);
  std::thread loop([&] { (*reactor)->block_on(server.run()); });
  auto r = control_call(path, "echo", json{{"a", 1}});
  ASSERT_TRUE(r) << r.error().message();
  EXPECT_EQ((*r)["a"], 1);
  auto e = control_call(path, "nope", json::object());
  ASSERT_FALSE(e);
  EXPECT_EQ(e.error().kind(), ErrorKind::kNotFound);
  EXPECT_EQ(e.error().message(), "no command nope");
  auto raw = connect_unix(path);
  ASSERT_TRUE(raw);
  ASSERT_EQ(::write(raw->get(), "nonsense\n", 9), 9);
  char buffer[512];
  const auto n = ::read(raw->get(), buffer, sizeof buffer);
  ASSERT_GT(n, 0);
  EXPECT_NE(std::string(buffer, static_cast<size_t>(n)).find("\"ok\":false"), std::string::npos);
  raw->reset();
  (*reactor)->post([&] { server.stop(); });
  loop.join();
  EXPECT_EQ(control_call(path, "echo", json::object()).error().kind(), ErrorKind::kNotFound);
  EXPECT_TRUE(listen_unix(path));  // stale now: replaced
  ::unlink(path.c_str());
}

}  // namespace
}  // namespace spillway
