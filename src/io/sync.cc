#include "src/io/sync.h"

namespace spillway {

static Task<void> run_part(Task<Status> task, Status* first, AsyncCounter* left) {
  Status s = co_await task;
  if (!s && first->has_value()) *first = std::move(s);
  left->done();
}

Task<Status> all_of(std::vector<Task<Status>> tasks) {
  Status first{};
  if (tasks.size() == 1) {
    first = co_await tasks.front();
    co_return first;
  }
  AsyncCounter left;
  Reactor& reactor = Reactor::current();
  for (auto& t : tasks) {
    if (t.is_ready()) {
      Status s = co_await t;
      if (!s && first.has_value()) first = std::move(s);
      continue;
    }
    left.add();
    reactor.spawn(run_part(std::move(t), &first, &left));
  }
  co_await left.wait_idle();
  co_return first;
}

}  // namespace spillway
